"""PyramidDrop reproduces what the official implementation computed: kept tokens, logits, losses, decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_support import GOLDENS, Golden, llama_model

import pruneops
from pruneops import backends
from pruneops.methods import PyramidDrop

NAMES = sorted(path.stem for path in GOLDENS.glob("pdrop_*.npz"))
TRAINING = [name for name in NAMES if Golden(name).config["training"]]
DECODING = [name for name in NAMES if "decode_tokens" in Golden(name)]


def method_of(golden: Golden) -> PyramidDrop:
    return PyramidDrop(tuple(golden.config["layer_list"]), tuple(golden.config["ratio_list"]))


def inputs_of(golden: Golden) -> dict[str, torch.Tensor]:
    """Embeddings, right-padding mask, visual mask and, if recorded, labels of the merged batch."""
    embeds = golden.tensor("inputs_embeds")
    batch, length = embeds.shape[:2]
    columns = torch.arange(length)
    first, count = golden.tensor("image_token_posi"), golden.tensor("image_tokens")
    visual = (first[:, None] >= 0) & (columns >= first[:, None]) & (columns < (first + count)[:, None])
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": (columns < golden.tensor("valid_len0")[:, None]).long(),
        "visual_token_mask": visual,
    }
    if "labels_merged" in golden:
        inputs["labels"] = golden.tensor("labels_merged")
    assert visual.shape == (batch, length)
    return inputs


@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens_scores_and_logits_equal_the_official_ones(name: str) -> None:
    golden = Golden(name)
    model = llama_model(golden.config).train(golden.config["training"])
    with pruneops.prune(model, method_of(golden), record=True) as run, backends.record_calls() as calls:
        outputs = model(**inputs_of(golden), use_cache=False)
    assert set(calls) and all(backend == "native" for _, backend in calls)

    records = {(r.stage, r.row): r for r in run.records}
    compared = 0
    for stage, layer in enumerate(golden.config["layer_list"]):
        for row in range(len(golden["valid_len0"])):
            record = records[stage, row]
            assert record.layer == layer
            if f"s{stage}_row{row}_kept_abs" not in golden:
                assert record.scores.numel() == 0
                assert record.kept_positions.tolist() == list(range(int(golden["valid_len0"][row])))
                continue
            assert record.kept_positions.tolist() == golden[f"s{stage}_row{row}_kept_abs"].tolist()
            np.testing.assert_allclose(record.scores.numpy(), golden[f"s{stage}_row{row}_scores"], atol=1e-6)
            compared += 1
    assert compared >= len(golden.config["layer_list"])

    last = len(golden.config["layer_list"]) - 1
    for row in range(len(golden["valid_len0"])):
        kept = records[last, row].kept_positions
        expected = golden["logits"][row, : len(kept)]
        np.testing.assert_allclose(outputs.logits[row, kept].detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("name", TRAINING)
def test_loss_and_gradients_equal_the_official_ones(name: str) -> None:
    golden = Golden(name)
    model = llama_model(golden.config).train()
    with pruneops.prune(model, method_of(golden)):
        loss = model(**inputs_of(golden)).loss
        loss.backward()
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=1e-5)
    norms = {k.removeprefix("gradnorm_"): float(golden[k]) for k in golden if k.startswith("gradnorm_")}
    assert norms
    largest = max(norms.values())
    parameters = dict(model.named_parameters())
    for name_, norm in norms.items():
        assert parameters[name_].grad.norm().item() == pytest.approx(norm, abs=1e-5 * largest), name_


@pytest.mark.parametrize("name", DECODING)
def test_decoding_equals_the_official_logits_lengths_and_positions(name: str) -> None:
    golden = Golden(name)
    model = llama_model(golden.config)
    seen: list[list[int]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen[-1].append(int(kwargs["position_ids"].max())), with_kwargs=True
        )
    with torch.no_grad(), pruneops.prune(model, method_of(golden)):
        seen.append([])
        outputs = model(**inputs_of(golden), use_cache=True)
        cache = outputs.past_key_values
        lengths = [cache.lengths(i)[0] for i in range(len(model.model.layers))]
        assert lengths == golden["kv_len_prefill"].tolist()
        keys = cache.layers[-1].keys[0, : lengths[-1]].transpose(0, 1)
        np.testing.assert_allclose(keys.numpy(), golden["kv_key_layer_last"][0], atol=1e-4)
        for step, token in enumerate(golden.tensor("decode_tokens")):
            if step == 0:
                logits = outputs.logits[:, -1]
            assert int(logits.argmax()) == int(token)
            seen.append([])
            logits = model(input_ids=token.view(1, 1), past_key_values=cache).logits[:, -1]
            np.testing.assert_allclose(logits[0].numpy(), golden["decode_logits"][step], atol=1e-4)
            assert seen[-1] == golden["decode_pos_per_layer"][step].tolist()
    assert [cache.lengths(i)[0] for i in range(len(model.model.layers))] == golden["kv_len_after_decode"].tolist()
