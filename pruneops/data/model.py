"""The processor and the configuration of a small LLaVA for the data set's pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pruneops.data.render import check_patch_size
from pruneops.data.scene import GRID
from pruneops.data.tokenizer import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, scene_tokenizer

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor


def scene_processor(patch_size: int = 8, grid: int = GRID) -> LlavaProcessor:
    """CLIP preprocessing with PIL and the data set's tokenizer; ``save_pretrained`` and ``AutoProcessor`` as usual.

    Parameters
    ----------
    patch_size : int
        Pixels along a side of a patch, 8 to 32.
    grid : int
        Patches along a side: 24 for pictures (576 visual tokens), 12 for frames of clips (144).

    Raises
    ------
    TypeError, ValueError
        If one is not as above.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = check_patch_size(patch_size) * check_grid(grid)
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=scene_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def scene_llava_config(
    patch_size: int = 8,
    grid: int = GRID,
    *,
    hidden_size: int = 160,
    num_hidden_layers: int = 8,
    num_attention_heads: int = 5,
    num_key_value_heads: int = 5,
    intermediate_size: int = 432,
    vision_hidden_size: int = 128,
    vision_layers: int = 4,
    **options: Any,
) -> LlavaConfig:
    """A CLIP tower and a Llama text stack: 3.5 M parameters at the default sizes.

    The projector reads the tower's last layer but one, as in LLaVA 1.5, so ``vision_layers - 1`` of them are used.

    Parameters
    ----------
    patch_size, grid : int
        As for `scene_processor`; ``grid ** 2`` visual tokens.
    hidden_size, ... : int
        Of the text stack.
    vision_hidden_size, vision_layers : int
        Of the tower; heads have a width of 32.
    **options
        Further entries of the configuration.

    Raises
    ------
    TypeError, ValueError
        If a size is not a whole number, too small, or no multiple of its heads.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    _check_sizes(
        hidden_size=(hidden_size, 1),
        num_hidden_layers=(num_hidden_layers, 1),
        num_attention_heads=(num_attention_heads, 1),
        num_key_value_heads=(num_key_value_heads, 1),
        intermediate_size=(intermediate_size, 1),
        vision_hidden_size=(vision_hidden_size, 32),
        vision_layers=(vision_layers, 2),
    )
    # Rotary positions turn pairs of a head's channels.
    for name, size, unit in (
        ("hidden_size", hidden_size, 2 * num_attention_heads),
        ("num_attention_heads", num_attention_heads, num_key_value_heads),
        ("vision_hidden_size", vision_hidden_size, 32),
    ):
        if size % unit:
            raise ValueError(f"{name} must be a multiple of {unit}, got {size}")
    tokenizer = scene_tokenizer()
    bos, eos, pad, image = tokenizer.convert_tokens_to_ids([BOS, EOS, PAD, IMAGE])
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=4 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_hidden_size // 32,
        image_size=check_patch_size(patch_size) * check_grid(grid),
        patch_size=patch_size,
        projection_dim=vision_hidden_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=4096,
        # Of 16 pairs of channels, 10000 would leave few that can tell words apart over the length of a picture.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        # The usual 0.02 is for wide models; in this one attention would stay flat for long.
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image,
        image_seq_length=grid * grid,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        # Of the projector: the tower's features are large beside words.
        initializer_range=0.02,
        **options,
    )


def check_grid(grid: int) -> int:
    """Returns it; TypeError or ValueError if it is not a whole number of at least 1."""
    _check_sizes(grid=(grid, 1))
    return grid


def _check_sizes(**sizes: tuple[int, int]) -> None:
    for name, (size, least) in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
