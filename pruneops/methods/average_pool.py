"""Averaging neighbouring patches before the decoder: down-sampling, which no method may fall behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pruneops import ops
from pruneops.decoder import DecoderState, Positions, Record
from pruneops.methods.base import PruningMethod
from pruneops.ragged import RaggedBatch, Span, to_device


@dataclass(frozen=True)
class AveragePool(PruningMethod):
    """A baseline: every image's grid of patches is made coarser before the language model sees it.

    Rectangles of `rows` x `columns` patches are replaced by their mean, in reading order; text stays. 2 x 2 leaves a
    quarter of the tokens, 1 x 2 half, 3 x 3 a ninth. Where the grid cannot be divided evenly, the rectangles at its
    right and lower border are smaller. The remaining tokens are numbered from 0.

    Parameters
    ----------
    rows, columns : int
        Patches that are averaged, at least 1 each.

    Notes
    -----
    Nothing looks at content: the choice is that of an encoder of lower resolution. Frames of a video are made coarser
    one by one. Means are taken in float32 and rounded once (`pruneops.ops.merge_mean`), gradients reach every patch.
    In records and caches a mean stands in the place of its upper left patch.

    *Continuation* (another turn on the cache): images of the new chunk are averaged within the chunk.

    Raises
    ------
    TypeError, ValueError
        For sizes that break the rules above; in a pass, for an image that is no square grid of patches: of several
        tiles, or with text between its pieces.
    """

    rows: int = 2
    columns: int = 2

    name: ClassVar[str] = "average_pool"
    positions: ClassVar[Positions] = Positions.AT_ENTRY
    asks_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, size in (("rows", self.rows), ("columns", self.columns)):
            if type(size) is not int:
                raise TypeError(f"{name}: got {size!r}, expected a whole number")
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")

    def before_decoder(self, state: DecoderState) -> None:
        batch = state.batch
        if state.decoding or not any(span.image for row in batch.spans for span in row):
            return
        state.batch = self._pool(batch)
        if state.trace.record:
            _record(state)

    def _pool(self, batch: RaggedBatch) -> RaggedBatch:
        spans, clusters, firsts, at = [], [], [], 0
        for row in batch.spans:
            spans.append([])
            in_row = 0
            for span in row:
                cells = self._cells(span) if span.image else torch.arange(span.length)
                count = int(cells.max()) + 1 if len(cells) else 0
                new = replace(span, length=count, visual=count) if span.image else span
                # The first patch of every mean: cells are numbered in the order in which these come.
                first = torch.full((count,), span.length).scatter_reduce(0, cells, torch.arange(len(cells)), "amin")
                spans[-1].append(new)
                clusters.append(in_row + cells)
                firsts.append(at + first)
                in_row, at = in_row + count, at + span.length
        # Text tokens are means of one: they come out as they are, in their places.
        lengths = [sum(span.length for span in row) for row in spans]
        cluster_ids, first = (to_device(torch.cat(pieces), batch.values.device) for pieces in (clusters, firsts))
        values, _ = ops.merge_mean(batch.values, cluster_ids.to(torch.int32), batch.cu_seqlens, lengths)
        return batch.with_merged(values, batch.origin[first], batch.row_ids[first], spans)

    def _cells(self, span: Span) -> Tensor:
        """``(tokens,)`` int64: the number of the rectangle that each patch of an image belongs to."""
        patches = span.visual // span.frames
        side = math.isqrt(patches)
        if span.visual != span.length or side * side != patches:
            between = f" with {span.length - span.visual} text tokens between them" if span.visual < span.length else ""
            raise ValueError(
                f"AveragePool: got an image of {patches} tokens{between}, expected a square grid of patches"
            )
        line = torch.arange(side)
        wide = -(-side // self.columns)
        cells = (line // self.rows)[:, None] * wide + line // self.columns
        of_frame = torch.arange(span.frames)[:, None] * (-(-side // self.rows) * wide)
        return (of_frame + cells.flatten()).flatten()


def _record(state: DecoderState) -> None:
    batch, at = state.batch, 0
    for b in batch.rows:
        kept = batch.origin[at : at + batch.lengths[b]] - batch.entry.cu_seqlens_host[b]
        no_scores = torch.empty(0, dtype=torch.float32, device=kept.device)
        state.trace.records.append(Record(0, b, 0, no_scores, kept))
        at += batch.lengths[b]
