"""Dynamic-LLaVA's predictors as modules, its description as a config, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from dllava_models import METHOD, ROWS, SIZES, WITH_INSTRUCT, attached, language_batch, trained

import pruneops
from pruneops import models
from pruneops.methods import DynamicLlava, PMoD, PyramidDrop, method_from_dict
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.pruning import find_text_model

OFFICIAL = {
    "use_vision_predictor": True,
    "vision_keep_rate": 0.2,
    "use_text_predictor": True,
    "use_output_text_predictor": True,
    "output_text_keep_rate": 0.5,
    "output_text_len_for_training": 50,
    "use_instruct_predictor": False,
    "instruct_keep_rate": 0.7,
    "instruct_len_for_training": 25,
    "sparse_layer": 2,
    "d_model": 512,
    "nhead": 8,
    "dim_feedforward": 2048,
    "num_layers": 2,
    "mask_loss_weight": 100.0,
}


def text_keys(name: str) -> set[str]:
    return {f"{name}.output_mlp.{i}.{kind}" for i in (0, 1, 3, 5, 7) for kind in ("weight", "bias")}


def image_keys() -> set[str]:
    name = "image_score_predictor"
    keys = {f"{name}.down_mlp.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    keys |= {f"{name}.output_mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    for j in (0, 1):
        block = f"{name}.transformer.{j}"
        parts = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        keys |= {f"{block}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
        keys.add(f"{block}.attn.qkv.weight")
    return keys


# -- modules -----------------------------------------------------------------------------------------------------------


def test_attach_adds_the_official_parameters_and_detach_takes_them_out() -> None:
    model = tiny.language_model()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    pruneops.attach(model, WITH_INSTRUCT)
    added = set(model.state_dict()) - set(before)
    names = ("output_text_score_predictor", "instruct_score_predictor")
    assert added == {f"model.{key}" for key in image_keys().union(*map(text_keys, names))}
    pruneops.detach(model)
    assert {k: w.tolist() for k, w in model.state_dict().items()} == {k: w.tolist() for k, w in before.items()}
    assert not predictors_of(model.model)


def test_predictors_have_the_published_sizes() -> None:
    with torch.device("meta"):
        model = tiny.language_model(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32)
    pruneops.attach(model, DynamicLlava())
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in predictors_of(model.model).items()}
    assert counts == {"image_score_predictor": 8_572_034, "output_text_score_predictor": 2_270_338}


@pytest.mark.parametrize(
    ("off", "left"),
    [
        ("use_vision_predictor", ["output_text_score_predictor"]),
        ("use_output_text_predictor", ["image_score_predictor"]),
        ("use_text_predictor", ["image_score_predictor"]),
    ],
)
def test_a_predictor_that_is_switched_off_is_not_there_and_prunes_nothing(off: str, left: list[str]) -> None:
    model, run = attached(tiny.language_model(), DynamicLlava(vision_keep_rate=0.3, **{off: False}, **SIZES))
    assert list(predictors_of(model.model)) == left
    with torch.no_grad():
        cache = model(**language_batch(ROWS[:1]), use_cache=True).past_key_values
        assert run.layer_lengths[-1] == [24 if off == "use_vision_predictor" else 12]
        for token in range(2, 12):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    grown = cache.lengths(5)[0] - run.layer_lengths[-1][0]
    assert grown < 10 if "output_text_score_predictor" in left else grown == 10


def test_new_predictors_start_as_linear_maps_of_the_model_do() -> None:
    model = tiny.language_model().bfloat16()
    pruneops.attach(model, DynamicLlava())
    for predictor in predictors_of(model.model).values():
        assert {p.dtype for p in predictor.parameters()} == {torch.bfloat16} and not predictor.training
        for module in predictor.modules():
            if isinstance(module, torch.nn.Linear):
                assert 0.1 < module.weight.float().std() < 0.2 and (module.bias is None or not module.bias.any())
            elif isinstance(module, torch.nn.LayerNorm):
                assert (module.weight == 1).all() and not module.bias.any()


def test_a_copy_of_an_attached_model_is_independent() -> None:
    model, _ = attached(tiny.llava(), WITH_INSTRUCT)
    batch = tiny.llava_batch(ROWS[:1])
    with torch.no_grad():
        expected = model(**batch).logits
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(**batch).logits, expected)
    assert not predictors_of(find_text_model(pruneops.detach(twin)))
    assert len(predictors_of(find_text_model(model))) == 3


def test_weights_go_from_one_attached_model_to_another() -> None:
    one, _ = attached(tiny.language_model())
    two = tiny.language_model(initializer_range=0.3)
    pruneops.attach(two, METHOD)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(**language_batch(ROWS)).logits, two(**language_batch(ROWS)).logits)
    broken = dict(one.state_dict())
    key = "model.image_score_predictor.transformer.1.mlp.fc1.bias"
    broken[key] = broken[key] * float("nan")
    with pytest.raises(ValueError, match=f"{key}: got weights that are NaN or infinite"):
        two.load_state_dict(broken)


def test_predictors_of_another_shape_or_method_are_refused_and_nothing_is_put_in() -> None:
    model, _ = attached(tiny.language_model())
    run = model.model._pruneops
    run.remove()
    for changed, message in (
        ({"d_model": 32}, "d_model, nhead, dim_feedforward, num_layers: got 32, 2, 24 and 2"),
        ({"nhead": 4}, "does not give the image_score_predictor"),
        ({"num_layers": 3}, "does not give the image_score_predictor"),
        ({"use_instruct_predictor": True}, "expected image_score_predictor, output_text_score_predictor, which"),
    ):
        with pytest.raises(ValueError, match=message):
            pruneops.attach(model, DynamicLlava(**{**SIZES, **changed}))
    for other in (PMoD(), PyramidDrop((2,), (0.5,))):
        keys = set(model.state_dict())
        with pytest.raises(ValueError, match="carries modules of the method 'dynamic_llava', expected none"):
            pruneops.attach(model, other)
        assert set(model.state_dict()) == keys
    pruneops.attach(model, METHOD)  # still fine
    mod = tiny.language_model()
    PMoD().prepare(mod.model)
    with pytest.raises(ValueError, match="carries modules of the method 'pmod', expected none"):
        pruneops.attach(mod, METHOD)
    assert not predictors_of(mod.model)


# -- description -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_published_values() -> None:
    assert DynamicLlava().to_official() == OFFICIAL
    assert DynamicLlava.from_official(OFFICIAL) == DynamicLlava()
    assert DynamicLlava.from_official({"model_type": "llava_llama", "sparse_config": OFFICIAL}) == DynamicLlava()
    assert (DynamicLlava().gumbel_start_tau, DynamicLlava().gumbel_end_tau) == (1.0, 0.1)


def test_official_configs_and_plain_dicts_go_round() -> None:
    method = DynamicLlava(0.35, 0.4, 8, use_instruct_predictor=True, sparse_layer=3, num_layers=1, gumbel_end_tau=0.2)
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
    again = DynamicLlava.from_official(method.to_official())
    assert again.to_official() == method.to_official() and again.gumbel_end_tau == 0.1


def test_where_questions_begin_is_saved_and_is_what_the_official_code_looks_for_in_official_models() -> None:
    method = DynamicLlava(use_instruct_predictor=True, question_start=[5, 6])
    assert method.question_start == (5, 6) and method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert hash(method) == hash(DynamicLlava(use_instruct_predictor=True, question_start=(5, 6)))
    official = DynamicLlava.from_official({**OFFICIAL, "use_instruct_predictor": True})
    assert official.question_start == (11889, 29901)  # "USER:"
    assert DynamicLlava.from_official(OFFICIAL).question_start is None


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"vision_keep_rate": 1.5}, ValueError, r"vision_keep_rate: got 1.5, expected a share in \[0, 1\]"),
        ({"instruct_keep_rate": float("nan")}, ValueError, "instruct_keep_rate: got nan"),
        ({"output_text_keep_rate": "half"}, TypeError, "output_text_keep_rate: got 'half', expected a number"),
        ({"use_vision_predictor": 1}, TypeError, "use_vision_predictor: got 1, expected a bool"),
        ({"use_vision_predictor": False, "use_text_predictor": False}, ValueError, "got no predictor"),
        ({"sparse_layer": 0}, ValueError, "sparse_layer: got 0, expected at least 1"),
        ({"sparse_layer": 2.0}, TypeError, "sparse_layer: got 2.0, expected a whole number"),
        ({"output_text_len_for_training": -1}, ValueError, "output_text_len_for_training: got -1, expected at least 0"),
        ({"d_model": 30, "nhead": 2}, ValueError, "d_model, nhead: got 30 and 2, expected a multiple of 4"),
        ({"d_model": 32, "nhead": 5}, ValueError, "d_model, nhead: got 32 and 5"),
        ({"mask_loss_weight": -1}, ValueError, "mask_loss_weight: got -1.0, expected a number of at least 0"),
        ({"gumbel_end_tau": 0}, ValueError, "gumbel_end_tau: got 0.0, expected a number above 0"),
        ({"question_start": "USER:"}, TypeError, "question_start: got 'USER:', expected a sequence of token ids"),
        ({"question_start": [1.0]}, TypeError, r"question_start: got \[1.0\], expected a sequence of token ids"),
        ({"question_start": []}, ValueError, r"question_start: got \[\], expected at least one token id"),
        ({"question_start": [3, -1]}, ValueError, r"question_start: got \[3, -1\], expected at least one token id"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DynamicLlava(**fields)


def test_what_does_not_describe_a_model_or_does_not_fit_it_is_refused() -> None:
    with pytest.raises(ValueError, match="sparse_config: got .*, expected a mapping with sparse_layer"):
        DynamicLlava.from_official({"mod_target_layers": "deep_all"})
    with pytest.raises(TypeError, match="sparse_config: got str, expected a mapping"):
        DynamicLlava.from_official("dynamic")
    model = tiny.language_model()
    with pytest.raises(ValueError, match="sparse_layer: got 6, expected at most 5: the model has 6 layers"):
        pruneops.attach(model, DynamicLlava(sparse_layer=6, **SIZES))
    assert not predictors_of(model.model)


# -- drop-in classes and their checkpoints -----------------------------------------------------------------------------


@torch.no_grad()
def test_save_and_load_keep_method_and_predictors(tmp_path: Path) -> None:
    model = trained(tiny.llava(models.LlavaForConditionalGeneration, pruning=WITH_INSTRUCT))
    model.save_pretrained(tmp_path / "saved")
    batch = tiny.llava_batch(ROWS, "left")
    again = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.pruning_run.method == WITH_INSTRUCT
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    pruneops.detach(again)
    again.save_pretrained(tmp_path / "plain")
    plain = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")
    assert plain.pruning_run is None and plain.state_dict().keys() == tiny.llava().state_dict().keys()


@torch.no_grad()
def test_a_stock_checkpoint_gets_new_predictors_and_one_that_lacks_them_is_refused(tmp_path: Path) -> None:
    tiny.llava().save_pretrained(tmp_path)
    model = models.LlavaForConditionalGeneration.from_pretrained(tmp_path, pruning=METHOD)
    predictor = find_text_model(model).image_score_predictor
    assert predictor.down_mlp[1].weight.std() > 0.05
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pruning": METHOD.to_dict()}))
    with pytest.raises(ValueError, match="no weights for 42 of the predictors' parameters"):
        models.LlavaForConditionalGeneration.from_pretrained(tmp_path)
