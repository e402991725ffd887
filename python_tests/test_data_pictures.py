"""Rendered pictures and clips: the same bytes everywhere, small things that never touch, labels of every patch."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from pruneops.data import CLIP_GRID, GRID, IGNORED, LABELS, Samples, draw_samples, patch_labels
from pruneops.data.clip import Clip, draw_clip
from pruneops.data.glyphs import SHAPES, UNIT, shape_mask, text_mask
from pruneops.data.labels import covered
from pruneops.data.render import render
from pruneops.data.scene import CELL, Scene, Thing, draw_scene
from pruneops.data.words import COLOURS, SYLLABLES

NAMES = "questions, description, references, clip"
SCENES = [draw_scene(f"scene {number}") for number in range(60)]
CLIPS = [draw_clip(f"clip {number}") for number in range(60)]


def digest(kind: str, patch_size: int) -> str:
    found = hashlib.sha256()
    for sample in Samples("train", 3, seed=5, kinds=[kind], patch_size=patch_size):
        found.update(repr([(turn.text, turn.answer) for turn in sample.turns]).encode())
        for picture in sample.pictures:
            found.update(picture.tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(
    ("kind", "patch_size", "expected"),
    [
        ("questions", 8, "b383dd2ae8010a0d"),
        ("questions", 14, "4f60de353bde50a5"),
        ("description", 8, "0ea4ba7b80f7eb8d"),
        ("references", 8, "daf0e3f5e5ef7d90"),
        ("clip", 8, "c87a7edf1deabfb5"),
    ],
)
def test_the_same_seed_gives_the_same_bytes_on_every_machine(kind: str, patch_size: int, expected: str) -> None:
    assert digest(kind, patch_size) == expected


@pytest.mark.parametrize("patch_size", [8, 11, 14, 16, 32])
def test_a_picture_has_24_patches_a_side_and_a_frame_12(patch_size: int) -> None:
    picture, clip = Samples("test", 2, kinds=("questions", "clip"), patch_size=patch_size)
    assert [p.shape for p in picture.pictures] == [(GRID * patch_size, GRID * patch_size, 3)]
    assert [p.shape for p in clip.pictures] == [(CLIP_GRID * patch_size, CLIP_GRID * patch_size, 3)] * 8
    assert picture.pictures[0].dtype == np.uint8


def gap(a: Thing, b: Thing) -> int:
    """Between two boxes along the axis that separates them more, in eighths of a patch."""
    across = max(a.x - (b.x + b.width), b.x - (a.x + a.width))
    down = max(a.y - (b.y + UNIT), b.y - (a.y + UNIT))
    return max(across, down)


def test_things_are_inside_of_the_picture_and_apart() -> None:
    pictures = [(scene.things, GRID) for scene in SCENES]
    pictures += [(clip.at(frame), CLIP_GRID) for clip in CLIPS for frame in range(clip.frames)]
    for things, grid in pictures:
        for index, thing in enumerate(things):
            assert 0 <= thing.x <= grid * UNIT - thing.width and 0 <= thing.y <= grid * UNIT - UNIT
            assert all(gap(thing, other) >= 2 for other in things[:index])


def test_a_thing_takes_one_or_two_of_576_patches() -> None:
    counts = [len(covered(thing)) for scene in SCENES for thing in scene.things]
    assert set(counts) == {1, 2}
    assert sum(counts) / len(SCENES) < 40  # of a scene's 576


def test_a_shape_can_be_known_from_one_patch() -> None:
    for scene in SCENES:
        for thing in scene.shapes:
            shares = sorted(covered(thing).values())
            assert shares[-1] >= 48 and sum(shares) == 64
        labelled = int((patch_labels(scene.things)["shape"] > 0).sum())
        assert labelled == len(scene.shapes) + 2 * len(scene.signs)


def test_nothing_is_painted_over_a_thing() -> None:
    for scene in SCENES[:5]:
        picture = render(scene.key, scene.things, 8)
        for thing in scene.shapes:
            box = picture[thing.y : thing.y + 8, thing.x : thing.x + 8]
            colour = np.clip(np.add(COLOURS[thing.colour], thing.tint), 0, 255)
            assert (box[shape_mask(thing.shape, 8)] == colour).all()


@pytest.mark.parametrize("patch_size", [8, 14])
def test_no_two_shapes_and_no_two_syllables_look_alike(patch_size: int) -> None:
    for masks, least in (
        ([shape_mask(name, patch_size) for name in SHAPES], 0.15),
        ([text_mask(name, patch_size) for name in SYLLABLES], 0.05),
    ):
        for index, mask in enumerate(masks):
            assert mask.shape == (patch_size, patch_size)
            assert all((mask != other).mean() > least for other in masks[:index])


def test_every_patch_of_the_background_is_busy() -> None:
    """Contrast does not tell where things are: in the bare background, it is as high in many patches."""
    spread = lambda picture: picture.reshape(GRID, 8, GRID, 8, 3).std(axis=(1, 3)).mean(axis=2)  # noqa: E731
    scene = SCENES[0]
    bare, full = spread(render(scene.key, [], 8)), spread(render(scene.key, scene.things, 8))
    things = patch_labels(scene.things)["shape"] > 0
    assert bare.min() > 5
    assert (bare > np.quantile(full[things], 0.25)).sum() > things.sum()


def test_labels_name_what_covers_more_than_a_quarter_of_a_patch_and_skip_slivers() -> None:
    things = [Thing("red", "circle", 8, 8), Thing("blue", "ring", 41, 8), Thing("white", "sign", 8, 32, "goba")]
    labels = patch_labels(things)
    named = {
        kind: np.array([["-" if number == IGNORED else LABELS[kind][number] for number in row] for row in labels[kind]])
        for kind in LABELS
    }
    assert named["shape"][1, 1] == "circle" and named["colour"][1, 1] == "red" and named["text"][1, 1] == "background"
    assert named["shape"][1, 5] == "ring" and named["shape"][1, 6] == "-"  # an eighth of it
    assert list(named["shape"][4, :4]) == ["background", "sign", "sign", "background"]
    assert list(named["text"][4, 1:3]) == ["go", "ba"] and list(named["colour"][4, 1:3]) == ["white", "white"]
    assert [int((labels[kind] != 0).sum()) for kind in ("shape", "colour", "text")] == [5, 5, 3]
    assert named["region"][1, 1] == "top left" and named["region"][23, 8] == "bottom" and (labels["region"] > 0).all()


def test_the_evidence_of_an_answer_is_few_patches_or_many() -> None:
    samples = list(Samples("test", 60, turns=6))
    found: dict[str, list[int]] = {}
    for sample in samples:
        for number, turn in enumerate(sample.turns):
            patches = sample.evidence(number)
            assert patches == sorted(set(patches)) and all(0 <= patch < GRID * GRID for patch in patches)
            found.setdefault(turn.template, []).append(len(patches))
    needed = {"colour": 1, "shape": 1, "where": 1, "text": 2, "beside": 2}
    assert all(set(found[name]) == {count} for name, count in needed.items())
    assert sum(found["most"]) / len(found["most"]) > 9
    with pytest.raises(ValueError, match="got the clip 0-test-0000000, expected a picture"):
        Samples("test", 1, kinds=["clip"])[0].evidence(0)


def test_of_a_clip_only_movers_and_what_appears_change() -> None:
    for clip in CLIPS[:10]:
        sample = Samples("test", 1, kinds=["clip"])[0]
        sample = replace(sample, source=clip)
        still = [
            thing
            for thing, motion, first in zip(clip.things, clip.motions, clip.appears, strict=True)
            if motion == "nowhere" and first == 0
        ]
        assert still
        first, last = sample.pictures[0], sample.pictures[-1]
        for thing in still:
            assert (first[thing.y : thing.y + 8, thing.x : thing.x + 8] == last[thing.y :, thing.x :][:8, :8]).all()
        assert (first == last).all(axis=2).mean() > 0.85
        assert (sample.labels(7)["shape"] > 0).any()


def test_movers_go_their_way_evenly_and_nothing_appears_at_the_same_time() -> None:
    for clip in CLIPS:
        places = [(frame[0].x, frame[0].y) for frame in map(clip.at, range(clip.frames))]  # things[0] moves
        steps = np.diff(np.array(places), axis=0)
        assert (np.abs(steps).sum(axis=1) == 2).all()
        late = [clip.appears[index] for index in clip.late]
        assert late == sorted(set(late)) and 1 <= len(late) <= 5
        assert len({thing.name for thing in clip.things}) == len(clip.things)


def test_a_sheet_shows_every_sample_with_its_questions() -> None:
    samples = list(Samples("test", 3, kinds=("questions", "description", "clip"), turns=2))
    sheet, single = draw_samples(samples), draw_samples(samples[:1])
    assert sheet.width > 1.8 * single.width and sheet.height > 1.8 * single.height - 100
    with pytest.raises(ValueError, match="got 0 and 2, expected at least 1 of each"):
        draw_samples([])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": "dev"}, ValueError, "split must be one of train, validation, test, got 'dev'"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 2.0}, TypeError, "size must be an int, got 2.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"turns": 0}, ValueError, "turns must be at least 1, got 0"),
        ({"frames": 5}, ValueError, "frames must be at least 6, got 5"),
        ({"patch_size": 7}, ValueError, "patch_size must be from 8 to 32 pixels, got 7"),
        ({"patch_size": "8"}, TypeError, "patch_size must be an int, got '8'"),
        ({"kinds": "clip"}, ValueError, f"kinds must be a sequence of some of {NAMES}, got 'clip'"),
        ({"kinds": ["film"]}, ValueError, r"kinds must be .*, got \['film'\]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"split": "train", "size": 1, **change}
    with pytest.raises(error, match=message):
        Samples(**arguments)


def test_a_sample_does_not_depend_on_how_many_there_are() -> None:
    few, many = Samples("train", 3), Samples("train", 1000)
    assert few[2].turns == many[2].turns == many[:3][-1].turns and few[-1].name == few[2].name
    with pytest.raises(IndexError, match="index must be below 3, got 3"):
        few[3]


def test_scenes_and_clips_have_as_many_things_as_they_should() -> None:
    assert {type(s) for s in SCENES} == {Scene} and {type(c) for c in CLIPS} == {Clip}
    assert all(6 <= len(scene.things) <= 20 and 1 <= len(scene.signs) <= 2 for scene in SCENES)
    assert all(7 <= len(clip.things) <= 11 for clip in CLIPS)
    assert all(thing.x % UNIT == 0 or thing.y % UNIT == 0 for scene in SCENES for thing in scene.things)
    assert GRID % CELL == CLIP_GRID % CELL == 0
