"""How a ratio is measured.

Two functions are timed in the same process in alternating rounds, so that a machine that slows down for a
while slows both. A round repeats one function until it ran long enough to time and yields the median call;
the result is the median of the rounds. The spread is that of the per-round ratios, which is what a reader has
to trust. Nothing is timed before both sides were compared, and what torch reaches for a plain copy and a
matrix product is measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

Call = Callable[[], object]

ROUNDS = 7
ROUND_SECONDS = 0.15
MAX_CALLS = 200


@dataclass(frozen=True)
class Comparison:
    """Medians in milliseconds; ``ratio`` > 1 means that pruneops is faster."""

    ours_ms: float
    peer_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def _calls_per_round(call: Call) -> int:
    begin = time.perf_counter()
    call()
    once = max(time.perf_counter() - begin, 1e-7)
    return max(1, min(MAX_CALLS, int(ROUND_SECONDS / once)))


def _round(call: Call, calls: int) -> float:
    samples = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples) * 1e3


def compare(ours: Call, peer: Call, *, rounds: int = ROUNDS) -> Comparison:
    """Time ``ours`` and ``peer`` in alternating rounds; the side that goes first alternates too."""
    for call in (ours, peer):
        call()
    calls = {ours: _calls_per_round(ours), peer: _calls_per_round(peer)}
    medians: dict[Call, list[float]] = {ours: [], peer: []}
    for i in range(rounds):
        for call in (ours, peer) if i % 2 == 0 else (peer, ours):
            medians[call].append(_round(call, calls[call]))
    per_round = [p / o for o, p in zip(medians[ours], medians[peer], strict=True)]
    ours_ms, peer_ms = (statistics.median(medians[call]) for call in (ours, peer))
    return Comparison(ours_ms, peer_ms, peer_ms / ours_ms, min(per_round), max(per_round), rounds)


def check(ours: object, peer: object, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Refuse to time two functions that disagree. Nested tuples and lists are compared element by element."""
    if isinstance(ours, Tensor) and isinstance(peer, Tensor):
        torch.testing.assert_close(ours, peer, rtol=rtol, atol=atol, check_dtype=False, check_stride=False)
        return
    assert isinstance(ours, (tuple, list)) and isinstance(peer, (tuple, list)), (type(ours), type(peer))
    for a, b in zip(ours, peer, strict=True):
        check(a, b, rtol=rtol, atol=atol)


@dataclass(frozen=True)
class Ceilings:
    """What torch reaches on this machine, on the threads in use: the yardstick of rates."""

    copy_gbs: float
    sgemm_gfs: float
    bf16_gemm_gfs: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def _best(call: Call, repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


@lru_cache(maxsize=1)
def ceilings() -> Ceilings:
    """Copy of 256 MiB (beyond any cache), bytes read plus written; products of 2048 x 2048 matrices."""
    source = torch.rand(64 << 20)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source))
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    c, d = a.bfloat16(), b.bfloat16()
    sgemm = _best(lambda: a @ b)
    bf16 = _best(lambda: c @ d)
    return Ceilings(
        copy_gbs=2 * source.numel() * 4 / copy / 1e9,
        sgemm_gfs=2 * n**3 / sgemm / 1e9,
        bf16_gemm_gfs=2 * n**3 / bf16 / 1e9,
    )
