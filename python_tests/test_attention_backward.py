"""The gradients of varlen_attention equal those of its definition to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import (
    BACKWARD_FACTOR,
    LENGTHS,
    PEER_ORDERS,
    AttentionInputs,
    assert_bitwise_equal,
    assert_repeatable,
    assert_within_rounding,
    attention_inputs,
    peer_attention,
    peer_gradients,
    strided,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference_attention(inputs: AttentionInputs, **options: Any) -> tuple[Tensor, Tensor]:
    return reference.varlen_attention(*inputs.args, return_lse=True, **options)


def our_attention(inputs: AttentionInputs, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.varlen_attention(*inputs.args, return_lse=True, **options)


def gradients(
    attention: Any, inputs: AttentionInputs, dout: Tensor, dlse: Tensor | None, **options: Any
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = attention(AttentionInputs(*leaves, *inputs.boundaries), **options)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + torch.where(lse.isfinite(), lse * dlse.to(lse.dtype), 0.0).sum()
    if not loss.requires_grad:  # a batch without segments connects nothing
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(loss, leaves))


def check_backward(inputs: AttentionInputs, with_lse: bool = False, **options: Any) -> list[Tensor]:
    """Compares dq, dk and dv with the float64 oracle by the tolerance rule."""
    dout = torch.randn_like(inputs.q)
    dlse = torch.randn(inputs.q.shape[1], inputs.q.shape[0]) if with_lse else None
    ours = gradients(our_attention, inputs, dout, dlse, **options)
    oracle = gradients(reference_attention, inputs.to(torch.float64), dout, dlse, **options)
    orders = PEER_ORDERS[:2] if inputs.q.dtype == torch.float32 else (0,)
    peers = [gradients(peer_attention, inputs, dout, dlse, order=order, **options) for order in orders]
    peers.append(peer_gradients(inputs, dout, dlse, **options))
    for i, name in enumerate(("dq", "dk", "dv")):
        assert ours[i].dtype == inputs.q.dtype
        peers_i = [peer[i] for peer in peers]
        assert_within_rounding(ours[i], peers_i, oracle[i], factor=BACKWARD_FACTOR, name=name)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_ragged_batches(lengths, causal, dtype, native_calls):
    check_backward(attention_inputs(lengths, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 31, 64, 80, 96, 128, 200, 256])
def test_head_dims(head_dim, dtype, native_calls):
    check_backward(attention_inputs((5, 70), heads=(2, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 1), (8, 1), (8, 2)], ids=str)
def test_grouped_queries(heads, dtype, native_calls):
    check_backward(attention_inputs((3, 0, 66), heads=heads, head_dim=24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_keys_of_different_lengths(causal, with_lse, dtype, native_calls):
    inputs = attention_inputs(
        (5, 4, 0, 3, 64, 1, 70, 1), (9, 0, 6, 1, 130, 200, 20, 1), head_dim=32, dtype=dtype, tail=2
    )
    check_backward(inputs, with_lse, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_limit(dtype, native_calls):
    inputs = attention_inputs((40, 0, 9, 100), (70, 3, 0, 100), head_dim=20, dtype=dtype, tail=3)
    limit = torch.randint(-5, 110, (inputs.q.shape[0],), dtype=torch.int32)
    check_backward(inputs, True, kv_limit=limit)


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 127, 129, 257])
def test_lengths_around_tile_sizes(length, native_calls):
    check_backward(attention_inputs((length,), heads=(2, 2), head_dim=16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_lse_alone(dtype, native_calls):
    """Without a gradient of ``out`` only the LSE's arrives, and v gets zeros."""
    inputs = attention_inputs((33, 0, 20), dtype=dtype)
    dlse = torch.randn(4, 53)

    def lse_gradients(attention: Any, inputs: AttentionInputs) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        _, lse = attention(AttentionInputs(*leaves, *inputs.boundaries))
        return torch.autograd.grad(lse, leaves, dlse.to(lse.dtype), allow_unused=True)

    ours = lse_gradients(our_attention, inputs)
    oracle = lse_gradients(reference_attention, inputs.to(torch.float64))
    peer = lse_gradients(peer_attention, inputs)
    for a, b, c in list(zip(ours, peer, oracle, strict=True))[:2]:
        assert_within_rounding(a, b, c, factor=BACKWARD_FACTOR)
    assert ours[2] is None or not ours[2].any()


