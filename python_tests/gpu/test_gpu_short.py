"""A short walk through every kernel and its paths, small enough for compute-sanitizer."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_support import (
    DTYPES,
    assert_density_peaks,
    assert_policy_within_rounding,
    assert_scores_within_rounding,
    column,
    cpu_kernel,
    every_second,
    first_rehearsed,
    last_query,
    on_cpu,
    on_device,
    raw,
    with_gaps,
)

from pruneops.ops import DPCKNNResult
from pruneops.testing import assert_bitwise_equal, attention_inputs, cu_seqlens_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

# Several small segments, more than a warp and less than a block; one that fills a block's shared memory; one that
# several blocks share.
LENGTHS = {"small": (3, 0, 45, 300), "one_block": (2880,), "several_blocks": (20_011, 5)}
SEGMENTS = pytest.mark.parametrize("lengths", first_rehearsed(LENGTHS.values()), ids=LENGTHS)


def equal(op, *args):
    assert_bitwise_equal(on_cpu(raw(op, *on_device(args))), cpu_kernel(op, *args), op)


@SEGMENTS
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


@pytest.mark.parametrize("width", first_rehearsed([8, 7, 1031]))
def test_compaction(width):
    tensors = [torch.randn(70, width).bfloat16(), torch.arange(70), torch.rand(70, 3) < 0.5]
    indices = torch.tensor([69, -1, 0, 3, 71, -9, 5, 6, 7, 8, 9, 10], dtype=torch.int32)
    equal("gather_rows", tensors, indices)
    equal("scatter_rows", [x[:12] for x in tensors], indices, 70)
    dense = on_device(tensors[0])
    for view in (with_gaps, every_second):
        ours = raw("gather_rows", [view(dense)], on_device(indices))
        assert_bitwise_equal(ours, raw("gather_rows", [dense], on_device(indices)))


@SEGMENTS
def test_select_compact(lengths):
    total = sum(lengths)
    tensors = [torch.randn(total, 17), torch.arange(total)]
    counts = torch.tensor([n // 2 for n in lengths], dtype=torch.int32)
    equal("select_compact", torch.randn(total), tensors, cu_seqlens_of(lengths), counts, total // 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", first_rehearsed([24, 31, 2064]))
def test_weighted_rows(columns, dtype):
    x, residual, branch = (torch.randn(n, columns).to(dtype) for n in (40, 12, 12))
    weight, bias, target = x[0].clone(), x[1, :1].clone(), torch.arange(40) % 3 > 0
    indices = torch.tensor([39, -1, 0, 3, 71, -9, 5, 6, 7, 8, 8, 10], dtype=torch.int32)
    dout = torch.randn(40)

    def everything(run, x, residual, branch, weight, bias, target, indices, dout):
        logits, weights = run("router_weights", x, weight, bias, target, "sigmoid", 0.2, 1.0)
        return (
            *(logits.nan_to_num(neginf=0.0), weights),
            run("scatter_scaled", x, residual, branch, weights, indices),
            *run("scatter_scaled_backward", x, x, branch, weights, indices),
            *run("router_weights_backward", dout, logits, x, weight, target, "sigmoid", 0.2),
        )

    args = (x, residual, branch, weight, bias, target, indices, dout)
    for ours, expected in zip(on_cpu(everything(raw, *on_device(args))), everything(cpu_kernel, *args), strict=True):
        scale = expected.float().abs().max()
        torch.testing.assert_close(ours.float() / scale, expected.float() / scale, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("call", [last_query, column])
@pytest.mark.parametrize("dtype", first_rehearsed(DTYPES), ids=str)
def test_scores(dtype, call):
    for head_dim in (31, 128):
        inputs = attention_inputs((3, 0, 70), (200, 9, 70), heads=(4, 2), head_dim=head_dim, dtype=dtype, tail=2)
        assert_scores_within_rounding(call, inputs)
        assert_scores_within_rounding(call, inputs, head_reduce="max", query_reduce="max")


@pytest.mark.parametrize("dtype", first_rehearsed(DTYPES), ids=str)
@pytest.mark.parametrize("head_dim", [31, 64, 128])
def test_policy_attention(head_dim, dtype):
    inputs = attention_inputs((3, 0, 70), heads=(4, 2), head_dim=head_dim, dtype=dtype, tail=2)
    assert_policy_within_rounding(inputs, torch.rand(75).round())


@pytest.mark.rehearsed
def test_kv_limit():
    positions, cu_seqlens = torch.arange(200), cu_seqlens_of([60, 0, 139])
    equal("kv_limit_from_positions", positions // 2, positions, cu_seqlens, cu_seqlens)


def test_last_query_scores_split_over_keys():
    assert_scores_within_rounding(last_query, attention_inputs((1,), (6336,), heads=(4, 1), head_dim=128))


# The distances of segments up to 4096 rows are stored, those of longer ones computed again in each pass.
@pytest.mark.parametrize("case", first_rehearsed(itertools.product((150, 5000), DTYPES)), ids=str)
def test_clustering(case):
    longest, dtype = case
    x, cu_seqlens = torch.randn(5002, 33).to(dtype), cu_seqlens_of([3, 0, 150, 20])
    x[100:150] += 50.0
    for k, noise in ((5, None), (20, torch.rand(5002))):
        args = (x, cu_seqlens, torch.tensor([2, 1, 70, 3], dtype=torch.int32), k, longest, 75, noise)
        ids, centers, ends, *numbers = on_cpu(raw("dpc_knn", *on_device(args)))
        assert_density_peaks(DPCKNNResult(ids, centers, *numbers, ends), x, cu_seqlens, [2, 1, 70, 3], k, noise)


@pytest.mark.parametrize("channels", [8, 7, 1031])
def test_means_of_clusters(channels):
    x, ids = torch.randn(1500, channels).bfloat16(), torch.randint(-1, 5, (1500,), dtype=torch.int32)
    counts = torch.tensor([3, -1, 9], dtype=torch.int32)
    for capacity in (12, 14, 5):
        equal("merge_mean", x, ids, cu_seqlens_of([40, 0, 1450]), counts, capacity)
        equal("merge_mean", x, ids, cu_seqlens_of([40, 0, 1450]), counts, capacity, 0.5 ** (ids % 4).float())


@pytest.mark.parametrize("channels", first_rehearsed([8, 7, 1031]))
def test_means_over_frames(channels):
    x, counts = torch.randn(400, channels).bfloat16(), torch.tensor([3, -1, 9], dtype=torch.int32)
    for capacity in (12, 14, 5):
        args = x, cu_seqlens_of([40, 0, 350]), counts, capacity
        means, similarity = on_cpu(raw("position_means", *on_device(args)))
        expected = cpu_kernel("position_means", *args)
        assert_bitwise_equal(means, expected[0])
        torch.testing.assert_close(similarity, expected[1], rtol=1e-6, atol=3e-7)
