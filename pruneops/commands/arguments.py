"""Types of command line arguments."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(text, 1)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(text, 0)


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}") from None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None


def file_size(text: str) -> int:
    """Bytes, as ``5GB``, ``200MB`` or a plain number."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    unit = next((unit for unit in units if text.upper().endswith(unit)), "")
    try:
        size = int(float(text[: len(text) - len(unit)]) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB or 200MB, got {text!r}")
    return size


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return value
