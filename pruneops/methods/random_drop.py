"""Dropping visual tokens at random, in stages: what a method that chooses has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruneops.decoder import DecoderState
from pruneops.methods.staged_drop import StagedDrop
from pruneops.ragged import RaggedBatch

#: Channels whose rise from token to token tells pictures apart.
_CHANNELS = 4
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomDrop(StagedDrop):
    """A baseline: `PyramidDrop` with a random choice in the place of its ranking.

    After a given number of decoder layers, every image is cut to a share of its *original* tokens. Which stay is drawn
    once a pass, so that what is left after a drop is part of what was left before it. Counts, order, positions and
    caches are those of `PyramidDrop`: a difference between the two is due to the choice of tokens alone.

    Parameters
    ----------
    layers : sequence of int, optional
        How many decoder layers run before each drop, strictly increasing, at least 0 (before the decoder) and below the
        depth of the model. None: the quarter points of the depth, one per ratio (8, 16, 24 of 32).
    keep_ratios : sequence of float
        Share of the original tokens of an image that stays after each drop, in (0, 1], not increasing. An image of n
        tokens keeps ``int(n * keep_ratio)``; 0 means that it vanishes.
    seed : int
        Another seed, another choice; 0 to ``2**32 - 1``.

    Notes
    -----
    *The draw* is a hash of the seed, of the token's place in its row, and of what the row's images look like: in which
    of a few channels of the embedding each visual token exceeds the one before it. So it needs no generator and is the
    same when a picture is seen again, when activation checkpointing computes it again, and in every batch and with
    every padding; pictures that differ have different draws. Where the encoder rounds differently in another batch, a
    comparison of two nearly equal numbers may turn out differently and change the picture's draw: rare in float32 (of
    a picture of 576 tokens, fewer than one in a hundred), common in 16 bits.

    *Rows without images* are left alone, and so are, with labels, rows without an answer, as in `PyramidDrop`.

    Raises
    ------
    TypeError, ValueError
        For layers, ratios or a seed that break the rules above.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    earliest: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.seed) is not int:
            raise TypeError(f"seed: got {self.seed!r}, expected a whole number")
        if not 0 <= self.seed <= _WORD:
            raise ValueError(f"seed: got {self.seed}, expected 0 to {_WORD}")

    def before_decoder(self, state: DecoderState) -> None:
        if not state.decoding:
            state.notes = _draw(state.batch, self.seed)

    def scores(self, batch: RaggedBatch, layer: nn.Module, state: DecoderState, rows: list[int]) -> Tensor:
        return state.notes.index_select(0, batch.origin)


def _draw(batch: RaggedBatch, seed: int) -> Tensor:
    """``(total,)`` float32 in [0, 1): a number for every token of a batch that nothing was dropped from."""
    values, place = batch.values.detach()[:, :_CHANNELS], batch.offsets
    rises = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    rises[1:] = (values[1:] > values[:-1]) & (place[1:] > 0)[:, None]
    weights = 2 ** torch.arange(values.shape[1], device=values.device)
    looks = _hash(_hash(place + 1) + (rises * weights).sum(1)) * batch.visual
    of_row = torch.zeros_like(batch.cu_seqlens[1:], dtype=torch.int64).index_add_(0, batch.row_ids, looks)
    key = _hash(of_row + _hash(torch.full_like(of_row, seed)))
    # 24 bits, as many as a float32 holds.
    return (_hash(key.index_select(0, batch.row_ids) + place) >> 8).float() / 2**24


def _hash(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 (Appleby, public domain) on the low 32 bits of int64 numbers."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)
