"""A contact sheet of samples: each picture, enlarged, with its questions and answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pruneops.analysis.pictures import FAINT, GAP, INK, MARGIN, PAPER, line_height, load_font
from pruneops.data.samples import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels along a side of a picture on the sheet, or a little more: pictures are enlarged by whole numbers.
SIDE = 576
_FONT_SIZE, _LETTERS = 15, 68


def draw_samples(samples: Sequence[Sample], columns: int = 2) -> Image:
    """The samples in rows of `columns`.

    Raises
    ------
    ValueError
        If there are no samples or columns.
    """
    from PIL import Image

    if not samples or columns < 1:
        raise ValueError(f"samples, columns: got {len(samples)} and {columns}, expected at least 1 of each")
    panels = [_panel(sample) for sample in samples]
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    width = max(sum(panel.width + MARGIN for panel in row) for row in rows) + MARGIN
    height = sum(max(panel.height for panel in row) + MARGIN for row in rows) + MARGIN
    sheet, y = Image.new("RGB", (width, height), PAPER), MARGIN
    for row in rows:
        x = MARGIN
        for panel in row:
            sheet.paste(panel, (x, y))
            x += panel.width + MARGIN
        y += max(panel.height for panel in row) + MARGIN
    return sheet


def _panel(sample: Sample) -> Image:
    from PIL import Image, ImageDraw

    picture = enlarged(sample)
    font = load_font(_FONT_SIZE)
    step = line_height(font)
    lines = [(sample.name, FAINT)]
    for turn in sample.turns:
        words = f"{turn.text}  {turn.answer}"
        lines += [(line, INK) for line in textwrap.wrap(words, _LETTERS * picture.width // SIDE)]
    panel = Image.new("RGB", (picture.width, picture.height + GAP + step * len(lines)), PAPER)
    panel.paste(picture, (0, 0))
    pen = ImageDraw.Draw(panel)
    for index, (line, colour) in enumerate(lines):
        pen.text((0, picture.height + GAP // 2 + step * index), line, fill=colour, font=font)
    return panel


def enlarged(sample: Sample) -> Image:
    """The picture, or the frames of a clip in rows of four, enlarged by a whole number without smoothing."""
    from PIL import Image

    side = sample.pictures[0].shape[0]
    if sample.kind != "clip":
        times = max(1, -(-SIDE // side))
        return Image.fromarray(sample.pictures[0].repeat(times, axis=0).repeat(times, axis=1))
    times, across = max(1, SIDE // (2 * side)), 4
    pictures = [np.pad(frame, ((0, 4), (0, 4), (0, 0)), constant_values=255) for frame in sample.pictures]
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % across)
    rows = [np.concatenate(pictures[start : start + across], axis=1) for start in range(0, len(pictures), across)]
    return Image.fromarray(np.concatenate(rows).repeat(times, axis=0).repeat(times, axis=1))
