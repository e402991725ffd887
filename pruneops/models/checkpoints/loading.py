"""Loads a checkpoint in the layout of a method's authors by what Hugging Face's ``from_pretrained`` offers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.utils import cached_file

from pruneops.models.checkpoints import llava
from pruneops.models.checkpoints.convert import find_folder, read_config, read_original
from pruneops.models.checkpoints.layouts import layout_of

#: Arguments of `from_pretrained` that say where on the hub a checkpoint is.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def loading_arguments(
    class_name: str, checkpoint: Any, vision_tower: str | os.PathLike | None, kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Arguments of ``from_pretrained`` that stand for the name of a checkpoint.

    Parameters
    ----------
    class_name : str
        The drop-in class that loads.
    checkpoint : str or path
        What it was asked to load.
    vision_tower : str or path, optional
        The CLIP checkpoint, where the weights of the vision tower are not in the checkpoint.
    kwargs : mapping
        The other arguments.

    Returns
    -------
    dict or None
        ``config``, ``state_dict`` and, if there is one, ``generation_config``; None if the checkpoint is in Hugging
        Face's own layout.

    Raises
    ------
    ValueError
        If the checkpoint is not complete, or of another class.
    """
    given = kwargs.get("config") is not None or kwargs.get("state_dict") is not None
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    subfolder = {"subfolder": kwargs["subfolder"]} if kwargs.get("subfolder") else {}
    known = not given and checkpoint is not None
    config = None
    if known:  # without one, Hugging Face's loader has the better message, or an adapter's folder
        options = {**hub, **subfolder, "_raise_exceptions_for_missing_entries": False}
        config = cached_file(checkpoint, "config.json", **options)
    if config is None or layout_of(read_config(Path(config).parent)) is None:
        if vision_tower is not None:
            raise ValueError(
                f"vision_tower: got {str(vision_tower)!r}, expected None: the checkpoint is in Hugging Face's layout, "
                "where the vision tower is part of it"
            )
        return None
    folder = find_folder(checkpoint, **hub) / kwargs.get("subfolder", "")
    source = read_original(folder, vision_tower)
    if source.class_name != class_name:
        raise ValueError(f"checkpoint: {checkpoint} is of the class {source.class_name}, got loaded as {class_name}")
    for note in source.notes:
        warnings.warn(note, stacklevel=4)
    arguments: dict[str, Any] = {
        "config": source.config,
        "state_dict": {name: tensor.read() for name, tensor in source.tensors.items()},
    }
    if kwargs.get("generation_config") is None and (folder / "generation_config.json").is_file():
        arguments["generation_config"] = GenerationConfig.from_pretrained(folder)
    return arguments


def load_processor(checkpoint: str | os.PathLike, vision_tower: str | os.PathLike | None = None, **hub: Any) -> Any:
    """The processor of a checkpoint in any layout; one of a method's authors gets the image token that it lacks.

    Raises
    ------
    ValueError
        If such a checkpoint has no tokenizer that can be loaded here.
    """
    from transformers import AutoProcessor

    config = cached_file(checkpoint, "config.json", _raise_exceptions_for_missing_entries=False, **hub)
    if config is None or layout_of(read_config(Path(config).parent)) is None:
        return AutoProcessor.from_pretrained(checkpoint, **hub)
    source = read_original(find_folder(checkpoint, **hub), vision_tower)
    if source.tokenizer is None:
        raise ValueError(f"checkpoint: {checkpoint} has no processor: {'; '.join(source.notes)}")
    return source.processor()


def accept_published_names(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` take the names under which ``save_pretrained`` writes the weights.

    They are not those of the model in memory. ``from_pretrained`` knows, but the Trainer loads the weights of a
    checkpoint that it resumes from as they are, and would go on with the weights that the model began with.
    """
    model.register_load_state_dict_pre_hook(_rename)


def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    names = set(module.state_dict())
    own = {llava.respelled(name): name for name in names}
    for name in list(state_dict):
        inner = name.removeprefix(prefix)
        ours = own.get(llava.respelled(inner))
        if name.startswith(prefix) and inner not in names and ours is not None:
            state_dict[prefix + ours] = state_dict.pop(name)
