"""What each patch of a picture shows, for training a vision tower before the language model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pruneops.data.glyphs import SHAPES, UNIT
from pruneops.data.scene import GRID, Thing
from pruneops.data.words import COLOUR_NAMES, REGIONS, SIGN_NAMES, SYLLABLES

#: The label of a patch that has a sliver of a thing, too little to tell what it is.
IGNORED = -100
#: What the numbers of each kind of label stand for; 0 is background, or a thing without this trait.
LABELS: dict[str, tuple[str, ...]] = {
    "shape": ("background", *SHAPES, "sign"),
    "colour": ("background", *COLOUR_NAMES, *SIGN_NAMES),
    "text": ("background", *SYLLABLES),
    "region": ("background", *REGIONS),
}


def covered(thing: Thing) -> dict[tuple[int, int], int]:
    """How much of each patch a thing's box covers, in 64ths, by row and column."""
    shares: dict[tuple[int, int], int] = {}
    for row in range(thing.y // UNIT, -(-(thing.y + UNIT) // UNIT)):
        for column in range(thing.x // UNIT, -(-(thing.x + thing.width) // UNIT)):
            down = min(thing.y + UNIT, UNIT * (row + 1)) - max(thing.y, UNIT * row)
            across = min(thing.x + thing.width, UNIT * (column + 1)) - max(thing.x, UNIT * column)
            shares[row, column] = down * across
    return shares


def _shows(share: int) -> bool:
    """Whether a patch covered so far, in 64ths, shows what covers it."""
    return 4 * share > UNIT * UNIT


def patch_labels(things: Sequence[Thing], grid: int = GRID) -> dict[str, np.ndarray]:
    """For each kind of `LABELS` the number of what each patch shows.

    Returns
    -------
    dict of str to ndarray
        ``(grid, grid)`` int64 each, rows downwards. A patch is labelled with a thing whose box covers more than a
        quarter of it; with less it is `IGNORED`. The text of a patch is the syllable in it. Every patch has a region.
    """
    labels = {name: np.zeros((grid, grid), dtype=np.int64) for name in LABELS}
    thirds = np.arange(grid) * 3 // grid
    labels["region"] += 1 + 3 * thirds[:, None] + thirds
    for thing in things:
        first = thing.x // UNIT
        for (row, column), share in covered(thing).items():
            text = thing.text[2 * (column - first) :][:2] or "background"
            for name, value in (("shape", thing.shape), ("colour", thing.colour), ("text", text)):
                labels[name][row, column] = LABELS[name].index(value) if _shows(share) else IGNORED
    return labels


def evidence_patches(things: Sequence[Thing], evidence: Sequence[int], grid: int = GRID) -> list[int]:
    """Numbers, row by row and ascending, of the patches that the given things cover more than a quarter of."""
    return sorted(
        row * grid + column
        for index in evidence
        for (row, column), share in covered(things[index]).items()
        if _shows(share)
    )
