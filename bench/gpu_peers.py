"""The same results from plain torch on a GPU, in its best form: nothing waits for the device, everything that does
not depend on the scores (offsets, masks, places of the result) is made before the clock starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import peers
from bench.gpu_timing import DEVICE, REHEARSAL


@dataclass(frozen=True)
class EqualRows:
    """Top-k of rows of equal length."""

    batch: int
    length: int
    keep: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", torch.arange(self.batch, device=DEVICE)[:, None] * self.length)
        object.__setattr__(self, "counts", torch.full((self.batch,), self.keep, device=DEVICE))

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """topk, sort, add offsets, cumsum: absolute kept rows ``[B * keep]`` and cu_seqlens."""
        picked = scores.view(self.batch, self.length).topk(self.keep, dim=-1, sorted=False).indices.sort(dim=-1).values
        return (picked + self.offsets).flatten(), F.pad(self.counts.cumsum(0), (1, 0))


class RaggedRows:
    """Top-k of rows of unequal length: the packed scores are padded, which is part of the work."""

    def __init__(self, seqlens: Sequence[int], keep: Sequence[int]) -> None:
        longest, most = max(seqlens), max(keep)
        lengths = torch.tensor(seqlens)
        starts = torch.tensor([0, *accumulate(seqlens)])[:-1]
        columns = torch.arange(longest)
        self.padding = (columns >= lengths[:, None]).to(DEVICE)
        self.source = (starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)).flatten().to(DEVICE)
        self.unwanted = (torch.arange(most) >= torch.tensor(keep)[:, None]).to(DEVICE)
        self.valid = (~self.unwanted).flatten().nonzero().squeeze(1).to(DEVICE)
        self.starts = starts[:, None].to(DEVICE)
        self.counts = torch.tensor(keep, device=DEVICE)
        self.most, self.longest = most, longest

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        padded = scores.index_select(0, self.source).view(-1, self.longest).masked_fill(self.padding, -torch.inf)
        picked = padded.topk(self.most, dim=-1).indices
        picked = picked.masked_fill(self.unwanted, self.longest).sort(dim=-1).values
        rows = (picked + self.starts).flatten().index_select(0, self.valid)
        return rows, F.pad(self.counts.cumsum(0), (1, 0))


class Threshold:
    """Rows above a threshold in a result of fixed capacity, -1 after the last."""

    def __init__(self, total: int, boundaries: Tensor, threshold: float) -> None:
        self.rows = torch.arange(total, device=DEVICE, dtype=torch.int32)
        self.boundaries = boundaries.long()
        self.threshold, self.total = threshold, total

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        above = scores > self.threshold
        ends = F.pad(above.cumsum(0), (1, 0))
        places = torch.where(above, ends[1:] - 1, self.total)
        out = torch.full((self.total + 1,), -1, device=DEVICE, dtype=torch.int32).scatter_(0, places, self.rows)
        return out[: self.total], ends.index_select(0, self.boundaries)


class RowLoop:
    """A Python loop over the batch: top-k, sort, index, collect, concatenate. Common in published code."""

    def __init__(self, seqlens: Sequence[int], keep: Sequence[int]) -> None:
        ends = list(accumulate(seqlens))
        self.parts = [(end - n, end, count) for n, end, count in zip(seqlens, ends, keep, strict=True)]

    def __call__(self, scores: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        kept: list[list[Tensor]] = [[] for _ in tensors]
        for start, end, count in self.parts:
            index = scores[start:end].topk(count).indices.sort().values + start
            for target, tensor in zip(kept, tensors, strict=True):
                target.append(tensor[index])
        return [torch.cat(parts) for parts in kept]


def index_select_chain(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    return [tensor.index_select(0, indices) for tensor in tensors]


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """``torch.gather`` of whole rows."""
    return x.gather(0, indices[:, None].expand(-1, x.shape[1]))


def index_copy(rows: Tensor, indices: Tensor, total: int) -> Tensor:
    return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, indices, rows)


def head_major(x: Tensor) -> Tensor:
    """``[total, H, D]`` to contiguous ``[H, total, D]``: the layout that the eager chain likes best."""
    return x.transpose(0, 1).contiguous()


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """q ``[Hq, Lq, D]``, k ``[Hk, Lk, D]``: ``[Hq, Lq, Lk]`` in float32; query heads of a group share one key head."""
    heads, rows, dim = q.shape
    grouped = q.view(k.shape[0], heads // k.shape[0] * rows, dim)
    logits = (grouped @ k.transpose(-1, -2)).float().view(heads, rows, k.shape[1]) * dim**-0.5
    return (logits if mask is None else logits.masked_fill(mask, -torch.inf)).softmax(-1)


def last_query_mean(q: Tensor, k: Tensor) -> Tensor:
    """q ``[H, 1, D]``, k ``[Hk, L, D]``: mean over heads of the attention to every key."""
    return _probabilities(q, k, None).mean(0).squeeze(0)


def column_sum(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Mean over heads, sum over query rows of the causal softmax, materialised."""
    return _probabilities(q, k, mask).mean(0).sum(0)


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)


