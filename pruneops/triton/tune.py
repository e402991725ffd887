"""Measures the candidates of every kernel on the GPU at hand, for :mod:`pruneops.triton.tuning` to look up."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.tuning import Config, Tunable

# What a candidate may differ from the default by, relative to the largest value: it sums in another order.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Outcome:
    """What was found for one kernel and class of shapes."""

    kernel: str
    shape_class: str
    best: Config
    best_ms: float
    default_ms: float
    refused: tuple[str, ...]  # candidates that did not run or gave other results, and why


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call on the current GPU, with a cold L2 cache."""
    return float(triton.testing.do_bench(call, return_mode="median"))


def work_left(tunables: Sequence[Tunable], model: str, table: dict[str, Any]) -> list[tuple[Tunable, str]]:
    """The kernels and shape classes that the table has no valid measurement of."""
    measured = table.get(model, {})
    return [
        (tunable, shape_class)
        for tunable in tunables
        for shape_class in tunable.shape_classes
        if measured.get(tunable.name, {}).get(shape_class, {}).get("of") != _fingerprint(tunable, shape_class)
    ]


def tune(
    work: Sequence[tuple[Tunable, str]],
    device: torch.device,
    path: Path,
    *,
    measure: Callable[[Callable[[], object]], float] = milliseconds,
) -> Iterator[Outcome]:
    """Measures each kernel and class of ``work`` and adds the fastest candidate to the table at ``path``.

    The table is rewritten, atomically, after each of them, so that an interrupted run loses one at most.

    Raises
    ------
    RuntimeError
        If no candidate of a kernel runs.
    """
    capability, model = tuning.device_class(device.index)
    for tunable, shape_class in work:
        outcome = _measure(tunable, shape_class, capability, device, measure)
        table = tuning.read_table(path)
        entry = {
            **outcome.best.to_dict(),
            "ms": round(outcome.best_ms, 6),
            "default_ms": round(outcome.default_ms, 6),
            "of": _fingerprint(tunable, shape_class),
        }
        table.setdefault(model, {}).setdefault(tunable.name, {})[shape_class] = entry
        _write(path, table)
        tuning.forget_tables()
        yield outcome


def _measure(
    tunable: Tunable,
    shape_class: str,
    capability: int,
    device: torch.device,
    measure: Callable[[Callable[[], object]], float],
) -> Outcome:
    call = tunable.problem(shape_class, device)
    expected: list[Tensor] | None = None
    times: list[tuple[float, Config]] = []
    refused: list[str] = []
    for config in tunable.candidates_for(shape_class, capability):
        with tuning.use(tunable, config):
            try:
                result = _tensors(call())
                if expected is not None and not _close(result, expected):
                    refused.append(f"{config.to_dict()}: other results than the default")
                    continue
                expected = result if expected is None else expected
                times.append((measure(call), config))
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
                refused.append(f"{config.to_dict()}: {error}")
    if not times:
        raise RuntimeError(f"no candidate of {tunable.name} runs for {shape_class}: {'; '.join(refused)}")
    best_ms, best = min(times, key=lambda pair: pair[0])
    return Outcome(tunable.name, shape_class, best, best_ms, times[0][0], tuple(refused))


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for item in result for tensor in _tensors(item)]


def _close(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    for a, b in zip(ours, expected, strict=True):
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif b.numel():
            bound = CLOSE[b.dtype] * float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())
            if not torch.allclose(a, b, rtol=0.0, atol=bound, equal_nan=True):
                return False
    return True


def _fingerprint(tunable: Tunable, shape_class: str) -> str:
    """Changes when a measurement is out of date: other candidates, or another Triton."""
    text = repr([triton.__version__, [config.to_dict() for config in tunable.candidates(shape_class)]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(table, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
