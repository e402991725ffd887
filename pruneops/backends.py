"""Which implementation of an op runs, and why.

Each op has up to three backends, tried in this order:

``native``
    the compiled kernels behind ``torch.ops.pruneops``, one set per device type,
``triton``
    :mod:`pruneops.triton` behind ``torch.ops.pruneops_triton``, on devices that Triton compiles for,
``reference``
    :mod:`pruneops.reference`, plain torch, any device, every float dtype.

Kernels in :data:`UNPROVEN_ON_GPU` run on a GPU only where their backend is forced.

The choice depends on the op, the device type, the dtype and the size of the heads alone, never on values, so it is the
same inside ``torch.compile``. The environment variable ``PRUNEOPS_BACKEND`` (read once, on import) or the context
manager :func:`use` forces one backend; a forced backend that cannot run an op raises instead of falling back.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pruneops import _library, _triton_library

NATIVE = "native"
TRITON = "triton"
REFERENCE = "reference"
ORDER = (NATIVE, TRITON, REFERENCE)

OPS = (
    "segment_topk",
    "segment_threshold",
    "gather_rows",
    "scatter_rows",
    "select_compact",
    "scatter_scaled",
    "router_weights",
    "varlen_attention",
    "policy_attention",
    "decode_attention",
    "last_query_scores",
    "column_scores",
    "kv_limit_from_positions",
    "dpc_knn",
    "merge_mean",
    "position_means",
)

# Gathering and comparing positions works on any dtype; the other kernels compute in float32.
_ANY_DTYPE = frozenset({"gather_rows", "scatter_rows", "kv_limit_from_positions"})
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Attention on the tensor cores of a GPU takes less; a build may leave some of the sizes out.
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_HEAD_DIMS = (64, 80, 96, 128)
_flash_built = _library.flash_head_dims() or _FLASH_HEAD_DIMS
DEVICES = ("cpu", "cuda", "meta")

# Kernels that are compiled, and tested in an emulation on the CPU, but have not run on a GPU yet. They are not chosen
# by themselves; forcing their backend runs them. An op leaves the list with the log of a run that shows it right.
UNPROVEN_ON_GPU = {NATIVE: frozenset(OPS), TRITON: frozenset(OPS)}


def _check_name(backend: str, source: str) -> str:
    if backend not in ORDER:
        raise ValueError(f"{source} must be one of {', '.join(ORDER)}, got {backend!r}")
    return backend


def _forced_by_environment() -> str | None:
    value = os.environ.get("PRUNEOPS_BACKEND", "")
    return _check_name(value, "the environment variable PRUNEOPS_BACKEND") if value else None


def _registered(device: str) -> frozenset[str]:
    """The ops that have a compiled kernel for this device type."""
    if device == "meta":
        return frozenset(OPS)  # pruneops.ops registers a fake kernel for each
    key = device.upper()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in OPS if has_kernel(f"pruneops::{op}", key))


def _in_triton(device: str) -> frozenset[str]:
    """The ops that Triton runs on this device type."""
    runs = device in ("cuda", "meta") or (device == "cpu" and _triton_library.interpreting)
    return frozenset(OPS if runs and _triton_library.refusal is None else ())


# Plain dicts and strings, so that torch.compile can trace `select` and guard on them.
NAMESPACES = {NATIVE: "pruneops", TRITON: _triton_library.NAMESPACE}
_ops = {
    NATIVE: {device: _registered(device) for device in DEVICES},
    TRITON: {device: _in_triton(device) for device in DEVICES},
}
_defaults = {
    backend: {device: ops - UNPROVEN_ON_GPU[backend] if device == "cuda" else ops for device, ops in table.items()}
    for backend, table in _ops.items()
}
_kernels = {
    backend: {op: getattr(getattr(torch.ops, namespace), op).default for op in OPS}
    for backend, namespace in NAMESPACES.items()
}
_forced: str | None = _forced_by_environment()
_recorders: list[Counter[tuple[str, str]]] = []


def _limits(backend: str, op: str, device: str) -> tuple[tuple[torch.dtype, ...] | None, tuple[int, ...] | None]:
    """The dtypes and the sizes of heads that the kernels of a backend are made for; None is any."""
    if op in _ANY_DTYPE:
        return None, None
    if backend == NATIVE and op == "varlen_attention" and device == "cuda":
        return _FLASH_DTYPES, _flash_built
    return _KERNEL_DTYPES, None


def _takes(backend: str, op: str, device: str, dtype: torch.dtype | None, head_dim: int | None) -> bool:
    dtypes, head_dims = _limits(backend, op, device)
    if dtype is not None and dtypes is not None and dtype not in dtypes:
        return False
    return head_dim is None or head_dims is None or head_dim in head_dims


def _refusal(
    backend: str,
    op: str,
    device: str,
    dtype: torch.dtype | None,
    head_dim: int | None = None,
    unsupported: str | None = None,
) -> str | None:
    """Why ``backend`` cannot run this call, or None if it can."""
    if backend == REFERENCE:
        return None
    if unsupported is not None:
        return f"its kernels have no {unsupported}"
    if not _takes(backend, op, device, dtype, head_dim):
        return _mismatch(backend, op, device, dtype, head_dim)
    if op not in _ops[backend].get(device, frozenset()):
        return _absence(backend, op, device)
    if device == "cuda" and op in UNPROVEN_ON_GPU[backend] and _forced != backend:
        return f"its {device} kernel has not run on a GPU yet; PRUNEOPS_BACKEND={backend} runs it"
    return None


def _mismatch(backend: str, op: str, device: str, dtype: torch.dtype | None, head_dim: int | None) -> str:
    """In words, what a call asks for that `_takes` says no to."""
    dtypes, head_dims = _limits(backend, op, device)
    if dtypes is not None and dtype is not None and dtype not in dtypes:
        where = "" if dtypes == _KERNEL_DTYPES else f" on {device}"
        return f"its kernels take {_enumerated(str(d).removeprefix('torch.') for d in dtypes)}{where}, not {dtype}"
    sizes = _enumerated(map(str, head_dims or ()))
    built = " in this build (PRUNEOPS_FLASH_HEAD_DIMS)" if head_dim in _FLASH_HEAD_DIMS else ""
    return f"its {device} kernels have heads of {sizes}{built}, not of {head_dim}"


def _enumerated(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _absence(backend: str, op: str, device: str) -> str:
    """Why a backend has no kernel of ``op`` for this device type."""
    if backend == NATIVE:
        absent = f"no compiled library with a {device} kernel of {op} is loaded"
        if device == "cuda" and op == "varlen_attention" and _library.cuda_refusal is None:
            return f"{absent}; PRUNEOPS_FLASH=0 was set when it was built"
        return absent if device != "cuda" or _library.cuda_refusal is None else f"{absent}; {_library.cuda_refusal}"
    if _triton_library.refusal is not None:
        return _triton_library.refusal
    if device == "cpu":
        return "Triton compiles for GPUs; a process started with TRITON_INTERPRET=1 interprets its kernels on the CPU"
    return f"there is no Triton kernel of {op} for {device}"


def select(
    op: str,
    device: str,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    unsupported: str | None = None,
) -> str:
    """The name of the backend that runs ``op`` for tensors of this device type and dtype, and heads of this size.

    ``unsupported`` names what a call asks for beyond that and only the reference has, such as a gradient.

    Raises
    ------
    RuntimeError, TypeError
        If a forced backend has no kernel for the op and device, or none for the dtype or the size of the heads.
    """
    if _forced is None:
        chosen = REFERENCE
        for backend in (NATIVE, TRITON) if unsupported is None else ():
            if op in _defaults[backend].get(device, frozenset()) and _takes(backend, op, device, dtype, head_dim):
                chosen = backend
                break
    else:
        chosen = _forced
        reason = _refusal(chosen, op, device, dtype, head_dim, unsupported)
        if reason is not None:
            error = TypeError if reason.startswith("its kernels take") else RuntimeError
            raise error(f"{op}: the backend {chosen!r} is forced, but {reason}")
    if _recorders and not torch.compiler.is_compiling():
        _record(op, chosen)
    return chosen


def kernel(backend: str, op: str) -> Callable[..., Any]:
    """The registered op of the backend, ``native`` or ``triton``; its arguments are those of its schema."""
    return _kernels[backend][op]


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Forces one backend for every op in the process until the context ends; may be nested.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    global _forced
    previous, _forced = _forced, _check_name(backend, "backend")
    try:
        yield
    finally:
        _forced = previous


@contextmanager
def record_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Counts the calls of each op by backend: ``{(op, backend): calls}``.

    Calls inside a compiled graph are not counted.
    """
    calls: Counter[tuple[str, str]] = Counter()
    _recorders.append(calls)
    try:
        yield calls
    finally:
        # By identity: counters compare by value.
        del _recorders[next(i for i, other in enumerate(_recorders) if other is calls)]


