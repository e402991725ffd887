"""What tests of the ops share: the tolerance rule, ragged inputs, a peer in plain torch of the same dtype.

The tolerance rule compares with a float64 oracle and asks how far plain torch of the same dtype is from
it. A kernel may be twice as far (three times in a backward pass), plus one rounding of the largest value::

    max|ours - oracle| <= factor * max|peer - oracle| + eps(dtype) * max|oracle|

and the same for the root mean square. There are no absolute tolerances to tune.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruneops import backends

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0


def assert_within_rounding(
    ours: Tensor,
    peers: Tensor | Sequence[Tensor],
    oracle: Tensor,
    *,
    factor: float = FORWARD_FACTOR,
    condition: float = 1.0,
    name: str = "output",
) -> None:
    """Asserts the tolerance rule of this module.

    Parameters
    ----------
    ours : the result under test
    peers : the same computed by plain torch in the dtype of the inputs
        Several, in different orders of summation, where few values would make the error of one a matter of
        luck; the largest error counts.
    oracle : the same computed in float64
    factor : how many times the error of the peer is allowed
    condition : by how much the computation amplifies one rounding of an intermediate result

    Raises
    ------
    AssertionError
        If shapes differ, infinities or NaN are not in the same places, or the error is too large.
    """
    assert ours.shape == oracle.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    eps = torch.finfo(ours.dtype).eps
    ours, oracle = ours.double(), oracle.double()
    finite = oracle.isfinite()
    same = (ours == oracle) | (ours.isnan() & oracle.isnan())
    wrong = int((~(same | finite) | (finite & ~ours.isfinite())).sum())
    assert wrong == 0, f"{name}: {wrong} values are not finite where the oracle is, or the other way round"
    if not finite.any():
        return
    error = (ours - oracle)[finite].abs()
    peers = [peers] if isinstance(peers, Tensor) else peers
    peer_errors = [(peer.double() - oracle)[finite].abs() for peer in peers]
    size = oracle[finite].abs()
    for norm, what in ((_max, "largest"), (_rms, "root mean square")):
        bound = factor * max(norm(peer_error) for peer_error in peer_errors) + eps * condition * norm(size)
        got = norm(error)
        assert got <= bound, f"{name}: {what} error {got:.3e} is above {bound:.3e}"


def _max(values: Tensor) -> float:
    return float(values.max())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def backend_under_test() -> str:
    """The backend that ``PRUNEOPS_BACKEND`` forces; ``native`` where it forces none."""
    return os.environ.get("PRUNEOPS_BACKEND") or "native"


def ops_under_test() -> Any:
    """The registered ops of the backend under test, which take what the front-ends have checked."""
    return getattr(torch.ops, backends.NAMESPACES[backend_under_test()])


def flatten(result: Any) -> list[Tensor]:
    """All tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for item in result for tensor in flatten(item)]


def assert_bitwise_equal(ours: Any, expected: Any, name: str = "result") -> None:
    """Asserts that two results hold tensors of equal shape, dtype and bytes (so NaN equals itself)."""
    ours, expected = flatten(ours), flatten(expected)
    assert len(ours) == len(expected), f"{name}: {len(ours)} tensors, expected {len(expected)}"
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.shape == b.shape, f"{name}[{i}]: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{name}[{i}]: dtype {a.dtype}, expected {b.dtype}"
        a, b = (x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b))
        assert torch.equal(a, b), f"{name}[{i}]: bytes differ"


