"""Whole prefills of a Llama-shaped decoder: stock Hugging Face with SDPA, beside the ragged decoder.

The model is small (random weights, 4 layers, hidden size 1024), so absolute times mean little; the ratios
show what packing and pruning save once everything around the operators is counted.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch

import pruneops
from bench import timing, workloads
from bench.conftest import Versus
from pruneops.methods import PyramidDrop

VOCABULARY = 512


@lru_cache(maxsize=1)
def _models() -> tuple[Any, Any]:
    """The same model twice, so that one can stay stock while the other is pruned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    return model, copy.deepcopy(model)


def _inputs(seqlens: tuple[int, ...], text: int = 64) -> dict[str, torch.Tensor]:
    """Left-padded rows; in each, all but ``text`` tokens are visual (8 text tokens come first)."""
    longest = max(seqlens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (len(seqlens), longest), generator=generator)
    mask = torch.zeros_like(ids)
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for row, n in enumerate(seqlens):
        mask[row, longest - n :] = 1
        visual[row, longest - n + 8 : longest - text + 8] = True
    return {"input_ids": ids, "attention_mask": mask, "visual_token_mask": visual}


@pytest.mark.parametrize("method", ["keep all", "PyramidDrop"])
@pytest.mark.parametrize(
    "work", [workloads.llava15_7b(), workloads.pllava_16f(), workloads.ragged4()], ids=lambda work: work.name
)
def test_prefill(versus: Versus, work: workloads.Workload, method: str) -> None:
    """One forward pass without cache; dense runs on the padded batch, as ``generate()`` would."""
    stock_model, pruned_model = _models()
    inputs = _inputs(work.seqlens)
    stock = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    ratios = (0.5, 0.25, 0.125) if method == "PyramidDrop" else (1.0, 1.0, 1.0)

    @torch.inference_mode()
    def dense() -> torch.Tensor:
        return stock_model(**stock, use_cache=False, logits_to_keep=1).logits

    @torch.inference_mode()
    def ragged() -> torch.Tensor:
        return pruned_model(**inputs, use_cache=False, logits_to_keep=1).logits

    def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        if method == "keep all":
            timing.check(ours, theirs, rtol=1e-3, atol=1e-3)
        else:
            assert ours.shape == theirs.shape and bool(ours.isfinite().all())

    with pruneops.prune(pruned_model, PyramidDrop(keep_ratios=ratios)):
        versus(
            ragged,
            dense,
            op=f"prefill, {method}",
            workload=f"{work.name} {list(work.seqlens)}, 4 layers of 1024",
            peer_name="Hugging Face Llama, SDPA, padded",
            same=same,
        )
