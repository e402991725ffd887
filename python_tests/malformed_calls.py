"""Well-formed calls of every op, and ways to break their arguments.

``PRUNEOPS_FUZZ_EXAMPLES`` sets the number of examples per op (and then draws new ones every time).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruneops import reference
from pruneops._triton_library import interpreting
from pruneops.testing import cu_seqlens_of

_requested = os.environ.get("PRUNEOPS_FUZZ_EXAMPLES")
FUZZ = settings(
    max_examples=int(_requested or (100 if interpreting else 1000)),
    derandomize=_requested is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)
# Nothing between "fits" and "can never be allocated": such a size would really be allocated.
INTS = (-(2**63), -(2**31) - 1, -(2**31), -2, -1, 0, 1, 2, 5, 40, 2**40, 2**62, 2**63 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"))
WRONG_TYPES = (None, True, 3, 2.5, "mean", b"x", [1, 2], (), {}, object(), 1j, torch.float32)


# Well-formed calls, as (positional arguments, keyword arguments) of the front-ends.


def random_lengths(rng: random.Random) -> list[int]:
    return [rng.choice((0, 1, 2, 3, 7, 20)) for _ in range(rng.randint(0, 4))]


def float_dtype(rng: random.Random) -> torch.dtype:
    return rng.choice(DTYPES[:3])


def selection_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    lengths = random_lengths(rng)
    total = sum(lengths) + rng.choice((0, 2))
    scores = torch.randn(total).round().to(float_dtype(rng))
    protect = torch.rand(total) < 0.3 if rng.random() < 0.5 else None
    return [scores, cu_seqlens_of(lengths)], {"protect": protect}


def topk_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    args, options = selection_call(rng)
    counts = torch.tensor([rng.randint(0, 3) for _ in args[1][1:]], dtype=torch.int32)
    exact = rng.random() < 0.3
    if exact:
        options["protect"], counts = None, torch.zeros_like(counts)
    elif rng.random() < 0.3:
        counts = counts.tolist()
    return [*args, counts], {**options, "capacity": None if exact else rng.randint(0, 9)}


def threshold_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    args, options = selection_call(rng)
    least = torch.tensor([rng.randint(0, 3) for _ in args[1][1:]], dtype=torch.int32)
    capacity = rng.choice((None, 0, 4, 30))
    return [*args, rng.choice((0.0, 0.5))], {**options, "capacity": capacity, "min_keep": least}


def rows_of(rng: random.Random, count: int) -> list[Tensor]:
    shapes = ((), (3,), (2, 2), (0,), (17,))
    made = [torch.randn(count, *rng.choice(shapes)) for _ in range(rng.randint(1, 3))]
    return [x.to(rng.choice(DTYPES[:8])) for x in made]


def gather_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    count = rng.choice((0, 1, 5, 9))
    indices = torch.tensor([rng.randint(-1, count - 1) for _ in range(rng.randint(0, 6))], dtype=torch.int32)
    return [rows_of(rng, count), indices], {}


def scatter_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    total = rng.choice((0, 1, 5, 9))
    indices = torch.randperm(total)[: rng.randint(0, total)].to(torch.int32)
    return [rows_of(rng, len(indices)), indices, total], {}


def compact_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    (scores, cu_seqlens, counts), options = topk_call(rng)
    return [scores, rows_of(rng, scores.shape[0]), cu_seqlens, counts], options


def scaled_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    total, columns, dtype = rng.choice((0, 1, 5, 9)), rng.choice((0, 1, 5, 16, 40)), float_dtype(rng)
    kept = rng.randint(0, total)
    indices = torch.cat([torch.randperm(total)[:kept], torch.full((rng.choice((0, 2)),), -1)]).to(torch.int32)
    x, residual, branch = (torch.randn(n, columns).to(dtype) for n in (total, len(indices), len(indices)))
    return [x, residual, branch, torch.rand(total), indices], {}


def router_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    total, columns, dtype = rng.choice((0, 1, 5, 40)), rng.choice((0, 1, 5, 16, 40)), float_dtype(rng)
    bias = torch.randn(1).to(dtype) if rng.random() < 0.5 else None
    target = torch.rand(total) < 0.6 if rng.random() < 0.5 else None
    options = {"target": target, "activation": rng.choice(("tanh", "sigmoid", "none")), "scale": 0.2, "shift": 1.0}
    return [torch.randn(total, columns).to(dtype), torch.randn(columns).to(dtype), bias], options


def packed(rng: random.Random) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    lengths = random_lengths(rng)
    lengths_k = [n + rng.choice((0, 0, 5)) for n in lengths]
    heads_k, head_dim, dtype = rng.choice((1, 2)), rng.choice((1, 5, 16, 40)), float_dtype(rng)
    q = torch.randn(sum(lengths) + rng.choice((0, 2)), heads_k * rng.choice((1, 2, 3)), head_dim).to(dtype)
    k, v = torch.randn(2, sum(lengths_k) + rng.choice((0, 2)), heads_k, head_dim).to(dtype)
    boundaries = [cu_seqlens_of(lengths), cu_seqlens_of(lengths_k)]
    return q, k, v, [*boundaries, max([0, *lengths]), max([0, *lengths_k])]


def limits(rng: random.Random, rows: int) -> Tensor | None:
    return torch.randint(-2, 30, (rows,), dtype=torch.int32) if rng.random() < 0.5 else None


def attention_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    q, k, v, boundaries = packed(rng)
    options = {
        "causal": rng.random() < 0.5,
        "softmax_scale": rng.choice((None, 0.3)),
        "kv_limit": limits(rng, q.shape[0]),
        "seqused_k": None,
        "return_lse": True,
    }
    if rng.random() < 0.3:
        batch = boundaries[0].numel() - 1
        k, v = torch.randn(2, batch, 9, k.shape[1], k.shape[2]).to(q.dtype)
        options["seqused_k"] = torch.randint(0, 10, (batch,), dtype=torch.int32)
        boundaries[1], boundaries[3] = None, 9
    return [q, k, v, *boundaries], options


def policy_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    q, _, _, (cu_seqlens, _, longest, _) = packed(rng)
    k, v = torch.randn(2, q.shape[0], rng.choice([n for n in (1, 2, 3) if q.shape[1] % n == 0]), q.shape[2]).to(q.dtype)
    policy = torch.rand(q.shape[0]).round() if rng.random() < 0.5 else torch.rand(q.shape[0])
    options = {"softmax_scale": rng.choice((None, 0.3)), "epsilon": rng.choice((0.0, 1e-6, 0.5))}
    return [q, k, v, policy, cu_seqlens, longest], options


def decode_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    batch, capacity, heads_k, head_dim = rng.randint(0, 3), rng.choice((0, 1, 9, 40)), rng.choice((1, 2)), 8
    dtype = float_dtype(rng)
    q = torch.randn(batch, heads_k * rng.choice((1, 2, 3)), head_dim).to(dtype)
    k, v = torch.randn(2, batch, capacity, heads_k, head_dim).to(dtype)
    used = torch.randint(0, capacity + 1, (batch,), dtype=torch.int32)
    options = {"softmax_scale": 0.3, "num_splits": rng.choice((0, 1, 3)), "return_scores": True}
    return [q, k, v, used], options


def last_query_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    q, k, _, boundaries = packed(rng)
    options = {"kv_limit": limits(rng, q.shape[0]), "softmax_scale": None}
    reduce = {"head_reduce": rng.choice(("mean", "max")), "query_reduce": rng.choice(("mean", "sum"))}
    return [q, k, *boundaries[:2]], {**options, **reduce}


def column_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    q, k, v, boundaries = packed(rng)
    causal = rng.random() < 0.5
    lse = reference.varlen_attention(q.float(), k.float(), v.float(), *boundaries, causal=causal, return_lse=True)
    options = {"causal": causal, "softmax_scale": None, "softmax_lse": rng.choice((None, lse[1]))}
    return [q, k, *boundaries], {**options, "query_reduce": "sum", "head_reduce": "mean"}


def positions_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    lengths, dtype = random_lengths(rng), rng.choice((torch.int32, torch.int64))
    positions = torch.cat([torch.zeros(0), *[torch.arange(n) for n in lengths]]).to(dtype)
    return [positions, positions, cu_seqlens_of(lengths), cu_seqlens_of(lengths)], {}


def cluster_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    lengths = random_lengths(rng)
    total = sum(lengths) + rng.choice((0, 2))
    # Whole coordinates have one right answer, ties included.
    x = torch.randint(-2, 3, (total, rng.choice((1, 4, 16)))).to(float_dtype(rng))
    counts = rng.choice((3, [rng.randint(0, 4) for _ in lengths]))
    options = {"k": rng.choice((1, 3, 30)), "noise": None, "max_seqlen": None, "capacity": rng.choice((None, 0, 4, 30))}
    if rng.random() < 0.3:
        options["noise"] = torch.randint(0, 4, (total,)) / 4
    if rng.random() < 0.3:
        options["max_seqlen"] = max([0, *lengths]) + rng.choice((0, 9))
    return [x, cu_seqlens_of(lengths), counts], options


def merge_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    lengths = random_lengths(rng)
    total = sum(lengths) + rng.choice((0, 2))
    x = torch.randn(total, rng.choice((0, 1, 5, 16))).to(float_dtype(rng))
    ids = torch.randint(-1, 5, (total,), dtype=torch.int32)
    counts = [rng.randint(-1, 4) for _ in lengths]
    capacity = rng.choice((None, 0, 4, 30))
    if capacity is not None:  # a broken value of the exact form may ask for any number of rows
        counts = torch.tensor(counts, dtype=torch.int32)
    weights = torch.rand(total) if rng.random() < 0.5 else None
    return [x, ids, cu_seqlens_of(lengths), counts], {"weights": weights, "capacity": capacity}


def average_call(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    lengths = random_lengths(rng)
    x = torch.randn(sum(lengths) + rng.choice((0, 2)), rng.choice((0, 1, 5, 16))).to(float_dtype(rng))
    counts = [rng.randint(-1, 4) for _ in lengths]
    capacity = rng.choice((None, 0, 4, 30))
    if capacity is not None:  # a broken value of the exact form may ask for any number of rows
        counts = torch.tensor(counts, dtype=torch.int32)
    return [x, cu_seqlens_of(lengths), counts], {"capacity": capacity}


CALLS: dict[str, Callable[[random.Random], tuple[list[Any], dict[str, Any]]]] = {
    "segment_topk": topk_call,
    "segment_threshold": threshold_call,
    "gather_rows": gather_call,
    "scatter_rows": scatter_call,
    "select_compact": compact_call,
    "scatter_scaled": scaled_call,
    "router_weights": router_call,
    "varlen_attention": attention_call,
    "policy_attention": policy_call,
    "decode_attention": decode_call,
    "last_query_scores": last_query_call,
    "column_scores": column_call,
    "kv_limit_from_positions": positions_call,
    "dpc_knn": cluster_call,
    "merge_mean": merge_call,
    "position_means": average_call,
}


# Ways to break an argument.


def break_values(x: Tensor, rng: random.Random) -> Tensor:
    x = x.clone()
    if x.numel() == 0 or x.dtype == torch.bool:
        return x
    place = tuple(rng.randrange(size) for size in x.shape)
    if x.is_floating_point() and x.dtype != torch.float8_e4m3fn:
        x[place] = torch.tensor(rng.choice(FLOATS), dtype=torch.float64).to(x.dtype)
    elif not x.is_complex() and not x.is_floating_point():
        info = torch.iinfo(x.dtype)
        x[place] = min(max(rng.choice((*INTS, -3, 3, 100)), info.min), info.max)
    return x


def break_shape(x: Tensor, rng: random.Random) -> Tensor:
    kind = rng.randrange(5)
    if kind == 0:
        return x.unsqueeze(rng.randint(0, x.dim()))
    if x.dim() == 0:
        return x.expand(3)
    dim = rng.randrange(x.dim())
    if kind == 1 and x.shape[dim]:
        return x.select(dim, 0)
    if kind == 2:
        return x.narrow(dim, 0, rng.randint(0, x.shape[dim]))
    if kind == 3:
        return x[..., :0]
    return torch.cat([x, x.narrow(dim, 0, min(1, x.shape[dim]))], dim)


def break_strides(x: Tensor, rng: random.Random) -> Tensor:
    if x.dim() == 0:
        return x
    kind = rng.randrange(4)
    if kind == 0:
        return torch.stack([x, x], dim=-1)[..., 0]
    if kind == 1 and x.dim() > 1:
        return x.transpose(0, -1)
    if kind == 2 and x.shape[0]:
        return x[:1].expand_as(x)
    return x.t() if x.dim() == 2 else x[..., ::2]


def break_kind(x: Tensor, rng: random.Random) -> Any:
    kind = rng.randrange(5)
    if kind == 0:
        return x.to("meta")
    if kind == 1 and x.dtype in DTYPES[:6]:
        return x.to_sparse() if x.dim() else x
    if kind == 2 and (x.is_floating_point() or x.is_complex()):
        return x.detach().requires_grad_()
    if kind == 3:
        return torch.nn.Parameter(x, requires_grad=False)
    return x.numpy() if x.dtype in (torch.float32, torch.int32) and not x.requires_grad else x.tolist()


def broken(value: Any, rng: random.Random) -> Any:
    """One step away from a well-formed argument."""
    if rng.random() < 0.1:
        return rng.choice(WRONG_TYPES)
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
        ways = (break_values, break_values, break_shape, break_strides, break_kind)
        return rng.choice((*ways, lambda x, rng: x.to(rng.choice(DTYPES))))(value, rng)
    if isinstance(value, list) and value:
        value = list(value)
        place = rng.randrange(len(value))
        value[place] = broken(value[place], rng)
        return value if rng.random() < 0.8 else tuple(value)
    if isinstance(value, bool):
        return rng.choice((0, 1, 2, None, "yes"))
    if isinstance(value, int):
        return rng.choice(INTS)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, str):
        return rng.choice(("", "median", "mean\0", "MEAN", "sum", "max"))
    return rng.choice((0, 0.5, "mean", torch.zeros(3), torch.zeros(3, dtype=torch.int32)))


def malformed_call(op: str, seed: int, breaks: int) -> tuple[list[Any], dict[str, Any]]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    args, options = CALLS[op](rng)
    for _ in range(breaks):
        place = rng.choice([*range(len(args)), *options])
        holder: Any = args if isinstance(place, int) else options
        holder[place] = broken(holder[place], rng)
    return args, options


examples = given(seed=st.integers(0, 2**32 - 1), breaks=st.integers(0, 3))
