"""router_weights: a logit and a weight for every row, and gradients that leave unrouted rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import (
    BACKWARD_FACTOR,
    PEER_ORDERS,
    assert_bitwise_equal,
    assert_repeatable,
    assert_within_rounding,
    ops_under_test,
    peer_router,
    strided,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("tanh", "sigmoid", "none")
PMOD = {"activation": "tanh", "scale": 0.2, "shift": 1.0}
# The ends of rows around every vector width; numbers of rows around those of the blocks that sum gradients.
COLUMNS = (0, 1, 3, 7, 8, 16, 17, 40, 63, 129, 515)
ROWS = (0, 1, 3, 4, 31, 32, 33, 100, 5000)


def inputs(total: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of about 1."""
    weight = torch.randn(columns) / max(columns, 1) ** 0.5
    return torch.randn(total, columns).to(dtype), weight.to(dtype), torch.randn(1).to(dtype)


def some_rows(total: int) -> Tensor:
    return torch.rand(total) < 0.7


def gradients(function: Callable[..., Any], leaves: Sequence[Tensor], dout: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    weights = function(*leaves, **options)[1]
    return list(torch.autograd.grad(weights, leaves, dout.to(weights.dtype)))


def double(args: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() for x in args]


def check(args: Sequence[Tensor], **options: Any) -> None:
    ours, oracle = ops.router_weights(*args, **options), reference.router_weights(*double(args), **options)
    peers = [peer_router(*args, **options, order=order) for order in PEER_ORDERS]
    for i, name in enumerate(("logits", "weights")):
        assert ours[i].dtype == torch.float32 and ours[i].shape == (args[0].shape[0],)
        assert_within_rounding(ours[i], [peer[i] for peer in peers], oracle[i], name=name)
    dout = 0.5 + torch.rand(args[0].shape[0])  # of one sign, or the one value of dbias could be anything
    ours = gradients(ops.router_weights, args, dout, **options)
    expected = gradients(reference.router_weights, double(args), dout, **options)
    peer_grads = [gradients(peer_router, args, dout, **options, order=order) for order in PEER_ORDERS]
    for i, name in enumerate(("dx", "dweight", "dbias")[: len(args)]):
        assert ours[i].dtype == args[i].dtype and ours[i].shape == args[i].shape
        peers_i = [grads[i] for grads in peer_grads]
        assert_within_rounding(ours[i], peers_i, expected[i], factor=BACKWARD_FACTOR, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_activation(activation, masked, biased, dtype, native_calls):
    args = inputs(100, 64, dtype)
    target = some_rows(100) if masked else None
    check(args if biased else args[:2], target=target, activation=activation, scale=0.3, shift=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_any_number_of_columns(columns, dtype, native_calls):
    check(inputs(70, columns, dtype), target=some_rows(70), **PMOD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("total", ROWS)
def test_any_number_of_rows(total, dtype, native_calls):
    check(inputs(total, 24, dtype), target=some_rows(total), **PMOD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_model(dtype, native_calls):
    check(inputs(300, 4096, dtype), target=some_rows(300), **PMOD)


def test_logit_and_weight_by_hand(native_calls):
    x, weight, bias = (
        torch.tensor([[1.0, 2.0], [0.0, -1.0], [4.0, 4.0]]),
        torch.tensor([3.0, -1.0]),
        torch.tensor([0.5]),
    )
    target = torch.tensor([True, True, False])
    logits, weights = ops.router_weights(x, weight, bias, target=target, activation="none", scale=2.0, shift=-1.0)
    assert logits.tolist() == [1.5, 1.5, -torch.inf] and weights.tolist() == [2.0, 2.0, 1.0]


def test_a_router_of_zeros_gives_every_row_a_weight_of_exactly_one(native_calls):
    x = torch.randn(50, 33, dtype=torch.bfloat16)
    logits, weights = ops.router_weights(x, x.new_zeros(33), x.new_zeros(1), **PMOD)
    assert not logits.any() and (weights == 1.0).all()


def test_unrouted_rows_have_a_weight_of_exactly_one_and_rank_last(native_calls):
    x, weight, bias = inputs(200, 40, torch.bfloat16)
    target = some_rows(200)
    for activation in ACTIVATIONS:
        logits, weights = ops.router_weights(
            x, weight, bias, target=target, activation=activation, scale=7.0, shift=3.0
        )
        assert (weights[~target] == 1.0).all() and (logits[~target] == -torch.inf).all()
        assert logits[target].isfinite().all()


def test_logits_keep_what_rounded_weights_lose(native_calls):
    """Close logits differ in float32, where weights in the dtype of the model tie."""
    x = torch.linspace(1, 1.1, 64, dtype=torch.float32)[:, None]
    logits, weights = ops.router_weights(x, torch.ones(1), **PMOD)
    assert logits.unique().numel() == 64 and weights.bfloat16().unique().numel() < 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_unrouted_rows_hold_reaches_nothing(dtype, bad, native_calls):
    args, target = inputs(100, 40, dtype), some_rows(100)
    options = {"target": target, **PMOD}
    dout = torch.randn(100)
    clean = ops.router_weights(*args, **options), gradients(ops.router_weights, args, dout, **options)
    args[0][~target] = bad
    dirty = ops.router_weights(*args, **options), gradients(ops.router_weights, args, dout, **options)
    assert_bitwise_equal(dirty, clean)
    assert not clean[1][0][~target].any()
    assert all(grad.isfinite().all() for grad in gradients(reference.router_weights, double(args), dout, **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_stay_in_their_row(bad, activation, native_calls):
    x, weight, bias = inputs(70, 40)
    x[3, 39], x[66, 0], weight[[0, 39]] = bad, -bad, torch.tensor([1.0, 1.0])
    ours, oracle = (f(*a, activation=activation) for f, a in ((ops.router_weights, (x, weight, bias)),
                    (reference.router_weights, double((x, weight, bias)))))  # fmt: skip
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, theirs.float(), equal_nan=True)
    dx = gradients(ops.router_weights, (x, weight, bias), torch.ones(70), activation=activation)[0]
    finite = torch.arange(70)[:, None].expand(70, 40) != 3
    assert dx[finite & (torch.arange(70)[:, None] != 66)].isfinite().all()


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_huge_logits_saturate_without_nan(activation, native_calls):
    x, weight = torch.tensor([[1e4], [-1e4], [1e38], [-1e38]]), torch.tensor([10.0])
    logits, weights = ops.router_weights(x, weight, activation=activation)
    low = -1.0 if activation == "tanh" else 0.0
    assert weights.tolist() == [1.0, low, 1.0, low] and logits[2:].tolist() == [torch.inf, -torch.inf]
    dx, dweight = gradients(ops.router_weights, (x, weight), torch.ones(4), activation=activation)
    assert not dx.any() and not dweight.any()


@pytest.mark.parametrize(
    "view",
    [
        strided,
        lambda x: x.t().contiguous().t() if x.dim() == 2 else torch.stack([x, x], -1)[:, 0],
        lambda x: torch.stack([x, x], dim=-1)[..., 1],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["gaps", "transposed", "last_stride_2", "expanded"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_give_the_same_result(view, dtype, native_calls):
    views = [view(x) for x in inputs(70, 40, dtype)]
    dense, target, dout = [x.contiguous() for x in views], view(some_rows(70)), view(torch.randn(70))
    options = {"target": target, **PMOD}
    ours, expected = ops.router_weights(*views, **options), ops.router_weights(*dense, **options)
    assert_bitwise_equal(ours, expected)
    backward = ops_under_test().router_weights_backward
    results = [
        backward(d, strided(ours[0]) if d is dout else ours[0], x, w, t, "tanh", 0.2)
        for d, (x, w, _), t in ((dout, views, target), (dout.contiguous(), dense, target.contiguous()))
    ]
    assert_bitwise_equal(*results)


def test_two_runs_are_equal_whatever_memory_held(native_calls):
    (x, weight, bias), target = inputs(500, 130, torch.bfloat16), some_rows(500)
    logits, _ = assert_repeatable(lambda: ops.router_weights(x, weight, bias, target=target, **PMOD))
    dout = torch.randn(500)
    backward = ops_under_test().router_weights_backward
    assert_repeatable(lambda: backward(dout, logits, x, weight, target, "tanh", 0.2))


def test_logits_have_no_gradient():
    leaves = [x.requires_grad_() for x in inputs(9, 4)]
    logits, weights = ops.router_weights(*leaves)
    assert not logits.requires_grad and weights.requires_grad
    with backends.use("reference"):
        logits, weights = ops.router_weights(*leaves)
    assert not logits.requires_grad and weights.requires_grad


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_meaning(masked, activation):
    leaves = [x.requires_grad_() for x in double(inputs(9, 4))]
    options = {"target": some_rows(9) if masked else None, "activation": activation, "scale": 0.2, "shift": 1.0}
    assert torch.autograd.gradcheck(lambda *x: ops.router_weights(*x, **options)[1], leaves)
    assert torch.autograd.gradgradcheck(lambda *x: ops.router_weights(*x, **options)[1], leaves)


def test_a_second_derivative_is_refused_by_the_kernel():
    x, weight, bias = (x.requires_grad_() for x in inputs(9, 4))
    weights = ops.router_weights(x, weight, bias)[1]
    (grad,) = torch.autograd.grad(weights.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="router_weights is differentiable once; use .*'reference'"):
        grad.sum().backward()


def test_autocast_brings_the_router_to_the_dtype_of_x(native_calls):
    router = torch.nn.Linear(16, 1)
    x = torch.randn(9, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights = ops.router_weights(x, router.weight[0], router.bias, **PMOD)
    assert logits.dtype == weights.dtype == torch.float32
    expected = ops.router_weights(x, router.weight[0].bfloat16(), router.bias.bfloat16(), **PMOD)
    assert_bitwise_equal((logits, weights), expected)
    weights.sum().backward()
    assert router.weight.grad.dtype == torch.float32 and router.weight.grad.any()
