"""Leaves out what cannot run in this process, by extending the marker expression: `gpu` where no GPU can be used,
`interpreted` where Triton was not told to interpret its kernels, and the compilation of kernels where it was.

pytest then reports those tests as deselected. Where a GPU can be used they run, and fail if the CUDA library is
missing: nothing about them is skipped. ``PRUNEOPS_GPU_REHEARSAL=1`` runs them on the CPU and its kernels instead,
which proves the tests and the benchmarks, not the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    left_out = []
    if os.environ.get("PRUNEOPS_GPU_REHEARSAL") != "1" and not torch.cuda.is_available():
        left_out.append("gpu")
    interpreting = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
    left_out.append("compiled" if interpreting else "interpreted")
    given = config.option.markexpr
    without = " and ".join(f"not {marker}" for marker in left_out)
    config.option.markexpr = f"({given}) and {without}" if given else without
