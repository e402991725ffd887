"""``pruneops run`` about videos: what differs from images, under the names that `runner` has for the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneops.analysis.contact_sheet import VideoView, draw_contact_sheet
from pruneops.runner import Answer, Inputs, Loaded, Question, kept_tokens, visual_positions
from pruneops.video import Clip, read_clip

if TYPE_CHECKING:
    from PIL.Image import Image

    from pruneops.methods import PruningMethod
    from pruneops.report import Report


def check_clips(questions: Sequence[Question], num_frames: int) -> list[Clip]:
    """The sampled frames of every question's video; equal paths are decoded once.

    Raises
    ------
    ValueError
        As `read_clip`; the message names the path.
    """
    decoded: dict[Path, Clip] = {}
    for question in questions:
        if question.path not in decoded:
            decoded[question.path] = read_clip(question.path, num_frames)
    return [decoded[question.path] for question in questions]


def prepare(loaded: Loaded, questions: Sequence[Question], clips: Sequence[Clip]) -> Inputs:
    """One batch from all questions: a chat prompt with one video each, left-padded, on the model's device."""
    from pruneops.models.video_inputs import frame_layout

    features = loaded.processor([clip.images for clip in clips], [question.prompt for question in questions])
    layout = frame_layout(loaded.model.config, *features["pixel_values_videos"].shape[-2:])
    features = features.to(loaded.model.device, loaded.model.dtype)
    return Inputs(features, list(clips), loaded.model.config.video_token_id, layout.separators)


def describe_clip(clip: Clip) -> str:
    """``"16 of 60 frames"``, and whether that is all that the file should have."""
    distinct = len(set(clip.indices))
    text = f"{distinct} of {clip.total} frame{'s' if clip.total > 1 else ''}"
    if len(clip.indices) > distinct:
        text += f", some repeated ({len(clip.indices)} in all)"
    return text + (", parts of the file cannot be decoded" if clip.damaged else "")


def describe_stages(report: Report) -> list[str]:
    """Where tokens went that the table of layers shows as lengths only: before layer 0, and out of earlier caches."""
    lines = []
    dense = sum(report.dense_lengths)
    if report.tokens[0] != dense:
        lines.append(f"merged before layer 0: {dense} -> {report.tokens[0]} tokens, text included")
    cached = [sum(lengths) for lengths in report.kv_lengths]
    cut = [layer for layer, (run, kept) in enumerate(zip(report.tokens, cached, strict=True)) if kept < run]
    if cut:
        layers = f"layer {cut[0]}" if len(cut) == 1 else f"layers {cut[0]}-{cut[-1]}"
        lines.append(f"selected after layer {cut[-1]}: {report.tokens[cut[-1]]} -> {cached[cut[-1]]} tokens")
        lines.append(f"    the others leave the caches of {layers} too: KV counts what stays")
    return lines


def draw(
    loaded: Loaded,
    inputs: Inputs,
    questions: Sequence[Question],
    method: PruningMethod,
    answered: Answer,
    rows: Sequence[int],
) -> Image:
    """The contact sheet of the given rows."""
    views = [video_view(loaded, inputs, questions[row], answered, row) for row in rows]
    return draw_contact_sheet(
        views,
        title=f"{type(method).__name__}: what became of each patch",
        note=loaded.name if loaded.untrained else "",
    )


def video_view(loaded: Loaded, inputs: Inputs, question: Question, answered: Answer, row: int) -> VideoView:
    """What the contact sheet shows of a row: its frames as the model saw them, and their tokens."""
    from pruneops.methods.prunevid import MergeRecord
    from pruneops.models.video_inputs import frame_layout
    from pruneops.models.views import denormalize

    clip: Clip = inputs.media[row]
    pixels = inputs.features["pixel_values_videos"][row]
    images = [denormalize(frame, loaded.processor.image_processor) for frame in pixels]
    layout = frame_layout(loaded.model.config, *pixels.shape[-2:])
    kept = kept_tokens(inputs, answered, row)
    merging = next((r for r in answered.records if r.row == row and isinstance(r, MergeRecord)), None)
    tokens: Sequence[int] = range(len(visual_positions(inputs, row)))
    segments: dict[str, Any] = {}
    if merging is not None:
        (video,) = merging.videos
        tokens = video.tokens.tolist()
        segments = {"window_sizes": video.window_sizes, "static": [places.tolist() for places in video.static]}
    return VideoView(
        images=images,
        captions=[_caption(index, time) for index, time in zip(clip.indices, clip.seconds, strict=True)],
        boxes=layout.boxes(images[0].size),
        tokens=tokens,
        kept=kept[-1] if kept else tokens,
        title=f"{clip.path.name}: {question.prompt} ({describe_clip(clip)})",
        **segments,
    )


def _caption(index: int, time: float | None) -> str:
    return f"frame {index}" + ("" if time is None else f", {time:.2f} s")
