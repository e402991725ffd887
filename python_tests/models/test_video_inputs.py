"""What video models are given: as many placeholders as the model makes features, and pixels as for their images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from clips import moving_disc
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessorPil

from pruneops.analysis.pictures import grid_boxes
from pruneops.models.small import is_untrained
from pruneops.models.small_video import build_small_video, small_video_tokenizer
from pruneops.models.video_inputs import VIDEO_MODEL_TYPES, VideoReader, frame_layout

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vision_hidden_size": 32,
    "vision_layers": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_video(tmp_path_factory.mktemp("small-video"), tokens_per_frame=16, seed=3, **SMALL)


@pytest.fixture(scope="module")
def reader(folder: Path) -> VideoReader:
    return VideoReader.from_pretrained(str(folder), AutoConfig.from_pretrained(folder))


def frames(count: int, width: int = 96, height: int = 72) -> list[Image.Image]:
    return [Image.fromarray(array) for array in moving_disc(count, width, height)]


@pytest.mark.parametrize("name", VIDEO_MODEL_TYPES)
@torch.no_grad()
def test_the_layout_of_a_frame_is_that_of_the_models_features(name: str) -> None:
    family = tiny.VIDEO_FAMILIES[name]
    model = family.build()
    pixels = torch.randn(1, 3, 3, family.image_size, family.image_size)
    layout = frame_layout(model.config, family.image_size, family.image_size)
    features = model.model.get_video_features(pixels).pooler_output
    count = sum(part.numel() for part in features) // model.config.text_config.hidden_size
    # LLaVA-OneVision puts its newline behind the features of a video.
    assert count in (3 * layout.tokens, 3 * layout.tokens + layout.separators)
    assert (layout.tokens, layout.separators) == (family.patches, family.newlines)


def test_boxes_tile_the_frame_and_class_tokens_have_none() -> None:
    layout = frame_layout(tiny.VIDEO_FAMILIES["video_llava"].build().config, 16, 16)
    assert layout.boxes((100, 60)) == [None, *grid_boxes((100, 60), 4, 4)]


def test_models_without_videos_and_frames_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="config: got a model of type 'llava', expected one that takes videos"):
        frame_layout(tiny.llava().config, 16, 16)
    with pytest.raises(ValueError, match="a frame of 4 x 4 pixels is too small"):
        frame_layout(tiny.VIDEO_FAMILIES["llava_next_video"].build().config, 4, 4)


def test_a_row_has_a_placeholder_for_every_token_of_its_video(reader: VideoReader) -> None:
    inputs = reader([frames(3), frames(3, 50, 90)], ["What is it?", "Why?"])
    assert inputs["pixel_values_videos"].shape == (2, 3, 3, 112, 112)
    video = inputs["input_ids"] == reader.config.video_token_id
    assert video.sum(1).tolist() == [48, 48]
    texts = [
        reader.tokenizer.decode(ids[mask.bool() & ~is_video])
        for ids, mask, is_video in zip(inputs["input_ids"], inputs["attention_mask"], video, strict=True)
    ]
    assert texts == ["<s>USER: \nWhat is it? ASSISTANT:", "<s>USER: \nWhy? ASSISTANT:"]
    padding = inputs["attention_mask"] == 0
    assert padding.sum(1).tolist() == [0, len("What is it?") - len("Why?")]
    assert padding[1, : int(padding[1].sum())].all(), "rows are padded on the left"


def test_frames_are_prepared_as_the_checkpoints_images_are(reader: VideoReader) -> None:
    clip = frames(2, 150, 117)
    pixels = reader([clip], ["?"])["pixel_values_videos"][0]
    clip_processor = CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    expected = clip_processor(images=clip, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected, atol=0, rtol=0)


@pytest.mark.parametrize("stored_in", ["video_preprocessor_config.json", "processor_config.json"])
def test_sizes_and_colours_come_from_the_checkpoints_video_processor(
    folder: Path, tmp_path: Path, stored_in: str
) -> None:
    for file in folder.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((folder / "chat_template.jinja").read_bytes())
    (tmp_path / "video_preprocessor_config.json").unlink()
    own = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "size": {"height": 56, "width": 84},
        "do_center_crop": None,
        "crop_size": None,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    nested = json.loads((tmp_path / "processor_config.json").read_text()) | {"video_processor": own}
    (tmp_path / stored_in).write_text(json.dumps(own if stored_in.startswith("video") else nested))
    config = AutoConfig.from_pretrained(folder)
    config.model_type = "llava_onevision"
    reader = VideoReader.from_pretrained(str(tmp_path), config)
    pixels = reader([frames(2)], ["?"])["pixel_values_videos"]
    assert pixels.shape == (1, 2, 3, 56, 84)
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_a_template_that_only_the_processor_has_is_used(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{{ bos_token }}[<video>{{ messages[0]['content'][1]['text'] }}]"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    reader = VideoReader.from_pretrained(str(tmp_path), AutoConfig.from_pretrained(folder))
    ids = reader.encode("why", 2)
    assert reader.tokenizer.decode(ids) == "<s>[<video><video>why]", "the template's <s> is the only one"


def test_without_any_template_the_prompt_is_that_of_llava(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    reader = VideoReader.from_pretrained(str(tmp_path), AutoConfig.from_pretrained(folder))
    assert reader.tokenizer.decode(reader.encode("why", 1)) == "<s>USER: <video>\nwhy ASSISTANT:"


def test_a_prompt_with_placeholders_of_its_own_is_refused(reader: VideoReader) -> None:
    with pytest.raises(ValueError, match="prompt: got 2 video placeholders"):
        reader.encode("compare with <video>", 4)


def test_videos_of_different_lengths_do_not_make_a_batch(reader: VideoReader) -> None:
    with pytest.raises(ValueError, match="videos: got frames, channels, height and width .*expected the same for all"):
        reader([frames(2), frames(3)], ["a", "b"])


def test_frames_of_different_sizes_are_cropped_to_one(reader: VideoReader) -> None:
    assert reader([[*frames(1), *frames(1, 40, 200)]], ["?"])["pixel_values_videos"].shape == (1, 2, 3, 112, 112)


@torch.no_grad()
def test_the_small_video_model_answers_like_any_checkpoint(folder: Path, reader: VideoReader) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.model_type == "llava_next_video" and is_untrained(model.config)
    inputs = reader([frames(4), frames(4)], ["What is it?", "Why?"])
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for text in reader.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
        assert text.isprintable() and text.isascii()


def test_equal_seeds_give_equal_small_models(tmp_path: Path, folder: Path) -> None:
    state = torch.get_rng_state()
    same, other = (build_small_video(tmp_path / str(s), tokens_per_frame=16, seed=s, **SMALL) for s in (3, 4))
    assert torch.equal(state, torch.get_rng_state())
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, same, other)]
    assert weights[0] == weights[1] != weights[2]


def test_the_processors_files_are_what_transformers_asks_for(folder: Path) -> None:
    from transformers.processing_utils import ProcessorMixin
    from transformers.video_processing_utils import BaseVideoProcessor

    of_processor, _ = ProcessorMixin.get_processor_dict(str(folder))
    assert of_processor["processor_class"] == "LlavaNextVideoProcessor" and of_processor["patch_size"] == 14
    assert of_processor["chat_template"] == small_video_tokenizer().chat_template
    of_videos, _ = BaseVideoProcessor.get_video_processor_dict(str(folder))
    assert of_videos["video_processor_type"] == "LlavaNextVideoVideoProcessor"
    assert of_videos["crop_size"] == {"height": 112, "width": 112}


def test_the_video_token_is_one_token() -> None:
    tokenizer = small_video_tokenizer()
    ids = tokenizer("a<video>b", add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<video>")) == 1 and len(ids) == 3
