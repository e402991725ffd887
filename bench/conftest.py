"""Fixtures of the benchmark suites: one call checks, compares, and records."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pruneops
from bench import timing
from pruneops import backends, ops

Versus = Callable[..., None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "triton: runs kernels in Triton")
    config.addinivalue_line("markers", "rehearsed: of those in Triton, which a rehearsal runs, interpreted")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """GPU benchmarks ask for a ``backend`` by name and run once on each; those in Triton are marked."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [backends.NATIVE, pytest.param(backends.TRITON, marks=pytest.mark.triton)])


@pytest.fixture
def versus(benchmark: Any) -> Versus:
    """``versus(ours, peer, op=..., ...)``: compare the results, then time both in alternating rounds.

    ``same`` compares the two results (default: element by element, at the tolerance of ``dtype``);
    ``bytes_moved`` or ``flops`` of one call turn the time into a rate beside the ceiling of the machine.
    """

    def run(
        ours: timing.Call,
        peer: timing.Call,
        *,
        op: str,
        workload: str,
        peer_name: str,
        dtype: torch.dtype = torch.float32,
        bytes_moved: int | None = None,
        flops: int | None = None,
        same: Callable[[Any, Any], None] | None = None,
    ) -> None:
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        if same is None:
            timing.check(ours(), peer(), rtol=tolerance, atol=tolerance)
        else:
            same(ours(), peer())
        result = timing.compare(ours, peer)
        ceilings = timing.ceilings()
        info = benchmark.extra_info
        info.update(result.as_dict())
        info.update(op=op, workload=workload, peer=peer_name, dtype=str(dtype).removeprefix("torch."))
        if bytes_moved is not None:
            rate = bytes_moved / result.ours_ms / 1e6
            info.update(rate=rate, rate_unit="GB/s", of_ceiling=rate / ceilings.copy_gbs)
        elif flops is not None:
            rate = flops / result.ours_ms / 1e6
            ceiling = ceilings.bf16_gemm_gfs if dtype == torch.bfloat16 else ceilings.sgemm_gfs
            info.update(rate=rate, rate_unit="GF/s", of_ceiling=rate / ceiling)
        benchmark.pedantic(ours, rounds=3, iterations=1)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Everything the numbers depend on, written into the JSON once."""
    machine_info["pruneops"] = {
        "version": pruneops.__version__,
        "build": {key: str(value) for key, value in dict(pruneops.build_info()).items()},
        "torch": torch.__version__,
        "isa": pruneops.build_info()["active_isa"],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "ceilings": timing.ceilings().as_dict(),
        "ops": sorted(name for name in dir(ops) if not name.startswith("_")),
    }
