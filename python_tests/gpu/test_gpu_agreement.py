"""The kernels in Triton agree with the compiled ones on the same device: selection to the bit, sums to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_calls import OPS, buffers, calls, compare
from gpu_support import DTYPES, first_rehearsed, on_cpu, on_device

from pruneops import backends, ops
from pruneops.testing import assert_bitwise_equal, cu_seqlens_of

pytestmark = [pytest.mark.gpu, pytest.mark.triton]


def of_both(call: Any) -> tuple[Any, Any]:
    """What Triton and what the compiled kernels make of a call, on the CPU."""
    results = []
    for backend in (backends.TRITON, backends.NATIVE):
        with backends.use(backend):
            results.append(on_cpu(call()))
    return results[0], results[1]


@pytest.mark.parametrize("op", first_rehearsed(OPS))
def test_ops_agree(op):
    for seed in range(4):
        batch = on_device(buffers(seed))
        compare(op, *of_both(lambda batch=batch: calls(batch)[op]()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ties", "special"])
def test_the_same_rows_are_selected_from_scores_that_tie(kind, dtype):
    lengths = (2880, 0, 576, 1, 6272, 34, 17_000)
    total = sum(lengths)
    scores = {
        "ties": torch.randint(-2, 3, (total,)).float(),
        "special": torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0])[torch.randint(6, (total,))],
    }[kind].to(dtype)
    counts = torch.tensor([n // 3 for n in lengths], dtype=torch.int32)
    args = on_device((scores, cu_seqlens_of(lengths), counts))
    protect = on_device(torch.rand(total) < 0.1)
    assert_bitwise_equal(*of_both(lambda: ops.segment_topk(*args, capacity=total, protect=protect)))
    assert_bitwise_equal(
        *of_both(lambda: ops.segment_threshold(*args[:2], 0.0, min_keep=args[2], capacity=total, protect=protect))
    )
