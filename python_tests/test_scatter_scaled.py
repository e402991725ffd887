"""scatter_scaled weighs every row once, forward and backward, and reads only the rows it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import (
    BACKWARD_FACTOR,
    assert_bitwise_equal,
    assert_repeatable,
    assert_within_rounding,
    ops_under_test,
    peer_scatter_scaled,
    strided,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("dx", "dresidual", "dbranch", "dweights")
# Rows that come back, of 19; the ends of rows around every vector width, and rows as long as a model has them.
KEPT: dict[str, tuple[int, ...]] = {
    "none": (),
    "some": (0, 3, 4, 11, 17),
    "all": tuple(range(19)),
    "capacity": (2, 3, 18, -1, -1, -1),
    "only_minus_one": (-1, -1),
    "any_order": (7, -1, 2, 18, 0),
}
COLUMNS = (0, 1, 3, 7, 8, 16, 17, 40, 63, 129, 515)


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def inputs(total: int, columns: int, kept: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, residual, branch = (torch.randn(n, columns).to(dtype) for n in (total, len(kept), len(kept)))
    return x, residual, branch, 1.0 + 0.2 * torch.randn(total), int32(kept)


def gradients(function: Callable[..., Tensor], args: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    *leaves, indices = args
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves, indices)
    return list(torch.autograd.grad(out, leaves, dout.to(out.dtype)))


def double(args: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in args]


def check(args: tuple[Tensor, ...]) -> None:
    ours, oracle = ops.scatter_scaled(*args), reference.scatter_scaled(*double(args))
    assert ours.dtype == args[0].dtype and ours.is_contiguous()
    assert_within_rounding(ours, peer_scatter_scaled(*args), oracle)
    dout = torch.randn_like(args[0])
    ours, peers = gradients(ops.scatter_scaled, args, dout), gradients(peer_scatter_scaled, args, dout)
    expected = gradients(reference.scatter_scaled, double(args), dout)
    for name, grad, peer, oracle, leaf in zip(NAMES, ours, peers, expected, args, strict=False):
        assert grad.dtype == leaf.dtype
        assert_within_rounding(grad, peer, oracle, factor=BACKWARD_FACTOR, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_any_set_of_kept_rows(kept, dtype, native_calls):
    check(inputs(19, 40, kept, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_any_number_of_columns(columns, dtype, native_calls):
    check(inputs(19, columns, KEPT["some"], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_model(dtype, native_calls):
    check(inputs(300, 4096, range(0, 300, 2), dtype))


def test_kept_rows_are_residual_plus_weighted_branch_and_others_are_weighted(native_calls):
    x, residual, branch = (
        torch.tensor([[1.0], [2.0], [4.0]]),
        torch.tensor([[10.0], [0.0]]),
        torch.tensor([[3.0], [9.0]]),
    )
    out = ops.scatter_scaled(x, residual, branch, torch.tensor([0.5, 2.0, 1.0]), int32([1, -1]))
    assert out.flatten().tolist() == [0.5, 16.0, 4.0]


def test_a_row_is_rounded_once(native_calls):
    """The product lies a little above a bfloat16 number, which decides how its sum with half a spacing is rounded."""
    x, weight = torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor([1.0 + 2**-7])
    branch, residual = torch.full_like(x, 1.0 + 2**-7), torch.full_like(x, 2**-8)
    once = (residual.double() + weight.double() * branch.double()).bfloat16()
    twice = residual + (weight * branch).bfloat16()
    assert torch.equal(ops.scatter_scaled(x, residual, branch, weight, int32([0])), once) and not torch.equal(
        once, twice
    )


def test_empty_batches(native_calls):
    for total, kept in ((0, ()), (0, (-1, -1)), (5, ())):
        args = inputs(total, 6, kept)
        assert ops.scatter_scaled(*args).shape == (total, 6)
        assert_bitwise_equal(
            *([g * 0 for g in gradients(f, args, args[0])] for f in (ops.scatter_scaled, peer_scatter_scaled))
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_read_reaches_neither_result_nor_gradient(dtype, bad, native_calls):
    x, residual, branch, weights, indices = inputs(19, 24, KEPT["capacity"], dtype)
    clean = [*gradients(ops.scatter_scaled, (x, residual, branch, weights, indices), x)]
    dout, expected = x.clone(), ops.scatter_scaled(x, residual, branch, weights, indices)
    x[indices[:3].long()], residual[3:], branch[3:] = bad, bad, bad
    args = (x, residual, branch, weights, indices)
    assert_bitwise_equal(ops.scatter_scaled(*args), expected)
    assert_bitwise_equal(gradients(ops.scatter_scaled, args, dout), clean)
    reference_gradients = gradients(reference.scatter_scaled, double(args), dout)
    assert all(grad.isfinite().all() for grad in reference_gradients)
    assert not clean[0][indices[:3].long()].any() and not clean[1][3:].any() and not clean[2][3:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_stay_in_their_place(dtype, bad, native_calls):
    x, residual, branch, weights, indices = inputs(19, 40, KEPT["some"], dtype)
    x[1, 5], x[2, 39], residual[0, 7], branch[1, 38] = bad, bad, bad, bad
    args = (x, residual, branch, weights, indices)
    ours, oracle = ops.scatter_scaled(*args), reference.scatter_scaled(*double(args))
    assert_within_rounding(ours, peer_scatter_scaled(*args), oracle)
    assert (~ours.isfinite()).nonzero().tolist() == [[0, 7], [1, 5], [2, 39], [3, 38]]


@pytest.mark.parametrize(
    "view",
    [
        strided,
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], dim=-1)[..., 1],
        lambda x: x[:1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
    ],
    ids=["gaps", "transposed", "last_stride_2", "one_row", "one_column"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_give_the_same_result(view, dtype, native_calls):
    x, residual, branch, weights, indices = inputs(19, 24, KEPT["some"], dtype)
    dout = view(torch.randn_like(x))
    views = [view(x), view(residual), view(branch), strided(weights), torch.stack([indices, indices], 1)[:, 1]]
    dense = [v.contiguous() for v in views]
    assert_bitwise_equal(ops.scatter_scaled(*views), ops.scatter_scaled(*dense))
    backward = ops_under_test().scatter_scaled_backward
    assert_bitwise_equal(backward(dout, *views[:1], *views[2:]), backward(dout.contiguous(), *dense[:1], *dense[2:]))


def test_two_runs_are_equal_whatever_memory_held(native_calls):
    x, residual, branch, weights, indices = inputs(500, 130, [*range(0, 400, 3), *[-1] * 50], torch.bfloat16)
    assert_repeatable(lambda: ops.scatter_scaled(x, residual, branch, weights, indices))
    assert_repeatable(lambda: ops_under_test().scatter_scaled_backward(x, x, branch, weights, indices))


def test_only_what_needs_a_gradient_gets_one(native_calls):
    args = inputs(9, 4, (2, 5))
    for i in range(4):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(args[:4])]
        ops.scatter_scaled(*leaves, args[4]).sum().backward()
        assert [x.grad is not None for x in leaves] == [j == i for j in range(4)]


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("kept", [KEPT["some"], KEPT["capacity"], KEPT["none"]])
def test_gradcheck_of_the_meaning(kept):
    *leaves, indices = double(inputs(19, 3, kept))
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: ops.scatter_scaled(*x, indices), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: ops.scatter_scaled(*x, indices), leaves)


def test_a_second_derivative_is_refused_by_the_kernel_and_given_by_the_reference():
    *leaves, indices = inputs(9, 4, (2, 5))
    leaves = [x.requires_grad_() for x in leaves]

    def penalty() -> Tensor:
        (grad,) = torch.autograd.grad(ops.scatter_scaled(*leaves, indices).square().sum(), leaves[3], create_graph=True)
        return grad.sum()

    with pytest.raises(RuntimeError, match="scatter_scaled is differentiable once; use .*'reference'"):
        penalty().backward()
    with backends.use("reference"):
        penalty().backward()
    assert leaves[3].grad is not None


def test_autocast_brings_residual_and_branch_to_the_dtype_of_x(native_calls):
    x, residual, branch, weights, indices = inputs(9, 16, (2, 5))
    linear = torch.nn.Linear(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.scatter_scaled(x, residual, linear(branch), weights, indices)
        assert linear(branch).dtype == torch.bfloat16 and out.dtype == torch.float32
    out.sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.isfinite().all()


BAD = int32([4, -2, 9, 2**31 - 1, -(2**31), 4])


def test_raw_kernels_skip_an_index_out_of_range_and_take_the_last_of_equal_ones():
    x, residual, branch, weights, _ = inputs(9, 5, range(6))
    raw: Any = ops_under_test()
    expected = ops.scatter_scaled(x, residual[5:], branch[5:], weights, BAD[5:])
    assert_bitwise_equal(raw.scatter_scaled(x, residual, branch, weights, BAD), expected)
    dx, dresidual, dbranch, dweights = raw.scatter_scaled_backward(x, x, branch, weights, BAD)
    assert not dresidual[:5].any() and not dbranch[:5].any() and torch.equal(dresidual[5], x[4])
    kept = raw.scatter_scaled_backward(x, x, branch[5:], weights, BAD[5:])
    assert_bitwise_equal([dx, dresidual[5:], dbranch[5:], dweights], kept)


def test_duplicate_indices_are_refused():
    x, residual, branch, weights, _ = inputs(9, 5, (1, 1))
    with pytest.raises(ValueError, match="indices must not hold a row twice, got 1 2 times"):
        ops.scatter_scaled(x, residual, branch, weights, int32([1, 1]))
