"""Finds and loads the compiled libraries, which register the schemas and kernels of ``torch.ops.pruneops``.

``_C`` holds the schemas and the CPU kernels and is required. ``_C_cuda`` only adds CUDA kernels; it is loaded where
torch can use a GPU, and its absence is never an error.
"""

from __future__ import annotations

import importlib.machinery
import os
from pathlib import Path

import torch

_SUFFIXES = (".abi3.so", *importlib.machinery.EXTENSION_SUFFIXES, ".so")


def _find(name: str) -> Path | None:
    """The file of one of our libraries, beside this module."""
    folder = Path(__file__).resolve().parent
    return next((path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def library_path() -> Path:
    """Path of the library with the schemas and the CPU kernels.

    ``PRUNEOPS_LIBRARY`` names another build of it, such as one with sanitizers.

    Raises
    ------
    ImportError
        If the package was not built, or ``PRUNEOPS_LIBRARY`` names no file.
    """
    override = os.environ.get("PRUNEOPS_LIBRARY")
    if override:
        if not Path(override).is_file():
            raise ImportError(f"PRUNEOPS_LIBRARY={override!r}: no such file; expected a build of _C.abi3.so")
        return Path(override)
    path = _find("_C")
    if path is None:
        raise ImportError(
            f"pruneops: the compiled library _C.abi3.so is missing from {Path(__file__).resolve().parent}; "
            "build it with `python setup.py build_ext --inplace` or `pip install --no-build-isolation -e .`"
        )
    return path


def cuda_library_path() -> Path | None:
    """Path of the library with the CUDA kernels, or None if the package was built without it."""
    return _find("_C_cuda")


def load_cuda() -> str | None:
    """Loads the CUDA library if it can be used here. Returns None, or why it was not loaded.

    Never raises: a package that was built with CUDA also works without a GPU, and with a CPU build of torch.
    """
    path = cuda_library_path()
    if path is None:
        return "it was not built; cuda_reason of pruneops.build_info() says why"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device that it can use"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"loading it failed: {error.__cause__ or error}"
    return None


def flash_head_dims() -> tuple[int, ...]:
    """The sizes of heads whose attention kernels the CUDA library was built with; none without such a library."""
    from pruneops import _runtime

    return tuple(_runtime.build_info()["flash_head_dims"])


def op_names() -> tuple[str, ...]:
    """The names of all ops that the libraries define, backward passes among them."""
    prefix = "pruneops::"
    return tuple(sorted(n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)))


torch.ops.load_library(str(library_path()))
cuda_refusal = load_cuda()
