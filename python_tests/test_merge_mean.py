"""merge_mean gives the means of clusters, and their gradients."""

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
    cu_seqlens_of,
    strided,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = pytest.mark.parametrize("backend", [ops, reference], ids=["native", "reference"])
INF, NAN = math.inf, math.nan


def cluster_ids_for(lengths: tuple[int, ...], counts: list[int]) -> Tensor:
    """Ids from -1 to one past the last cluster, so that some rows belong to none."""
    ids = [torch.randint(-1, max(n, 0) + 2, (length,)) for length, n in zip(lengths, counts, strict=True)]
    return torch.cat([torch.zeros(0), *ids, torch.zeros(3)]).to(torch.int32)


def plain_means(x: Tensor, ids: Tensor, lengths: tuple[int, ...], counts: list[int], weights: Tensor) -> Tensor:
    """One cluster after the other, all in the dtype of ``x``."""
    rows, start = [], 0
    for length, count in zip(lengths, counts, strict=True):
        for cluster in range(count):
            member = (ids[start : start + length] == cluster).nonzero()[:, 0] + start
            weight = weights[member].to(x.dtype)
            total = weight.sum()
            mean = (x[member] * weight[:, None]).sum(0) / torch.where(total == 0, 1, total)
            rows.append(torch.where(total == 0, 0, mean))
        start += length
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("channels", [1, 50, 333])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_means_are_those_of_the_members(lengths, channels, weighted, dtype, native_calls):
    counts = [(n + 2) // 3 for n in lengths]
    ids = cluster_ids_for(lengths, counts)
    x = (torch.randn(len(ids), channels) + 1).to(dtype)
    weights = torch.rand(len(ids)) * (torch.rand(len(ids)) < 0.9) if weighted else None
    merged, members = ops.merge_mean(x, ids, cu_seqlens_of(lengths), counts, weights=weights)
    assert merged.dtype == dtype and merged.shape == (sum(counts), channels) and merged.is_contiguous()
    assert members.dtype == torch.int32
    ones = torch.ones(len(ids)) if weights is None else weights
    exact = plain_means(x.double(), ids, lengths, counts, ones.double())
    assert_within_rounding(merged, plain_means(x, ids, lengths, counts, ones), exact)
    expected = reference.merge_mean(x.double(), ids, cu_seqlens_of(lengths), counts, weights=ones.double())
    torch.testing.assert_close(expected[0], exact)
    assert_bitwise_equal(members, expected[1])
    if sum(lengths) > 60:
        assert int((members == 0).sum()) > 0 and int(members.sum()) < sum(lengths)


def test_half_precision_is_rounded_once(native_calls):
    """Where sums in the dtype itself would stop growing."""
    x = torch.full((4096, 3), 1.0, dtype=torch.bfloat16)
    x[0] = 257 / 256 * 4096  # 4112
    merged, counts = ops.merge_mean(x, torch.zeros(4096, dtype=torch.int32), cu_seqlens_of([4096]), 1)
    expected = torch.tensor((float(x[0, 0]) + 4095) / 4096).to(torch.bfloat16)
    assert (merged == expected).all() and counts.tolist() == [4096]


@BACKENDS
def test_clusters_without_members_or_weight_are_zero(backend):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [NAN, INF], [7.0, 8.0]])
    ids = torch.tensor([3, 1, -1, 1], dtype=torch.int32)
    merged, counts = backend.merge_mean(x, ids, cu_seqlens_of([4]), 5, weights=torch.tensor([0.0, 1.0, 1.0, 3.0]))
    assert merged.tolist() == [[0.0, 0.0], [6.0, 7.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert counts.tolist() == [0, 2, 0, 1, 0]


@BACKENDS
@pytest.mark.parametrize("stray", [-1, 2, 7, -(2**31), 2**31 - 1])
def test_ids_that_name_no_cluster_of_their_segment_are_left_out(stray, backend):
    x = torch.arange(6.0)[:, None]
    ids = torch.tensor([0, stray, 1, 0, stray, 0], dtype=torch.int32)
    merged, counts = backend.merge_mean(x, ids, cu_seqlens_of([3, 3]), [2, 1])
    assert merged[:, 0].tolist() == [0.0, 2.0, 4.0] and counts.tolist() == [1, 1, 2]


@BACKENDS
@pytest.mark.parametrize("capacity", [0, 2, 4, 9])
def test_merging_stops_at_the_capacity_and_fills_what_is_left_with_zeros(capacity, backend):
    x, lengths = torch.randn(8, 3), (3, 3)
    ids = torch.tensor([0, 1, 1, 0, 1, 2, 0, 0], dtype=torch.int32)
    counts = torch.tensor([2, 3], dtype=torch.int32)
    full, members = backend.merge_mean(x, ids, cu_seqlens_of(lengths), counts)
    assert full.shape == (5, 3)
    cut, cut_members = backend.merge_mean(x, ids, cu_seqlens_of(lengths), counts, capacity=capacity)
    kept = min(capacity, 5)
    assert_bitwise_equal((cut[:kept], cut_members[:kept]), (full[:kept], members[:kept]))
    assert cut.shape == (capacity, 3) and not cut[kept:].any() and not cut_members[kept:].any()


@BACKENDS
def test_negative_counts_own_no_rows(backend):
    ids = torch.zeros(4, dtype=torch.int32)
    merged, counts = backend.merge_mean(torch.ones(4, 2), ids, cu_seqlens_of([2, 2]), [-3, 1])
    assert merged.tolist() == [[1.0, 1.0]] and counts.tolist() == [2]


def test_clusters_of_dpc_knn_merge_to_one_row_each(native_calls):
    x, lengths = torch.randn(39, 5), (20, 0, 19)
    result = ops.dpc_knn(x, cu_seqlens_of(lengths), 7, k=4)
    merged, counts = ops.merge_mean(x, result.cluster_ids, cu_seqlens_of(lengths), result.cu_clusters.diff())
    assert merged.shape == (14, 5) and (counts > 0).all() and int(counts.sum()) == 39


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gradients_are_those_of_the_mean(weighted, dtype, native_calls):
    lengths, counts = (40, 0, 1, 25), [9, 2, 0, 30]
    ids = cluster_ids_for(lengths, counts)
    cu_seqlens, capacity = cu_seqlens_of(lengths), 38  # of 41
    x = torch.randn(len(ids), 33).to(dtype)
    weights = torch.rand(len(ids)) * (torch.rand(len(ids)) < 0.9) if weighted else None
    upstream = torch.randn(capacity, 33).to(dtype)

    def gradients(function, x: Tensor, weights: Tensor | None) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weights) if leaf is not None]
        merged, _ = function(leaves[0], ids, cu_seqlens, counts, weights=(leaves + [None])[1], capacity=capacity)
        return list(torch.autograd.grad(merged, leaves, upstream.to(merged.dtype)))

    exact = gradients(reference.merge_mean, x.double(), None if weights is None else weights.double())
    peers = gradients(reference.merge_mean, x, weights)
    for name, ours, peer, oracle in zip(
        ("x", "weights"), gradients(ops.merge_mean, x, weights), peers, exact, strict=False
    ):
        # The mean that a weight's gradient is taken from was rounded to the dtype of x.
        condition = 1.0 if name == "x" else torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        assert_within_rounding(ours, peer, oracle, factor=BACKWARD_FACTOR, condition=condition, name=name)


