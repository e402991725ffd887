"""The memory of a long generation with Dynamic-LLaVA: what the cache holds, and how often it is copied."""

from __future__ import annotations

import pytest
import tiny
import torch
from dllava_models import KEPT_OF_16, KEPT_OF_32, METHOD, ROWS, attached, language_batch
from torch import Tensor, nn

from pruneops.cache import RaggedCache

STEPS = 500
SPARSE = METHOD.sparse_layer
#: Shifts of the keep logit that make the text predictor drop all, about half, and none of the new tokens.
SHIFTS = {"none": -1e3, "about half": 0.0, "all": 1e3}


def slots_of(cache: RaggedCache) -> list[Tensor]:
    return [slots for layer in cache.layers for slots in (layer.keys, layer.values)]


@torch.no_grad()
def generated(share: str) -> tuple[RaggedCache, list[int], list[list[int]]]:
    """Feed `STEPS` tokens to each of two rows.

    Returns the cache, the tokens that the predictor wanted of each row, and for each tensor of the cache its bytes
    after the prompt and whenever it was replaced.
    """
    model, _ = attached(tiny.language_model(max_position_embeddings=1024))
    predictor = model.model.output_text_score_predictor
    predictor.output_mlp[-1].bias[0] += SHIFTS[share]
    cache = model(**language_batch([ROWS[0], ROWS[3]]), use_cache=True).past_key_values
    wanted = torch.zeros(2, dtype=torch.int64)

    def count(_module: nn.Module, _inputs: tuple[Tensor], logits: Tensor) -> None:
        wanted.add_(logits[:, 0] > logits[:, 1])

    predictor.register_forward_hook(count)
    held = slots_of(cache)  # alive until they are compared, so that no address comes twice
    sizes = [[slots.nbytes] for slots in held]
    tokens = torch.randint(2, 100, (2, STEPS), generator=torch.Generator().manual_seed(3))
    for t in range(STEPS):
        model(input_ids=tokens[:, t : t + 1], past_key_values=cache)
        now = slots_of(cache)
        for history, old, new in zip(sizes, held, now, strict=True):
            if new.data_ptr() != old.data_ptr():
                history.append(new.nbytes)
        held = now
    return cache, wanted.tolist(), sizes


@pytest.mark.parametrize("share", SHIFTS)
def test_used_bytes_follow_the_share_of_tokens_kept(share: str) -> None:
    cache, wanted, _ = generated(share)
    low, high = {"none": (0, 0), "about half": (0.3, 0.7), "all": (1, 1)}[share]
    assert all(low * STEPS <= n <= high * STEPS for n in wanted)
    text = len(ROWS[0]) - 16, len(ROWS[3]) - 32
    whole = [len(ROWS[0]) + STEPS, len(ROWS[3]) + STEPS]
    sparse = [t + kept + n for t, kept, n in zip(text, (KEPT_OF_16, KEPT_OF_32), wanted, strict=True)]
    assert [cache.lengths(i) for i in range(tiny.LAYERS)] == [whole] * SPARSE + [sparse] * (tiny.LAYERS - SPARSE)
    token = 2 * tiny.TEXT["num_key_value_heads"] * 8 * 4  # keys and values, 8 channels a head, float32
    assert cache.nbytes() == token * (SPARSE * sum(whole) + (tiny.LAYERS - SPARSE) * sum(sparse))
    # Allocated is that of the longest row, rounded up to a block, and up to half as much again.
    most = [64 + 1.5 * max(lengths) + 64 for lengths in (whole, sparse)]
    assert cache.nbytes(used=False) <= 2 * token * (SPARSE * most[0] + (tiny.LAYERS - SPARSE) * most[1])


@pytest.mark.parametrize("share", SHIFTS)
def test_a_layer_is_copied_when_its_slots_run_out_and_then_grows_by_half(share: str) -> None:
    _, _, sizes = generated(share)
    for history in sizes:
        assert all(new >= 1.5 * old for old, new in zip(history, history[1:], strict=False))
        # All the copies together move less than twice what the layer can hold in the end.
        assert sum(history[:-1]) < 2 * history[-1]
    grown = [len(history) - 1 for history in sizes]
    full = 5  # 64 to 128, 192, 320, 512 and 768 slots; half of the tokens stop at 320
    sparse = {"none": 0, "about half": 3, "all": full}[share]
    assert grown == [full] * 2 * SPARSE + [sparse] * 2 * (tiny.LAYERS - SPARSE)
