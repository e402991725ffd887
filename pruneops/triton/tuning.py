"""Tile sizes: which configuration a kernel runs with, by GPU and class of shapes.

Nothing is ever tuned by a call. :func:`configuration` reads, in this order,

1. what the user measured with ``pruneops tune`` on this very GPU model (:func:`user_table_path`),
2. ``tuned.json`` beside this file: what was measured by us, by compute capability,
3. the first candidate of the kernel that runs on the GPU.

Under ``TRITON_INTERPRET=1`` the configuration is the one that the kernel names for the interpreter.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

# Shared memory of a block in bytes, by the compute capability from which it holds; 8.6, 8.9 and 12.0 have less than the
# data-centre parts beside them.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 110: 232448, 120: 101376}


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: tile sizes, Triton's own two options, and which GPUs have the registers for it."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    min_capability: int = 80
    below_capability: int = 1000

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        # Fusing is what the kernels are written for, and newer versions ask that it be said.
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def to_dict(self) -> dict[str, Any]:
        return {"blocks": dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Config:
        return cls(dict(entry["blocks"]), int(entry["num_warps"]), int(entry["num_stages"]))


@dataclass(frozen=True, eq=False)  # one object a kernel: compared, and hashed, by identity
class Tunable:
    """A kernel whose tile sizes may be chosen.

    Parameters
    ----------
    name : the key in the tables
    shape_classes : every class that the launcher asks for
    candidates : the configurations worth trying for a class
        The first is the default; the last runs on any GPU, so it needs at most 99 KiB of shared memory.
    interpreted : the configuration for the interpreter, with tiles small enough that tests cross their borders
    problem : makes a typical call for a class on a device, with tensors ready; what ``pruneops tune`` times
    """

    name: str
    shape_classes: tuple[str, ...]
    candidates: Callable[[str], tuple[Config, ...]]
    interpreted: Config
    problem: Callable[[str, torch.device], Callable[[], object]]

    def candidates_for(self, shape_class: str, capability: int) -> list[Config]:
        """The candidates that a GPU of this capability can run."""
        configs = self.candidates(shape_class)
        return [c for c in configs if c is configs[-1] or c.min_capability <= capability < c.below_capability]


_forced: dict[str, Config] = {}


@contextmanager
def use(tunable: Tunable, config: Config) -> Iterator[None]:
    """Launches one kernel with this configuration until the context ends."""
    previous = _forced.get(tunable.name)
    _forced[tunable.name] = config
    try:
        yield
    finally:
        if previous is None:
            del _forced[tunable.name]
        else:
            _forced[tunable.name] = previous


def configuration(tunable: Tunable, shape_class: str, device: torch.device) -> Config:
    """The configuration that ``tunable`` runs with for this class of shapes on this device."""
    forced = _forced.get(tunable.name)
    if forced is not None:
        return forced
    if triton.knobs.runtime.interpret:
        return tunable.interpreted
    return _looked_up(tunable, shape_class, device.index if device.type == "cuda" else None)


@functools.cache
def _looked_up(tunable: Tunable, shape_class: str, index: int | None) -> Config:
    capability, model = device_class(index)
    for table, key in ((user_table(), model), (shipped_table(), f"sm{capability}")):
        entry = table.get(key, {}).get(tunable.name, {}).get(shape_class)
        if entry is not None:
            return Config.from_dict(entry)
    configs = tunable.candidates_for(shape_class, capability)
    # A default that assumes the memory of a data-centre part would not launch on a smaller one.
    return configs[-1] if SHARED_MEMORY.get(capability, 0) < SHARED_MEMORY[80] else configs[0]


def device_class(index: int | None) -> tuple[int, str]:
    """Compute capability (90 for 9.0) and name of a GPU, or of what Triton compiles for if no index is given."""
    if index is None:
        target = triton.runtime.driver.active.get_current_target()
        return (target.arch if isinstance(target.arch, int) else 0), str(target.arch)
    if torch.version.hip is not None:
        return 0, torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_name(index)


def user_table_path() -> Path:
    """Where ``pruneops tune`` keeps what it measured: ``PRUNEOPS_CACHE_DIR``, or the user's cache folder."""
    folder = os.environ.get("PRUNEOPS_CACHE_DIR")
    if folder:
        return Path(folder) / "triton.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pruneops" / "triton.json"


def read_table(path: Path) -> dict[str, Any]:
    """A table ``{GPU: {kernel: {shape class: configuration}}}``; empty if there is no such file.

    Raises
    ------
    ValueError
        If the file is not such a table.
    """
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for kernels in table.values():
            for classes in kernels.values():
                for entry in classes.values():
                    Config.from_dict(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of configurations ({error!r}); remove it or run pruneops tune"
        ) from error
    return table


@functools.cache
def user_table() -> dict[str, Any]:
    return read_table(user_table_path())


def forget_tables() -> None:
    """Makes the next lookups read the tables again."""
    user_table.cache_clear()
    _looked_up.cache_clear()


@functools.cache
def shipped_table() -> dict[str, Any]:
    return read_table(Path(__file__).with_name("tuned.json"))
