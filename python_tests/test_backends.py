"""Backends are chosen by op, device and dtype, can be forced, and say why one was refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pruneops import backends, ops
from pruneops.testing import assert_bitwise_equal, attention_inputs

INDICES = torch.tensor([1, 0], dtype=torch.int32)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_has_a_compiled_cpu_kernel(op):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backends.select(op, "cpu", dtype) == "native"
        assert backends.explain(op, "cpu", dtype).splitlines()[0].endswith(": native")


def test_explain_names_the_reason_of_each_refusal():
    text = backends.explain("varlen_attention", "cpu", torch.float64)
    assert text.splitlines()[0] == "varlen_attention on cpu (torch.float64): reference"
    assert "native: refused, its kernels take float32, bfloat16 and float16" in text
    text = backends.explain("gather_rows", "cpu", torch.float64)
    assert text.splitlines()[0].endswith(": native")


def test_explain_shows_that_a_backend_is_forced():
    with backends.use("reference"):
        text = backends.explain("segment_topk")
    assert "segment_topk on cpu (torch.float32): reference" in text
    assert "native: not considered, reference is forced" in text
    with backends.use("triton"):
        assert backends.explain("segment_topk").splitlines()[0].endswith(": none")


def test_explain_refuses_unknown_names():
    with pytest.raises(ValueError, match="op must be one of .*, got 'softmax'"):
        backends.explain("softmax")
    with pytest.raises(ValueError, match="device must be one of .*, got 'tpu'"):
        backends.explain("segment_topk", "tpu")


def test_use_forces_a_backend_and_restores_the_one_before():
    x = torch.randn(3, 2)
    with backends.record_calls() as calls:
        ops.gather_rows(x, INDICES)
        with backends.use("reference"):
            ops.gather_rows(x, INDICES)
            with backends.use("native"):
                ops.gather_rows(x, INDICES)
            ops.gather_rows(x, INDICES)
        ops.gather_rows(x, INDICES)
    assert calls == {("gather_rows", "native"): 3, ("gather_rows", "reference"): 2}


def test_use_restores_after_an_exception_and_refuses_unknown_names():
    with pytest.raises(KeyError), backends.use("reference"):
        raise KeyError
    assert backends.select("segment_topk", "cpu", torch.float32) == "native"
    unknown = pytest.raises(ValueError, match="backend must be one of native, triton, reference, got 'cuda'")
    with unknown, backends.use("cuda"):
        pass


def test_a_forced_backend_that_cannot_run_an_op_raises():
    with backends.use("triton"), pytest.raises(RuntimeError, match="gather_rows: the backend 'triton' is forced"):
        ops.gather_rows(torch.randn(3, 2), INDICES)
    inputs = attention_inputs((3,), dtype=torch.float64)
    with backends.use("native"), pytest.raises(TypeError, match="float32, bfloat16 and float16, not torch.float64"):
        ops.varlen_attention(*inputs.args)


# ------------------------------------------------------------------ what the kernels for a GPU leave to others


@pytest.fixture
def proven_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels of every backend were there, loaded and proven."""
    for backend in ("native", "triton"):
        monkeypatch.setitem(backends._ops[backend], "cuda", frozenset(backends.OPS))
        monkeypatch.setitem(backends._defaults[backend], "cuda", frozenset(backends.OPS))
        monkeypatch.setitem(backends.UNPROVEN_ON_GPU, backend, frozenset())


SIZE_REASON = "native: refused, its cuda kernels have heads of 64, 80, 96 and 128, not of 72"
DTYPE_REASON = "native: refused, its kernels take bfloat16 and float16 on cuda, not torch.float32"


def test_a_size_of_heads_or_a_dtype_without_a_kernel_is_a_reason_with_or_without_a_gpu():
    text = backends.explain("varlen_attention", "cuda", torch.bfloat16, head_dim=72)
    assert text.splitlines()[0].startswith("varlen_attention on cuda (torch.bfloat16, heads of 72): ")
    assert SIZE_REASON in text
    assert DTYPE_REASON in backends.explain("varlen_attention", "cuda", torch.float32, head_dim=64)


def test_attention_on_a_gpu_goes_to_triton_where_there_is_no_compiled_kernel(proven_on_a_gpu):
    for dtype in (torch.bfloat16, torch.float16):
        for size in (64, 80, 96, 128):
            assert backends.select("varlen_attention", "cuda", dtype, size) == "native"
            assert backends.explain("varlen_attention", "cuda", dtype, size).splitlines()[0].endswith(": native")
    assert backends.select("varlen_attention", "cuda", torch.bfloat16, 72) == "triton"
    assert backends.select("varlen_attention", "cuda", torch.float32, 64) == "triton"
    text = backends.explain("varlen_attention", "cuda", torch.float16, 72)
    assert text.splitlines()[1:] == [f"  {SIZE_REASON}", "  triton: runs"]
    assert backends.select("varlen_attention", "cuda", torch.float64, 64) == "reference"
    assert backends.select("varlen_attention", "cuda", torch.bfloat16, 64, "gradients with seqused_k") == "reference"
    for size in (64, 72):  # kernels of any size, and of every dtype
        assert backends.select("decode_attention", "cuda", torch.float32, size) == "native"
        assert backends.select("varlen_attention", "cpu", torch.float32, size) == "native"


