"""LLaVA's original checkpoints and those of Hugging Face: what a tensor and a config key of one is in the other.

Tensors go by the names under which Hugging Face checkpoints are published (``language_model.model.layers.0...``,
``vision_tower.vision_model...``, ``multi_modal_projector.linear_1...``, ``image_newline``), which every version of
transformers and other tools load; `published_name` brings other spellings to these.
"""

from __future__ import annotations

import ast
import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

from pruneops.methods.base import PruningMethod
from pruneops.models.checkpoints.tensors import StoredTensor

#: Key of the Hugging Face config that keeps the original one, so that the way back gives it unchanged.
SOURCE_CONFIG = "source_config"

_TOWER = "vision_tower.vision_model."
#: Original prefix, published prefix; the first that fits applies.
_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", _TOWER),
    ("model.vision_tower.vision_tower.", _TOWER),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
#: Spellings of Hugging Face's names in memory and in files of newer versions, and the published ones.
_SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", _TOWER),
    ("model.vision_tower.", _TOWER),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    (_TOWER, _TOWER),
    ("vision_tower.", _TOWER),
)
#: Buffers that old versions of transformers stored and new ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
NEWLINE = "image_newline"

_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "head_dim",
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FEATURES = {"patch": "default", "cls_patch": "full"}
_FEATURES_BACK = {ours: theirs for theirs, ours in _FEATURES.items()}
_SQUARE = ("pad", "square", None)
#: The tower of every published LLaVA 1.5 and 1.6, and its sizes: hidden size, image size, patch size.
_KNOWN_TOWER, _KNOWN_SIZES = "openai/clip-vit-large-patch14-336", (1024, 336, 14)
_CLIP_HEAD_DIM = 64


def is_computed(name: str) -> bool:
    """Whether a stored tensor is a buffer that the model computes itself."""
    return _COMPUTED.search(name) is not None


def _renamed(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def published_name(original: str, extra: Sequence[tuple[str, str]] = ()) -> str:
    """Hugging Face's name of an original tensor."""
    return _renamed(original, (*extra, *_PREFIXES))


def original_name(published: str, extra: Sequence[tuple[str, str]] = ()) -> str:
    """The inverse of `published_name`."""
    return _renamed(published, [(new, old) for old, new in (*extra, *_PREFIXES)])


def respelled(name: str) -> str:
    """The published spelling of any of Hugging Face's names."""
    return _renamed(name, _SPELLINGS)


def is_anyres(config: Mapping[str, Any]) -> bool:
    """Whether an original config is of LLaVA-NeXT, which cuts images into tiles."""
    return config.get("image_aspect_ratio") == "anyres"


def check_original(config: Mapping[str, Any]) -> None:
    """Refuse what Hugging Face's classes cannot express.

    Raises
    ------
    ValueError
        Names the key, what it is and what it may be.
    """
    for key in _REQUIRED:
        if not isinstance(config.get(key), int):
            raise ValueError(f"config.json: {key} is {config.get(key)!r}, expected a whole number")
    allowed: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": (*_FEATURES, None),
        "image_aspect_ratio": (*_SQUARE, "anyres"),
        "mm_patch_merge_type": ("spatial_unpad",) if is_anyres(config) else ("flat", None, "spatial_unpad"),
        "mm_resampler_type": (None,),
    }
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise ValueError(
                f"config.json: {key} is {config.get(key)!r}, expected one of {list(values)}: transformers has no "
                "other LLaVA"
            )
    for key in ("mm_hidden_size", "mm_vision_select_layer"):
        if not isinstance(config.get(key), int):
            raise ValueError(f"config.json: {key} is {config.get(key)!r}, expected a whole number")