def _record(op: str, backend: str) -> None:
    for calls in _recorders:
        calls[op, backend] += 1


def explain(op: str, device: str = "cpu", dtype: torch.dtype | None = None, head_dim: int | None = None) -> str:
    """States which backend would run ``op`` and why the ones before it would not.

    Parameters
    ----------
    op : str
        A name in :data:`OPS`.
    device : "cpu" or "cuda"
    dtype : torch.dtype, optional
        The dtype of the float inputs; float32 if not given.
    head_dim : int, optional
        The size of the heads, where the op has heads; of any size that there are kernels for if not given.

    Raises
    ------
    ValueError
        If the op or the device is unknown.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    dtype = torch.float32 if dtype is None else dtype
    call = f"{op} on {device} ({dtype})" if head_dim is None else f"{op} on {device} ({dtype}, heads of {head_dim})"
    lines = []
    for backend in ORDER:
        reason = _refusal(backend, op, device, dtype, head_dim)
        if _forced is not None and backend != _forced:
            lines.append(f"  {backend}: not considered, {_forced} is forced")
        elif reason is None:
            lines.append(f"  {backend}: runs")
            return "\n".join([f"{call}: {backend}", *lines])
        else:
            lines.append(f"  {backend}: refused, {reason}")
    return "\n".join([f"{call}: none", *lines])
