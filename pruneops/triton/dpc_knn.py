"""DPC-kNN: density peaks clustering of the rows of each segment.

Source: Du, Ding and Jia, "Study on density peaks clustering based on k-nearest neighbors and principal component
analysis", Knowledge-Based Systems 99, 2016, as TCFormer (arXiv 2204.08680) clusters tokens with it.

Six launches where all distances are kept: rows, distances, density, delta, rank, assignment. Of longer segments a panel
of rows is kept at a time, and every step computes the distances of its panels anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.dpc_distances import NUM_PLANES, distances_kernel, prepare_kernel
from pruneops.triton.dpc_peaks import assign_kernel, delta_kernel, density_kernel, rank_kernel
from pruneops.triton.tuning import Config, Tunable

# Longest segment whose distances are all kept, floats of the buffer they are kept in, and of a panel.
LONGEST_WHOLE = 4096
WHOLE_FLOATS = 2**27
PANEL_FLOATS = 2**24
# Every number of channels of a step divides this.
_PADDING = 64
_MOST_ROWS = 2**31 - 2**14

# The interpreter takes as long for a program of many rows as for one of few.
_INTERPRETED = bool(triton.knobs.runtime.interpret)
_PREPARE = Config({"ROWS": 64 if _INTERPRETED else 2, "BLOCK": 512}, num_warps=4)
# By the rows of the longest segment that fit: a thread holds 16 distances, or 32 of a long row.
_PEAKS = {
    length: Config({"ROWS": 64 if _INTERPRETED else max(1, 2048 // length), "BLOCK": length}, num_warps=4)
    for length in (256, 1024, 4096)
}


def _candidates(shape_class: str) -> tuple[Config, ...]:
    # A step loads six tiles, of half precision mostly two. Before Hopper all six pass through registers, which hold
    # those of 64 rows only if they are narrow; Hopper multiplies from shared memory.
    if shape_class.startswith("few"):
        # Smaller tiles, so that every multiprocessor has one.
        return (
            Config({"TILE": 32, "DEPTH": 64, "WIDTH": 8}, num_warps=4, num_stages=3),
            Config({"TILE": 32, "DEPTH": 32, "WIDTH": 8}, num_warps=4, num_stages=3),
            Config({"TILE": 64, "DEPTH": 64, "WIDTH": 4}, num_warps=8, num_stages=2, min_capability=90),
            Config({"TILE": 32, "DEPTH": 64, "WIDTH": 8}, num_warps=4, num_stages=2),
        )
    return (
        Config({"TILE": 64, "DEPTH": 64, "WIDTH": 4}, num_warps=8, num_stages=3, min_capability=90),
        Config({"TILE": 64, "DEPTH": 32, "WIDTH": 4}, num_warps=8, num_stages=3, min_capability=90),
        Config({"TILE": 32, "DEPTH": 32, "WIDTH": 8}, num_warps=4, num_stages=3),
        Config({"TILE": 64, "DEPTH": 16, "WIDTH": 4}, num_warps=8, num_stages=4),
    )


# Tiles of 64 x 64 rows, above which there is more than one for each multiprocessor of a large GPU.
_FEW_TILES = 264


def _shape_class(total: int, longest: int, dtype: torch.dtype) -> str:
    tiles = triton.cdiv(total, 64) * (triton.cdiv(longest, 64) + 1)
    amount = "few tiles" if tiles <= _FEW_TILES else "many tiles"
    return f"{amount} 32-bit" if dtype == torch.float32 else f"{amount} 16-bit"


def _problem(shape_class: str, device: torch.device) -> Callable[[], object]:
    """The tokens of one image, of a video of 16 frames taken as a whole, or more than are kept at once."""
    total = {"few": 576, "many": 2304, "panels": LONGEST_WHOLE + 1024}[shape_class.split()[0]]
    dtype = torch.float32 if shape_class.endswith("32-bit") else torch.bfloat16
    # Whole numbers: every candidate finds the same distances to the bit, and with them the same clusters.
    x = torch.randint(-4, 5, (total, 1024), device=device).to(dtype)
    cu_seqlens = torch.tensor([0, total], dtype=torch.int32, device=device)
    clusters = torch.tensor([total // 2], dtype=torch.int32, device=device)
    return lambda: dpc_knn(x, cu_seqlens, clusters, 7, total, total // 2)


DISTANCES = Tunable(
    "dpc_knn_distances",
    ("few tiles 16-bit", "few tiles 32-bit", "many tiles 16-bit", "many tiles 32-bit"),
    _candidates,
    Config({"TILE": 64, "DEPTH": 64, "WIDTH": 32}),
    _problem,
)
PANELS = Tunable(
    "dpc_knn_panels",
    ("panels 16-bit", "panels 32-bit"),
    _candidates,
    # A test of long segments has many tiles, and the time of the interpreter does not depend on their size.
    Config({"TILE": 256, "DEPTH": 64, "WIDTH": 8}),
    _problem,
)


@dataclass(frozen=True)
class _Plan:
    """How distances are kept; from sizes alone."""

    whole: bool
    longest: int  # rows of a segment at most
    panel_rows: int
    pitch: int  # of a row of the buffer

    @classmethod
    def of(cls, total: int, max_seqlen: int) -> _Plan:
        longest = max(0, min(max_seqlen, total))
        pitch = max(16, triton.cdiv(longest, 16) * 16)
        if longest <= LONGEST_WHOLE and total * pitch <= WHOLE_FLOATS:
            return cls(True, longest, total, pitch)
        return cls(False, longest, min(total, max(64, PANEL_FLOATS // pitch // 64 * 64)), pitch)


@dataclass(frozen=True)
class _Distances:
    """A buffer of distances, and what they are computed from; see :func:`distances_kernel`."""

    x: Tensor
    planes: Tensor
    norms: Tensor
    begins: Tensor
    plan: _Plan
    buffer: Tensor

    def fill(self, first_row: int, end_row: int) -> None:
        """Puts the distances of a panel of rows into the buffer."""
        total, plan = self.x.shape[0], self.plan
        if plan.whole:
            config = tuning.configuration(DISTANCES, _shape_class(total, plan.longest, self.x.dtype), self.x.device)
        else:
            bits = "32-bit" if self.x.dtype == torch.float32 else "16-bit"
            config = tuning.configuration(PANELS, f"panels {bits}", self.x.device)
        tile = config.blocks["TILE"]
        # Rows of one segment are less than `longest` apart.
        reach = triton.cdiv(max(plan.longest - 1, 0), tile)
        span = reach + 1 if plan.whole else 2 * reach + 1
        first_tile = first_row // tile
        distances_kernel[((triton.cdiv(end_row, tile) - first_tile) * span,)](
            self.x,
            self.x.stride(0),
            self.planes,
            self.norms,
            self.begins,
            self.buffer,
            total,
            self.x.shape[1],
            self.planes.shape[2],
            plan.pitch,
            first_row,
            end_row,
            first_tile,
            span,
            WHOLE=plan.whole,
            HALF=self.x.dtype != torch.float32,
            **config.options,
        )

    def panels(self, kept: bool) -> Iterator[tuple[int, int]]:
        """Rows whose distances are in the buffer, one panel after the other; ``kept`` says that they are already."""
        total = self.x.shape[0]
        for first_row in range(0, total, self.plan.panel_rows):
            end_row = min(first_row + self.plan.panel_rows, total)
            if not kept:
                self.fill(first_row, end_row)
            yield first_row, end_row


def dpc_knn(
    x: Tensor,
    cu_seqlens: Tensor,
    num_clusters: Tensor,
    k: int,
    max_seqlen: int,
    capacity: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cluster ids, centres, boundaries of the centres, density, delta and score; see :func:`pruneops.ops.dpc_knn`.

    Rows with a last stride other than 1 are copied first.
    """
    total, channels = x.shape
    if total > _MOST_ROWS or capacity > _MOST_ROWS:
        raise ValueError(f"at most {_MOST_ROWS} rows are supported, got {total} and capacity {capacity}")
    plan = _Plan.of(total, max_seqlen)
    if channels > 1 and x.stride(1) != 1:
        x = x.contiguous()
    cu_seqlens, num_clusters = cu_seqlens.contiguous(), num_clusters.contiguous()
    noise = None if noise is None else noise.contiguous()

    cluster_ids, center_indices = cu_seqlens.new_empty(total), cu_seqlens.new_empty(capacity)
    cu_clusters = torch.empty_like(cu_seqlens)
    density, delta, score = (x.new_empty(total, dtype=torch.float32) for _ in range(3))
    # Rounded up, so that all of them are aligned.
    segments, begins, counts, ranks = cu_seqlens.new_empty((4, triton.cdiv(total, 16) * 16)).unbind()
    norms, farthest = density.new_empty((2, total)), density.new_empty(total)
    padded = triton.cdiv(channels, _PADDING) * _PADDING
    planes = x.new_empty((NUM_PLANES.value, total, padded), dtype=torch.bfloat16)
    prepare_kernel[(1 + triton.cdiv(total, _PREPARE.blocks["ROWS"]),)](
        x,
        x.stride(0),
        cu_seqlens,
        num_clusters,
        planes,
        norms,
        segments,
        begins,
        counts,
        cluster_ids,
        density,
        delta,
        score,
        cu_clusters,
        center_indices,
        cu_seqlens.shape[0] - 1,
        total,
        plan.longest,
        capacity,
        channels,
        padded,
        **_PREPARE.options,
    )
    if plan.longest > 0:
        buffer = density.new_empty((plan.panel_rows, plan.pitch))
        distances = _Distances(x, planes, norms, begins, plan, buffer)
        config = next((config for length, config in _PEAKS.items() if plan.longest <= length), _PEAKS[4096])
        rows, block = config.blocks["ROWS"], config.blocks["BLOCK"]
        options: dict[str, Any] = config.options
        for first, end in distances.panels(kept=False):
            density_kernel[(triton.cdiv(end - first, rows),)](
                buffer,
                begins,
                counts,
                noise,
                density,
                farthest,
                first,
                end,
                plan.pitch,
                max(1, min(k, plan.longest)),
                channels,
                HOLDS_ALL=plan.longest <= block,
                **options,
            )
        for first, end in distances.panels(kept=plan.whole):
            delta_kernel[(triton.cdiv(end - first, rows),)](
                buffer,
                begins,
                counts,
                density,
                farthest,
                delta,
                score,
                first,
                end,
                plan.pitch,
                channels,
                BY_ROW=noise is None,
                **options,
            )
        rank_kernel[(triton.cdiv(total, rows),)](
            segments, begins, counts, score, cu_clusters, ranks, center_indices, total, **options
        )
        for first, end in distances.panels(kept=plan.whole):
            assign_kernel[(triton.cdiv(end - first, rows),)](
                buffer, segments, begins, counts, ranks, cu_clusters, cluster_ids, first, end, plan.pitch, **options
            )
    return cluster_ids, center_indices, cu_clusters, density, delta, score


KERNELS: dict[str, Callable[..., Any]] = {"dpc_knn": dpc_knn}
TUNABLES = (DISTANCES, PANELS)
