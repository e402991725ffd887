"""PyramidDrop: drop visual tokens in stages, ranked by the attention of the last instruction token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruneops import ops
from pruneops.decoder import DecoderState, Positions, Record
from pruneops.methods.base import PruningMethod
from pruneops.ragged import RaggedBatch, Span, cu_seqlens_of, to_device


@dataclass(frozen=True)
class PyramidDrop(PruningMethod):
    """PyramidDrop (Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction", arXiv 2410.17247, sections 3.2 and 3.3).

    After a given number of decoder layers, every image is cut to a share of its *original* tokens. Tokens are ranked by
    the attention they get from the last instruction token, computed with the next layer's own norm, query and key
    projection (causal softmax over all keys, mean over heads). The best stay, in their order; all text stays; the
    remaining tokens are renumbered from 0. Dropped tokens stay in the key/value cache of the layers they went through.

    Parameters
    ----------
    layers : sequence of int, optional
        How many decoder layers run before each drop, strictly increasing, at least 1 and below the depth of the model.
        None: the quarter points of the depth, one per ratio (8, 16, 24 of 32).
    keep_ratios : sequence of float
        Share of the original tokens of an image that stays after each drop, in (0, 1], not increasing. An image of n
        tokens keeps ``int(n * keep_ratio)``; 0 means that it vanishes.

    Notes
    -----
    *Queries.* With labels, every token right before an answer is a query and their scores are averaged, as the official
    code does in training (the paper has one instruction); a row without an answer is left alone. Without labels the
    query is the last prompt token.

    *Where the official code fails or is limited* (batches while decoding, padding under SDPA, grouped-query attention,
    several images a row, text-only rows) this does what the paper means: keys are shared by their group of query heads,
    every image of a row is dropped by its own ratio, text-only rows are not touched, the query is the true last prompt
    token, and sequences are not truncated to a maximum length.

    *Continuation* (another turn on the cache): images of the new chunk are ranked and dropped within the chunk; earlier
    turns are never revisited; a chunk without images is not pruned.

    Scores are float32 and ties go to the lowest index, so that recomputation under activation checkpointing selects
    the same tokens.

    Raises
    ------
    TypeError, ValueError
        For layers or ratios that break the rules above.
    """

    layers: tuple[int, ...] | None = None
    keep_ratios: tuple[float, ...] = (0.5, 0.25, 0.125)

    name: ClassVar[str] = "pyramiddrop"
    positions: ClassVar[Positions] = Positions.EACH_DROP

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratios", _checked_ratios(self.keep_ratios))
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))
            if len(self.layers) != len(self.keep_ratios):
                raise ValueError(
                    f"keep_ratios: got {len(self.keep_ratios)} ratios for {len(self.layers)} layers, "
                    "expected one for each"
                )

    def for_depth(self, num_layers: int) -> PyramidDrop:
        stages = len(self.keep_ratios)
        if self.layers is None:
            layers = tuple((s + 1) * num_layers // (stages + 1) for s in range(stages))
            if stages and (layers[0] < 1 or len(set(layers)) < stages):
                raise ValueError(
                    f"layers: got None, expected them given: {num_layers} layers cannot be cut into {stages + 1} parts"
                )
            return PyramidDrop(layers, self.keep_ratios)
        for layer in self.layers:
            if layer >= num_layers:
                raise ValueError(
                    f"layers: got {layer}, expected at most {num_layers - 1}: the model has {num_layers} layers and "
                    "the ranking needs the weights of the layer after the drop"
                )
        return self

    @property
    def ranked_layers(self) -> tuple[int, ...]:
        return self.layers or ()

    def before_layer(self, i: int, layer: nn.Module, state: DecoderState) -> None:
        if state.decoding or i not in self.layers:
            return
        stage, batch = self.layers.index(i), state.batch
        queried = [bool(queries) for queries in batch.entry.query_tokens]
        keep = [[self._kept(span, stage) if queried[b] else span.visual for span in batch.spans[b]] for b in batch.rows]
        drops = [any(k < span.visual for k, span in zip(keep[b], batch.spans[b], strict=True)) for b in batch.rows]
        has_image = [any(span.visual for span in batch.spans[b]) for b in batch.rows]
        wanted = has_image if state.trace.record else drops
        ranked = [b for b in batch.rows if queried[b] and wanted[b]]
        scores = None
        if ranked:
            with torch.no_grad():
                scores = _rank(batch, layer, state, ranked)
        if any(drops):
            shorter = batch.keep_best(scores, keep)
            state.batch = shorter.with_position_ids(shorter.offsets)
        if state.trace.record:
            _record(state, stage, i, scores, ranked, batch)

    def _kept(self, span: Span, stage: int) -> int:
        """Visual tokens of a span after a stage."""
        return min(span.visual, int(span.original_visual * self.keep_ratios[stage]))


def _rank(batch: RaggedBatch, layer: nn.Module, state: DecoderState, ranked: list[int]) -> Tensor:
    """``(total,)`` float32: attention of the query tokens to each token of the ranked rows; 0 in other rows.

    Projects the keys of the ranked rows and the queries of their query tokens, nothing else.
    """
    device = batch.values.device
    total = batch.values.shape[0]
    values, position_ids, lengths, chosen = batch.values.detach(), batch.position_ids, batch.lengths, None
    if len(ranked) < batch.batch_size:
        starts = [0]
        for length in batch.lengths:
            starts.append(starts[-1] + length)
        chosen = to_device(torch.cat([torch.arange(starts[b], starts[b + 1]) for b in ranked]), device)
        values = ops.gather_rows(values, chosen.to(torch.int32))
        position_ids = position_ids.index_select(0, chosen)
        lengths = [batch.lengths[b] for b in ranked]
    cu_seqlens = cu_seqlens_of(lengths, device)

    # The query tokens' places now: the token itself, or what is left before it.
    borders = batch.entry.cu_seqlens_host
    origins = [borders[b] + t for b in ranked for t in batch.entry.query_tokens[b]]
    counts = [len(batch.entry.query_tokens[b]) for b in ranked]
    origin = batch.origin if chosen is None else batch.origin.index_select(0, chosen)
    query_origin = to_device(torch.tensor(origins, dtype=torch.int64), device)
    query_row = to_device(torch.tensor([r for r, n in enumerate(counts) for _ in range(n)], dtype=torch.int64), device)
    first = cu_seqlens.index_select(0, query_row).long()
    query = torch.maximum(torch.searchsorted(origin, query_origin, right=True) - 1, first)

    attention = layer.self_attn
    normed = layer.input_layernorm(values)
    head_dim = attention.head_dim
    q = attention.q_proj(normed.index_select(0, query)).view(len(origins), -1, head_dim)
    k = attention.k_proj(normed).view(normed.shape[0], -1, head_dim)
    cos, sin = (t.squeeze(0).unsqueeze(1) for t in state.rotary(position_ids))
    q = _rotate(q, cos.index_select(0, query), sin.index_select(0, query)).to(k.dtype)
    k = _rotate(k, cos, sin).to(k.dtype)
    scores = ops.last_query_scores(
        q,
        k,
        cu_seqlens_of(counts, device),
        cu_seqlens,
        kv_limit=(query - first + 1).to(torch.int32),
        softmax_scale=attention.scaling,
    )
    return scores if chosen is None else scores.new_zeros(total).index_copy_(0, chosen, scores)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``(tokens, heads, head_dim)`` with ``(tokens, 1, head_dim)`` cos and sin (halves layout)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def _record(
    state: DecoderState, stage: int, layer: int, scores: Tensor | None, ranked: list[int], before: RaggedBatch
) -> None:
    start_before = start_after = 0
    after = state.batch
    for b in range(after.batch_size):
        stop_before, stop_after = start_before + before.lengths[b], start_after + after.lengths[b]
        row_scores = torch.empty(0, dtype=torch.float32, device=before.values.device)
        if b in ranked:
            pieces, at = [], start_before
            for span in before.spans[b]:
                if span.image:
                    piece = scores[at : at + span.length]
                    pieces.append(piece if before.protect is None else piece[~before.protect[at : at + span.length]])
                at += span.length
            row_scores = torch.cat(pieces)
        kept = after.origin[start_after:stop_after] - after.entry.cu_seqlens_host[b]
        state.trace.records.append(Record(stage, b, layer, row_scores, kept))
        start_before, start_after = stop_before, stop_after


def _checked_ratios(keep_ratios: Sequence[float]) -> tuple[float, ...]:
    if isinstance(keep_ratios, (str, bytes)) or not isinstance(keep_ratios, Sequence):
        raise TypeError(f"keep_ratios: got {keep_ratios!r}, expected a sequence of numbers in (0, 1]")
    previous = 1.0
    for ratio in keep_ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, Real):
            raise TypeError(f"keep_ratios: got {ratio!r}, expected numbers in (0, 1]")
        if not (math.isfinite(ratio) and 0 < ratio <= 1):
            raise ValueError(f"keep_ratios: got {ratio}, expected a share in (0, 1]")
        if ratio > previous:
            raise ValueError(
                f"keep_ratios: got {tuple(keep_ratios)}, expected ratios that do not increase: they are shares of the "
                "original tokens, and a dropped token does not come back"
            )
        previous = ratio
    return tuple(float(ratio) for ratio in keep_ratios)


def _checked_layers(layers: Sequence[int]) -> tuple[int, ...]:
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: got {layers!r}, expected a sequence of whole numbers")
    previous = 0
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"layers: got {layer!r}, expected whole numbers")
        if layer <= previous:
            raise ValueError(
                f"layers: got {tuple(layers)}, expected strictly increasing numbers of at least 1 "
                "(layers that run before a drop)"
            )
        previous = layer
    return tuple(int(layer) for layer in layers)
