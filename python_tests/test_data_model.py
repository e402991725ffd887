"""The data set's tokenizer, processor and model configuration, saved and loaded like those of a public checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from pruneops.data import PatchDataset, SampleDataset, Samples, scene_llava_config, scene_processor, scene_tokenizer
from pruneops.training import Collator, Conversation, Turn, render

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vision_hidden_size": 32,
    "vision_layers": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    scene_processor().save_pretrained(path)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(scene_llava_config(**TINY)).save_pretrained(path)
    return path


def test_every_word_of_the_data_set_is_one_token() -> None:
    tokenizer = scene_tokenizer()
    signs: set[str] = set()
    for sample in Samples("train", 300, kinds=("questions", "description", "clip"), turns=6):
        for turn in sample.turns:
            text = f"{turn.text} {turn.answer}"
            signs |= {thing.text for thing in sample.source.things if thing.text}
            tokens = tokenizer.tokenize(text)
            words = text.replace("?", " ?").replace(".", " .").split()
            assert len(tokens) == len(words) + sum(word in signs for word in words), tokens


@pytest.mark.parametrize("text", ["What is written?", "Was ist das, größer als 5 €?\n\tうさぎ 🐇", "##x ▁y  z", ""])
def test_any_text_is_encoded_without_unknown_tokens_and_decodes_to_itself(text: str) -> None:
    tokenizer = scene_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_long_text_is_no_unknown_word() -> None:
    tokenizer = scene_tokenizer()
    assert tokenizer.decode(tokenizer("q" * 5000, add_special_tokens=False)["input_ids"]) == "q" * 5000


def test_special_tokens_have_their_ids() -> None:
    tokenizer = scene_tokenizer()
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>"]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(6))
    assert tokenizer("<image><video>", add_special_tokens=False)["input_ids"] == [4, 5]
    assert len(tokenizer) < 1000 and tokenizer.padding_side == "left"


def test_the_auto_classes_load_processor_and_model(folder: Path) -> None:
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    sample = Samples("test", 1)[0]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.turns[0].text}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    image = Image.fromarray(sample.pictures[0])
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 576
    assert inputs["pixel_values"].shape == (1, 3, 192, 192)
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert ids.shape[1] <= inputs["input_ids"].shape[1] + 2
    same = scene_processor()(images=image, text=prompt, return_tensors="pt")
    assert all(torch.equal(inputs[key], same[key]) for key in same)


def test_a_prompt_reads_as_it_was_trained(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    turns = (Turn("user", "<image>\nWhere is the ring?"), Turn("assistant", "top left"), Turn("user", "Which?"))
    trained, _ = render(Conversation("", turns, ("a.png",)), processor.tokenizer.eos_token)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the ring?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "top left"}]},
        {"role": "user", "content": "Which?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == trained
    clip = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    assert "USER: <video>\nWhat moves? " in processor.apply_chat_template(clip)


def test_a_batch_of_samples_trains_the_model(folder: Path) -> None:
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    dataset = SampleDataset(Samples("train", 2, kinds=("questions", "description")), processor)
    batch = Collator(processor)([dataset[0], dataset[1]])
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_patch_labels_come_with_the_pixels_that_the_tower_sees() -> None:
    samples, processor = Samples("train", 2), scene_processor()
    entry = PatchDataset(samples, processor.image_processor)[1]
    pixels = SampleDataset(samples, processor)[1]["pixel_values"][0]
    assert torch.equal(entry["pixel_values"], pixels)
    assert {name: tuple(entry[name].shape) for name in ("shape", "colour", "text")} == dict.fromkeys(
        ("shape", "colour", "text"), (576,)
    )
    assert (entry["shape"] > 0).sum() >= 6


def test_the_default_model_is_small_and_deep_enough() -> None:
    config = scene_llava_config()
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2e6 < count < 5e6
    assert config.text_config.num_hidden_layers >= 8 and config.image_seq_length == 576
    assert scene_llava_config(14).vision_config.image_size == 336
    assert scene_llava_config(grid=12).image_seq_length == 144


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_size": 164}, ValueError, "hidden_size must be a multiple of 10, got 164"),
        ({"num_key_value_heads": 2}, ValueError, "num_attention_heads must be a multiple of 2, got 5"),
        ({"vision_hidden_size": 48}, ValueError, "vision_hidden_size must be a multiple of 32, got 48"),
        ({"vision_layers": 1}, ValueError, "vision_layers must be at least 2, got 1"),
        ({"num_hidden_layers": 8.0}, TypeError, "num_hidden_layers must be an int, got 8.0"),
        ({"grid": 0}, ValueError, "grid must be at least 1, got 0"),
        ({"patch_size": 40}, ValueError, "patch_size must be from 8 to 32 pixels, got 40"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scene_llava_config(**change)
