"""What one layout of checkpoints is, how a config says which one it is of, and what a method's tensors have to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pruneops.methods.base import PruningMethod
from pruneops.models.checkpoints.tensors import StoredTensor, shorten

_LAYOUTS: dict[str, Layout] = {}


@dataclass(frozen=True)
class Layout:
    """The layout of a method's own checkpoints: LLaVA's original names and config keys, and what the method adds.

    Attributes
    ----------
    name : str
        As on the command line.
    method_name : str
        Of the method, as in ``config.pruning``.
    model_types : tuple of str
        What ``config.json`` may say, the one to write first. This is how a checkpoint is recognised.
    architecture : str
        What ``config.json`` says of the class.
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
    marker : str, optional
        A key that ``config.json`` has to have as well, where the model type is that of other models too.
    """

    name: str
    method_name: str
    model_types: tuple[str, ...]
    architecture: str
    method: Callable[[Mapping[str, Any]], PruningMethod]
    keys: Callable[[PruningMethod, int], dict[str, Any]]
    check: Callable[[Mapping[str, Any], PruningMethod, Mapping[str, StoredTensor]], None]
    renames: tuple[tuple[str, str], ...] = ()
    marker: str | None = None

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of this layout."""
        marked = self.marker is None or config.get(self.marker) is not None
        return marked and config.get("model_type") in self.model_types

    @property
    def signs(self) -> str:
        """What a config is recognised by, for messages."""
        return " or ".join(self.model_types) + (f" with {self.marker}" if self.marker else "")


def register(layout: Layout) -> Layout:
    """Make a layout known by its name and its model types."""
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
    return next((layout for layout in _LAYOUTS.values() if layout.recognises(config)), None)


def unknown_type(config: Mapping[str, Any], *others: str) -> ValueError:
    """The error for a ``config.json`` that is of none of our layouts, nor of the other model types."""
    known = [*others, *(_LAYOUTS[name].signs for name in layout_names())]
    return ValueError(
        f"checkpoint: config.json has model_type {config.get('model_type')!r}, expected one of {', '.join(known)}"
    )


def check_tensors(
    tensors: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[int, ...]],
    what: str,
    is_one: Callable[[str], bool],
    reason: str,
) -> None:
    """Refuse a checkpoint whose tensors of a method are not those that its config describes.

    Parameters
    ----------
    tensors : mapping of str to StoredTensor
        All of the checkpoint, by their original names.
    wanted : mapping of str to tuple of int
        Names and shapes of those of the method.
    what : str
        What they belong to, in the plural.
    is_one : callable
        Whether a name is of the method.
    reason : str
        What in the config says so.

    Raises
    ------
    ValueError
        If one is missing, not expected, of the wrong shape, or not finite.
    """
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(
            f"checkpoint: {len(missing)} of {len(wanted)} tensors of {what} are missing: {shorten(missing)}; "
            f"expected them because config.json says {reason}"
        )
    stray = sorted(name for name in tensors if is_one(name) and name not in wanted)
    if stray:
        raise ValueError(
            f"checkpoint: got {what} where config.json has none: {shorten(stray)}; expected them as {reason} says"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(f"checkpoint: {name} has shape {tensors[name].shape}, expected {shape}")
        if not bool(torch.isfinite(tensors[name].read()).all()):
            raise ValueError(f"checkpoint: {name} holds NaN or infinity, expected finite weights")