def hf_config(
    original: Mapping[str, Any],
    method: PruningMethod,
    vision_config: CLIPVisionConfig,
    image_token_id: int,
    vocab_size: int,
) -> LlavaConfig | LlavaNextConfig:
    """The Hugging Face config of an original checkpoint, with the method under ``pruning``.

    Parameters
    ----------
    image_token_id : int
        Token that stands for a visual token.
    vocab_size : int
        Rows of the embedding, those added for the image token included.
    """
    text = {key: original[key] for key in _TEXT_KEYS if original.get(key) is not None}
    rope = dict(original.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    rope["rope_theta"] = original.get("rope_theta", 10000.0)
    text_config = LlamaConfig(**{**text, "vocab_size": vocab_size, "rope_parameters": rope})
    if vision_config.hidden_size != original["mm_hidden_size"]:
        raise ValueError(
            f"vision tower: its hidden_size is {vision_config.hidden_size}, expected mm_hidden_size="
            f"{original['mm_hidden_size']} of config.json"
        )
    settings: dict[str, Any] = {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_index": image_token_id,
        "image_seq_length": (vision_config.image_size // vision_config.patch_size) ** 2,
        "vision_feature_layer": original["mm_vision_select_layer"],
        "vision_feature_select_strategy": _FEATURES[original.get("mm_vision_select_feature") or "patch"],
        "tie_word_embeddings": bool(original.get("tie_word_embeddings", False)),
    }
    if is_anyres(original):
        config = LlavaNextConfig(image_grid_pinpoints=_pinpoints(original, vision_config.image_size), **settings)
    else:
        config = LlavaConfig(**settings)
    config.architectures = [f"Llava{'Next' if is_anyres(original) else ''}ForConditionalGeneration"]
    config.pruning = method.to_dict()
    dtype = original.get("torch_dtype") or original.get("dtype")
    if dtype is not None:
        config.dtype = dtype
    setattr(config, SOURCE_CONFIG, copy.deepcopy(dict(original)))
    return config


def _pinpoints(original: Mapping[str, Any], tile: int) -> list[list[int]]:
    """Sizes of tiled images as (height, width); LLaVA writes (width, height), sometimes as a string."""
    sizes = original.get("image_grid_pinpoints")
    if sizes is None:
        if original.get("max_num_sub_images", 4) != 4:
            raise ValueError(
                f"config.json: max_num_sub_images is {original['max_num_sub_images']} and image_grid_pinpoints is "
                "missing, expected the pinpoints, or 4 sub-images, whose five grids are known"
            )
        sizes = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
        sizes = [[tile * width, tile * height] for width, height in sizes]
    try:
        sizes = ast.literal_eval(sizes) if isinstance(sizes, str) else sizes
        return [[int(height), int(width)] for width, height in sizes]
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(
            f"config.json: image_grid_pinpoints is {sizes!r}, expected a list of (width, height) in pixels"
        ) from None


def original_config(config: Any, aspect_ratio: str, vision_tower: str | None) -> dict[str, Any]:
    """The original config of a Hugging Face model, without what a method adds.

    If the model was converted from an original checkpoint, that one's config; otherwise one is made.

    Parameters
    ----------
    config : LlavaConfig or LlavaNextConfig
    aspect_ratio : str
        ``"pad"`` or ``"square"``, how the image processor makes images square; LLaVA-NeXT does not look at it.
    vision_tower : str, optional
        Name or folder of the tower, which original checkpoints refer to. None: known for CLIP-L/14 of 336 pixels.
    """
    source = getattr(config, SOURCE_CONFIG, None)
    if source is not None:
        result = copy.deepcopy(dict(source))
        if vision_tower is not None:
            result["mm_vision_tower"] = vision_tower
        return result
    text, vision = config.text_config, config.vision_config
    if text.model_type != "llama":
        raise ValueError(f"text_config: model_type is {text.model_type!r}, expected 'llama', all that this layout has")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer: got {config.vision_feature_layer}, expected one layer, all that this layout has"
        )
    if vision_tower is None:
        if (vision.hidden_size, vision.image_size, vision.patch_size) != _KNOWN_SIZES:
            raise ValueError(
                "vision_tower: got none, expected the name or folder of the vision tower (--vision-tower), which the "
                "original layout refers to and which cannot be told from the weights"
            )
        vision_tower = _KNOWN_TOWER
    result = {key: value for key in _TEXT_KEYS if (value := getattr(text, key, None)) is not None}
    result.pop("head_dim", None)
    rope = dict(text.rope_parameters or {})
    result["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    result["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    anyres = config.model_type == "llava_next"
    result |= {
        "mm_hidden_size": vision.hidden_size,
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": _FEATURES_BACK[config.vision_feature_select_strategy],
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": vision_tower,
        "use_mm_proj": True,
        "image_aspect_ratio": "anyres" if anyres else aspect_ratio,
        "tokenizer_model_max_length": text.max_position_embeddings,
        "tokenizer_padding_side": "right",
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    if anyres:
        result["image_grid_pinpoints"] = [[width, height] for height, width in config.image_grid_pinpoints]
    dtype = getattr(config, "dtype", None)
    if dtype is not None:
        result["torch_dtype"] = str(dtype).removeprefix("torch.")
    return result


def tower_config(tensors: Mapping[str, StoredTensor], folder: Path | None) -> CLIPVisionConfig:
    """Config of the vision tower: its folder's, or what the shapes of its tensors say.

    Parameters
    ----------
    tensors : mapping of str to StoredTensor
        Those of the checkpoint, by published names.
    folder : Path, optional
        A CLIP checkpoint. None: hidden, image and patch size and depth are read off the tensors, and every head
        has 64 channels, as in all CLIP models that were published.
    """
    if folder is not None:
        return CLIPVisionConfig.from_pretrained(folder)
    shapes = {name.removeprefix(_TOWER): t.shape for name, t in tensors.items() if name.startswith(_TOWER)}
    try:
        hidden, channels, patch, _ = shapes["embeddings.patch_embedding.weight"]
        positions, _ = shapes["embeddings.position_embedding.weight"]
        intermediate, _ = shapes["encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise ValueError(
            "vision tower: its tensors in the checkpoint are not those of CLIP, expected a CLIP tower; give its "
            "checkpoint as vision_tower (--vision-tower)"
        ) from None
    side = math.isqrt(positions - 1)
    if side * side != positions - 1 or hidden % _CLIP_HEAD_DIM:
        raise ValueError(
            f"vision tower: {positions} positions of {hidden} channels do not say its image size and heads; give its "
            "checkpoint as vision_tower (--vision-tower)"
        )
    layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers."))
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // _CLIP_HEAD_DIM,
        num_channels=channels,
        image_size=side * patch,
        patch_size=patch,
        projection_dim=768 if hidden == _KNOWN_SIZES[0] else hidden,
    )


def has_tower(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the vision tower's weights are among tensors of published names."""
    return any(name.startswith(_TOWER) for name in tensors)


def tower_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The vision tower of a CLIP checkpoint (with or without its text half), by published names."""
    marked = any(name.startswith("vision_model.") for name in tensors)
    picked = {
        _TOWER + name.removeprefix("vision_model."): tensor
        for name, tensor in tensors.items()
        if not is_computed(name) and (name.startswith("vision_model.") or not marked)
    }
    return picked
