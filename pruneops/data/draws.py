"""Random draws that are the same on every machine and with every version of numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_MASK = (1 << 64) - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Draws:
    """A stream of random integers that is named by a key.

    It is splitmix64 in integer arithmetic: numpy and the standard library do not promise the same numbers from the same
    seed in all versions.

    Parameters
    ----------
    *key : int or str
        Equal keys give equal streams, other keys independent ones.
    """

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._state = int.from_bytes(digest[:8], "little")

    def below(self, bound: int) -> int:
        """A whole number from 0 to `bound` - 1."""
        self._state = (self._state + _GAMMA) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * _FIRST) & _MASK
        z = ((z ^ (z >> 27)) * _SECOND) & _MASK
        return ((z ^ (z >> 31)) * bound) >> 64

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        left = list(items)
        for last in range(len(left) - 1, 0, -1):
            other = self.below(last + 1)
            left[last], left[other] = left[other], left[last]
        return left

    def bytes(self, count: int) -> np.ndarray:
        """So many random bytes, ``(count,)`` uint8."""
        words = -(-count // 8)
        z = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(self._state)
        self._state = (self._state + words * _GAMMA) & _MASK
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
        # The order of the bytes of a word is fixed, whatever that of the machine.
        return (z ^ (z >> np.uint64(31))).astype("<u8").view(np.uint8)[:count]

    def array(self, bound: int, count: int) -> np.ndarray:
        """So many whole numbers from 0 to `bound` - 1 (at most 2**16), ``(count,)`` int64."""
        return (self.bytes(2 * count).view("<u2").astype(np.int64) * bound) >> 16
