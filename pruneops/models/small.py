"""A small, untrained LLaVA that is built on the spot and stored like a public checkpoint.

It exists so that every path of the library (processor, vision tower, projector, text stack, stock
``generate()``) can be tried without downloading anything. Its weights are random: **its words mean nothing**;
its sizes, speeds, caches and kept patches are real.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

UNTRAINED_KEY = "pruneops_untrained"
"""Name of the config entry that marks a checkpoint written by :func:`build_small_llava`."""

PATCH_SIZE = 14
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %} "
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, plus begin, end, padding and image tokens (260 in all).

    Pads on the left, as decoder-only batches need. Lossless for any UTF-8 text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = [BOS, EOS, PAD, IMAGE]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(specials + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def small_processor(num_visual_tokens: int = 576) -> LlavaProcessor:
    """The LLaVA-1.5 processor at the small model's image size: CLIP preprocessing with PIL, byte-level text.

    ``num_visual_tokens`` must be a square number (576 = 24 x 24 as LLaVA-1.5, 144 = 12 x 12).
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image_size = _grid_side(num_visual_tokens) * PATCH_SIZE
    images = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=small_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def small_llava_config(
    num_visual_tokens: int = 576,
    hidden_size: int = 512,
    num_hidden_layers: int = 8,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 4,
    intermediate_size: int = 1408,
    vision_hidden_size: int = 128,
    vision_layers: int = 3,
) -> LlavaConfig:
    """The small model's configuration: a CLIP tower and a Llama text stack with grouped-query attention."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    tokenizer = small_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (BOS, EOS, PAD, IMAGE)}
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=4 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=max(1, vision_hidden_size // 32),
        image_size=_grid_side(num_visual_tokens) * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=vision_hidden_size,
        # Wider than the usual starting weights: untrained, those would make every patch look alike.
        initializer_factor=2.0,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=4096,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE],
        image_seq_length=num_visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    setattr(config, UNTRAINED_KEY, True)
    return config


def build_small_llava(folder: str | Path, num_visual_tokens: int = 576, seed: int = 0, **config_options: int) -> Path:
    """Writes the small, untrained LLaVA to ``folder`` in the layout of a public checkpoint.

    Parameters
    ----------
    folder
        Created if needed. Afterwards ``AutoProcessor.from_pretrained(folder)`` and
        ``LlavaForConditionalGeneration.from_pretrained(folder)`` work as for any checkpoint.
    num_visual_tokens
        Visual tokens an image gives; a square number such as 144 or 576.
    seed
        Seed of the weights. Equal seeds give equal weights; torch's global random state is left as it was.
    config_options
        Sizes, passed to :func:`small_llava_config`.

    Returns
    -------
    The folder as a ``Path``. Its weights are about 90 MB in float32 at the default sizes.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    config = small_llava_config(num_visual_tokens, **config_options)
    processor = small_processor(num_visual_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = small_generation_config(processor.tokenizer)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def small_generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Special tokens, and printable ASCII only."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Untrained weights would answer with broken UTF-8 and control characters half of the time.
        suppress_tokens=_unprintable(tokenizer),
    )


def is_untrained(config: object) -> bool:
    """Whether a loaded config says that its weights were never trained (see :data:`UNTRAINED_KEY`)."""
    return bool(getattr(config, UNTRAINED_KEY, False))


def _unprintable(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    keep = set(tokenizer.convert_tokens_to_ids(tokenizer.tokenize("".join(map(chr, range(32, 127))))))
    keep.add(tokenizer.eos_token_id)
    return [index for index in range(len(tokenizer)) if index not in keep]


def _grid_side(num_visual_tokens: int) -> int:
    side = round(num_visual_tokens**0.5) if num_visual_tokens > 0 else 0
    if side < 1 or side * side != num_visual_tokens:
        raise ValueError(f"num_visual_tokens must be a positive square number such as 576, got {num_visual_tokens}")
    return side
