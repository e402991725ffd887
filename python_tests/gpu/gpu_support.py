"""What the GPU tests share: moving arguments, the CPU kernels as oracle, graph capture, a guard against waiting.

Which kernels run on the device is up to the fixtures ``backend``, ``native`` and ``triton``. With
``PRUNEOPS_GPU_REHEARSAL=1`` the device is the CPU; those in Triton then need ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pruneops import _triton_library, backends, ops, reference, testing
from pruneops.ops import DPCKNNResult
from pruneops.testing import (
    BACKWARD_FACTOR,
    FORWARD_FACTOR,
    PEER_ORDERS,
    AttentionInputs,
    assert_bitwise_equal,
    assert_within_rounding,
    peer_attention,
    peer_policy_attention,
    peer_policy_gradients,
    peer_scores,
    strided,
)

# The interpreter runs one block after the other, so twice gives the same and takes twice as long.
repeatable = (lambda call: call()) if _triton_library.interpreting else testing.assert_repeatable

REHEARSAL = os.environ.get("PRUNEOPS_GPU_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(value: Any) -> Any:
    """The same nested value with every tensor copied to the device (densely; see the views below)."""
    return tree_map_only(Tensor, lambda x: x.to(DEVICE), value)


def on_cpu(value: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.cpu(), value)


def forced_op(op: str) -> Any:
    """The op of the backend under test, as torch knows it."""
    backend = backends.select(op.removesuffix("_backward"), DEVICE.type)
    return getattr(getattr(torch.ops, backends.NAMESPACES[backend]), op).default


def raw(op: str, *args: Any) -> Any:
    """The op under test itself, without the checks of its front-end: the kernel has to cope with any values."""
    return forced_op(op)(*args)


def cpu_kernel(op: str, *args: Any) -> Any:
    """What the compiled CPU kernel makes of the same call."""
    return getattr(torch.ops.pruneops, op).default(*args)


def on_both(call: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """``call(*args)`` on the device by the backend under test, and on the CPU by the compiled kernels."""
    ours = on_cpu(call(*on_device(args)))
    with backends.use(backends.NATIVE):
        return ours, call(*args)


def assert_equals_cpu_kernel(op: str, *args: Any) -> Any:
    """Asserts that the kernel under test writes the bytes of the CPU kernel, twice, whatever memory held before."""
    ours = repeatable(lambda: raw(op, *on_device(args)))
    assert all(x.device.type == DEVICE.type for x in tree_leaves(ours))
    assert_bitwise_equal(on_cpu(ours), cpu_kernel(op, *args), op)
    return ours


def first_rehearsed(values: Iterable[Any]) -> list[Any]:
    """The values of a parametrised test, the first of which is also rehearsed under Triton's interpreter."""
    first, *others = values
    return [pytest.param(first, marks=pytest.mark.rehearsed), *others]


# Views with the values of a dense device tensor.


def with_gaps(x: Tensor) -> Tensor:
    """Rows with gaps between them and a base address off every alignment."""
    with DEVICE:
        return strided(x)


def every_second(x: Tensor) -> Tensor:
    """A last stride of 2."""
    return torch.stack([x, x], dim=-1)[..., 1]


