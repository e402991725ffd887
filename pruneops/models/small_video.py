"""A small, untrained LLaVA-NeXT-Video, built on the spot and stored like a public checkpoint: see `small`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneops.models.small import (
    IMAGE,
    PATCH_SIZE,
    UNTRAINED_KEY,
    small_generation_config,
    small_llava_config,
    small_tokenizer,
)

if TYPE_CHECKING:
    from transformers import LlavaNextVideoConfig, PreTrainedTokenizerFast

VIDEO = "<video>"
#: The model's own pooling: 2 x 2 patches of a frame become a token.
POOLING = 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<{{ part['type'] }}>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %} "
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def small_video_tokenizer() -> PreTrainedTokenizerFast:
    """The small LLaVA's tokenizer with a video token (261 tokens in all)."""
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, VIDEO]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def small_video_config(tokens_per_frame: int = 144, **config_options: int) -> LlavaNextVideoConfig:
    """The small video model's configuration: the small LLaVA's tower and text stack, frames pooled 2 x 2.

    ``tokens_per_frame`` must be a square number; ``config_options`` are sizes as for `small_llava_config`.
    """
    from transformers import LlavaNextVideoConfig

    tokenizer = small_video_tokenizer()
    # As many patches as an image of the small LLaVA with POOLING ** 2 times the tokens has.
    base = small_llava_config(POOLING**2 * tokens_per_frame, **config_options)
    base.text_config.vocab_size = len(tokenizer)
    side = base.vision_config.image_size
    config = LlavaNextVideoConfig(
        vision_config=base.vision_config,
        text_config=base.text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        spatial_pool_stride=POOLING,
        tie_word_embeddings=False,
    )
    setattr(config, UNTRAINED_KEY, True)
    return config


def build_small_video(folder: str | Path, tokens_per_frame: int = 144, seed: int = 0, **config_options: int) -> Path:
    """Writes the small, untrained LLaVA-NeXT-Video to ``folder`` in the layout of a public checkpoint.

    Parameters
    ----------
    folder
        Created if needed. Afterwards ``LlavaNextVideoForConditionalGeneration.from_pretrained(folder)`` works as for
        any checkpoint, and so does its processor where torchvision is installed.
    tokens_per_frame
        Visual tokens of a frame; a square number such as 36 or 144.
    seed
        Seed of the weights. Equal seeds give equal weights; torch's global random state is left as it was.
    config_options
        Sizes, passed to `small_llava_config`.

    Returns
    -------
    The folder as a ``Path``. Its weights are about 90 MB in float32 at the default sizes.
    """
    import torch
    from transformers import LlavaNextVideoForConditionalGeneration

    config = small_video_config(tokens_per_frame, **config_options)
    tokenizer = small_video_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextVideoForConditionalGeneration(config)
    model.generation_config = small_generation_config(tokenizer)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    for name, content in _processor_files(config).items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _processor_files(config: LlavaNextVideoConfig) -> dict[str, dict[str, Any]]:
    """The files of the processor by name; written by hand because its class cannot be made without torchvision."""
    from transformers import CLIPImageProcessorPil

    side = config.vision_config.image_size
    pixels = {
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIPImageProcessorPil.image_mean,
        "image_std": CLIPImageProcessorPil.image_std,
        "do_convert_rgb": True,
    }
    images = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": config.image_grid_pinpoints}
    return {
        "preprocessor_config.json": {**images, **pixels},
        "video_preprocessor_config.json": {"video_processor_type": "LlavaNextVideoVideoProcessor", **pixels},
        "processor_config.json": {
            "processor_class": "LlavaNextVideoProcessor",
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": IMAGE,
            "video_token": VIDEO,
        },
    }
