"""varlen_attention equals its definition to rounding, for every shape, mask, layout and dtype it accepts."""

from __future__ import annotations

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
    strided,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    40,
    63,
    64,
    72,
    80,
    96,
    100,
    127,
    128,
    160,
    200,
    255,
    256,
)
GROUPS = ((1, 1), (3, 3), (4, 1), (7, 1), (8, 1), (8, 2), (14, 2), (8, 8))


def check_forward(inputs: AttentionInputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Compares ``out`` and ``softmax_lse`` with the float64 oracle by the tolerance rule."""
    out, lse = ops.varlen_attention(*inputs.args, return_lse=True, **options)
    assert out.dtype == inputs.q.dtype and lse.dtype == torch.float32
    oracle = reference.varlen_attention(*inputs.to(torch.float64).args, return_lse=True, **options)
    wide = [peer_attention(inputs.to(torch.float32), order=order, **options) for order in PEER_ORDERS]
    peers = wide if out.dtype == torch.float32 else [peer_attention(inputs, **options)]
    assert_within_rounding(out, [peer[0] for peer in peers], oracle[0], name="out")
    assert_within_rounding(lse, [peer[1] for peer in wide], oracle[1], name="softmax_lse")
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_ragged_batches(lengths, causal, dtype, native_calls):
    check_forward(attention_inputs(lengths, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype, native_calls):
    check_forward(attention_inputs((5, 70), heads=(2, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_grouped_queries(heads, dtype, native_calls):
    check_forward(attention_inputs((3, 0, 66), heads=heads, head_dim=24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_keys_of_different_lengths(causal, dtype, native_calls):
    """Continuation chunks, more queries than keys, segments without queries or without keys."""
    lengths_q, lengths_k = (5, 4, 0, 3, 64, 1, 70, 1), (9, 0, 6, 1, 130, 200, 20, 1)
    out, lse = check_forward(attention_inputs(lengths_q, lengths_k, head_dim=32, dtype=dtype, tail=2), causal=causal)
    assert (out[5:9] == 0).all() and (lse[:, 5:9] == -torch.inf).all()


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 400])
def test_lengths_around_tile_sizes(length, native_calls):
    check_forward(attention_inputs((length,), heads=(2, 2), head_dim=16))
    check_forward(attention_inputs((3,), (length,), heads=(2, 2), head_dim=16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_limit_replaces_causal_and_is_clamped(dtype, native_calls):
    inputs = attention_inputs((40, 0, 9, 100), (70, 3, 0, 100), head_dim=20, dtype=dtype, tail=3)
    limit = torch.randint(-5, 110, (inputs.q.shape[0],), dtype=torch.int32)
    limit[0], limit[1] = -(2**31), 2**31 - 1
    for causal in (True, False):
        out, lse = check_forward(inputs, kv_limit=limit, causal=causal)
        assert (lse[:, 0] == -torch.inf).all() and (out[0] == 0).all()


def test_causal_is_the_kv_limit_of_its_own_positions(native_calls):
    inputs = attention_inputs((30, 40))
    positions = torch.cat([torch.arange(30), torch.arange(40)])
    limit = ops.kv_limit_from_positions(positions, positions, inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    expected = ops.varlen_attention(*inputs.args, causal=True)
    assert_bitwise_equal(ops.varlen_attention(*inputs.args, kv_limit=limit), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limited", [False, True])
def test_cache_slots_equal_packed_keys_and_hide_what_lies_past_them(limited, dtype, native_calls):
    used, capacity = (7, 0, 40, 65), 65
    inputs = attention_inputs((3, 2, 40, 1), used, dtype=dtype, head_dim=32)
    slots = [torch.full((4, capacity, 2, 32), torch.nan, dtype=dtype) for _ in range(2)]
    start = 0
    for b, length in enumerate(used):
        for slot, packed in zip(slots, (inputs.k, inputs.v), strict=True):
            slot[b, :length] = packed[start : start + length]
        start += length
    limit = torch.randint(0, 50, (inputs.q.shape[0],), dtype=torch.int32) if limited else None
    for causal in (True, False):
        expected = check_forward(inputs, causal=causal, kv_limit=limit)
        ours = ops.varlen_attention(
            inputs.q,
            *slots,
            inputs.cu_seqlens_q,
            None,
            inputs.max_seqlen_q,
            capacity,
            causal=causal,
            kv_limit=limit,
            seqused_k=torch.tensor(used, dtype=torch.int32),
            return_lse=True,
        )
        assert_bitwise_equal(ours, expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.37, -0.5, 1e-4])
def test_softmax_scale(scale, native_calls):
    check_forward(attention_inputs((33, 5)), softmax_scale=scale)


def test_large_logits_do_not_overflow(native_calls):
    inputs = attention_inputs((50, 70), head_dim=64)
    inputs = AttentionInputs(inputs.q * 300, inputs.k * 300, inputs.v, *inputs.boundaries)
    out, lse = check_forward(inputs)
    assert out.isfinite().all() and lse.isfinite().all()


def test_rows_past_the_last_segment_are_zero_whatever_they_hold(native_calls):
    inputs = attention_inputs((20, 30), tail=5)
    for x in (inputs.q, inputs.k, inputs.v):
        x[50:] = torch.nan
    out, lse = ops.varlen_attention(*inputs.args, return_lse=True)
    assert (out[50:] == 0).all() and (lse[:, 50:] == -torch.inf).all()
    assert out.isfinite().all() and lse[:, :50].isfinite().all()


def test_a_nan_query_spoils_its_own_row_only(native_calls):
    inputs = attention_inputs((70, 70))
    clean = ops.varlen_attention(*inputs.args)
    inputs.q[10, 1] = torch.nan
    out = ops.varlen_attention(*inputs.args)
    assert out[10, 1].isnan().all()
    out[10, 1] = clean[10, 1]
    assert_bitwise_equal(out, clean)


def test_a_nan_key_spoils_only_the_rows_that_see_it(native_calls):
    inputs = attention_inputs((70, 70), heads=(2, 2))
    clean = ops.varlen_attention(*inputs.args)
    inputs.k[30, 1] = torch.nan
    out = ops.varlen_attention(*inputs.args)
    assert out[30:70, 1].isnan().all()
    out[30:70, 1] = clean[30:70, 1]
    assert_bitwise_equal(out, clean)


def transposed_heads(x: Tensor) -> Tensor:
    """The layout of a Hugging Face attention function: ``[heads, rows, head_dim]`` in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        strided,
        transposed_heads,
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: torch.stack([x, x, x], dim=1)[:, 1],
    ],
    ids=["gaps", "transposed_heads", "last_stride_2", "fused_qkv"],
)
def test_strided_inputs_give_the_same_result(view, dtype, native_calls):
    inputs = attention_inputs((40, 3, 70), dtype=dtype, head_dim=24)
    expected = ops.varlen_attention(*inputs.args, return_lse=True)
    viewed = AttentionInputs(view(inputs.q), view(inputs.k), view(inputs.v), *inputs.boundaries)
    assert_bitwise_equal(ops.varlen_attention(*viewed.args, return_lse=True), expected)


