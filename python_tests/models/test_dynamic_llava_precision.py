"""Dynamic-LLaVA in bfloat16 and under autocast: the same counts, and losses and gradients near those of float32."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny
import torch
from dllava_models import KEPT_OF_16, KEPT_OF_32, ROWS, WITH_INSTRUCT, attached, language_batch
from test_dynamic_llava_training import TRAINED, chat_batch
from torch import Tensor, nn

from pruneops.methods.dynamic_llava import predictors_of

PRECISIONS = pytest.mark.parametrize("precision", ["bfloat16", "autocast"])


def model_in(precision: str, method: Any) -> tuple[nn.Module, Any, Any]:
    """The model and its run, and the context to call it in."""
    model, run = attached(tiny.language_model(), method, record=True)
    if precision == "bfloat16":
        model.bfloat16()
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
    return model, run, autocast


def near(ours: Tensor, expected: Tensor) -> float:
    """The cosine of the angle between them."""
    return nn.functional.cosine_similarity(ours.double().flatten(), expected.double().flatten(), dim=0).item()


def decided(tokens: int, generator: torch.Generator) -> Tensor:
    """Noise ``(tokens, 2)`` that is stronger than the logits."""
    signs = torch.randn((tokens, 1), generator=generator).sign()
    return 15 * signs * torch.tensor([1.0, -1.0])


@PRECISIONS
@torch.no_grad()
def test_counts_of_a_prompt_are_exact_and_its_cache_grows_by_whole_tokens(precision: str) -> None:
    model, run, context = model_in(precision, WITH_INSTRUCT)
    with context:
        cache = model(**language_batch(ROWS, "left"), use_cache=True).past_key_values
        images = [record for record in run.records if not record.stage]
        assert [len(record.kept_positions) for record in images] == [
            8 + KEPT_OF_16,
            11 + KEPT_OF_16,
            10,
            6 + KEPT_OF_32,
        ]
        assert run.trace.kv_lengths == [cache.lengths(i) for i in range(tiny.LAYERS)]
        full, sparse = cache.lengths(0), cache.lengths(5)
        for token in range(2, 12):
            logits = model(input_ids=torch.full((4, 1), token), past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.layers[5].keys.dtype == cache.layers[0].keys.dtype == torch.bfloat16
    assert cache.lengths(0) == [n + 10 for n in full]
    grown = [n - m for n, m in zip(cache.lengths(5), sparse, strict=True)]
    assert all(0 <= n <= 10 for n in grown) and 0 < sum(grown) < 40


@PRECISIONS
@torch.no_grad()
def test_the_loss_of_an_evaluation_is_near_that_of_float32(precision: str) -> None:
    batch, losses = chat_batch("left"), []
    for kind in ("float32", precision):
        model, run, context = model_in(kind, WITH_INSTRUCT)
        for predictor in predictors_of(model.model).values():  # decisions that rounding does not turn
            predictor.output_mlp[-1].bias[0] += 100
        with context:
            losses.append(model(**batch).loss.item())
        assert run.layer_lengths[-1] == [15 + KEPT_OF_16, 13 + KEPT_OF_32, 16, 4 + KEPT_OF_16]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@PRECISIONS
def test_loss_and_gradients_of_training_are_near_those_of_float32(precision: str) -> None:
    batch, results = chat_batch("right"), []
    for kind in ("float32", precision):
        model, run, context = model_in(kind, TRAINED)
        for seed, predictor in enumerate(predictors_of(model.train().model).values()):
            # Decisions that rounding does not turn, with a gradient nevertheless.
            generator = torch.Generator().manual_seed(seed)
            predictor.noise = lambda shape, device, g=generator: decided(shape[0], g)
            predictor.gumbel_tau = 20.0
        with context:
            loss = model(**batch).loss
        loss.backward()
        kept = [record.kept_positions.tolist() for record in run.records]
        results.append((loss.item(), kept, {name: p.grad for name, p in model.named_parameters()}))
    (expected, kept, theirs), (loss, kept_too, ours) = results
    assert kept_too == kept
    assert loss == pytest.approx(expected, rel=0.02)
    for name, gradient in ours.items():
        assert gradient.isfinite().all() and gradient.any(), name
    together = [torch.cat([g.double().flatten() for g in grads.values()]) for grads in (ours, theirs)]
    assert near(*together) > 0.99
    for part in ("image_score", "output_text_score", "instruct_score"):
        of_part = [torch.cat([g.double().flatten() for n, g in x.items() if part in n]) for x in (ours, theirs)]
        assert near(*of_part) > 0.95, part
