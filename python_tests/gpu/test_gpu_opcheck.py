"""Every op passes torch.library.opcheck on a GPU: schema, autograd, fake kernel and tracing agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, first_rehearsed, forced_op, on_device
from torch import Tensor
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map_only

from pruneops import backends
from pruneops.testing import attention_inputs, cu_seqlens_of

pytestmark = pytest.mark.gpu


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def selection() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(9), cu_seqlens_of([4, 0, 5]), torch.arange(9) % 4 == 0


def topk() -> tuple[Any, ...]:
    scores, cu_seqlens, protect = selection()
    return scores, cu_seqlens, int32(2, 0, 1), 7, protect


def threshold() -> tuple[Any, ...]:
    scores, cu_seqlens, protect = selection()
    return scores, cu_seqlens, 0.2, 7, int32(1, 0, 2), protect


def rows(count: int = 9) -> list[Tensor]:
    return [torch.randn(count, 3), torch.arange(count), torch.randn(count, 2, 2).bfloat16()]


def compact() -> tuple[Any, ...]:
    scores, cu_seqlens, protect = selection()
    return scores, rows(), cu_seqlens, int32(2, 0, 1), 7, protect


def policy() -> tuple[Any, ...]:
    inputs = attention_inputs((5, 0, 7), head_dim=8)
    return inputs.q, inputs.k, inputs.v, torch.rand(12), inputs.cu_seqlens_q, 7, 0.3, 1e-6


def varlen() -> tuple[Any, ...]:
    inputs = attention_inputs((5, 0, 7), (6, 2, 7), head_dim=64, dtype=torch.bfloat16)
    return *inputs.args, False, 0.3, torch.randint(0, 7, (12,), dtype=torch.int32)


def decode() -> tuple[Any, ...]:
    k, v = torch.randn(2, 3, 9, 2, 8)
    return torch.randn(3, 4, 8), k, v, int32(9, 0, 4), 0.3, 0, True


def last_query() -> tuple[Any, ...]:
    inputs = attention_inputs((5, 0, 7), (6, 2, 7), head_dim=8, dtype=torch.bfloat16)
    limit = torch.randint(0, 7, (12,), dtype=torch.int32)
    return inputs.q, inputs.k, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 0.3, "mean", "max", limit


def column() -> tuple[Any, ...]:
    inputs = attention_inputs((5, 0, 7), (6, 2, 7), head_dim=8)
    return inputs.q, inputs.k, *inputs.boundaries, True, 0.3, "sum", "mean", torch.randn(4, 12)


def positions() -> tuple[Any, ...]:
    return torch.arange(9), torch.arange(9), cu_seqlens_of([4, 0, 5]), cu_seqlens_of([4, 0, 5])


def peaks() -> tuple[Any, ...]:
    return torch.randn(9, 6), cu_seqlens_of([4, 0, 5]), int32(2, 1, 9), 3, 5, 8, torch.rand(9)


def means() -> tuple[Any, ...]:
    return torch.randn(9, 6), torch.arange(9).int() % 4, cu_seqlens_of([4, 0, 5]), int32(2, 1, 3), 7, torch.rand(9)


def scaled() -> tuple[Any, ...]:
    return torch.randn(9, 5), torch.randn(4, 5), torch.randn(4, 5), torch.rand(9), int32(7, -1, 0, 3)


def router() -> tuple[Any, ...]:
    return torch.randn(9, 5), torch.randn(5), torch.randn(1), torch.arange(9) % 3 > 0, "tanh", 0.2, 1.0


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "segment_topk": topk,
    "segment_threshold": threshold,
    "gather_rows": lambda: (rows(), int32(3, -1, 0)),
    "scatter_rows": lambda: (rows(), int32(3, -1, 0, 5, 6, 7, 8, 9, 11), 12),
    "select_compact": compact,
    "scatter_scaled": scaled,
    "router_weights": router,
    "varlen_attention": varlen,
    "policy_attention": policy,
    "decode_attention": decode,
    "last_query_scores": last_query,
    "column_scores": column,
    "kv_limit_from_positions": positions,
    "dpc_knn": peaks,
    "merge_mean": means,
    "position_means": lambda: (torch.randn(9, 6), cu_seqlens_of([4, 0, 5]), int32(2, -1, 2), 7),
}
DIFFERENTIABLE = ("gather_rows", "scatter_rows", "select_compact", "merge_mean", "position_means")
DIFFERENTIABLE += ("scatter_scaled", "router_weights", "varlen_attention", "policy_attention")


def needing_grad(args: Any) -> Any:
    def mark(x: Tensor) -> Tensor:
        return x.requires_grad_() if x.dim() > 1 and x.is_floating_point() else x

    return tree_map_only(Tensor, mark, args)


def check(op: str, args: Any) -> None:
    assert set(opcheck(forced_op(op), args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", first_rehearsed(CASES))
def test_opcheck(op, backend):
    check(op, on_device(CASES[op]()))


@pytest.mark.parametrize("op", first_rehearsed(DIFFERENTIABLE))
def test_opcheck_with_gradients(op, backend):
    check(op, needing_grad(on_device(CASES[op]())))


def test_every_op_is_checked():
    assert set(CASES) == set(backends.OPS)


def compare_with_fake(op: str, args: Any) -> None:
    function = forced_op(op)
    real = tree_leaves(function(*args))
    meta = tree_leaves(function(*tree_map_only(Tensor, lambda x: x.to("meta"), args)))
    for a, b in zip(real, meta, strict=True):
        assert a.device.type == DEVICE.type
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("op", first_rehearsed(CASES))
def test_fake_tensors_have_the_shape_dtype_and_strides_of_real_ones(op, backend):
    compare_with_fake(op, on_device(CASES[op]()))
