"""Argument checks of the op front-ends.

Shapes, dtypes and devices are always checked. Values are read only where that is free of waiting: plain CPU
tensors in eager mode. Values on a device, and anything under a tracer, are left to the kernels, which
clamp. Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT32 = frozenset({torch.float32})
FLOAT64 = frozenset({torch.float64})
KERNEL_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
FLOATS = KERNEL_FLOATS | FLOAT64
INTS = frozenset({torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8})
INT32 = frozenset({torch.int32})
POSITIONS = frozenset({torch.int32, torch.int64})
BOOL = frozenset({torch.bool})
REDUCTIONS = ("mean", "sum", "max")
MAX_HEAD_DIM = 256
_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = torch.finfo(torch.float32).max


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def readable(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be read here and now without waiting for a device."""
    return (
        not torch.compiler.is_compiling()
        and (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter)
        and tensor.device.type == "cpu"
    )


def tensor(
    name: str,
    value: Any,
    ndim: int | None = None,
    dtypes: frozenset[torch.dtype] | None = None,
    device: torch.device | None = None,
    rows: int | None = None,
) -> None:
    """Checks type, layout, dtype, number of dimensions, device and the size of dimension 0."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {value.layout}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_names(dtypes)}, got {value.dtype}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim != 1)}, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, the device of the other tensors, got {value.device}")
    if rows is not None and value.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows, got shape {tuple(value.shape)}")


def integer(name: str, value: Any, minimum: int = 0) -> None:
    """Checks a host integer; a bool is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if isinstance(value, int) and not minimum <= value <= _INT32_MAX:
        raise ValueError(f"{name} must be between {minimum} and {_INT32_MAX}, got {value}")


def choice(name: str, value: Any, accepted: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def real(name: str, value: Any) -> float:
    """Checks a host number and returns it as a float; infinities pass, NaN does not."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if isinstance(value, (int, float)) and value != value:
        raise ValueError(f"{name} must be a number, got {value}")
    return float(value) if isinstance(value, int) else value


def finite(name: str, value: Any) -> float:
    """Checks a host number that must be finite in float32 and returns it as a float."""
    number = real(name, value)
    if isinstance(number, float) and abs(number) > _FLOAT32_MAX:
        raise ValueError(f"{name} must be finite in float32, got {number}")
    return number


def scale(softmax_scale: Any, head_dim: int) -> float:
    """The softmax scale to use: the one given, which must be finite in float32, or ``head_dim ** -0.5``."""
    return head_dim**-0.5 if softmax_scale is None else finite("softmax_scale", softmax_scale)


def cu_seqlens(
    name: str,
    value: Any,
    total: int,
    device: torch.device,
    batch: int | None = None,
) -> list[int] | None:
    """Checks segment boundaries and returns them if they can be read."""
    tensor(name, value, 1, INT32, device)
    if value.shape[0] == 0:
        raise ValueError(f"{name} must have at least one entry, got shape (0,)")
    if batch is not None and value.shape[0] != batch + 1:
        raise ValueError(f"{name} must have {batch + 1} entries for {batch} segments, got shape {tuple(value.shape)}")
    if not readable(value):
        return None
    values: list[int] = value.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    if values != sorted(values):
        place = next(i for i in range(1, len(values)) if values[i] < values[i - 1])
        raise ValueError(f"{name} must not decrease, got {values[place - 1]} then {values[place]} at entry {place}")
    if values[-1] > total:
        raise ValueError(f"{name} must not end past the {total} rows it describes, got {values[-1]}")
    return values


def max_seqlen(name: str, value: Any, lengths_of: str, cu: list[int] | None) -> None:
    """Checks that ``value`` is no smaller than the longest segment, where that is known."""
    integer(name, value)
    if cu is not None and isinstance(value, int) and len(cu) > 1:
        longest = max([b - a for a, b in zip(cu[:-1], cu[1:], strict=True)])
        if value < longest:
            raise ValueError(f"{name} must be at least {longest}, the longest segment of {lengths_of}, got {value}")


def host_counts(name: str, value: Any, batch: int, device: torch.device) -> list[int] | Tensor:
    """Per-segment counts: a list of ints if they can be read, else the int tensor they came as."""
    if isinstance(value, Tensor):
        tensor(name, value, 1, INTS, rows=batch)
        if value.device.type != "cpu" and value.device != device:
            raise ValueError(f"{name} must be on the CPU or {device}, got {value.device}")
        if not readable(value):
            return value
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of ints or an int tensor, got {type(value).__name__}")
    for count in value:
        if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
            raise TypeError(f"{name} must hold ints, got {type(count).__name__}")
        if isinstance(count, int) and not -_INT32_MAX <= count <= _INT32_MAX:
            raise ValueError(f"{name} must hold 32-bit ints, got {count}")
    if len(value) != batch:
        raise ValueError(f"{name} must have {batch} entries, one a segment, got {len(value)}")
    return list(value)


def counts_tensor(counts: list[int] | Tensor, device: torch.device) -> Tensor:
    """Per-segment counts as the kernels take them: int32 on ``device``, copied without waiting."""
    if not isinstance(counts, Tensor):
        counts = torch.tensor(counts, dtype=torch.int32)
    if counts.dtype == torch.int32 and counts.device == device:
        return counts
    if counts.dtype == torch.int64:  # too large for any segment, but must not wrap to something smaller
        counts = counts.clamp(-_INT32_MAX, _INT32_MAX)
    return counts.to(device=device, dtype=torch.int32, non_blocking=True)


def autocast_to(x: Any, *tensors: Any) -> tuple[Any, ...]:
    """``tensors`` in the dtype of ``x`` under autocast, where layers return other dtypes; else unchanged."""
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return tensors
    return tuple(
        other.to(x.dtype) if isinstance(other, Tensor) and {other.dtype, x.dtype} <= KERNEL_FLOATS else other
        for other in tensors
    )


def constant(tensor: Tensor) -> Tensor:
    """``tensor`` without its gradient, for ops that are not differentiable in it."""
    return tensor.detach() if tensor.requires_grad else tensor


def row_indices(name: str, value: Any, rows: int, device: torch.device, unique: bool) -> None:
    """Checks indices of rows: int32 ``[n]``, each -1 or below ``rows``, each row once if ``unique``."""
    tensor(name, value, 1, INT32, device)
    if value.shape[0] == 0 or not readable(value):
        return
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < -1 or high >= rows:
        wrong = low if low < -1 else high
        raise ValueError(f"{name} must lie between -1 and {rows - 1}, got {wrong}")
    if unique and high >= 0:
        counts = torch.bincount(value + 1)
        counts[0] = 0
        if int(counts.max()) > 1:
            row = int(counts.argmax()) - 1
            raise ValueError(f"{name} must not hold a row twice, got {row} {int(counts[row + 1])} times")


def tensors(name: str, value: Any) -> list[Tensor]:
    """A list or tuple of tensors with the same number of rows, on one device."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(value).__name__}")
    for i, item in enumerate(value):
        tensor(f"{name}[{i}]", item)
        if item.dim() == 0:
            raise ValueError(f"{name}[{i}] must have at least one dimension, got a scalar tensor")
        if item.shape[0] != value[0].shape[0]:
            raise ValueError(f"{name}[{i}] must have {value[0].shape[0]} rows like {name}[0], got {tuple(item.shape)}")
        if item.device != value[0].device:
            raise ValueError(f"{name}[{i}] must be on {value[0].device} like {name}[0], got {item.device}")
    return list(value)


