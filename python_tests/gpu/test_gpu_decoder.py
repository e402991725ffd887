"""A tiny LLaVA under PyramidDrop keeps, predicts and generates on a GPU what it does on the CPU.

Ops with a compiled CUDA kernel run it, also where no GPU has proven it yet; the others run their reference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, NATIVE_OPS, on_device

import pruneops
from pruneops import backends
from pruneops.methods import PyramidDrop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import tiny  # noqa: E402  (lies beside the model tests)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_where_there_is_one")]

DROP = PyramidDrop((2, 4), (0.5, 0.25))
ROWS = [tiny.row(3, 1, 5, seed=1), tiny.row(2, 1, 9, seed=2), tiny.row(7, 0, 3, seed=3), tiny.row(2, 2, 2, seed=4)]


def on_both(side: str) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """The same model and batch on the CPU and on the device."""
    batch = tiny.llava_batch(ROWS, side)
    return [(tiny.llava(), batch), (tiny.llava().to(DEVICE), on_device(batch))]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_equals_the_cpu(side):
    results = []
    for model, batch in on_both(side):
        with pruneops.prune(model, DROP, record=True) as run, backends.record_calls() as calls:
            logits = model(**batch).logits
        results.append((logits.cpu(), [(r.stage, r.row, r.kept_positions.tolist()) for r in run.records]))
        lengths = run.layer_lengths
    (expected, kept_cpu), (ours, kept) = results
    assert kept == kept_cpu
    assert lengths[0] != lengths[-1], "nothing was pruned"
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    used = {op for op, _ in calls}
    assert used & {"select_compact", "segment_topk"} and "last_query_scores" in used
    assert [call for call in calls if call[0] in NATIVE_OPS and call[1] != backends.NATIVE] == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_equals_the_cpu(use_cache):
    sequences = []
    for model, batch in on_both("left"):
        with pruneops.prune(model, DROP):
            sequences.append(model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=use_cache).tolist())
    assert sequences[1] == sequences[0]


def test_training_gradients_equal_the_cpu():
    grads = []
    for model, batch in on_both("right"):
        model.train()
        labels = torch.where(
            (batch["input_ids"] == tiny.IMAGE) | (batch["attention_mask"] == 0), -100, batch["input_ids"]
        )
        with pruneops.prune(model, DROP):
            model(**batch, labels=labels).loss.backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    expected, ours = grads
    assert ours.keys() == expected.keys() and len(ours) > 10
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5)
