"""Selections do not depend on the sizes that their kernels are launched with, whatever boundaries a device holds."""

from __future__ import annotations

import pytest
import torch

from pruneops import ops, reference
from pruneops.testing import assert_bitwise_equal, assert_repeatable, cu_seqlens_of
from pruneops.triton import tuning
from pruneops.triton.selection import SELECT
from pruneops.triton.tuning import Config

RAW = torch.ops.pruneops_triton
SPECIAL = (torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, 1.0, -1.0, 1e-30, -1e-40)


def random_scores(total: int) -> torch.Tensor:
    """Many ties, and everything that a float can be."""
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (total,))]
    return torch.where(torch.rand(total) < 0.3, special, torch.randn(total).round(decimals=1))


def check(lengths: tuple[int, ...], capacity: int | None = None) -> None:
    """Both selections against the reference, with counts from below none to above all of a segment."""
    total = sum(lengths) + 3
    capacity = total if capacity is None else capacity
    scores, cu_seqlens, protect = random_scores(total), cu_seqlens_of(lengths), torch.rand(total) < 0.2
    counts = torch.tensor([(n // 3, n, -2, n + 5, 1)[b % 5] for b, n in enumerate(lengths)], dtype=torch.int32)
    ours = ops.segment_topk(scores, cu_seqlens, counts, capacity=capacity)
    assert_bitwise_equal(ours, reference.segment_topk(scores, cu_seqlens, counts, capacity=capacity))
    options = {"min_keep": counts, "capacity": capacity, "protect": protect}
    ours = ops.segment_threshold(scores, cu_seqlens, 0.9, **options)
    assert_bitwise_equal(ours, reference.segment_threshold(scores, cu_seqlens, 0.9, **options))


SMALL = [
    Config({"GROUP": 1, "SHORT": 16, "STEP": 32}),
    Config({"GROUP": 4, "SHORT": 16, "STEP": 32}),
    Config({"GROUP": 2, "SHORT": 32, "STEP": 16}),
]


@pytest.mark.parametrize("config", SMALL, ids=["short", "group", "step is shorter"])
def test_segments_of_all_lengths_around_the_sizes(config):
    with tuning.use(SELECT, config):
        check((17, 15, 0, 33, 16, 3, 40))
        check((33, 17, 40), 25)


@pytest.mark.parametrize("length", [16, 17, 40])
def test_one_segment_alone_around_the_sizes(length):
    with tuning.use(SELECT, SMALL[0]):
        check((length,), 30)


@pytest.mark.parametrize(
    ("shape_class", "lengths"),
    [
        ("tiny", (30,) * 15 + (0, 300) + (34,) * 3),
        ("short", (200, 700, 90)),
        ("middle", (640, 2100, 10)),
        ("long", (5000, 1300)),
    ],
    ids=str,
)
def test_configurations_of_gpus(shape_class, lengths):
    for config in SELECT.candidates(shape_class):
        with tuning.use(SELECT, config):
            check(lengths)


def test_a_long_segment_among_short_ones():
    check((7, 20_011, 0, 34))


def test_more_segments_than_boundaries_are_read_at_once():
    lengths = tuple((b * 37) % 4 for b in range(600))
    check(lengths, sum(lengths) // 2)
    positions, cu_seqlens = torch.randint(0, 9, (sum(lengths),)).sort().values, cu_seqlens_of(lengths)
    ours = ops.kv_limit_from_positions(positions, positions, cu_seqlens, cu_seqlens)
    assert_bitwise_equal(ours, reference.kv_limit_from_positions(positions, positions, cu_seqlens, cu_seqlens))


@pytest.mark.parametrize("lengths", [(5,), (5, 0, 9) * 30], ids=["one program", "two"])
def test_a_long_tail_is_all_minus_one(lengths):
    scores, cu_seqlens = torch.randn(sum(lengths)), cu_seqlens_of(lengths)
    ours = assert_repeatable(lambda: ops.segment_threshold(scores, cu_seqlens, 0.0, capacity=5000))
    assert_bitwise_equal(ours, reference.segment_threshold(scores, cu_seqlens, 0.0, capacity=5000))


@pytest.mark.parametrize("threshold", [1e300, -1e300, 3.4028235677973366e38, 0.1, 1e-46, -1e-46, torch.nan])
def test_thresholds_are_rounded_to_float32(threshold):
    scores = torch.tensor([torch.inf, -torch.inf, 3.4028235e38, -3.4028235e38, 0.1, 1e-45, 0.0, -0.0, -1e-45])
    cu_seqlens = cu_seqlens_of((9,))
    ours = RAW.segment_threshold(scores, cu_seqlens, threshold, -1)
    assert_bitwise_equal(ours, reference.segment_threshold(scores, cu_seqlens, threshold))


MALFORMED = {
    "decreasing": (0, 9, 4, 20),
    "past_the_end": (0, 9, 40, 41),
    "negative": (-5, -1, 8, 12),
    "not_from_zero": (3, 9, 9, 20),
    "extremes": (-(2**31), 2**31 - 1, 0, 2**31 - 1),
}


@pytest.mark.parametrize("boundaries", MALFORMED.values(), ids=MALFORMED)
def test_boundaries_of_a_device_are_clamped(boundaries):
    scores, cu_seqlens = torch.randn(20), torch.tensor(boundaries, dtype=torch.int32)
    for counts in ((2, 2, 2), (2**31 - 1, -(2**31), 5)):
        counts = torch.tensor(counts, dtype=torch.int32)
        for config in (SELECT.interpreted, SMALL[0]):
            with tuning.use(SELECT, config):
                ours = RAW.segment_threshold(scores, cu_seqlens, 0.1, 12, counts)
            expected = reference.segment_threshold(scores, cu_seqlens, 0.1, min_keep=counts, capacity=12)
            assert_bitwise_equal(ours, expected)
    positions = torch.arange(20)
    ours = RAW.kv_limit_from_positions(positions, positions, cu_seqlens, cu_seqlens)
    assert_bitwise_equal(ours, reference.kv_limit_from_positions(positions, positions, cu_seqlens, cu_seqlens))


def test_key_positions_that_are_not_ascending_are_read_in_bounds():
    positions, cu_seqlens = torch.randint(0, 50, (300,)), cu_seqlens_of((100, 0, 200))
    ours = RAW.kv_limit_from_positions(positions, positions, cu_seqlens, cu_seqlens)
    assert ((ours >= 0) & (ours <= torch.tensor((100,) * 100 + (200,) * 200))).all()
