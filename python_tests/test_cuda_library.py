"""The CUDA library: when it is built, what its kernels cost, when it is loaded, and who may use it."""

from __future__ import annotations

import json
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
sys.path.insert(0, str(ROOT / "cmake"))

import build_report  # noqa: E402  (belongs to the build, not to the package)

BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
BUILT = _runtime.build_info()["cuda"]
STUB = BUILD / "torch_cuda_stub"
FLASH_SOURCE = re.compile(r"flash_[a-z]+_sm(?P<arch>80|90)_hd(?P<head_dim>\d+)\.cu")
# The same tiles in other ops; these are in every build.
TILE_SOURCE = re.compile(r"(flash_policy_[a-z]+_sm80|tile_scores)_hd\d+\.cu")

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
        assert set(info["flash_head_dims"]) <= {64, 80, 96, 128}
        return
    assert info["flash_head_dims"] == []
    if shutil.which("nvcc"):
        assert "no nvcc was found" not in info["cuda_reason"]


# ------------------------------------------------------------------ attention on tensor cores: built or not


def cmake_script(tmp_path: Path, text: str, **options: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.cmake"
    script.write_text(f'cmake_policy(SET CMP0057 NEW)\ninclude("{ROOT / "cmake/flash.cmake"}")\n{text}\n')
    command = ["cmake", *(f"-D{name}={value}" for name, value in options.items()), "-P", str(script)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"PRUNEOPS_FLASH": "no"}, "PRUNEOPS_FLASH=no: expected 0 or 1"),
        ({"PRUNEOPS_FLASH_HEAD_DIMS": "64,72"}, "PRUNEOPS_FLASH_HEAD_DIMS=64;72: expected some of 64, 80, 96, 128"),
    ],
)
def test_unknown_choices_of_attention_kernels_are_refused(tmp_path: Path, option: dict[str, str], message: str) -> None:
    run = cmake_script(tmp_path, "", **option)
    assert run.returncode != 0 and message in " ".join(run.stderr.split())


def sorted_flash(tmp_path: Path, **options: str) -> tuple[dict[str, list[str]], str]:
    """Which file goes where, by group, and what stands in for the files that are left out."""
    names = ["scores.cu", *CHOOSING, "flash_schedule.cu"]
    names += [f"flash_forward_sm{arch}_hd{size}.cu" for arch in (80, 90) for size in (64, 80)]
    names += ["flash_backward_sm80_hd64.cu"]
    script = f"""set(sources {" ".join(f"/x/{name}" for name in names)})
pruneops_sort_flash(sources)
pruneops_write_flash_stand_ins("{tmp_path}/stand_ins.cpp" "${{PRUNEOPS_FLASH_LEFT_OUT}}")
message("usual=${{sources}}")
foreach(group SM90 LEFT_OUT BUILT)
  message("${{group}}=${{PRUNEOPS_FLASH_${{group}}}}")
endforeach()"""
    run = cmake_script(tmp_path, script, PRUNEOPS_CUDA_ENABLED="1", **options)
    assert run.returncode == 0, run.stderr
    groups = (line.split("=") for line in run.stderr.splitlines())
    places = {group: [Path(name).name for name in names.split(";") if name] for group, names in groups}
    return places, (tmp_path / "stand_ins.cpp").read_text()


CHOOSING = ["flash_cuda.cpp", "flash_forward.cu", "flash_backward.cu"]
FOR_AMPERE = ["flash_forward_sm80_hd64.cu", "flash_forward_sm80_hd80.cu", "flash_backward_sm80_hd64.cu"]
FOR_HOPPER = ["flash_forward_sm90_hd64.cu", "flash_forward_sm90_hd80.cu"]


