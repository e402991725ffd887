"""What encoders return is understood in every layout that releases of transformers have, and numbered."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pruneops.media import MediaNotes, Medium, mark_frames, number_media


def features(*shapes: tuple[int, ...]) -> BaseModelOutputWithPooling:
    pooled = [torch.zeros(*shape, 2) for shape in shapes]
    return BaseModelOutputWithPooling(pooler_output=pooled)


def test_a_onevision_video_may_come_with_or_without_its_newline() -> None:
    model = tiny.llava_onevision().model
    for length in (48, 49):
        notes = MediaNotes()
        notes.note_features(model, "video", features((length,), (length,)))
        assert notes.media["video"] == [Medium(49, 3, 1)] * 2


@pytest.mark.parametrize("build", [tiny.llava_onevision, tiny.llava_next_video])
def test_features_that_the_caller_shortened_are_one_frame(build) -> None:
    notes = MediaNotes()
    notes.note_features(build().model, "video", features((43,)))
    assert notes.media["video"] == [Medium(43)]


def test_videos_of_several_lengths_are_known_by_the_shape_of_their_features() -> None:
    notes = MediaNotes()
    notes.note_features(tiny.llava_next_video().model, "video", features((3, 16), (8, 16)))
    assert notes.media["video"] == [Medium(48, 3), Medium(128, 8)]


def test_a_next_video_may_come_frame_by_frame_or_in_one_piece() -> None:
    model = tiny.llava_next_video().model
    for of_one in ((3, 16), (48,)):
        notes = MediaNotes()
        notes.note_features(model, "video", features(of_one, of_one))
        assert notes.media["video"] == [Medium(48, 3)] * 2


def test_frames_of_video_llava_need_to_say_how_many_make_a_video() -> None:
    model = tiny.video_llava().model
    outputs = BaseModelOutputWithPooling(pooler_output=torch.zeros(6, 17, 2))
    with pytest.raises(ValueError, match="mm_encoder_outputs: got 6 frames that do not say to how many videos"):
        MediaNotes().note_features(model, "video", outputs)
    mark_frames(outputs, 2)
    notes = MediaNotes()
    notes.note_features(model, "video", outputs)
    assert notes.media["video"] == [Medium(34, 2)] * 3
    assert list(outputs.keys()) == ["pooler_output"]


def test_without_features_every_run_of_placeholders_is_an_image() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
    numbers, frames = number_media({"image": mask}, {})
    assert numbers.tolist() == [[1, 1, 0, 2], [0, 0, 1, 1]]
    assert frames == [1, 1, 1]


def test_media_of_which_nothing_is_left_have_no_number() -> None:
    mask = torch.tensor([[1, 1, 0, 1]], dtype=torch.bool)
    media = {"video": [Medium(2, 2), Medium(0), Medium(1, 0, 1)]}
    numbers, frames = number_media({"video": mask}, media)
    assert numbers.tolist() == [[1, 1, 0, 0]] and frames == [2]
