"""Malformed calls of the registered ops, past the front-ends and their checks: an exception or a sound result."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.malformed_calls import CALLS, FUZZ, broken, examples, limits, malformed_call, packed, policy_call

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]


def raw_arguments(op: str, args: list[Any], options: dict[str, Any]) -> list[Any]:
    """The arguments of a front-end call in the order of the op's schema."""
    options = dict(options)
    if options.get("softmax_scale") is None:
        options["softmax_scale"] = 0.25
    if op == "segment_threshold":
        options["capacity"] = -1 if options["capacity"] is None else options["capacity"]
    elif "capacity" in options:
        options["capacity"] = 6 if options["capacity"] is None else options["capacity"]
    if op == "dpc_knn":
        options["max_seqlen"] = 20 if options["max_seqlen"] is None else options["max_seqlen"]
    if op in ("dpc_knn", "merge_mean", "position_means"):
        counts = args.pop()
        if type(counts) is int and isinstance(args[1], Tensor):  # an int holds for every segment
            counts = [counts] * max(args[1].numel() - 1, 0)
        if isinstance(counts, list) and all(type(count) is int for count in counts):
            counts = torch.tensor([min(max(count, -9), 9) for count in counts], dtype=torch.int32)
        args = [*args, counts]
    names = {
        "segment_topk": ("capacity", "protect"),
        "segment_threshold": ("capacity", "min_keep", "protect"),
        "select_compact": ("capacity", "protect"),
        "dpc_knn": ("k", "max_seqlen", "capacity", "noise"),
        "merge_mean": ("capacity", "weights"),
        "position_means": ("capacity",),
        "router_weights": ("target", "activation", "scale", "shift"),
        "varlen_attention": ("causal", "softmax_scale", "kv_limit", "seqused_k"),
        "policy_attention": ("softmax_scale", "epsilon"),
        "decode_attention": ("softmax_scale", "num_splits", "return_scores"),
        "last_query_scores": ("softmax_scale", "head_reduce", "query_reduce", "kv_limit"),
        "column_scores": ("causal", "softmax_scale", "query_reduce", "head_reduce", "softmax_lse"),
    }
    return [*args, *(options[name] for name in names.get(op, ()))]


def check_selection(indices: Tensor, cu_seqlens: Tensor, total: int) -> None:
    """What holds for a selection from any boundaries, counts and capacity."""
    if indices.is_meta or cu_seqlens.is_meta:
        return
    ends, rows = cu_seqlens.tolist(), indices.tolist()
    assert ends == sorted(ends) and ends[0] == 0 and ends[-1] <= len(rows)
    kept = rows[: ends[-1]]
    assert kept == sorted(set(kept)) and all(0 <= row < total for row in kept)
    assert all(row == -1 for row in rows[ends[-1] :])


def check_clusters(ids: Tensor, centers: Tensor, cu_clusters: Tensor, *_: Tensor) -> None:
    """What holds for a clustering from any boundaries, counts and capacity."""
    if ids.is_meta or centers.is_meta or cu_clusters.is_meta:
        return
    ends, rows = cu_clusters.tolist(), centers.tolist()
    assert ends == sorted(ends) and ends[0] == 0 and ends[-1] <= len(rows)
    kept = rows[: ends[-1]]
    assert len(set(kept)) == len(kept) and all(0 <= row < len(ids) for row in kept)
    assert all(row == -1 for row in rows[ends[-1] :])
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        assert ids[kept[first:last]].tolist() == list(range(last - first))


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
@pytest.mark.parametrize("op", CALLS)
def test_raw_ops_never_crash(op):
    @FUZZ
    @examples
    def fuzz(seed: int, breaks: int) -> None:
        args = raw_arguments(op, *malformed_call(op, seed, breaks))
        try:
            result = getattr(torch.ops.pruneops, op)(*args)
        except (ValueError, TypeError, RuntimeError) as error:
            assert str(error)
            return
        packed_keys = op == "policy_attention" or op == "varlen_attention" and args[10] is None
        if op in ("segment_topk", "segment_threshold"):
            check_selection(*result, args[0].shape[0])
        elif op == "select_compact":
            check_selection(*result[1:], args[0].shape[0])
        elif op == "dpc_knn":
            check_clusters(*result)
        elif packed_keys or op in ("merge_mean", "position_means"):
            total = result[0].float().sum()
            if total.requires_grad:
                total.backward()
        elif op == "scatter_scaled" and result.requires_grad:
            result.float().sum().backward()
        elif op == "router_weights" and result[1].requires_grad:
            result[1].sum().backward()

    fuzz()


def test_raw_attention_backward_never_crashes():
    @FUZZ
    @examples
    def fuzz(seed: int, breaks: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        q, k, v, boundaries = packed(rng)
        out, lse = torch.ops.pruneops.varlen_attention(q, k, v, *boundaries, True, 0.3)
        dlse = rng.choice((None, torch.randn_like(lse)))
        args = [torch.randn_like(out), dlse, q, k, v, out, lse, *boundaries, True, 0.3, limits(rng, q.shape[0])]
        for _ in range(breaks):
            place = rng.randrange(len(args))
            args[place] = broken(args[place], rng)
        try:
            result = torch.ops.pruneops.varlen_attention_backward(*args)
        except (ValueError, TypeError, RuntimeError) as error:
            assert str(error)
            return
        for grad, x in zip(result, args[2:5], strict=True):
            assert grad.shape == x.shape and grad.dtype == x.dtype

    fuzz()


@pytest.mark.parametrize("op", ["scatter_scaled", "router_weights", "policy_attention"])
def test_raw_backward_of_other_ops_never_crashes(op):
    @FUZZ
    @examples
    def fuzz(seed: int, breaks: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        if op == "policy_attention":
            (q, k, v, policy, *boundaries), _ = policy_call(rng)
            forward = torch.ops.pruneops.policy_attention(q, k, v, policy, *boundaries, 0.3, 1e-6)
            args = [torch.randn_like(q), q, k, v, policy, *forward, *boundaries, 0.3, 1e-6]
            shapes = (1, 2, 3, 4)
        elif op == "scatter_scaled":
            x, _, branch, weights, indices = raw_arguments(op, *CALLS[op](rng))
            args, shapes = [torch.randn_like(x), x, branch, weights, indices], (1, 2, 2, 3)
        else:
            x, weight, _, target, activation, scale, _ = raw_arguments(op, *CALLS[op](rng))
            upstream, logits = torch.randn(2, x.shape[0])
            args, shapes = [upstream, logits, x, weight, target, activation, scale], (2, 3)
        for _ in range(breaks):
            place = rng.randrange(len(args))
            args[place] = broken(args[place], rng)
        try:
            result = getattr(torch.ops.pruneops, f"{op}_backward")(*args)
        except (ValueError, TypeError, RuntimeError) as error:
            assert str(error)
            return
        for grad, i in zip(result, shapes, strict=False):
            assert grad.shape == args[i].shape and grad.dtype == args[i].dtype

    fuzz()
