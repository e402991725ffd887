"""The models that ship with the package: loaded like any checkpoint, and as often right as they say they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from PIL import Image
from transformers import AutoProcessor

from pruneops import models
from pruneops.cli import OK, main
from pruneops.data import Samples, scene_processor
from pruneops.evaluation import Exam, accuracy, load_candidate
from pruneops.methods import KEEP_ALL, PyramidDrop
from pruneops.models.scene import TRAINING_KEY, scene_llava_folder, shipped_methods, training_of
from pruneops.runner import ASSET, is_right

QUESTIONS = 128
#: The dense model is tested even if it is missing.
SHIPPED = [None, *filter(None, shipped_methods())]


def least(stated: float, size: int) -> float:
    """What a share of `size` questions has to be at least if that of all questions is `stated`: 3 sampling errors."""
    return stated - 3 * (max(stated * (1 - stated), 0.01) / size) ** 0.5


def stated(method: str | None) -> dict[str, float]:
    folder = scene_llava_folder(method)
    return json.loads((folder / "config.json").read_text())[TRAINING_KEY]["accuracy"]


@pytest.mark.parametrize("method", SHIPPED)
def test_it_loads_like_any_checkpoint_with_every_weight(method: str | None) -> None:
    folder = scene_llava_folder(method)
    module = transformers if method is None else models
    model, info = module.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert str(model.dtype) == "torch.float32" and not model.generation_config.do_sample
    assert model.config.image_seq_length == 576 and model.config.text_config.num_hidden_layers >= 8
    assert (folder / "model.safetensors").stat().st_size < 2.5e7
    assert (method is None) is (getattr(model.config, "pruning", None) is None)
    assert training_of(model.config)["note"].startswith("trained on rendered pictures of small shapes and signs only")


@pytest.mark.parametrize("method", SHIPPED)
def test_its_processor_is_that_of_the_data_set(method: str | None) -> None:
    processor, expected = AutoProcessor.from_pretrained(scene_llava_folder(method)), scene_processor()
    assert type(processor) is type(expected) and processor.chat_template == expected.chat_template
    assert processor.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert processor.tokenizer.padding_side == "left"
    picture = Image.fromarray(Samples("test", 1)[0].pictures[0])
    texts = ["<image>\nWhere is the ring?", "<image>\nWas ist das, 5 €? There is an arrow at the top left."]
    ours, theirs = (
        each(images=[picture, picture], text=texts, padding=True, return_tensors="pt") for each in (processor, expected)
    )
    assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", SHIPPED)
def test_its_card_says_what_it_is_and_nothing_of_where_it_was_made(method: str | None) -> None:
    folder = scene_llava_folder(method)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert json.loads((folder / "config.json").read_text())[TRAINING_KEY]["note"] in card
    for name, share in stated(method).items():
        assert name in card and f"{100 * share:.1f} %" in card
    for file in folder.glob("*.json"):
        assert "name_or_path" not in file.read_text() and "/work" not in file.read_text(), file


@pytest.mark.parametrize("method", SHIPPED)
def test_it_is_as_often_right_as_it_says(method: str | None) -> None:
    """ "dense" keeps everything, "pyramiddrop" has the published ratios, another name is the model's own method."""
    candidate, exam = load_candidate(scene_llava_folder(method)), Exam(size=QUESTIONS)
    for name, share in stated(method).items():
        way = {"dense": KEEP_ALL, "pyramiddrop": PyramidDrop()}.get(name) if method is None else None
        assert accuracy(candidate, way, exam=exam).accuracy >= least(share, QUESTIONS), name


def test_the_dense_model_says_how_often_it_is_right_with_and_without_pruning() -> None:
    assert {"dense", "pyramiddrop"} <= set(stated(None))


def test_the_demo_answers_about_the_picture_of_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, rows = dict.fromkeys(("stock", "dense", "pruned"), 0), []
    for seed in range(3):
        path = tmp_path / f"{seed}.json"
        arguments = ["--seed", seed, "--repeat", 1, "--quiet", "--json", path, "--out", tmp_path / "a.png"]
        assert main(["run", *map(str, arguments)]) == OK
        rows += json.loads(path.read_text())["rows"]
    for row in rows:
        for way in right:
            right[way] += is_right(row["answers"][way], row["truth"])
    printed = capsys.readouterr().out
    assert "scene LLaVA" in printed and "note " not in printed and "truth " in printed
    assert right["dense"] / len(rows) >= least(stated(None)["dense"], len(rows))
    assert right["pruned"] / len(rows) >= least(stated(None)["pyramiddrop"], len(rows))


def test_of_a_photograph_it_says_that_its_answer_means_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--image", ASSET, "--repeat", 1, "--max-new-tokens", 2, "--quiet", "--out", tmp_path / "a.png"]
    assert main(["run", *map(str, arguments)]) == OK
    note = training_of(transformers.AutoConfig.from_pretrained(scene_llava_folder()))["note"]
    assert f"note    {note}\n" in capsys.readouterr().out
