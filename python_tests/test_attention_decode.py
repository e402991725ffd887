"""decode_attention equals its definition to rounding, with and without scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import (
    PEER_ORDERS,
    AttentionInputs,
    assert_bitwise_equal,
    assert_repeatable,
    assert_within_rounding,
    cu_seqlens_of,
    peer_attention,
    peer_scores,
    strided,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
USED: dict[str, tuple[int, ...]] = {
    "no_rows": (),
    "empty": (0,),
    "one_key": (1,),
    "mixed": (0, 1, 7, 33, 64, 129, 0, 150),
    "many_rows": tuple((i * 7) % 5 for i in range(140)),
    "long": (2100, 3),
}


def decode_inputs(
    used: tuple[int, ...],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    spare: int = 3,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query per row, cache slots with NaN past the filled ones, and ``seqused_k``."""
    batch, capacity = len(used), max([0, *used]) + spare
    q = torch.randn(batch, heads[0], head_dim).to(dtype)
    slots = [torch.randn(batch, capacity, heads[1], head_dim).to(dtype) for _ in range(2)]
    for b, length in enumerate(used):
        for slot in slots:
            slot[b, length:] = torch.nan
    return q, *slots, torch.tensor(used, dtype=torch.int32)


def as_packed(q: Tensor, k: Tensor, v: Tensor, seqused_k: Tensor) -> AttentionInputs:
    """The same attention as packed segments of one query each."""
    used = seqused_k.tolist()
    keys, values = (
        torch.cat([x.flatten(0, 1)[:0], *[row[:n] for row, n in zip(x, used, strict=True)]]) for x in (k, v)
    )
    boundaries = cu_seqlens_of([1] * len(used)), cu_seqlens_of(used), 1, k.shape[1]
    return AttentionInputs(q, keys, values, *boundaries)


def unpacked(scores: Tensor, seqused_k: Tensor, capacity: int) -> Tensor:
    filled = torch.arange(capacity) < seqused_k[:, None]
    return torch.zeros(filled.shape, dtype=scores.dtype).masked_scatter(filled, scores)


def check_decode(q: Tensor, k: Tensor, v: Tensor, seqused_k: Tensor, num_splits: int = 0) -> None:
    out, scores = ops.decode_attention(q, k, v, seqused_k, return_scores=True, num_splits=num_splits)
    oracle = reference.decode_attention(q.double(), k.double(), v.double(), seqused_k, return_scores=True)
    packed = as_packed(q, k, v, seqused_k)
    wide = packed.to(torch.float32)
    peers = [peer_attention(packed, order=order)[0] for order in PEER_ORDERS]
    scores_peers = [unpacked(peer_scores(wide, order=order), seqused_k, k.shape[1]) for order in PEER_ORDERS]
    assert out.dtype == q.dtype and scores.dtype == torch.float32
    assert_within_rounding(out, peers, oracle[0], name="out")
    # A probability is exp(logit - lse): rounding the LSE moves it by as much as the LSE is large.
    lse = peer_attention(packed.to(torch.float64))[1]
    condition = 1.0 + max([0.0, *lse[lse.isfinite()].abs().tolist()])
    assert_within_rounding(scores, scores_peers, oracle[1], condition=condition, name="scores")
    past = torch.arange(k.shape[1]) >= seqused_k[:, None]
    assert (scores[past] == 0).all()
    alone = ops.decode_attention(q, k, v, seqused_k, num_splits=num_splits)
    assert_within_rounding(alone, peers, oracle[0], name="out without scores")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", USED.values(), ids=USED)
def test_ragged_caches(used, dtype, native_calls):
    check_decode(*decode_inputs(used, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 31, 33, 64, 80, 96, 100, 128, 200, 256])
def test_head_dims(head_dim, dtype, native_calls):
    check_decode(*decode_inputs((5, 70), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 1), (8, 1), (8, 2), (8, 8), (28, 4)], ids=str)
def test_grouped_queries(heads, dtype, native_calls):
    check_decode(*decode_inputs((5, 0, 70), heads=heads, head_dim=24, dtype=dtype))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8, 1000])
def test_any_number_of_splits_gives_the_result(num_splits, native_calls):
    check_decode(*decode_inputs((0, 1, 2, 7, 300, 2100), dtype=torch.bfloat16), num_splits=num_splits)


def test_rows_without_keys_give_zeros(native_calls):
    q, k, v, _ = decode_inputs((4, 4))
    nothing = torch.zeros(2, dtype=torch.int32)
    out, scores = ops.decode_attention(q, k, v, nothing, return_scores=True)
    assert not out.any() and not scores.any()
    out, scores = ops.decode_attention(q, k[:, :0], v[:, :0], nothing, return_scores=True)
    assert not out.any() and scores.shape == (2, 0)


def test_a_full_cache_without_spare_slots(native_calls):
    check_decode(*decode_inputs((65, 65), spare=0))


def test_scores_are_a_distribution_over_the_filled_slots(native_calls):
    q, k, v, used = decode_inputs((1, 9, 130))
    _, scores = ops.decode_attention(q, k, v, used, return_scores=True)
    torch.testing.assert_close(scores.sum(1), torch.ones(3))


def test_decode_equals_varlen_attention_of_one_query_a_row(native_calls):
    q, k, v, used = decode_inputs((3, 0, 70, 129), head_dim=64)
    cu_seqlens_q = torch.arange(5, dtype=torch.int32)
    expected = ops.varlen_attention(q, k, v, cu_seqlens_q, None, 1, k.shape[1], seqused_k=used)
    torch.testing.assert_close(ops.decode_attention(q, k, v, used), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        strided,
        lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
    ],
    ids=["gaps", "transposed_heads", "last_stride_2"],
)
def test_strided_inputs_give_the_same_result(view, dtype, native_calls):
    q, k, v, used = decode_inputs((5, 0, 70), head_dim=24, dtype=dtype)
    expected = ops.decode_attention(q, k, v, used, return_scores=True)
    ours = ops.decode_attention(view(q), view(k), view(v), used, return_scores=True)
    assert_bitwise_equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [0, 3])
def test_two_runs_are_equal_whatever_memory_held(num_splits, dtype, native_calls):
    inputs = decode_inputs((1000, 0, 513), head_dim=64, dtype=dtype)
    assert_repeatable(lambda: ops.decode_attention(*inputs, num_splits=num_splits, return_scores=True))


def test_softmax_scale(native_calls):
    q, k, v, used = decode_inputs((9, 40))
    for scale in (0.0, 1.0, -0.3):
        ours = ops.decode_attention(q, k, v, used, softmax_scale=scale)
        torch.testing.assert_close(ours, reference.decode_attention(q, k, v, used, softmax_scale=scale))


@pytest.mark.usefixtures("unforced")
def test_where_a_gradient_is_wanted_the_reference_runs():
    q, k, v, used = decode_inputs((9, 40), spare=0)
    k[0, 9:], v[0, 9:] = 0.0, 0.0
    q.requires_grad_()
    with backends.record_calls() as calls:
        out = ops.decode_attention(q, k, v, used)
    assert calls == {("decode_attention", "reference"): 1}
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.isfinite().all() and grad.any()


def test_autocast_follows_the_cache(native_calls):
    q, k, v, used = decode_inputs((9, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ops.decode_attention(q, k.half(), v.half(), used)
    assert_bitwise_equal(ours, ops.decode_attention(q.half(), k.half(), v.half(), used))
