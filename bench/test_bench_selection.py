"""Selection against top-k plus sort, and the fused select-and-gather against the chain it replaces."""

from __future__ import annotations

import pytest
import torch

from bench import peers, workloads
from bench.conftest import Versus
from pruneops import ops


def _scores(total: int) -> torch.Tensor:
    return torch.rand(total, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [1, 8])
def test_segment_topk_equal_rows(versus: Versus, batch: int) -> None:
    length, keep = 2880, 1440
    work = workloads.uniform(length, batch)
    scores, cu_seqlens = _scores(work.total), work.cu_seqlens()
    rows = scores.view(batch, length)
    counts = torch.full((batch,), keep, dtype=torch.int32)
    versus(
        lambda: ops.segment_topk(scores, cu_seqlens, counts, capacity=batch * keep)[0],
        lambda: peers.topk_sort(rows, keep),
        op="segment_topk",
        workload=f"{work.name}, half kept",
        peer_name="topk + sort",
    )


def test_segment_topk_ragged(versus: Versus) -> None:
    work = workloads.ragged8()
    scores, cu_seqlens = _scores(work.total), work.cu_seqlens()
    lengths = torch.tensor(work.seqlens)
    keep = lengths // 2
    padded = peers.pad_scores(scores, work.seqlens)
    counts, capacity, longest = keep.int(), int(keep.sum()), int(keep.max())
    versus(
        lambda: ops.segment_topk(scores, cu_seqlens, counts, capacity=capacity),
        lambda: peers.ragged_topk_sort(padded, lengths, keep, longest),
        op="segment_topk",
        workload=f"{work.name}, half kept",
        peer_name="padded topk + sort + mask",
    )


def test_segment_threshold_ragged(versus: Versus) -> None:
    work = workloads.ragged8()
    scores, cu_seqlens = _scores(work.total), work.cu_seqlens()
    versus(
        lambda: ops.segment_threshold(scores, cu_seqlens, 0.5),
        lambda: peers.threshold_nonzero(scores, cu_seqlens, 0.5),
        op="segment_threshold",
        workload=f"{work.name}, half kept",
        peer_name="compare + nonzero + cumsum",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_select_compact_llava_next(versus: Versus, dtype: torch.dtype) -> None:
    """One pruning stage of LLaVA-NeXT: hidden states and positions of the 2880 visual tokens, half kept."""
    length, keep, hidden = 2880, 1440, 4096
    scores = _scores(length)
    tensors = [torch.randn(length, hidden).to(dtype), torch.arange(length)]
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    counts = torch.tensor([keep], dtype=torch.int32)
    moved = 2 * keep * (hidden * tensors[0].element_size() + 8)
    versus(
        lambda: ops.select_compact(scores, tensors, cu_seqlens, counts, capacity=keep)[:2],
        lambda: peers.select_chain(scores[None], tensors, keep),
        op="select_compact",
        workload="llava_next_7b stage, 2880 to 1440 rows",
        peer_name="topk + sort + index_select",
        dtype=dtype,
        bytes_moved=moved,
    )


def test_select_compact_ragged_batch(versus: Versus) -> None:
    """Eight ragged rows with two tensors, against the loop over rows that published code uses."""
    work = workloads.ragged8()
    scores, cu_seqlens = _scores(work.total), work.cu_seqlens()
    tensors = [torch.randn(work.total, work.hidden), torch.arange(work.total)]
    keep = [n // 2 for n in work.seqlens]
    counts = torch.tensor(keep, dtype=torch.int32)
    versus(
        lambda: ops.select_compact(scores, tensors, cu_seqlens, counts, capacity=sum(keep))[0],
        lambda: peers.loop_topk_cat(scores, tensors, work.seqlens, keep),
        op="select_compact",
        workload=f"{work.name}, half kept",
        peer_name="loop over rows: topk, sort, index, cat",
        bytes_moved=2 * sum(keep) * (work.hidden * 4 + 8),
    )
