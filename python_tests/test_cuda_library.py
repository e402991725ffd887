"""The CUDA library: when it is built, what its kernels cost, when it is loaded, and who may use it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pruneops
from pruneops import _library, _runtime

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
BUILT = _runtime.build_info()["cuda"]
STUB = BUILD / "torch_cuda_stub"

built = pytest.mark.skipif(not BUILT, reason=f"no CUDA library: {_runtime.build_info()['cuda_reason']}")
in_build_tree = pytest.mark.skipif(not BUILD.is_dir(), reason="the package was not built here")


# ------------------------------------------------------------------ built or not


def configure(tmp_path: Path, nvcc: str, **options: str) -> subprocess.CompletedProcess[str]:
    """Runs only the part of the configure step that decides about CUDA, with a script in the place of nvcc."""
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{nvcc}\n")
    compiler.chmod(0o755)
    command = ["cmake", *(f"-D{name}={value}" for name, value in options.items()), "-P", str(ROOT / "cmake/cuda.cmake")]
    environment = {**os.environ, "CUDACXX": str(compiler)}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_auto_counts_a_broken_nvcc_as_absent_and_says_why(tmp_path: Path) -> None:
    run = configure(tmp_path, 'echo "fatal: no host compiler" >&2; exit 1', PRUNEOPS_CUDA="auto")
    assert run.returncode == 0
    assert re.search(r"CUDA library: no, \S*nvcc did not compile a small program: fatal: no host compiler", run.stdout)


def test_one_makes_a_broken_nvcc_an_error(tmp_path: Path) -> None:
    run = configure(tmp_path, "exit 3", PRUNEOPS_CUDA="1")
    assert run.returncode != 0
    message = " ".join(run.stderr.split())
    assert "PRUNEOPS_CUDA=1, but" in message and "did not compile a small program: it ended with: 3" in message


def test_zero_does_not_even_look_for_nvcc(tmp_path: Path) -> None:
    run = configure(tmp_path, "touch was_called", PRUNEOPS_CUDA="0")
    assert run.returncode == 0 and "CUDA library: no, PRUNEOPS_CUDA=0 was set" in run.stdout
    assert not (tmp_path / "was_called").exists()


def test_an_architecture_that_nvcc_does_not_know_is_named(tmp_path: Path) -> None:
    nvcc = 'case "$*" in *compute_10,*) echo "unsupported" >&2; exit 1;; esac'
    run = configure(tmp_path, nvcc, PRUNEOPS_CUDA="auto", PRUNEOPS_CUDA_ARCH_LIST="80,10")
    assert "does not compile for 10 of PRUNEOPS_CUDA_ARCH_LIST: unsupported" in run.stdout


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    run = configure(tmp_path, "exit 0", PRUNEOPS_CUDA="maybe")
    assert run.returncode != 0 and "PRUNEOPS_CUDA=maybe: expected auto, 0 or 1" in run.stderr


def test_the_library_is_there_exactly_if_the_build_says_so() -> None:
    info = pruneops.build_info()
    assert (_library.cuda_library_path() is not None) == info["cuda"]
    assert bool(info["cuda_reason"]) != info["cuda"]
    if info["cuda"]:
        assert info["cuda_archs"] and info["cuda_version"]
    elif shutil.which("nvcc"):
        assert "no nvcc was found" not in info["cuda_reason"]


# ------------------------------------------------------------------ what the kernels cost


def ptxas_report(text: str) -> list[dict[str, Any]]:
    """One entry per kernel and architecture of the output of `nvcc -Xptxas -v`."""
    entries: list[dict[str, Any]] = []
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            entries.append({"kernel": found[1], "arch": found[2]})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            entries[-1].update(stack=int(found[1]), spills=int(found[2]) + int(found[3]))
        elif found := re.search(r"Used (\d+) registers", line):
            entries[-1].update(registers=int(found[1]))
    return entries


@built
@in_build_tree
def test_no_kernel_spills_registers_or_uses_local_memory() -> None:
    sources = {path.name for path in ROOT.glob("csrc/*/cuda/*.cu")}
    logs = list(BUILD.rglob("*.cu.o.ptxas.log"))
    assert sources <= {path.name.removesuffix(".o.ptxas.log") for path in logs}
    for log in logs:
        if log.name.removesuffix(".o.ptxas.log") not in sources:
            continue
        report = ptxas_report(log.read_text())
        archs = {entry["arch"] for entry in report}
        assert archs == {f"sm_{arch}" for arch in _runtime.build_info()["cuda_archs"]}, log.name
        for entry in report:
            assert {"stack", "spills", "registers"} <= entry.keys()
        assert not [entry for entry in report if entry["spills"] or entry["stack"]]


def test_the_compiler_launcher_keeps_the_report_and_passes_on_everything_else(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler.py"
    compiler.write_text(
        "import sys\n"
        "print('ptxas info    : Function properties for f', file=sys.stderr)\n"
        "print('    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads', file=sys.stderr)\n"
        "print('x.cu(1): warning: odd', file=sys.stderr)\n"
        "sys.exit(int(sys.argv[-1]))\n"
    )
    command = [sys.executable, str(ROOT / "cmake/ptxas_log.py"), sys.executable, str(compiler), "-o", "x.o"]
    run = subprocess.run([*command, "0"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "x.cu(1): warning: odd\n")
    assert len((tmp_path / "x.o.ptxas.log").read_text().splitlines()) == 2
    assert subprocess.run([*command, "5"], cwd=tmp_path, capture_output=True).returncode == 5


# ------------------------------------------------------------------ loaded or not


def usable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_a_package_without_the_library_points_to_the_reason_in_the_build_info(monkeypatch: pytest.MonkeyPatch) -> None:
    usable_gpu(monkeypatch)
    monkeypatch.setattr(_library, "cuda_library_path", lambda: None)
    assert _library.load_cuda() == "it was not built; cuda_reason of pruneops.build_info() says why"
    assert "cuda_reason" in pruneops.build_info()


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "cuda_library_path", lambda: tmp_path / "_C_cuda.abi3.so")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _library.load_cuda() == f"torch {torch.__version__} is a build without CUDA"


def test_a_machine_without_a_usable_gpu_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usable_gpu(monkeypatch)
    monkeypatch.setattr(_library, "cuda_library_path", lambda: tmp_path / "_C_cuda.abi3.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _library.load_cuda() == "torch finds no CUDA device that it can use"


def test_a_library_that_cannot_be_loaded_is_a_reason_and_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usable_gpu(monkeypatch)
    broken = tmp_path / "_C_cuda.abi3.so"
    broken.write_text("not a library")
    monkeypatch.setattr(_library, "cuda_library_path", lambda: broken)
    reason = _library.load_cuda()
    assert reason is not None and re.match(r"loading it failed: .*_C_cuda\.abi3\.so: .*(invalid ELF|too short)", reason)


def test_build_info_and_the_command_line_say_what_was_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    from pruneops.cli import main

    expected = "loaded" if _library.cuda_refusal is None else f"not loaded: {_library.cuda_refusal}"
    assert pruneops.build_info()["cuda_library"] == expected
    assert main(["info"]) == 0
    assert re.search(rf"^cuda_library +{re.escape(expected)}$", capsys.readouterr().out, flags=re.MULTILINE)


# ------------------------------------------------------------------ what it offers, and to whom


@built
@in_build_tree
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch has the real library")
def test_it_registers_every_kernel_that_backends_expects_of_it() -> None:
    # The stub of libtorch_cuda lets the library be loaded, though not used, with a CPU build of torch.
    code = (
        "import torch\nfrom pruneops import _library, backends\n"
        "torch.ops.load_library(str(_library.cuda_library_path()))\n"
        "print(*sorted(backends._registered('cuda')))"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(STUB)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    from pruneops import backends

    assert set(run.stdout.split()) >= backends.UNPROVEN_ON_GPU["native"]


def test_kernels_unproven_on_a_gpu_run_only_where_they_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    from pruneops import backends

    monkeypatch.setitem(backends._ops["native"], "cuda", frozenset({"segment_topk", "decode_attention"}))
    monkeypatch.setitem(backends.UNPROVEN_ON_GPU, "native", frozenset({"segment_topk"}))
    monkeypatch.setitem(backends._defaults["native"], "cuda", frozenset({"decode_attention"}))
    assert backends.select("segment_topk", "cuda", torch.float32) == "reference"
    assert backends.select("decode_attention", "cuda", torch.float32) == "native"
    text = backends.explain("segment_topk", "cuda")
    assert "native: refused, its cuda kernel has not run on a GPU yet; PRUNEOPS_BACKEND=native runs it" in text
    with backends.use("native"):
        assert backends.select("segment_topk", "cuda", torch.float32) == "native"
        assert backends.explain("segment_topk", "cuda").splitlines()[0].endswith(": native")


def test_a_missing_cuda_kernel_is_explained_by_the_library_that_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from pruneops import backends

    monkeypatch.setitem(backends._ops["native"], "cuda", frozenset())
    monkeypatch.setattr(_library, "cuda_refusal", "it was not built: for a test")
    assert "kernel of gather_rows is loaded; it was not built: for a test" in backends.explain("gather_rows", "cuda")


def test_only_ops_that_exist_are_listed_as_unproven() -> None:
    from pruneops import backends

    for backend in ("native", "triton"):
        assert set(backends.OPS) >= backends.UNPROVEN_ON_GPU[backend]
