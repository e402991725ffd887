"""The instruction set is chosen at run time; PRUNEOPS_CPU_ISA overrides it and every choice selects alike."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pruneops import build_info

INFO = build_info()
FEATURES = INFO["cpu_features"]
HAS_AVX2 = FEATURES["avx2"] and FEATURES["fma"] and FEATURES["f16c"]
HAS_AVX512 = HAS_AVX2 and all(FEATURES[f"avx512{part}"] for part in ("f", "bw", "vl", "dq"))
MACHINE_HAS = {
    "scalar": True,
    "avx2": HAS_AVX2,
    "avx512": HAS_AVX512,
    "avx512bf16": HAS_AVX512 and FEATURES["avx512_bf16"],
}
USABLE = [isa for isa in INFO["isas"] if MACHINE_HAS[isa]]
UNUSABLE = [isa for isa in MACHINE_HAS if isa not in USABLE]

SELECT = """
import hashlib, torch
import pruneops
from pruneops import _library

print(pruneops.build_info()["active_isa"])
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
lengths = [0, 1, 7, 8, 9, 15, 16, 17, 31, 700, 2880]
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
total = int(cu_seqlens[-1])
scores = torch.randn(total, generator=generator)
scores[::5] = 0.25
scores[::17] = float("nan")
scores[::19] = -0.0
protect = torch.rand(total, generator=generator) < 0.1
keep = torch.tensor([n // 2 for n in lengths], dtype=torch.int32)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    s = scores.to(dtype)
    for mask in (None, protect):
        for result in (
            torch.ops.pruneops.segment_topk(s, cu_seqlens, keep, total, mask),
            torch.ops.pruneops.segment_topk(s, cu_seqlens, keep, 999, mask),
            torch.ops.pruneops.segment_threshold(s, cu_seqlens, 0.25, -1, keep, mask),
        ):
            for tensor in result:
                digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def run(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PRUNEOPS_CPU_ISA"}
    if isa is not None:
        env["PRUNEOPS_CPU_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def scalar_digest() -> str:
    result = run(SELECT, "scalar")
    assert result.returncode == 0, result.stderr
    name, digest = result.stdout.split()
    assert name == "scalar"
    return digest


@pytest.mark.parametrize("isa", [isa for isa in USABLE if isa != "scalar"])
def test_override_is_used_and_selects_the_same_rows(isa: str, scalar_digest: str) -> None:
    result = run(SELECT, isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa, scalar_digest]


def test_without_override_the_best_usable_instruction_set_is_active() -> None:
    result = run("import pruneops; print(pruneops.build_info()['active_isa'])", None)
    assert result.stdout.strip() == USABLE[-1]


@pytest.mark.parametrize("isa", ["sse9", "AVX2", *UNUSABLE])
def test_override_that_cannot_be_followed_is_an_error_and_not_a_fallback(isa: str) -> None:
    code = """
import torch
import pruneops
from pruneops import _library

one = torch.zeros(2, dtype=torch.int32)
for call in (
    pruneops.build_info,
    lambda: torch.ops.pruneops.segment_topk(torch.zeros(1), one, one[:1], 1),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    result = run(code, isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"PRUNEOPS_CPU_ISA={isa}: ") == 2, result.stdout