def assert_repeatable(call: Callable[[], Any]) -> Any:
    """Calls again after filling freed memory of the same sizes with NaN or -7, and returns the first result.

    Equal bytes mean that the op is deterministic and leaves no part of its outputs unwritten.
    """
    first = call()
    for _ in range(2):
        poison = [
            torch.full_like(x, torch.nan if x.is_floating_point() else 1 if x.dtype == torch.bool else -7)
            for x in flatten(first)
            for _ in range(4)
            if not x.is_complex()
        ]
        del poison
        assert_bitwise_equal(call(), first, "second call")
    return first


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """int32 ``[B+1]`` boundaries of segments of these lengths."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(torch.int32)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values of any dtype that torch has, small whole numbers for the integer ones."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    return torch.randint(0, 100, shape, dtype=dtype)


def some_indices(rows: int, count: int) -> Tensor:
    """Distinct rows in random order with a few -1 among them."""
    indices = torch.randperm(max(rows, count))[:count].to(torch.int32)
    return torch.where(indices < rows, indices, -1)


def strided(x: Tensor) -> Tensor:
    """A copy of ``x`` in a larger buffer of NaN (or -7): gaps between rows and, within a row, unit stride."""
    fill = torch.nan if x.is_floating_point() else 1 if x.dtype == torch.bool else -7
    padded = torch.full([size + 3 for size in x.shape], fill, dtype=x.dtype)
    view = padded[tuple(slice(1, 1 + size) for size in x.shape)]
    return view.copy_(x)


# Lengths of query and key segments: empty batch, empty segments, length 1, off every tile size, and more
# segments than a large GPU has multiprocessors.
LENGTHS: dict[str, tuple[int, ...]] = {
    "no_segments": (),
    "empty": (0,),
    "one_row": (1,),
    "one_segment": (67,),
    "mixed": (0, 1, 7, 33, 0, 64, 129, 2),
    "many": tuple((i * 7) % 5 for i in range(140)),
}


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of an attention op; ``q``, ``k`` and ``v`` may have rows past the last segment."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same values in another dtype, as leaves of their own autograd graph."""
        q, k, v = (x.detach().to(dtype) for x in (self.q, self.k, self.v))
        return AttentionInputs(q, k, v, *self.boundaries)

    @property
    def boundaries(self) -> tuple[Tensor, Tensor, int, int]:
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, *self.boundaries


