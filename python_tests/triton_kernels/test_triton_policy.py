"""policy_attention: what only unusual tiles, policies and many segments show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops import ops, reference
from pruneops.testing import AttentionInputs, assert_bitwise_equal, attention_inputs, cu_seqlens_of
from pruneops.triton import policy_backward, policy_forward, tuning
from pruneops.triton.policy import KERNELS
from pruneops.triton.policy_forward import block_of_slot, num_slots
from pruneops.triton.tuning import Config


def results(module: Any, inputs: AttentionInputs, policy: Tensor, **options: Any) -> list[Tensor]:
    """The output and the gradients of its sum times the queries."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, policy)]
    out = module.policy_attention(*leaves, inputs.cu_seqlens_q, inputs.max_seqlen_q, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.q.to(out.dtype))]


def assert_close(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("keys", [16, 32, 128])
def test_tiles_of_other_sizes_give_the_same_results(keys, rows):
    inputs = attention_inputs((3, 0, 90, 70), heads=(4, 2), head_dim=40, tail=1)
    policy = torch.rand(164).where(torch.rand(164) > 0.4, 0.0)
    config = Config({"BLOCK_M": rows, "BLOCK_N": keys})
    with (
        tuning.use(policy_forward.FORWARD, config),
        tuning.use(policy_backward.QUERY_GRADIENT, config),
        tuning.use(policy_backward.KEY_GRADIENT, config),
    ):
        ours = results(ops, inputs, policy)
    assert_close(ours, results(reference, inputs, policy), 2e-6)


@pytest.mark.parametrize("value", [1e-8, -1e-5, 1e6])
def test_float16_holds_policies_of_any_size(value):
    """Own keys count 1: what is left next to them, or leaves nothing of them, is no matter of float16's range."""
    inputs = attention_inputs((90,), heads=(2, 2), dtype=torch.float16)
    inputs.k[:45] *= 4  # so that some rows see keys that are far above their own
    policy = torch.full((90,), value)
    ours = results(ops, inputs, policy, epsilon=0.0)
    expected = results(reference, inputs.to(torch.float64), policy.double(), epsilon=0.0)
    assert all(x.isfinite().all() for x in ours)
    assert_close(ours[:1], expected[:1], 4e-3)


@triton.jit
def _count_rows(
    bounds,  # [B+1]
    counts,  # [total] int32, of the parts; [total] int32, of the rows
    num_segments,
    total,
    BLOCK: tl.constexpr,
):
    part, start, length, first = block_of_slot(bounds, num_segments, total, tl.program_id(0), BLOCK)
    rows = first + tl.arange(0, BLOCK)
    inside = rows < length
    tl.store(counts + start + rows, part, mask=inside)
    before = tl.load(counts + total + start + rows, mask=inside, other=0)
    tl.store(counts + total + start + rows, before + 1, mask=inside)


@pytest.mark.parametrize("lengths", [[], [0], [70], [1] * 40, [0, 33, 0, 0, 16, 15, 1] * 20], ids=len)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 40)])
def test_slots_hold_every_row_once(lengths, before, after):
    bounds = cu_seqlens_of([before, *lengths])[1:]
    total = int(bounds[-1]) + after
    counts = torch.full((2, max(total, 1)), -1, dtype=torch.int32)[:, :total].contiguous()
    counts[1] = 0
    _count_rows[(num_slots(total, len(lengths), 16),)](bounds, counts, len(lengths), total, BLOCK=16)
    parts = [0] * before + [i for i, length in enumerate(lengths, 1) for _ in range(length)]
    assert counts[0].tolist() == parts + [len(lengths) + 1] * after
    assert counts[1].tolist() == [1] * total


def test_a_max_seqlen_that_is_too_small_changes_nothing():
    """It lies on the host, so a device's boundaries cannot be held against it."""
    inputs = attention_inputs((40, 70), heads=(2, 1))
    args, scales = (inputs.q, inputs.k, inputs.v, torch.rand(110), inputs.cu_seqlens_q), (0.3, 1e-6)
    forward = KERNELS["policy_attention"](*args, 70, *scales)
    assert_bitwise_equal(KERNELS["policy_attention"](*args, 0, *scales), forward)
    backward = (inputs.q, *args[:4], *forward, args[4])
    expected = KERNELS["policy_attention_backward"](*backward, 70, *scales)
    assert_bitwise_equal(KERNELS["policy_attention_backward"](*backward, 0, *scales), expected)