def test_a_segment_does_not_depend_on_its_neighbours(native_calls):
    inputs = attention_inputs((70, 33, 5))
    whole = ops.varlen_attention(*inputs.args)
    rows, alone = slice(70, 103), cu_seqlens_of([33])
    part = ops.varlen_attention(inputs.q[rows], inputs.k[rows], inputs.v[rows], alone, alone, 33, 33)
    assert_bitwise_equal(part, whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_whatever_memory_held(dtype, native_calls):
    inputs = attention_inputs((200, 0, 130), dtype=dtype, head_dim=64, tail=9)
    assert_repeatable(lambda: ops.varlen_attention(*inputs.args, return_lse=True))


def test_without_return_lse_the_output_is_the_same_tensor_alone(native_calls):
    inputs = attention_inputs((9,))
    out, _ = ops.varlen_attention(*inputs.args, return_lse=True)
    assert_bitwise_equal(ops.varlen_attention(*inputs.args), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(dtype, native_calls):
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for seed in range(25):
        batch, heads_k = draw(1, 6), draw(1, 4)
        lengths_q = [draw(0, 90) for _ in range(batch)]
        lengths_k = [draw(0, 90) for _ in range(batch)] if seed % 2 else lengths_q
        inputs = attention_inputs(
            lengths_q,
            lengths_k,
            heads=(heads_k * draw(1, 5), heads_k),
            head_dim=draw(1, 150),
            dtype=dtype,
            tail=draw(0, 3),
            seed=seed,
        )
        check_forward(inputs, causal=seed % 3 != 0)


@pytest.mark.usefixtures("unforced")
def test_float64_runs_on_the_reference():
    inputs = attention_inputs((9, 4), dtype=torch.float64)
    with backends.record_calls() as calls:
        out = ops.varlen_attention(*inputs.args)
    assert calls == {("varlen_attention", "reference"): 1}
    assert_bitwise_equal(out, reference.varlen_attention(*inputs.args))


def test_autocast_casts_the_inputs(native_calls):
    inputs = attention_inputs((9, 4))
    expected = ops.varlen_attention(*inputs.to(torch.bfloat16).args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = (inputs.q, inputs.k, inputs.v.bfloat16(), *inputs.boundaries)
        assert_bitwise_equal(ops.varlen_attention(*mixed), expected)
