"""The models that are evaluated: loaded from folders, with and without what a method has put into them."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneops.methods import PMoD, PruningMethod
from pruneops.pruning import detach

if TYPE_CHECKING:
    import os


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes
    ----------
    name : str
        That of its folder.
    fingerprint : str
        Of its weights and configuration.
    model : LlavaForConditionalGeneration
        As it was trained: with the modules of `trained_with`, but not pruned.
    plain : LlavaForConditionalGeneration
        Without them; the same object where there are none. Both share their vision tower.
    trained_with : PruningMethod or None
    processor : LlavaProcessor
    """

    name: str
    fingerprint: str
    model: Any
    plain: Any
    trained_with: PruningMethod | None
    processor: Any

    @property
    def depth(self) -> int:
        return self.model.config.text_config.num_hidden_layers

    @property
    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size

    @property
    def num_visual_tokens(self) -> int:
        return self.model.config.image_seq_length

    @property
    def has_dense_form(self) -> bool:
        """Whether it is expected to answer well unpruned: weights of p-MoD's routers are part of what was trained."""
        return not isinstance(self.trained_with, PMoD)


def load_candidate(folder: str | os.PathLike, device: str = "cpu") -> Candidate:
    """Load a LLaVA that answers questions of `pruneops.data`, dense or trained with a method.

    Raises
    ------
    ValueError
        If the folder is missing or holds no such model, if it was made for other pictures or another tokenizer, or if
        the device is none that torch can use.
    """
    import torch
    from transformers import AutoConfig, AutoProcessor

    from pruneops.models import LlavaForConditionalGeneration

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model: got {folder}, expected a folder with a LLaVA checkpoint")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected a torch device such as cpu or cuda") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, expected one that torch can use here: no CUDA device was found")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: {folder} is no checkpoint that transformers can load: {error}") from None
    if config.model_type != "llava":
        raise ValueError(f"model: {folder} is of the type {config.model_type!r}, expected a llava")
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: {folder} has no processor: {error}") from None
    _check_pictures(folder, config, processor)
    try:
        model = LlavaForConditionalGeneration.from_pretrained(folder)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model: {folder} could not be loaded: {error}") from None
    model = model.to(target).eval()
    run, plain = model.pruning_run, model
    if run is not None:
        tower = model.model.vision_tower
        plain = detach(copy.deepcopy(model, {id(tower): tower}))
        run.remove()  # its modules stay
    trained_with = None if run is None else run.given_method
    return Candidate(folder.resolve().name, _fingerprint(folder), model, plain, trained_with, processor)


def _check_pictures(folder: Path, config: Any, processor: Any) -> None:
    """Pictures, tokens and words have to be those of the data set."""
    from pruneops.data import GRID, scene_tokenizer

    vision = config.vision_config
    if vision.image_size != GRID * vision.patch_size:
        raise ValueError(
            f"model: {folder} sees pictures of {vision.image_size} pixels in patches of {vision.patch_size}, expected "
            f"{GRID} patches along a side, as the pictures of pruneops.data have"
        )
    if processor.tokenizer.get_vocab() != scene_tokenizer().get_vocab() or not processor.chat_template:
        raise ValueError(
            f"model: {folder} has another tokenizer or no chat template, expected the processor that "
            "pruneops.data.scene_processor makes, as the questions are of its words"
        )


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]
