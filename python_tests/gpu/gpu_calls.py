"""One call of every op, on batches of the same shapes and different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_support import cpu_kernel, on_cpu, raw

from pruneops.testing import assert_bitwise_equal, cu_seqlens_of

Batch = dict[str, torch.Tensor]
Run = Callable[..., Any]

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


def buffers(seed: int) -> Batch:
    """Inputs on the CPU; of another seed with the same shapes and other lengths."""
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


def policy_attention(b: Batch, run: Run) -> Any:
    """Forward and backward."""
    inputs = b["q_all"], b["k_all"], b["v_all"], b["policy"]
    numbers = b["cu_seqlens_all"], TOTAL // 10, 0.1, 1e-6
    forward = run("policy_attention", *inputs, *numbers)
    return forward[0], *run("policy_attention_backward", b["q_all"], *inputs, *forward, *numbers)


def varlen_attention(b: Batch, run: Run) -> Any:
    """Forward and backward, in a dtype that every backend has kernels for."""
    q, k, v = (b[name].bfloat16() for name in ("q_all", "k_all", "v_all"))
    numbers = b["cu_seqlens_all"], b["cu_seqlens_all"], TOTAL // 10, TOTAL // 10, True, 0.1
    forward = run("varlen_attention", q, k, v, *numbers)
    return *forward, *run("varlen_attention_backward", q, None, q, k, v, *forward, *numbers)


def decode_attention(b: Batch, run: Run) -> Any:
    slots = (b[name].view(4, TOTAL // 40, 2, DIM) for name in ("k_all", "v_all"))
    return run("decode_attention", b["q_all"][:4], *slots, b["clusters"], 0.1, 0, True)


def calls(b: Batch, run: Run = raw) -> dict[str, Callable[[], Any]]:
    """Every op with kernels of both backends, in the form whose counts live on the device."""
    return {
        "segment_topk": lambda: run(
            "segment_topk", b["scores"], b["cu_seqlens"], b["counts"], CAPACITY, b["protect"]
        ),
        "segment_threshold": lambda: run(
            "segment_threshold", b["scores"], b["cu_seqlens"], 0.4, CAPACITY, b["counts"], b["protect"]
        ),
        "gather_rows": lambda: run("gather_rows", [b["hidden"], b["positions"]], b["indices"]),
        "scatter_rows": lambda: run(
            "scatter_rows", [b["hidden"][:CAPACITY], b["positions"][:CAPACITY]], b["indices"], TOTAL
        ),
        "select_compact": lambda: run(
            "select_compact", b["scores"], [b["hidden"], b["positions"]], b["cu_seqlens"], b["counts"], CAPACITY
        ),
        "scatter_scaled": lambda: run(
            "scatter_scaled", b["hidden"], b["hidden"][:CAPACITY], b["hidden"][1 : CAPACITY + 1], b["weights"],
            b["indices"],
        ),
        "scatter_scaled_backward": lambda: run(
            "scatter_scaled_backward", b["hidden"], b["hidden"], b["hidden"][:CAPACITY], b["weights"], b["indices"]
        ),
        "router_weights": lambda: run(
            "router_weights", b["hidden"], b["router"], None, b["protect"], "tanh", 0.2, 1.0
        ),
        "router_weights_backward": lambda: run(
            "router_weights_backward", b["weights"], b["scores"], b["hidden"], b["router"], b["protect"], "tanh", 0.2
        ),
        "varlen_attention": lambda: varlen_attention(b, run),
        "decode_attention": lambda: decode_attention(b, run),
        "policy_attention": lambda: policy_attention(b, run),
        "last_query_scores": lambda: run(
            "last_query_scores", b["q"], b["k"], b["cu_seqlens_q"], b["cu_seqlens"], 0.1, "mean", "mean"
        ),
        "column_scores": lambda: run(
            "column_scores", b["q_all"], b["k_all"], b["cu_seqlens_all"], b["cu_seqlens_all"],
            TOTAL // 10, TOTAL // 10, True, 0.1, "sum", "mean",
        ),
        "kv_limit_from_positions": lambda: run(
            "kv_limit_from_positions", b["positions_q"], b["positions"], b["cu_seqlens_q"], b["cu_seqlens"]
        ),
        "dpc_knn": lambda: run(
            "dpc_knn", b["features"], b["cu_seqlens_all"], b["clusters"], 5, TOTAL // 10, 100
        ),
        "merge_mean": lambda: run("merge_mean", b["features"], b["ids"], b["cu_seqlens_all"], b["clusters"], 100),
        "position_means": lambda: run("position_means", b["features"], b["cu_seqlens_all"], b["clusters"], 100),
    }  # fmt: skip


OPS = list(calls({}))
# Ops whose results are numbers computed in an order of their own, of float32 or of bfloat16.
CLOSE = {"last_query_scores": 1e-4, "column_scores": 1e-4, "router_weights": 1e-4, "dpc_knn": 1e-4}
CLOSE |= {"position_means": 1e-4, "policy_attention": 1e-4, "decode_attention": 1e-4, "varlen_attention": 2e-2}
CLOSE |= {"scatter_scaled": 1e-2, "scatter_scaled_backward": 1e-2, "router_weights_backward": 1e-2}
# Gradients are differences.
ABSOLUTE = {"policy_attention": 1e-3, "varlen_attention": 5e-2}


def check(op: str, ours: Any, batch: Batch) -> None:
    """Compares what an op made of a batch on the device with what the CPU kernel makes of it."""
    compare(op, ours, calls(batch, cpu_kernel)[op]())


def compare(op: str, ours: Any, expected: Any) -> None:
    """Indices and moved rows to the bit, sums of floats to rounding."""
    if op not in CLOSE:
        assert_bitwise_equal(on_cpu(ours), expected, op)
    else:
        rtol = CLOSE[op]
        atol = ABSOLUTE.get(op, rtol / 100)
        torch.testing.assert_close(on_cpu(ours), expected, rtol=rtol, atol=atol, equal_nan=True)
