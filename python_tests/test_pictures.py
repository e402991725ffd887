"""The picture of what was kept, and where visual tokens lie in an image."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops

from pruneops.analysis.pictures import GAP, MARGIN, StageView, draw_stages, grid_boxes
from pruneops.models.views import ImageView, denormalize, image_views

RED = (200, 30, 30)


def view(kept: list[list[int]], title: str = "") -> StageView:
    image = Image.new("RGB", (64, 64), RED)
    return StageView(image, grid_boxes(image.size, 4, 4), kept, title)


def panel_top(page: Image.Image) -> int:
    column = [page.getpixel((MARGIN + 2, y)) for y in range(page.height)]
    return column.index(RED)


def test_grid_boxes_tile_the_image_row_by_row() -> None:
    boxes = grid_boxes((60, 40), 2, 3)
    assert boxes[0] == (0, 0, 20, 20) and boxes[2] == (40, 0, 60, 20) and boxes[3] == (0, 20, 20, 40)


def test_kept_patches_keep_their_colour_and_dropped_ones_lose_it() -> None:
    page = draw_stages([view([[0, 5]])], ["all", "stage"], panel_width=64)
    top, left = panel_top(page), MARGIN + 64 + GAP
    middle = {index: (left + 16 * (index % 4) + 8, top + 16 * (index // 4) + 8) for index in range(16)}
    for index, place in middle.items():
        red, green, blue = page.getpixel(place)
        if index in (0, 5):
            assert (red, green, blue) == RED
        else:
            assert max(red, green, blue) - min(red, green, blue) < 16 and red < 100
    assert page.getpixel((MARGIN + 40, top + 40)) == RED


def test_a_page_has_one_panel_a_stage_and_one_line_of_panels_a_view() -> None:
    one = draw_stages([view([[0], []])], ["a", "b", "c"], panel_width=64)
    two = draw_stages([view([[0], []]), view([[1], [1]])], ["a", "b", "c"], panel_width=64)
    assert one.width == two.width == 2 * MARGIN + 3 * 64 + 2 * GAP
    assert two.height - one.height >= 64


def test_drawing_is_repeatable_and_leaves_the_source_alone() -> None:
    source = view([[3]], "a title that is much longer than a panel of this width could ever hold")
    before = source.image.copy()
    pages = [draw_stages([source], ["all", "stage"], panel_width=64, title="t", note="n") for _ in "ab"]
    assert pages[0].tobytes() == pages[1].tobytes()
    assert ImageChops.difference(before, source.image).getbbox() is None


def test_tokens_without_a_place_are_counted_but_not_drawn() -> None:
    image = Image.new("RGB", (32, 32), RED)
    page = draw_stages([StageView(image, [None, None], [[0]])], ["all", "stage"], panel_width=64)
    top = panel_top(page)
    assert page.getpixel((MARGIN + 64 + GAP + 20, top + 20)) != RED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["all"]), "at least one view"),
        (([view([[0]])], ["all"]), "captions must have one entry per panel"),
        (([view([[16]])], ["all", "stage"]), r"kept\[0\] must hold indices of the 16 boxes, got 16"),
    ],
)
def test_bad_pictures_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_stages(*arguments)


def processor() -> SimpleNamespace:
    return SimpleNamespace(do_normalize=True, do_rescale=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])


def config(strategy: str = "default", **more: object) -> SimpleNamespace:
    vision = SimpleNamespace(patch_size=14, image_size=28)
    return SimpleNamespace(vision_config=vision, vision_feature_select_strategy=strategy, **more)


def test_denormalize_gives_the_pixels_the_tower_saw() -> None:
    pixels = torch.randint(0, 256, (3, 28, 42))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor().image_mean, processor().image_std))
    image = denormalize((pixels / 255 - mean) / std, processor())
    assert image.size == (42, 28)
    assert image.tobytes() == pixels.permute(1, 2, 0).to(torch.uint8).contiguous().numpy().tobytes()


def test_llava_tokens_are_the_patch_grid_and_a_class_token_has_no_place() -> None:
    original, pixels = Image.new("RGB", (100, 50)), torch.zeros(3, 28, 28)
    (plain,) = image_views(config(), processor(), original, pixels, 4)
    (full,) = image_views(config("full"), processor(), original, pixels, 5)
    assert plain.boxes == grid_boxes((28, 28), 2, 2)
    assert full.boxes == [None, *plain.boxes] and list(full.tokens) == [0, 1, 2, 3, 4]


def test_an_unknown_layout_gives_no_view() -> None:
    assert image_views(config(), processor(), Image.new("RGB", (9, 9)), torch.zeros(3, 28, 28), 7) == []


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (30, 110), (56, 56), (57, 41), (333, 100)])
def test_llava_next_views_cover_exactly_the_tokens_transformers_makes(size: tuple[int, int]) -> None:
    views, count = llava_next_views(size)
    assert [v.title.split(",")[0] for v in views] == ["overview", "detail"]
    assert [token for v in views for token in v.tokens] == list(range(count))
    assert all(len(v.tokens) == len(v.boxes) for v in views)


@pytest.mark.parametrize("size", [(30, 200), (200, 30)])
def test_an_image_too_narrow_for_detail_is_drawn_as_overview(size: tuple[int, int]) -> None:
    views, _ = llava_next_views(size)
    assert [v.title for v in views] == ["overview"] and len(views[0].boxes) == 4


def llava_next_views(size: tuple[int, int]) -> tuple[list[ImageView], int]:
    """The views of an image of this size, and the number of placeholders the stock processor makes for it."""
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    from pruneops.models.small import small_tokenizer

    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    reader = LlavaNextProcessor(images, small_tokenizer(), patch_size=14, vision_feature_select_strategy="default")
    reader.num_additional_image_tokens = 1
    original = Image.new("RGB", size, RED)
    features = reader(images=[original], text=["<image>"], return_tensors="pt")
    count = int((features["input_ids"] == reader.image_token_id).sum())
    next_config = config(image_grid_pinpoints=pinpoints)
    return image_views(next_config, images, original, features["pixel_values"][0], count), count
