"""A contact sheet of what pruning made of a video: its frames, their segments, and what became of every patch.

PIL only. Patches whose tokens are kept to the end are in full colour; the others are dimmed, those that were merged
into another token more than those that were dropped later. A tint, and the outline of what is kept, tell static patches
from dynamic ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruneops.analysis.pictures import (
    FAINT,
    GAP,
    INK,
    MARGIN,
    OUTLINE,
    PAPER,
    SHADE,
    Box,
    fit_text,
    line_height,
    load_font,
    mask_of_boxes,
    outline_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

STATIC, DYNAMIC = (64, 128, 255), (255, 140, 0)
NO_SEGMENT = (200, 204, 210)
SEGMENTS = ((0, 158, 115), (214, 60, 150), (120, 81, 169), (0, 160, 190), (170, 30, 40), (140, 140, 40))
"""Border colours of segments, taken in turn."""
BORDER = 5
# How much of a patch is replaced by the shade, and then by its tint.
_DIMMED = {"dropped": (0.15, 0.3), "merged": (0.75, 0.22)}


@dataclass(frozen=True)
class VideoView:
    """The frames of a video and what became of their tokens.

    Attributes
    ----------
    images
        The frames as the model saw them, all of one size.
    captions
        A few words below each frame.
    boxes
        Per token of a frame its place in pixels of the frame, or None for a token that stands for no place. Token j of
        frame t is number ``t * len(boxes) + j`` of the video.
    tokens
        Numbers of the tokens that reached the language model: all of them, or those that stand for the tokens that were
        merged. A static one stands for its place in all frames of its segment and is named by the first.
    kept
        Those of ``tokens`` that are left in the last layer.
    window_sizes
        Frames of each segment in order; empty if the method knows no segments.
    static
        Per segment, for every token of a frame whether its place is static; empty if the method does not tell.
    title
        A line drawn above.
    """

    images: Sequence[Image]
    captions: Sequence[str]
    boxes: Sequence[Box | None]
    tokens: Sequence[int]
    kept: Collection[int]
    window_sizes: Sequence[int] = ()
    static: Sequence[Sequence[bool]] = ()
    title: str = ""

    @property
    def total(self) -> int:
        """Tokens of the video before any pruning."""
        return len(self.images) * len(self.boxes)

    def segment_of(self, frame: int) -> int | None:
        """The frame's segment, counted from 0; None if there are no segments."""
        end = 0
        for segment, size in enumerate(self.window_sizes):
            end += size
            if frame < end:
                return segment
        return None

    def is_static(self, frame: int, token: int) -> bool:
        """Whether token ``token`` of a frame lies at a static place of its segment."""
        segment = self.segment_of(frame)
        return bool(self.static) and segment is not None and bool(self.static[segment][token])

    def states(self) -> list[list[str]]:
        """``"kept"``, ``"dropped"`` (it reached the language model) or ``"merged"``, per frame and token."""
        alive, kept = set(self.tokens), set(self.kept)
        per_frame, first = len(self.boxes), 0
        states = []
        for frame in range(len(self.images)):
            if frame and self.segment_of(frame) != self.segment_of(frame - 1):
                first = frame
            row = []
            for token in range(per_frame):
                named = (first if self.is_static(frame, token) else frame) * per_frame + token
                row.append("kept" if named in kept else "dropped" if named in alive else "merged")
            states.append(row)
        return states

    def counts(self) -> str:
        """``"2 segments, 2304 visual tokens, 346 after merging (114 static, 232 dynamic), 131 kept (5.7 %)"``."""
        parts = []
        if self.window_sizes:
            parts.append(f"{len(self.window_sizes)} segment{'s' if len(self.window_sizes) > 1 else ''}")
        parts.append(f"{self.total} visual tokens")
        if len(self.tokens) != self.total or self.static:
            places = [divmod(number, len(self.boxes)) for number in self.tokens]
            static = sum(self.is_static(frame, token) for frame, token in places)
            parts.append(f"{len(self.tokens)} after merging ({static} static, {len(self.tokens) - static} dynamic)")
        parts.append(f"{len(self.kept)} kept ({100 * len(self.kept) / self.total:.1f} %)")
        return ", ".join(parts)


def segment_colour(segment: int | None) -> tuple[int, int, int]:
    """The border colour of a segment, counted from 0."""
    return NO_SEGMENT if segment is None else SEGMENTS[segment % len(SEGMENTS)]