def test_weights_alone_may_need_a_gradient(native_calls):
    x, ids = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 1, 2], dtype=torch.int32)
    weights = torch.rand(6).requires_grad_()
    merged, counts = ops.merge_mean(x, ids, cu_seqlens_of([6]), 3, weights=weights)
    assert merged.requires_grad and not counts.requires_grad
    merged[:, 0].sum().backward()
    wide = weights.detach().double().requires_grad_()
    reference.merge_mean(x.double(), ids, cu_seqlens_of([6]), 3, weights=wide)[0][:, 0].sum().backward()
    torch.testing.assert_close(weights.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    assert weights.grad[5].abs() < 1e-6  # alone in its cluster


def test_gradients_are_differentiable_again(native_calls):
    x, ids = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 0, 1, 1, 1, 5], dtype=torch.int32)
    weights = torch.rand(6, requires_grad=True)

    def second(function, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        merged, _ = function(x, ids, cu_seqlens_of([6]), 3, weights=weights)
        first = torch.autograd.grad(merged.pow(3).sum(), (x, weights), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weights))

    ours = second(ops.merge_mean, x, weights)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weights)]
    for a, b in zip(ours, second(reference.merge_mean, *wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["int", "list", "int32", "int64", "uint8"])
def test_counts_may_come_in_any_integer_form(form, native_calls):
    x, ids, cu_seqlens = torch.randn(12, 3), torch.arange(12).remainder(3).int(), cu_seqlens_of([5, 0, 7])
    counts = {"int": 3, "list": [3, 3, 3]}.get(form)
    if counts is None:
        counts = torch.tensor([3, 3, 3], dtype=getattr(torch, form))
    merged, members = ops.merge_mean(x, ids, cu_seqlens, counts)
    expected = reference.merge_mean(x, ids, cu_seqlens, [3, 3, 3])
    torch.testing.assert_close(merged, expected[0])
    assert_bitwise_equal(members, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_give_the_same_means(dtype, native_calls):
    x, cu_seqlens = torch.randn(40, 37).to(dtype), cu_seqlens_of([15, 0, 25])
    ids, weights = torch.randint(0, 6, (40,), dtype=torch.int32), torch.rand(40)
    expected = ops.merge_mean(x, ids, cu_seqlens, 6, weights=weights)
    for other in (strided(x), x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0]):
        ours = ops.merge_mean(other, torch.stack([ids, ids], 1)[:, 0], cu_seqlens, 6, weights=strided(weights))
        assert_bitwise_equal(ours, expected)


def test_two_runs_are_equal_whatever_memory_held(native_calls):
    x, ids = torch.randn(303, 20), torch.randint(-1, 40, (303,), dtype=torch.int32)
    counts = torch.tensor([40, 3, 30], dtype=torch.int32)
    assert_repeatable(lambda: ops.merge_mean(x, ids, cu_seqlens_of([120, 0, 180]), counts, capacity=90))
