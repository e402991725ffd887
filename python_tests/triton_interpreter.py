"""Makes Triton's interpreter round as GPUs do, and fast enough for a test suite.

The interpreter cuts float32 off to bfloat16, where GPUs round to the nearest, to the even one of two. It exchanges
every function of ``triton.language`` at the start of a launch, puts them back at its end, and exchanges them once more,
to the same effect, whenever a kernel calls a function of its own, which is most of its time; here the second and later
times do nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


class _Exchanged:
    """What a launch has exchanged so far; the interpreter calls ``restore`` at its end."""

    def __init__(self, exchange: Callable[[Any], Any]) -> None:
        self._exchange = exchange
        self._scopes: list[Any] = []
        self._modules: set[int] = set()
        self._modules_of: dict[Any, frozenset[int]] = {}

    def __call__(self, fn: Any) -> _Exchanged:
        modules = self._modules_of.get(fn)
        if modules is None:
            values = (value for value in fn.__globals__.values() if inspect.ismodule(value))
            modules = frozenset(id(value) for value in values if value in (tl, tl.core))
            self._modules_of[fn] = modules
        if not modules <= self._modules or not modules:  # without any the interpreter complains
            self._scopes.append(self._exchange(fn))
            self._modules |= modules
        return self

    def restore(self) -> None:
        while self._scopes:
            self._scopes.pop().restore()
        self._modules.clear()


def _index_of_one_entry(exchange: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Triton 3.6 takes ``int()`` of arrays with one entry in one dimension, which numpy no longer allows."""

    def patched(tensor: Any, scope: Any) -> None:
        exchange(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patched


def _rounding_bfloat16(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The conversion between float types, with bfloat16 done by torch; the arrays hold bits."""

    def patched(bits: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(bits).view(np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(bits.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return np.left_shift(bits.astype(np.uint32), 16).reshape(bits.shape)
        return convert(bits, source, target, rounding_mode)

    return patched


def install() -> None:
    """Changes the interpreter of this process, once."""
    if isinstance(interpreter._patch_lang, _Exchanged):
        return
    interpreter._patch_lang = _Exchanged(interpreter._patch_lang)
    interpreter._convert_float = _rounding_bfloat16(interpreter._convert_float)
    interpreter._patch_lang_tensor = _index_of_one_entry(interpreter._patch_lang_tensor)
