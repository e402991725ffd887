"""Leaves out what is marked `gpu` where no GPU can be used, by extending the marker expression.

pytest then reports those tests as deselected. Where a GPU can be used they run, and fail if the CUDA library is
missing: nothing about them is skipped. ``PRUNEOPS_GPU_REHEARSAL=1`` runs them on the CPU and its kernels instead,
which proves the tests and the benchmarks, not the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PRUNEOPS_GPU_REHEARSAL") == "1" or torch.cuda.is_available():
        return
    given = config.option.markexpr
    config.option.markexpr = f"({given}) and not gpu" if given else "not gpu"
