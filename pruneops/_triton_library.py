"""Defines ``torch.ops.pruneops_triton``: the ops of ``torch.ops.pruneops`` once more, run by :mod:`pruneops.triton`.

The schemas are read off the compiled ones, so both namespaces take the same arguments. Triton is imported by the first
call that needs it. Kernels are registered for CUDA devices, and for the CPU in a process that was started with
``TRITON_INTERPRET=1``, where Triton interprets them, slowly.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pruneops import _library

NAMESPACE = "pruneops_triton"
OLDEST = (3, 6)

interpreting = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def _installed_refusal() -> str | None:
    """Why the Triton that is installed cannot be used, or None."""
    oldest = ".".join(map(str, OLDEST))
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"triton is not installed; it needs triton {oldest} or newer"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"it needs triton {oldest} or newer, and {version} is installed"
    return None


refusal = _installed_refusal()


def _device_of(args: tuple[Any, ...]) -> torch.device:
    tensors = (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(x, Tensor))
    return next(tensors).device


def _kernel_of(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        kernel = importlib.import_module("pruneops.triton").KERNELS[op]
        device = _device_of(args)
        # Triton launches on the current device, which need not be that of the tensors.
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    return run


_definitions = torch.library.Library(NAMESPACE, "DEF")
for _op in _library.op_names():
    _schema = str(getattr(torch.ops.pruneops, _op).default._schema)
    _definitions.define(_schema.removeprefix("pruneops::"))
    for _key in ("CUDA", "CPU") if interpreting else ("CUDA",):
        _definitions.impl(_op, _kernel_of(_op), _key)