def heads(q: Any, k: Any, k_name: str, k_ndim: int) -> None:
    """Checks queries and keys against each other: dtype, device, head counts and head size."""
    tensor("q", q, 3, FLOATS)
    tensor(k_name, k, k_ndim, FLOATS, q.device)
    if k.dtype != q.dtype:
        raise TypeError(f"{k_name} must have the dtype of q, {q.dtype}, got {k.dtype}")
    head_dim = q.shape[2]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head_dim between 1 and {MAX_HEAD_DIM}, got {head_dim}")
    if k.shape[-1] != head_dim:
        raise ValueError(f"{k_name} must have the head_dim of q, {head_dim}, got {k.shape[-1]}")
    heads_q, heads_k = q.shape[1], k.shape[-2]
    if heads_k == 0 or heads_q == 0 or heads_q % heads_k:
        raise ValueError(f"q must have a multiple of the heads of {k_name}, {heads_k}, and at least one, got {heads_q}")


def same_as_keys(k_name: str, k: Tensor, v_name: str, v: Any) -> None:
    """Checks that values look like their keys."""
    tensor(v_name, v, k.dim(), FLOATS, k.device)
    if v.dtype != k.dtype:
        raise TypeError(f"{v_name} must have the dtype of {k_name}, {k.dtype}, got {v.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"{v_name} must have the shape of {k_name}, {tuple(k.shape)}, got {tuple(v.shape)}")


def seqused(value: Any, batch: int, capacity: int, device: torch.device) -> list[int] | None:
    """Checks the number of filled cache slots per row and returns them if they can be read."""
    tensor("seqused_k", value, 1, INT32, device, batch)
    if not readable(value):
        return None
    values: list[int] = value.tolist()
    for used in values:
        if not 0 <= used <= capacity:
            raise ValueError(f"seqused_k must lie between 0 and the capacity {capacity}, got {used}")
    return values
