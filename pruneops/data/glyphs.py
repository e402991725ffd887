"""Bitmaps of everything that is drawn: shapes that fill one patch, and letters of which two fit into one."""

from __future__ import annotations

import functools

import numpy as np

#: Sprites are drawn on a lattice of this many units to a patch, and places are counted in these units.
UNIT = 8

_SHAPES = {
    "circle": "..####.. .######. ######## ######## ######## ######## .######. ..####..",
    "square": "######## ######## ######## ######## ######## ######## ######## ########",
    "triangle": "...##... ...##... ..####.. ..####.. .######. .######. ######## ########",
    "plus": "...##... ...##... ...##... ######## ######## ...##... ...##... ...##...",
    "ring": ".######. ######## ##....## ##....## ##....## ##....## ######## .######.",
    "arrow": "...##... ....##.. .....##. ######## ######## .....##. ....##.. ...##...",
    "heart": ".##..##. ######## ######## ######## .######. .######. ..####.. ...##...",
    "cross": "##....## ###..### .######. ..####.. ..####.. .######. ###..### ##....##",
}
SHAPES = tuple(_SHAPES)

_LETTERS = {
    "a": "### #.# ### #.# #.#",
    "b": "##. #.# ##. #.# ##.",
    "d": "##. #.# #.# #.# ##.",
    "e": "### #.. ##. #.. ###",
    "f": "### #.. ##. #.. #..",
    "g": ".## #.. #.# #.# .##",
    "i": "### .#. .#. .#. ###",
    "k": "#.# #.# ##. #.# #.#",
    "l": "#.. #.. #.. #.. ###",
    "o": "### #.# #.# #.# ###",
    "p": "### #.# ### #.. #..",
    "r": "##. #.# ##. ##. #.#",
    "s": "### #.. ### ..# ###",
    "t": "### .#. .#. .#. .#.",
    "u": "#.# #.# #.# #.# ###",
}


def _bitmap(text: str) -> np.ndarray:
    return np.array([[mark == "#" for mark in row] for row in text.split()])


def _enlarged(bitmap: np.ndarray, patch: int) -> np.ndarray:
    """Nearest neighbour in integers, ``units x units`` to ``pixels x pixels``."""
    rows, columns = ((2 * np.arange(size * patch // UNIT) + 1) * UNIT // (2 * patch) for size in bitmap.shape)
    return bitmap[rows[:, None], columns]


@functools.cache
def shape_mask(shape: str, patch: int) -> np.ndarray:
    """Which pixels a shape covers, ``(patch, patch)`` bool."""
    return _enlarged(_bitmap(_SHAPES[shape]), patch)


@functools.cache
def text_mask(text: str, patch: int) -> np.ndarray:
    """Which pixels the ink of an even number of letters covers, ``(patch, len(text) / 2 * patch)`` bool.

    Two letters fill one patch, so that no letter lies in two.
    """
    canvas = np.zeros((UNIT, UNIT * len(text) // 2), dtype=bool)
    for index, letter in enumerate(text):
        left = index * UNIT // 2 + 1
        canvas[2:7, left : left + 3] = _bitmap(_LETTERS[letter])
    return _enlarged(canvas, patch)
