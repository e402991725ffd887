"""last_query_scores, column_scores and kv_limit_from_positions equal their definitions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import (
    LENGTHS,
    PEER_ORDERS,
    AttentionInputs,
    assert_bitwise_equal,
    assert_repeatable,
    assert_within_rounding,
    attention_inputs,
    cu_seqlens_of,
    peer_attention,
    peer_scores,
    strided,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = list(itertools.product(("mean", "sum", "max"), repeat=2))


def last_query(module: Any, inputs: AttentionInputs, **options: Any) -> Tensor:
    return module.last_query_scores(inputs.q, inputs.k, inputs.cu_seqlens_q, inputs.cu_seqlens_k, **options)


def column(module: Any, inputs: AttentionInputs, **options: Any) -> Tensor:
    return module.column_scores(inputs.q, inputs.k, *inputs.boundaries, **options)


def softmax_condition(inputs: AttentionInputs, **options: Any) -> float:
    """A probability is exp(logit - lse): rounding the LSE moves it by as much as the LSE is large."""
    options = {name: options[name] for name in ("causal", "softmax_scale", "kv_limit") if name in options}
    lse = peer_attention(inputs.to(torch.float64), **options)[1]
    return 1.0 + max([0.0, *lse[lse.isfinite()].abs().tolist()])


def check_scores(call: Any, inputs: AttentionInputs, **options: Any) -> Tensor:
    """Compares with the float64 oracle; the peer is plain torch in float32, the dtype of all scores."""
    ours = call(ops, inputs, **options)
    assert ours.dtype == torch.float32 and ours.shape == (inputs.k.shape[0],)
    oracle = call(reference, inputs.to(torch.float64), **options)
    if call is last_query:
        options = {"causal": False, "query_reduce": "mean", **options}
    options.pop("softmax_lse", None)
    peers = [peer_scores(inputs.to(torch.float32), order=order, **options) for order in PEER_ORDERS]
    condition = softmax_condition(inputs, **options)
    assert_within_rounding(ours, peers, oracle, condition=condition, name="scores")
    return ours


CALLS = pytest.mark.parametrize("call", [last_query, column])


@CALLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_ragged_batches(lengths, dtype, call, native_calls):
    check_scores(call, attention_inputs(lengths, dtype=dtype))


@CALLS
@pytest.mark.parametrize(("head_reduce", "query_reduce"), REDUCTIONS)
def test_reductions(head_reduce, query_reduce, call, native_calls):
    options = {"head_reduce": head_reduce, "query_reduce": query_reduce}
    lengths_q, lengths_k = (5, 0, 1, 33, 3, 4), (9, 40, 70, 33, 0, 2)
    check_scores(call, attention_inputs(lengths_q, lengths_k, tail=2), **options)
    check_scores(call, attention_inputs((130,), dtype=torch.bfloat16, heads=(7, 1)), **options)


@CALLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 16, 31, 64, 80, 96, 128, 200, 256])
def test_head_dims(head_dim, dtype, call, native_calls):
    inputs = attention_inputs((5, 2), (70, 9), heads=(2, 1), head_dim=head_dim, dtype=dtype)
    check_scores(call, inputs)


@CALLS
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 1), (8, 1), (8, 2), (8, 8)], ids=str)
def test_grouped_queries(heads, call, native_calls):
    check_scores(call, attention_inputs((3, 0, 66), heads=heads, head_dim=24))


@pytest.mark.parametrize("length", [15, 17, 63, 64, 65, 129, 257])
def test_lengths_around_tile_sizes(length, native_calls):
    check_scores(column, attention_inputs((length,), heads=(2, 2)))
    check_scores(column, attention_inputs((3,), (length,), heads=(2, 2)), causal=False)
    check_scores(last_query, attention_inputs((1,), (length,), heads=(2, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_lse", [True, False])
def test_column_scores_with_and_without_the_lse_of_attention(with_lse, causal, dtype, native_calls):
    inputs = attention_inputs((40, 0, 9, 100), (70, 3, 5, 100), dtype=dtype, head_dim=32, tail=2)
    lse = ops.varlen_attention(*inputs.args, causal=causal, return_lse=True)[1] if with_lse else None
    for query_reduce in ("sum", "max"):
        check_scores(column, inputs, causal=causal, softmax_lse=lse, query_reduce=query_reduce)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_limit_of_chosen_rows(dtype, native_calls):
    inputs = attention_inputs((4, 0, 3, 1), (70, 3, 9, 0), dtype=dtype, tail=1)
    limit = torch.tensor([-4, 0, 33, 1000, 2, 9, 2**31 - 1, 5, 7], dtype=torch.int32)
    for query_reduce in ("mean", "sum", "max"):
        check_scores(last_query, inputs, kv_limit=limit, query_reduce=query_reduce)


def test_column_scores_are_the_last_query_scores_of_all_rows(native_calls):
    inputs = attention_inputs((30, 7))
    positions = torch.cat([torch.arange(30), torch.arange(7)])
    limit = ops.kv_limit_from_positions(positions, positions, inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    torch.testing.assert_close(column(ops, inputs, query_reduce="mean"), last_query(ops, inputs, kv_limit=limit))


def test_scores_of_a_segment_sum_to_its_number_of_rows(native_calls):
    inputs = attention_inputs((30, 7))
    scores = column(ops, inputs)
    torch.testing.assert_close(scores[:30].sum(), torch.tensor(30.0))
    torch.testing.assert_close(scores[30:].sum(), torch.tensor(7.0))


@CALLS
def test_rows_past_the_last_segment_score_zero_whatever_they_hold(call, native_calls):
    inputs = attention_inputs((20, 30), tail=5)
    inputs.q[50:], inputs.k[50:] = torch.nan, torch.nan
    scores = call(ops, inputs)
    assert (scores[50:] == 0).all() and scores.isfinite().all()


@CALLS
def test_large_logits_do_not_overflow(call, native_calls):
    inputs = attention_inputs((50, 70), head_dim=64)
    inputs = AttentionInputs(inputs.q * 300, inputs.k * 300, inputs.v, *inputs.boundaries)
    assert check_scores(call, inputs).isfinite().all()


@CALLS
def test_softmax_scale(call, native_calls):
    for scale in (0.0, 1.0, -0.3):
        check_scores(call, attention_inputs((33, 5)), softmax_scale=scale)


@CALLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_give_the_same_result(dtype, call, native_calls):
    inputs = attention_inputs((40, 3, 70), dtype=dtype, head_dim=24)
    expected = call(ops, inputs)
    views = (
        strided,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
    )
    for view in views:
        viewed = AttentionInputs(view(inputs.q), view(inputs.k), inputs.v, *inputs.boundaries)
        assert_bitwise_equal(call(ops, viewed), expected)


@CALLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_whatever_memory_held(dtype, call, native_calls):
    inputs = attention_inputs((200, 0, 130), dtype=dtype, head_dim=64, tail=9)
    assert_repeatable(lambda: call(ops, inputs))


@CALLS
def test_scores_have_no_gradient(call, native_calls):
    inputs = attention_inputs((9,))
    inputs.q.requires_grad_()
    assert not call(ops, inputs).requires_grad


@CALLS
@pytest.mark.usefixtures("unforced")
def test_float64_runs_on_the_reference(call):
    inputs = attention_inputs((9,), dtype=torch.float64)
    with backends.record_calls() as calls:
        assert call(ops, inputs).dtype == torch.float64
    assert [backend for _, backend in calls] == ["reference"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_kv_limit_counts_the_keys_up_to_each_position(lengths, dtype, native_calls):
    cu_seqlens_q = cu_seqlens_of(lengths)
    lengths_k = [n // 2 + 1 for n in lengths]
    positions_q = torch.randint(-3, 200, (sum(lengths) + 2,)).to(dtype)
    segments = [torch.randint(0, 150, (n,)).sort().values for n in lengths_k]
    positions_k = torch.cat([torch.zeros(0, dtype=torch.int64), *segments, torch.zeros(1)]).to(dtype)
    arguments = (positions_q, positions_k, cu_seqlens_q, cu_seqlens_of(lengths_k))
    ours = ops.kv_limit_from_positions(*arguments)
    assert_bitwise_equal(ours, reference.kv_limit_from_positions(*arguments))
    assert (ours[sum(lengths) :] == 0).all()


def test_kv_limit_of_int64_positions_beyond_int32(native_calls):
    far = 2**40
    positions_k = torch.tensor([0, far, far + 2])
    positions_q = torch.tensor([-1, far - 1, far, far + 1, far + 2])
    limit = ops.kv_limit_from_positions(positions_q, positions_k, cu_seqlens_of([5]), cu_seqlens_of([3]))
    assert limit.tolist() == [0, 1, 2, 2, 3]


def test_kv_limit_refuses_positions_that_are_not_ascending():
    ascending = torch.tensor([3, 4, 0, 1])
    cu_seqlens = cu_seqlens_of([2, 2])
    ops.kv_limit_from_positions(ascending, ascending, cu_seqlens, cu_seqlens)
    with pytest.raises(ValueError, match="position_ids_k must be ascending .* got 4 then 3 at row 1"):
        ops.kv_limit_from_positions(ascending, torch.tensor([4, 3, 0, 1]), cu_seqlens, cu_seqlens)


def test_kv_limit_is_the_same_for_strided_positions_and_repeats(native_calls):
    positions = torch.arange(2000)
    cu_seqlens = cu_seqlens_of([700, 0, 1300])
    expected = ops.kv_limit_from_positions(positions, positions, cu_seqlens, cu_seqlens)
    spaced = torch.stack([positions, positions], dim=1)[:, 0]
    assert_bitwise_equal(ops.kv_limit_from_positions(spaced, spaced, cu_seqlens, cu_seqlens), expected)
    assert_repeatable(lambda: ops.kv_limit_from_positions(positions, positions, cu_seqlens, cu_seqlens))
