"""The small, untrained LLaVA: built, stored and loaded like a public checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from pruneops.models.small import build_small_llava, is_untrained, small_processor, small_tokenizer
from pruneops.runner import ASSET

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vision_hidden_size": 32,
    "vision_layers": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small only waits for other threads, for long where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_llava(tmp_path_factory.mktemp("small"), num_visual_tokens=144, seed=3, **TINY)


def test_the_auto_classes_load_it_like_any_checkpoint(folder: Path) -> None:
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    assert isinstance(model, LlavaForConditionalGeneration)
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.tokenizer.padding_side == "left"
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads


def test_it_says_of_itself_that_it_is_untrained(folder: Path) -> None:
    assert is_untrained(AutoConfig.from_pretrained(folder))
    assert json.loads((folder / "config.json").read_text())["pruneops_untrained"] is True


def test_it_answers_about_a_batch_of_images_with_printable_text(folder: Path) -> None:
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    questions = ["What is it?", "Which colours does this photograph have?"]
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in questions]
    prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    assert prompts[0] == "USER: <image>\nWhat is it? ASSISTANT:"
    images = [Image.open(ASSET), Image.new("L", (40, 90), 128)]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [144, 144]
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for text in processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
        assert text.isprintable() and text.isascii()


def test_equal_seeds_give_equal_weights_and_torch_keeps_its_random_state(tmp_path: Path, folder: Path) -> None:
    state = torch.get_rng_state()
    again = build_small_llava(tmp_path / "again", num_visual_tokens=144, seed=3, **TINY)
    other = build_small_llava(tmp_path / "other", num_visual_tokens=144, seed=4, **TINY)
    assert torch.equal(state, torch.get_rng_state())
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, again, other)]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("text", ["plain", "Grüße, 你好 🙂", "a\tb\nc", "<s>"])
def test_the_tokenizer_is_lossless(text: str) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_an_image_gives_the_number_of_tokens_asked_for() -> None:
    processor = small_processor(576)
    features = processor(images=[Image.open(ASSET)], text=["<image> what"], return_tensors="pt")
    assert int((features["input_ids"] == processor.image_token_id).sum()) == 576
    assert features["pixel_values"].shape == (1, 3, 336, 336)


@pytest.mark.parametrize("count", [0, -4, 143])
def test_a_count_that_is_no_square_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_visual_tokens must be a positive square number.*{count}"):
        small_processor(count)
