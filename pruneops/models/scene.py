"""The small LLaVA that ships with the package, trained on the pictures that `pruneops.data` renders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRAINING_KEY = "pruneops_training"
"""Name of the config entry that says what a checkpoint was trained on, and what its answers are worth.

A dict with ``note`` (str, what to tell a reader of its answers), and where it was measured ``questions`` (int) and
``accuracy`` (dict of str to float: the share that is answered right, by the name of a method, or "dense").
"""

_ASSETS = Path(__file__).resolve().parents[1] / "assets"


def scene_llava_folder(method: str | None = None) -> Path:
    """The folder of the shipped model: a checkpoint for every ``from_pretrained``, with its model card (README.md).

    Parameters
    ----------
    method : str, optional
        None: the dense model. Otherwise the one that was fine-tuned with a method, by its name ("pmod" and so on);
        load that one with `pruneops.models.LlavaForConditionalGeneration`.

    Raises
    ------
    FileNotFoundError
        If its weights are not there.
    """
    folder = _ASSETS / ("scene_llava" if method is None else f"scene_llava_{method}")
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"method: got {method!r}, expected one whose weights ship with pruneops: there are none in {folder}; "
            "examples/train_llava.py trains them, examples/ship_llava.py puts them there"
        )
    return folder


def shipped_methods() -> list[str | None]:
    """What `scene_llava_folder` can be asked for here: None for the dense model, then names of methods."""
    names = sorted(path.parent.name for path in _ASSETS.glob("scene_llava*/model.safetensors"))
    return [name.removeprefix("scene_llava").removeprefix("_") or None for name in names]


def training_of(config: Any) -> dict[str, Any]:
    """The entry `TRAINING_KEY` of a loaded config; empty if it has none."""
    return dict(getattr(config, TRAINING_KEY, None) or {})
