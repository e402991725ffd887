"""Loads the golden files and rebuilds the tiny models that they were recorded with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

GOLDENS = Path(__file__).parent / "goldens"


class Golden:
    """One golden file: arrays by name, and `config`."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(GOLDENS / f"{name}.npz")
        self.config: dict[str, Any] = json.loads(str(self._arrays["config_json"]))

    def __contains__(self, key: str) -> bool:
        return key in self._arrays.files

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays.files)

    def tensor(self, key: str) -> torch.Tensor:
        array = self._arrays[key]
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)


def llama_state(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights drawn from the recorded seed: tensors in sorted name order from one PCG64 generator."""
    hidden, inter, vocab = config["hidden"], config["inter"], config["vocab"]
    kv = config["kv_heads"] * (hidden // config["heads"])
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    per_layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in range(config["layers"]):
        for name, shape in per_layer.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    generator = np.random.default_rng(config["wseed"])
    state = {}
    for name in sorted(shapes):
        draw = generator.standard_normal(size=shapes[name])
        if len(shapes[name]) == 1:
            draw = 1.0 + 0.1 * draw
        elif "embed_tokens" not in name:
            draw = config["gain"] / np.sqrt(shapes[name][1]) * draw
        state[name] = torch.from_numpy(draw.astype(np.float32))
    return state


def llama_model(config: dict[str, Any]) -> LlamaForCausalLM:
    """The bare language model of a golden, with its recorded weights."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab"],
            hidden_size=config["hidden"],
            intermediate_size=config["inter"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            num_key_value_heads=config["kv_heads"],
            rms_norm_eps=config["rms_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            max_position_embeddings=4096,
            attention_bias=False,
            tie_word_embeddings=False,
        )
    )
    model.load_state_dict(llama_state(config))
    return model.eval()
