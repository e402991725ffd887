"""The tokenizer and processor of a converted checkpoint, with the image token that original checkpoints lack."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

IMAGE_TOKEN = "<image>"

#: How a conversation reads: LLaVA's "v1" form of Vicuna's, which the models were trained with.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}"
    "{% if message['role'] == 'system' %}"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}{{ ' ' }}"
    "{% else %}" + SYSTEM + "{{ ' ' }}{% endif %}"
    "{% endif %}"
    "{% if message['role'] != 'system' %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_OTHER_FILES = ("generation_config.json", "chat_template.jinja", "chat_template.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def chat_prompt(processor: Any, question: str) -> str:
    """A question about one picture in the words of the processor's chat template, or of LLaVA where it has none."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"USER: {processor.image_token}\n{question} ASSISTANT:"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, or None if it has none.

    Raises
    ------
    ValueError
        If there are files of a tokenizer but they cannot be loaded here, with the reason.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    # Without a class in its settings AutoTokenizer asks config.json, whose model type transformers does not know.
    known = settings.get("tokenizer_class") is not None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # loading warns of the unknown model type as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the keys of its config
            if not known and (folder / "tokenizer.json").is_file():
                return PreTrainedTokenizerFast.from_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a tokenizer's files or a missing package make it trip over
        raise ValueError(f"tokenizer: cannot load the one in {folder}: {' '.join(str(error).split())}") from None
    finally:
        logging.set_verbosity(verbosity)


def add_image_token(tokenizer: Any) -> int:
    """Add the image token to a tokenizer that has none. Returns its id."""
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def make_processor(config: Any, tokenizer: Any, aspect_ratio: str | None, tower: Path | None) -> Any:
    """The Hugging Face processor of a converted checkpoint.

    Parameters
    ----------
    config : LlavaConfig or LlavaNextConfig
    tokenizer : tokenizer with the image token
    aspect_ratio : str, optional
        ``image_aspect_ratio`` of the original config: "pad" fills up to a square, others cut one out.
    tower : Path, optional
        Folder of the vision tower; the mean and standard deviation of its ``preprocessor_config.json`` are used,
        those of CLIP where it has none.
    """
    import transformers

    size = config.vision_config.image_size
    settings: dict[str, Any] = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }
    if tower is not None and (tower / "preprocessor_config.json").is_file():
        found = json.loads((tower / "preprocessor_config.json").read_text(encoding="utf-8"))
        settings |= {key: found[key] for key in ("image_mean", "image_std", "resample") if key in found}
    anyres = config.model_type == "llava_next"
    if anyres:
        settings["image_grid_pinpoints"] = config.image_grid_pinpoints
    elif aspect_ratio == "pad":
        settings["do_pad"] = True
    kind = "LlavaNext" if anyres else "Llava" if aspect_ratio == "pad" else "CLIP"
    images = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    processor_class = transformers.LlavaNextProcessor if anyres else transformers.LlavaProcessor
    return processor_class(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def aspect_ratio_of(folder: Path) -> str:
    """``"pad"`` or ``"square"``: how the image processor of a Hugging Face checkpoint makes images square."""
    for name in _PROCESSOR_FILES:
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if settings.get("image_processor", settings).get("do_pad"):
            return "pad"
    return "square"


def copy_files(source: Path, out: Path, processor: bool) -> list[str]:
    """Copy the files of the tokenizer and of generation, and of the processor if asked to. Returns their names."""
    copied = []
    for name in (*_TOKENIZER_FILES, *_OTHER_FILES, *(_PROCESSOR_FILES if processor else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
            copied.append(name)
    return copied
