"""Loads the golden files and rebuilds the tiny models that they were recorded with."""

from __future__ import annotations

import json
import zlib
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
        recorded = self._arrays["config_json"] if "config_json" in self._arrays.files else "{}"
        self.config: dict[str, Any] = json.loads(str(recorded))

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


def weight_of_key(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A weight drawn from the recorded seed and its own name, whatever other weights there are."""
    draw = np.random.RandomState(zlib.crc32(key.encode()) ^ seed).standard_normal(shape)
    if key.endswith("bias"):
        draw *= 0.1
    elif len(shape) == 1:  # norms
        draw = 1.0 + 0.1 * draw
    elif not key.endswith("embed_tokens.weight"):
        draw = (0.5 if "router.router" in key else 1.0) * draw / np.sqrt(shape[1])
    return torch.from_numpy(draw.astype(np.float32))


def llama_model(config: dict[str, Any]) -> LlamaForCausalLM:
    """The bare language model of a golden, with its recorded weights."""
    model = untrained_llama(config)
    model.load_state_dict(llama_state(config))
    return model.eval()


def untrained_llama(config: dict[str, Any]) -> LlamaForCausalLM:
    """A language model of a golden's sizes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab"],
            hidden_size=config["hidden"],
            intermediate_size=config["inter"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            num_key_value_heads=config.get("kv_heads", config["heads"]),
            rms_norm_eps=config.get("rms_eps", 1e-5),
            rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
            max_position_embeddings=4096,
            attention_bias=False,
            tie_word_embeddings=False,
        )
    )
