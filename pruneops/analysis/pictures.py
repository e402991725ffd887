"""A picture of what pruning kept: the image once a stage, kept patches in colour, dropped patches dimmed.

PIL only. A *view* is one image the model looked at, with the box each visual token stands for; several views
(the rows of a batch, or the overview and the detail tiles of an any-resolution model) are drawn below each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

Box = tuple[float, float, float, float]

PAPER = (255, 255, 255)
INK = (30, 34, 40)
FAINT = (105, 112, 122)
OUTLINE = (255, 196, 0)
SHADE = (38, 41, 46)
MARGIN, GAP = 16, 12


@dataclass(frozen=True)
class StageView:
    """One image with the boxes of its visual tokens and what each stage kept.

    Attributes
    ----------
    image
        The image as the model saw it (any mode; drawn as RGB).
    boxes
        Per visual token ``(left, top, right, bottom)`` in pixels of ``image``, or None for a token that
        stands for no place (a newline or class token).
    kept
        ``kept[s]``: indices into ``boxes`` of the tokens that survive stage s. No entry for the start, where
        all are there.
    title
        A line drawn above the view; empty for none.
    """

    image: Image
    boxes: Sequence[Box | None]
    kept: Sequence[Sequence[int]] = field(default_factory=tuple)
    title: str = ""


def grid_boxes(size: tuple[int, int], rows: int, columns: int) -> list[Box]:
    """Boxes of a ``rows x columns`` grid of patches over an image of ``size`` (width, height), row by row."""
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
    width, height = size
    return [
        (c * width / columns, r * height / rows, (c + 1) * width / columns, (r + 1) * height / rows)
        for r in range(rows)
        for c in range(columns)
    ]


def draw_stages(
    views: Sequence[StageView],
    captions: Sequence[str],
    *,
    panel_width: int = 320,
    title: str = "",
    note: str = "",
) -> Image:
    """Draws the views below each other, one panel a stage side by side.

    Parameters
    ----------
    views
        At least one; all with the same number of stages.
    captions
        One line per panel, the panel of the untouched image first: ``1 + len(view.kept)`` entries. Below it
        each panel says how many tokens of its view are left.
    panel_width
        Width of a panel in pixels; heights follow from the images.
    title, note
        A line above and a line below the whole.

    Returns
    -------
    A new RGB image. Equal input gives an equal picture.

    Raises
    ------
    ValueError
        If there is no view, the numbers of stages differ, or a kept index lies outside ``boxes``.
    """
    from PIL import Image, ImageDraw

    _check(views, captions, panel_width)
    body, small = load_font(max(11, panel_width // 20)), load_font(max(10, panel_width // 24))
    line, small_line = line_height(body), line_height(small)
    columns = len(captions)
    panels = [[_panel(view, stage, panel_width) for stage in range(columns)] for view in views]

    width = 2 * MARGIN + columns * panel_width + (columns - 1) * GAP
    top = MARGIN + (line + GAP if title else 0)
    height = top + line + 4
    for view, row in zip(views, panels, strict=True):
        height += (line if view.title else 0) + row[0].height + small_line + GAP
    height += small_line if note else 0
    page = Image.new("RGB", (width, height + MARGIN - GAP), PAPER)
    pen = ImageDraw.Draw(page)

    if title:
        pen.text((MARGIN, MARGIN), fit_text(title, body, width - 2 * MARGIN), font=body, fill=INK)
    lefts = [MARGIN + column * (panel_width + GAP) for column in range(columns)]
    for left, caption in zip(lefts, captions, strict=True):
        pen.text((left, top), fit_text(caption, body, panel_width), font=body, fill=INK)
    y = top + line + 4
    for view, row in zip(views, panels, strict=True):
        if view.title:
            pen.text((MARGIN, y), fit_text(view.title, small, width - 2 * MARGIN), font=small, fill=FAINT)
            y += line
        for stage, (left, panel) in enumerate(zip(lefts, row, strict=True)):
            page.paste(panel, (left, y))
            pen.text((left, y + panel.height + 2), _count(view, stage), font=small, fill=FAINT)
        y += row[0].height + small_line + GAP
    if note:
        pen.text((MARGIN, y), fit_text(note, small, width - 2 * MARGIN), font=small, fill=FAINT)
    return page


def _panel(view: StageView, stage: int, width: int) -> Image:
    """The view at one stage (0: before any), scaled to ``width``."""
    from PIL import Image

    source = view.image.convert("RGB")
    height = max(1, round(source.height * width / source.width))
    colour = source.resize((width, height), Image.Resampling.LANCZOS)
    if stage == 0:
        return colour
    dimmed = Image.blend(colour.convert("L").convert("RGB"), Image.new("RGB", colour.size, SHADE), 0.78)
    mask = mask_of_boxes([view.boxes[index] for index in view.kept[stage - 1]], source.size, colour.size)
    panel = Image.composite(colour, dimmed, mask)
    panel.paste(OUTLINE, mask=outline_of(mask))
    return panel


def mask_of_boxes(boxes: Sequence[Box | None], size: tuple[int, int], drawn_size: tuple[int, int]) -> Image:
    """White where the boxes lie, in a picture of ``size`` (width, height) that is drawn at ``drawn_size``."""
    from PIL import Image, ImageDraw

    scale_x, scale_y = drawn_size[0] / size[0], drawn_size[1] / size[1]
    mask = Image.new("L", drawn_size, 0)
    pen = ImageDraw.Draw(mask)
    for box in boxes:
        if box is not None:
            # Rounding both edges the same way leaves no seam between neighbouring patches.
            left, top = round(box[0] * scale_x), round(box[1] * scale_y)
            right, bottom = round(box[2] * scale_x), round(box[3] * scale_y)
            if right > left and bottom > top:
                pen.rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


def outline_of(mask: Image) -> Image:
    """The inner border, one pixel wide, of the kept area: it tells kept from dropped on dark images too."""
    from PIL import ImageChops, ImageFilter

    return ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(3))).point(lambda value: value * 0.7)


def _count(view: StageView, stage: int) -> str:
    total = len(view.boxes)
    left = total if stage == 0 else len(view.kept[stage - 1])
    if stage == 0:
        return f"{total} visual tokens"
    return f"{left} of {total} ({100 * left / total:.1f} %)" if total else "no visual tokens"


def load_font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def line_height(font: FreeTypeFont | ImageFont) -> int:
    return int(font.getbbox("Ag|")[3]) + 4


def fit_text(text: str, font: FreeTypeFont | ImageFont, width: int) -> str:
    """``text`` on one line, shortened with dots where it is wider than ``width``."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _check(views: Sequence[StageView], captions: Sequence[str], panel_width: int) -> None:
    if not views:
        raise ValueError("views must hold at least one view, got none")
    if panel_width < 32:
        raise ValueError(f"panel_width must be at least 32 pixels, got {panel_width}")
    for view in views:
        if len(view.kept) + 1 != len(captions):
            raise ValueError(
                f"captions must have one entry per panel ({len(view.kept) + 1}: the image and each stage), "
                f"got {len(captions)}"
            )
        for stage, kept in enumerate(view.kept):
            bad = next((index for index in kept if not 0 <= index < len(view.boxes)), None)
            if bad is not None:
                raise ValueError(f"kept[{stage}] must hold indices of the {len(view.boxes)} boxes, got {bad}")
