"""Finds and loads the compiled library, which registers the schemas and kernels of ``torch.ops.pruneops``."""

from __future__ import annotations

import importlib.machinery
import os
from pathlib import Path

import torch

_SUFFIXES = (".abi3.so", *importlib.machinery.EXTENSION_SUFFIXES, ".so")


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
    folder = Path(__file__).resolve().parent
    for suffix in _SUFFIXES:
        path = folder / f"_C{suffix}"
        if path.is_file():
            return path
    raise ImportError(
        f"pruneops: the compiled library _C.abi3.so is missing from {folder}; "
        "build it with `python setup.py build_ext --inplace` or `pip install --no-build-isolation -e .`"
    )


torch.ops.load_library(str(library_path()))
