"""Gather and scatter of rows on a GPU against index_select, gather and index_copy_."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gpu_peers
from bench.gpu_compare import rotated, smaller, versus
from bench.gpu_timing import DEVICE
from pruneops import ops

pytestmark = pytest.mark.gpu

# Rows of 4096 bfloat16: LLaVA-1.5 and LLaVA-NeXT stages, an OneVision-sized one, and enough to fill the machine.
SIZES = {"llava15_7b": (576, 288), "llava_next_7b": (2880, 1440), "onevision": (6272, 3136), "64MB": (16384, 8192)}
HIDDEN = 4096


def kept_rows(total: int, keep: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(total, generator=generator, device=DEVICE)[:keep].sort().values


def rows_and_indices(total: int, keep: int) -> list[Any]:
    hidden = smaller(HIDDEN)

    def make(generator: torch.Generator) -> Any:
        x = torch.randn(total, hidden, generator=generator, device=DEVICE).bfloat16()
        wide = kept_rows(total, keep, generator)
        return x, wide.int(), wide

    return rotated(make)


@pytest.mark.parametrize("peer", ["index_select", "gather", "x[indices]"])
@pytest.mark.parametrize("size", SIZES)
def test_gather_rows(benchmark: Any, backend: str, size: str, peer: str) -> None:
    total, keep = (smaller(n) for n in SIZES[size])
    calls = {
        "index_select": lambda x: x[0].index_select(0, x[2]),
        "gather": lambda x: gpu_peers.gather(x[0], x[2]),
        "x[indices]": lambda x: x[0][x[2]],
    }
    strong = size == "64MB" and peer == "index_select"
    versus(
        benchmark,
        backend,
        rows_and_indices(total, keep),
        lambda x: ops.gather_rows(x[0], x[1]),
        calls[peer],
        op="gather_rows",
        workload=f"{size}, {total} to {keep} rows of {smaller(HIDDEN)}",
        peer_name=peer,
        dtype=torch.bfloat16,
        bytes_moved=2 * keep * smaller(HIDDEN) * 2,
        target_ratio=1.0 if strong else None,
        target_of_copy=0.88 if strong else None,
    )


@pytest.mark.rehearsed
def test_gather_rows_of_many_tensors(benchmark: Any, backend: str) -> None:
    """Hidden states, positions and labels of one pruning stage in one call."""
    total, keep = (smaller(n) for n in SIZES["llava_next_7b"])
    hidden = smaller(HIDDEN)

    def make(generator: torch.Generator) -> Any:
        x = torch.randn(total, hidden, generator=generator, device=DEVICE).bfloat16()
        wide = kept_rows(total, keep, generator)
        return [x, torch.arange(total, device=DEVICE), wide.new_ones(total)], wide.int(), wide

    versus(
        benchmark,
        backend,
        rotated(make),
        lambda x: ops.gather_rows(x[0], x[1]),
        lambda x: gpu_peers.index_select_chain(x[0], x[2]),
        op="gather_rows",
        workload=f"{total} to {keep} rows: hidden, positions, labels",
        peer_name="3 x index_select",
        dtype=torch.bfloat16,
        bytes_moved=2 * keep * (hidden * 2 + 16),
    )


@pytest.mark.parametrize("size", SIZES)
def test_scatter_rows(benchmark: Any, backend: str, size: str) -> None:
    """The backward pass of a gather: every row of the result is written, most of them with zeros."""
    total, keep = (smaller(n) for n in SIZES[size])
    versus(
        benchmark,
        backend,
        [(x[:keep].clone(), narrow, wide) for x, narrow, wide in rows_and_indices(total, keep)],
        lambda x: ops.scatter_rows(x[0], x[1], total),
        lambda x: gpu_peers.index_copy(x[0], x[2], total),
        op="scatter_rows",
        workload=f"{size}, {keep} to {total} rows of {smaller(HIDDEN)}",
        peer_name="zeros + index_copy_",
        dtype=torch.bfloat16,
        bytes_moved=(keep + total) * smaller(HIDDEN) * 2,
        target_ratio=1.2 if size == "64MB" else None,
    )
