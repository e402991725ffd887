"""Tiny random models of the real classes, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

VOCAB, IMAGE, PAD, EOS, VIDEO = 120, 119, 0, 118, 117
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


def rows_alone(batch: dict[str, Tensor], rows: list[list[int]]) -> Iterator[dict[str, Tensor]]:
    """The inputs of each row of a `llava_batch` by itself, without padding, with its own images."""
    used = 0
    for ids in rows:
        images = ids.count(IMAGE) // IMAGE_TOKENS
        inputs = {"input_ids": torch.tensor([ids])}
        if images:
            inputs["pixel_values"] = batch["pixel_values"][used : used + images]
        used += images
        yield inputs


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """The new tokens of each row."""
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


# -- models of videos --------------------------------------------------------------------------------------------------


def _video_model(cls: type, config: Any, kwargs: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = cls(config, **kwargs).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def llava_onevision(cls: type = LlavaOnevisionForConditionalGeneration, **kwargs: Any) -> Any:
    vision = {key: value for key, value in VISION.items() if key not in ("projection_dim", "initializer_range")}
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config=SiglipVisionConfig(**{**vision, "image_size": 28, "vision_use_head": False}),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 56], [56, 28]],
        pad_token_id=PAD,
    )
    return _video_model(cls, config, kwargs)


def llava_next_video(cls: type = LlavaNextVideoForConditionalGeneration, **kwargs: Any) -> Any:
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**{**VISION, "image_size": 32}),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        pad_token_id=PAD,
    )
    return _video_model(cls, config, kwargs)


def video_llava(cls: type = VideoLlavaForConditionalGeneration, **kwargs: Any) -> Any:
    config = VideoLlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        pad_token_id=PAD,
    )
    return _video_model(cls, config, kwargs)


def pllava(cls: type | None = None, **kwargs: Any) -> Any:
    from pruneops.models import PllavaConfig, PllavaForConditionalGeneration

    config = PllavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**{**VISION, "image_size": 32}),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        pooling_shape=(4, 4, 4),
        frame_shape=(8, 8),
        pad_token_id=PAD,
    )
    return _video_model(cls or PllavaForConditionalGeneration, config, kwargs)


@dataclass(frozen=True)
class VideoFamily:
    """How one kind of model takes images and videos.

    ``image_size`` is a frame's side in pixels, ``patches`` the tokens of a frame of a video, ``newlines`` the text
    tokens behind it, ``image_tokens`` those of an image, wide and high ones in turn.
    """

    build: Callable[..., Any]
    image_size: int
    patches: int
    newlines: int
    image_tokens: tuple[int, int]

    @property
    def tiled(self) -> bool:
        return self.build in (llava_onevision, llava_next_video)

    @property
    def video_placeholder(self) -> int:
        return IMAGE if self.build is pllava else VIDEO

    def row(self, parts: Sequence[int | str], frames: int, seed: int = 0, first_image: int = 0) -> list[int]:
        """Token ids of a row of parts: so many text tokens, an ``"image"``, or a ``"video"``."""
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        for part in parts:
            if part == "image":
                ids += [IMAGE] * self.image_tokens[first_image % 2]
                first_image += 1
            elif part == "video":
                ids += [self.video_placeholder] * (frames * self.patches + self.newlines)
            else:
                ids += torch.randint(2, 100, (part,), generator=generator).tolist()
        return ids

    def batch(self, rows: Sequence[Sequence[int | str]], frames: int = 3, side: str = "left") -> dict[str, Tensor]:
        """A padded batch of such rows, with random images and videos of `frames` frames."""
        ids, images = [], 0
        for b, parts in enumerate(rows):
            ids.append(self.row(parts, frames, seed=b, first_image=images))
            images += parts.count("image")
        batch = pad(ids, side)
        videos = sum(parts.count("video") for parts in rows)
        generator = torch.Generator().manual_seed(7)
        size = (3, self.image_size, self.image_size)
        if images:
            tiles = (3,) if self.tiled else ()
            name = "pixel_values_images" if self.build is video_llava else "pixel_values"
            batch[name] = torch.randn(images, *tiles, *size, generator=generator)
            if self.tiled:
                sizes = [[self.image_size, 2 * self.image_size - 3], [2 * self.image_size, self.image_size - 4]]
                batch["image_sizes"] = torch.tensor([sizes[i % 2] for i in range(images)])
        if videos:
            # Frames alike but for noise, and a cut: static positions, and more than one segment.
            scenes = torch.randn(videos, 2, *size, generator=generator)
            noise = torch.randn(videos, frames, *size, generator=generator)
            of_frame = torch.arange(frames) * 2 // frames
            batch["pixel_values_videos"] = scenes[:, of_frame] + 0.3 * noise
        return batch

    def single(self, batch: dict[str, Tensor], rows: Sequence[Sequence[int | str]], b: int) -> dict[str, Tensor]:
        """Row `b` of a `batch` of `rows`: alone and unpadded."""
        inputs = {"input_ids": batch["input_ids"][b : b + 1, batch["attention_mask"][b].bool()]}
        for key, value in batch.items():
            kind = "video" if key == "pixel_values_videos" else "image"
            if key not in ("input_ids", "attention_mask") and rows[b].count(kind):
                first = sum(parts.count(kind) for parts in rows[:b])
                inputs[key] = value[first : first + rows[b].count(kind)]
        return inputs


VIDEO_FAMILIES = {
    "llava_onevision": VideoFamily(llava_onevision, 28, 16, 1, (154, 161)),
    "llava_next_video": VideoFamily(llava_next_video, 32, 16, 0, (200, 208)),
    "video_llava": VideoFamily(video_llava, 16, 17, 0, (16, 16)),
    "pllava": VideoFamily(pllava, 32, 16, 0, (64, 64)),
}
