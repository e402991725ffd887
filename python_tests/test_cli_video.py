"""``pruneops run --video``: real files, decoded, answered about and drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import moving_disc, numbered, write_clip
from PIL import Image
from test_small_model import TINY

from pruneops.analysis.contact_sheet import VideoView, draw_contact_sheet, segment_colour
from pruneops.cli import BAD_INPUT, FAILED, OK, main
from pruneops.models.small import build_small_llava
from pruneops.models.small_video import build_small_video
from pruneops.runner import ASSET
from pruneops.video import sample_indices

PATCHES = 36


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small only waits for other threads, for long where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_video(tmp_path_factory.mktemp("small-video"), tokens_per_frame=PATCHES, **TINY)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A clip with a cut in the middle, and a shorter one of another size and seed without."""
    folder = tmp_path_factory.mktemp("clips")
    first = write_clip(folder / "disc.mp4", moving_disc(48, 160, 120, cut_at=24), "mpeg4", "yuv420p")
    return first, write_clip(folder / "other.mkv", moving_disc(12, 90, 120, seed=5))


@pytest.fixture
def onevision(checkpoint: Path, tmp_path: Path) -> Path:
    """A LLaVA-OneVision, which puts a newline behind a video and pools 7 x 7 patches to 4 x 4."""
    from transformers import (
        AutoConfig,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        SiglipVisionConfig,
    )

    small = AutoConfig.from_pretrained(checkpoint)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=98,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=small.text_config,
        image_token_index=small.image_token_id,
        video_token_index=small.video_token_id,
    )
    return _stored_beside(LlavaOnevisionForConditionalGeneration(config), checkpoint, tmp_path / "onevision")


@pytest.fixture
def video_llava(checkpoint: Path, tmp_path: Path) -> Path:
    """A Video-LLaVA, which keeps the class token of each frame."""
    from transformers import AutoConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    small = AutoConfig.from_pretrained(checkpoint)
    small.vision_config.image_size = 98
    config = VideoLlavaConfig(
        vision_config=small.vision_config,
        text_config=small.text_config,
        image_token_index=small.image_token_id,
        video_token_index=small.video_token_id,
    )
    return _stored_beside(VideoLlavaForConditionalGeneration(config), checkpoint, tmp_path / "video-llava")