class DensityPeaks:
    """DPC-kNN as published code has it: whole distance matrices of a batch of equal lengths, one op after another."""

    def __init__(self, batch: int, length: int, clusters: int, k: int) -> None:
        self.batch, self.length, self.clusters, self.k = batch, length, clusters, k
        self.ranks = torch.arange(clusters, device=DEVICE).expand(batch, clusters)
        self.offsets = torch.arange(batch, device=DEVICE)[:, None] * length

    def __call__(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cluster ids ``[total]``, centres ``[batch * clusters]`` and density ``[total]``."""
        x = x.view(self.batch, self.length, -1).float()
        distances = torch.cdist(x, x) / x.shape[-1] ** 0.5
        nearest = distances.topk(self.k, dim=-1, largest=False).values
        density = (-nearest.square().mean(-1)).exp() + noise.view(self.batch, -1) * 1e-6
        denser = (density[:, None, :] > density[:, :, None]).to(distances.dtype)
        largest = distances.flatten(1).amax(-1)[:, None, None]
        delta = (distances * denser + largest * (1 - denser)).amin(-1)
        centers = (delta * density).topk(self.clusters, dim=-1).indices
        to_centers = distances.gather(1, centers[:, :, None].expand(-1, -1, self.length))
        ids = to_centers.argmin(1).scatter_(1, centers, self.ranks)
        return ids.flatten(), (centers + self.offsets).flatten(), density.flatten()


def index_add_mean(x: Tensor, slots: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Means of the rows of each cluster, and their number; sums by atomic additions in float32."""
    sums = x.new_zeros(clusters, x.shape[1], dtype=torch.float32).index_add_(0, slots, x.float())
    ones = torch.ones_like(slots, dtype=torch.float32)
    counts = x.new_zeros(clusters, dtype=torch.float32).index_add_(0, slots, ones)
    return (sums / counts.clamp(min=1)[:, None]).to(x.dtype), counts


# ---------------------------------------------------------------------- attention


@contextmanager
def sdpa_by(backend: SDPBackend, call: Callable[[], Any]) -> Iterator[None]:
    """scaled_dot_product_attention by one implementation of torch; skips the benchmark where it refuses the call.

    A rehearsal on the CPU takes the one that is there.
    """
    if REHEARSAL:
        yield
        return
    with sdpa_kernel(backend):
        try:
            call()
        except RuntimeError as error:
            pytest.skip(f"torch has no {backend.name} for this: {str(error).splitlines()[0]}")
        yield


@lru_cache(maxsize=1)
def _varlen_options() -> dict[str, Any]:
    """How torch's ragged attention is told to be causal, which changed between versions, and to group heads."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    # Where there is no such option, heads are grouped as they come.
    return {**options, "enable_gqa": True} if "enable_gqa" in known else options


def varlen(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, seqlens: Sequence[int]) -> Tensor:
    """torch's own ragged attention, causal, on ``[total, H, D]``; its FlashAttention-2 unless another was activated.

    A rehearsal runs one dense call a segment: torch has no ragged attention on the CPU.
    """
    if REHEARSAL:
        parts = zip(*([peers.head_major(part) for part in x.split(list(seqlens))] for x in (q, k, v)), strict=True)
        return torch.cat([out[0].transpose(0, 1) for out in peers.sdpa_loop(list(parts))])
    from torch.nn.attention.varlen import varlen_attn

    longest = max(seqlens)
    return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **_varlen_options())


def dense(x: Tensor, batch: int) -> Tensor:
    """``[total, H, D]`` of equal segments to contiguous ``[B, H, L, D]``."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2).contiguous()