def test_attention_that_neither_has_runs_the_reference(proven_on_a_gpu, monkeypatch):
    monkeypatch.setitem(backends._ops["triton"], "cuda", frozenset())
    monkeypatch.setitem(backends._defaults["triton"], "cuda", frozenset())
    assert backends.select("varlen_attention", "cuda", torch.bfloat16, 72) == "reference"
    text = backends.explain("varlen_attention", "cuda", torch.bfloat16, 72)
    assert text.splitlines()[1] == f"  {SIZE_REASON}"
    assert text.splitlines()[2].startswith("  triton: refused, ") and text.splitlines()[3] == "  reference: runs"


def test_sizes_that_a_build_left_out_are_named(proven_on_a_gpu, monkeypatch):
    monkeypatch.setattr(backends, "_flash_built", (64, 128))
    assert backends.select("varlen_attention", "cuda", torch.bfloat16, 96) == "triton"
    reason = "its cuda kernels have heads of 64 and 128 in this build (PRUNEOPS_FLASH_HEAD_DIMS), not of 96"
    assert reason in backends.explain("varlen_attention", "cuda", torch.bfloat16, 96)
    assert "its cuda kernels have heads of 64 and 128, not of 72" in backends.explain(
        "varlen_attention", "cuda", torch.bfloat16, 72
    )


def test_a_build_without_attention_kernels_says_so(proven_on_a_gpu, monkeypatch):
    others = frozenset(backends.OPS) - {"varlen_attention"}
    monkeypatch.setitem(backends._ops["native"], "cuda", others)
    monkeypatch.setitem(backends._defaults["native"], "cuda", others)
    monkeypatch.setattr(backends._library, "cuda_refusal", None)
    assert backends.select("varlen_attention", "cuda", torch.bfloat16, 64) == "triton"
    assert "PRUNEOPS_FLASH=0 was set when it was built" in backends.explain(
        "varlen_attention", "cuda", torch.bfloat16, 64
    )


@pytest.mark.parametrize(
    ("dtype", "size", "error", "message"),
    [
        (torch.bfloat16, 72, RuntimeError, "'native' is forced, but its cuda kernels have heads of .* not of 72"),
        (torch.float32, 64, TypeError, "'native' is forced, but its kernels take bfloat16 and float16 on cuda"),
    ],
    ids=str,
)
def test_forced_kernels_refuse_a_call_that_they_are_not_made_for(proven_on_a_gpu, dtype, size, error, message):
    """Fake tensors: nothing could run."""
    inputs = attention_inputs((3, 4), head_dim=size, dtype=dtype)
    with FakeTensorMode(), backends.use("native"):
        fake = [
            torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x
            for x in inputs.args
        ]
        with pytest.raises(error, match=message):
            ops.varlen_attention(*fake)


def test_recorders_nest():
    x = torch.randn(3, 2)
    with backends.record_calls() as outer:
        ops.gather_rows(x, INDICES)
        with backends.record_calls() as inner:
            ops.gather_rows(x, INDICES)
    ops.gather_rows(x, INDICES)
    assert outer == {("gather_rows", "native"): 2} and inner == {("gather_rows", "native"): 1}


def test_meta_tensors_run_the_fake_kernels():
    inputs = attention_inputs((3, 4))
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs.args]
    assert ops.varlen_attention(*meta).shape == inputs.q.shape


def test_a_device_without_kernels_is_sent_to_the_reference():
    assert backends.select("varlen_attention", "xpu", torch.float32) == "reference"


def test_the_environment_forces_a_backend():
    code = "from pruneops import backends; print(backends.select('segment_topk', 'cpu'))"
    assert run_python(code, PRUNEOPS_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code, PRUNEOPS_BACKEND="").stdout.strip() == "native"
    failed = run_python(code, PRUNEOPS_BACKEND="fast")
    assert failed.returncode != 0
    assert (
        "ValueError: the environment variable PRUNEOPS_BACKEND must be one of native, triton, reference, got 'fast'"
        in failed.stderr
    )


def test_forced_reference_gives_the_same_selection():
    scores, cu_seqlens = torch.randn(9), torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = ops.segment_topk(scores, cu_seqlens, [2, 2])
    with backends.use("reference"):
        assert_bitwise_equal(ops.segment_topk(scores, cu_seqlens, [2, 2]), expected)
