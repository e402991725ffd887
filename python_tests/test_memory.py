"""Attention and its scores work on long sequences without ever holding an L x L matrix."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LENGTH = 16384
MATRIX_BYTES = LENGTH * LENGTH * 4

# Runs in a process of its own: the peak of a process never goes down again.
PROGRAM = """
import resource
import sys

import torch

from pruneops import backends, ops

length, dtype, case = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(n: int) -> None:
    q, k, v = (torch.randn(n, 1, 16).to(dtype).requires_grad_(case == "attention") for _ in range(3))
    cu = torch.tensor([0, n], dtype=torch.int32)
    if case == "attention":
        ops.varlen_attention(q, k, v, cu, cu, n, n).sum().backward()
    elif case == "last_query_scores":
        ops.last_query_scores(q, k, cu, cu, query_reduce="max")
    else:
        ops.column_scores(q, k, cu, cu, n, n)


with backends.record_calls() as calls:
    work(64)  # thread pools and first-use allocations
    before = peak()
    work(length)
assert {backend for _, backend in calls} == {"native"}, calls
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["attention", "last_query_scores", "column_scores"])
def test_peak_memory_is_far_below_a_score_matrix(case, dtype):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(LENGTH), dtype, case],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    # Ten tensors of [length, 16] in float32 and the workspaces are some 30 MB; the matrix is 1 GB.
    assert int(result.stdout) < MATRIX_BYTES // 16