def draw_contact_sheet(
    views: Sequence[VideoView],
    *,
    panel_width: int = 240,
    columns: int | None = None,
    title: str = "",
    note: str = "",
) -> Image:
    """Draws each video as a grid of its frames, below each other, with counts above and a legend below.

    Parameters
    ----------
    views
        At least one.
    panel_width
        Width of a frame in pixels; heights follow from the images.
    columns
        Frames side by side; by default as many as make a square of the longest video.
    title, note
        A line above and a line below the whole.

    Returns
    -------
    A new RGB image. Equal input gives an equal picture.

    Raises
    ------
    ValueError
        If there is no view, a view has no frames, or its numbers do not fit each other.
    """
    from PIL import Image, ImageDraw

    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if panel_width < 32:
        raise ValueError(f"panel_width must be at least 32 pixels, got {panel_width}")
    if not views:
        raise ValueError("views must hold at least one view, got none")
    for view in views:
        _check(view)
    columns = columns or math.ceil(math.sqrt(max(len(view.images) for view in views)))
    body, small = load_font(max(13, panel_width // 15)), load_font(max(10, panel_width // 20))
    line, small_line = line_height(body), line_height(small)
    sheets = [_panels(view, panel_width) for view in views]
    cell_heights = [panels[0].height + 2 * BORDER + small_line + GAP for panels in sheets]
    rows = [math.ceil(len(panels) / columns) for panels in sheets]
    width = 2 * MARGIN + columns * (panel_width + 2 * BORDER) + (columns - 1) * GAP
    with_merging = any(view.static for view in views)
    legend_height = small_line * (2 if with_merging else 1)
    height = 2 * MARGIN + legend_height + (small_line if note else 0) + (line + GAP if title else 0)
    height += sum(line + small_line + 4 + n * cell for n, cell in zip(rows, cell_heights, strict=True))

    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    room, y = width - 2 * MARGIN, MARGIN
    if title:
        pen.text((MARGIN, y), fit_text(title, body, room), font=body, fill=INK)
        y += line + GAP
    for view, panels, count, cell in zip(views, sheets, rows, cell_heights, strict=True):
        pen.text((MARGIN, y), fit_text(view.title, body, room), font=body, fill=INK)
        pen.text((MARGIN, y + line), fit_text(view.counts(), small, room), font=small, fill=FAINT)
        y += line + small_line + 4
        for frame, panel in enumerate(panels):
            left = MARGIN + frame % columns * (panel_width + 2 * BORDER + GAP)
            _cell(page, pen, (left, y + frame // columns * cell), view, frame, panel, small)
        y += count * cell
    _legend(pen, (MARGIN, y), room, small, small_line, with_merging)
    if note:
        pen.text((MARGIN, y + legend_height), fit_text(note, small, room), font=small, fill=FAINT)
    return page


def _cell(
    page: Image, pen: ImageDraw, place: tuple[int, int], view: VideoView, frame: int, panel: Image, font: Font
) -> None:
    """A frame in the colour of its segment, with its caption."""
    left, top = place
    segment = view.segment_of(frame)
    right, bottom = left + panel.width + 2 * BORDER, top + panel.height + 2 * BORDER
    pen.rectangle((left, top, right - 1, bottom - 1), fill=segment_colour(segment))
    page.paste(panel, (left + BORDER, top + BORDER))
    caption = view.captions[frame] if segment is None else f"segment {segment + 1}: {view.captions[frame]}"
    colour = FAINT if segment is None else segment_colour(segment)
    pen.text((left, bottom + 2), fit_text(caption, font, right - left), font=font, fill=colour)


def _panels(view: VideoView, width: int) -> list[Image]:
    from PIL import Image

    panels = []
    for frame, (image, states) in enumerate(zip(view.images, view.states(), strict=True)):
        source = image.convert("RGB")
        size = (width, max(1, round(source.height * width / source.width)))
        colour = source.resize(size, Image.Resampling.LANCZOS)
        panel = colour.copy()
        for tint in (STATIC, DYNAMIC):
            for state in ("kept", "dropped", "merged"):
                chosen = [
                    box
                    for token, box in enumerate(view.boxes)
                    if states[token] == state and view.is_static(frame, token) == (tint is STATIC)
                ]
                mask = mask_of_boxes(chosen, source.size, size)
                # Without static and dynamic patches there is nothing for a tint to tell.
                if state == "kept":
                    panel.paste(tint if view.static else OUTLINE, mask=outline_of(mask))
                else:
                    panel = Image.composite(_dimmed(colour, state, tint if view.static else SHADE), panel, mask)
        panels.append(panel)
    return panels


def _dimmed(colour: Image, state: str, tint: tuple[int, int, int]) -> Image:
    from PIL import Image

    shade, tinted = _DIMMED[state]
    grey = Image.blend(colour.convert("L").convert("RGB"), Image.new("RGB", colour.size, SHADE), shade)
    return Image.blend(grey, Image.new("RGB", colour.size, tint), tinted)


def _legend(pen: ImageDraw, place: tuple[int, int], room: int, font: Font, line: int, with_merging: bool) -> None:
    """What tints and brightness mean, on one line or, with tints, on two."""
    left, top = place
    text = "full colour: kept; dimmed: dropped in the model"
    if with_merging:
        text += "; dark: merged into another"
        side = line - 6
        for tint, name in ((STATIC, "static"), (DYNAMIC, "dynamic")):
            pen.rectangle((left, top + 1, left + side, top + 1 + side), fill=tint)
            pen.text((left + side + 5, top), name, font=font, fill=INK)
            left += side + 5 + int(font.getlength(name)) + GAP
        top += line
    pen.text((place[0], top), fit_text(text, font, room), font=font, fill=FAINT)


def _check(view: VideoView) -> None:
    frames, per_frame = len(view.images), len(view.boxes)
    if not frames or not per_frame:
        raise ValueError(f"view must have frames with tokens, got {frames} frames of {per_frame} tokens")
    if len({image.size for image in view.images}) != 1:
        raise ValueError(f"images must all have one size, got {sorted({image.size for image in view.images})}")
    if len(view.captions) != frames:
        raise ValueError(f"captions must have one entry per frame ({frames}), got {len(view.captions)}")
    if view.window_sizes and sum(view.window_sizes) != frames:
        raise ValueError(f"window_sizes must add up to {frames} frames, got {list(view.window_sizes)}")
    if view.static and [len(places) for places in view.static] != [per_frame] * len(view.window_sizes):
        raise ValueError(f"static must have {per_frame} entries for each of {len(view.window_sizes)} segments")
    bad = next((number for number in view.tokens if not 0 <= number < view.total), None)
    if bad is not None:
        raise ValueError(f"tokens must hold numbers of the {view.total} tokens, got {bad}")
    if not set(view.kept) <= set(view.tokens):
        raise ValueError(f"kept must be some of tokens, got {min(set(view.kept) - set(view.tokens))}")
