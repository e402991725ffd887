"""A short walk through every CUDA kernel and its paths, small enough for compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    DTYPES,
    assert_scores_within_rounding,
    column,
    every_second,
    last_query,
    on_cpu,
    on_device,
    raw,
    with_gaps,
)

from pruneops.testing import assert_bitwise_equal, attention_inputs, cu_seqlens_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native")]

# Several small segments, more than a warp and less than a block; one that fills a block's shared memory; one that
# several blocks share.
LENGTHS = {"small": (3, 0, 45, 300), "one_block": (2880,), "several_blocks": (20_011, 5)}


def equal(op, *args):
    assert_bitwise_equal(on_cpu(raw(op, *on_device(args))), raw(op, *args), op)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("ties", [False, True])
def test_selection(lengths, ties):
    total = sum(lengths) + 1
    scores = torch.randn(total).round() if ties else torch.randn(total)
    counts, protect = torch.tensor([n // 2 for n in lengths], dtype=torch.int32), torch.rand(total) < 0.1
    cu_seqlens = cu_seqlens_of(lengths)
    for kept in (None, protect):
        equal("segment_topk", scores, cu_seqlens, counts, total // 2 - 3, kept)
        equal("segment_threshold", scores, cu_seqlens, 0.7, total // 2, counts, kept)
    broken = torch.cat([cu_seqlens[1:] + 1000, cu_seqlens[:1] - 7]).int()
    equal("segment_topk", scores, broken, counts, total)


@pytest.mark.parametrize("width", [8, 7, 1031])
def test_compaction(width):
    tensors = [torch.randn(70, width).bfloat16(), torch.arange(70), torch.rand(70, 3) < 0.5]
    indices = torch.tensor([69, -1, 0, 3, 71, -9, 5, 6, 7, 8, 9, 10], dtype=torch.int32)
    equal("gather_rows", tensors, indices)
    equal("scatter_rows", [x[:12] for x in tensors], indices, 70)
    dense = on_device(tensors[0])
    for view in (with_gaps, every_second):
        ours = raw("gather_rows", [view(dense)], on_device(indices))
        assert_bitwise_equal(ours, raw("gather_rows", [dense], on_device(indices)))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_select_compact(lengths):
    total = sum(lengths)
    tensors = [torch.randn(total, 17), torch.arange(total)]
    counts = torch.tensor([n // 2 for n in lengths], dtype=torch.int32)
    equal("select_compact", torch.randn(total), tensors, cu_seqlens_of(lengths), counts, total // 3)


@pytest.mark.parametrize("call", [last_query, column])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(dtype, call):
    for head_dim in (31, 128):
        inputs = attention_inputs((3, 0, 70), (200, 9, 70), heads=(4, 2), head_dim=head_dim, dtype=dtype, tail=2)
        assert_scores_within_rounding(call, inputs)
        assert_scores_within_rounding(call, inputs, head_reduce="max", query_reduce="max")


def test_kv_limit():
    positions, cu_seqlens = torch.arange(200), cu_seqlens_of([60, 0, 139])
    equal("kv_limit_from_positions", positions // 2, positions, cu_seqlens, cu_seqlens)


def test_last_query_scores_split_over_keys():
    assert_scores_within_rounding(last_query, attention_inputs((1,), (6336,), heads=(4, 1), head_dim=128))