def head_major(x: Tensor) -> Tensor:
    """Dimensions 0 and 1 swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


# Scores of attention.


def last_query(module: Any, inputs: AttentionInputs, **options: Any) -> Tensor:
    return module.last_query_scores(inputs.q, inputs.k, inputs.cu_seqlens_q, inputs.cu_seqlens_k, **options)


def column(module: Any, inputs: AttentionInputs, **options: Any) -> Tensor:
    return module.column_scores(inputs.q, inputs.k, *inputs.boundaries, **options)


def inputs_on_device(inputs: AttentionInputs, view: Callable[[Tensor], Tensor] = lambda x: x) -> AttentionInputs:
    q, k, v = (view(x.to(DEVICE)) for x in (inputs.q, inputs.k, inputs.v))
    return AttentionInputs(q, k, v, *on_device(inputs.boundaries))


def assert_scores_within_rounding(
    call: Callable[..., Tensor],
    inputs: AttentionInputs,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    **options: Any,
) -> Tensor:
    """Compares the device's scores with a float64 oracle on the CPU; plain torch in float32 sets the tolerance."""
    ours = repeatable(lambda: call(ops, inputs_on_device(inputs, view), **on_device(options)))
    assert ours.dtype == torch.float32 and ours.shape == (inputs.k.shape[0],)
    assert ours.device.type == DEVICE.type
    options.pop("softmax_lse", None)
    oracle = call(reference, inputs.to(torch.float64), **options)
    if call is last_query:
        options = {"causal": False, "query_reduce": "mean", **options}
    peers = [peer_scores(inputs.to(torch.float32), order=order, **options) for order in PEER_ORDERS]
    # A probability is exp(logit - lse): rounding the LSE moves it by as much as the LSE is large.
    kept = {name: options[name] for name in ("causal", "softmax_scale", "kv_limit") if name in options}
    lse = peer_attention(inputs.to(torch.float64), **kept)[1]
    condition = 1.0 + max([0.0, *lse[lse.isfinite()].abs().tolist()])
    assert_within_rounding(ours.cpu(), peers, oracle, condition=condition, name="scores")
    return ours


# Clustering.


def assert_density_peaks(
    ours: DPCKNNResult, x: Tensor, cu_seqlens: Tensor, counts: Sequence[int], k: int, noise: Tensor | None = None
) -> None:
    """Holds every step of dpc_knn against float64, given what the step before it found; all tensors on the CPU.

    So no step can hide behind the rounding of another one. The margin is 1e-6 of the largest distance of a segment.
    """
    bounds = cu_seqlens.clamp(0, x.shape[0]).cummax(0).values.tolist()
    assert ours.cu_clusters[0] == 0
    inside = torch.zeros(x.shape[0], dtype=torch.bool)
    for b, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        first, last = ours.cu_clusters[b : b + 2].tolist()
        wanted = min(max(counts[b], 1), stop - start)
        assert last == min(first + wanted, ours.center_indices.shape[0])
        inside[start:stop] = True
        if start < stop:
            segment = slice(start, stop)
            _assert_peaks_of_segment(
                *(part[segment] for part in (ours.cluster_ids, ours.density, ours.delta, ours.score)),
                ours.center_indices[first:last].long() - start,
                x[segment],
                k,
                None if noise is None else noise[segment],
            )
    assert (ours.center_indices[int(ours.cu_clusters[-1]) :] == -1).all()
    assert (ours.cluster_ids[~inside] == -1).all()
    for part in (ours.density, ours.delta, ours.score):
        assert (part[~inside] == 0).all()


def _assert_peaks_of_segment(
    ids: Tensor,
    density: Tensor,
    delta: Tensor,
    score: Tensor,
    centers: Tensor,
    x: Tensor,
    k: int,
    noise: Tensor | None,
) -> None:
    wide, rows = x.double(), torch.arange(x.shape[0])
    exact = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / max(x.shape[1], 1) ** 0.5
    exact = exact.nan_to_num(torch.inf, torch.inf).fill_diagonal_(0.0)
    margin = 1e-6 * max([0.0, *exact[exact.isfinite()].flatten().amax(0, keepdim=True).tolist()])

    nearest = exact.topk(min(k, len(rows)), largest=False).values
    expected = (-nearest.square().mean(-1)).exp()
    slack = 2 * nearest[:, -1].nan_to_num(posinf=0.0) * margin + 2e-6
    if noise is not None:
        expected = expected + noise.double() * 1e-6
    assert ((density.double() - expected).abs() <= expected * slack + 1e-30).all()

    denser = density > density[:, None]
    if noise is None:
        denser |= (density == density[:, None]) & (rows < rows[:, None])
    expected = torch.where(denser.any(-1), exact.masked_fill(~denser, torch.inf).amin(-1), exact.max())
    assert ((delta == expected) | ((delta - expected).abs() <= margin)).all()
    assert torch.equal(score.nan_to_num(-1.0), (delta * density).nan_to_num(-1.0))

    order = sorted(rows.tolist(), key=lambda i: (-score[i].item() if score[i] == score[i] else torch.inf, i))
    assert centers.tolist() == order[: len(centers)]
    if len(centers) == 0:
        assert (ids == -1).all()
        return
    assert torch.equal(ids[centers], torch.arange(len(centers), dtype=torch.int32))
    assert ((ids >= 0) & (ids < len(centers))).all()
    others = ~torch.isin(rows, centers)
    to_centers = exact[:, centers]
    chosen = to_centers.gather(1, ids[:, None].long())[:, 0]
    least = to_centers.amin(-1)
    assert ((chosen == least) | (chosen <= least + margin))[others].all()