def attention_inputs(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    tail: int = 0,
    seed: int = 0,
) -> AttentionInputs:
    """Random attention inputs for these segment lengths, with ``tail`` unused rows at the end."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, count: int) -> Tensor:
        return torch.randn(rows + tail, count, head_dim, generator=generator).to(dtype)

    total_q, total_k = sum(lengths_q), sum(lengths_k)
    return AttentionInputs(
        draw(total_q, heads[0]),
        draw(total_k, heads[1]),
        draw(total_k, heads[1]),
        cu_seqlens_of(lengths_q),
        cu_seqlens_of(lengths_k),
        max([0, *lengths_q]),
        max([0, *lengths_k]),
    )


# Peers differ in what float arithmetic leaves open: the order of summation over the head dimension, and
# whether a softmax is exp(x) / sum(exp(x)) or exp(x - lse).
PEER_ORDERS = (0, 1, 2)


def _peer_segments(
    inputs: AttentionInputs, causal: bool, softmax_scale: float | None, kv_limit: Tensor | None, order: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Per segment its query rows, its keys, LSE and probabilities."""
    q, k = inputs.q, inputs.k
    if order:
        generator = torch.Generator().manual_seed(order)
        dims = torch.randperm(q.shape[-1], generator=generator)
        q, k = q[..., dims], k[..., dims]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    cu_q, cu_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        length_q, length_k = rows.stop - rows.start, keys.stop - keys.start
        limit = torch.full((length_q,), length_k)
        if kv_limit is not None:
            limit = kv_limit[rows]
        elif causal:
            limit = torch.arange(length_q) + length_k - length_q + 1
        hidden = torch.arange(length_k) >= limit.clamp(0, length_k)[:, None]
        dead = hidden.all(-1, keepdim=True)
        keys_b = k[keys].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)
        logits = (q[rows].transpose(0, 1) @ keys_b.transpose(1, 2)) * scale
        logits = logits.masked_fill(hidden & ~dead, -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        probs = (logits - lse).exp() if order % 2 else logits.softmax(-1)
        yield rows, keys, lse.masked_fill(dead, -torch.inf), probs.masked_fill(dead, 0.0)


def peer_attention(
    inputs: AttentionInputs,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    kv_limit: Tensor | None = None,
    order: int = 0,
) -> tuple[Tensor, Tensor]:
    """Differentiable ``out`` and ``softmax_lse`` in plain torch, all steps in the dtype of the inputs.

    Rows that see no key are handled as :func:`pruneops.reference.varlen_attention` does. ``order`` is one of
    :data:`PEER_ORDERS`.
    """
    q, v = inputs.q, inputs.v
    outs, lses, end = [], [], 0
    for rows, keys, lse, probs in _peer_segments(inputs, causal, softmax_scale, kv_limit, order):
        values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)
        outs.append((probs @ values).transpose(0, 1))
        lses.append(lse[..., 0])
        end = rows.stop
    outs.append(q.new_zeros(q.shape[0] - end, *q.shape[1:]))
    lses.append(q.new_full((q.shape[1], q.shape[0] - end), -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def peer_gradients(
    inputs: AttentionInputs,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    kv_limit: Tensor | None = None,
) -> list[Tensor]:
    """dq, dk and dv by the formula of FlashAttention, which autograd of a softmax does not use.

    ``dS = P * (dP - rowsum(dout * out) + dlse)``. Where ``dP`` and the row sum cancel, as in a row with one
    key, autograd is exact and this is not.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, _, probs in _peer_segments(inputs, causal, softmax_scale, kv_limit, 0):
        queries, upstream = q[rows].transpose(0, 1), dout[rows].transpose(0, 1)
        keys_b, values_b = (x[keys].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        delta = (upstream * (probs @ values_b)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, rows, None].to(delta.dtype)
        ds = probs * (upstream @ values_b.transpose(1, 2) - delta)
        dq[rows] = (ds @ keys_b * scale).transpose(0, 1)
        for grad, per_head in (
            (dk, ds.transpose(1, 2) @ queries * scale),
            (dv, probs.transpose(1, 2) @ upstream),
        ):
            grad[keys] = per_head.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return [dq, dk, dv]


def peer_scores(
    inputs: AttentionInputs,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    kv_limit: Tensor | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "sum",
    order: int = 0,
) -> Tensor:
    """Column scores in plain torch, all steps in the dtype of the inputs; ``order`` is in `PEER_ORDERS`."""
    reductions = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
    scores = inputs.q.new_zeros(inputs.k.shape[0])
    for rows, keys, _, probs in _peer_segments(inputs, causal, softmax_scale, kv_limit, order):
        if rows.stop > rows.start:
            scores[keys] = reductions[query_reduce](reductions[head_reduce](probs, 0), 0)
    return scores


def peer_scatter_scaled(x: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """scatter_scaled as a chain of plain torch ops, all of them in the dtype of ``x``."""
    chosen, scale = indices >= 0, weights.to(x.dtype)[:, None]
    rows = indices[chosen].long()
    mixed = x.index_put((rows,), branch[chosen]) * scale
    return mixed.index_put((rows,), residual[chosen] + scale[rows] * branch[chosen])


def peer_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    target: Tensor | None = None,
    activation: str = "tanh",
    scale: float = 1.0,
    shift: float = 0.0,
    order: int = 0,
) -> tuple[Tensor, Tensor]:
    """router_weights as a chain of plain torch ops in the dtype of ``x``; ``order`` is in `PEER_ORDERS`."""
    if order:
        generator = torch.Generator().manual_seed(order)
        columns, rows = (torch.randperm(n, generator=generator) for n in (x.shape[1], x.shape[0]))
        options = {"activation": activation, "scale": scale, "shift": shift}
        moved = None if target is None else target[rows]
        logits, weights = peer_router(x[rows][:, columns], weight[columns], bias, target=moved, **options)
        back = rows.argsort()
        return logits[back], weights[back]
    logits = torch.nn.functional.linear(x, weight[None], bias)[:, 0]
    activate = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": torch.clone}[activation]
    weights = scale * activate(logits) + shift
    if target is None:
        return logits, weights
    return torch.where(target, logits, -torch.inf), torch.where(target, weights, 1.0)


def _peer_policy_segments(
    inputs: AttentionInputs, policy: Tensor, softmax_scale: float | None, order: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Per segment its rows, its logits in float32, -inf where not causal, and what each key counts in each row."""
    q, k = inputs.q, inputs.k
    if order:
        dims = torch.randperm(q.shape[-1], generator=torch.Generator().manual_seed(order))
        q, k = q[..., dims], k[..., dims]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    cu = inputs.cu_seqlens_q.tolist()
    for start, stop in zip(cu[:-1], cu[1:], strict=True):
        if start == stop:
            continue
        rows, own = slice(start, stop), torch.eye(stop - start)
        keys = k[rows].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)
        logits = (q[rows].transpose(0, 1) @ keys.transpose(1, 2)) * scale
        logits = logits.masked_fill(torch.ones_like(own).triu(1).bool(), -torch.inf).float()
        yield rows, logits, policy[rows] + (1.0 - policy[rows]) * own


def peer_policy_attention(
    inputs: AttentionInputs,
    policy: Tensor,
    *,
    softmax_scale: float | None = None,
    epsilon: float = 1e-6,
    order: int = 0,
) -> Tensor:
    """Differentiable ``out`` of policy_attention in plain torch: products in the inputs' dtype, softmax in float32.

    ``order`` is one of :data:`PEER_ORDERS`.
    """
    q, v = inputs.q, inputs.v
    outs, end = [], 0
    for rows, logits, counts in _peer_policy_segments(inputs, policy, softmax_scale, order):
        e = (logits - logits.detach().amax(-1, keepdim=True)).exp() * counts
        values = v[rows].repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)
        above, below = e + epsilon / e.shape[-1], e.sum(-1, keepdim=True) + epsilon
        product = (
            (above.to(v.dtype) @ values) / below.to(v.dtype) if order % 2 else (above / below).to(v.dtype) @ values
        )
        outs.append(product.transpose(0, 1))
        end = rows.stop
    outs.append(q.new_zeros(q.shape[0] - end, *q.shape[1:]))
    return torch.cat(outs)


