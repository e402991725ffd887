"""Pictures of things on a busy background, in integer arithmetic: the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pruneops.data.draws import Draws
from pruneops.data.glyphs import UNIT, shape_mask, text_mask
from pruneops.data.scene import GRID, Thing
from pruneops.data.words import COLOURS, SIGNS

PATCH_SIZES = range(8, 33)


def check_patch_size(patch_size: int) -> int:
    """Returns it.

    Raises
    ------
    TypeError, ValueError
        If it is not a whole number of pixels from 8 to 32: letters of three pixels across are the smallest to read.
    """
    if isinstance(patch_size, bool) or not isinstance(patch_size, int):
        raise TypeError(f"patch_size must be an int, got {patch_size!r}")
    if patch_size not in PATCH_SIZES:
        raise ValueError(f"patch_size must be from {PATCH_SIZES[0]} to {PATCH_SIZES[-1]} pixels, got {patch_size}")
    return patch_size


def render(key: str, things: Sequence[Thing], patch_size: int, grid: int = GRID) -> np.ndarray:
    """The picture, ``(grid * patch_size, grid * patch_size, 3)`` uint8.

    Parameters
    ----------
    key : str
        Of the background.
    things : sequence of Thing
        None touches another, so their order does not matter.
    patch_size : int
        Pixels along a side of a patch.
    grid : int
        Patches along a side of the picture.

    Raises
    ------
    TypeError, ValueError
        See `check_patch_size`.
    """
    picture = background(key, check_patch_size(patch_size), grid)
    for thing in things:
        paste(picture, thing, patch_size)
    return picture


def paste(picture: np.ndarray, thing: Thing, patch_size: int) -> None:
    """Draw a thing into a picture."""
    x, y = thing.x * patch_size // UNIT, thing.y * patch_size // UNIT
    if thing.shape == "sign":
        plate, ink = SIGNS[thing.colour]
        mask = text_mask(thing.text, patch_size)
        height, width = mask.shape
        picture[y : y + height, x : x + width] = np.where(mask[..., None], np.uint8(ink), np.uint8(plate))
        return
    mask = shape_mask(thing.shape, patch_size)
    height, width = mask.shape
    colour = np.clip(np.add(COLOURS[thing.colour], thing.tint), 0, 255).astype(np.uint8)
    picture[y : y + height, x : x + width][mask] = colour


def background(key: str, patch_size: int, grid: int = GRID) -> np.ndarray:
    """Dull blocks, noise, strokes and vivid specks, ``(side, side, 3)`` uint8.

    Every patch has edges and many have vivid pixels, so that neither contrast nor colour alone tells where things are;
    specks are too small and strokes too thin to be taken for shapes.
    """
    draws, side = Draws(key, "background"), grid * patch_size
    picture = np.empty((side, side, 3), dtype=np.int16)
    # Blocks of dull colour, one grey and a little of each channel, which are not in line with the patches.
    blocks, block = grid // 2 + 2, 2 * patch_size
    top, left = draws.below(block), draws.below(block)
    grey, hue = draws.array(90, blocks * blocks), draws.array(50, 3 * blocks * blocks)
    dull = (50 + grey[:, None] + hue.reshape(-1, 3)).reshape(blocks, blocks, 3).astype(np.int16)
    picture[:] = dull.repeat(block, axis=0)[top : top + side].repeat(block, axis=1)[:, left : left + side]
    picture += (draws.bytes(side * side) % 33).astype(np.int16).reshape(side, side, 1) - 16

    def points(count: int, length: int, thick: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the pixels of lines that begin anywhere, ``(count, pixels of one)``."""
        begin, slope = draws.array(side, 2 * count).reshape(2, count, 1, 1), draws.array(3, 2 * count) - 1
        along, across = np.arange(length).reshape(1, -1, 1), np.arange(thick).reshape(1, 1, -1)
        rows, columns = begin + slope.reshape(2, count, 1, 1) * along
        # A stroke is made thicker to the right and downwards, whichever way it runs.
        rows, columns = rows + across // 2, columns + (across + 1) // 2
        return (rows % side).reshape(count, -1), (columns % side).reshape(count, -1)

    # Strokes, about two patches long: half dull, half vivid.
    names = np.array(list(COLOURS.values()), dtype=np.int16)
    strokes, thin = grid * grid // 4, max(1, patch_size // 8)
    rows, columns = points(strokes, 2 * patch_size, thin)
    inks = names[draws.array(len(names), strokes)]
    inks = (inks + 2 * 110) // 3
    picture[rows, columns] = inks[:, None]
    # Specks: up to three eighths of a patch.
    specks = grid * grid // 3
    rows, columns = points(specks, max(2, patch_size * 3 // 8), thin)
    picture[rows, columns] = names[draws.array(len(names), specks)][:, None]
    return np.clip(picture, 0, 255).astype(np.uint8)
