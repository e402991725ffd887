"""What one layout of checkpoints is, and how a config says which one it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pruneops.methods.base import PruningMethod
from pruneops.models.checkpoints.tensors import StoredTensor

_LAYOUTS: dict[str, Layout] = {}


@dataclass(frozen=True)
class Layout:
    """The layout of a method's own checkpoints: LLaVA's original names and config keys, and what the method adds.

    Attributes
    ----------
    name : str
        As on the command line.
    model_type, architecture : str
        What ``config.json`` says. The model type is how a checkpoint is recognised.
    method : callable
        ``method(config) -> PruningMethod`` from the keys of ``config.json``; raises ValueError where they are wrong.
    keys : callable
        ``keys(method, num_layers) -> dict``: the inverse.
    check : callable
        ``check(config, method, tensors)`` raises ValueError if the method's own tensors, by their original names, are
        missing or cannot be right. Runs before everything is compared with the model, and says it better.
    renames : tuple of (str, str)
        Original and Hugging Face prefixes of tensors that LLaVA does not have, where the rules of LLaVA's own
        (``model.`` is ``language_model.model.``) are not what they need.
    """

    name: str
    model_type: str
    architecture: str
    method: Callable[[Mapping[str, Any]], PruningMethod]
    keys: Callable[[PruningMethod, int], dict[str, Any]]
    check: Callable[[Mapping[str, Any], PruningMethod, Mapping[str, StoredTensor]], None]
    renames: tuple[tuple[str, str], ...] = ()


def register(layout: Layout) -> Layout:
    """Make a layout known by its name and its model type."""
    _LAYOUTS[layout.name] = layout
    return layout


def layout_names() -> list[str]:
    return sorted(_LAYOUTS)


def layout_named(name: str) -> Layout:
    """The layout of that name; ValueError if there is none."""
    if name not in _LAYOUTS:
        raise ValueError(f"layout: got {name!r}, expected one of {', '.join(['hf', *layout_names()])}")
    return _LAYOUTS[name]


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout that a ``config.json`` is of, or None if it is none of ours."""
    return next((layout for layout in _LAYOUTS.values() if layout.model_type == config.get("model_type")), None)
