"""Checkpoints as the authors of Dynamic-LLaVA publish them: loaded, converted to Hugging Face's layout, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import original_layout as original
import pytest
import torch
from test_checkpoints import CLASSES, KINDS, assert_same_bytes, change, inputs_for, stored
from torch import Tensor

from pruneops import models
from pruneops.cli import BAD_INPUT, OK, main
from pruneops.methods import DynamicLlava
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.models import checkpoints

METHOD = DynamicLlava.from_official(original.SPARSE)
WITH_INSTRUCT = {**original.SPARSE, "use_instruct_predictor": True}
SHAPES = pytest.mark.parametrize("anyres", [False, True], ids=["llava", "llava_next"])


def write(folder: Path, anyres: bool = False, kind: str = "safetensors", **changes: Any) -> dict[str, Tensor]:
    return original.write_original(folder, anyres, kind, dynamic=True, **changes)


def assert_same_model(model: Any, reference: Any) -> None:
    batch = inputs_for(reference)
    with torch.no_grad():
        ours, theirs = model(**batch).logits, reference(**batch).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[valid][:, : original.VOCAB], theirs[valid][:, : original.VOCAB])
    lengths = model.pruning_run.layer_lengths
    images = int((batch["input_ids"][0] == reference.config.image_token_id).sum())
    kept = int(images * METHOD.vision_keep_rate)
    dense = valid.sum(1).tolist()
    assert lengths[: METHOD.sparse_layer] == [dense] * METHOD.sparse_layer
    assert lengths[-1] == [dense[0] - images + kept, dense[1]]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "max_length": None}
    row = {**batch, "input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    allowed = {"bad_words_ids": [[token] for token in range(original.VOCAB, model.config.text_config.vocab_size)]}
    assert torch.equal(model.generate(**row, **settings, **allowed), reference.generate(**row, **settings))


# -- there ------------------------------------------------------------------------------------------------------------


@SHAPES
def test_a_converted_checkpoint_is_the_model_built_by_hand(anyres: bool, tmp_path: Path) -> None:
    tensors = write(tmp_path / "in", anyres)
    assert checkpoints.convert(tmp_path / "in", tmp_path / "out") == []
    model, info = CLASSES[anyres].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.pruning_run.method == METHOD
    assert_same_model(model, original.by_hand(tensors, anyres, method=METHOD))


@SHAPES
def test_the_original_layout_is_loaded_directly(anyres: bool, tmp_path: Path) -> None:
    tensors = write(tmp_path, anyres, "sharded-bin")
    model, info = CLASSES[anyres].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_model(model, original.by_hand(tensors, anyres, method=METHOD))


def test_the_predictors_are_those_of_the_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    tensors = write(tmp_path, sparse_config=WITH_INSTRUCT)
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.pruning_run.method == DynamicLlava.from_official(WITH_INSTRUCT)
    expected = {name.removeprefix("model."): t for name, t in tensors.items() if "_score_predictor." in name}
    loaded = predictors_of(model.model.language_model)
    assert list(loaded) == ["image_score_predictor", "output_text_score_predictor", "instruct_score_predictor"]
    assert_same_bytes({f"{p}.{name}": w for p, m in loaded.items() for name, w in m.state_dict().items()}, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_hold_the_same_model(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "other", kind=kind)
    for name in ("one", "other"):
        checkpoints.convert(tmp_path / name, tmp_path / f"{name}-out")
    assert_same_bytes(stored(tmp_path / "other-out"), stored(tmp_path / "one-out"))


@pytest.mark.parametrize("model_type", ["llava_llama", "dynamic_llava_llama"])
def test_both_model_types_are_recognised_by_the_sparse_config(model_type: str, tmp_path: Path) -> None:
    config = original.original_config(False, True, model_type=model_type)
    assert checkpoints.layout_of(config) is checkpoints.DYNAMIC_LLAVA
    assert checkpoints.layout_of({**config, "sparse_config": None}) is None
    assert checkpoints.layout_of(original.original_config(False)) is checkpoints.PMOD


# -- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llava_llama", "dynamic_llava_llama"])
@pytest.mark.parametrize("sparse", [original.SPARSE, {**WITH_INSTRUCT, "mask_loss_type": "mse"}], ids=["two", "three"])
def test_there_and_back_gives_the_same_bytes_and_the_same_config(
    sparse: dict[str, Any], model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = write(tmp_path / "in", dtype=dtype, model_type=model_type, sparse_config=sparse)
    checkpoints.convert(tmp_path / "in", tmp_path / "hf", max_shard_bytes=30_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="dynamic-llava")
    assert_same_bytes(stored(tmp_path / "back"), tensors)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "back"))
    assert after == before


def test_a_model_that_never_was_original_gets_a_config_that_describes_it(tmp_path: Path) -> None:
    tensors = write(tmp_path / "in")
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "in")
    del model.config.source_config
    model.save_pretrained(tmp_path / "hf")
    checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="dynamic-llava", vision_tower="some/clip")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["sparse_config"] == original.SPARSE
    assert config["model_type"] == "llava_llama" and config["architectures"] == ["DynamicLlavaLlamaForCausalLM"]
    assert stored(tmp_path / "back").keys() == tensors.keys()


def test_a_model_of_another_method_is_not_converted(tmp_path: Path) -> None:
    original.write_original(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "hf")
    with pytest.raises(ValueError, match="'method': 'pmod'.*expected one of the method 'dynamic_llava'"):
        checkpoints.convert(tmp_path / "hf", tmp_path / "back", target="dynamic-llava")


# -- what cannot be right ---------------------------------------------------------------------------------------------


IMAGE, OUTPUT_TEXT = "model__image_score_predictor__", "model__output_text_score_predictor__"
INSTRUCT = "model__instruct_score_predictor__"
BROKEN_TENSORS = [
    (
        {f"{IMAGE}down_mlp__1__weight": None},
        r"1 of 42 tensors of predictors are missing: model\.image_score_predictor\.down_mlp\.1\.weight",
    ),
    ({f"{OUTPUT_TEXT}output_mlp__7__bias": None}, r"missing: model\.output_text_score_predictor\.output_mlp\.7\.bias"),
    (
        {f"{IMAGE}transformer__1__attn__qkv__weight": torch.zeros(16, 16)},
        r"attn\.qkv\.weight has shape \(16, 16\), expected \(48, 16\)",
    ),
    ({f"{OUTPUT_TEXT}output_mlp__1__weight": torch.zeros(8, 32)}, r"has shape \(8, 32\), expected \(16, 32\)"),
    ({f"{IMAGE}output_mlp__0__bias": torch.full((8,), torch.nan)}, r"output_mlp\.0\.bias holds NaN or infinity"),
    ({f"{OUTPUT_TEXT}output_mlp__0__weight": torch.full((32,), torch.inf)}, "holds NaN or infinity"),
    (
        {f"{IMAGE}transformer__2__norm1__weight": torch.ones(16)},
        r"predictors where config\.json has none: model\.image_score_predictor\.transformer\.2\.norm1",
    ),
    (
        {f"{INSTRUCT}output_mlp__0__weight": torch.ones(32)},
        r"predictors where config\.json has none: model\.instruct_score_predictor",
    ),
    ({"model__surprise__weight": torch.ones(2)}, r"1 tensors that the model does not have: .*surprise"),
    ({"model__layers__3__mlp__up_proj__weight": None}, r"1 tensors are missing: .*layers\.3\.mlp\.up_proj"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_TENSORS, ids=[message for _, message in BROKEN_TENSORS])
def test_tensors_that_cannot_be_right_are_refused_before_anything_is_written(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "in")
    change(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=message):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "in")


def sparse(**changes: Any) -> dict[str, Any]:
    return {"sparse_config": {**original.SPARSE, **changes}}


BROKEN_CONFIGS = [
    ({"sparse_config": None}, "model_type 'llava_llama', expected one of .*dynamic_llava_llama with sparse_config"),
    ({"sparse_config": {"d_model": 16}}, "expected a mapping with sparse_layer"),
    ({"sparse_config": "yes"}, "sparse_config is 'yes', expected an object"),
    (sparse(vision_keep_rate=1.5), "vision_keep_rate: got 1.5"),
    (sparse(vision_keep_rate="much"), "config.json: vision_keep_rate: got 'much', expected a number"),
    (sparse(sparse_layer=12), "sparse_layer: got 12, expected at most 11"),
    (sparse(d_model=32), r"has shape \(16, 32\), expected \(32, 32\)"),
    (sparse(num_layers=3), r"tensors of predictors are missing: .*transformer\.2"),
    (sparse(use_output_text_predictor=False), "predictors where config.json has none: .*output_text"),
    ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_CONFIGS, ids=[message for _, message in BROKEN_CONFIGS])
def test_a_config_that_cannot_be_right_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    original.write_original(tmp_path / "in", dynamic=True)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        checkpoints.convert(tmp_path / "in", tmp_path / "out")


# -- command line -----------------------------------------------------------------------------------------------------


def test_the_command_converts_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write(tmp_path / "in", kind="sharded-safetensors")
    there = ["convert", "--from", "dynamic-llava", str(tmp_path / "in"), str(tmp_path / "hf"), "--quiet"]
    back = ["convert", "--to", "dynamic-llava", str(tmp_path / "hf"), str(tmp_path / "back"), "--quiet"]
    assert main(there) == OK and main(back) == OK
    assert_same_bytes(stored(tmp_path / "back"), tensors)
    wrong = ["convert", "--from", "pmod", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet"]
    assert main(wrong) == BAD_INPUT
    assert "its layout is dynamic-llava, expected pmod as asked for" in capsys.readouterr().err
