"""p-MoD: settings, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from pmod_models import ROWS, attached
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import pruneops
from pruneops.methods import PMoD, PyramidDrop, method_from_dict
from pruneops.pruning import find_text_model


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layers": "deep"}, ValueError, "layers: got 'deep', expected"),
        ({"layers": "shiftedcos_decay_1_0.15"}, ValueError, "layers: got 'shiftedcos_decay_1_0.15'"),
        ({"layers": "shiftedcos_decay_0.15_0.85"}, ValueError, "the larger one first"),
        ({"layers": "shiftedcos_decay_1.50_0.15"}, ValueError, "expected ratios"),
        ({"layers": "shiftedcos_decay_0.0_0.0"}, ValueError, "max above 0"),
        ({"layers": (2, 4)}, TypeError, "layers: got"),
        ({"router_factor": 0.0}, ValueError, "router_factor: got 0.0"),
        ({"router_factor": 1.2}, ValueError, "router_factor: got 1.2"),
        ({"router_factor": float("nan")}, ValueError, "router_factor: got nan"),
        ({"router_factor": "0.5"}, TypeError, "router_factor: got '0.5'"),
        ({"weight_norm": "relu_1_0"}, ValueError, "weight_norm: got 'relu_1_0'"),
        ({"weight_norm": "tanh_-1_0"}, ValueError, "weight_norm: got 'tanh_-1_0'"),
        ({"weight_norm": None}, TypeError, "weight_norm: got None"),
        ({"target": "vision"}, ValueError, "target: got 'vision', expected one of vision_all"),
        ({"router_bias": 1}, TypeError, "router_bias: got 1"),
        ({"base_tokens": -1}, ValueError, "base_tokens: got -1"),
        ({"base_tokens": 1.5}, ValueError, "base_tokens: got 1.5"),
    ],
    ids=str,
)
def test_fields(fields: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PMoD(**fields)


@pytest.mark.parametrize("layers", ["shiftedcos_decay_0.85_0.15", "shiftedlinear_decay_0.70_0.10"])
def test_a_shallow_model_has_no_layers_with_the_official_depth(layers: str) -> None:
    reason = "none of the model's 8 layers.*parity=True takes the depth to be 32.*pass parity=False"
    with pytest.raises(ValueError, match=reason):
        pruneops.attach(tiny.language_model(num_hidden_layers=8), PMoD(layers, parity=True))
    assert list(PMoD(layers).keep_ratios(8))


def test_a_pattern_that_selects_no_layer_leaves_the_model_alone() -> None:
    model = tiny.language_model(num_hidden_layers=3)
    for method in (PMoD("deep_all"), PMoD("shiftedlinear_decay_0.40_0.10", router_factor=1.0)):
        with pytest.raises(ValueError, match="none of the model's 3 layers"):
            pruneops.attach(model, method)
    assert all(type(layer) is LlamaDecoderLayer for layer in model.model.layers)


def test_the_depth_constant() -> None:
    """With parity 31 whatever the depth, so that 40 layers go up again at the end; without, the depth - 1."""
    official, ours = PMoD(parity=True).keep_ratios(40), PMoD().keep_ratios(40)
    assert official[38] == 0.15 and official[39] == pytest.approx(0.155517, abs=1e-6)
    assert ours[39] == 0.15 and min(ours) == 10 and min(official) == 8
    assert PMoD(parity=True).keep_ratios(32) == PMoD().keep_ratios(32)


def test_counts_are_float32_products() -> None:
    assert PMoD.keep_count(576, PMoD().keep_ratios(32)[8]) == 486
    assert PMoD.keep_count(10, 0.7) == 7 and int(0.57 * 100) == 56 and PMoD.keep_count(100, 0.57) == 57
    assert PMoD.keep_count(3, 0.15) == 0


def test_high_resolution_needs_a_model_that_has_it() -> None:
    for build in (tiny.llava, tiny.language_model):
        with pytest.raises(ValueError, match="target: got 'vision_hr' for a .*Config, expected"):
            pruneops.attach(build(), PMoD(target="vision_hr"))


def test_layers_made_of_other_parts() -> None:
    model = tiny.language_model()
    model.model.layers[3].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="got a LlamaDecoderLayer made of .*'extra'"):
        pruneops.attach(model, PMoD())
    assert all(type(layer) is LlamaDecoderLayer and "forward" not in layer.__dict__ for layer in model.model.layers)


def test_routers_of_another_method() -> None:
    model = tiny.language_model()
    PMoD().prepare(model.model)
    with pytest.raises(ValueError, match=r"layers: got 'deep_all', .*\[2, 3, 4\].*expected \[2, 3, 4, 5\]"):
        pruneops.attach(model, PMoD("deep_all"))
    with pytest.raises(ValueError, match="router_bias: got False, expected True"):
        pruneops.attach(model, PMoD(router_bias=False))


def test_nan_weights_are_refused_when_they_are_loaded_attached_or_used() -> None:
    model, _ = attached(tiny.language_model())
    ids = torch.tensor([ROWS[0]])
    broken = {k: v.clone() for k, v in model.state_dict().items()}
    broken["model.layers.3.router.router.weight"][0, 5] = math.nan
    with pytest.raises(ValueError, match="model.layers.3.router.router.weight: got weights that are NaN"):
        model.load_state_dict(broken)
    model.model.layers[3].router.router.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the router of layer 3 got or gave NaN"):
        model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE)
    model.model.layers[3].router.router.bias.data.fill_(math.inf)
    find_text_model(model)._pruneops.remove()
    with pytest.raises(ValueError, match="layers.3.router.router.bias: got weights that are NaN or infinite"):
        pruneops.attach(model, PMoD())


def test_official_configs() -> None:
    official = {
        "mod_target_layers": "shiftedcos_decay_0.85_0.15",
        "mod_target_token_type": "vision_hr",
        "mod_router_factor": 0.4,
        "mod_weight_norm": "tanh_0.2_1",
        "mod_bias_enabled": True,
        "mod_special_init": True,
    }
    method = PMoD.from_official({**official, "hidden_size": 4096, "mod_target_layer_indices": [8]})
    assert method == PMoD(target="vision_hr", router_factor=0.4, parity=True)
    assert method.to_official() == official
    least = {"mod_target_layers": "deep_all", "mod_weight_norm": "sigmoid", "mod_router_factor": None}
    least = PMoD.from_official(least)
    assert least == PMoD("deep_all", weight_norm="sigmoid", router_bias=False, zero_init=False, parity=True)
    for key in ("mod_target_layers", "mod_weight_norm"):
        with pytest.raises(ValueError, match=f"{key}: got None"):
            PMoD.from_official({**official, key: None})
    with pytest.raises(ValueError, match="layers: got 'none'"):
        PMoD.from_official({**official, "mod_target_layers": "none"})


def test_methods_to_and_from_dicts() -> None:
    method = replace(PMoD(), layers="deep_all", base_tokens=4, target="vision_hr")
    assert method_from_dict(method.to_dict()) == method
    assert PMoD().to_dict()["method"] == "pmod"


def test_another_method_does_not_run_on_layers_of_this_one() -> None:
    model = tiny.llava()
    PMoD().prepare(find_text_model(model))
    with pytest.raises(ValueError, match="model: carries modules of the method 'pmod', expected none"):
        pruneops.attach(model, PyramidDrop((2,), (0.5,)))
    PMoD().restore(find_text_model(model))
    pruneops.attach(model, PyramidDrop((2,), (0.5,)))