def peer_policy_gradients(
    inputs: AttentionInputs,
    policy: Tensor,
    dout: Tensor,
    *,
    softmax_scale: float | None = None,
    epsilon: float = 1e-6,
    order: int = 0,
) -> list[Tensor]:
    """dq, dk, dv and dpolicy as fast kernels compute them, which autograd of a softmax does not.

    ``de = (dP - rowsum(dout * out)) / (sum of e + epsilon)``: where the two cancel, as in a row with one key, autograd
    is exact and this is not. Logits are computed anew, in another ``order``, while the largest and the sum are those of
    the forward pass.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    dq, dk, dv, dpolicy = (torch.zeros_like(x) for x in (q, k, v, policy))
    forward = _peer_policy_segments(inputs, policy, softmax_scale, 0)
    again = _peer_policy_segments(inputs, policy, softmax_scale, order)
    for (rows, first, counts), (_, logits, _) in zip(forward, again, strict=True):
        largest = first.amax(-1, keepdim=True)
        e = (logits - largest).exp()
        queries, upstream = q[rows].transpose(0, 1), dout[rows].transpose(0, 1)
        keys, values = (x[rows].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        below = ((first - largest).exp() * counts).sum(-1, keepdim=True) + epsilon
        weights = ((e * counts + epsilon / e.shape[-1]) / below).to(q.dtype)
        delta = (upstream * (weights @ values)).sum(-1, keepdim=True)
        change = e / below * (upstream @ values.transpose(1, 2) - delta).float()
        others = 1.0 - torch.eye(e.shape[-1])
        dpolicy[rows] = (change * others).sum((0, 1))
        ds = (change * counts).to(q.dtype)
        dq[rows] = (ds @ keys * scale).transpose(0, 1)
        for grad, per_head in (
            (dk, ds.transpose(1, 2) @ queries * scale),
            (dv, weights.transpose(1, 2) @ upstream),
        ):
            grad[rows] = per_head.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return [dq, dk, dv, dpolicy]
