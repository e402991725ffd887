"""policy_attention and its gradients equal their definition to rounding, whatever the policy drops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from golden_support import GOLDENS
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
    cu_seqlens_of,
    peer_policy_attention,
    peer_policy_gradients,
    strided,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENTS = ("dq", "dk", "dv", "dpolicy")


def random_policy(inputs: AttentionInputs) -> Tensor:
    """Zeros, ones and what lies between."""
    policy = torch.rand(inputs.q.shape[0])
    return torch.where(policy < 0.4, 0.0, torch.where(policy > 0.8, 1.0, policy))


def our_attention(inputs: AttentionInputs, policy: Tensor, **options: Any) -> Tensor:
    return ops.policy_attention(
        inputs.q, inputs.k, inputs.v, policy, inputs.cu_seqlens_q, inputs.max_seqlen_q, **options
    )


def reference_attention(inputs: AttentionInputs, policy: Tensor, **options: Any) -> Tensor:
    return reference.policy_attention(
        inputs.q, inputs.k, inputs.v, policy, inputs.cu_seqlens_q, inputs.max_seqlen_q, **options
    )


def gradients(attention: Any, inputs: AttentionInputs, policy: Tensor, dout: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, policy)]
    out = attention(AttentionInputs(*leaves[:3], *inputs.boundaries), leaves[3], **options)
    if not out.requires_grad:  # a batch without segments connects nothing
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(out, leaves, dout.to(out.dtype)))


def largest_logit(inputs: AttentionInputs, softmax_scale: float | None = None, **_: Any) -> float:
    scale = inputs.q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    keys = inputs.k.double().repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], 1)
    logits = torch.einsum("qhd,khd->hqk", inputs.q.double(), keys) * scale
    return float(logits.abs().max()) if logits.numel() else 0.0


def check_forward(inputs: AttentionInputs, policy: Tensor | None = None, **options: Any) -> Tensor:
    """Compares ``out`` with the float64 oracle by the tolerance rule."""
    policy = random_policy(inputs) if policy is None else policy
    out = our_attention(inputs, policy, **options)
    assert out.dtype == inputs.q.dtype
    oracle = reference_attention(inputs.to(torch.float64), policy.double(), **options)
    orders = PEER_ORDERS if out.dtype == torch.float32 else (0,)
    peers = [peer_policy_attention(inputs, policy, order=order, **options) for order in orders]
    assert_within_rounding(out, peers, oracle, name="out")
    return out


def check_backward(inputs: AttentionInputs, policy: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Compares the four gradients with the float64 oracle by the tolerance rule."""
    policy = random_policy(inputs) if policy is None else policy
    dout = torch.randn_like(inputs.q)
    ours = gradients(our_attention, inputs, policy, dout, **options)
    oracle = gradients(reference_attention, inputs.to(torch.float64), policy.double(), dout, **options)
    orders = PEER_ORDERS if inputs.q.dtype == torch.float32 else (0,)
    peers = [gradients(peer_policy_attention, inputs, policy, dout, order=order, **options) for order in orders]
    peers += [peer_policy_gradients(inputs, policy, dout, order=order, **options) for order in orders]
    for i, name in enumerate(GRADIENTS):
        assert ours[i].dtype == (torch.float32 if name == "dpolicy" else inputs.q.dtype)
        # A large dpolicy is a single exponential: rounding its logit moves it by as much as the logit is large.
        condition = 1.0 + largest_logit(inputs, **options) if name == "dpolicy" else 1.0
        assert_within_rounding(
            ours[i],
            [peer[i] for peer in peers],
            oracle[i],
            factor=BACKWARD_FACTOR,
            condition=condition,
            name=name,
        )
    return ours


