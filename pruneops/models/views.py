"""Where the visual tokens of a LLaVA model lie in its images: the bridge from kept tokens to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruneops.analysis.pictures import Box, grid_boxes

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageView:
    """A picture the model looked at, the tokens it became, and the place of each of them.

    ``tokens[j]`` counts within the visual tokens of the one image; ``boxes[j]`` is its box in ``image`` or
    None.
    """

    image: Image
    tokens: Sequence[int]
    boxes: Sequence[Box | None]
    title: str


def image_views(
    config: Any, image_processor: Any, original: Image, pixel_values: torch.Tensor, num_tokens: int
) -> list[ImageView]:
    """The views behind one image's visual tokens.

    Parameters
    ----------
    config
        Config of a LLaVA or LLaVA-NeXT model.
    image_processor
        The processor's image part, which knows how pixel values were normalised.
    original
        The image as it was read.
    pixel_values
        What the processor made of it: ``(3, height, width)``, or ``(tiles, 3, height, width)`` for
        LLaVA-NeXT.
    num_tokens
        Number of placeholders the image has in the prompt.

    Returns
    -------
    One view for LLaVA (the resized and cropped image), two for LLaVA-NeXT (overview and detail). Empty if
    ``num_tokens`` fits no known layout: the answer can then be shown, the picture cannot.
    """
    patch = config.vision_config.patch_size
    class_tokens = 1 if config.vision_feature_select_strategy == "full" else 0
    if pixel_values.dim() == 4:
        return _anyres_views(config, original, class_tokens, num_tokens)
    rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    if num_tokens not in (rows * columns, rows * columns + class_tokens):
        return []
    image = denormalize(pixel_values, image_processor)
    boxes: list[Box | None] = [None] * (num_tokens - rows * columns)
    boxes += grid_boxes(image.size, rows, columns)
    return [ImageView(image, range(num_tokens), boxes, "")]


def denormalize(pixel_values: torch.Tensor, image_processor: Any) -> Image:
    """The picture in ``pixel_values`` ``(3, height, width)``: the image as the vision tower sees it."""
    import torch
    from PIL import Image

    pixels = pixel_values.detach().float().cpu()
    if getattr(image_processor, "do_normalize", True):
        mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
        std = torch.tensor(image_processor.image_std).view(3, 1, 1)
        pixels = pixels * std + mean
    if getattr(image_processor, "do_rescale", True):
        pixels = pixels * 255.0
    return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _anyres_views(config: Any, original: Image, class_tokens: int, num_tokens: int) -> list[ImageView]:
    """LLaVA-NeXT: the image squeezed into a square, then its detail grid with a newline after each row."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    base = side * side + class_tokens
    grid = _detail_grid(original.size, config.image_grid_pinpoints, config.vision_config.image_size, side)
    if grid is None or num_tokens != base + grid[0] * (grid[1] + 1):
        return []
    rows, columns = grid
    overview: list[Box | None] = [None] * class_tokens
    overview += grid_boxes(original.size, side, side)
    first = ImageView(original, range(base), overview, "overview")
    if not rows * columns:
        # The image is so narrow that nothing but newlines is left of its detail grid.
        return [first]
    places = grid_boxes(original.size, rows, columns)
    detail: list[Box | None] = []
    for row in range(rows):
        detail += [*places[row * columns : (row + 1) * columns], None]
    return [
        first,
        ImageView(original, range(base, num_tokens), detail, "detail, a newline token after each row"),
    ]


def _detail_grid(
    size: tuple[int, int], pinpoints: Sequence[Sequence[int]], tile: int, side: int
) -> tuple[int, int] | None:
    """Rows and columns of the detail grid once the padding that keeps the aspect ratio is cut off again."""
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    best_height, best_width = select_best_resolution((height, width), list(pinpoints))
    rows, columns = best_height // tile * side, best_width // tile * side
    if rows < 1 or columns < 1:
        return None
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    return rows, columns
