"""On a GPU varlen_attention, its gradients and decode_attention are within rounding of the float64 oracle.

The compiled kernels of the first take bfloat16 and float16, and heads of 64, 80, 96 and 128. Tests of others are
skipped on them; python_tests/test_backends.py shows that such calls go to another backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    Captured,
    cpu_kernel,
    every_second,
    head_major,
    inputs_on_device,
    no_synchronisation,
    on_cpu,
    on_device,
    raw,
    repeatable,
    with_gaps,
)
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import (
    BACKWARD_FACTOR,
    LENGTHS,
    PEER_ORDERS,
    AttentionInputs,
    assert_bitwise_equal,
    assert_within_rounding,
    attention_inputs,
    cu_seqlens_of,
    peer_attention,
    peer_gradients,
    peer_scores,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

HEAD_DIMS = (64, 80, 96, 128)
# Query heads to key heads: one to one, and groups of 4, 7 and 8.
HEADS = ((2, 2), (4, 1), (7, 1), (16, 2))
# Every head dimension with every group, and each of both in the other dtypes: a kernel is compiled for each of them.
TUNED = [(dim, heads, torch.bfloat16) for dim in HEAD_DIMS for heads in HEADS]
TUNED += [
    (HEAD_DIMS[i], HEADS[i - j], dtype) for i in range(4) for j, dtype in enumerate((torch.float32, torch.float16))
]
MORE_LENGTHS = {
    **LENGTHS,
    "more_than_multiprocessors": tuple((i * 37) % 91 for i in range(150)),
    "tiny512": (34,) * 512,
}
# Queries and keys of different lengths: continuation chunks, more queries than keys, none of one or of both.
UNEQUAL = (5, 4, 0, 3, 64, 1, 70, 1, 0), (9, 0, 6, 1, 130, 200, 20, 1, 0)


# ---------------------------------------------------------------------- one call against float64


def attention(module: Any, inputs: AttentionInputs, **options: Any) -> tuple[Tensor, Tensor]:
    return module.varlen_attention(*inputs.args, return_lse=True, **options)


def skip_what_is_left_to_others(inputs: AttentionInputs) -> None:
    dtype, head_dim = inputs.q.dtype, inputs.q.shape[2]
    if not backends._takes(str(backends._forced), "varlen_attention", "cuda", dtype, head_dim):
        pytest.skip(f"{backends._forced} leaves {dtype} and heads of {head_dim} to others")


def check_forward(
    inputs: AttentionInputs,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    call: Callable[..., tuple[Tensor, Tensor]] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Checks ``varlen_attention`` of the packed inputs, or a ``call`` that should give the same."""
    skip_what_is_left_to_others(inputs)
    if call is None:
        moved = inputs_on_device(inputs, view)
        out, lse = repeatable(lambda: attention(ops, moved, **on_device(options)))
    else:
        out, lse = repeatable(lambda: call(**on_device(options)))
    assert out.device.type == DEVICE.type and out.dtype == inputs.q.dtype and lse.dtype == torch.float32
    oracle = attention(reference, inputs.to(torch.float64), **options)
    wide = [peer_attention(inputs.to(torch.float32), order=order, **options) for order in PEER_ORDERS]
    peers = wide if out.dtype == torch.float32 else [peer_attention(inputs, **options)]
    assert_within_rounding(out.cpu(), [peer[0] for peer in peers], oracle[0], name="out")
    assert_within_rounding(lse.cpu(), [peer[1] for peer in wide], oracle[1], name="softmax_lse")
    return out, lse


