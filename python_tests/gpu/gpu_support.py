"""What the GPU tests share: moving arguments, the CPU kernels as oracle, graph capture, a guard against waiting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pruneops import ops, reference
from pruneops.testing import (
    PEER_ORDERS,
    AttentionInputs,
    assert_bitwise_equal,
    assert_repeatable,
    assert_within_rounding,
    peer_attention,
    peer_scores,
    strided,
)

REHEARSAL = os.environ.get("PRUNEOPS_GPU_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")

#: Ops that must have a compiled CUDA kernel.
NATIVE_OPS = (
    "segment_topk",
    "segment_threshold",
    "gather_rows",
    "scatter_rows",
    "select_compact",
    "last_query_scores",
    "column_scores",
    "kv_limit_from_positions",
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(value: Any) -> Any:
    """The same nested value with every tensor copied to the device (densely; see the views below)."""
    return tree_map_only(Tensor, lambda x: x.to(DEVICE), value)


def on_cpu(value: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.cpu(), value)


def raw(op: str, *args: Any) -> Any:
    """The op itself, without the checks of its front-end: the kernel has to cope with any values."""
    return getattr(torch.ops.pruneops, op).default(*args)


def assert_equals_cpu_kernel(op: str, *args: Any) -> Any:
    """Asserts that the kernels of both devices write equal bytes, twice, whatever memory held before."""
    ours = assert_repeatable(lambda: raw(op, *on_device(args)))
    assert all(x.device.type == DEVICE.type for x in tree_leaves(ours))
    assert_bitwise_equal(on_cpu(ours), raw(op, *args), op)
    return ours


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
    ours = assert_repeatable(lambda: call(ops, inputs_on_device(inputs, view), **on_device(options)))
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


# Asynchrony.


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Turns every wait of the host for the device that torch knows of into an error."""
    if REHEARSAL:
        yield
        return
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


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
