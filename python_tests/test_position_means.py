"""position_means finds the mean of each position over its frames, and how alike they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pruneops import ops, reference
from pruneops.testing import (
    BACKWARD_FACTOR,
    LENGTHS,
    assert_bitwise_equal,
    assert_repeatable,
    assert_within_rounding,
    backend_under_test,
    cu_seqlens_of,
    strided,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["native", "reference"])
INF, NAN = math.inf, math.nan


def frames_of(lengths: tuple[int, ...], positions: list[int]) -> list[tuple[int, int, int]]:
    """First row, positions and whole frames of each segment."""
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    return [(start, max(p, 0), n // max(p, 1)) for start, n, p in zip(starts, lengths, positions, strict=True)]


def averages(x: Tensor, lengths: tuple[int, ...], positions: list[int]) -> tuple[Tensor, Tensor]:
    """Means, and mean cosines from every pair of different frames, in the dtype of ``x``."""
    means, similarities = [x.new_zeros(0, x.shape[1])], [x.new_zeros(0)]
    for start, p, w in frames_of(lengths, positions):
        frames = x[start : start + w * p].view(w, p, -1) if w else x.new_zeros(0, p, x.shape[1])
        means.append(frames.mean(0) if w else x.new_zeros(p, x.shape[1]))
        unit = frames / frames.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        cosines = torch.einsum("ipc,jpc->pij", unit, unit)
        apart = ~torch.eye(w, dtype=torch.bool)
        similarities.append(cosines[:, apart].sum(-1) / (w * (w - 1)) if w > 1 else x.new_full((p,), NAN))
    return torch.cat(means), torch.cat(similarities)


def looking_alike(lengths: tuple[int, ...], positions: list[int], channels: int, more: int = 2) -> Tensor:
    """Rows that change from frame to frame at some positions more than at others."""
    x = torch.randn(sum(lengths) + more, channels)
    for start, p, w in frames_of(lengths, positions):
        still = torch.randn(p, channels) * 3 * torch.rand(p, 1)
        x[start : start + w * p] += still.repeat(w, 1)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 50, 333])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_positions_have_the_mean_of_their_frames_and_the_mean_cosine_of_their_pairs(
    lengths, channels, dtype, native_calls
):
    positions = [(3, 1, 7, 2)[b % 4] for b in range(len(lengths))]
    x = looking_alike(lengths, positions, channels).to(dtype)
    means, similarity = ops.position_means(x, cu_seqlens_of(lengths), positions)
    assert means.dtype == dtype and means.shape == (sum(positions), channels) and means.is_contiguous()
    assert similarity.dtype == torch.float32
    exact = averages(x.double(), lengths, positions)
    peer = averages(x.float(), lengths, positions)
    assert_within_rounding(means, averages(x, lengths, positions)[0], exact[0], name="means")
    # Each vector's rounding counts twice in a product.
    assert_within_rounding(similarity, peer[1], exact[1], condition=2.0, name="similarity")
    expected = reference.position_means(x.double(), cu_seqlens_of(lengths), positions)
    torch.testing.assert_close(expected, exact, equal_nan=True)
    assert dict(native_calls) == {("position_means", backend_under_test()): 1}


@pytest.mark.parametrize("frames", [2, 64, 300])
def test_similarity_is_accurate_where_pairs_cancel_and_where_frames_hardly_differ(frames, native_calls):
    x = torch.randn(frames, 3, 1500)
    x[:, 1] = x[0, 1] + 1e-3 * x[:, 1]
    x[1::2, 2] = -x[::2, 2]  # pairs that point in opposite directions: the sum of all vectors is 0
    x = x.flatten(0, 1)
    similarity = ops.position_means(x, cu_seqlens_of([len(x)]), 3)[1]
    exact = averages(x.double(), (len(x),), [3])[1]
    assert ((similarity.double() - exact).abs() <= 1e-6 * exact.abs() + 2e-7 / frames).all()


@BACKENDS
def test_rows_of_any_size_count_alike_and_rows_of_zeros_only_in_the_number_of_frames(backend):
    x = torch.randn(4, 5, 40)
    scaled = x.clone()
    for scale, position in ((1e-9, 0), (1e30, 1), (1e15, 2)):
        scaled[::2, position] *= scale
    scaled[1, 3] = 0.0
    scaled[1, 4] *= 1e-20  # below the least norm that a row is divided by
    cu_seqlens = cu_seqlens_of([20])
    similarity = backend.position_means(scaled.flatten(0, 1), cu_seqlens, 5)[1]
    exact = averages(x.flatten(0, 1).double(), (20,), [5])[1].float()
    torch.testing.assert_close(similarity[:3], exact[:3], rtol=1e-5, atol=1e-6)
    without = averages(torch.cat([x[:1], x[2:]]).flatten(0, 1).double(), (15,), [5])[1].float()
    # (|sum of 3 vectors|^2 - 4) / 12 instead of (|sum of 3 vectors|^2 - 3) / 6
    torch.testing.assert_close(similarity[3:], (without[3:] * 6 - 1) / 12, rtol=1e-5, atol=1e-6)


@BACKENDS
def test_a_row_that_is_no_number_spoils_its_own_position_only(backend):
    x = torch.randn(3, 4, 20)
    x[1, 0, 3], x[2, 2, 19] = NAN, INF
    means, similarity = backend.position_means(x.flatten(0, 1), cu_seqlens_of([12]), 4)
    assert similarity.isnan().tolist() == [True, False, True, False]
    assert means.isfinite().all(1).tolist() == [False, True, False, True]


@BACKENDS
def test_rows_after_the_last_whole_frame_are_left_out(backend):
    x = torch.arange(10.0)[:, None]
    x[6:8] = NAN
    means, similarity = backend.position_means(x, cu_seqlens_of([8, 2]), [3, 2])
    assert means[:, 0].tolist() == [1.5, 2.5, 3.5, 8.0, 9.0]
    assert similarity[1:].isnan().tolist() == [False, False, True, True]


@BACKENDS
def test_positions_without_frames_are_zero_and_segments_without_positions_own_no_rows(backend):
    means, similarity = backend.position_means(torch.ones(6, 2), cu_seqlens_of([2, 0, 3, 1]), [3, 1, -2, 0])
    assert means.tolist() == [[0.0, 0.0]] * 4 and similarity.isnan().all()
    means, similarity = backend.position_means(torch.ones(5, 2), cu_seqlens_of([]), 4)
    assert means.shape == (0, 2) and similarity.shape == (0,)
    similarity = backend.position_means(torch.ones(4, 0), cu_seqlens_of([4]), 2)[1]
    assert similarity.tolist() == [-1.0, -1.0]  # rows of no length, as rows of zeros


@BACKENDS
@pytest.mark.parametrize("capacity", [0, 2, 5, 9])
def test_positions_stop_at_the_capacity_and_what_is_left_is_zero(capacity, backend):
    x, cu_seqlens = torch.randn(17, 3), cu_seqlens_of([6, 0, 10])
    counts = torch.tensor([2, 0, 3])
    full = backend.position_means(x, cu_seqlens, counts)
    assert full[0].shape == (5, 3)
    cut = backend.position_means(x, cu_seqlens, counts, capacity=capacity)
    kept = min(capacity, 5)
    assert_bitwise_equal([t[:kept] for t in cut], [t[:kept] for t in full])
    assert len(cut[0]) == len(cut[1]) == capacity and not cut[0][kept:].any() and not cut[1][kept:].any()


def test_means_over_frames_are_rounded_once(native_calls):
    """Where sums in the dtype itself would stop growing."""
    x = torch.full((4096, 3), 1.0, dtype=torch.bfloat16)
    x[0] = 257 / 256 * 4096  # 4112
    means, _ = ops.position_means(x, cu_seqlens_of([4096]), 1)
    assert (means == torch.tensor((float(x[0, 0]) + 4095) / 4096).to(torch.bfloat16)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_of_strided_rows_are_those_of_dense_ones_every_time(dtype, native_calls):
    x, cu_seqlens = torch.randn(700, 70).to(dtype), cu_seqlens_of([300, 0, 390])
    expected = assert_repeatable(lambda: ops.position_means(x, cu_seqlens, [9, 2, 100], capacity=120))
    for other in (strided(x), x.t().contiguous().t()):
        assert_bitwise_equal(ops.position_means(other, cu_seqlens, [9, 2, 100], capacity=120), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_means_over_frames_are_shared_by_the_frames(dtype, native_calls):
    lengths, positions, capacity = (40, 0, 4, 25), [9, 2, 5, 3], 18  # of 19
    x, upstream = torch.randn(71, 33).to(dtype), torch.randn(capacity, 33).to(dtype)

    def gradient(function, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        means, similarity = function(x, cu_seqlens_of(lengths), positions, capacity=capacity)
        assert not similarity.requires_grad
        return torch.autograd.grad(means, x, upstream.to(means.dtype))[0]

    ours, exact = gradient(ops.position_means, x), gradient(reference.position_means, x.double())
    assert ours.dtype == dtype
    assert_within_rounding(ours, gradient(reference.position_means, x), exact, factor=BACKWARD_FACTOR)
    assert not ours[36:44].any() and not ours[68:].any() and ours[:36].all()


@pytest.mark.usefixtures("unforced")
def test_gradients_of_the_reference_of_means_over_frames_are_its_derivatives():
    x = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.position_means(x, cu_seqlens_of([7, 4]), [3, 2])[0], x)
    assert ops.position_means(x, cu_seqlens_of([7, 4]), [3, 2])[1].dtype == torch.float64


def test_gradients_of_means_over_frames_are_differentiable_again(native_calls):
    x = torch.randn(7, 3, requires_grad=True)

    def second(function, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(function(x, cu_seqlens_of([7]), 2)[0].pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(ops.position_means, x), second(reference.position_means, x))
