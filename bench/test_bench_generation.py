"""Long generation: Dynamic-LLaVA beside the ragged decoder that keeps everything and stock Hugging Face with SDPA.

The model is small (random weights, 4 layers, hidden size 256) and the text predictor is shifted so that it keeps about
half of the tokens, so absolute times mean little; what counts is how memory and time grow with the length. The tokens
are given instead of sampled, the same for all sides, and the sides take turns of `TURN` steps.
"""

from __future__ import annotations

import copy
import statistics
import time
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import pruneops
from bench import timing
from pruneops.cache import RaggedCache
from pruneops.methods import DynamicLlava, PyramidDrop

VOCABULARY, LAYERS, HEADS, HEAD_DIM = 512, 4, 4, 64
VISUAL, TEXT = 576, 64
LENGTHS = (1024, 2048, 4096)
TURN = 64
CHECKED = 96
METHOD = DynamicLlava(d_model=64, nhead=2, dim_feedforward=256)
OURS, KEEP_ALL, STOCK = "Dynamic-LLaVA", "ragged, keep all", "Hugging Face, SDPA, DynamicCache"


@lru_cache(maxsize=1)
def _models() -> dict[str, Any]:
    """The same model three times: with predictors, with nothing to prune, and stock."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    stock = LlamaForCausalLM(config).eval()
    ours, keep_all = copy.deepcopy(stock), copy.deepcopy(stock)
    pruneops.attach(keep_all, PyramidDrop(keep_ratios=(1.0, 1.0, 1.0)))
    pruneops.attach(ours, METHOD)
    _keep_about_half(ours)
    return {OURS: ours, KEEP_ALL: keep_all, STOCK: stock}


@torch.no_grad()
def _keep_about_half(model: Any) -> None:
    """Shift the text predictor by the median of its margins on generated tokens."""
    last = model.model.output_text_score_predictor.output_mlp[-1]
    margins: list[Tensor] = []
    handle = last.register_forward_hook(lambda _module, _inputs, logits: margins.append(logits[:, 0] - logits[:, 1]))
    for batch in (1, 2):
        Side(OURS, model, batch).feed(_tokens(batch, 256, seed=8))
    handle.remove()
    last.bias[0] -= torch.cat(margins).median()


def _tokens(batch: int, count: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


class Side:
    """One model with the cache of a prompt, fed token by token."""

    def __init__(self, name: str, model: Any, batch: int, seed: int = 0) -> None:
        self.name, self.model = name, model
        self.seconds: list[float] = []
        self.growths = self.copied = 0
        inputs = {"input_ids": _tokens(batch, VISUAL + TEXT, seed)}
        if name != STOCK:
            visual = torch.zeros(batch, VISUAL + TEXT, dtype=torch.bool)
            visual[:, TEXT // 2 : TEXT // 2 + VISUAL] = True
            inputs["visual_token_mask"] = visual
        with torch.inference_mode():
            self.cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        self._slots = self._held()
        self.prompt = self.lengths()

    def _held(self) -> list[Tensor]:
        return [slots for layer in self.cache.layers for slots in (layer.keys, layer.values)]

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Time a step a column; return the last logits. New tensors in the cache are counted outside the time."""
        for token in tokens.split(1, dim=1):
            begin = time.perf_counter()
            logits = self.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits
            self.seconds.append(time.perf_counter() - begin)
            held = self._held()
            replaced = [old for old, new in zip(self._slots, held, strict=True) if old is not new]
            self.growths += len(replaced)
            self.copied += sum(old.numel() * old.element_size() for old in replaced)
            self._slots = held
        return logits

    def lengths(self) -> list[int]:
        """Tokens that the layers hold, summed over the rows."""
        if isinstance(self.cache, RaggedCache):
            return [sum(self.cache.lengths(i)) for i in range(LAYERS)]
        return [layer.keys.shape[0] * layer.keys.shape[2] for layer in self.cache.layers]

    def row(self, first: Side) -> dict[str, Any]:
        """What the steps so far have cost, beside those of the side that the ratios are of."""
        steps, quarter = len(self.seconds), len(self.seconds) // 4
        held = sum(slots.numel() * slots.element_size() for slots in self._slots)
        batch = self._slots[0].shape[0]
        turns = [
            sum(self.seconds[t : t + TURN]) / sum(first.seconds[t : t + TURN]) for t in range(0, steps - TURN + 1, TURN)
        ]
        return {
            "workload": f"{batch} x ({VISUAL + TEXT} + {steps})",
            "side": self.name,
            "kept": (self.lengths()[-1] - self.prompt[-1]) / (batch * steps),
            "used": self.cache.nbytes() if isinstance(self.cache, RaggedCache) else held,
            "allocated": held,
            "growths": self.growths / len(self._slots),
            "copied": self.copied / steps,
            "ms": sum(self.seconds) / steps * 1e3,
            "quarters": statistics.median(self.seconds[-quarter:]) / statistics.median(self.seconds[:quarter]),
            "ratio": sum(self.seconds) / sum(first.seconds),
            "ratio_low": min(turns),
            "ratio_high": max(turns),
        }


def _check(batch: int) -> None:
    """Lengths and logits of a short generation, before anything is timed."""
    sides = {name: Side(name, model, batch) for name, model in _models().items()}
    predictor = sides[OURS].model.model.output_text_score_predictor
    kept: list[int] = []
    handle = predictor.register_forward_hook(
        lambda _module, _inputs, logits: kept.append(int((logits[:, 0] > logits[:, 1]).sum()))
    )
    logits = {name: side.feed(_tokens(batch, CHECKED, seed=1)) for name, side in sides.items()}
    handle.remove()
    timing.check(logits[KEEP_ALL], logits[STOCK], rtol=1e-3, atol=1e-3)
    assert bool(logits[OURS].isfinite().all())
    whole = [batch * (VISUAL + TEXT + CHECKED)] * LAYERS
    assert sides[KEEP_ALL].lengths() == sides[STOCK].lengths() == whole
    sparse = METHOD.sparse_layer
    prompt = batch * (TEXT + int(VISUAL * METHOD.vision_keep_rate))
    assert len(kept) == CHECKED and 0 < sum(kept) < batch * CHECKED
    assert sides[OURS].lengths() == whole[:sparse] + [prompt + sum(kept)] * (LAYERS - sparse)


@pytest.mark.parametrize("batch", [1, 2])
def test_generation(benchmark: Any, batch: int) -> None:
    """4096 new tokens behind a prompt with an image; 1024 and 2048 are looks at the same run."""
    _check(batch)

    def generate() -> list[dict[str, Any]]:
        sides = [Side(name, model, batch) for name, model in _models().items()]
        rows = []
        for turn, tokens in enumerate(_tokens(batch, LENGTHS[-1], seed=2).split(TURN, dim=1), start=1):
            for side in sides if turn % 2 else sides[::-1]:
                side.feed(tokens)
            if turn * TURN in LENGTHS:
                rows += [side.row(sides[0]) for side in sides]
        return rows

    benchmark.extra_info["generation"] = benchmark.pedantic(generate, rounds=1, iterations=1)