def gradients(
    call: Callable[..., tuple[Tensor, Tensor]],
    inputs: AttentionInputs,
    dout: Tensor,
    dlse: Tensor | None,
    **options: Any,
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = call(AttentionInputs(*leaves, *inputs.boundaries), **options)
    if not out.requires_grad:  # a batch without segments connects nothing
        return [torch.zeros_like(leaf) for leaf in leaves]
    seen = lse.isfinite()
    upstream = [dout.to(out.dtype)] if dlse is None else [dout.to(out.dtype), torch.where(seen, dlse.to(lse.dtype), 0)]
    return list(torch.autograd.grad([out, lse][: len(upstream)], leaves, upstream))


def check_backward(
    inputs: AttentionInputs,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    with_lse: bool = False,
    **options: Any,
) -> None:
    skip_what_is_left_to_others(inputs)
    dout = torch.randn_like(inputs.q)
    dlse = torch.randn(inputs.q.shape[1], inputs.q.shape[0]) if with_lse else None
    moved, dout_moved, dlse_moved = inputs_on_device(inputs, view), view(on_device(dout)), on_device(dlse)

    def ours_of(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda inputs, **options: attention(module, inputs, **options)

    ours = repeatable(lambda: gradients(ours_of(ops), moved, dout_moved, dlse_moved, **on_device(options)))
    oracle = gradients(ours_of(reference), inputs.to(torch.float64), dout, dlse, **options)
    orders = PEER_ORDERS[:2] if inputs.q.dtype == torch.float32 else (0,)

    def peer_of(order: int) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda inputs, **options: peer_attention(inputs, order=order, **options)

    peers = [gradients(peer_of(order), inputs, dout, dlse, **options) for order in orders]
    peers.append(peer_gradients(inputs, dout, dlse, **options))
    for i, name in enumerate(("dq", "dk", "dv")):
        assert ours[i].dtype == inputs.q.dtype
        expected = [peer[i] for peer in peers]
        assert_within_rounding(ours[i].cpu(), expected, oracle[i], factor=BACKWARD_FACTOR, name=name)


# ---------------------------------------------------------------------- a short walk through every kernel

SHORT = pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.bfloat16), (80, torch.float16), (128, torch.bfloat16), (31, torch.float32)],
    ids=str,
)


@pytest.mark.rehearsed
@SHORT
def test_short_batches(head_dim, dtype):
    inputs = attention_inputs((3, 0, 40), (35, 5, 40), heads=(2, 1), head_dim=head_dim, dtype=dtype, tail=2)
    check_forward(inputs)
    check_backward(inputs, with_lse=True, kv_limit=torch.randint(-2, 50, (45,), dtype=torch.int32))


@pytest.mark.rehearsed
@SHORT
def test_short_caches(head_dim, dtype):
    for num_splits in (0, 3):
        check_decode(*decode_inputs((3, 0, 70), heads=(2, 1), head_dim=head_dim, dtype=dtype), num_splits=num_splits)


# ---------------------------------------------------------------------- forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_ragged_batches(lengths, causal, dtype):
    check_forward(attention_inputs(lengths, head_dim=64, dtype=dtype), causal=causal)


@pytest.mark.parametrize(("head_dim", "heads", "dtype"), TUNED, ids=str)
def test_head_dims_and_grouped_queries(head_dim, heads, dtype):
    check_forward(attention_inputs((5, 0, 150), heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 31, 33, 72, 100, 160, 256])
