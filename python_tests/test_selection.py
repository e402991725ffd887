"""segment_topk and segment_threshold keep exactly the rows their definition names."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from pruneops import ops, reference
from pruneops.testing import LENGTHS, assert_bitwise_equal, assert_repeatable, cu_seqlens_of, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
SPECIAL = (NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0, -1.0, 1e-30)


def random_scores(total: int, kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "distinct":
        scores = torch.randperm(total) - total / 2
    elif kind == "ties":
        scores = torch.randint(-2, 3, (total,)).float()
    elif kind == "equal":
        scores = torch.full((total,), 0.25)
    else:
        scores = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (total,))]
    return scores.to(dtype)


def keep_counts_for(lengths: tuple[int, ...], kind: str) -> list[int]:
    rng = random.Random(0)
    counts = {"none": lambda n: 0, "all": lambda n: n, "half": lambda n: n // 2}
    return [counts.get(kind, lambda n: rng.randint(0, n))(n) for n in lengths]


def kept_by_definition(
    scores: list[float], lengths: tuple[int, ...], counts: list[int], protect: list[bool]
) -> tuple[list[int], list[int]]:
    """The kept rows and boundaries in plain Python, one segment after the other."""
    kept: list[int] = []
    ends, start = [0], 0
    for length, count in zip(lengths, counts, strict=True):
        rows = range(start, start + length)
        free = [r for r in rows if not protect[r]]
        free.sort(key=lambda r: (math.isnan(scores[r]), 0.0 if math.isnan(scores[r]) else -scores[r], r))
        kept += sorted(free[: max(count, 0)] + [r for r in rows if protect[r]])
        ends.append(len(kept))
        start += length
    return kept, ends


@pytest.mark.parametrize("backend", [ops, reference], ids=["native", "reference"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "special"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_topk_keeps_the_rows_that_the_definition_names(lengths, kind, backend):
    total = sum(lengths) + 3
    scores = random_scores(total, kind, torch.float32)
    protect = torch.rand(total) < 0.2
    counts = keep_counts_for(lengths, "random")
    indices, cu_seqlens = backend.segment_topk(scores, cu_seqlens_of(lengths), counts, protect=protect, capacity=total)
    kept, ends = kept_by_definition(scores.tolist(), lengths, counts, protect.tolist())
    assert indices.tolist() == kept + [-1] * (total - len(kept))
    assert cu_seqlens.tolist() == ends
    assert indices.dtype == cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "special"])
@pytest.mark.parametrize("keep", ["none", "all", "half", "random"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_topk_native_equals_reference(lengths, keep, kind, dtype, native_calls):
    total = sum(lengths)
    scores, cu_seqlens = random_scores(total, kind, dtype), cu_seqlens_of(lengths)
    counts = keep_counts_for(lengths, keep)
    ours = ops.segment_topk(scores, cu_seqlens, counts)
    assert_bitwise_equal(ours, reference.segment_topk(scores, cu_seqlens, counts))
    assert ours[0].shape[0] == sum(counts) == int(ours[1][-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("minimum", [None, "none", "all", "random"])
@pytest.mark.parametrize("threshold", [0.0, -0.0, 0.3, INF, -INF])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_threshold_native_equals_reference(lengths, threshold, minimum, dtype, native_calls):
    total = sum(lengths) + 2
    cu_seqlens = cu_seqlens_of(lengths)
    scores = random_scores(total, "special", dtype)
    protect = torch.rand(total) < 0.1
    min_keep = None if minimum is None else keep_counts_for(lengths, minimum)
    for capacity in (None, 0, 5, total + 4):
        arguments = {"min_keep": min_keep, "capacity": capacity, "protect": protect}
        ours = ops.segment_threshold(scores, cu_seqlens, threshold, **arguments)
        expected = reference.segment_threshold(scores, cu_seqlens, threshold, **arguments)
        assert_bitwise_equal(ours, expected)


def test_threshold_is_strict_and_never_keeps_nan(native_calls):
    scores = torch.tensor([0.5, math.nextafter(0.5, 1.0), 0.50001, NAN, INF, -INF])
    indices, _ = ops.segment_threshold(scores, cu_seqlens_of([6]), 0.5)
    assert indices.tolist() == [2, 4]


def test_threshold_keeps_the_best_rows_of_a_segment_that_has_too_few(native_calls):
    scores = torch.tensor([0.1, 0.3, 0.2, 0.9, 0.1, 0.1])
    indices, cu_seqlens = ops.segment_threshold(scores, cu_seqlens_of([3, 0, 3]), 0.5, min_keep=[2, 4, 2])
    assert indices.tolist() == [1, 2, 3, 4]
    assert cu_seqlens.tolist() == [0, 2, 2, 4]


def test_nan_ranks_below_minus_infinity_and_signed_zeros_are_equal(native_calls):
    scores = torch.tensor([NAN, -INF, -0.0, 0.0])
    order = [ops.segment_topk(scores, cu_seqlens_of([4]), [k])[0].tolist() for k in range(5)]
    assert order == [[], [2], [2, 3], [1, 2, 3], [0, 1, 2, 3]]


def test_protected_rows_stay_and_do_not_count(native_calls):
    scores = torch.tensor([9.0, 1.0, 2.0, 3.0, 0.0, NAN])
    protect = torch.tensor([True, False, False, False, False, True])
    indices, cu_seqlens = ops.segment_topk(scores, cu_seqlens_of([4, 2]), [1, 0], protect=protect)
    assert indices.tolist() == [0, 3, 5]
    assert cu_seqlens.tolist() == [0, 2, 3]


def test_every_row_protected_keeps_every_row(native_calls):
    scores, protect = torch.randn(7), torch.ones(7, dtype=torch.bool)
    indices, _ = ops.segment_topk(scores, cu_seqlens_of([3, 4]), [0, 0], protect=protect)
    assert indices.tolist() == list(range(7))


@pytest.mark.parametrize("capacity", [0, 1, 4, 6, 7, 50])
@pytest.mark.parametrize("counts", [[2, 0, 4], [9, 9, 9], [-3, 1, 0]])
def test_capacity_form_clamps_counts_and_cuts_at_the_capacity(capacity, counts, native_calls):
    scores, cu_seqlens = torch.randn(9), cu_seqlens_of([3, 2, 4])
    counts = torch.tensor(counts, dtype=torch.int32)
    ours = ops.segment_topk(scores, cu_seqlens, counts, capacity=capacity)
    assert_bitwise_equal(ours, reference.segment_topk(scores, cu_seqlens, counts, capacity=capacity))
    indices, cu_seqlens_out = ours
    kept = int(cu_seqlens_out[-1])
    assert indices.shape == (capacity,) and kept <= capacity
    assert (indices[kept:] == -1).all() and (indices[:kept] >= 0).all()


def test_rows_past_the_last_segment_are_never_selected(native_calls):
    scores = torch.tensor([0.0, 1.0, INF, INF])
    protect = torch.tensor([False, False, False, True])
    indices, _ = ops.segment_topk(scores, cu_seqlens_of([2]), [2], protect=protect)
    assert indices.tolist() == [0, 1]


@pytest.mark.parametrize("form", ["list", "tuple", "int32", "int64", "uint8"])
def test_counts_may_come_in_any_integer_form(form, native_calls):
    scores, cu_seqlens = torch.randn(9), cu_seqlens_of([4, 5])
    counts = {"list": [1, 2], "tuple": (1, 2)}.get(form)
    if counts is None:
        counts = torch.tensor([1, 2], dtype=getattr(torch, form))
    expected = reference.segment_topk(scores, cu_seqlens, [1, 2])
    assert_bitwise_equal(ops.segment_topk(scores, cu_seqlens, counts), expected)


def test_protected_counts_may_be_given_and_are_checked(native_calls):
    scores, cu_seqlens = torch.randn(6), cu_seqlens_of([3, 3])
    protect = torch.tensor([True, False, False, False, True, True])
    plain = ops.segment_topk(scores, cu_seqlens, [1, 1], protect=protect)
    given = ops.segment_topk(scores, cu_seqlens, [1, 1], protect=protect, protected_counts=[1, 2])
    assert_bitwise_equal(given, plain)
    with pytest.raises(ValueError, match="protected_counts"):
        ops.segment_topk(scores, cu_seqlens, [1, 1], protect=protect, protected_counts=[2, 2])


@pytest.mark.parametrize("counts", [[4, 0], [-1, 0], torch.tensor([0, 4])])
def test_exact_form_refuses_counts_that_a_segment_cannot_satisfy(counts):
    with pytest.raises(ValueError, match=r"keep_counts\[\d\] must not be"):
        ops.segment_topk(torch.randn(6), cu_seqlens_of([3, 3]), counts)


def test_exact_form_counts_unprotected_rows_only():
    protect = torch.tensor([True, False, False])
    ops.segment_topk(torch.randn(3), cu_seqlens_of([3]), [2], protect=protect)
    with pytest.raises(ValueError, match=r"keep_counts\[0\] must not be above 2"):
        ops.segment_topk(torch.randn(3), cu_seqlens_of([3]), [3], protect=protect)


def test_strided_inputs_give_the_same_result(native_calls):
    scores, cu_seqlens = torch.randn(40), cu_seqlens_of([15, 0, 25])
    counts = torch.tensor([5, 0, 9], dtype=torch.int32)
    protect = torch.rand(40) < 0.2
    expected = ops.segment_topk(scores, cu_seqlens, counts, protect=protect, capacity=30)

    def every_second(x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=1)[:, 0]

    ours = ops.segment_topk(
        every_second(scores),
        every_second(cu_seqlens),
        every_second(counts),
        protect=every_second(protect),
        capacity=30,
    )
    assert_bitwise_equal(ours, expected)
    assert_bitwise_equal(
        ops.segment_threshold(every_second(scores), cu_seqlens, 0.1, protect=strided(protect)),
        ops.segment_threshold(scores, cu_seqlens, 0.1, protect=protect),
    )


@pytest.mark.parametrize("op", ["segment_topk", "segment_threshold"])
def test_two_runs_are_equal_whatever_memory_held(op, native_calls):
    scores, cu_seqlens = torch.randn(5000), cu_seqlens_of([1200, 0, 1800, 2000])
    second = [100, 0, 700, 3] if op == "segment_topk" else 0.5
    assert_repeatable(lambda: getattr(ops, op)(scores, cu_seqlens, second, capacity=3000))


def test_selection_has_no_gradient(native_calls):
    scores = torch.randn(6, requires_grad=True)
    indices, cu_seqlens = ops.segment_topk(scores, cu_seqlens_of([6]), [3])
    assert not indices.requires_grad and not cu_seqlens.requires_grad


@pytest.mark.usefixtures("unforced")
def test_float64_scores_are_compared_in_float64():
    scores = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert ops.segment_topk(scores, cu_seqlens_of([3]), [1])[0].tolist() == [1]


@pytest.mark.parametrize("length", [1 << 15, 100_003])
def test_long_segments_select_as_a_stable_sort_does(length, native_calls):
    scores = torch.randn(length).mul(50).round()
    count = length // 3
    indices, _ = ops.segment_topk(scores, cu_seqlens_of([length]), [count])
    expected = scores.argsort(descending=True, stable=True)[:count].sort().values
    assert torch.equal(indices.long(), expected)
