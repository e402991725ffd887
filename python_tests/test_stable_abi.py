"""The compiled library stays on libtorch's stable ABI, and the C++ sources keep their dependency rules."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pruneops._library import cuda_library_path, library_path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"

# Which families a family may include.
ALLOWED_FAMILIES = {
    "common": {"common"},
    "selection": {"common", "selection"},
    "compaction": {"common", "compaction", "selection"},
    "routing": {"common", "routing"},
    "clustering": {"common", "clustering", "selection"},
    "attention": {"common", "attention"},
    "runtime": {"common", "runtime"},
}
STABLE_INCLUDES = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
FOREIGN_INCLUDES = ("torch/", "ATen/", "c10/", "caffe2/", "pybind11/", "Python.h")
# Their inline functions are merged across object files, so a per-ISA file must not instantiate them.
SHARED_INLINE_HEADERS = {"algorithm", "array", "functional", "map", "memory", "numeric", "string", "vector"}


def sources() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def closure(path: Path) -> Iterator[tuple[Path, str]]:
    """Every include that `path` reaches through headers of this repository, with the file it stands in."""
    seen: set[Path] = set()
    pending = [path]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in includes(current):
            yield current, name
            if (CSRC / name).is_file():
                pending.append(CSRC / name)


# The CUDA library is there if an nvcc was; test_cuda_library.py holds the build to that.
LIBRARIES = [library_path(), *filter(None, [cuda_library_path()])]
every_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1].partition("@")[0] for line in listing.splitlines() if line.strip()]


def needed_libraries(library: Path) -> list[str]:
    dynamic = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)


@every_library
def test_every_torch_symbol_is_declared_by_a_stable_shim(library: Path) -> None:
    shims = [
        *(TORCH_INCLUDE / "torch/csrc/stable/c").glob("*.h"),
        *(TORCH_INCLUDE / "torch/csrc/inductor/aoti_torch/c").glob("shim*.h"),
    ]
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)", "\n".join(p.read_text() for p in shims)))
    used = {name for name in undefined_symbols(library) if re.match(r"(aoti_)?torch_", name)}
    assert used, "the library uses no torch symbol at all, so this test looks at the wrong file"
    # Names such as aoti_torch_dtype_float32 are declared through a macro.
    missing = {n for n in used - declared if not re.match(r"aoti_torch_(dtype|device_type|layout)_", n)}
    assert not missing


@every_library
def test_no_symbol_of_the_unstable_cpp_api_is_used(library: Path) -> None:
    unstable = re.compile(r"_ZNK?\d*(2at|3c10|5torch|6caffe2)|_ZN(2at|3c10|5torch|6caffe2)|THP")
    assert not [name for name in undefined_symbols(library) if unstable.search(name)]


def test_cpu_library_has_no_cuda_symbol_and_no_cuda_dependency() -> None:
    symbols = undefined_symbols(library_path())
    assert not [name for name in symbols if re.search(r"cuda|cublas|cudnn|nvrtc", name, re.I)]
    needed = needed_libraries(library_path())
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"cuda|c10|torch_python|libtorch\.so", name)]


@pytest.mark.skipif(len(LIBRARIES) == 1, reason="the CUDA library was not built")
def test_cuda_library_brings_its_own_runtime_and_names_the_torch_library_of_its_shims() -> None:
    needed = needed_libraries(LIBRARIES[1])
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not [name for name in needed if re.search(r"cudart|c10|torch_python|libtorch\.so", name)]
    assert not [name for name in undefined_symbols(LIBRARIES[1]) if re.match(r"_*cu(da)?[A-Z]", name)]


@every_library
def test_library_has_no_python_symbol(library: Path) -> None:
    assert not [name for name in undefined_symbols(library) if name.startswith(("Py", "_Py"))]


@every_library
@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_torch_abi_audit_calls_the_library_stable_since_the_target_version(library: Path) -> None:
    tool = Path(sys.executable).parent / "torch-abi-audit"
    result = subprocess.run([str(tool), "--check", "torch", "--json", str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    (audited,) = report["extensions"] + report["bundled_libs"]
    assert audited["torch"]["stable"] is True
    assert audited["torch"]["min_torch_version"].startswith("2.10")


def test_every_schema_has_a_cpu_kernel() -> None:
    names = set(re.findall(r'"(\w+)\(', (CSRC / "library.cpp").read_text()))
    assert names
    missing = {n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pruneops::{n}", "CPU")}
    assert not missing


def test_schemas_are_defined_in_one_file_only() -> None:
    pattern = re.compile(r"STABLE_TORCH_LIBRARY(_FRAGMENT)?\(")
    assert [p.name for p in sources() if pattern.search(p.read_text())] == ["library.cpp"]


def test_torch_headers_are_the_stable_ones() -> None:
    banned = [
        f"{path.relative_to(CSRC)}: {name}"
        for path in sources()
        for name in includes(path)
        if name.startswith(("ATen/", "c10/", "caffe2/"))
        or (name.startswith("torch/") and not name.startswith(STABLE_INCLUDES))
    ]
    assert not banned


def test_kernels_reach_no_torch_header() -> None:
    kernels = [p for p in sources() if p.parent.name in {"cpu", "cuda"} or p == CSRC / "common/cpu_features.cpp"]
    assert kernels
    reached = {
        f"{kernel.relative_to(CSRC)} reaches {name} in {holder.relative_to(CSRC)}"
        for kernel in kernels
        for holder, name in closure(kernel)
        if name.startswith(FOREIGN_INCLUDES)
    }
    assert not reached


def test_per_isa_files_reach_no_header_with_shared_inline_code() -> None:
    kernels = [p for p in sources() if re.search(r"_(scalar|avx2|avx512|avx512bf16)\.cpp$", p.name)]
    assert kernels
    reached = {
        f"{kernel.relative_to(CSRC)} reaches <{name}> in {holder.relative_to(CSRC)}"
        for kernel in kernels
        for holder, name in closure(kernel)
        if name in SHARED_INLINE_HEADERS
    }
    assert not reached


def test_families_include_only_what_they_may_know() -> None:
    families = {path: path.relative_to(CSRC).parts[0] for path in sources()}
    unknown = {f for f in families.values() if f not in ALLOWED_FAMILIES} - {"library.cpp", "tests"}
    assert not unknown, "a new folder of csrc needs an entry in ALLOWED_FAMILIES"
    wrong = [
        f"{path.relative_to(CSRC)}: {name}"
        for path, family in families.items()
        if family in ALLOWED_FAMILIES
        for name in includes(path)
        if name.split("/")[0] in ALLOWED_FAMILIES.keys() - ALLOWED_FAMILIES[family]
    ]
    assert not wrong
