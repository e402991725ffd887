"""No op waits for the device, and a captured graph serves other lengths within the same capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_support import DEVICE, REHEARSAL, Captured, no_synchronisation, on_cpu, on_device, raw

from pruneops import ops
from pruneops.testing import assert_bitwise_equal, cu_seqlens_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native")]

TOTAL, CAPACITY, HEADS, DIM = 6000, 3000, 4, 64
# The same number of segments each time; other lengths, other counts, one batch that does not fill the buffers.
BATCHES = [
    ((2880, 576, 0, 2544), (1440, 288, 0, 1000)),
    ((1, 2000, 3000, 999), (1, 1999, 0, 1000)),
    ((6000, 0, 0, 0), (5000, 0, 0, 0)),
    ((34, 35, 36, 37), (17, 100, -3, 37)),
]


def int32(values: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def buffers(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    lengths, counts = BATCHES[seed % len(BATCHES)]
    return {
        "scores": torch.randn(TOTAL, generator=generator).round(decimals=2),
        "protect": torch.rand(TOTAL, generator=generator) < 0.05,
        "hidden": torch.randn(TOTAL, 96, generator=generator).bfloat16(),
        "positions": torch.arange(TOTAL) + seed,
        "q": torch.randn(8, HEADS, DIM, generator=generator),
        "k": torch.randn(TOTAL, 2, DIM, generator=generator),
        "q_all": torch.randn(TOTAL // 10, HEADS, DIM, generator=generator),
        "k_all": torch.randn(TOTAL // 10, 2, DIM, generator=generator),
        "v_all": torch.randn(TOTAL // 10, 2, DIM, generator=generator),
        "policy": torch.rand(TOTAL // 10, generator=generator),
        "cu_seqlens": cu_seqlens_of(lengths),
        "cu_seqlens_all": cu_seqlens_of([n // 10 for n in lengths]),
        "cu_seqlens_q": cu_seqlens_of([(1, 2, 0, 3), (0, 1, 1, 1), (8, 0, 0, 0), (2, 2, 2, 2)][seed % 4]),
        "counts": int32(counts),
        "positions_q": torch.randint(0, TOTAL, (8,), generator=generator),
        "features": torch.randint(0, 3, (TOTAL // 10, 16), generator=generator).float(),
        "clusters": int32([(30, 9, 1, 40), (1, 5, 7, -2), (90, 0, 0, 0), (2, 2, 2, 100)][seed % 4]),
        "ids": torch.randint(-1, 9, (TOTAL // 10,), generator=generator).int(),
        "weights": torch.rand(TOTAL, generator=generator),
        "router": torch.randn(96, generator=generator).bfloat16(),
        "indices": torch.randperm(TOTAL, generator=generator)[:CAPACITY].int(),
    }


def policy_attention(b: dict[str, Any]) -> Any:
    """Forward and backward."""
    inputs = b["q_all"], b["k_all"], b["v_all"], b["policy"]
    numbers = b["cu_seqlens_all"], TOTAL // 10, 0.1, 1e-6
    forward = raw("policy_attention", *inputs, *numbers)
    return forward[0], *raw("policy_attention_backward", b["q_all"], *inputs, *forward, *numbers)


def calls(b: dict[str, Any]) -> dict[str, Any]:
    """Every op that has a CUDA kernel, in the form whose counts live on the device."""
    return {
        "segment_topk": lambda: raw(
            "segment_topk", b["scores"], b["cu_seqlens"], b["counts"], CAPACITY, b["protect"]
        ),
        "segment_threshold": lambda: raw(
            "segment_threshold", b["scores"], b["cu_seqlens"], 0.4, CAPACITY, b["counts"], b["protect"]
        ),
        "gather_rows": lambda: raw("gather_rows", [b["hidden"], b["positions"]], b["indices"]),
        "scatter_rows": lambda: raw(
            "scatter_rows", [b["hidden"][:CAPACITY], b["positions"][:CAPACITY]], b["indices"], TOTAL
        ),
        "select_compact": lambda: raw(
            "select_compact", b["scores"], [b["hidden"], b["positions"]], b["cu_seqlens"], b["counts"], CAPACITY
        ),
        "scatter_scaled": lambda: raw(
            "scatter_scaled", b["hidden"], b["hidden"][:CAPACITY], b["hidden"][1 : CAPACITY + 1], b["weights"],
            b["indices"],
        ),
        "scatter_scaled_backward": lambda: raw(
            "scatter_scaled_backward", b["hidden"], b["hidden"], b["hidden"][:CAPACITY], b["weights"], b["indices"]
        ),
        "router_weights": lambda: raw(
            "router_weights", b["hidden"], b["router"], None, b["protect"], "tanh", 0.2, 1.0
        ),
        "router_weights_backward": lambda: raw(
            "router_weights_backward", b["weights"], b["scores"], b["hidden"], b["router"], b["protect"], "tanh", 0.2
        ),
        "policy_attention": lambda: policy_attention(b),
        "last_query_scores": lambda: raw(
            "last_query_scores", b["q"], b["k"], b["cu_seqlens_q"], b["cu_seqlens"], 0.1, "mean", "mean"
        ),
        "column_scores": lambda: raw(
            "column_scores", b["q_all"], b["k_all"], b["cu_seqlens_all"], b["cu_seqlens_all"],
            TOTAL // 10, TOTAL // 10, True, 0.1, "sum", "mean",
        ),
        "kv_limit_from_positions": lambda: raw(
            "kv_limit_from_positions", b["positions_q"], b["positions"], b["cu_seqlens_q"], b["cu_seqlens"]
        ),
        "dpc_knn": lambda: raw(
            "dpc_knn", b["features"], b["cu_seqlens_all"], b["clusters"], 5, TOTAL // 10, 100
        ),
        "merge_mean": lambda: raw("merge_mean", b["features"], b["ids"], b["cu_seqlens_all"], b["clusters"], 100),
        "position_means": lambda: raw("position_means", b["features"], b["cu_seqlens_all"], b["clusters"], 100),
    }  # fmt: skip


OPS = list(calls({}))
# Ops whose results are numbers computed in an order of their own, of float32 or of bfloat16.
CLOSE = {"last_query_scores": 1e-4, "column_scores": 1e-4, "router_weights": 1e-4, "dpc_knn": 1e-4}
CLOSE |= {"position_means": 1e-4, "policy_attention": 1e-4}
CLOSE |= {"scatter_scaled": 1e-2, "scatter_scaled_backward": 1e-2, "router_weights_backward": 1e-2}


def check(op: str, ours: Any, batch: dict[str, Any]) -> None:
    expected = calls(batch)[op]()
    if op not in CLOSE:
        assert_bitwise_equal(on_cpu(ours), expected, op)
    else:
        rtol = CLOSE[op]
        atol = 1e-3 if op == "policy_attention" else rtol / 100  # its gradients are differences
        torch.testing.assert_close(on_cpu(ours), expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
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

    def stage(b: dict[str, Any]) -> Any:
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
        expected = raw("select_compact", scores, [batch["hidden"], batch["positions"]], batch["cu_seqlens"],
                       batch["counts"], CAPACITY)  # fmt: skip
        assert_bitwise_equal([*moved, indices, kept], expected)


@pytest.mark.parametrize("op", OPS)
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
