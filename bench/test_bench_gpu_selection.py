"""Selection on a GPU against topk, sort and cumsum, and the fused select-and-gather against the chain it replaces."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from bench import gpu_peers, workloads
from bench.gpu_compare import first_rehearsed, rotated, sized, smaller, versus
from bench.gpu_timing import DEVICE
from bench.workloads import Workload
from pruneops import ops

pytestmark = pytest.mark.gpu

MODELS = {
    work().name: work
    for work in (workloads.llava15_7b, workloads.llava_next_7b, workloads.onevision_7b_32f, workloads.pllava_16f)
}


def ragged64() -> Workload:
    """64 rows between a pruned LLaVA-1.5 image and a whole LLaVA-NeXT one."""
    rng = random.Random(0)
    return Workload("ragged64", tuple(rng.randint(352, 2944) for _ in range(64)))


RAGGED = {work().name: work for work in (workloads.ragged8, ragged64, workloads.tiny512)}


def scores_of(total: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct, so that which of two equal scores a peer prefers cannot matter."""
    return torch.randperm(total, generator=generator, device=DEVICE).float() / total


def counts_on_device(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("model", first_rehearsed(MODELS.values()), ids=MODELS)
def test_segment_topk_of_one_image(benchmark: Any, backend: str, model: Any) -> None:
    work = sized(model())
    length, keep = work.visual, work.visual // 2
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    counts = counts_on_device([keep])
    versus(
        benchmark,
        backend,
        rotated(lambda generator: scores_of(length, generator)),
        lambda scores: ops.segment_topk(scores, cu_seqlens, counts, capacity=keep),
        gpu_peers.EqualRows(1, length, keep),
        op="segment_topk",
        workload=f"{work.name}, 1 x {length}, half kept",
        peer_name="topk + sort + cumsum",
        target_ratio=5.0 if model is workloads.llava_next_7b else None,
        target_us=8.0,
    )


@pytest.mark.parametrize("length", [16_384, 32_768, 131_072])
def test_segment_topk_of_one_long_segment(benchmark: Any, backend: str, length: int) -> None:
    """The first on one multiprocessor, the others shared by several."""
    length = smaller(length)
    keep = length // 2
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    counts = counts_on_device([keep])
    versus(
        benchmark,
        backend,
        rotated(lambda generator: scores_of(length, generator)),
        lambda scores: ops.segment_topk(scores, cu_seqlens, counts, capacity=keep),
        gpu_peers.EqualRows(1, length, keep),
        op="segment_topk",
        workload=f"1 x {length}, half kept",
        peer_name="topk + sort + cumsum",
    )


@pytest.mark.parametrize("make", RAGGED.values(), ids=RAGGED)
def test_segment_topk_of_a_ragged_batch(benchmark: Any, backend: str, make: Any) -> None:
    work = sized(make())
    keep = [n // 2 for n in work.seqlens]
    cu_seqlens, counts = work.cu_seqlens().to(DEVICE), counts_on_device(keep)
    versus(
        benchmark,
        backend,
        rotated(lambda generator: scores_of(work.total, generator)),
        lambda scores: ops.segment_topk(scores, cu_seqlens, counts, capacity=sum(keep)),
        gpu_peers.RaggedRows(work.seqlens, keep),
        op="segment_topk",
        workload=f"{work.name}, {work.total} rows, half kept",
        peer_name="pad + topk + sort + cumsum",
        target_ratio=8.0 if make is ragged64 else None,
        target_us=8.0 if make is ragged64 else None,
    )


def test_segment_threshold_of_a_ragged_batch(benchmark: Any, backend: str) -> None:
    work = sized(workloads.ragged8())
    cu_seqlens = work.cu_seqlens().to(DEVICE)
    versus(
        benchmark,
        backend,
        rotated(lambda generator: scores_of(work.total, generator)),
        lambda scores: ops.segment_threshold(scores, cu_seqlens, 0.5, capacity=work.total),
        gpu_peers.Threshold(work.total, cu_seqlens, 0.5),
        op="segment_threshold",
        workload=f"{work.name}, {work.total} rows, half kept",
        peer_name="compare + cumsum + scatter",
    )


@pytest.mark.parametrize("model", first_rehearsed(MODELS.values()), ids=MODELS)
def test_select_compact_of_one_pruning_stage(benchmark: Any, backend: str, model: Any) -> None:
    """Hidden states and positions of the visual tokens of one image, half kept."""
    work = sized(model())
    length, keep = work.visual, work.visual // 2
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    counts = counts_on_device([keep])
    choose = gpu_peers.EqualRows(1, length, keep)

    def make(generator: torch.Generator) -> Any:
        hidden = torch.randn(length, work.hidden, generator=generator, device=DEVICE).bfloat16()
        return scores_of(length, generator), [hidden, torch.arange(length, device=DEVICE)]

    def peer(x: Any) -> Any:
        indices, kept = choose(x[0])
        return gpu_peers.index_select_chain(x[1], indices), indices, kept

    versus(
        benchmark,
        backend,
        rotated(make),
        lambda x: ops.select_compact(x[0], x[1], cu_seqlens, counts, capacity=keep),
        peer,
        op="select_compact",
        workload=f"{work.name} stage, {length} to {keep} rows of {work.hidden}",
        peer_name="topk + sort + cumsum + index_select",
        dtype=torch.bfloat16,
        bytes_moved=2 * keep * (work.hidden * 2 + 8),
        target_ratio=4.0 if model is workloads.llava_next_7b else None,
        target_us=10.0 if model is workloads.llava_next_7b else None,
    )


def test_select_compact_of_a_ragged_batch(benchmark: Any, backend: str) -> None:
    work = sized(workloads.ragged8())
    keep = [n // 2 for n in work.seqlens]
    cu_seqlens, counts = work.cu_seqlens().to(DEVICE), counts_on_device(keep)
    loop = gpu_peers.RowLoop(work.seqlens, keep)

    def make(generator: torch.Generator) -> Any:
        hidden = torch.randn(work.total, work.hidden, generator=generator, device=DEVICE).bfloat16()
        return scores_of(work.total, generator), [hidden, torch.arange(work.total, device=DEVICE)]

    versus(
        benchmark,
        backend,
        rotated(make),
        lambda x: ops.select_compact(x[0], x[1], cu_seqlens, counts, capacity=sum(keep))[0],
        lambda x: loop(*x),
        op="select_compact",
        workload=f"{work.name}, {work.total} to {sum(keep)} rows of {work.hidden}",
        peer_name="loop over rows: topk, sort, index, cat",
        dtype=torch.bfloat16,
        bytes_moved=2 * sum(keep) * (work.hidden * 2 + 8),
        target_ratio=10.0,
    )