def test_rows_past_the_last_segment_have_zero_gradients(native_calls):
    inputs = attention_inputs((20, 30), tail=5)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = ops.varlen_attention(*inputs.args)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert (grad[50:] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_and_upstream_gradients_give_the_same_result(dtype, native_calls):
    inputs = attention_inputs((40, 3, 70), dtype=dtype, head_dim=24)
    dout = torch.randn_like(inputs.q)
    expected = gradients(our_attention, inputs, dout, None)
    leaves = [strided(x).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = ops.varlen_attention(*leaves, *inputs.boundaries)
    for upstream in (dout, strided(dout), torch.stack([dout, dout], dim=-1)[..., 1]):
        assert_bitwise_equal(torch.autograd.grad(out, leaves, upstream, retain_graph=True), expected)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(dout), retain_graph=True)
    expanded = torch.autograd.grad(out, leaves, torch.ones((), dtype=dtype).expand_as(out))
    assert_bitwise_equal(expanded, ones)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_whatever_memory_held(dtype, native_calls):
    inputs = attention_inputs((200, 0, 130), heads=(4, 2), dtype=dtype, head_dim=64, tail=9)
    dout = torch.randn_like(inputs.q)
    assert_repeatable(lambda: gradients(our_attention, inputs, dout, None))


def test_gradient_accumulation_over_a_shared_input(native_calls):
    """One tensor as query, key and value gets the sum of the three gradients."""
    inputs = attention_inputs((30, 7), heads=(2, 2))
    x = inputs.q.clone().requires_grad_()
    ops.varlen_attention(x, x, x, *inputs.boundaries).sum().backward()
    shared = AttentionInputs(inputs.q, inputs.q, inputs.q, *inputs.boundaries)
    parts = gradients(our_attention, shared, torch.ones_like(inputs.q), None)
    torch.testing.assert_close(x.grad, parts[0] + parts[1] + parts[2])


@pytest.mark.usefixtures("unforced")
def test_gradcheck_of_the_reference():
    inputs = attention_inputs((5, 0, 4), (6, 2, 2), heads=(4, 2), head_dim=3, dtype=torch.float64, tail=1)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    limit = torch.randint(0, 7, (inputs.q.shape[0],), dtype=torch.int32)
    for options in ({"causal": True}, {"causal": False}, {"kv_limit": limit}):

        def call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any] = options) -> tuple[Tensor, Tensor]:
            out, lse = ops.varlen_attention(q, k, v, *inputs.boundaries, return_lse=True, **options)
            return out, torch.where(lse.isfinite(), lse, 0.0)

        assert torch.autograd.gradcheck(call, leaves)


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    inputs = attention_inputs((5, 3))
    q = inputs.q.requires_grad_()
    out = ops.varlen_attention(q, inputs.k, inputs.v, *inputs.boundaries)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    with backends.use("reference"):
        out = ops.varlen_attention(q, inputs.k, inputs.v, *inputs.boundaries)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        grad.sum().backward()
    assert q.grad is not None


@pytest.mark.usefixtures("unforced")
def test_cache_slots_with_a_gradient_run_on_the_reference():
    inputs = attention_inputs((3,), (5,))
    k, v = inputs.k[None], inputs.v[None]
    q = inputs.q.requires_grad_()
    arguments = (q, k, v, inputs.cu_seqlens_q, None, 3, 5)
    seqused_k = torch.tensor([5], dtype=torch.int32)
    with backends.record_calls() as calls:
        out = ops.varlen_attention(*arguments, seqused_k=seqused_k)
    assert calls == {("varlen_attention", "reference"): 1}
    (grad,) = torch.autograd.grad(out.sum(), q)
    packed = ops.varlen_attention(*inputs.args)
    torch.testing.assert_close(grad, torch.autograd.grad(packed.sum(), q)[0])
    with backends.use("native"), pytest.raises(RuntimeError, match="no gradients with seqused_k"):
        ops.varlen_attention(*arguments, seqused_k=seqused_k)


def test_gradient_checkpointing_recomputes_the_same_gradients(native_calls):
    from torch.utils.checkpoint import checkpoint

    inputs = attention_inputs((30, 7))
    grads = []
    for recompute in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

        def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.varlen_attention(q, k, v, *inputs.boundaries)

        out = checkpoint(block, *leaves, use_reentrant=False) if recompute else block(*leaves)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    assert_bitwise_equal(*grads)