def test_other_head_dims(head_dim, dtype):
    check_forward(attention_inputs((5, 70), heads=(2, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_whole_image(head_dim, causal, dtype):
    """Many tiles in both directions; the longest segment is not the first."""
    inputs = attention_inputs((353, 640, 17), heads=(4, 2), head_dim=head_dim, dtype=dtype)
    check_forward(inputs, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_queries_and_keys_of_different_lengths(head_dim, causal, dtype):
    inputs = attention_inputs(*UNEQUAL, head_dim=head_dim, dtype=dtype, tail=2)
    out, lse = check_forward(inputs, causal=causal)
    assert (out[5:9] == 0).all() and (lse[:, 5:9] == -torch.inf).all()


@pytest.mark.parametrize("length", [1, 15, 17, 63, 64, 65, 127, 128, 129, 255, 257, 400])
def test_lengths_around_tile_sizes(length):
    check_forward(attention_inputs((length,), heads=(2, 2), head_dim=128, dtype=torch.bfloat16))
    check_forward(attention_inputs((3,), (length,), heads=(2, 2), head_dim=64, dtype=torch.bfloat16))


def random_limits(rows: int, longest: int) -> Tensor:
    limit = torch.randint(-5, longest, (rows,), dtype=torch.int32)
    limit[0], limit[1] = -(2**31), 2**31 - 1
    return limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_kv_limit_replaces_causal_and_is_clamped(head_dim, dtype):
    inputs = attention_inputs((40, 0, 9, 100), (70, 3, 0, 150), head_dim=head_dim, dtype=dtype, tail=3)
    out, lse = check_forward(inputs, kv_limit=random_limits(inputs.q.shape[0], 160))
    assert (lse[:, 0] == -torch.inf).all() and (out[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("view", [with_gaps, head_major, every_second], ids=lambda view: view.__name__)
def test_strided_inputs(view, dtype):
    for head_dim in (64, 80):
        check_forward(attention_inputs((40, 3, 130), head_dim=head_dim, dtype=dtype), view)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5])
def test_softmax_scale(scale, dtype):
    check_forward(attention_inputs((33, 5), head_dim=64, dtype=dtype), softmax_scale=scale)
    check_backward(attention_inputs((33, 5), head_dim=64, dtype=dtype), softmax_scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_logits_do_not_overflow(dtype):
    inputs = attention_inputs((50, 170), head_dim=64, dtype=dtype)
    inputs = AttentionInputs(inputs.q * 300, inputs.k * 300, inputs.v, *inputs.boundaries)
    out, lse = check_forward(inputs)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("head_dim", [64, 80])
def test_rows_past_the_last_segment_are_zero_whatever_they_hold(head_dim):
    inputs = inputs_on_device(attention_inputs((20, 130), head_dim=head_dim, dtype=torch.bfloat16, tail=70))
    for x in (inputs.q, inputs.k, inputs.v):
        x[150:] = torch.nan
    out, lse = repeatable(lambda: attention(ops, inputs))
    assert (out[150:] == 0).all() and (lse[:, 150:] == -torch.inf).all()
    assert out.isfinite().all() and lse[:, :150].isfinite().all()


def test_a_nan_spoils_only_the_rows_that_see_it():
    inputs = inputs_on_device(attention_inputs((170, 70), heads=(2, 2), head_dim=64, dtype=torch.bfloat16))
    clean, _ = attention(ops, inputs)
    inputs.k[130, 1], inputs.q[10, 0] = torch.nan, torch.nan
    out, _ = attention(ops, inputs)
    assert out[130:170, 1].isnan().all() and out[10, 0].isnan().all()
    out[130:170, 1], out[10, 0] = clean[130:170, 1], clean[10, 0]
    assert_bitwise_equal(out, clean)


@pytest.mark.rehearsed
@pytest.mark.parametrize("boundaries", [(0, 9, 4, 20), (0, 9, 40, 41), (-5, -1, 8, 12)], ids=str)
def test_boundaries_on_a_device_are_clamped_as_on_the_cpu(boundaries):
    inputs = attention_inputs((20,), heads=(2, 2), head_dim=64, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    args = (inputs.q, inputs.k, inputs.v, cu_seqlens, cu_seqlens, 20, 20, True, 0.3)
    forward = cpu_kernel("varlen_attention", *args)
    torch.testing.assert_close(on_cpu(raw("varlen_attention", *on_device(args))), forward, rtol=2e-2, atol=2e-2)
    backward = (inputs.q, None, *args[:3], *forward, *args[3:])
    expected = cpu_kernel("varlen_attention_backward", *backward)
    ours = on_cpu(raw("varlen_attention_backward", *on_device(backward)))
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=5e-2)


# ---------------------------------------------------------------------- cache slots


def slots_of(packed: Tensor, used: Sequence[int], capacity: int) -> Tensor:
    """``[B, capacity, Hk, D]`` with NaN past the filled slots."""
    slots = torch.full((len(used), capacity, *packed.shape[1:]), torch.nan, dtype=packed.dtype)
    for row, part in zip(slots, packed[: sum(used)].split(list(used)), strict=True):
        row[: len(part)] = part
    return slots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("limited", [False, True], ids=["all", "limited"])
def test_cache_slots_equal_packed_keys_and_hide_what_lies_past_them(limited, head_dim, dtype):
    used, capacity = (7, 0, 40, 165), 170
    inputs = attention_inputs((3, 2, 40, 1), used, dtype=dtype, head_dim=head_dim)
    k, v = (on_device(slots_of(x, used, capacity)) for x in (inputs.k, inputs.v))
    q, cu_seqlens, filled = on_device((inputs.q, inputs.cu_seqlens_q, torch.tensor(used, dtype=torch.int32)))

    def call(**options: Any) -> tuple[Tensor, Tensor]:
        arguments = q, k, v, cu_seqlens, None, inputs.max_seqlen_q, capacity
        return ops.varlen_attention(*arguments, seqused_k=filled, return_lse=True, **options)

    limit = torch.randint(0, 50, (inputs.q.shape[0],), dtype=torch.int32) if limited else None
    check_forward(inputs, call=call, kv_limit=limit)


# ---------------------------------------------------------------------- backward


@pytest.mark.parametrize(("head_dim", "heads", "dtype"), TUNED, ids=str)
def test_gradients_of_head_dims_and_grouped_queries(head_dim, heads, dtype):
    check_backward(attention_inputs((5, 0, 150), heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_gradients_of_ragged_batches(lengths, dtype):
    check_backward(attention_inputs(lengths, head_dim=64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [3, 31, 200, 256])
def test_gradients_of_other_head_dims(head_dim, dtype):
    check_backward(attention_inputs((5, 70), heads=(2, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_gradients_of_a_whole_image(head_dim, dtype):
    check_backward(attention_inputs((353, 640), heads=(4, 2), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_gradients_of_queries_and_keys_of_different_lengths(causal, dtype):
    inputs = attention_inputs(*UNEQUAL, head_dim=64, dtype=dtype, tail=2)
    check_backward(inputs, with_lse=causal, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_under_a_kv_limit(dtype):
    inputs = attention_inputs((40, 0, 9, 100), (70, 3, 0, 150), head_dim=64, dtype=dtype, tail=3)
    check_backward(inputs, with_lse=True, kv_limit=random_limits(inputs.q.shape[0], 160))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("view", [with_gaps, head_major, every_second], ids=lambda view: view.__name__)
def test_gradients_of_strided_inputs(view, dtype):
    check_backward(attention_inputs((40, 3, 130), head_dim=64, dtype=dtype), view)


def test_rows_past_the_last_segment_have_zero_gradients_whatever_they_hold():
    inputs = inputs_on_device(attention_inputs((20, 130), head_dim=64, dtype=torch.bfloat16, tail=70))
    dout = torch.randn_like(inputs.q)
    for x in (inputs.q, inputs.k, inputs.v, dout):
        x[150:] = torch.nan
    for grad in gradients(lambda inputs: attention(ops, inputs), inputs, dout, None):
        assert (grad[150:] == 0).all() and grad.isfinite().all()


# ---------------------------------------------------------------------- decoding

USED: dict[str, tuple[int, ...]] = {
    "no_rows": (),
    "empty": (0,),
    "one_key": (1,),
    "mixed": (0, 1, 7, 33, 64, 129, 0, 150),
    "more_than_multiprocessors": tuple((i * 7) % 5 for i in range(140)),
    "long": (2100, 3),
}


def decode_inputs(
    used: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    spare: int = 3,
) -> tuple[AttentionInputs, tuple[Tensor, ...]]:
    """A query for each row as packed segments of one query, and the arguments of decode_attention on the CPU."""
    inputs = attention_inputs([1] * len(used), used, heads=heads, head_dim=head_dim, dtype=dtype)
    capacity = max([0, *used]) + spare
    k, v = (slots_of(x, used, capacity) for x in (inputs.k, inputs.v))
    return inputs, (inputs.q, k, v, torch.tensor(used, dtype=torch.int32))


def unpacked(scores: Tensor, used: Tensor, capacity: int) -> Tensor:
    filled = torch.arange(capacity) < used[:, None]
    return torch.zeros(filled.shape, dtype=scores.dtype).masked_scatter(filled, scores)


def check_decode(
    inputs: AttentionInputs,
    arguments: tuple[Tensor, ...],
    view: Callable[[Tensor], Tensor] = lambda x: x,
    **options: Any,
) -> None:
    (*tensors, used), capacity = arguments, arguments[1].shape[1]
    moved = *(view(on_device(x)) for x in tensors), on_device(used)
    out, scores = repeatable(lambda: ops.decode_attention(*moved, return_scores=True, **options))
    assert out.dtype == inputs.q.dtype and scores.dtype == torch.float32 and out.device.type == DEVICE.type
    oracle = reference.decode_attention(*(x.double() for x in tensors), used, return_scores=True)
    peers = [peer_attention(inputs, order=order)[0] for order in PEER_ORDERS]
    wide = inputs.to(torch.float32)
    peers_of_scores = [unpacked(peer_scores(wide, order=order), used, capacity) for order in PEER_ORDERS]
    assert_within_rounding(out.cpu(), peers, oracle[0], name="out")
    # A probability is exp(logit - lse): rounding the LSE moves it by as much as the LSE is large.
    lse = peer_attention(inputs.to(torch.float64))[1]
    condition = 1.0 + max([0.0, *lse[lse.isfinite()].abs().tolist()])
    assert_within_rounding(scores.cpu(), peers_of_scores, oracle[1], condition=condition, name="scores")
    assert (scores.cpu()[torch.arange(capacity) >= used[:, None]] == 0).all()
    alone = ops.decode_attention(*moved, **options)
    assert_within_rounding(alone.cpu(), peers, oracle[0], name="out without scores")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", USED.values(), ids=USED)
def test_decoding_from_ragged_caches(used, dtype):
    check_decode(*decode_inputs(used, dtype=dtype))


@pytest.mark.parametrize(("head_dim", "heads", "dtype"), [*TUNED, (128, (28, 4), torch.bfloat16)], ids=str)
def test_decoding_with_head_dims_and_grouped_queries(head_dim, heads, dtype):
    check_decode(*decode_inputs((5, 0, 170), heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [1, 16, 31, 33, 100, 200, 256])
def test_decoding_with_other_head_dims(head_dim, dtype):
    check_decode(*decode_inputs((5, 70), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8, 1000])
def test_decoding_with_any_number_of_splits(num_splits):
    check_decode(*decode_inputs((0, 1, 2, 7, 300, 2100), dtype=torch.bfloat16), num_splits=num_splits)


@pytest.mark.parametrize("heads", [(32, 32), (28, 4)], ids=str)
def test_decoding_from_a_whole_image(heads):
    check_decode(*decode_inputs((2944, 6336), heads=heads, head_dim=128, dtype=torch.bfloat16))


@pytest.mark.parametrize("view", [with_gaps, every_second], ids=lambda view: view.__name__)
def test_decoding_from_strided_caches(view):
    for head_dim in (64, 80):
        check_decode(*decode_inputs((5, 0, 170), head_dim=head_dim, dtype=torch.bfloat16), view)


@pytest.mark.rehearsed
def test_decoding_never_reads_past_the_capacity():
    """Lengths on a device are clamped."""
    _, (q, k, v, _) = decode_inputs((40, 40), spare=0)
    wrong = torch.tensor([2**31 - 1, -5], dtype=torch.int32)
    ours = raw("decode_attention", *on_device((q, k, v, wrong)), 0.3, 0, True)
    expected = raw("decode_attention", *on_device((q, k, v, torch.tensor([40, 0], dtype=torch.int32))), 0.3, 0, True)
    assert_bitwise_equal(ours, expected)


# ---------------------------------------------------------------------- asynchrony

TOTAL = 900
BATCHES = ((640, 0, 200, 60), (1, 500, 0, 399), (900, 0, 0, 0), (34, 35, 36, 37))


def buffers(seed: int) -> dict[str, Tensor]:
    """Of another seed with the same shapes and other lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = BATCHES[seed % len(BATCHES)]
    return {
        "q": torch.randn(TOTAL, 4, 64, generator=generator).bfloat16(),
        "k": torch.randn(TOTAL, 2, 64, generator=generator).bfloat16(),
        "v": torch.randn(TOTAL, 2, 64, generator=generator).bfloat16(),
        "limit": torch.randint(0, TOTAL, (TOTAL,), generator=generator).int(),
        "cu_seqlens": cu_seqlens_of(lengths),
        "used": torch.tensor([n // 4 for n in lengths], dtype=torch.int32),
    }


def slots(b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tuple(b[name].view(4, TOTAL // 4, 2, 64) for name in "kv")


CALLS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "varlen_attention": lambda module, b: module.varlen_attention(
        b["q"], b["k"], b["v"], b["cu_seqlens"], b["cu_seqlens"], TOTAL, TOTAL, return_lse=True
    ),
    "varlen_attention under kv_limit": lambda module, b: module.varlen_attention(
        b["q"], b["k"], b["v"], b["cu_seqlens"], b["cu_seqlens"], TOTAL, TOTAL, kv_limit=b["limit"]
    ),
    "varlen_attention from slots": lambda module, b: module.varlen_attention(
        b["q"], *slots(b), b["cu_seqlens"], None, TOTAL, TOTAL // 4, seqused_k=b["used"]
    ),
    "varlen_attention and backward": lambda module, b: forward_and_backward(module, b),
    "decode_attention": lambda module, b: module.decode_attention(
        b["q"][:4], *slots(b), b["used"], return_scores=True
    ),
}  # fmt: skip


def forward_and_backward(module: Any, b: dict[str, Tensor]) -> list[Tensor]:
    inputs = AttentionInputs(b["q"], b["k"], b["v"], b["cu_seqlens"], b["cu_seqlens"], TOTAL, TOTAL)
    return gradients(lambda inputs: attention(module, inputs), inputs, b["q"], None)


def compare(call: str, ours: Any, batch: dict[str, Tensor]) -> None:
    """Other lengths would be far off; what rounding does is tested above."""
    torch.testing.assert_close(on_cpu(ours), CALLS[call](reference, batch), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("call", CALLS)
def test_a_graph_replays_with_other_lengths_in_the_same_buffers(call):
    static = on_device(buffers(0))
    captured = Captured(lambda: CALLS[call](ops, static))
    for seed in (0, 1, 2, 3, 0):
        batch = buffers(seed)
        for name, value in batch.items():
            static[name].copy_(value)
        compare(call, captured.replay(), batch)


@pytest.mark.parametrize("call", CALLS)
def test_attention_does_not_wait_for_the_device(call):
    batch = buffers(1)
    moved = on_device(batch)
    CALLS[call](ops, moved)  # loads the kernels
    with no_synchronisation():
        ours = CALLS[call](ops, moved)
    compare(call, ours, batch)