def test_attention_kernels_for_hopper_are_compiled_for_hopper_alone(tmp_path: Path) -> None:
    places, stand_ins = sorted_flash(tmp_path, PRUNEOPS_CUDA_ARCHS="80;90a;100")
    assert places["usual"] == ["scores.cu", *CHOOSING, "flash_schedule.cu", *FOR_AMPERE]
    assert places["SM90"] == FOR_HOPPER and places["BUILT"] == ["64", "80", "96", "128"]
    assert places["LEFT_OUT"] == [] and "template" not in stand_ins
    places, _ = sorted_flash(tmp_path, PRUNEOPS_CUDA_ARCHS="80;90;100")
    assert places["usual"][-3:] == FOR_AMPERE and places["SM90"] == [] and places["LEFT_OUT"] == []


def test_attention_kernels_of_some_head_sizes_or_of_none(tmp_path: Path) -> None:
    options = {"PRUNEOPS_CUDA_ARCHS": "80;90a", "PRUNEOPS_FLASH_HEAD_DIMS": "128,80,80"}
    places, stand_ins = sorted_flash(tmp_path, **options)
    assert places["BUILT"] == ["80", "128"] and places["SM90"] == FOR_HOPPER[1:]
    assert places["usual"] == ["scores.cu", *CHOOSING, "flash_schedule.cu", FOR_AMPERE[1]]
    assert places["LEFT_OUT"] == [FOR_AMPERE[0], FOR_HOPPER[0], FOR_AMPERE[2]]
    types = "const FlashForwardParams&, const FlashDevice&, cudaStream_t"
    assert f"template cudaError_t launch_flash_forward_sm90<64>({types});" in stand_ins.splitlines()
    assert "launch_flash_backward_sm80<64>(const FlashBackwardParams&" in stand_ins
    assert "cudaErrorNoKernelImageForDevice" in stand_ins and "<80>" not in stand_ins
    places, _ = sorted_flash(tmp_path, PRUNEOPS_CUDA_ARCHS="80;90a", PRUNEOPS_FLASH="0")
    assert places["usual"] == ["scores.cu", "flash_schedule.cu"], "no wrapper registers an op without kernels"
    assert places["BUILT"] == places["SM90"] == places["LEFT_OUT"] == []


# ------------------------------------------------------------------ what the kernels cost


def kernels() -> list[dict[str, Any]]:
    """What build_report.py has written about the kernels of every source that is still there."""
    sources = {path.name for path in ROOT.glob("csrc/*/cuda/*.cu")}
    report = json.loads((BUILD / "cuda_kernels.json").read_text())
    return [entry for entry in report if entry["source"] in sources]


def expected_archs(source: str) -> set[str]:
    if source in CHOOSING:
        return set()
    info = _runtime.build_info()
    archs = {f"sm_{arch}" for arch in info["cuda_archs"]}
    found = FLASH_SOURCE.fullmatch(source)
    if found and int(found["head_dim"]) not in info["flash_head_dims"]:
        return set()
    return archs & {"sm_90a"} if found and found["arch"] == "90" else archs


@built
@in_build_tree
def test_every_kernel_is_compiled_for_its_architectures_without_spills_or_local_memory() -> None:
    report = kernels()
    for path in ROOT.glob("csrc/*/cuda/*.cu"):
        entries = [entry for entry in report if entry["source"] == path.name]
        assert {entry["arch"] for entry in entries} == expected_archs(path.name), path.name
    assert all(entry["registers"] > 0 for entry in report)
    assert not [entry for entry in report if entry["spills"] or entry["stack"]]


