"""Checkpoints of Dynamic-LLaVA (Huang et al., "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic
Vision-language Context Sparsification", arXiv 2412.00876) as its authors publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruneops.methods import DynamicLlava
from pruneops.methods.base import PruningMethod
from pruneops.models.checkpoints.layouts import Layout, check_tensors, register
from pruneops.models.checkpoints.tensors import StoredTensor

_KEY = "sparse_config"
#: Training loads the config of plain LLaVA, whose model type is then saved; the official code has one of its own too.
_MODEL_TYPES = ("llava_llama", "dynamic_llava_llama")
_PREFIX = "model."


def _method(config: Mapping[str, Any]) -> DynamicLlava:
    if not isinstance(config[_KEY], Mapping):
        raise ValueError(f"config.json: {_KEY} is {config[_KEY]!r}, expected an object")
    return DynamicLlava.from_official(config[_KEY]).for_depth(config["num_hidden_layers"])


def _keys(method: PruningMethod, num_layers: int) -> dict[str, Any]:
    assert isinstance(method, DynamicLlava)
    return {_KEY: method.to_official()}


def _check(config: Mapping[str, Any], method: PruningMethod, tensors: Mapping[str, StoredTensor]) -> None:
    assert isinstance(method, DynamicLlava)
    wanted = {_PREFIX + name: shape for name, shape in method.predictor_shapes(config["hidden_size"]).items()}
    check_tensors(tensors, wanted, "predictors", lambda name: "_score_predictor." in name, f"{_KEY}={config[_KEY]}")


DYNAMIC_LLAVA = register(
    Layout(
        "dynamic-llava",
        DynamicLlava.name,
        _MODEL_TYPES,
        "DynamicLlavaLlamaForCausalLM",
        _method,
        _keys,
        _check,
        marker=_KEY,
    )
)
