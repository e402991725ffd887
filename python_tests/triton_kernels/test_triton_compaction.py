"""Rows find their sources by a scan or by a table, move in the widest units, and sums do not depend on luck."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import (
    BACKWARD_FACTOR,
    PEER_ORDERS,
    assert_bitwise_equal,
    assert_within_rounding,
    peer_router,
    random_tensor,
    some_indices,
)
from pruneops.triton import compaction, routing

RAW = torch.ops.pruneops_triton
# Looked through by every program, the most that are, and inverted.
COUNTS = (3, compaction.SCANNED, compaction.SCANNED + 1)


def any_indices(count: int, rows: int) -> Tensor:
    """Some twice, some out of range, as only a device may hold them."""
    beyond = torch.tensor([-2, rows, 2**31 - 1, -(2**31), 1], dtype=torch.int32).repeat(count)[: count // 3]
    indices = torch.cat([beyond, torch.randint(-1, rows, (count - count // 3,), dtype=torch.int32)])
    return indices[torch.randperm(count)]


def last_of_each(indices: Tensor, rows: int) -> Tensor:
    """The same without those that are out of range or come again."""
    last = {index: i for i, index in enumerate(indices.tolist()) if 0 <= index < rows}
    kept = torch.full_like(indices, -1)
    for index, i in last.items():
        kept[i] = index
    return kept


@pytest.mark.parametrize("count", COUNTS)
def test_scatter_takes_the_last_of_equal_indices_and_skips_others(count):
    rows = 200
    indices = any_indices(count, rows)
    moved = [random_tensor((count, 3), torch.float32), torch.arange(count)]
    ours = RAW.scatter_rows(moved, indices, rows)
    assert_bitwise_equal(ours, reference.scatter_rows(moved, last_of_each(indices, rows), rows))


@pytest.mark.parametrize("count", COUNTS)
def test_scatter_scaled_takes_the_last_of_equal_indices_and_drops_others(count):
    rows, columns = 200, 5
    indices = any_indices(count, rows)
    unique = last_of_each(indices, rows)
    x, dout, residual, branch = (torch.randn(n, columns) for n in (rows, rows, count, count))
    weights = torch.rand(rows)
    out = RAW.scatter_scaled(x, residual, branch, weights, indices)
    assert_bitwise_equal(out, RAW.scatter_scaled(x, residual, branch, weights, unique))
    torch.testing.assert_close(out, reference.scatter_scaled(x, residual, branch, weights, unique))
    leaves = [t.clone().requires_grad_() for t in (x, residual, branch, weights)]
    expected = torch.autograd.grad(reference.scatter_scaled(*leaves, unique), leaves, dout)
    # What is not read may hold anything.
    branch[unique < 0] = torch.nan
    x[unique[unique >= 0].long()] = torch.nan
    grads = RAW.scatter_scaled_backward(dout, x, branch, weights, indices)
    torch.testing.assert_close(grads, expected)
    assert not grads[1][unique < 0].any() and not grads[2][unique < 0].any()


@pytest.mark.parametrize("row", [1, 2, 6, 12, 24, 48, 4112])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_rows_of_any_alignment(row, offset):
    """Bytes that begin anywhere, and rows that are further apart than they are long."""
    storage = random_tensor((offset + 9 * (row + 2),), torch.uint8)
    indices = some_indices(9, 7)
    for distance in (row, row + 2):
        x = storage[offset:].as_strided((9, row), (distance, 1))
        dense = x.contiguous()
        assert_bitwise_equal(ops.gather_rows(x, indices), reference.gather_rows(dense, indices))
        assert_bitwise_equal(ops.scatter_rows(x[:7], indices, 9), reference.scatter_rows(dense[:7], indices, 9))


def test_a_list_is_one_launch_for_each_group(monkeypatch):
    launches = []
    move = compaction._move

    def counted(tensors: Sequence[Tensor], *args: object) -> None:
        launches.append(len(tensors))
        move(tensors, *args)

    monkeypatch.setattr(compaction, "_move", counted)
    most = compaction.TENSORS_OF_A_LAUNCH
    tensors = [torch.randn(5, 1 + i) for i in range(most)]
    indices = some_indices(5, 3)
    gathered = ops.gather_rows([*tensors, torch.empty(5, 0)], indices)
    assert_bitwise_equal(gathered[:-1], reference.gather_rows(tensors, indices))
    ops.gather_rows([*tensors, torch.arange(5)], indices)
    ops.gather_rows([torch.empty(5, 0)], indices)
    assert launches == [most, most, 1]


def gradients(function: Callable[..., tuple[Tensor, Tensor]], args: Sequence[Tensor], dout: Tensor, **options) -> list:
    leaves = [x.detach().clone().requires_grad_() for x in args]
    weights = function(*leaves, **options)[1]
    return list(torch.autograd.grad(weights, leaves, dout.to(weights.dtype)))


@pytest.mark.parametrize("total", [32, 33, 65, 200])
def test_router_sums_over_longer_blocks_where_there_are_many_rows(total, monkeypatch):
    monkeypatch.setattr(routing, "_MOST_SUMS", 2)
    args = [torch.randn(total, 40), torch.randn(40) / 6, torch.randn(1)]
    options = {"target": torch.rand(total) < 0.7, "activation": "sigmoid", "scale": 0.3, "shift": 0.7}
    dout = 0.5 + torch.rand(total)
    ours = gradients(ops.router_weights, args, dout, **options)
    expected = gradients(reference.router_weights, [x.double() for x in args], dout, **options)
    peers = [gradients(peer_router, args, dout, **options, order=order) for order in PEER_ORDERS]
    for i, name in enumerate(("dx", "dweight", "dbias")):
        theirs = [grads[i] for grads in peers]
        assert_within_rounding(ours[i], theirs, expected[i], factor=BACKWARD_FACTOR, name=name)


def test_tanh_of_any_size_keeps_its_leading_bits():
    magnitudes = torch.logspace(-30, 2, 500, dtype=torch.float64).float()
    logits = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, 0.6249, 0.625, 0.6251])])
    _, weights = ops.router_weights(logits[:, None], torch.ones(1))
    torch.testing.assert_close(weights.double(), logits.double().tanh(), rtol=4e-7, atol=0.0)


def test_an_op_of_the_other_backends_gives_the_same_bytes():
    x, indices = random_tensor((40, 3, 5), torch.bfloat16), some_indices(40, 30)
    ours = ops.gather_rows(x, indices), ops.scatter_rows(x[:30], indices, 40)
    with backends.use("native"):
        assert_bitwise_equal(ours, (ops.gather_rows(x, indices), ops.scatter_rows(x[:30], indices, 40)))
