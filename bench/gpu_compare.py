"""One GPU comparison: check the results, time both sides, record everything the report needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import gpu_timing as timing
from bench.gpu_timing import DEVICE, INTERPRETING, REHEARSAL, Call
from bench.timing import check
from bench.workloads import Workload
from pruneops import backends

# A rehearsal divides lengths by this; what Triton interprets has to be smaller still.
SHRINK = 256 if INTERPRETING else 16


def sized(work: Workload) -> Workload:
    """The workload itself; in a rehearsal a small part of it."""
    if not REHEARSAL:
        return work
    most = 2 if INTERPRETING else 4
    grouped = work.heads != work.kv_heads
    return replace(
        work,
        seqlens=tuple(max(2, n // SHRINK) for n in work.seqlens[: most**2]),
        visual=max(2, work.visual // SHRINK),
        hidden=64,
        heads=work.heads // work.kv_heads if grouped else most,
        kv_heads=1 if grouped else most,
        head_dim=32,
    )


def smaller(n: int) -> int:
    """A number of rows; in a rehearsal a small part of it."""
    return max(8, n // (4 * SHRINK)) if REHEARSAL else n


def first_rehearsed(values: Iterable[Any]) -> list[Any]:
    """The values of a parametrised benchmark, the first of which is also rehearsed under Triton's interpreter."""
    first, *others = values
    return [pytest.param(first, marks=pytest.mark.rehearsed), *others]


def bytes_of(*values: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


def rotated(make: Callable[[torch.Generator], Any]) -> list[Any]:
    """As many sets of inputs as have to rotate, made from different seeds."""

    def one(seed: int) -> Any:
        return make(torch.Generator(device=DEVICE).manual_seed(seed))

    first = one(0)
    return [first, *(one(seed) for seed in range(1, timing.sets_needed(bytes_of(first), timing.cache_bytes())))]


def versus(
    benchmark: Any,
    backend: str,
    inputs: Sequence[Any],
    ours: Callable[[Any], Any],
    peer: Callable[[Any], Any],
    *,
    op: str,
    workload: str,
    peer_name: str,
    dtype: torch.dtype = torch.float32,
    bytes_moved: int | None = None,
    flops: int | None = None,
    same: Callable[[Any, Any], None] = check,
    gradients: bool = False,
    target_ratio: float | None = None,
    target_us: float | None = None,
    target_of_copy: float | None = None,
) -> None:
    """Compares ``ours(x)`` on a backend with ``peer(x)`` over the rotating ``inputs``; the result goes into the JSON.

    ``same`` compares the results before anything is timed. ``bytes_moved`` or ``flops`` of one call turn the time
    in a graph into a rate beside the ceiling. ``gradients`` leaves autograd on. Targets are recorded, and missing one
    fails nothing.
    """

    def bound(function: Callable[[Any], Any]) -> list[Call]:
        return [lambda x=x: function(x) for x in inputs]

    with backends.use(backend), torch.inference_mode(not gradients):
        for x in inputs[: timing.MIN_SETS]:
            same(ours(x), peer(x))
        results = timing.compare(bound(ours), bound(peer))
        ceilings = timing.ceilings()
        graph = results["graph"]
        info = benchmark.extra_info
        info.update(graph.as_dict())
        info.update(
            op=op,
            backend=backend,
            workload=workload,
            peer=peer_name,
            dtype=str(dtype).removeprefix("torch."),
            eager=results["eager"].as_dict(),
            sets=len(inputs),
            rotated_mb=bytes_of(inputs) / 1e6,
            cache_mb=timing.cache_bytes() / 1e6,
            ceilings=ceilings.as_dict(),
            targets={} if REHEARSAL else {"ratio": target_ratio, "us": target_us, "of_copy": target_of_copy},
        )
        if bytes_moved is not None:
            rate = bytes_moved / graph.ours_ms / 1e6
            info.update(rate=rate, rate_unit="GB/s", of_ceiling=rate / ceilings.copy_gbs)
        elif flops is not None:
            rate = flops / graph.ours_ms / 1e9
            ceiling = ceilings.bf16_gemm_tfs if dtype == torch.bfloat16 else ceilings.fp32_gemm_tfs
            info.update(rate=rate, rate_unit="TF/s", of_ceiling=rate / ceiling)

        def once() -> None:
            ours(inputs[0])
            timing.synchronise()

        benchmark.pedantic(once, rounds=1 if REHEARSAL else 3, iterations=1)
