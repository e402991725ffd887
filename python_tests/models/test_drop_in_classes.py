"""The drop-in classes: pruning goes in with from_pretrained and is saved with the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import pruneops
from pruneops import models
from pruneops.methods import PyramidDrop

DROP = PyramidDrop(layers=(2, 4), keep_ratios=(0.5, 0.25))
CLASSES = [
    (tiny.llava, models.LlavaForConditionalGeneration, transformers.LlavaForConditionalGeneration),
    (
        tiny.llava_next,
        models.LlavaNextForConditionalGeneration,
        transformers.LlavaNextForConditionalGeneration,
    ),
]


def inputs_for(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if "Next" not in type(model).__name__:
        return tiny.llava_batch([tiny.row(3, 1, 5), tiny.row(2, 0, 7)])
    image_sizes = torch.tensor([[16, 30]])
    pixel_values = torch.randn(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        count = len(model.model.get_image_features(pixel_values, image_sizes).pooler_output[0])
    rows = [[5, 6, *[tiny.IMAGE] * count, 7, 8], [3, 4, 5]]
    return {**tiny.pad(rows, "left"), "pixel_values": pixel_values, "image_sizes": image_sizes}


@pytest.mark.parametrize(("build", "ours", "stock"), CLASSES, ids=["llava", "llava_next"])
def test_a_stock_checkpoint_is_pruned_and_keeps_its_method_when_saved(build, ours, stock, tmp_path: Path) -> None:
    plain = build()
    batch = inputs_for(plain)
    plain.save_pretrained(tmp_path / "stock")
    with pruneops.prune(plain, DROP) as run:
        expected = plain.generate(**batch, max_new_tokens=5)
    lengths = run.layer_lengths

    model = ours.from_pretrained(tmp_path / "stock", pruning=DROP)
    assert isinstance(model, stock) and model.pruning_run.method == DROP
    assert model.generate(**batch, max_new_tokens=5, eos_token_id=None).tolist() == expected.tolist()
    assert model.pruning_run.layer_lengths == lengths and lengths[0] != lengths[-1]
    assert model.state_dict().keys() == plain.state_dict().keys()

    model.save_pretrained(tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["pruning"] == DROP.to_dict()
    again = ours.from_pretrained(tmp_path / "pruned")
    assert again.pruning_run.method == DROP
    assert again.generate(**batch, max_new_tokens=5, eos_token_id=None).tolist() == expected.tolist()

    other = ours.from_pretrained(tmp_path / "pruned", pruning=PyramidDrop((3,), (0.5,)))
    assert other.pruning_run.method == PyramidDrop((3,), (0.5,))


@pytest.mark.parametrize(("build", "ours", "stock"), CLASSES, ids=["llava", "llava_next"])
def test_without_a_method_the_class_is_the_stock_one(build, ours, stock, tmp_path: Path) -> None:
    plain = build()
    batch = inputs_for(plain)
    plain.save_pretrained(tmp_path)
    model = ours.from_pretrained(tmp_path)
    assert model.pruning_run is None
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    with pruneops.prune(model, DROP) as run, torch.no_grad():
        model(**batch)
    assert run.layer_lengths[0] != run.layer_lengths[-1]


def test_a_stock_class_loads_a_pruned_checkpoint_as_dense(tmp_path: Path) -> None:
    model = tiny.llava(models.LlavaForConditionalGeneration, pruning=DROP)
    model.save_pretrained(tmp_path)
    dense = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    batch = inputs_for(dense)
    pruneops.detach(model)
    with torch.no_grad():
        torch.testing.assert_close(dense(**batch).logits, model(**batch).logits)


def test_default_stages_are_stored_as_such() -> None:
    model = tiny.llava(models.LlavaForConditionalGeneration, pruning=PyramidDrop(keep_ratios=(0.5,)))
    assert model.config.pruning["layers"] is None
    assert model.pruning_run.method.layers == (3,)


def test_a_method_attached_later_is_saved_as_it_was_given(tmp_path: Path) -> None:
    model = tiny.llava(models.LlavaForConditionalGeneration, pruning=DROP)
    pruneops.detach(model)
    pruneops.attach(model, PyramidDrop(keep_ratios=(0.5,)))
    model.save_pretrained(tmp_path)
    assert models.LlavaForConditionalGeneration.from_pretrained(tmp_path).config.pruning["layers"] is None


def test_a_method_as_a_dict(tmp_path: Path) -> None:
    tiny.llava().save_pretrained(tmp_path)
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path, pruning=DROP.to_dict())
    assert model.pruning_run.method == DROP


def test_what_is_not_a_method_is_refused(tmp_path: Path) -> None:
    tiny.llava().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="pruning: got float"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path, pruning=0.5)
    with pytest.raises(ValueError, match="layers: got 99"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path, pruning=PyramidDrop((99,), (0.5,)))


def test_dtype_and_other_arguments_reach_the_stock_class(tmp_path: Path) -> None:
    tiny.llava().save_pretrained(tmp_path)
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path, pruning=DROP, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    batch = inputs_for(model)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    assert model.generate(**batch, max_new_tokens=2, eos_token_id=None).shape == (2, 26)