# Attention under a policy.


def policy_attention(
    module: Any, inputs: AttentionInputs, policy: Tensor, dout: Tensor, **options: Any
) -> list[Tensor]:
    """Output and the four gradients."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, policy)]
    out = module.policy_attention(*leaves, inputs.cu_seqlens_q, inputs.max_seqlen_q, **options)
    if not out.requires_grad:  # a batch without segments connects nothing
        return [out, *(torch.zeros_like(x) for x in leaves)]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def assert_policy_within_rounding(
    inputs: AttentionInputs,
    policy: Tensor,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    **options: Any,
) -> None:
    """Compares output and gradients on the device with a float64 oracle on the CPU."""
    dout = torch.randn_like(inputs.q)
    moved, policy_moved, dout_moved = inputs_on_device(inputs, view), on_device(policy), view(on_device(dout))
    ours = repeatable(lambda: policy_attention(ops, moved, policy_moved, dout_moved, **options))
    oracle = policy_attention(reference, inputs.to(torch.float64), policy.double(), dout, **options)
    orders = PEER_ORDERS if inputs.q.dtype == torch.float32 else (0,)
    peers = [[peer_policy_attention(inputs, policy, order=order, **options)] for order in orders]
    for peer, order in zip(peers, orders, strict=True):
        peer += peer_policy_gradients(inputs, policy, dout, order=order, **options)
    scale = options.get("softmax_scale", inputs.q.shape[2] ** -0.5)
    lengths = [float(x.double().norm(dim=-1).max()) if x.numel() else 0.0 for x in (inputs.q, inputs.k)]
    for i, name in enumerate(("out", "dq", "dk", "dv", "dpolicy")):
        # A large dpolicy is a single exponential: rounding its logit moves it by as much as the logit is large.
        condition = 1.0 + abs(scale) * lengths[0] * lengths[1] if name == "dpolicy" else 1.0
        factor = FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR
        expected = [peer[i] for peer in peers]
        assert_within_rounding(ours[i].cpu(), expected, oracle[i], factor=factor, condition=condition, name=name)


# Asynchrony.


@contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    if REHEARSAL:
        yield
        return
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def no_synchronisation() -> AbstractContextManager[None]:
    """Turns every wait of the host for the device that torch knows of into an error."""
    return _sync_debug_mode("error")


def synchronisation() -> AbstractContextManager[None]:
    """Within `no_synchronisation`: where waiting is allowed."""
    return _sync_debug_mode("default")


class Captured:
    """A call captured in a CUDA graph; ``replay()`` runs it on what its inputs hold by then.

    Capture fails if the call waits for the device by any means, so it also proves that a kernel does not.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        if REHEARSAL:
            self.outputs = call()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = call()

    def replay(self) -> Any:
        if REHEARSAL:
            for old, new in zip(tree_leaves(self.outputs), tree_leaves(self._call()), strict=True):
                old.copy_(new)
        else:
            self._graph.replay()
            torch.cuda.synchronize()
        return self.outputs
