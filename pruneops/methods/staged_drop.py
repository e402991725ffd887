"""What methods share that drop visual tokens in stages: a schedule, the counts, and the drop itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruneops.decoder import DecoderState, Positions, Record
from pruneops.methods.base import PruningMethod
from pruneops.ragged import RaggedBatch, Span


@dataclass(frozen=True)
class StagedDrop(PruningMethod):
    """Cuts every image to a share of its original tokens, again and again; subclasses say which tokens are best.

    The best stay, in their order; all text stays; the remaining tokens are renumbered from 0.

    Parameters
    ----------
    layers : sequence of int, optional
        How many decoder layers run before each drop, strictly increasing. None: the quarter points of the depth, or
        other equal parts, one border per ratio.
    keep_ratios : sequence of float
        Share of the original tokens of an image that stays after each drop, in (0, 1], not increasing.

    Raises
    ------
    TypeError, ValueError
        For layers or ratios that break these rules.
    """

    layers: tuple[int, ...] | None = None
    keep_ratios: tuple[float, ...] = (0.5, 0.25, 0.125)

    positions: ClassVar[Positions] = Positions.EACH_DROP
    #: The fewest layers that have to run before a drop.
    earliest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratios", _checked_ratios(self.keep_ratios))
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers, self.earliest))
            if len(self.layers) != len(self.keep_ratios):
                raise ValueError(
                    f"keep_ratios: got {len(self.keep_ratios)} ratios for {len(self.layers)} layers, "
                    "expected one for each"
                )

    def for_depth(self, num_layers: int) -> StagedDrop:
        stages = len(self.keep_ratios)
        if self.layers is None:
            layers = tuple((s + 1) * num_layers // (stages + 1) for s in range(stages))
            if stages and (layers[0] < 1 or len(set(layers)) < stages):
                raise ValueError(
                    f"layers: got None, expected them given: {num_layers} layers cannot be cut into {stages + 1} parts"
                )
            return replace(self, layers=layers)
        for layer in self.layers:
            if layer >= num_layers:
                raise ValueError(
                    f"layers: got {layer}, expected at most {num_layers - 1}: the model has {num_layers} layers and "
                    "one has to follow the drop"
                )
        return self

    def scores(self, batch: RaggedBatch, layer: nn.Module, state: DecoderState, rows: list[int]) -> Tensor:
        """What the visual tokens of some rows are worth.

        Parameters
        ----------
        batch : RaggedBatch
            The tokens before the drop.
        layer : nn.Module
            The decoder layer that comes next.
        rows : list of int
            Those that are asked for.

        Returns
        -------
        Tensor
            ``(total,)`` float32; of no meaning in other rows.
        """
        raise NotImplementedError

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
                scores = self.scores(batch, layer, state, ranked)
        if any(drops):
            shorter = batch.keep_best(scores, keep)
            state.batch = shorter.with_position_ids(shorter.offsets)
        if state.trace.record:
            _record(state, stage, i, scores, ranked, batch)

    def _kept(self, span: Span, stage: int) -> int:
        """Visual tokens of a span after a stage."""
        return min(span.visual, int(span.original_visual * self.keep_ratios[stage]))


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


def _checked_layers(layers: Sequence[int], earliest: int) -> tuple[int, ...]:
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: got {layers!r}, expected a sequence of whole numbers")
    previous = earliest - 1
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"layers: got {layer!r}, expected whole numbers")
        if layer <= previous:
            raise ValueError(
                f"layers: got {tuple(layers)}, expected strictly increasing numbers of at least {earliest} "
                "(layers that run before a drop)"
            )
        previous = layer
    return tuple(int(layer) for layer in layers)
