"""Checkpoints of p-MoD (Zhang et al., "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay",
arXiv 2412.04449) as its authors publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruneops.methods import PMoD
from pruneops.methods.base import PruningMethod
from pruneops.models.checkpoints.layouts import Layout, check_tensors, register
from pruneops.models.checkpoints.tensors import StoredTensor

_KEY = "mod_target_layers"


def _method(config: Mapping[str, Any]) -> PMoD:
    if config.get(_KEY) is None:
        raise ValueError(f"config.json: got no {_KEY}, expected the schedule of a p-MoD checkpoint")
    method = PMoD.from_official(config)
    layers = sorted(method.keep_ratios(config["num_hidden_layers"]))
    recorded = config.get("mod_target_layer_indices")
    if recorded is not None and sorted(recorded) != layers:
        raise ValueError(
            f"config.json: mod_target_layer_indices is {list(recorded)}, but {_KEY}={config[_KEY]!r} gives {layers} "
            f"for {config['num_hidden_layers']} layers"
        )
    return method


def _keys(method: PruningMethod, num_layers: int) -> dict[str, Any]:
    assert isinstance(method, PMoD)
    keys = method.to_official()
    ratios = method.keep_ratios(num_layers)
    if PMoD.from_official(keys).keep_ratios(num_layers) != ratios:
        raise ValueError(
            f"pruning: the official code takes 31 for the depth of every model, so it would run these {num_layers} "
            "layers with other ratios than it was trained with; only PMoD(parity=True), or 32 layers, can be converted"
        )
    return {**keys, "mod_target_layer_indices": sorted(ratios)}


def _check(config: Mapping[str, Any], method: PruningMethod, tensors: Mapping[str, StoredTensor]) -> None:
    assert isinstance(method, PMoD)
    wanted = {}
    for layer in sorted(method.keep_ratios(config["num_hidden_layers"])):
        wanted[f"model.layers.{layer}.router.router.weight"] = (1, config["hidden_size"])
        if method.router_bias:
            wanted[f"model.layers.{layer}.router.router.bias"] = (1,)
    reason = f"{_KEY}={method.layers!r} and mod_bias_enabled={method.router_bias}"
    check_tensors(tensors, wanted, "routers", lambda name: ".router." in name, reason)


PMOD = register(Layout("pmod", PMoD.name, ("pmod_llava_llama",), "PmodLlavaLlamaForCausalLM", _method, _keys, _check))
