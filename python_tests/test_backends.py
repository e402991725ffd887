"""Backends are chosen by op, device and dtype, can be forced, and say why one was refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

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
