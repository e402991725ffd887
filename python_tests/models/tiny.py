"""Tiny random models of the real classes, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB, IMAGE, PAD, EOS = 120, 119, 0, 118
IMAGE_TOKENS = 16
LAYERS = 6

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.15,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 16,
    "initializer_range": 0.15,
}
LANGUAGE_MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def language_model(family: str = "llama", **changes: Any) -> Any:
    config_class, model_class = LANGUAGE_MODELS[family]
    torch.manual_seed(0)
    extra = {"sliding_window": None} if family == "mistral" else {}
    model = model_class(config_class(**{**TEXT, **extra, **changes})).eval()
    model.generation_config.eos_token_id = None
    return model


def llava(cls: type = LlavaForConditionalGeneration, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        pad_token_id=PAD,
    )
    model = cls(config, **kwargs).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def llava_next(cls: type = LlavaNextForConditionalGeneration, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = LlavaNextConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        pad_token_id=PAD,
    )
    model = cls(config, **kwargs).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def row(text_before: int, images: int, text_after: int, seed: int = 0, between: int = 2) -> list[int]:
    """Token ids: text, images with `between` text tokens between them, text."""
    generator = torch.Generator().manual_seed(seed)

    def text(n: int) -> list[int]:
        return torch.randint(2, 100, (n,), generator=generator).tolist()

    ids = text(text_before)
    for image in range(images):
        ids += (text(between) if image else []) + [IMAGE] * IMAGE_TOKENS
    return ids + text(text_after)


def pad(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, padded left or right."""
    longest = max(len(ids) for ids in rows)
    ids, mask = [], []
    for tokens in rows:
        fill = longest - len(tokens)
        ids.append([PAD] * fill + tokens if side == "left" else tokens + [PAD] * fill)
        mask.append([0] * fill + [1] * len(tokens) if side == "left" else [1] * len(tokens) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pixels(images: int, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def llava_batch(rows: list[list[int]], side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """A padded batch with as many random images as the rows have placeholders for."""
    count = sum(ids.count(IMAGE) for ids in rows) // IMAGE_TOKENS
    batch = pad(rows, side)
    if count:
        batch["pixel_values"] = pixels(count, seed)
    return batch
