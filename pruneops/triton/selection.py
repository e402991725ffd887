"""Choosing rows segment by segment: launches and tile sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.compaction import gather_rows
from pruneops.triton.select_rows import cut_kernel, emit_kernel
from pruneops.triton.tuning import Config, Tunable

# Row numbers, and those of the lanes of a block past the last one, are int32.
_MAX_ROWS = 2**31 - 2**14
_CLASSES = {"tiny": 32, "short": 256, "middle": 1024, "long": _MAX_ROWS}  # most rows of a segment, on average


def _shape_class(total: int, num_segments: int) -> str:
    return next(name for name, most in _CLASSES.items() if total // num_segments <= most)


def _candidates(shape_class: str) -> tuple[Config, ...]:
    # The host does not know the lengths, only that few segments are more than four times as long as the average: most
    # should fit into SHORT rows. A thread holds 8 or 16 keys. In each step of the search warps wait for one another, so
    # few of them are quicker as long as they do not hold too much. Longer segments are read again in each step, STEP
    # rows at a time, of which a thread holds 4; but 16 in the class of the longest, so that videos fit at once.
    sizes = {
        "tiny": ((16, 64, 512, 4), (32, 64, 1024, 8)),
        "short": ((1, 1024, 512, 4), (1, 512, 256, 2)),
        "middle": ((1, 2048, 1024, 8), (1, 1024, 512, 4), (1, 4096, 8192, 16)),
        "long": ((1, 4096, 8192, 16), (1, 8192, 8192, 16), (1, 2048, 1024, 8)),
    }
    return tuple(
        Config({"GROUP": group, "SHORT": short, "STEP": step}, num_warps=warps)
        for group, short, step, warps in sizes[shape_class]
    )


def _problem(shape_class: str, device: torch.device) -> Callable[[], object]:
    """Half of the rows of each segment, a tenth protected: small crops, short prompts, images, videos."""
    lengths = {"tiny": (30,) * 512, "short": (200,) * 64, "middle": (640,) * 8, "long": (2944, 6272, 2944, 6272)}
    rows = torch.tensor((0, *lengths[shape_class]), dtype=torch.int32)
    cu_seqlens, counts = rows.cumsum(0, dtype=torch.int32).to(device), (rows[1:] // 2).to(device)
    total = sum(lengths[shape_class])
    scores, protect = torch.rand(total, device=device), torch.rand(total, device=device) < 0.1
    return lambda: segment_topk(scores, cu_seqlens, counts, total, protect)


SELECT = Tunable(
    name="segment_topk",
    shape_classes=tuple(_CLASSES),
    candidates=_candidates,
    # Most segments of the tests at once, since it is the number of steps that takes time here, not their width.
    interpreted=Config({"GROUP": 64, "SHORT": 256, "STEP": 8192}),
    problem=_problem,
)
TUNABLES: tuple[Tunable, ...] = (SELECT,)


def _select(
    scores: Tensor,
    cu_seqlens: Tensor,
    keep_counts: Tensor | None,
    threshold: float | None,
    capacity: int,
    protect: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One launch for one segment, else two: the cuts, then the rows where they belong."""
    total, num_segments = scores.shape[0], cu_seqlens.shape[0] - 1
    if total > _MAX_ROWS or capacity > _MAX_ROWS:
        raise ValueError(f"at most {_MAX_ROWS} rows are supported, got {total} and capacity {capacity}")
    if num_segments == 0:
        return cu_seqlens.new_full((capacity,), -1), cu_seqlens.new_zeros(1)
    scores, cu_seqlens = scores.contiguous(), cu_seqlens.contiguous()
    protect = None if protect is None else protect.contiguous()
    keep_counts = None if keep_counts is None else keep_counts.contiguous()
    indices, cu_seqlens_out = cu_seqlens.new_empty(capacity), cu_seqlens.new_empty(num_segments + 1)
    cuts = None if num_segments == 1 else cu_seqlens.new_empty((5, num_segments))
    config = tuning.configuration(SELECT, _shape_class(total, num_segments), scores.device)
    grid = (triton.cdiv(num_segments, config.blocks["GROUP"]),)
    cut_kernel[grid](
        scores,
        protect,
        cu_seqlens,
        keep_counts,
        0.0 if threshold is None else ctypes.c_float(threshold).value,
        cuts,
        indices,
        cu_seqlens_out,
        total,
        capacity,
        num_segments,
        THRESHOLD=threshold is not None,
        **config.options,
    )
    if cuts is not None:
        emit_kernel[grid](scores, protect, cuts, indices, cu_seqlens_out, capacity, num_segments, **config.options)
    return indices, cu_seqlens_out


def segment_topk(
    scores: Tensor, cu_seqlens: Tensor, keep_counts: Tensor, capacity: int, protect: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per segment the ``keep_counts[b]`` best unprotected rows and every protected one, order kept."""
    return _select(scores, cu_seqlens, keep_counts, None, capacity, protect)


def segment_threshold(
    scores: Tensor,
    cu_seqlens: Tensor,
    threshold: float,
    capacity: int,
    min_keep: Tensor | None = None,
    protect: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per segment the rows with ``score > threshold``, at least the ``min_keep[b]`` best ones, and every protected one.

    A ``capacity`` of -1 asks for as many entries as there are rows kept; only where the host can read their number.
    """
    room = scores.shape[0] if capacity == -1 else capacity
    indices, cu_seqlens_out = _select(scores, cu_seqlens, min_keep, threshold, room, protect)
    if capacity == -1:
        indices = indices[: int(cu_seqlens_out[-1])].clone()
    return indices, cu_seqlens_out


def select_compact(
    scores: Tensor,
    tensors: list[Tensor],
    cu_seqlens: Tensor,
    keep_counts: Tensor,
    capacity: int,
    protect: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """:func:`segment_topk` of ``scores`` and the rows it names of every tensor."""
    indices, cu_seqlens_out = segment_topk(scores, cu_seqlens, keep_counts, capacity, protect)
    return gather_rows(tensors, indices), indices, cu_seqlens_out


KERNELS: dict[str, Callable[..., Any]] = {
    "segment_topk": segment_topk,
    "segment_threshold": segment_threshold,
    "select_compact": select_compact,
}
