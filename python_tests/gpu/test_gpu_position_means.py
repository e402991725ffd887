"""On a GPU the means over frames equal the CPU kernel's bit for bit, and similarities are those of float64."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DTYPES, cpu_kernel, on_both, on_cpu, on_device, raw, repeatable, with_gaps
from torch import Tensor

from pruneops import ops, reference
from pruneops.testing import LENGTHS, assert_bitwise_equal, cu_seqlens_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]


def check(x: Tensor, cu_seqlens: Tensor, positions: list[int], capacity: int) -> None:
    args = x, cu_seqlens, torch.tensor(positions, dtype=torch.int32), capacity
    means, similarity = on_cpu(repeatable(lambda: raw("position_means", *on_device(args))))
    assert_bitwise_equal(means, cpu_kernel("position_means", *args)[0])
    exact = reference.position_means(x.double(), cu_seqlens, positions, capacity=capacity)[1]
    torch.testing.assert_close(similarity.double(), exact, rtol=1e-6, atol=3e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_positions_of_segments(lengths, dtype):
    positions = [(7, 0, -3, 1, 20)[b % 5] for b in range(len(lengths))]
    rows = sum(max(p, 0) for p in positions)
    x = torch.randn(sum(lengths) + 2, 40).to(dtype)
    for capacity in (rows, rows + 3, rows // 2):
        check(x, cu_seqlens_of(lengths), positions, capacity)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 255, 256, 257, 1024, 4099])
def test_channels_of_positions(channels, dtype):
    check(torch.randn(150, channels).to(dtype), cu_seqlens_of([150]), [8], 8)


@pytest.mark.parametrize("positions", [1, 5000], ids=["many frames", "many positions"])
def test_one_long_segment(positions):
    check(torch.randn(15_000, 24), cu_seqlens_of([15_000]), [positions], positions)


def test_boundaries_and_counts_that_lie():
    x = torch.randn(30, 8)
    cu_seqlens = torch.tensor([5, -3, 8, 1_000_000, 4, 12], dtype=torch.int32)
    for positions in ([3, 2, 4, 4, 4], [2**31 - 1] * 5, [-(2**31), 0, 3, 2, 1]):
        check(x, cu_seqlens, positions, 20)


@pytest.mark.rehearsed
def test_rows_beyond_the_range_of_a_square_and_rows_of_zeros():
    x = torch.randn(4, 5, 40)
    x[::2, 0] *= 1e30
    x[1, 1] = 0.0
    x[1, 2] *= 1e-20
    check(x.flatten(0, 1), cu_seqlens_of([20]), [5], 5)


def test_positions_of_spaced_rows_are_those_of_dense_ones():
    dense, cu_seqlens = on_device((torch.randn(300, 64), cu_seqlens_of([300])))
    expected = list(ops.position_means(dense, cu_seqlens, 30))
    assert_bitwise_equal(list(ops.position_means(with_gaps(dense), cu_seqlens, 30)), expected)


@pytest.mark.rehearsed
def test_gradients_of_means_over_frames_equal_those_on_the_cpu():
    def gradient(x: Tensor, cu_seqlens: Tensor, upstream: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(ops.position_means(x, cu_seqlens, [6, 7])[0], x, upstream)[0]

    args = torch.randn(50, 7), cu_seqlens_of([30, 20]), torch.randn(13, 7)
    torch.testing.assert_close(*on_both(gradient, *args))