def check(inputs: AttentionInputs, policy: Tensor | None = None, **options: Any) -> None:
    check_forward(inputs, policy, **options)
    check_backward(inputs, policy, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_ragged_batches(lengths, dtype, native_calls):
    check(attention_inputs(lengths, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 31, 64, 80, 96, 128, 200, 256])
def test_head_dims(head_dim, dtype, native_calls):
    check(attention_inputs((5, 70), heads=(2, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 1), (8, 1), (14, 2), (8, 8)], ids=str)
def test_grouped_queries(heads, dtype, native_calls):
    check(attention_inputs((3, 0, 66), heads=heads, head_dim=24, dtype=dtype))


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 400])
def test_lengths_around_tile_sizes(length, native_calls):
    check(attention_inputs((length,), heads=(2, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, 3.0])
def test_uniform_policies(value, dtype, native_calls):
    inputs = attention_inputs((40, 130, 1), dtype=dtype)
    check(inputs, torch.full((171,), value))


def test_a_policy_may_be_negative(native_calls):
    inputs = attention_inputs((30, 9))
    check(inputs, -0.01 * torch.rand(39))


@pytest.mark.parametrize("options", [{"softmax_scale": s} for s in (0.0, 1.0, -0.5, 1e-4)]
                         + [{"epsilon": e} for e in (0.0, 0.3, 10.0)], ids=str)  # fmt: skip
def test_softmax_scale_and_epsilon(options, native_calls):
    check(attention_inputs((33, 5, 70)), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_policy_of_ones_is_causal_attention(dtype, native_calls):
    inputs = attention_inputs((40, 130, 1), dtype=dtype)
    ones = torch.ones(171)
    rounding = 2 * torch.finfo(dtype).eps * inputs.v.abs().max()
    for epsilon, share in ((0.0, 0.0), (1e-6, 3e-6)):
        ours = our_attention(inputs, ones, epsilon=epsilon)
        difference = ours.float() - ops.varlen_attention(*inputs.args).float()
        assert difference.abs().max() <= share + rounding


def test_a_policy_of_zeros_leaves_each_row_its_own_value(native_calls):
    inputs = attention_inputs((20, 50))
    inputs = AttentionInputs(inputs.q / 10, inputs.k, inputs.v, *inputs.boundaries)  # no score is far from another
    out = our_attention(inputs, torch.zeros(70))
    torch.testing.assert_close(out, inputs.v.repeat_interleave(2, 1), rtol=0, atol=1e-4)
    assert not torch.equal(out, inputs.v.repeat_interleave(2, 1))  # epsilon adds a share of the mean
    exact = our_attention(inputs, torch.zeros(70), epsilon=0.0)
    torch.testing.assert_close(exact, inputs.v.repeat_interleave(2, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [20, 200])
def test_a_dominant_key_that_is_dropped_leaves_the_mean_value(length, dtype, native_calls):
    """All that is left underflows: ``out`` is epsilon / N * sum(v) / epsilon, and gradients are finite."""
    inputs = attention_inputs((length,), heads=(2, 1), head_dim=32, dtype=dtype)
    inputs.q[:] = 4.0
    inputs.k[:] = -1.0
    inputs.k[0] = 4.0
    policy = torch.ones(length)
    policy[0] = 0.0
    out = check_forward(inputs, policy, softmax_scale=1.0)
    mean = inputs.v.float().mean(0).to(dtype).expand(length - 1, 2, 32)
    torch.testing.assert_close(out[1:], mean, rtol=0, atol=4 * torch.finfo(dtype).eps)
    for grad in check_backward(inputs, policy, softmax_scale=1.0):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_size_of_epsilon(dtype, native_calls):
    """A dropped key that is about 1 / epsilon above the others: the sum and epsilon have equal parts in the result."""
    inputs = attention_inputs((90,), heads=(2, 2), head_dim=16, dtype=dtype)
    inputs.k[0] = 0.0
    inputs.k[0, :, 0] = 16.0
    inputs.q[..., 0] = 4.0
    policy = random_policy(inputs)
    policy[0] = 0.0
    check(inputs, policy)


def test_large_logits_do_not_overflow(native_calls):
    inputs = attention_inputs((50, 70), head_dim=64)
    inputs = AttentionInputs(inputs.q * 300, inputs.k * 300, inputs.v, *inputs.boundaries)
    policy = random_policy(inputs)
    assert our_attention(inputs, policy).isfinite().all()
    assert all(g.isfinite().all() for g in gradients(our_attention, inputs, policy, torch.ones_like(inputs.q)))


def test_rows_past_the_last_segment_are_zero_whatever_they_hold(native_calls):
    inputs = attention_inputs((20, 30), tail=5)
    policy = random_policy(inputs)
    for x in (inputs.q, inputs.k, inputs.v, policy):
        x[50:] = torch.nan
    out = our_attention(inputs, policy)
    assert (out[50:] == 0).all() and out.isfinite().all()
    for grad in gradients(our_attention, inputs, policy, torch.ones_like(out)):
        assert (grad[50:] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "policy", "dout"])
@pytest.mark.parametrize("length", [10, 150])
def test_what_is_not_finite_stays_in_its_segment(length, where, value, native_calls):
    inputs = attention_inputs((40, length, 70))
    policy, dout = random_policy(inputs), torch.randn_like(inputs.q)
    clean = our_attention(inputs, policy), *gradients(our_attention, inputs, policy, dout)
    spoilt = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "policy": policy, "dout": dout}[where]
    spoilt[43] = value
    result = our_attention(inputs, policy), *gradients(our_attention, inputs, policy, dout)
    for rows in (slice(0, 40), slice(40 + length, None)):
        assert_bitwise_equal([x[rows] for x in result], [x[rows] for x in clean])
    if where == "policy":
        assert result[0][44 : 40 + length].isnan().all()
        assert result[0][40:44].isfinite().all()  # neither its own row nor one before it asks for it


def test_a_row_does_not_depend_on_its_own_policy(native_calls):
    inputs = attention_inputs((70,))
    policy = random_policy(inputs)
    out = our_attention(inputs, policy)
    policy[30] = 17.0
    changed = our_attention(inputs, policy)
    assert_bitwise_equal(changed[:31], out[:31])
    assert (changed[31:] != out[31:]).any(-1).all()


def transposed_heads(x: Tensor) -> Tensor:
    """The layout of a Hugging Face attention function: ``[heads, rows, head_dim]`` in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [strided, transposed_heads, lambda x: torch.stack([x, x], dim=-1)[..., 0]],
    ids=["gaps", "transposed_heads", "last_stride_2"],
)
def test_strided_inputs_give_the_same_result(view, dtype, native_calls):
    inputs = attention_inputs((40, 3, 70), dtype=dtype, head_dim=24)
    policy, dout = random_policy(inputs), torch.randn_like(inputs.q)
    expected = our_attention(inputs, policy), *gradients(our_attention, inputs, policy, dout)
    leaves = [view(x).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    spaced = torch.stack([policy, policy], dim=-1)[:, 1].requires_grad_()
    out = our_attention(AttentionInputs(*leaves, *inputs.boundaries), spaced)
    assert_bitwise_equal((out, *torch.autograd.grad(out, [*leaves, spaced], view(dout))), expected)


def test_a_segment_does_not_depend_on_its_neighbours(native_calls):
    inputs = attention_inputs((70, 33, 5))
    policy, dout = random_policy(inputs), torch.randn_like(inputs.q)
    rows = slice(70, 103)
    part = AttentionInputs(*(x[rows] for x in (inputs.q, inputs.k, inputs.v)), *(cu_seqlens_of([33]),) * 2, 33, 33)
    assert_bitwise_equal(our_attention(part, policy[rows]), our_attention(inputs, policy)[rows])
    alone = gradients(our_attention, part, policy[rows], dout[rows])
    whole = gradients(our_attention, inputs, policy, dout)
    for a, b in zip(alone, whole, strict=True):
        torch.testing.assert_close(a, b[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_whatever_memory_held(dtype, native_calls):
    inputs = attention_inputs((200, 0, 130), heads=(4, 2), dtype=dtype, head_dim=64, tail=9)
    policy, dout = random_policy(inputs), torch.randn_like(inputs.q)
    assert_repeatable(lambda: our_attention(inputs, policy))
    assert_repeatable(lambda: gradients(our_attention, inputs, policy, dout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(dtype, native_calls):
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for seed in range(15):
        heads_k = draw(1, 4)
        inputs = attention_inputs(
            [draw(0, 90) for _ in range(draw(1, 6))],
            heads=(heads_k * draw(1, 5), heads_k),
            head_dim=draw(1, 150),
            dtype=dtype,
            tail=draw(0, 3),
            seed=seed,
        )
        check(inputs)


def test_the_reference_is_its_formula_written_out():
    """The oracle of this file, number by number."""
    inputs, epsilon, scale = attention_inputs((3, 6), heads=(4, 2), dtype=torch.float64, tail=1), 0.2, 0.4
    policy = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 0.0, 1.0, 0.3, -0.2, 1.0], dtype=torch.float64)
    out = reference_attention(inputs, policy, softmax_scale=scale, epsilon=epsilon)
    for start, stop in ((0, 3), (3, 9)):
        for i in range(start, stop):
            for head in range(4):
                scores = [scale * float(inputs.q[i, head] @ inputs.k[j, head // 2]) for j in range(start, i + 1)]
                e = [math.exp(score - max(scores)) for score in scores]
                e = [x * (1.0 if j == i else float(policy[j])) for j, x in enumerate(e, start)]
                share = epsilon / (stop - start)
                weights = [share + (e[j - start] if j <= i else 0.0) for j in range(start, stop)]
                total = sum(w * inputs.v[j, head // 2] for j, w in enumerate(weights, start))
                torch.testing.assert_close(out[i, head], total / (sum(e) + epsilon), rtol=1e-12, atol=1e-12)
    assert (out[9] == 0).all()


@pytest.mark.usefixtures("unforced")
def test_gradcheck_of_the_reference():
    """With so small an epsilon the largest score cancels, so that taking it as a constant changes no derivative."""
    inputs = attention_inputs((5, 0, 4), heads=(4, 2), head_dim=3, dtype=torch.float64, tail=1)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, torch.rand(10, dtype=torch.float64))]

    def call(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
        return ops.policy_attention(q, k, v, policy, inputs.cu_seqlens_q, 5, epsilon=1e-9)

    assert torch.autograd.gradcheck(call, leaves)


def test_the_policy_gradient_predicts_a_change_of_the_policy(native_calls):
    """A small step along dpolicy changes the loss by the square of its length."""
    inputs = attention_inputs((60, 20))
    policy, dout = 0.5 + 0.5 * torch.rand(80), torch.randn_like(inputs.q)
    grad = gradients(our_attention, inputs, policy, dout)[3]
    step = 1e-3 * grad / grad.norm()
    change = ((our_attention(inputs, policy + step) - our_attention(inputs, policy - step)).double() * dout).sum()
    torch.testing.assert_close(change, 2e-3 * grad.norm().double(), rtol=1e-3, atol=0)


def test_only_the_policy_may_want_a_gradient(native_calls):
    inputs = attention_inputs((9, 4))
    policy = random_policy(inputs).requires_grad_()
    (grad,) = torch.autograd.grad(our_attention(inputs, policy).sum(), policy)
    expected = gradients(our_attention, inputs, policy.detach(), torch.ones_like(inputs.q))[3]
    assert_bitwise_equal(grad, expected)


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    inputs = attention_inputs((5, 3))
    policy = random_policy(inputs).requires_grad_()
    (grad,) = torch.autograd.grad(our_attention(inputs, policy).square().sum(), policy, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_attention is differentiable once"):
        grad.sum().backward()
    with backends.use("reference"):
        (grad,) = torch.autograd.grad(our_attention(inputs, policy).square().sum(), policy, create_graph=True)
        grad.sum().backward()
    assert policy.grad is not None


@pytest.mark.usefixtures("unforced")
def test_float64_runs_on_the_reference():
    inputs = attention_inputs((9, 4), dtype=torch.float64)
    policy = torch.rand(13, dtype=torch.float64)
    with backends.record_calls() as calls:
        out = our_attention(inputs, policy)
    assert calls == {("policy_attention", "reference"): 1}
    assert_bitwise_equal(out, reference_attention(inputs, policy))


def test_autocast_casts_the_inputs_and_leaves_the_policy(native_calls):
    inputs = attention_inputs((9, 4))
    policy = random_policy(inputs)
    expected = our_attention(inputs.to(torch.bfloat16), policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bitwise_equal(our_attention(inputs, policy), expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_official_masked_softmax_attention_and_its_gradients(backend):
    """Batches of ``[B, heads, N, D]`` with a policy ``[B, N, 1]``, at the default scale and epsilon."""
    golden = {
        name: torch.from_numpy(array) for name, array in np.load(GOLDENS / "dllava_fn_policy_softmax.npz").items()
    }
    batch, heads, length, dim = golden["q"].shape

    def packed(name: str) -> Tensor:
        return golden[name].transpose(1, 2).reshape(batch * length, heads, dim)

    cu_seqlens = cu_seqlens_of([length] * batch)
    leaves = [packed(name).requires_grad_() for name in ("q", "k", "v")]
    policy = golden["policy"].flatten().requires_grad_()
    with backends.use(backend):
        out = ops.policy_attention(*leaves, policy, cu_seqlens, length)
    torch.testing.assert_close(out, packed("out"), rtol=0, atol=1e-6)
    grads = torch.autograd.grad(out, [*leaves, policy], packed("grad_out"))
    expected = [*(packed(f"grad_{name}") for name in ("q", "k", "v")), golden["grad_policy"].flatten()]
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(1e-5 * theirs.abs().max()))
