"""PruneVid: merge the tokens of a video before the language model, keep those the question looks at within it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruneops import ops
from pruneops.decoder import DecoderState, Positions, Record
from pruneops.methods.base import PruningMethod, checked_number
from pruneops.methods.video_merge import (
    NEIGHBOURS,
    MergedVideo,
    VideoMerge,
    VideoShape,
    checked_merging,
    merge_video,
    merge_videos,
)
from pruneops.ragged import RaggedBatch, Span, cu_seqlens_of, to_device

__all__ = ["MergeRecord", "MergedVideo", "PruneVid", "VideoLayout", "merge_video"]


@dataclass(frozen=True)
class VideoLayout:
    """What became of the tokens of one video before the language model.

    Attributes
    ----------
    image : int
        Number of the video among the images and videos of its row, from 1.
    num_frames, patches : int
        Frames, and tokens of each.
    first_token : int
        Where the video starts in its row, counted before any pruning.
    window_sizes : list of int
        Frames of each segment.
    static : list of Tensor
        Per segment ``(patches,)`` bool on the CPU: the positions that hardly change within it.
    tokens : Tensor
        ``(merged,)`` int64 on the CPU: for every merged token, in order, the flat index ``frame * patches + patch`` of
        the token that stands for it.
    blocks : list of int
        Numbers of merged tokens: per segment of its static positions, then of each of its frames.
    """

    image: int
    num_frames: int
    patches: int
    first_token: int
    window_sizes: list[int]
    static: list[Tensor]
    tokens: Tensor
    blocks: list[int]


@dataclass(frozen=True)
class MergeRecord(Record):
    """What merging did to the videos of one row; there are no scores, and text tokens stay.

    ``kept_positions`` are in the order of the merged sequence, which is not ascending within videos.

    Attributes
    ----------
    videos : list of VideoLayout
        In order.
    """

    videos: list[VideoLayout]


@dataclass(frozen=True)
class PruneVid(PruningMethod):
    """PruneVid (Huang et al., "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", arXiv
    2412.16117, sections 3.2 and 3.3).

    *Before the language model* a video is cut into segments of frames that look alike (DPC-kNN on the frames' mean
    features, then runs of frames). Within a segment, positions whose features hardly change become one static token
    each, averaged over the segment's frames; the others stay dynamic, frame by frame. Static tokens of a segment, and
    dynamic tokens of each frame, are clustered by DPC-kNN and replaced by the cluster means where there are more than
    14 of them.

    *Within it*, after layer `selected_layer`, each of these blocks (a segment's static tokens, a frame's dynamic
    tokens) keeps the share `alpha` of its tokens that the text behind the video looks at most: the highest softmax
    weight over all heads and text tokens, of queries and keys before the rotary embedding, over all tokens of the row,
    with no causal mask. The others also leave the key/value cache of the layers before. The merged sequence is numbered
    once and keeps its numbers; new tokens follow on.

    Parameters
    ----------
    tau : float
        A position is static if the mean cosine similarity between its frames is above this.
    temporal_segment_ratio : float
        Clusters of frames as a share of the frames, in (0, 1]; ``max(1, int(frames * ratio))``. After refinement there
        may be fewer or more segments.
    cluster_ratio : float
        Clusters as a share of the tokens of a block, in (0, 1]; ``max(1, int(tokens * ratio))``. At 1 nothing is
        merged, but blocks of more than 14 tokens are put into the order of their scores.
    alpha : float
        Share of every block that stays after `selected_layer`, in [0, 1]; ``int(tokens * alpha)``, so that blocks of
        one or two tokens vanish at 0.4.
    selected_layer : int
        The decoder layer, counted from 0, behind which tokens are selected; below the depth of the model. The authors
        use 10 of 32 (5 for open-ended answers).

    Notes
    -----
    *Videos and images.* An image is a video of one frame: all its tokens are dynamic. Text between the pieces of one
    video (newline tokens, time stamps) is kept and follows the video's merged tokens; behind a row's last video it
    is among the queries.

    *Queries* are the text tokens behind the last image or video of the row, for all its videos; with labels, those
    before the first answer that follows it; while generating, those of the prompt. A row without such text is merged
    but not selected from.

    *Where the official code fails or is limited* (more than one row, grouped-query attention, fewer than 7 frames,
    text-only rows, several videos a row, pad tokens within the text) this does what the paper means: rows are
    independent, keys are shared by their group of query heads, the 7 neighbours of DPC-kNN are cut to what is there,
    and rows without videos are not touched. Segments of a single frame have no static tokens.

    *Ties.* The official code adds random noise to densities; here equal densities and scores go to the lowest index,
    so results are deterministic. Scores are float32, also in bfloat16 models, where the official ranking is decided by
    8-bit mantissas.

    *Continuation* (another turn on the cache): videos of the new chunk are merged and selected within the chunk;
    earlier turns are never revisited. *Without a cache*, tokens that are generated see all merged tokens in the layers
    up to `selected_layer`, as tokens of the prompt do.

    Raises
    ------
    TypeError, ValueError
        For values that break the rules above.
    """

    tau: float = 0.8
    temporal_segment_ratio: float = 0.25
    cluster_ratio: float = 0.5
    alpha: float = 0.4
    selected_layer: int = 10

    name: ClassVar[str] = "prunevid"
    positions: ClassVar[Positions] = Positions.AT_ENTRY

    def __post_init__(self) -> None:
        merging = {name: getattr(self, name) for name in ("tau", "temporal_segment_ratio", "cluster_ratio")}
        checked = {**checked_merging(**merging), "alpha": checked_number("alpha", self.alpha, 0.0, 1.0)}
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if isinstance(self.selected_layer, bool) or not isinstance(self.selected_layer, Integral):
            raise TypeError(f"selected_layer: got {self.selected_layer!r}, expected a whole number")
        if self.selected_layer < 0:
            raise ValueError(f"selected_layer: got {self.selected_layer}, expected a layer, counted from 0")

    def for_depth(self, num_layers: int) -> PruneVid:
        if self.selected_layer >= num_layers:
            raise ValueError(
                f"selected_layer: got {self.selected_layer}, expected at most {num_layers - 1}: the model has "
                f"{num_layers} layers, counted from 0"
            )
        return self

    def before_decoder(self, state: DecoderState) -> None:
        batch = state.batch
        if state.decoding or not any(span.image for row in batch.spans for span in row):
            return
        state.batch, videos = self._merge(batch)
        if state.trace.record:
            _record_merge(state, videos, batch)

    def run_layer(self, i: int, layer: nn.Module, state: DecoderState) -> None:
        batch = state.batch
        queries = [] if state.decoding or i != self.selected_layer else [_queries(batch, b) for b in batch.rows]
        if not any(queries):
            super().run_layer(i, layer, state)
            return
        with _outputs_of(layer.self_attn.q_proj, layer.self_attn.k_proj) as projected:
            super().run_layer(i, layer, state)
        batch = state.batch
        scores = _rank(batch, layer.self_attn, *projected, queries)
        keep = [
            [tuple(int(n * self.alpha) for n in span.blocks) if queries[b] else span.blocks for span in batch.spans[b]]
            for b in batch.rows
        ]
        if any(k != span.blocks for b in batch.rows for k, span in zip(keep[b], batch.spans[b], strict=True)):
            state.batch = batch.keep_best_of_blocks(scores, keep)
            state.drop_earlier(i + 1, batch)
        if state.trace.record:
            _record_selection(state, i + 1, scores, queries, batch)

    def _merge(self, batch: RaggedBatch) -> tuple[RaggedBatch, list[VideoMerge]]:
        device = batch.values.device
        visual, text, shapes = _split(batch)
        merged, videos = merge_videos(
            _visual_values(batch, visual),
            shapes,
            tau=self.tau,
            temporal_segment_ratio=self.temporal_segment_ratio,
            cluster_ratio=self.cluster_ratio,
            k=NEIGHBOURS,
        )
        # Text and merged tokens come out of one tensor, `tokens`, in the order of the rows.
        tokens = torch.cat([ops.gather_rows(batch.values, text.to(torch.int32)), merged])
        video_starts = _starts([shape.frames * shape.patches for shape in shapes])
        sources = [text, *(visual[start + v.sources] for start, v in zip(video_starts, videos, strict=True))]
        spans, in_order, row_ids = [], [], []
        at_text, at_merged = 0, text.shape[0]
        blocks_of = iter([tuple(video.blocks) for video in videos])
        for row in batch.spans:
            spans.append([])
            for span in row:
                if span.image:
                    blocks = next(blocks_of)
                    size = sum(blocks)
                    spans[-1].append(replace(span, length=size, visual=size, blocks=blocks))
                    in_order.append(torch.arange(at_merged, at_merged + size))
                    at_merged += size
                between = span.length - span.visual
                if between or not span.image:  # an empty row has one span of no tokens
                    spans[-1].append(Span(0, between, 0, 0))
                    in_order.append(torch.arange(at_text, at_text + between))
                    at_text += between
            row_ids.append(torch.full((sum(span.length for span in spans[-1]),), len(row_ids)))
        place = to_device(torch.cat(in_order), device)
        shorter = batch.with_merged(
            values=ops.gather_rows(tokens, place.to(torch.int32)),
            origin=batch.origin[torch.cat(sources)[place]],
            row_ids=to_device(torch.cat(row_ids), device),
            spans=spans,
        )
        return shorter, videos


def _starts(lengths: list[int]) -> list[int]:
    """Where each of consecutive pieces starts."""
    return [0, *accumulate(lengths)][:-1]


def _visual_values(batch: RaggedBatch, visual: Tensor) -> Tensor:
    """``(visual, hidden)``; a view where the visual tokens lie behind each other, as those of a single video do."""
    spans = [span for row in batch.spans for span in row if span.length]
    images = [j for j, span in enumerate(spans) if span.image]
    between = spans[images[0] : images[-1] + 1]
    if all(span.visual == span.length for span in between):
        first = sum(span.length for span in spans[: images[0]])
        return batch.values[first : first + visual.shape[0]]
    return ops.gather_rows(batch.values, visual.to(torch.int32))


def _split(batch: RaggedBatch) -> tuple[Tensor, Tensor, list[VideoShape]]:
    """``(visual,)`` and ``(text,)`` int64 places of the visual and the text tokens, and the shapes of the videos.

    Text between the pieces of a video comes right behind that video's place.
    """
    device = batch.values.device
    visual, text, shapes = [], [], []
    at = 0
    for span in (span for row in batch.spans for span in row):
        places = torch.arange(at, at + span.length, device=device)
        if 0 < span.visual < span.length:
            # Only the device knows which are which: the visual ones first, all in order.
            places = places[torch.argsort(batch.protect[at : at + span.length].int(), stable=True)]
        visual.append(places[: span.visual])
        text.append(places[span.visual :])
        if span.image:
            shapes.append(VideoShape(span.frames, span.visual // span.frames))
        at += span.length
    return torch.cat(visual), torch.cat(text), shapes


def _queries(batch: RaggedBatch, row: int) -> range:
    """The tokens of a merged row, counted in the row as it stands, that ask for tokens of its videos."""
    spans = batch.spans[row]
    last = max((j for j, span in enumerate(spans) if span.image), default=None)
    if last is None:
        return range(0)
    first = sum(span.length for span in spans[: last + 1])
    # Behind the last video nothing was merged: places counted from the end of the row are what they were.
    borders = batch.entry.cu_seqlens_host
    shift = batch.lengths[row] - (borders[row + 1] - borders[row])
    # An answer right behind the video leaves no text to ask: the row has no queries.
    stop = next((q + shift + 1 for q in batch.entry.query_tokens[row] if q + shift + 1 >= first), first)
    return range(first, stop)


def _rank(batch: RaggedBatch, attention: nn.Module, q: Tensor, k: Tensor, queries: list[range]) -> Tensor:
    """``(total,)`` float32: the highest attention that a token gets from the queries of its row, over all heads."""
    device = batch.values.device
    starts = _starts(batch.lengths)
    chosen = torch.cat([torch.arange(at + r.start, at + r.stop) for at, r in zip(starts, queries, strict=True)])
    chosen = to_device(chosen, device)
    return ops.last_query_scores(
        q.view(batch.values.shape[0], -1, attention.head_dim).index_select(0, chosen),
        k.view(batch.values.shape[0], -1, attention.head_dim),
        cu_seqlens_of([len(r) for r in queries], device),
        batch.cu_seqlens,
        softmax_scale=attention.scaling,
        head_reduce="max",
        query_reduce="max",
    )


@contextmanager
def _outputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what each module returns, without its gradient, when it runs within the context."""
    outputs: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(place: int, output: Tensor) -> None:
        outputs[place] = output.detach().squeeze(0)

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, place=place: keep(place, output))
        for place, module in enumerate(modules)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _record_merge(state: DecoderState, videos: list[VideoMerge], before: RaggedBatch) -> None:
    after, of_videos, at = state.batch, iter(videos), 0
    for b in after.rows:
        layouts, first_token = [], 0
        for span in before.spans[b]:
            if span.image:
                video = next(of_videos)
                layouts.append(
                    VideoLayout(
                        image=span.image,
                        num_frames=video.shape.frames,
                        patches=video.shape.patches,
                        first_token=first_token,
                        window_sizes=video.window_sizes,
                        static=video.static,
                        tokens=video.sources.cpu(),
                        blocks=video.blocks,
                    )
                )
            first_token += span.length
        kept = after.origin[at : at + after.lengths[b]] - after.entry.cu_seqlens_host[b]
        no_scores = torch.empty(0, dtype=torch.float32, device=kept.device)
        state.trace.records.append(MergeRecord(0, b, 0, no_scores, kept, layouts))
        at += after.lengths[b]


def _record_selection(
    state: DecoderState, layer: int, scores: Tensor, queries: list[range], before: RaggedBatch
) -> None:
    after, start_before, start_after = state.batch, 0, 0
    for b in after.rows:
        pieces, at = [scores[:0]], start_before
        for span in before.spans[b]:
            if span.image and queries[b]:
                pieces.append(scores[at : at + span.length])
            at += span.length
        stop_after = start_after + after.lengths[b]
        kept = after.origin[start_after:stop_after] - after.entry.cu_seqlens_host[b]
        state.trace.records.append(Record(1, b, layer, torch.cat(pieces), kept))
        start_before, start_after = at, stop_after
