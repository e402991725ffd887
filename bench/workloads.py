"""Shapes by name, so that no benchmark carries numbers of its own.

The models are the ones whose pruning is usually reported; a workload is one decoder layer of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """One decoder layer at prefill: the packed segments of a batch and the sizes of the layer.

    ``seqlens`` are tokens per row (text and visual together), ``visual`` the visual tokens of the first row.
    """

    name: str
    seqlens: tuple[int, ...]
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    visual: int = 0

    @property
    def total(self) -> int:
        return sum(self.seqlens)

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlens)

    @property
    def batch(self) -> int:
        return len(self.seqlens)

    def cu_seqlens(self) -> Tensor:
        """``[B + 1]`` int32."""
        return torch.tensor([0, *accumulate(self.seqlens)], dtype=torch.int32)

    def causal_pairs(self) -> int:
        """Query-key pairs below the diagonal: what exact causal attention has to compute, per head."""
        return sum(n * (n + 1) // 2 for n in self.seqlens)

    def attention_flops(self) -> int:
        """Floating-point operations of one causal forward (two products, two operations each)."""
        return 4 * self.heads * self.head_dim * self.causal_pairs()

    def qkv(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Random ``q [total, heads, D]`` and ``k``, ``v [total, kv_heads, D]``."""
        generator = torch.Generator().manual_seed(seed)
        shapes = ((self.heads,), (self.kv_heads,), (self.kv_heads,))
        q, k, v = (torch.randn(self.total, *heads, self.head_dim, generator=generator).to(dtype) for heads in shapes)
        return q, k, v


def llava15_7b(batch: int = 1) -> Workload:
    """LLaVA-1.5-7B: one 336 px image, 24 x 24 patches, 64 text tokens."""
    return Workload("llava15_7b", (640,) * batch, visual=576)


def llava_next_7b(batch: int = 1) -> Workload:
    """LLaVA-NeXT-7B: base view and four tiles, 64 text tokens."""
    return Workload("llava_next_7b", (2944,) * batch, visual=2880)


def onevision_7b_32f(batch: int = 1) -> Workload:
    """LLaVA-OneVision-7B on a 32 frame video: 196 tokens a frame, 28 query and 4 key heads."""
    return Workload("onevision_7b_32f", (6336,) * batch, hidden=3584, heads=28, kv_heads=4, visual=6272)


def pllava_16f(batch: int = 1) -> Workload:
    """PLLaVA-7B on a 16 frame video: 144 tokens a frame, 64 text tokens."""
    return Workload("pllava_16f", (2368,) * batch, visual=2304)


def ragged4() -> Workload:
    """Four rows of unequal length; a padded batch would waste 34 % of its slots."""
    return Workload("ragged4", (352, 208, 640, 480))


def ragged8() -> Workload:
    """Eight rows between a pruned LLaVA-1.5 image and a whole LLaVA-NeXT one."""
    return Workload("ragged8", (352, 2944, 640, 1504, 736, 2208, 416, 1120))


def ragged8_fuller() -> Workload:
    """Eight rows up to a whole LLaVA-NeXT image; a padded batch would waste 45 % of its slots."""
    return Workload("ragged8_fuller", (736, 2944, 1120, 1824, 1024, 2208, 896, 2208))


def tiny512() -> Workload:
    """512 segments of 34 tokens: scheduling costs that grow with the square of the batch show up here."""
    return Workload("tiny512", (34,) * 512, heads=8, kv_heads=8)


def uniform(length: int, batch: int = 1, *, heads: int = 32, kv_heads: int = 32) -> Workload:
    """``batch`` rows of the same length, LLaVA-7B heads."""
    return Workload(f"{batch}x{length}", (length,) * batch, heads=heads, kv_heads=kv_heads)
