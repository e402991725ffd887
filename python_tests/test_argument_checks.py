"""Each wrong argument is refused by a message that names it, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneops import ops
from pruneops.testing import attention_inputs, cu_seqlens_of

SCORES = torch.arange(9.0)
CU = cu_seqlens_of([4, 5])
INPUTS = attention_inputs((4, 5), head_dim=8)
SLOTS = torch.zeros(2, 7, 2, 8)
INDICES = torch.tensor([1, 0], dtype=torch.int32)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def topk(**changed: Any) -> Any:
    return ops.segment_topk(**{"scores": SCORES, "cu_seqlens": CU, "keep_counts": [1, 1], **changed})


def threshold(**changed: Any) -> Any:
    return ops.segment_threshold(**{"scores": SCORES, "cu_seqlens": CU, "threshold": 0.5, **changed})


def gather(**changed: Any) -> Any:
    return ops.gather_rows(**{"x": SCORES, "indices": INDICES, **changed})


def scatter(**changed: Any) -> Any:
    return ops.scatter_rows(**{"rows": SCORES[:2], "indices": INDICES, "total": 9, **changed})


def compact(**changed: Any) -> Any:
    arguments = {"scores": SCORES, "tensors": [SCORES], "cu_seqlens": CU, "keep_counts": [1, 1]}
    return ops.select_compact(**{**arguments, **changed})


ROWS = torch.zeros(9, 4)


def scaled(**changed: Any) -> Any:
    arguments = {"x": ROWS, "residual": ROWS[:2], "branch": ROWS[:2], "weights": SCORES, "indices": INDICES}
    return ops.scatter_scaled(**{**arguments, **changed})


def router(**changed: Any) -> Any:
    arguments = {"x": ROWS, "weight": ROWS[0], "bias": ROWS[0, :1], "target": SCORES > 3, "scale": 0.2, "shift": 1}
    return ops.router_weights(**{**arguments, **changed})


PACKED = {
    "q": INPUTS.q,
    "k": INPUTS.k,
    "cu_seqlens_q": CU,
    "cu_seqlens_k": CU,
    "max_seqlen_q": 5,
    "max_seqlen_k": 5,
}


def attention(**changed: Any) -> Any:
    return ops.varlen_attention(**{**PACKED, "v": INPUTS.v, **changed})


def policy(**changed: Any) -> Any:
    arguments = {"q": INPUTS.q, "k": INPUTS.k, "v": INPUTS.v, "policy": SCORES, "cu_seqlens": CU, "max_seqlen": 5}
    return ops.policy_attention(**{**arguments, **changed})


def slots(**changed: Any) -> Any:
    cached = {"k": SLOTS, "v": SLOTS, "cu_seqlens_k": None, "seqused_k": int32(7, 0), "max_seqlen_k": 7}
    return attention(**{**cached, **changed})


def column(**changed: Any) -> Any:
    return ops.column_scores(**{**PACKED, **changed})


def last_query(**changed: Any) -> Any:
    arguments = {name: PACKED[name] for name in ("q", "k", "cu_seqlens_q", "cu_seqlens_k")}
    return ops.last_query_scores(**{**arguments, **changed})


def decode(**changed: Any) -> Any:
    arguments = {"q": INPUTS.q[:2], "k_cache": SLOTS, "v_cache": SLOTS, "seqused_k": int32(7, 0)}
    return ops.decode_attention(**{**arguments, **changed})


def positions(**changed: Any) -> Any:
    arguments = {
        "position_ids_q": torch.arange(9),
        "position_ids_k": torch.arange(9),
        "cu_seqlens_q": CU,
        "cu_seqlens_k": CU,
    }
    return ops.kv_limit_from_positions(**{**arguments, **changed})


POINTS = torch.zeros(9, 3)


def cluster(**changed: Any) -> Any:
    return ops.dpc_knn(**{"x": POINTS, "cu_seqlens": CU, "num_clusters": 2, "k": 3, **changed})


def merge(**changed: Any) -> Any:
    arguments = {"x": POINTS, "cluster_ids": torch.zeros(9).int(), "cu_seqlens": CU, "num_clusters": [1, 1]}
    return ops.merge_mean(**{**arguments, **changed})


def average(**changed: Any) -> Any:
    return ops.position_means(**{"x": POINTS, "cu_seqlens": CU, "num_positions": 2, **changed})


CALLS = (
    topk,
    threshold,
    gather,
    scatter,
    compact,
    scaled,
    router,
    attention,
    policy,
    slots,
    column,
    last_query,
    decode,
    positions,
    cluster,
    merge,
    average,
)

Case = tuple[Callable[..., Any], dict[str, Any], type[Exception], str]
NAN = float("nan")
CASES: list[Case] = [
    # Types and dtypes.
    (topk, {"scores": [1.0]}, TypeError, "scores must be a tensor, got list"),
    (topk, {"scores": torch.arange(9)}, TypeError, "scores must have dtype .*, got torch.int64"),
    (topk, {"cu_seqlens": CU.long()}, TypeError, "cu_seqlens must have dtype int32, got torch.int64"),
    (topk, {"protect": torch.zeros(9)}, TypeError, "protect must have dtype bool, got torch.float32"),
    (topk, {"keep_counts": [True, 1]}, TypeError, "keep_counts must hold ints, got bool"),
    (topk, {"keep_counts": [1.0, 1]}, TypeError, "keep_counts must hold ints, got float"),
    (topk, {"keep_counts": 2}, TypeError, "keep_counts must be a list of ints or an int tensor, got int"),
    (topk, {"keep_counts": torch.ones(2)}, TypeError, "keep_counts must have dtype .*, got torch.float32"),
    (topk, {"capacity": True}, TypeError, "capacity must be an int, got bool"),
    (topk, {"capacity": 2.0}, TypeError, "capacity must be an int, got float"),
    (topk, {"scores": SCORES.to_sparse()}, TypeError, "scores must be a strided tensor, got layout"),
    (threshold, {"threshold": "0.5"}, TypeError, "threshold must be a float, got str"),
    (threshold, {"threshold": True}, TypeError, "threshold must be a float, got bool"),
    (gather, {"x": 3}, TypeError, "x must be a tensor or a list of tensors, got int"),
    (gather, {"x": [SCORES, None]}, TypeError, r"x\[1\] must be a tensor, got NoneType"),
    (gather, {"indices": INDICES.long()}, TypeError, "indices must have dtype int32, got torch.int64"),
    (scatter, {"total": False}, TypeError, "total must be an int, got bool"),
    (compact, {"tensors": SCORES}, TypeError, "tensors must be a .*list of tensors, got Tensor"),
    (attention, {"q": INPUTS.q.long()}, TypeError, "q must have dtype .*, got torch.int64"),
    (attention, {"k": INPUTS.k.half()}, TypeError, "k must have the dtype of q, torch.float32, got torch.float16"),
    (attention, {"v": INPUTS.v.half()}, TypeError, "v must have the dtype of k, torch.float32, got torch.float16"),
    (attention, {"causal": 1}, TypeError, "causal must be a bool, got int"),
    (attention, {"max_seqlen_q": True}, TypeError, "max_seqlen_q must be an int, got bool"),
    (attention, {"max_seqlen_q": torch.tensor(5)}, TypeError, "max_seqlen_q must be an int, got Tensor"),
    (attention, {"softmax_scale": "1"}, TypeError, "softmax_scale must be a float, got str"),
    (attention, {"kv_limit": torch.zeros(9)}, TypeError, "kv_limit must have dtype int32, got torch.float32"),
    (attention, {"cu_seqlens_k": None}, TypeError, "cu_seqlens_k must be a tensor, got NoneType"),
    (policy, {"policy": [1.0] * 9}, TypeError, "policy must be a tensor, got list"),
    (policy, {"policy": torch.ones(9).half()}, TypeError, "policy must have dtype float32, got torch.float16"),
    (policy, {"policy": torch.ones(9) > 0}, TypeError, "policy must have dtype float32, got torch.bool"),
    (policy, {"v": INPUTS.v.half()}, TypeError, "v must have the dtype of k, torch.float32, got torch.float16"),
    (policy, {"max_seqlen": 5.0}, TypeError, "max_seqlen must be an int, got float"),
    (policy, {"epsilon": None}, TypeError, "epsilon must be a float, got NoneType"),
    (column, {"softmax_lse": torch.zeros(4, 9).half()}, TypeError, "softmax_lse must have dtype float32"),
    (last_query, {"head_reduce": 1}, TypeError, "head_reduce must be a str, got int"),
    (decode, {"num_splits": None}, TypeError, "num_splits must be an int, got NoneType"),
    (positions, {"position_ids_q": torch.zeros(9)}, TypeError, "position_ids_q must have dtype int32 or int64"),
    (positions, {"position_ids_k": torch.zeros(9).int()}, TypeError, "must have the dtype of position_ids_q"),
    (cluster, {"x": POINTS.long()}, TypeError, "x must have dtype .*, got torch.int64"),
    (cluster, {"k": 3.0}, TypeError, "k must be an int, got float"),
    (cluster, {"k": True}, TypeError, "k must be an int, got bool"),
    (cluster, {"num_clusters": True}, TypeError, "num_clusters must be a list of ints or an int tensor, got bool"),
    (cluster, {"num_clusters": 2.0}, TypeError, "num_clusters must be a list of ints or an int tensor, got float"),
    (cluster, {"num_clusters": [1, 0.5]}, TypeError, "num_clusters must hold ints, got float"),
    (cluster, {"noise": torch.zeros(9).half()}, TypeError, "noise must have dtype float32, got torch.float16"),
    (cluster, {"noise": 0.5}, TypeError, "noise must be a tensor, got float"),
    (cluster, {"max_seqlen": "5"}, TypeError, "max_seqlen must be an int, got str"),
    (merge, {"cluster_ids": torch.zeros(9).long()}, TypeError, "cluster_ids must have dtype int32, got torch.int64"),
    (merge, {"weights": torch.zeros(9).double()}, TypeError, "weights must have dtype float32, got torch.float64"),
    (merge, {"capacity": 1.0}, TypeError, "capacity must be an int, got float"),
    (scaled, {"x": ROWS.long()}, TypeError, "x must have dtype .*, got torch.int64"),
    (
        scaled,
        {"branch": ROWS[:2].half()},
        TypeError,
        "branch must have the dtype of x, torch.float32, got torch.float16",
    ),
    (scaled, {"weights": SCORES.double()}, TypeError, "weights must have dtype float32, got torch.float64"),
    (scaled, {"indices": INDICES.long()}, TypeError, "indices must have dtype int32, got torch.int64"),
    (
        router,
        {"weight": ROWS[0].half()},
        TypeError,
        "weight must have the dtype of x, torch.float32, got torch.float16",
    ),
    (router, {"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
    (router, {"target": SCORES}, TypeError, "target must have dtype bool, got torch.float32"),
    (router, {"activation": None}, TypeError, "activation must be a str, got NoneType"),
    (router, {"scale": "1"}, TypeError, "scale must be a float, got str"),
    (average, {"x": POINTS.int()}, TypeError, "x must have dtype .*, got torch.int32"),
    (average, {"cu_seqlens": CU.long()}, TypeError, "cu_seqlens must have dtype int32, got torch.int64"),
    (average, {"num_positions": [1, 2.0]}, TypeError, "num_positions must hold ints, got float"),
    (average, {"capacity": True}, TypeError, "capacity must be an int, got bool"),
    # Shapes and devices.
    (topk, {"scores": SCORES[None]}, ValueError, r"scores must have 1 dimension, got shape \(1, 9\)"),
    (topk, {"protect": torch.zeros(8).bool()}, ValueError, r"protect must have 9 rows, got shape \(8,\)"),
    (topk, {"cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens must have at least one entry, got shape \(0,\)"),
    (topk, {"cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens must be on cpu, .* got meta"),
    (topk, {"keep_counts": [1]}, ValueError, "keep_counts must have 2 entries, one a segment, got 1"),
    (topk, {"keep_counts": int32(1, 1).to("meta")}, ValueError, "keep_counts must be on the CPU or cpu, got meta"),
    (gather, {"x": [SCORES, SCORES[:3]]}, ValueError, r"x\[1\] must have 9 rows like x\[0\], got \(3,\)"),
    (gather, {"x": torch.tensor(1.0)}, ValueError, r"x\[0\] must have at least one dimension"),
    (scatter, {"indices": int32(1, 2, 3)}, ValueError, "indices must have 2 entries, one a row, got 3"),
    (compact, {"tensors": [SCORES[:3]]}, ValueError, r"tensors\[0\] must have 9 rows, got shape \(3,\)"),
    (attention, {"q": INPUTS.q[0]}, ValueError, r"q must have 3 dimensions, got shape \(4, 8\)"),
    (attention, {"q": INPUTS.q[:, :3]}, ValueError, "q must have a multiple of the heads of k, 2, .* got 3"),
    (attention, {"k": INPUTS.k[..., :4]}, ValueError, "k must have the head_dim of q, 8, got 4"),
    (attention, {"v": INPUTS.v[:8]}, ValueError, r"v must have the shape of k, \(9, 2, 8\), got \(8, 2, 8\)"),
    (attention, {"q": torch.zeros(9, 2, 257)}, ValueError, "q must have a head_dim between 1 and 256, got 257"),
    (attention, {"cu_seqlens_k": int32(0, 9)}, ValueError, "cu_seqlens_k must have 3 entries for 2 segments"),
    (attention, {"kv_limit": int32(1, 2)}, ValueError, r"kv_limit must have 9 rows, got shape \(2,\)"),
    (policy, {"policy": torch.ones(8)}, ValueError, r"policy must have 9 rows, got shape \(8,\)"),
    (policy, {"policy": torch.ones(9, 1)}, ValueError, r"policy must have 1 dimension, got shape \(9, 1\)"),
    (policy, {"k": INPUTS.k[:8]}, ValueError, r"k must have 9 rows, those of q, got shape \(8, 2, 8\)"),
    (policy, {"v": INPUTS.v[:, :1]}, ValueError, r"v must have the shape of k, \(9, 2, 8\), got \(9, 1, 8\)"),
    (slots, {"cu_seqlens_k": CU}, ValueError, "cu_seqlens_k must be None with seqused_k, got both"),
    (slots, {"k": SLOTS[:1], "v": SLOTS[:1]}, ValueError, "k must have 2 rows of cache slots"),
    (slots, {"seqused_k": int32(7)}, ValueError, r"seqused_k must have 2 rows, got shape \(1,\)"),
    (column, {"softmax_lse": torch.zeros(4, 8)}, ValueError, r"softmax_lse must have shape \(4, 9\), got \(4, 8\)"),
    (decode, {"q": INPUTS.q[:3]}, ValueError, "q must have 2 rows, one a row of k_cache"),
    (cluster, {"x": POINTS[0]}, ValueError, r"x must have 2 dimensions, got shape \(3,\)"),
    (cluster, {"num_clusters": [1]}, ValueError, "num_clusters must have 2 entries, one a segment, got 1"),
    (cluster, {"num_clusters": int32(1, 1).to("meta")}, ValueError, "num_clusters must be on the CPU or cpu, got meta"),
    (cluster, {"noise": torch.zeros(8)}, ValueError, r"noise must have 9 rows, got shape \(8,\)"),
    (merge, {"cluster_ids": int32(0, 1)}, ValueError, r"cluster_ids must have 9 rows, got shape \(2,\)"),
    (merge, {"weights": torch.ones(9, 1)}, ValueError, r"weights must have 1 dimension, got shape \(9, 1\)"),
    (merge, {"num_clusters": int32(1)}, ValueError, r"num_clusters must have 2 rows, got shape \(1,\)"),
    (scaled, {"x": SCORES}, ValueError, r"x must have 2 dimensions, got shape \(9,\)"),
    (scaled, {"residual": ROWS[:3]}, ValueError, r"residual must have 2 rows, got shape \(3, 4\)"),
    (scaled, {"branch": ROWS[:2, :3]}, ValueError, r"branch must have the 4 columns of x, got shape \(2, 3\)"),
    (scaled, {"weights": SCORES[:8]}, ValueError, r"weights must have 9 rows, got shape \(8,\)"),
    (scaled, {"weights": SCORES.to("meta")}, ValueError, "weights must be on cpu, .* got meta"),
    (router, {"weight": ROWS[:1]}, ValueError, r"weight must have 1 dimension, got shape \(1, 4\)"),
    (router, {"weight": SCORES}, ValueError, r"weight must have shape \(4,\), got \(9,\)"),
    (router, {"bias": SCORES}, ValueError, r"bias must have shape \(1,\), got \(9,\)"),
    (router, {"target": SCORES[:8] > 3}, ValueError, r"target must have 9 rows, got shape \(8,\)"),
    # Values.
    (cluster, {"cu_seqlens": int32(0, 5, 4)}, ValueError, "cu_seqlens must not decrease, got 5 then 4 at entry 2"),
    (cluster, {"k": 0}, ValueError, "k must be between 1 and 2147483647, got 0"),
    (cluster, {"num_clusters": 2**31}, ValueError, "num_clusters must hold 32-bit ints, got 2147483648"),
    (cluster, {"max_seqlen": 4}, ValueError, "max_seqlen must be at least 5, .* of cu_seqlens, got 4"),
    (cluster, {"capacity": -1}, ValueError, "capacity must be between 0 and 2147483647, got -1"),
    (merge, {"num_clusters": 2**31 - 1}, ValueError, "the sum of num_clusters must be .*, got 4294967294"),
    (average, {"x": torch.zeros(9)}, ValueError, r"x must have 2 dimensions, got shape \(9,\)"),
    (average, {"num_positions": [1]}, ValueError, "num_positions must have 2 entries, one a segment, got 1"),
    (average, {"num_positions": 2**31 - 1}, ValueError, "the sum of num_positions must be .*, got 4294967294"),
    (average, {"capacity": -1}, ValueError, "capacity must be between 0 and .*, got -1"),
    (merge, {"weights": -torch.ones(9)}, ValueError, "weights must not be negative or NaN, got -1.0"),
    (merge, {"weights": torch.full((9,), NAN)}, ValueError, "weights must not be negative or NaN, got nan"),
    (topk, {"cu_seqlens": int32(1, 4, 9)}, ValueError, "cu_seqlens must start at 0, got 1"),
    (topk, {"cu_seqlens": int32(0, 5, 4)}, ValueError, "cu_seqlens must not decrease, got 5 then 4 at entry 2"),
    (topk, {"cu_seqlens": int32(0, 4, 10)}, ValueError, "cu_seqlens must not end past the 9 rows .* got 10"),
    (topk, {"keep_counts": [5, 0]}, ValueError, r"keep_counts\[0\] must not be above 4, .* got 5"),
    (topk, {"keep_counts": [0, -1]}, ValueError, r"keep_counts\[1\] must not be negative, got -1"),
    (
        threshold,
        {"min_keep": torch.tensor([0, 2**40])},
        ValueError,
        "min_keep must hold 32-bit ints, got 1099511627776",
    ),
    (topk, {"keep_counts": [0, 2**40]}, ValueError, "keep_counts must hold 32-bit ints, got 1099511627776"),
    (topk, {"capacity": -1}, ValueError, "capacity must be between 0 and 2147483647, got -1"),
    (topk, {"protected_counts": [0, 0]}, ValueError, "protected_counts must come with protect, got protect=None"),
    (threshold, {"threshold": NAN}, ValueError, "threshold must be a number, got nan"),
    (threshold, {"capacity": -1}, ValueError, "capacity must be between 0 and 2147483647, got -1"),
    (gather, {"indices": int32(-2)}, ValueError, "indices must lie between -1 and 8, got -2"),
    (gather, {"indices": int32(9)}, ValueError, "indices must lie between -1 and 8, got 9"),
    (scatter, {"indices": int32(3, 9)}, ValueError, "indices must lie between -1 and 8, got 9"),
    (scatter, {"indices": int32(3, 3)}, ValueError, "indices must not hold a row twice, got 3 2 times"),
    (scatter, {"total": -1}, ValueError, "total must be between 0 and 2147483647, got -1"),
    (scaled, {"indices": int32(3, 9)}, ValueError, "indices must lie between -1 and 8, got 9"),
    (scaled, {"indices": int32(3, 3)}, ValueError, "indices must not hold a row twice, got 3 2 times"),
    (router, {"activation": "relu"}, ValueError, "activation must be one of tanh, sigmoid, none, got 'relu'"),
    (router, {"scale": float("inf")}, ValueError, "scale must be finite in float32, got inf"),
    (router, {"shift": NAN}, ValueError, "shift must be a number, got nan"),
    (attention, {"max_seqlen_q": 4}, ValueError, "max_seqlen_q must be at least 5, .* of cu_seqlens_q, got 4"),
    (attention, {"max_seqlen_k": 4}, ValueError, "max_seqlen_k must be at least 5, .* of cu_seqlens_k, got 4"),
    (attention, {"softmax_scale": NAN}, ValueError, "softmax_scale must be a number, got nan"),
    (attention, {"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite in float32, got inf"),
    (policy, {"cu_seqlens": int32(0, 4, 10)}, ValueError, "cu_seqlens must not end past the 9 rows .* got 10"),
    (policy, {"max_seqlen": 4}, ValueError, "max_seqlen must be at least 5, .* of cu_seqlens, got 4"),
    (policy, {"softmax_scale": NAN}, ValueError, "softmax_scale must be a number, got nan"),
    (policy, {"epsilon": -1e-9}, ValueError, "epsilon must be finite in float32 and not negative, got -1e-09"),
    (policy, {"epsilon": 1e39}, ValueError, "epsilon must be finite in float32 and not negative, got 1e"),
    (policy, {"epsilon": NAN}, ValueError, "epsilon must be a number, got nan"),
    (slots, {"seqused_k": int32(8, 0)}, ValueError, "seqused_k must lie between 0 and the capacity 7, got 8"),
    (slots, {"max_seqlen_k": 6}, ValueError, "max_seqlen_k must be at least 7, .* got 6"),
    (decode, {"seqused_k": int32(0, -1)}, ValueError, "seqused_k must lie between 0 and the capacity 7, got -1"),
    (decode, {"num_splits": -1}, ValueError, "num_splits must be between 0 and 2147483647, got -1"),
    (last_query, {"head_reduce": "median"}, ValueError, "head_reduce must be one of mean, sum, max, got 'median'"),
    (column, {"query_reduce": ""}, ValueError, "query_reduce must be one of mean, sum, max, got ''"),
    (positions, {"position_ids_k": torch.arange(9).flip(0)}, ValueError, "position_ids_k must be ascending"),
]


@pytest.mark.parametrize("call", CALLS)
def test_the_unchanged_call_is_accepted(call, native_calls):
    call()


@pytest.mark.parametrize(
    ("call", "changed", "error", "message"), CASES, ids=[f"{c[0].__name__}-{'-'.join(c[1])}" for c in CASES]
)
def test_message_names_argument_value_and_expectation(call, changed, error, message):
    with pytest.raises(error, match=message):
        call(**changed)


def test_counts_on_a_device_need_a_capacity_and_protected_counts_from_the_host():
    """Meta tensors stand for a device: their values cannot be read."""
    scores, cu_seqlens, counts = SCORES.to("meta"), CU.to("meta"), int32(1, 1).to("meta")
    protect = torch.zeros(9, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="capacity must be given when keep_counts is on a device, got None"):
        ops.segment_topk(scores, cu_seqlens, counts)
    assert ops.segment_topk(scores, cu_seqlens, counts, capacity=4)[0].shape == (4,)
    with pytest.raises(ValueError, match="protected_counts must be given when protect is on a device"):
        ops.segment_topk(scores, cu_seqlens, [1, 1], protect=protect)
    indices, _ = ops.segment_topk(scores, cu_seqlens, [1, 1], protect=protect, protected_counts=[2, 0])
    assert indices.shape == (4,)
    with pytest.raises(ValueError, match="keep_counts must not keep more than the 9 rows there are, got 10"):
        ops.segment_topk(scores, cu_seqlens, [5, 5])
    assert ops.segment_threshold(scores, cu_seqlens, 0.5)[0].shape == (9,)


def test_cluster_counts_on_a_device_need_a_capacity():
    x, cu_seqlens, ids = POINTS.to("meta"), CU.to("meta"), torch.zeros(9, device="meta", dtype=torch.int32)
    counts = int32(2, 0).to("meta")
    with pytest.raises(ValueError, match="capacity must be given when num_clusters is on a device, got None"):
        ops.dpc_knn(x, cu_seqlens, counts, k=3)
    with pytest.raises(ValueError, match="capacity must be given when num_clusters is on a device, got None"):
        ops.merge_mean(x, ids, cu_seqlens, counts)
    with pytest.raises(ValueError, match="capacity must be given when num_positions is on a device, got None"):
        ops.position_means(x, cu_seqlens, counts)
    assert ops.position_means(x, cu_seqlens, counts, capacity=7)[1].shape == (7,)
    assert ops.position_means(x, cu_seqlens, [2, 0])[1].shape == (2,)
    assert ops.dpc_knn(x, cu_seqlens, counts, k=3, capacity=7).center_indices.shape == (7,)
    assert ops.merge_mean(x, ids, cu_seqlens, counts, capacity=7)[0].shape == (7, 3)
    # Counts on the host are enough: a segment of unknown length has at least one cluster.
    assert ops.dpc_knn(x, cu_seqlens, [2, 0], k=3).center_indices.shape == (3,)
    assert ops.merge_mean(x, ids, cu_seqlens, [2, 0])[0].shape == (2, 3)


def test_values_on_a_device_are_not_read():
    """Boundaries, indices and lengths that no host knows are accepted as they are."""
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in PACKED.items()}
    ops.varlen_attention(**meta, v=INPUTS.v.to("meta"))
    rows = (x.to("meta") for x in (INPUTS.q, INPUTS.k, INPUTS.v, SCORES, CU))
    assert ops.policy_attention(*rows, 1).shape == INPUTS.q.shape
    ops.gather_rows(SCORES.to("meta"), INDICES.to("meta"))
    ops.scatter_rows(SCORES[:2].to("meta"), INDICES.to("meta"), 9)
    ops.scatter_scaled(*(x.to("meta") for x in (ROWS, ROWS[:2], ROWS[:2], SCORES, INDICES)))
