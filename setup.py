"""Builds the compiled libraries with CMake; everything else about the package is in pyproject.toml.

Environment variables
---------------------
PRUNEOPS_SANITIZE=1          AddressSanitizer and UndefinedBehaviorSanitizer
PRUNEOPS_CUDA=auto|0|1       the CUDA library: where a working nvcc is found (the default), never, or always
PRUNEOPS_CUDA_ARCH_LIST      the GPU architectures it is compiled for, such as 80;90a
PRUNEOPS_FLASH=0             leaves out the attention kernels for tensor cores, which take most of its build
PRUNEOPS_FLASH_HEAD_DIMS     the head sizes they are compiled for, such as 64;128; all of them if not set
PRUNEOPS_BUILD_TESTS=1       also build the C++ tests
PRUNEOPS_CUTLASS_DIR         headers of CUTLASS that some of them compare with; those of nvidia-cutlass if not set
PRUNEOPS_WERROR=1            compiler warnings are errors
CMAKE_BUILD_PARALLEL_LEVEL   number of parallel compiler jobs
CMAKE_ARGS                   further arguments for the configure step

`pruneops._C` uses no Python API at all, but `pruneops._runtime` is a pybind11 module, and pybind11 does not
support the limited API. So a wheel carries the tag of the interpreter that built it (cp310, cp311, ...).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

CUDA_LIBRARY = "pruneops._C_cuda"


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "on", "true", "yes")


class CMakeBuild(build_ext):
    """Configures once, then builds one CMake target per extension and copies its result into place."""

    def run(self) -> None:
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError("building pruneops needs torch: install torch first and build with --no-build-isolation")
        sanitize = flag("PRUNEOPS_SANITIZE")
        kind = "-sanitize" if sanitize else ""
        self.cmake_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{kind}"
        command = [
            "cmake", "-S", str(ROOT), "-B", str(self.cmake_dir),
            f"-DCMAKE_BUILD_TYPE={'RelWithDebInfo' if sanitize or self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPRUNEOPS_TORCH_DIR={spec.submodule_search_locations[0]}",
            f"-DPRUNEOPS_VERSION={self.distribution.get_version()}",
            f"-DPRUNEOPS_SANITIZE={'ON' if sanitize else 'OFF'}",
            f"-DPRUNEOPS_WERROR={'ON' if flag('PRUNEOPS_WERROR') else 'OFF'}",
            f"-DPRUNEOPS_BUILD_TESTS={'ON' if flag('PRUNEOPS_BUILD_TESTS') else 'OFF'}",
            f"-DPRUNEOPS_CUDA={os.environ.get('PRUNEOPS_CUDA', 'auto')}",
            f"-DPRUNEOPS_CUDA_ARCH_LIST={os.environ.get('PRUNEOPS_CUDA_ARCH_LIST', '')}",
            f"-DPRUNEOPS_FLASH={os.environ.get('PRUNEOPS_FLASH', '1')}",
            f"-DPRUNEOPS_FLASH_HEAD_DIMS={os.environ.get('PRUNEOPS_FLASH_HEAD_DIMS', '')}",
            f"-DPRUNEOPS_CUTLASS_DIR={os.environ.get('PRUNEOPS_CUTLASS_DIR', '')}",
        ]  # fmt: skip
        if not (self.cmake_dir / "CMakeCache.txt").exists() and shutil.which("ninja"):
            command += ["-G", "Ninja"]
        subprocess.run(command + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        if "PRUNEOPS_CUDA_BUILT:INTERNAL=TRUE" not in (self.cmake_dir / "CMakeCache.txt").read_text():
            self.drop_cuda_extension()
        super().run()
        if flag("PRUNEOPS_BUILD_TESTS"):
            subprocess.run(["cmake", "--build", str(self.cmake_dir)], check=True)

    def drop_cuda_extension(self) -> None:
        """Takes the CUDA library out of what is built, and removes the one an earlier build left in its place."""
        (cuda,) = (ext for ext in self.extensions if ext.name == CUDA_LIBRARY)
        self.extensions = [ext for ext in self.extensions if ext is not cuda]
        Path(self.get_ext_fullpath(cuda.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.rpartition(".")[2]
        subprocess.run(["cmake", "--build", str(self.cmake_dir), "--target", target], check=True)
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        (built,) = self.cmake_dir.glob(f"{target}.*so")
        shutil.copy2(built, destination)


setup(
    ext_modules=[
        Extension("pruneops._C", sources=[], py_limited_api=True),
        Extension(CUDA_LIBRARY, sources=[], py_limited_api=True),
        Extension("pruneops._runtime", sources=[]),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
