"""Bytes of keys and values that a ragged cache holds."""

from __future__ import annotations

from collections.abc import Sequence

from pruneops.analysis.flops import TextShape

_BYTES = {"float64": 8, "float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "int8": 1}


def dtype_bytes(dtype: object) -> int:
    """Bytes of one element of ``dtype``: a ``torch.dtype`` or its name, such as ``"bfloat16"``."""
    size = getattr(dtype, "itemsize", None)
    if isinstance(size, int):
        return size
    name = str(dtype).removeprefix("torch.")
    if name.startswith("float8"):
        return 1
    if name not in _BYTES:
        raise ValueError(f"dtype must be a floating point type such as torch.bfloat16, got {dtype!r}")
    return _BYTES[name]


def kv_bytes_per_token(config: object, dtype: object) -> int:
    """Bytes one token takes in the cache of one layer (keys and values)."""
    shape = TextShape.from_config(config)
    return 2 * shape.num_key_value_heads * shape.head_dim * dtype_bytes(dtype)


def kv_bytes(config: object, layer_lengths: Sequence[Sequence[int]], dtype: object) -> int:
    """Bytes of the cache of all layers when row b holds ``layer_lengths[i][b]`` tokens at layer i."""
    return kv_bytes_per_token(config, dtype) * sum(sum(lengths) for lengths in layer_lengths)
