"""pruneops: multimodal language models that carry fewer visual tokens.

Importing the package loads neither torch nor the compiled kernels; every attribute below is resolved when it
is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pruneops._version import __version__

if TYPE_CHECKING:
    from pruneops.pruning import attach, detach, prune

__all__ = ["__version__", "attach", "build_info", "detach", "prune"]

_LAZY_ATTRIBUTES = {"attach": "pruning", "detach": "pruning", "prune": "pruning"}
_LAZY_MODULES = frozenset({"analysis", "backends", "methods", "models", "ops", "reference", "testing", "training"})


def build_info() -> dict[str, Any]:
    """What was compiled and what runs here.

    Returns
    -------
    dict
        Of the build: ``version``, ``compiler``, ``cxx_flags``, ``cxx_standard``, ``torch_build_version``
        (the headers it used), ``torch_target_version`` (the lowest torch the library runs on), ``isas``
        (compiled instruction sets), ``sanitized``, ``cuda`` (whether the CUDA library was built), ``cuda_reason``
        (why not), ``cuda_version``, ``cuda_archs`` and ``flash_head_dims`` (sizes of heads with attention kernels for
        tensor cores). Of the machine: ``cpu_features``, ``active_isa``, the instruction set that the CPU kernels use,
        and ``cuda_library``, ``"loaded"`` or why the CUDA library is not.

    Raises
    ------
    RuntimeError
        If the environment variable ``PRUNEOPS_CPU_ISA`` names an instruction set that is unknown or not
        available.
    """
    from pruneops import _library, _runtime

    refusal = _library.cuda_refusal
    return {
        **_runtime.build_info(),
        "cpu_features": _runtime.cpu_features(),
        "active_isa": _runtime.active_isa(),
        "cuda_library": "loaded" if refusal is None else f"not loaded: {refusal}",
    }


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(f"pruneops.{_LAZY_ATTRIBUTES[name]}"), name)
    elif name in _LAZY_MODULES:
        value = importlib.import_module(f"pruneops.{name}")
    else:
        raise AttributeError(f"module 'pruneops' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})
