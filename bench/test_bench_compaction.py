"""Gather and scatter of rows against index_select, indexing and index_copy_."""

from __future__ import annotations

import pytest
import torch

from bench import peers
from bench.conftest import Versus
from pruneops import ops

TOTAL, KEEP, HIDDEN = 2880, 1440, 4096


def _kept_rows() -> torch.Tensor:
    order = torch.randperm(TOTAL, generator=torch.Generator().manual_seed(0))
    return order[:KEEP].sort().values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer", ["index_select", "x[indices]"])
def test_gather_rows(versus: Versus, dtype: torch.dtype, peer: str) -> None:
    x = torch.randn(TOTAL, HIDDEN).to(dtype)
    rows = _kept_rows()
    narrow = rows.int()
    call = {
        "index_select": lambda: x.index_select(0, rows),
        "x[indices]": lambda: peers.advanced_index(x, rows),
    }[peer]
    versus(
        lambda: ops.gather_rows(x, narrow),
        call,
        op="gather_rows",
        workload=f"{TOTAL} to {KEEP} rows of {HIDDEN}",
        peer_name=peer,
        dtype=dtype,
        bytes_moved=2 * KEEP * HIDDEN * x.element_size(),
    )


def test_gather_rows_many_tensors(versus: Versus) -> None:
    """Hidden states, positions and labels of one pruning stage in one call."""
    tensors = [torch.randn(TOTAL, HIDDEN), torch.arange(TOTAL), torch.randint(0, 32000, (TOTAL,))]
    rows = _kept_rows()
    narrow = rows.int()
    versus(
        lambda: ops.gather_rows(tensors, narrow),
        lambda: peers.index_select_chain(tensors, rows),
        op="gather_rows",
        workload=f"{TOTAL} to {KEEP} rows: hidden, positions, labels",
        peer_name="3 x index_select",
        bytes_moved=2 * KEEP * (HIDDEN * 4 + 16),
    )


def test_scatter_rows(versus: Versus) -> None:
    x = torch.randn(KEEP, HIDDEN)
    rows = _kept_rows()
    narrow = rows.int()
    versus(
        lambda: ops.scatter_rows(x, narrow, TOTAL),
        lambda: peers.scatter_index_copy(x, rows, TOTAL),
        op="scatter_rows",
        workload=f"{KEEP} to {TOTAL} rows of {HIDDEN}",
        peer_name="zeros + index_copy_",
        bytes_moved=(KEEP + TOTAL) * HIDDEN * 4,
    )
