"""How a ratio is measured on a GPU.

Both sides are timed in one process in alternating rounds, eagerly and as replays of a CUDA graph, with device
events around the region. Eager times of small ops are host times: what a launch costs. Graph replays leave the
host out. A side comes as a list of calls, each on its own set of buffers, and the sets rotate, so that inputs do
not stay in the L2 cache where their total allows that. The result is the median of the rounds; each round of
replays is itself a median. Ceilings (copy bandwidth, matrix products, the cost of a launch) are measured in the
same run.

With ``PRUNEOPS_GPU_REHEARSAL=1`` everything runs on the CPU, small: that tries the code and measures nothing. Kernels
in Triton need ``TRITON_INTERPRET=1`` there as well, and are called a few times only.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

Call = Callable[[], object]
Round = Callable[[], float]

REHEARSAL = os.environ.get("PRUNEOPS_GPU_REHEARSAL") == "1"
INTERPRETING = REHEARSAL and os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")

ROUNDS = 1 if INTERPRETING else 2 if REHEARSAL else 9
ROUND_MS = 0.1 if REHEARSAL else 20.0
MIN_SETS, MAX_SETS = (1, 1) if INTERPRETING else (4, 48)
CALLS_PER_GRAPH = 1 if INTERPRETING else 16
MIN_REPEATS = 1 if INTERPRETING else 3


@dataclass(frozen=True)
class Comparison:
    """Milliseconds per call; ``ratio`` > 1 means that pruneops is faster.

    ``ratio_low`` and ``ratio_high`` are the extremes of the rounds, ``spread`` is how far apart the rounds of
    pruneops itself are (highest minus lowest, over the median): a smaller difference between two versions is noise.
    """

    ours_ms: float
    peer_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    spread: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def summarise(ours: Sequence[float], peer: Sequence[float]) -> Comparison:
    """The comparison behind the medians of rounds that ran pairwise one after the other."""
    per_round = [p / o for o, p in zip(ours, peer, strict=True)]
    ours_ms, peer_ms = statistics.median(ours), statistics.median(peer)
    spread = (max(ours) - min(ours)) / ours_ms
    return Comparison(ours_ms, peer_ms, peer_ms / ours_ms, min(per_round), max(per_round), spread, len(ours))


def alternate(ours: Round, peer: Round, rounds: int = ROUNDS) -> Comparison:
    """Runs both sides in turn; the one that goes first alternates too. A round returns milliseconds per call."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for i in range(rounds):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            times[side].append((ours, peer)[side]())
    return summarise(times[0], times[1])


def sets_needed(bytes_per_set: int, cache_bytes: int) -> int:
    """How many sets of buffers rotate: at least four, and more than twice the cache together, up to a limit."""
    wanted = -(-2 * cache_bytes // max(bytes_per_set, 1)) + 1
    return max(MIN_SETS, min(MAX_SETS, wanted))


def repeats_for(ms_per_call: float, round_ms: float = ROUND_MS, most: int = 2000) -> int:
    return max(MIN_REPEATS, min(most, int(round_ms / max(ms_per_call, 1e-6))))


def cache_bytes() -> int:
    """The L2 cache of the device."""
    return 1 << 16 if REHEARSAL else torch.cuda.get_device_properties(DEVICE).L2_cache_size


def synchronise() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def elapsed_ms(run: Call) -> float:
    """Device time of what ``run`` enqueues, by events on the current stream."""
    if REHEARSAL:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def eager_round(calls: Sequence[Call]) -> Round:
    """One round: as many calls as fill it, back to back, sets rotating."""
    count = len(calls)

    def several(repeats: int) -> None:
        for i in range(repeats):
            calls[i % count]()

    several(count)
    synchronise()
    repeats = repeats_for(elapsed_ms(lambda: several(count)) / count)
    return lambda: elapsed_ms(lambda: several(repeats)) / repeats


def captured(calls: Sequence[Call]) -> tuple[Call, int]:
    """A replay of a graph that makes every call at least once, and how many calls it makes."""
    rotations = max(1, -(-CALLS_PER_GRAPH // len(calls)))

    def run() -> None:
        for _ in range(rotations):
            for call in calls:
                call()

    if REHEARSAL:
        return run, rotations * len(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, rotations * len(calls)


def graph_round(calls: Sequence[Call]) -> Round:
    """One round: the median of several replays."""
    replay, count = captured(calls)
    replay()
    synchronise()
    repeats = repeats_for(elapsed_ms(replay), most=200)
    return lambda: statistics.median(elapsed_ms(replay) for _ in range(repeats)) / count


def compare(ours: Sequence[Call], peer: Sequence[Call]) -> dict[str, Comparison]:
    """Both ways of running: ``{"eager": ..., "graph": ...}``."""
    results = {"eager": alternate(eager_round(ours), eager_round(peer))}
    results["graph"] = alternate(graph_round(ours), graph_round(peer))
    return results


@dataclass(frozen=True)
class Ceilings:
    """What this device can do: bytes read plus written by a copy, products of random matrices, one tiny kernel."""

    copy_gbs: float
    bf16_gemm_tfs: float
    tf32_gemm_tfs: float
    fp32_gemm_tfs: float
    launch_eager_us: float
    launch_graph_us: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def _median_ms(call: Call, repeats: int = 10) -> float:
    for _ in range(3):
        call()
    return statistics.median(elapsed_ms(call) for _ in range(repeats))


def _gemm_tfs(n: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / _median_ms(lambda: a @ b) / 1e9


@lru_cache(maxsize=1)
def ceilings() -> Ceilings:
    """Measured once a process: a copy of 1 GiB, products of 8192 x 8192 matrices, an addition to one number."""
    source = torch.rand((1 << 14) if REHEARSAL else (1 << 28), device=DEVICE)
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source))
    n = 64 if REHEARSAL else 8192
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        tf32 = _gemm_tfs(n, torch.float32)
        torch.set_float32_matmul_precision("highest")
        fp32 = _gemm_tfs(n, torch.float32)
    finally:
        torch.set_float32_matmul_precision(precision)
    one = torch.zeros(1, device=DEVICE)
    tiny: list[Call] = [lambda: one.add_(1.0)] * CALLS_PER_GRAPH
    return Ceilings(
        copy_gbs=2 * source.numel() * 4 / copy_ms / 1e6,
        bf16_gemm_tfs=_gemm_tfs(n, torch.bfloat16),
        tf32_gemm_tfs=tf32,
        fp32_gemm_tfs=fp32,
        launch_eager_us=eager_round(tiny)() * 1e3,
        launch_graph_us=graph_round(tiny)() * 1e3,
    )
