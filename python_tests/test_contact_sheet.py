"""The contact sheet of a video: what the pixels of borders, kept, dropped and merged patches are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops

from pruneops.analysis.contact_sheet import (
    BORDER,
    DYNAMIC,
    NO_SEGMENT,
    STATIC,
    VideoView,
    draw_contact_sheet,
    segment_colour,
)
from pruneops.analysis.pictures import GAP, MARGIN, grid_boxes

WIDTH = 64
COLOURS = [(200, 40, 40), (40, 200, 40), (190, 190, 60), (60, 190, 190), (200, 60, 200)]
STATIC_FIRST_HALF = [[True] * 8 + [False] * 8, [False] * 16]


def video(**changes: object) -> VideoView:
    """Five frames of 4 x 4 patches, one plain colour each; segments of three and two frames.

    In the first segment the upper two rows are static: token 0 and 5 stand for what was merged, 5 is kept. Of dynamic
    tokens, 10 of frame 0 (number 10) and 15 of frame 2 (number 47) reach the language model, and 47 is kept. In the
    second segment all are dynamic, and token 3 of frame 4 (number 67) is kept.
    """
    view = VideoView(
        images=[Image.new("RGB", (64, 64), colour) for colour in COLOURS],
        captions=[f"frame {index}" for index in range(5)],
        boxes=grid_boxes((64, 64), 4, 4),
        tokens=[0, 5, 10, 47, 67],
        kept=[5, 47, 67],
        window_sizes=[3, 2],
        static=STATIC_FIRST_HALF,
    )
    return replace(view, **changes)


def corners(page: Image.Image, view: VideoView, columns: int) -> list[tuple[int, int]]:
    """Upper left pixel of the border of every frame, found by its colour."""
    pitch = WIDTH + 2 * BORDER + GAP
    places, y = [], 0
    for frame in range(len(view.images)):
        x = MARGIN + frame % columns * pitch
        if frame % columns == 0:
            wanted = segment_colour(view.segment_of(frame))
            # The border stands out from text of the same colour as a full line.
            y = next(
                y
                for y in range(y, page.height)
                if all(page.getpixel((x + dx, y)) == wanted for dx in range(WIDTH + 2 * BORDER))
            )
        places.append((x, y))
        if frame % columns == columns - 1:
            y += WIDTH + 2 * BORDER
    return places


def patch(page: Image.Image, corner: tuple[int, int], token: int) -> tuple[int, int, int]:
    """The pixel in the middle of a patch."""
    x, y = corner
    return page.getpixel((x + BORDER + token % 4 * 16 + 8, y + BORDER + token // 4 * 16 + 8))


@pytest.fixture(scope="module")
def page() -> Image.Image:
    return draw_contact_sheet([video()], panel_width=WIDTH, columns=3)


@pytest.fixture(scope="module")
def places(page: Image.Image) -> list[tuple[int, int]]:
    return corners(page, video(), 3)


def test_each_frame_has_the_border_of_its_segment_on_all_sides(
    page: Image.Image, places: list[tuple[int, int]]
) -> None:
    first, second = segment_colour(0), segment_colour(1)
    assert first != second
    outer = WIDTH + 2 * BORDER
    for (x, y), colour in zip(places, [first, first, first, second, second], strict=True):
        cell = np.asarray(page.crop((x, y, x + outer, y + outer)))
        border = np.ones(cell.shape[:2], bool)
        border[BORDER:-BORDER, BORDER:-BORDER] = False
        assert (cell[border] == colour).all()
        assert page.getpixel((x - 1, y)) != colour and page.getpixel((x + outer, y)) != colour


def test_kept_patches_have_their_full_colour_and_no_others(page: Image.Image, places: list[tuple[int, int]]) -> None:
    # A kept static token is kept in all frames of its segment, a dynamic one in its own.
    kept = {(0, 5), (1, 5), (2, 5), (2, 15), (4, 3)}
    for frame, corner in enumerate(places):
        for token in range(16):
            assert (patch(page, corner, token) == COLOURS[frame]) == ((frame, token) in kept), (frame, token)


def test_merged_patches_are_darker_than_dropped_ones(page: Image.Image, places: list[tuple[int, int]]) -> None:
    for frame, dropped, merged in ((0, 0, 1), (1, 0, 1), (2, 0, 1), (0, 10, 11)):
        bright, dark = (sum(patch(page, places[frame], token)) for token in (dropped, merged))
        assert bright > dark + 60


def test_static_and_dynamic_patches_differ_in_tint(page: Image.Image, places: list[tuple[int, int]]) -> None:
    kept = {(0, 5), (1, 5), (2, 5), (2, 15), (4, 3)}
    for frame, corner in enumerate(places):
        for token in range(16):
            if (frame, token) in kept:
                continue
            red, _, blue = patch(page, corner, token)
            static = frame < 3 and token < 8
            assert blue > red + 20 if static else red > blue + 20, (frame, token)


def test_kept_patches_are_outlined_in_the_colour_of_their_kind(
    page: Image.Image, places: list[tuple[int, int]]
) -> None:
    for frame, token, tint in ((1, 5, STATIC), (2, 15, DYNAMIC), (4, 3, DYNAMIC)):
        x, y = places[frame]
        left, top = x + BORDER + token % 4 * 16, y + BORDER + token // 4 * 16
        # The upper left corner of the patch, 70 % outline and 30 % picture.
        found = page.getpixel((left, top + 8)) if token % 4 else page.getpixel((left + 8, top))
        mixed = [0.7 * a + 0.3 * b for a, b in zip(tint, COLOURS[frame], strict=True)]
        assert all(abs(a - b) < 4 for a, b in zip(found, mixed, strict=True))


def test_a_method_without_segments_has_neutral_borders_and_dims_without_tint() -> None:
    view = video(tokens=range(80), kept=[0, 79], window_sizes=(), static=())
    page = draw_contact_sheet([view], panel_width=WIDTH, columns=5)
    places = corners(page, view, 5)
    assert segment_colour(view.segment_of(0)) == NO_SEGMENT
    assert patch(page, places[0], 0) == COLOURS[0] and patch(page, places[4], 15) == COLOURS[4]
    for token in range(1, 16):
        assert max(patch(page, places[0], token)) - min(patch(page, places[0], token)) < 10


def test_the_counts_say_what_the_patches_show() -> None:
    assert video().counts() == ("2 segments, 80 visual tokens, 5 after merging (2 static, 3 dynamic), 3 kept (3.8 %)")
    assert video(tokens=range(80), kept=range(20), window_sizes=(), static=()).counts() == (
        "80 visual tokens, 20 kept (25.0 %)"
    )


def test_tokens_without_a_place_are_counted_but_not_drawn() -> None:
    with_class_token = [None, *grid_boxes((64, 64), 4, 4)]
    view = video(boxes=with_class_token, tokens=range(85), kept=[0, 17], window_sizes=(), static=())
    page = draw_contact_sheet([view], panel_width=WIDTH, columns=5)
    places = corners(page, view, 5)
    assert view.counts().startswith("85 visual tokens, 2 kept")
    for frame, corner in enumerate(places):
        assert all(patch(page, corner, token) != COLOURS[frame] for token in range(16))


def test_videos_stand_below_each_other_and_frames_in_lines() -> None:
    one, wide = (draw_contact_sheet([video()], panel_width=WIDTH, columns=n) for n in (3, 5))
    two = draw_contact_sheet([video(), video()], panel_width=WIDTH, columns=3)
    assert one.width == 2 * MARGIN + 3 * (WIDTH + 2 * BORDER) + 2 * GAP == two.width
    assert wide.width - one.width == 2 * (WIDTH + 2 * BORDER + GAP)
    assert one.height - wide.height >= WIDTH + 2 * BORDER and two.height - one.height >= 2 * (WIDTH + 2 * BORDER)
    # Without a number of columns, five frames make two lines of three.
    assert draw_contact_sheet([video()], panel_width=WIDTH).size == one.size


def test_titles_notes_and_captions_are_written(page: Image.Image, places: list[tuple[int, int]]) -> None:
    named = draw_contact_sheet([video(title="clip")], panel_width=WIDTH, columns=3)
    assert named.size == page.size
    changed = ImageChops.difference(named, page).getbbox()
    assert changed is not None and changed[3] <= places[0][1], "only the line above the frames differs"
    assert draw_contact_sheet([video()], panel_width=WIDTH, columns=3, title="t", note="n").height > page.height
    other = draw_contact_sheet([video(captions=["x"] * 5)], panel_width=WIDTH, columns=3)
    changed = ImageChops.difference(other, page).getbbox()
    assert changed is not None and changed[1] >= places[0][1] + WIDTH + 2 * BORDER


def test_drawing_is_repeatable_and_leaves_the_frames_alone() -> None:
    view = video()
    before = [image.copy() for image in view.images]
    first, second = (draw_contact_sheet([view], panel_width=WIDTH) for _ in "ab")
    assert first.tobytes() == second.tobytes()
    assert [image.tobytes() for image in view.images] == [image.tobytes() for image in before]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "view must have frames with tokens, got 0 frames"),
        ({"images": [Image.new("RGB", (8, n + 1)) for n in range(5)]}, "images must all have one size"),
        ({"captions": ["a"]}, r"captions must have one entry per frame \(5\), got 1"),
        ({"window_sizes": [3, 1]}, r"window_sizes must add up to 5 frames, got \[3, 1\]"),
        ({"static": [[True] * 16]}, "static must have 16 entries for each of 2 segments"),
        ({"tokens": [80], "kept": []}, "tokens must hold numbers of the 80 tokens, got 80"),
        ({"kept": [6]}, "kept must be some of tokens, got 6"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_contact_sheet([video(**changes)])


@pytest.mark.parametrize(
    ("views", "options", "message"),
    [
        ([], {}, "at least one view"),
        ([video()], {"panel_width": 8}, "panel_width must be at least 32"),
        ([video()], {"columns": 0}, "columns must be at least 1"),
    ],
)
def test_bad_sheets_are_refused(views: list[VideoView], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_contact_sheet(views, **options)
