"""Where there is a GPU there is every kernel that there should be, compiled and in Triton."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, REHEARSAL, on_device, raw

import pruneops
from pruneops import _library, backends
from pruneops.testing import cu_seqlens_of

pytestmark = pytest.mark.gpu


def test_the_cuda_library_is_built_and_loaded():
    if REHEARSAL:
        return
    info = pruneops.build_info()
    assert info["cuda"], info["cuda_reason"]
    assert info["cuda_library"] == "loaded"


@pytest.mark.parametrize("op", backends.OPS)
def test_the_op_has_a_compiled_kernel(op, native):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pruneops::{op}", DEVICE.type.upper())
    assert backends.explain(op, DEVICE.type, torch.bfloat16, 64).splitlines()[0].endswith(": native")


@pytest.mark.rehearsed
@pytest.mark.triton
def test_every_op_has_a_kernel_in_triton(triton):
    from pruneops.triton import KERNELS

    assert set(KERNELS) == set(_library.op_names())
    for op in backends.OPS:
        assert backends.explain(op, DEVICE.type).splitlines()[0].endswith(": triton")


def test_a_kernel_refuses_tensors_on_two_devices(native):
    scores, cu_seqlens, counts = torch.randn(8), cu_seqlens_of([8]), torch.tensor([3], dtype=torch.int32)
    if REHEARSAL:
        return
    for wrong in range(3):
        args = [x if i == wrong else x.to(DEVICE) for i, x in enumerate((scores, cu_seqlens, counts))]
        with pytest.raises((RuntimeError, ValueError)):
            raw("segment_topk", *args, 3)
    assert float((on_device(torch.arange(4.0)) + 1).sum()) == 10.0, "a refused call left a CUDA error behind"
