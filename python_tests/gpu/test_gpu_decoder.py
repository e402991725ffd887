"""Tiny models that are pruned keep, predict, generate and learn on a GPU what they do on the CPU, and never wait."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, first_rehearsed, no_synchronisation, on_device, synchronisation

import pruneops
from pruneops import backends, decoder
from pruneops.methods import PyramidDrop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import dllava_models  # noqa: E402  (both lie beside the model tests)
import tiny  # noqa: E402

pytestmark = pytest.mark.gpu

DROP = PyramidDrop((2, 4), (0.5, 0.25))
ROWS = [tiny.row(3, 1, 5, seed=1), tiny.row(2, 1, 9, seed=2), tiny.row(7, 0, 3, seed=3), tiny.row(2, 2, 2, seed=4)]
STEPS = 9


def on_both(run: Callable[[Any, dict[str, torch.Tensor]], Any], side: str) -> tuple[Any, Any]:
    """What ``run(model, batch)`` gives on the device and on the CPU."""
    batch = tiny.llava_batch(ROWS, side)
    ours = run(tiny.llava().to(DEVICE), on_device(batch))
    with backends.use(backends.NATIVE):
        return ours, run(tiny.llava(), batch)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_equals_the_cpu(side, model_backend):
    used: list[set[tuple[str, str]]] = []

    def prefill(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        with pruneops.prune(model, DROP, record=True) as run, backends.record_calls() as calls:
            logits = model(**batch).logits
        used.append(set(calls))
        assert run.layer_lengths[0] != run.layer_lengths[-1], "nothing was pruned"
        return logits.cpu(), [(r.stage, r.row, r.kept_positions.tolist()) for r in run.records]

    (ours, kept), (expected, kept_cpu) = on_both(prefill, side)
    assert kept == kept_cpu
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    ops = {op for op, _ in used[0]}
    assert ops & {"select_compact", "segment_topk"} and "last_query_scores" in ops
    if model_backend == backends.TRITON:
        assert {backend for _, backend in used[0]} == {backends.TRITON}
    else:
        # The model computes in float32, which attention on tensor cores does not take.
        assert {op for op, backend in used[0] if backend != backends.NATIVE} <= {"varlen_attention"}


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_equals_the_cpu(use_cache, model_backend):
    def generate(model: Any, batch: dict[str, torch.Tensor]) -> list[list[int]]:
        with pruneops.prune(model, DROP):
            return model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=use_cache).tolist()

    ours, expected = on_both(generate, "left")
    assert ours == expected


def test_training_gradients_equal_the_cpu(model_backend):
    def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model.train()
        hidden = (batch["input_ids"] == tiny.IMAGE) | (batch["attention_mask"] == 0)
        with pruneops.prune(model, DROP):
            model(**batch, labels=torch.where(hidden, -100, batch["input_ids"])).loss.backward()
        return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}

    ours, expected = on_both(gradients, "right")
    assert ours.keys() == expected.keys() and len(ours) > 10
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- waiting


def pyramid_drop() -> Any:
    model = tiny.language_model()
    pruneops.attach(model, DROP)
    return model


def dynamic_llava() -> Any:
    return dllava_models.attached(tiny.language_model())[0]


MODELS = [pyramid_drop, dynamic_llava]


def prefill(model: Any) -> Any:
    device = next(model.parameters()).device
    batch = dllava_models.language_batch(ROWS, "left")
    return model(**{name: x.to(device) for name, x in batch.items()}, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS)
def test_prefill_waits_for_the_masks_only(make, model_kernels, monkeypatch):
    """They say how long the rows are. With ratios everything after that is known on the host."""
    model, pack = make().to(DEVICE), decoder.pack
    prefill(model)  # loads the kernels

    def reading(*args: Any) -> Any:
        with synchronisation():
            return pack(*args)

    monkeypatch.setattr(decoder, "pack", reading)
    with no_synchronisation():
        ours = prefill(model).logits
    monkeypatch.undo()
    with backends.use(backends.NATIVE):
        torch.testing.assert_close(ours.cpu(), prefill(make()).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", first_rehearsed(MODELS))
def test_decoding_does_not_wait_for_the_device(make, model_kernels):
    """Dynamic-LLaVA decides about the cache in every step: its lengths stay on the device, rows drift apart."""
    tokens = torch.randint(2, 100, (len(ROWS), STEPS), generator=torch.Generator().manual_seed(11))

    def decode(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
        cache = prefill(model).past_key_values
        model(input_ids=tokens[:, :1], past_key_values=cache)  # loads the kernels
        logits = []
        with no_synchronisation():
            for t in range(1, tokens.shape[1]):
                logits.append(model(input_ids=tokens[:, t : t + 1], past_key_values=cache).logits)
        return torch.cat(logits, 1).cpu(), [cache.lengths(i) for i in range(tiny.LAYERS)]

    ours, lengths = decode(make().to(DEVICE), on_device(tokens))
    with backends.use(backends.NATIVE):
        expected, lengths_cpu = decode(make(), tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert lengths == lengths_cpu
    if make is dynamic_llava:
        assert len({first - last for first, last in zip(lengths[0], lengths[-1], strict=True)}) > 1
