"""On a GPU scatter_scaled and router_weights are as close to float64 as plain torch of the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, DTYPES, every_second, on_cpu, on_device, raw, repeatable, with_gaps
from torch import Tensor

from pruneops import reference
from pruneops.testing import (
    BACKWARD_FACTOR,
    PEER_ORDERS,
    assert_bitwise_equal,
    assert_within_rounding,
    peer_router,
    peer_scatter_scaled,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

# Narrower than a warp's 16-byte accesses, odd, off every alignment, a model's, and beyond one slice of columns.
COLUMNS = (0, 1, 7, 8, 63, 128, 515, 896, 4096, 5120)


def double(args: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]


def gradients(function: Callable[..., Tensor], args: Sequence[Any], leaves: int, dout: Tensor) -> list[Tensor]:
    moved = [x.detach().clone().requires_grad_() for x in args[:leaves]]
    out = function(*moved, *args[leaves:])
    return list(torch.autograd.grad(out, moved, dout.to(out.dtype).to(out.device)))


def check(
    op: Callable[..., Tensor],
    peers: Sequence[Callable[..., Tensor]],
    oracle: Callable[..., Tensor],
    args: Sequence[Any],
    leaves: int,
) -> None:
    """Forward and backward by the tolerance rule; peers are plain torch on the CPU in the dtype of the inputs."""
    device = on_device(args)
    ours = repeatable(lambda: op(*device))
    assert ours.device.type == DEVICE.type
    expected = oracle(*double(args))
    assert_within_rounding(ours.cpu(), [peer(*args) for peer in peers], expected)
    dout = 0.5 + torch.rand(expected.shape)  # of one sign, or a gradient of one value could be anything
    ours = repeatable(lambda: gradients(op, device, leaves, dout))
    expected = gradients(oracle, double(args), leaves, dout)
    others = [gradients(peer, args, leaves, dout) for peer in peers]
    for i in range(leaves):
        theirs = [grads[i] for grads in others]
        assert_within_rounding(ours[i].cpu(), theirs, expected[i], factor=BACKWARD_FACTOR, name=f"gradient {i}")


# ---------------------------------------------------------------------- scatter_scaled


def scaled_inputs(total: int, columns: int, kept: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    x, residual, branch = (torch.randn(n, columns).to(dtype) for n in (total, len(kept), len(kept)))
    return [x, residual, branch, 1.0 + 0.2 * torch.randn(total), torch.tensor(kept, dtype=torch.int32)]


def scatter_scaled(*args: Tensor) -> Tensor:
    return raw("scatter_scaled", *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_scatter_scaled_of_any_width(columns, dtype):
    check(
        scatter_scaled,
        [peer_scatter_scaled],
        reference.scatter_scaled,
        scaled_inputs(19, columns, (0, 3, 4, 11, -1), dtype),
        4,
    )


@pytest.mark.parametrize("total", [0, 1, 9, 3000, 40_000])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_scatter_scaled_of_many_rows(ratio, total):
    """Tiles grow with the number of rows; every block looks through all indices."""
    kept = torch.randperm(total)[: int(total * ratio)].tolist()
    args = scaled_inputs(total, 24, [*kept, *[-1] * 70], torch.bfloat16)
    check(scatter_scaled, [peer_scatter_scaled], reference.scatter_scaled, args, 4)


def test_scatter_scaled_takes_any_index():
    x, residual, branch, weights, _ = on_device(scaled_inputs(9, 5, range(6), torch.float32))
    bad = on_device(torch.tensor([4, -2, 9, 2**31 - 1, -(2**31), 4], dtype=torch.int32))
    expected = scatter_scaled(x, residual[5:], branch[5:], weights, bad[5:])
    assert_bitwise_equal(scatter_scaled(x, residual, branch, weights, bad), expected)
    dx, dresidual, dbranch, dweights = raw("scatter_scaled_backward", x, x, branch, weights, bad)
    assert not dresidual[:5].any() and not dbranch[:5].any() and torch.equal(dresidual[5], x[4])
    kept = raw("scatter_scaled_backward", x, x, branch[5:], weights, bad[5:])
    assert_bitwise_equal([dx, dresidual[5:], dbranch[5:], dweights], kept)


@pytest.mark.parametrize(
    "view", [with_gaps, every_second, lambda x: x[:1].expand_as(x)], ids=["gaps", "last_2", "one_row"]
)
def test_scatter_scaled_of_strided_inputs(view):
    *tensors, weights, indices = on_device(scaled_inputs(19, 24, (0, 3, 4, 11, 17), torch.bfloat16))
    x, residual, branch = views = [view(t) for t in tensors]
    dense = [v.contiguous() for v in views]
    assert_bitwise_equal(scatter_scaled(*views, weights, indices), scatter_scaled(*dense, weights, indices))
    ours = raw("scatter_scaled_backward", x, x, branch, every_second(weights), every_second(indices))
    assert_bitwise_equal(ours, raw("scatter_scaled_backward", dense[0], dense[0], dense[2], weights, indices))


@pytest.mark.rehearsed
def test_scatter_scaled_does_not_read_what_it_replaces():
    x, residual, branch, weights, indices = on_device(scaled_inputs(19, 24, (0, 3, -1), torch.float32))
    dout = torch.randn_like(x)
    clean = scatter_scaled(x, residual, branch, weights, indices)
    grads = raw("scatter_scaled_backward", dout, x, branch, weights, indices)
    x[[0, 3]], residual[2], branch[2] = torch.nan, torch.nan, torch.inf
    assert_bitwise_equal(scatter_scaled(x, residual, branch, weights, indices), clean)
    assert_bitwise_equal(raw("scatter_scaled_backward", dout, x, branch, weights, indices), grads)


# ---------------------------------------------------------------------- router_weights


def router_inputs(total: int, columns: int, dtype: torch.dtype, *, masked: bool, biased: bool) -> list[Any]:
    weight = torch.randn(columns) / max(columns, 1) ** 0.5
    tensors = [t.to(dtype) for t in (torch.randn(total, columns), weight, torch.randn(1))]
    return [*tensors[: 3 if biased else 2], torch.rand(total) < 0.7 if masked else None]


def router(*args: Any) -> Any:
    return raw("router_weights", *args)


def check_router(args: Sequence[Any], activation: str = "tanh") -> None:
    """The weights as a function of x, weight, a bias if there is one, and target."""
    options = {"activation": activation, "scale": 0.3, "shift": 0.7}

    def ours(*args: Any) -> Tensor:
        *leaves, target = args
        return router(*leaves, *[None] * (3 - len(leaves)), target, *options.values())[1]

    def weights_of(function: Callable[..., Any], **more: Any) -> Callable[..., Tensor]:
        return lambda *args: function(*args[:-1], target=args[-1], **options, **more)[1]

    peers = [weights_of(peer_router, order=order) for order in PEER_ORDERS]
    check(ours, peers, weights_of(reference.router_weights), args, len(args) - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_router_of_any_width(columns, dtype):
    check_router(router_inputs(70, columns, dtype, masked=True, biased=True))


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_router_of_any_kind(biased, masked, activation):
    check_router(router_inputs(100, 256, torch.bfloat16, masked=masked, biased=biased), activation)


@pytest.mark.parametrize("total", [0, 1, 15, 17, 3000, 70_000])
def test_router_of_many_rows(total):
    """The gradient of the weight is summed over blocks of rows, whose length grows with their number."""
    check_router(router_inputs(total, 24, torch.float32, masked=True, biased=True))


def test_logits_rank_and_other_rows_come_last():
    x, weight, bias, target = on_device(router_inputs(500, 128, torch.bfloat16, masked=True, biased=True))
    logits, weights = router(x, weight, bias, target, "tanh", 0.2, 1.0)
    oracle = on_cpu(x).double() @ on_cpu(weight).double() + on_cpu(bias).double()
    torch.testing.assert_close(on_cpu(logits)[on_cpu(target)].double(), oracle[on_cpu(target)], rtol=1e-4, atol=1e-5)
    assert (logits[~target] == -torch.inf).all() and (weights[~target] == 1.0).all()


@pytest.mark.rehearsed
def test_router_does_not_read_unrouted_rows():
    x, weight, bias, target = on_device(router_inputs(100, 40, torch.float32, masked=True, biased=True))
    dout = torch.randn(100, device=DEVICE)

    def call() -> Any:
        logits, weights = router(x, weight, bias, target, "tanh", 0.2, 1.0)
        return logits, weights, raw("router_weights_backward", dout, logits, x, weight, target, "tanh", 0.2)

    clean = call()
    x[~target] = torch.nan
    assert_bitwise_equal(call(), clean)


@pytest.mark.parametrize(
    "view", [with_gaps, every_second, lambda x: x[:1].expand_as(x)], ids=["gaps", "last_2", "one_row"]
)
def test_router_of_strided_inputs(view):
    x, weight, bias, target = on_device(router_inputs(70, 40, torch.bfloat16, masked=True, biased=True))
    views = [view(x), view(weight), bias, every_second(target)]
    dense = [v.contiguous() for v in views]
    ours = router(*views, "tanh", 0.2, 1.0)
    assert_bitwise_equal(ours, router(*dense, "tanh", 0.2, 1.0))
    dout = torch.randn(70, device=DEVICE)
    results = [
        raw("router_weights_backward", d, ours[0], v[0], v[1], v[3], "tanh", 0.2)
        for d, v in ((every_second(dout), views), (dout, dense))
    ]
    assert_bitwise_equal(*results)
