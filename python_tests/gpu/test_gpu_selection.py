"""On a GPU segment_topk and segment_threshold keep the rows that the CPU kernels keep, index for index."""

from __future__ import annotations

import math
import random

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    Captured,
    assert_equals_cpu_kernel,
    cpu_kernel,
    every_second,
    on_cpu,
    on_device,
    raw,
    with_gaps,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruneops import ops
from pruneops.testing import LENGTHS, assert_bitwise_equal, cu_seqlens_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

SPECIAL = (math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1.0, -1.0, 1e-30, -1e-40)
KINDS = ("distinct", "ties", "equal", "special", "normal")
MORE_LENGTHS = {
    **LENGTHS,
    "more_than_multiprocessors": tuple((i * 37) % 91 for i in range(1000)),
    "tiny512": (34,) * 512,
    "llava": (576, 2880, 640, 2944),
}


def random_scores(total: int, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "distinct":
        scores = torch.randperm(total) - total / 2
    elif kind == "ties":
        scores = torch.randint(-2, 3, (total,)).float()
    elif kind == "equal":
        scores = torch.full((total,), 0.25)
    elif kind == "special":
        scores = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (total,))]
    else:
        scores = torch.randn(total)
    return scores.to(dtype)


def counts_of(lengths: tuple[int, ...], kind: str) -> Tensor:
    rng = random.Random(0)
    rules = {"none": lambda n: 0, "all": lambda n: n, "half": lambda n: n // 2, "one": lambda n: 1}
    values = [rules.get(kind, lambda n: rng.randint(-2, n + 2))(n) for n in lengths]
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_topk_equals_the_cpu_kernel(lengths, kind, dtype):
    total = sum(lengths) + 3
    scores, cu_seqlens, protect = random_scores(total, kind, dtype), cu_seqlens_of(lengths), torch.rand(total) < 0.1
    for keep in ("none", "all", "half", "one", "random"):
        counts = counts_of(lengths, keep)
        assert_equals_cpu_kernel("segment_topk", scores, cu_seqlens, counts, total)
        assert_equals_cpu_kernel("segment_topk", scores, cu_seqlens, counts, total // 3, protect)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, -0.0, 0.3, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_threshold_equals_the_cpu_kernel(lengths, threshold, dtype):
    total = sum(lengths) + 2
    scores, cu_seqlens, protect = (
        random_scores(total, "special", dtype),
        cu_seqlens_of(lengths),
        torch.rand(total) < 0.1,
    )
    for capacity in (0, 5, total + 4):
        for least in (None, counts_of(lengths, "all"), counts_of(lengths, "random")):
            for kept in (None, protect):
                assert_equals_cpu_kernel("segment_threshold", scores, cu_seqlens, threshold, capacity, least, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1023, 4096, 6272, 8193, 16_384, 16_385, 20_011, 50_000, 100_003, 1_000_003])
def test_long_segments_equal_the_cpu_kernel(length, kind):
    """Beyond what one block holds several blocks share a segment; ties are cut in the middle of it."""
    for lengths in ((length,), (length, 7, length // 2)):
        total = sum(lengths)
        scores, cu_seqlens = random_scores(total, kind), cu_seqlens_of(lengths)
        for counts in ((length // 3, 2, length // 2 - 1), (1, 0, 0), (length, 7, 1), (0, 7, 0)):
            keep = torch.tensor(counts[: len(lengths)], dtype=torch.int32)
            assert_equals_cpu_kernel("segment_topk", scores, cu_seqlens, keep, total)
        least = torch.tensor([length // 5, 9, 3][: len(lengths)], dtype=torch.int32)
        assert_equals_cpu_kernel("segment_threshold", scores, cu_seqlens, 0.9, total, least)


LONG_AMONG_SHORT = {
    "two": (50_000, 576),
    "between_empty_ones": (0, 3, 50_000, 0, 20_480, 2880, 0),
    "among_many": (34,) * 300 + (50_000,) + (0, 91) * 100 + (12_289, 9_977) + (34,) * 20,
    "many_long": (10_001, 12_288, 30_000) * 12,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", LONG_AMONG_SHORT.values(), ids=LONG_AMONG_SHORT)
def test_long_segments_among_short_ones_equal_the_cpu_kernel(lengths, kind, dtype):
    total = sum(lengths) + 5
    scores, cu_seqlens, protect = random_scores(total, kind, dtype), cu_seqlens_of(lengths), torch.rand(total) < 0.1
    for keep in ("none", "all", "half", "random"):
        counts = counts_of(lengths, keep)
        for capacity, kept in ((total + 9, None), (total, protect), (total // 3, protect)):
            assert_equals_cpu_kernel("segment_topk", scores, cu_seqlens, counts, capacity, kept)
            assert_equals_cpu_kernel("segment_threshold", scores, cu_seqlens, 0.3, capacity, counts, kept)


def test_a_graph_captured_with_one_long_segment_replays_with_other_lengths():
    """Which segments several blocks share is decided on the device, so a replay may share others, or none."""
    total, capacity = 60_000, 20_000
    scores = torch.randn(total, device=DEVICE)
    cu_seqlens, counts = on_device((cu_seqlens_of((50_000, 10_000)), counts_of((50_000, 10_000), "half")))
    protect = torch.zeros(total, dtype=torch.bool, device=DEVICE)

    def both():
        return (
            raw("segment_topk", scores, cu_seqlens, counts, capacity, protect),
            raw("segment_threshold", scores, cu_seqlens, 1.0, capacity, counts, protect),
            raw("select_compact", scores, [scores], cu_seqlens, counts, capacity, protect),
        )

    captured = Captured(both)
    for lengths in ((50_000, 10_000), (0, 60_000), (30_000, 29_999), (9_000, 9_000), (60_000, 0), (0, 0)):
        scores.copy_(random_scores(total, "ties"))
        cu_seqlens.copy_(cu_seqlens_of(lengths))
        counts.copy_(torch.tensor([n // 7 for n in lengths], dtype=torch.int32))
        protect.copy_(torch.rand(total) < 0.05)
        expected = [
            cpu_kernel("segment_topk", *on_cpu((scores, cu_seqlens, counts)), capacity, protect.cpu()),
            cpu_kernel("segment_threshold", *on_cpu((scores, cu_seqlens)), 1.0, capacity, *on_cpu((counts, protect))),
            cpu_kernel("select_compact", *on_cpu((scores, [scores], cu_seqlens, counts)), capacity, protect.cpu()),
        ]
        assert_bitwise_equal(on_cpu(list(captured.replay())), expected, str(lengths))


@pytest.mark.rehearsed
def test_nan_ranks_below_minus_infinity_and_signed_zeros_are_equal():
    scores = torch.tensor([math.nan, -math.inf, -0.0, 0.0], device=DEVICE)
    cu_seqlens = cu_seqlens_of([4]).to(DEVICE)
    order = [ops.segment_topk(scores, cu_seqlens, [k])[0].tolist() for k in range(5)]
    assert order == [[], [2], [2, 3], [1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.rehearsed
def test_protected_rows_stay_and_do_not_count():
    scores = torch.tensor([9.0, 1.0, 2.0, 3.0, 0.0, math.nan], device=DEVICE)
    protect = torch.tensor([True, False, False, False, False, True], device=DEVICE)
    cu_seqlens = cu_seqlens_of([4, 2]).to(DEVICE)
    indices, kept = ops.segment_topk(scores, cu_seqlens, [1, 0], protect=protect, protected_counts=[1, 1])
    assert indices.tolist() == [0, 3, 5] and kept.tolist() == [0, 2, 3]


MALFORMED = {
    "decreasing": (0, 9, 4, 20),
    "past_the_end": (0, 9, 40, 41),
    "negative": (-5, -1, 8, 12),
    "not_from_zero": (3, 9, 9, 20),
    "extremes": (-(2**31), 2**31 - 1, 0, 2**31 - 1),
}


@pytest.mark.parametrize("boundaries", MALFORMED.values(), ids=MALFORMED)
def test_boundaries_on_a_device_are_clamped_as_on_the_cpu(boundaries):
    scores, cu_seqlens = torch.randn(20), torch.tensor(boundaries, dtype=torch.int32)
    for values in ((2, 2, 2), (2**31 - 1, -(2**31), 5)):
        counts = torch.tensor(values, dtype=torch.int32)
        for capacity in (0, 3, 30):
            assert_equals_cpu_kernel("segment_topk", scores, cu_seqlens, counts, capacity)
            assert_equals_cpu_kernel("segment_threshold", scores, cu_seqlens, 0.1, capacity, counts)


def test_strided_inputs_give_the_same_result():
    lengths = (150, 0, 3000, 25, 20_000)
    scores, cu_seqlens = on_device((torch.randn(sum(lengths)), cu_seqlens_of(lengths)))
    counts, protect = counts_of(lengths, "half").to(DEVICE), torch.rand(sum(lengths), device=DEVICE) < 0.2
    expected = raw("segment_topk", scores, cu_seqlens, counts, 2000, protect)
    threshold = raw("segment_threshold", scores, cu_seqlens, 0.1, 2000, counts, protect)
    for view in (every_second, with_gaps):
        ours = raw("segment_topk", view(scores), view(cu_seqlens), view(counts), 2000, view(protect))
        assert_bitwise_equal(ours, expected)
        ours = raw("segment_threshold", view(scores), view(cu_seqlens), 0.1, 2000, view(counts), view(protect))
        assert_bitwise_equal(ours, threshold)


SEGMENT = st.integers(0, 300) | st.integers(1000, 9000)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(SEGMENT, max_size=12),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    protected=st.sampled_from((None, 0.05, 0.9)),
    room=st.floats(0.0, 1.2),
    threshold=st.floats(-2, 2, width=32),
)
def test_any_ragged_batch_equals_the_cpu_kernel(lengths, seed, kind, protected, room, threshold):
    torch.manual_seed(seed)
    total = sum(lengths) + seed % 3
    scores, cu_seqlens = random_scores(total, kind), cu_seqlens_of(lengths)
    counts = torch.tensor([random.Random(seed + n).randint(-1, n + 1) for n in lengths], dtype=torch.int32)
    protect = None if protected is None else torch.rand(total) < protected
    capacity = int(room * total)
    for op, args in (
        ("segment_topk", (scores, cu_seqlens, counts, capacity, protect)),
        ("segment_threshold", (scores, cu_seqlens, threshold, capacity, counts, protect)),
    ):
        assert_bitwise_equal(on_cpu(raw(op, *on_device(args))), cpu_kernel(op, *args), op)
