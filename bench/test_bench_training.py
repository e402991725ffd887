"""A training step: PyramidDrop and p-MoD beside the ragged decoder that keeps everything and stock Hugging Face.

The model is small (random weights, 8 layers, hidden size 512). A step is forward, backward and AdamW on rows of 576
visual and 64 text tokens, of which 8 are an answer. What a method saves is compared with what it saves in FLOPs.
"""

from __future__ import annotations

import copy
import statistics
import time
from functools import lru_cache
from typing import Any

import pytest
import torch

import pruneops
from bench import timing
from pruneops import methods
from pruneops.methods import PMoD, PyramidDrop

VOCABULARY, VISUAL, TEXT, ANSWER = 512, 576, 64, 8
ROUNDS = 5
STOCK, KEEP_ALL = "Hugging Face, SDPA", "ragged, keep all"
METHODS = {KEEP_ALL: methods.KEEP_ALL, "PyramidDrop": PyramidDrop(), "p-MoD": PMoD()}


@lru_cache(maxsize=1)
def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def _inputs(rows: int) -> dict[str, torch.Tensor]:
    """8 text tokens, the image, and the rest of the text, whose last tokens are the answer."""
    ids = torch.randint(0, VOCABULARY, (rows, VISUAL + TEXT), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    visual = torch.zeros_like(ids, dtype=torch.bool)
    visual[:, 8 : 8 + VISUAL] = True
    return {"input_ids": ids, "labels": labels, "visual_token_mask": visual}


class _Side:
    """One way of training: its own copy of the model and its own optimizer."""

    def __init__(self, method: Any, rows: int) -> None:
        self.model = copy.deepcopy(_model())
        self.inputs = _inputs(rows)
        if method is None:
            del self.inputs["visual_token_mask"]
        else:
            self.run = pruneops.attach(self.model, method)
        # Without a rate the weights stay, and with them the loss and every choice.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def loss(self) -> torch.Tensor:
        return self.model(**self.inputs, use_cache=False).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self) -> int:
        """Bytes of activations that the forward pass keeps for the backward pass, weights not counted."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss()
        held = sum(kept.values())
        del loss
        return held


@pytest.mark.parametrize("rows", [1, 8])
def test_training_step(benchmark: Any, rows: int) -> None:
    """The sides take turns; the realised share is what a step saves of its time beside what it saves in FLOPs."""
    sides = {STOCK: _Side(None, rows), **{name: _Side(method, rows) for name, method in METHODS.items()}}
    timing.check(sides[KEEP_ALL].loss(), sides[STOCK].loss(), rtol=1e-4, atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.step()
    for turn in range(ROUNDS):
        for name in sides if turn % 2 else reversed(sides):
            begin = time.perf_counter()
            sides[name].step()
            seconds[name].append(time.perf_counter() - begin)
    table = []
    for name, side in sides.items():
        shares = [mine / dense for mine, dense in zip(seconds[name], seconds[KEEP_ALL], strict=True)]
        flops = 1.0 if name == STOCK else side.run.report().flop_ratio
        table.append(
            {
                "workload": f"{rows} x ({VISUAL} + {TEXT})",
                "side": name,
                "ms": statistics.median(seconds[name]) * 1e3,
                "time": statistics.median(shares),
                "time_low": min(shares),
                "time_high": max(shares),
                "flops": flops,
                "realised": (1 - statistics.median(shares)) / (1 - flops) if flops < 1 else None,
                "kept_bytes": side.kept_bytes(),
            }
        )
    benchmark.extra_info["training"] = table
    benchmark.pedantic(sides["PyramidDrop"].step, rounds=1, iterations=1)