@built
@in_build_tree
def test_kernels_that_share_out_registers_begin_with_the_number_they_count_on() -> None:
    """`take_registers` would wait for ever in a block that begins with fewer."""
    for entry in kernels():
        found = FLASH_SOURCE.fullmatch(entry["source"])
        if found is None or found["arch"] != "90" or "_row_terms_" in entry["kernel"]:
            continue
        threads = 512 if "_forward_" in entry["source"] and found["head_dim"] != "128" else 384
        assert (entry["registers"], entry["static_shared"]) == (65536 // threads // 8 * 8, 0), entry


@built
@in_build_tree
def test_attention_runs_on_the_tensor_cores() -> None:
    """Products of warpgroups and copies of tiles by the hardware on Hopper, products of warps elsewhere."""
    report = kernels()
    if any(entry["instructions"] is None for entry in report):
        pytest.skip("no cuobjdump was found when it was built")
    flash = [e for e in report if FLASH_SOURCE.fullmatch(e["source"])]
    tiles = [e for e in report if TILE_SOURCE.fullmatch(e["source"])]
    assert bool(flash) == bool(_runtime.build_info()["flash_head_dims"]) and tiles
    for entry in (e for e in (*flash, *tiles) if "_row_terms_" not in e["kernel"]):
        for_hopper = "_sm90_" in entry["source"]
        wanted = {"HGMMA", "UTMALDG"} if for_hopper else {"HMMA", "LDSM", "LDGSTS"}
        assert wanted <= set(entry["instructions"]), entry
        assert for_hopper or "HGMMA" not in entry["instructions"]


LOG_OF_PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8pruneops10sum_kernelIfLi2EEEvPfi' for 'sm_90a'
ptxas info    : Function properties for _ZN8pruneops10sum_kernelIfLi2EEEvPfi
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 4096 bytes smem
ptxas info    : Compiling entry function '_ZN8pruneops11none_kernelEv' for 'sm_90a'
ptxas info    : Function properties for _ZN8pruneops11none_kernelEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
SASS = """\
	code for sm_90a
		Function : _ZN8pruneops10sum_kernelIfLi2EEEvPfi
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, R8 ;     /* 0x0000a00ff0017b82 */
        /*0020*/             @UP1 UTMALDG.4D [UR8], [UR4] ;               /* 0x0000a00ff0017b82 */
        /*0030*/                   HMMA.16816.F32.BF16 R68, R84 ;         /* 0x0000000e5444723c */
		Function : _ZN8pruneops11none_kernelEv
        /*0000*/                   EXIT ;                                 /* 0x000000000000794d */
"""


def test_the_build_report_joins_what_ptxas_says_and_the_machine_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = tmp_path / "some.dir"
    objects.mkdir()
    for name in ("sums.cu.o", "gone.cu.o"):
        (objects / f"{name}.ptxas.log").write_text(LOG_OF_PTXAS)
    (objects / "sums.cu.o").touch()
    cuobjdump = tmp_path / "cuobjdump"
    cuobjdump.write_text(f"#!{sys.executable}\nprint({SASS!r})\n")
    cuobjdump.chmod(0o755)
    assert build_report.main(["--nvcc", str(tmp_path / "nvcc"), str(tmp_path)]) == 0
    summed, none = json.loads((tmp_path / "cuda_kernels.json").read_text())
    assert summed == {
        "source": "sums.cu", "kernel": "sum_kernel<float, 2>", "mangled": "_ZN8pruneops10sum_kernelIfLi2EEEvPfi",
        "arch": "sm_90a", "stack": 16, "spills": 12, "registers": 40, "static_shared": 4096,
        "instructions": ["HMMA", "HGMMA", "UTMALDG"],
    }  # fmt: skip
    assert (none["registers"], none["static_shared"], none["instructions"]) == (8, 0, [])
    table = (tmp_path / "cuda_kernels.md").read_text()
    assert "| sums.cu | `sum_kernel<float, 2>` | sm_90a | 40 | 4096 | 16 | 12 | HMMA HGMMA UTMALDG |" in table
    monkeypatch.setattr(build_report, "find_cuobjdump", lambda nvcc: None)
    assert build_report.main([str(tmp_path)]) == 0
    assert "| 12 | unknown |" in (tmp_path / "cuda_kernels.md").read_text()


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void pruneops::sum_kernel<float, 2>(float*, int)", "sum_kernel<float, 2>"),
        ("pruneops::none_kernel()", "none_kernel"),
        ("void pruneops::(anonymous namespace)::f<pruneops::Half, (pruneops::Kind)1>(int)", "f<Half, 1>"),
    ],
)
def test_names_of_kernels_are_shortened(name: str, short: str) -> None:
    assert build_report.shortened(name) == short


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

    left_out = set() if _runtime.build_info()["flash_head_dims"] else {"varlen_attention"}
    assert set(run.stdout.split()) | left_out >= backends.UNPROVEN_ON_GPU["native"]


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