def _stored_beside(model: torch.nn.Module, small: Path, folder: Path) -> Path:
    """The model with the small one's tokenizer and with frames of 98 x 98 pixels."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((small / name).read_bytes())
    pixels = json.loads((small / "video_preprocessor_config.json").read_text())
    pixels |= {"size": {"height": 98, "width": 98}, "do_center_crop": False}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def run(checkpoint: Path, *arguments: object) -> int:
    base = ["run", "--model", checkpoint, "--max-new-tokens", 4, "--repeat", 1, "--quiet"]
    return main([str(argument) for argument in (*base, *arguments)])


def test_a_batch_of_two_clips_is_answered_three_ways_with_table_contact_sheet_and_json(
    checkpoint: Path, clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = clips
    code = run(
        checkpoint,
        *("--video", first, "--video", second, "--prompt", "What moves?", "--json", tmp_path / "run.json"),
        *("--out", tmp_path / "out", "--selected-layer", 1),
    )
    printed = capsys.readouterr()
    assert code == OK and printed.err == ""
    for text in (
        "method  PruneVid(tau=0.8, temporal_segment_ratio=0.25, cluster_ratio=0.5, alpha=0.4, selected_layer=1)",
        "[0] disc.mp4: What moves?",
        "576 visual + 30 text tokens, 16 of 48 frames",
        "[1] other.mkv: What moves?",
        "576 visual + 30 text tokens, 11 of 12 frames, some repeated (16 in all)",
        "(as stock)",
        "merged before layer 0: 1212 -> ",
        "selected after layer 1: ",
        "the others leave the caches of layers 0-1 too",
        "kept.png",
    ):
        assert text in printed.out, text

    document = json.loads((tmp_path / "run.json").read_text())
    assert document["untrained"] and document["method"]["method"] == "prunevid"
    for row, path, total in zip(document["rows"], clips, (48, 12), strict=True):
        assert row["video"] == str(path) and row["total_frames"] == total
        assert row["frames"] == sample_indices(total, 16) and row["visual_tokens"] == 16 * PATCHES
        merged, kept = (set(stage) for stage in row["kept"])
        assert 0 < len(kept) < len(merged) < 16 * PATCHES and kept < merged
        assert row["answers"]["dense"] == row["answers"]["stock"]
    dense, pruned = document["reports"]["dense"], document["reports"]["pruned"]
    text_tokens = 30
    assert dense["layer_lengths"][0] == pruned["dense_lengths"] == [606, 606]
    assert pruned["layer_lengths"][0] == [len(row["kept"][0]) + text_tokens for row in document["rows"]]
    last = [len(row["kept"][1]) + text_tokens for row in document["rows"]]
    assert pruned["layer_lengths"][0] == pruned["layer_lengths"][1] != pruned["layer_lengths"][2]
    assert pruned["layer_lengths"][2] == pruned["layer_lengths"][3] == last
    assert pruned["kv_lengths"] == [last] * 4
    assert pruned["flops"] < dense["flops"] == pruned["dense_flops"]
    assert pruned["kv_bytes"] / dense["kv_bytes"] == pytest.approx(sum(last) / 1212)

    with Image.open(tmp_path / "out" / "kept.png") as sheet:
        # Two clips below each other, each a square of four by four frames.
        assert sheet.width > 4 * 200 and sheet.height > 8 * 200
        colours = {colour for _, colour in sheet.getcolors(maxcolors=sheet.width * sheet.height)}
    # A quarter of 16 frames are clusters, and the cut makes at least two segments.
    assert segment_colour(0) in colours and segment_colour(1) in colours


def test_the_contact_sheet_shows_the_frames_segments_and_tokens_of_the_run(
    checkpoint: Path, clips: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[VideoView] = []

    def record(views: list[VideoView], **options: object) -> Image.Image:
        drawn.extend(views)
        return draw_contact_sheet(views, **options)

    monkeypatch.setattr("pruneops.video_runner.draw_contact_sheet", record)
    assert run(checkpoint, "--video", clips[0], "--json", tmp_path / "run.json") == OK
    ((view,), (row,)) = drawn, json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [list(view.tokens), list(view.kept)] == row["kept"]
    assert set(view.kept) < set(view.tokens) and view.total == row["visual_tokens"]
    assert view.captions[0] == "frame 1, 0.04 s" and view.title.startswith("disc.mp4: ")
    # Samples 0 to 7 lie before the cut at frame 24.
    assert row["frames"][7] < 24 <= row["frames"][8]
    assert 8 in list(accumulate(view.window_sizes)) and sum(view.window_sizes) == 16
    assert any(any(places) and not all(places) for places in view.static)
    for image, index in zip(view.images, row["frames"], strict=True):
        frame = Image.fromarray(moving_disc(48, 160, 120, cut_at=24)[index]).crop((20, 0, 140, 120))
        difference = np.asarray(frame.resize(image.size)).astype(int) - np.asarray(image)
        assert abs(difference).mean() < 12


def test_the_small_model_that_is_built_on_the_spot_answers_about_a_video(
    monkeypatch: pytest.MonkeyPatch, clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pruneops.models import small_video

    build = small_video.build_small_video
    monkeypatch.setattr(small_video, "build_small_video", lambda folder, seed: build(folder, PATCHES, seed, **TINY))
    arguments = ["run", "--video", str(clips[0]), "--num-frames", "4", "--max-new-tokens", "1", "--repeat", "1"]
    assert main([*arguments, "--out", str(tmp_path / "sheet.png")]) == OK
    printed = capsys.readouterr()
    assert "small LLaVA-NeXT-Video, built here and untrained" in printed.out
    assert "[0] disc.mp4: What happens in this video?" in printed.out and "4 of 48 frames" in printed.out
    # A layer as deep as 10 of 32 is layer 1 of 4.
    assert "selected_layer=1)" in printed.out
    for step in ("decoding the videos", "loading the model", "answering, pruned"):
        assert f"{step}: " in printed.err
    assert (tmp_path / "sheet.png").is_file()


def test_options_reach_the_method(checkpoint: Path, clips: tuple[Path, Path], tmp_path: Path) -> None:
    assert (
        run(
            checkpoint,
            *("--video", clips[0], "--num-frames", 6, "--tau", 0.5, "--temporal-segment-ratio", 0.5),
            *("--cluster-ratio", 0.25, "--alpha", 0.9, "--selected-layer", 2, "--json", tmp_path / "run.json"),
        )
        == OK
    )
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["method"] == {
        "method": "prunevid",
        "tau": 0.5,
        "temporal_segment_ratio": 0.5,
        "cluster_ratio": 0.25,
        "alpha": 0.9,
        "selected_layer": 2,
    }
    assert len(document["rows"][0]["frames"]) == 6


def test_one_clip_serves_several_questions_and_is_drawn_for_each(
    checkpoint: Path, clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--video", clips[0], "--num-frames", 4, "--prompt", "Where?", "--prompt", "Why so?", "--batch", 3)
    assert run(checkpoint, *arguments, "--out", tmp_path / "sheet.png") == OK
    printed = capsys.readouterr().out
    assert "batch   3 rows" in printed and "[0] disc.mp4: Where?" in printed and "[1] disc.mp4: Why so?" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 4 * 200


def test_a_video_may_be_pruned_by_another_method_and_an_image_by_prunevid(
    checkpoint: Path, clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--method", "pyramiddrop", "--layers", "1,2", "--keep", "0.5,0.25", "--json", tmp_path / "run.json")
    assert run(checkpoint, "--video", clips[0], "--num-frames", 4, *arguments) == OK
    assert "merged before" not in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [len(stage) for stage in row["kept"]] == [72, 36]

    images = build_small_llava(tmp_path / "small", num_visual_tokens=144, **TINY)
    assert run(images, "--image", ASSET, "--method", "prunevid", "--json", tmp_path / "run.json") == OK
    assert "merged before layer 0: " in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "run.json").read_text())["rows"]
    # One frame has no static patches: half of the tokens are clusters, and 0.4 of these stay.
    assert [len(stage) for stage in row["kept"]] == [72, 28]


@pytest.mark.parametrize(("model", "tokens", "newlines"), [("onevision", 16, 1), ("video_llava", 50, 0)])
def test_other_kinds_of_video_models_are_answered_with_and_drawn(
    request: pytest.FixtureRequest,
    clips: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    tokens: int,
    newlines: int,
) -> None:
    folder = request.getfixturevalue(model)
    arguments = ("--num-frames", 4, "--prompt", "What?", "--json", tmp_path / "run.json", "--out", tmp_path / "a.png")
    assert run(folder, "--video", clips[0], *arguments) == OK
    assert f"{4 * tokens} visual + {24 + newlines} text tokens" in capsys.readouterr().out
    document = json.loads((tmp_path / "run.json").read_text())
    (row,) = document["rows"]
    assert row["answers"]["dense"] == row["answers"]["stock"] and row["visual_tokens"] == 4 * tokens
    assert document["reports"]["dense"]["dense_lengths"] == [4 * tokens + 24 + newlines]
    assert 0 < len(row["kept"][1]) < len(row["kept"][0]) < 4 * tokens
    assert (tmp_path / "a.png").is_file()


def test_a_damaged_file_is_said_to_be_one(
    checkpoint: Path, clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    with av.open(str(clips[0])) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][10]
        start, size = packet.pos, packet.size
    data = bytearray(clips[0].read_bytes())
    data[start : start + size] = bytes(size)
    (tmp_path / "bad.mp4").write_bytes(data)
    assert run(checkpoint, "--video", tmp_path / "bad.mp4", "--num-frames", 2) == OK
    assert "2 of 47 frames, parts of the file cannot be decoded" in capsys.readouterr().out


BROKEN = [
    (["--video", "gone.mp4"], "video: no such file: gone.mp4"),
    (["--video", "."], "video: not a file: ."),
    (["--video", __file__], "video: not a video that FFmpeg can read: "),
    (["--video", "clip.mkv", "--image", "a.jpg"], "--video cannot be given together with --image"),
    (["--num-frames", 4], "--num-frames needs --video"),
    (["--video", "clip.mkv", "--prompt", "  "], "--prompt must not be empty"),
    (["--video", "clip.mkv", "--video", "clip.mkv", *["--prompt", "a"] * 3], "got 3 prompts for 2 videos"),
    (["--video", "clip.mkv", "--tau", "nan"], "tau: got nan"),
    (["--video", "clip.mkv", "--alpha", 1.5], "alpha: got 1.5, expected a share in [0, 1]"),
    (["--video", "clip.mkv", "--temporal-segment-ratio", 0], "temporal_segment_ratio: got 0.0"),
    (["--video", "clip.mkv", "--cluster-ratio", 2], "cluster_ratio: got 2.0"),
    (["--video", "clip.mkv", "--selected-layer", 4], "selected_layer: got 4, expected at most 3"),
    (["--video", "clip.mkv", "--keep", 0.5], "--keep is an option of --method pyramiddrop, got --method prunevid"),
    (["--tau", 0.5], "--tau is an option of --method prunevid, got --method pyramiddrop"),
    (["--video", "clip.mkv", "--prompt", "a <video>"], "prompt: got 2 video placeholders"),
]


@pytest.mark.parametrize(("arguments", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_bad_input_is_one_line_and_exit_code_2(
    checkpoint: Path, arguments: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(Path("clip.mkv"), numbered(3))
    assert run(checkpoint, *arguments) == BAD_INPUT
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("pruneops: error: ")
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_a_model_that_takes_no_videos_is_bad_input(
    tmp_path: Path, clips: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images = build_small_llava(tmp_path / "small", num_visual_tokens=144, **TINY)
    assert run(images, "--video", clips[0]) == BAD_INPUT
    assert "takes no videos: its model_type is 'llava', expected one of llava_next_video" in capsys.readouterr().err


def test_without_pyav_the_error_says_what_to_install(
    checkpoint: Path,
    clips: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(checkpoint, "--video", clips[0]) == FAILED
    assert capsys.readouterr().err == "pruneops: error: --video needs PyAV: pip install pruneops[video]\n"
