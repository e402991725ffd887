"""No op waits for the device, and a captured graph serves other lengths within the same capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_calls import BATCHES, CAPACITY, OPS, TOTAL, Batch, buffers, calls, check
from gpu_support import (
    DEVICE,
    REHEARSAL,
    Captured,
    cpu_kernel,
    first_rehearsed,
    no_synchronisation,
    on_cpu,
    on_device,
    raw,
)

from pruneops import ops
from pruneops.testing import assert_bitwise_equal

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]


@pytest.mark.parametrize("op", first_rehearsed(OPS))
def test_a_graph_replays_with_other_lengths_at_the_same_capacity(op):
    static = on_device(buffers(0))
    captured = Captured(calls(static)[op])
    for seed in (0, 1, 2, 3, 0):
        batch = buffers(seed)
        for name, value in batch.items():
            static[name].copy_(value)
        check(op, captured.replay(), batch)


def test_a_whole_pruning_stage_is_one_graph():
    """Rank by the last query row, keep the best, move hidden states and positions."""
    static = on_device(buffers(0))

    def stage(b: Batch) -> Any:
        scores = raw("last_query_scores", b["q"], b["k"], b["cu_seqlens_q"], b["cu_seqlens"], 0.1, "mean", "mean")
        return scores, *raw(
            "select_compact", scores, [b["hidden"], b["positions"]], b["cu_seqlens"], b["counts"], CAPACITY
        )

    captured = Captured(lambda: stage(static))
    for seed in (1, 2, 3):
        batch = buffers(seed)
        for name, value in batch.items():
            static[name].copy_(value)
        scores, moved, indices, kept = on_cpu(captured.replay())
        rows = [batch["hidden"], batch["positions"]]
        expected = cpu_kernel("select_compact", scores, rows, batch["cu_seqlens"], batch["counts"], CAPACITY)
        assert_bitwise_equal([*moved, indices, kept], expected)


@pytest.mark.parametrize("op", first_rehearsed(OPS))
def test_an_op_does_not_wait_for_the_device(op):
    batch = buffers(1)
    call = calls(on_device(batch))[op]
    call()  # loads the kernels
    with no_synchronisation():
        ours = call()
    check(op, ours, batch)


def test_front_ends_do_not_wait_for_the_device():
    b = on_device(buffers(0))
    lengths, _ = BATCHES[0]
    cu_seqlens, longest = b["cu_seqlens"], max(lengths) // 10
    ops.segment_topk(b["scores"], cu_seqlens, b["counts"], capacity=CAPACITY)
    with no_synchronisation():
        indices, _ = ops.segment_topk(b["scores"], cu_seqlens, b["counts"], capacity=CAPACITY)
        ops.segment_topk(b["scores"], cu_seqlens, [1440, 288, 0, 1000])
        ops.segment_threshold(b["scores"], cu_seqlens, 0.5, min_keep=[1, 1, 0, 1], protect=b["protect"])
        ops.select_compact(b["scores"], [b["hidden"]], cu_seqlens, [5, 5, 0, 5])
        rows = ops.gather_rows([b["hidden"], b["positions"]], indices)
        ops.scatter_rows(rows, indices, TOTAL)
        limit = ops.kv_limit_from_positions(b["positions_q"], b["positions"], b["cu_seqlens_q"], cu_seqlens)
        ops.last_query_scores(b["q"], b["k"], b["cu_seqlens_q"], cu_seqlens, kv_limit=limit)
        found = ops.dpc_knn(b["features"], b["cu_seqlens_all"], 9, k=5, max_seqlen=longest)
        ops.merge_mean(b["features"], found.cluster_ids, b["cu_seqlens_all"], found.cu_clusters.diff(), capacity=36)
        ops.column_scores(
            b["q_all"], b["k_all"], b["cu_seqlens_all"], b["cu_seqlens_all"], longest, longest, causal=True
        )


def test_the_guard_against_waiting_works():
    if not REHEARSAL:
        with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(3, device=DEVICE).sum().item()


def test_kernels_run_on_the_current_stream():
    """Inputs are written on a side stream right before; a kernel on another stream would read the old ones."""
    if REHEARSAL:
        return
    batch = buffers(2)
    static = on_device(buffers(0))
    for call in calls(static).values():  # loads the kernels, which may take long
        call()
    filler = torch.randn(4096, 4096, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    host = {name: value.pin_memory() for name, value in batch.items()}
    with torch.cuda.stream(side):
        for _ in range(20):
            filler = filler @ filler * 1e-4
        for name, value in host.items():
            static[name].copy_(value, non_blocking=True)
        results = {op: call() for op, call in calls(static).items()}
    side.synchronize()
    for op, result in results.items():
        check(op, result, batch)
