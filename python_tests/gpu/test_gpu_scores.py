"""On a GPU scores are within rounding of the float64 oracle and repeat to the bit, and kv_limit is the CPU kernel's."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    assert_equals_cpu_kernel,
    assert_scores_within_rounding,
    column,
    cpu_kernel,
    every_second,
    head_major,
    inputs_on_device,
    last_query,
    on_cpu,
    on_device,
    raw,
    with_gaps,
)

from pruneops import ops, reference
from pruneops.testing import LENGTHS, AttentionInputs, assert_bitwise_equal, attention_inputs, cu_seqlens_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

CALLS = pytest.mark.parametrize("call", [last_query, column])
MORE_LENGTHS = {**LENGTHS, "tiny512": (34,) * 512}
REDUCTIONS = list(itertools.product(("mean", "sum", "max"), repeat=2))


@CALLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_ragged_batches(lengths, dtype, call):
    assert_scores_within_rounding(call, attention_inputs(lengths, dtype=dtype))


@CALLS
@pytest.mark.parametrize(("head_reduce", "query_reduce"), REDUCTIONS)
def test_reductions(head_reduce, query_reduce, call):
    options = {"head_reduce": head_reduce, "query_reduce": query_reduce}
    lengths_q, lengths_k = (5, 0, 1, 33, 3, 4), (9, 40, 70, 33, 0, 2)
    assert_scores_within_rounding(call, attention_inputs(lengths_q, lengths_k, tail=2), **options)
    assert_scores_within_rounding(call, attention_inputs((130,), dtype=torch.bfloat16, heads=(7, 1)), **options)


@CALLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 16, 31, 64, 80, 96, 128, 200, 256])
def test_head_dims(head_dim, dtype, call):
    inputs = attention_inputs((5, 2), (70, 9), heads=(2, 1), head_dim=head_dim, dtype=dtype)
    assert_scores_within_rounding(call, inputs)


@CALLS
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 1), (8, 1), (8, 2), (28, 4), (32, 32)], ids=str)
def test_grouped_queries(heads, call):
    assert_scores_within_rounding(call, attention_inputs((3, 0, 66), heads=heads, head_dim=24))


@pytest.mark.parametrize("length", [1, 15, 17, 31, 33, 63, 64, 65, 127, 129, 257])
def test_lengths_around_tile_sizes(length):
    assert_scores_within_rounding(column, attention_inputs((length,), heads=(2, 2)))
    assert_scores_within_rounding(column, attention_inputs((3,), (length,), heads=(2, 2)), causal=False)
    assert_scores_within_rounding(last_query, attention_inputs((1,), (length,), heads=(2, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_row_against_the_keys_of_a_whole_image(dtype):
    inputs = attention_inputs((1, 1, 2), (2880, 577, 6336), heads=(8, 4), head_dim=128, dtype=dtype)
    assert_scores_within_rounding(last_query, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_query_rows_of_a_whole_image(dtype):
    inputs = attention_inputs((640, 353), heads=(4, 2), head_dim=128, dtype=dtype)
    assert_scores_within_rounding(column, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_column_scores_with_the_lse_of_attention(causal, dtype):
    inputs = attention_inputs((40, 0, 9, 100), (70, 3, 5, 100), dtype=dtype, head_dim=32, tail=2)
    lse = reference.varlen_attention(*inputs.args, causal=causal, return_lse=True)[1]
    for query_reduce in ("sum", "max"):
        options = {"causal": causal, "softmax_lse": lse, "query_reduce": query_reduce}
        assert_scores_within_rounding(column, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_limit_of_chosen_rows(dtype):
    inputs = attention_inputs((4, 0, 3, 1), (70, 3, 9, 0), dtype=dtype, tail=1)
    limit = torch.tensor([-4, 0, 33, 1000, 2, 9, 2**31 - 1, 5, 7], dtype=torch.int32)
    for query_reduce in ("mean", "sum", "max"):
        assert_scores_within_rounding(last_query, inputs, kv_limit=limit, query_reduce=query_reduce)


@pytest.mark.rehearsed
@CALLS
def test_rows_past_the_last_segment_score_zero_whatever_they_hold(call):
    inputs = inputs_on_device(attention_inputs((20, 30), tail=5))
    inputs.q[50:], inputs.k[50:] = torch.nan, torch.nan
    scores = call(ops, inputs)
    assert (scores[50:] == 0).all() and scores.isfinite().all()


@CALLS
def test_large_logits_do_not_overflow(call):
    inputs = attention_inputs((50, 70), head_dim=64)
    inputs = AttentionInputs(inputs.q * 300, inputs.k * 300, inputs.v, *inputs.boundaries)
    assert assert_scores_within_rounding(call, inputs).isfinite().all()


@CALLS
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_softmax_scale(scale, call):
    assert_scores_within_rounding(call, attention_inputs((33, 5)), softmax_scale=scale)


@CALLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [with_gaps, head_major, every_second], ids=lambda view: view.__name__)
def test_strided_inputs(view, dtype, call):
    """Rows may start off a 16-byte boundary, which may change the order of a sum but not its rounding."""
    assert_scores_within_rounding(call, attention_inputs((40, 3, 70), dtype=dtype, head_dim=24), view)


@pytest.mark.parametrize("boundaries", [(0, 9, 4, 20), (0, 9, 40, 41), (-5, -1, 8, 12)], ids=str)
def test_boundaries_on_a_device_are_clamped_as_on_the_cpu(boundaries):
    q, k = torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    for op, args in (
        ("last_query_scores", (q, k, cu_seqlens, cu_seqlens, 0.3, "mean", "mean")),
        ("column_scores", (q, k, cu_seqlens, cu_seqlens, 20, 20, True, 0.3, "sum", "mean")),
    ):
        torch.testing.assert_close(on_cpu(raw(op, *on_device(args))), cpu_kernel(op, *args), rtol=1e-5, atol=1e-5)


def test_scores_of_a_segment_sum_to_its_number_of_rows():
    scores = column(ops, inputs_on_device(attention_inputs((300, 7))))
    assert scores.device.type == DEVICE.type
    torch.testing.assert_close(scores[:300].sum().cpu(), torch.tensor(300.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores[300:].sum().cpu(), torch.tensor(7.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_kv_limit_equals_the_cpu_kernel(lengths, dtype):
    lengths_k = [n // 2 + 1 for n in lengths]
    positions_q = torch.randint(-3, 200, (sum(lengths) + 2,)).to(dtype)
    segments = [torch.randint(0, 150, (n,)).sort().values for n in lengths_k]
    positions_k = torch.cat([torch.zeros(0, dtype=torch.int64), *segments, torch.zeros(1)]).to(dtype)
    args = (positions_q, positions_k, cu_seqlens_of(lengths), cu_seqlens_of(lengths_k))
    ours = assert_equals_cpu_kernel("kv_limit_from_positions", *args)
    spaced = [every_second(x) for x in on_device(args)]
    assert_bitwise_equal(raw("kv_limit_from_positions", *spaced), ours)


@pytest.mark.parametrize("boundaries", [(0, 9, 4, 20), (0, 9, 40, 41), (-5, -1, 8, 12)], ids=str)
def test_kv_limit_clamps_boundaries_as_on_the_cpu(boundaries):
    positions, cu_seqlens = torch.arange(20), torch.tensor(boundaries, dtype=torch.int32)
    assert_equals_cpu_kernel("kv_limit_from_positions", positions, positions, cu_seqlens, cu_seqlens)


@pytest.mark.rehearsed
def test_kv_limit_of_int64_positions_beyond_int32():
    far = 2**40
    positions_k = torch.tensor([0, far, far + 2], device=DEVICE)
    positions_q = torch.tensor([-1, far - 1, far, far + 1, far + 2], device=DEVICE)
    boundaries = on_device((cu_seqlens_of([5]), cu_seqlens_of([3])))
    assert ops.kv_limit_from_positions(positions_q, positions_k, *boundaries).tolist() == [0, 1, 2, 2, 3]
