"""What the kernels behind attention scores share: classes of shapes, how heads share a tile, and reductions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import attention_forward

# A few chosen query rows: bound by reading the keys, so the heads that share keys share a tile too.
FEW = "few rows "
SHAPE_CLASSES = (*attention_forward.SHAPE_CLASSES, FEW + "16-bit", FEW + "32-bit")


def score_class(head_dim: int, dtype: torch.dtype, few: bool) -> str:
    if few:
        return FEW + ("32-bit" if dtype == torch.float32 else "16-bit")
    return attention_forward.shape_class(head_dim, dtype)


def shared_heads(group: int, rows: int, few: bool) -> int:
    """Query heads of one key head that are rows of a tile of ``rows``, a power of two."""
    return min(triton.next_power_of_2(group), rows) if few else 1


def few_inputs(shape_class: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One query row a prompt, the keys of two prompts with an image in five crops, and the boundaries of both."""
    dtype = torch.float32 if shape_class.endswith("32-bit") else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(n, 32, 128, device=device, generator=generator).to(dtype) for n in (2, 5280))
    ends = torch.tensor([[0, 1, 2], [0, 2960, 5280]], dtype=torch.int32, device=device)
    return q, k, ends[0], ends[1]


@triton.jit
def combined(a, b, MAX: tl.constexpr):
    """The larger one, NaN above all, or the sum."""
    if MAX:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return a + b


@triton.jit
def reduced(x, axis: tl.constexpr, MAX: tl.constexpr):
    """Over one axis. Probabilities are not negative: their bits ascend as they do, with NaN above them all."""
    if MAX:
        return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis).to(tl.float32, bitcast=True)
    else:
        return tl.sum(x, axis)
