"""examples/ship_llava.py: a training's output becomes a folder that can ship."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pruneops import models
from pruneops.data import LABELS, scene_llava_config
from pruneops.evaluation import Exam, Results, Tally
from pruneops.evaluation.results import Entry
from pruneops.methods import PMoD
from pruneops.training import PatchReader

EXAMPLE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "ship_llava.py"))
NOTE, figures_of, ship = EXAMPLE["NOTE"], EXAMPLE["figures_of"], EXAMPLE["ship"]

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vision_hidden_size": 32,
    "vision_layers": 2,
}
FIGURES = {
    "questions": 500,
    "accuracy": {"dense": 0.925, "pyramiddrop": 0.5},
    "templates": {"colour": {"dense": 0.75}},
    "training": "It took an afternoon.",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of the vision tower leaves behind."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    words = {name: [[value] for value in range(1, len(values))] for name, values in LABELS.items()}
    PatchReader(scene_llava_config(**TINY, patch_words=words)).save_pretrained(folder)
    return folder


def test_weights_are_halved_and_those_of_the_training_alone_left_out(trained: Path, tmp_path: Path) -> None:
    folder = ship(trained, tmp_path / "new" / "folder", "float16", FIGURES)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float32
    before = LlavaForConditionalGeneration.from_pretrained(trained).state_dict()
    assert all(torch.equal(weight, before[name].half().float()) for name, weight in model.state_dict().items())
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float16}
    config = json.loads((folder / "config.json").read_text())
    assert "patch_words" not in config and config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["pruneops_training"] == {"note": NOTE, "questions": 500, "accuracy": FIGURES["accuracy"]}
    assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == "left"


def test_the_card_has_the_figures(trained: Path, tmp_path: Path) -> None:
    card = (ship(trained, tmp_path / "a", figures=FIGURES) / "README.md").read_text()
    for text in ("| all | 92.5 % | 50.0 % |", "| colour | 75.0 % |  |", "500 questions", "an afternoon", NOTE):
        assert text in card
    assert "from transformers import AutoProcessor, LlavaForConditionalGeneration\n\nfrom pruneops.data" in card
    assert "Not measured." in (ship(trained, tmp_path / "b") / "README.md").read_text()


def test_a_model_of_a_method_keeps_it(trained: Path, tmp_path: Path) -> None:
    method = PMoD(layers="interleave")
    models.LlavaForConditionalGeneration.from_pretrained(trained, pruning=method).save_pretrained(tmp_path / "in")
    folder = ship(tmp_path / "in", tmp_path / "out")
    assert models.LlavaForConditionalGeneration.from_pretrained(folder).pruning_run.given_method == method
    card = (folder / "README.md").read_text()
    assert "# Scene LLaVA, fine-tuned with PMoD" in card and 'scene_llava_folder("pmod")' in card
    assert "from pruneops.models import LlavaForConditionalGeneration\n" in card


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Of a dense model, and of one that was trained with p-MoD; 40 questions."""
    results = Results(tmp_path, {"split": "test", "questions": 40, "seed": 3})
    results.models = {"dense": {"trained_with": None}, "pmod": {"trained_with": {"method": "pmod"}}}
    for model, way, keep, right in (
        ("dense", "dense", None, 30),
        ("dense", "pyramiddrop", None, 20),
        ("dense", "pyramiddrop", 0.3, 2),
        ("dense", "random", None, 10),
        ("pmod", "own", None, 25),
        ("pmod", "own", 0.5, 1),
    ):
        results.entries.append(Entry(model, way, keep, None, Tally("1" * right + "0" * (40 - right))))
    results.save()
    return results.path


def test_figures_are_those_of_the_evaluation(evaluation: Path) -> None:
    dense, pmod = figures_of(evaluation, "dense"), figures_of(evaluation, "pmod")
    assert dense["questions"] == pmod["questions"] == 40
    assert dense["accuracy"] == {"dense": 0.75, "pyramiddrop": 0.5} and pmod["accuracy"] == {"pmod": 0.625}
    asked = [question.template for question in Exam("test", 40, 3).questions]
    for kind, shares in dense["templates"].items():
        assert shares["dense"] == asked[:30].count(kind) / asked.count(kind)
        assert shares["pyramiddrop"] == asked[:20].count(kind) / asked.count(kind)
    assert set(dense["templates"]) == set(pmod["templates"]) == set(asked)


def test_figures_of_what_was_not_evaluated_are_refused(evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--eval: .*eval\.json has no results of a model 'other', expected one"):
        figures_of(evaluation, "other")
    for text in ("", "{}", "[]", '{"entries": [1], "settings": {}, "models": {}}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"--eval: got .*broken\.json, expected an eval\.json of `pruneops eval`"):
            figures_of(tmp_path / "broken.json", "dense")


def test_what_cannot_ship_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with model\.safetensors"):
        ship(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"accuracy: got 92\.5 for dense, expected a share in \[0, 1\]"):
        ship(trained, tmp_path / "out", figures={"accuracy": {"dense": 92.5}})
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    (other / "config.json").write_text('{"model_type": "llava", "text_config": {"vocab_size": 32000}}')
    with pytest.raises(ValueError, match="got a llava of 32000 words, expected a llava of the data set's"):
        ship(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
