"""p-MoD reproduces what the official implementation computed: kept tokens, weights, logits, gradients, decoding."""

from __future__ import annotations

import ast
import dataclasses

import numpy as np
import pytest
import torch
from golden_support import GOLDENS, Golden, untrained_llama, weight_of_key
from transformers import LlamaForCausalLM

import pruneops
from pruneops import backends
from pruneops.methods import PMoD
from pruneops.pruning import Run

NAMES = sorted(path.stem for path in GOLDENS.glob("pmod_*.npz") if "config_json" in Golden(path.stem))
TRAINING = [name for name in NAMES if "loss" in Golden(name)]
DECODING = [name for name in NAMES if "decode_tokens" in Golden(name)]
TABLE = Golden("pmod_prd_table")
SCHEDULES = {
    "default": PMoD(),
    "cos_075_025": PMoD("shiftedcos_decay_0.75_0.25"),
    "lin": PMoD("shiftedlinear_decay_0.85_0.15"),
}


def official_config(golden: Golden) -> dict[str, object]:
    return {
        "mod_target_layers": golden.config["mod_target_layers"],
        "mod_target_token_type": "vision_all",
        "mod_router_factor": golden.config["factor"],
        "mod_weight_norm": golden.config["norm"],
        "mod_bias_enabled": True,
        "mod_special_init": True,
    }


def method_of(golden: Golden, parity: bool) -> PMoD:
    return dataclasses.replace(PMoD.from_official(official_config(golden)), parity=parity)


def attached_model(golden: Golden, method: PMoD) -> tuple[LlamaForCausalLM, Run]:
    """The golden's model with its recorded weights, under the official names, and the method attached to it."""
    model = untrained_llama(golden.config).eval()
    run = pruneops.attach(model, method, record=True)
    state = {}
    for key, shape, total in zip(golden["w_keys"], golden["w_shapes"], golden["w_sums"], strict=True):
        state[str(key)] = weight_of_key(str(key), tuple(ast.literal_eval(str(shape))), golden.config["seed"])
        assert state[str(key)].double().sum().item() == pytest.approx(float(total), abs=1e-6)
    assert set(model.state_dict()) == set(state)
    model.load_state_dict(state)
    return model, run


def inputs_of(golden: Golden) -> dict[str, torch.Tensor]:
    inputs = {
        "inputs_embeds": golden.tensor("inputs_embeds"),
        "attention_mask": golden.tensor("attention_mask"),
        "visual_token_mask": golden.tensor("vision_mask"),
    }
    if "labels" in golden:
        inputs["labels"] = golden.tensor("labels")
    return inputs


def decides_as_official(name: str, parity: bool) -> bool:
    """Without parity, a schedule gives the official layers if it does not depend on the depth, or the depth is 32."""
    golden = Golden(name)
    depth = golden.config["layers"]
    return list(method_of(golden, parity).keep_ratios(depth)) == golden["mod_layers"].tolist()


CASES = [(name, parity) for name in NAMES for parity in (True, False) if parity or decides_as_official(name, parity)]


@pytest.mark.parametrize(("name", "parity"), CASES)
def test_kept_tokens_weights_hidden_states_and_logits_equal_the_official_ones(name: str, parity: bool) -> None:
    golden = Golden(name)
    model, run = attached_model(golden, method_of(golden, parity))
    valid = golden["attention_mask"]
    with torch.no_grad(), backends.record_calls() as calls:
        outputs = model(**inputs_of(golden), output_hidden_states=True, use_cache=False)
    assert set(calls) and all(backend == "native" for _, backend in calls)

    ratios = run.method.keep_ratios(golden.config["layers"])
    assert list(ratios) == golden["mod_layers"].tolist()
    np.testing.assert_allclose(list(ratios.values()), golden["mod_ratios"], rtol=1e-12)
    records = {(r.layer, r.row): r for r in run.records}
    assert len(records) == len(ratios) * len(valid)
    for (layer, row), record in records.items():
        visual = golden["vision_mask"][row]
        np.testing.assert_allclose(record.scores.numpy(), golden[f"L{layer}_weight"][row, visual], atol=1e-6)
        columns = valid[row].nonzero()[0][record.kept_positions]
        kept = golden[f"L{layer}_kept"][row] | (valid[row] & ~visual)
        assert columns.tolist() == kept.nonzero()[0].tolist()
        text = int((valid[row] & ~visual).sum())
        assert len(columns) - text == golden[f"L{layer}_k"][row] == run.layer_lengths[layer][row] - text

    compared = 0
    for layer in range(golden.config["layers"] - 1):
        if f"hidden_after_layer{layer}" in golden:
            hidden = outputs.hidden_states[layer + 1].numpy()
            np.testing.assert_allclose(hidden[valid], golden[f"hidden_after_layer{layer}"][valid], atol=1e-4)
            compared += 1
    assert compared
    np.testing.assert_allclose(outputs.logits.numpy()[valid], golden["logits"][valid], atol=1e-4)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("name", TRAINING)
def test_loss_and_gradients_equal_the_official_ones(name: str, checkpointing: bool | None) -> None:
    golden = Golden(name)
    model, _ = attached_model(golden, method_of(golden, parity=True))
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    inputs = inputs_of(golden)
    embeds = inputs["inputs_embeds"].requires_grad_()
    with backends.record_calls() as calls:
        loss = model(**inputs).loss
        loss.backward()
    assert set(calls) and all(backend == "native" for _, backend in calls)
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=1e-5)
    parameters = dict(model.named_parameters())
    gradients = {key: parameters[key.removeprefix("grad:")].grad for key in golden if key.startswith("grad:")}
    gradients["grad_inputs_embeds"] = embeds.grad
    assert sum("router" in key for key in gradients) == 2 * len(golden["mod_layers"])
    for key, gradient in gradients.items():
        largest = np.abs(golden[key]).max()
        np.testing.assert_allclose(gradient.numpy(), golden[key], atol=1e-5 * max(largest, 1e-2), err_msg=key)


@pytest.mark.parametrize("name", DECODING)
@torch.no_grad()
def test_decoding_equals_the_official_logits_and_caches(name: str) -> None:
    golden = Golden(name)
    model, run = attached_model(golden, method_of(golden, parity=True))
    depth = golden.config["layers"]
    with backends.record_calls() as calls:
        outputs = model(**inputs_of(golden), use_cache=True)
        cache, logits = outputs.past_key_values, outputs.logits[:, -1]
        lengths = [cache.lengths(i)[0] for i in range(depth)]
        assert lengths == golden["cache_len_prefill"].tolist()
        routed = sum(count for (op, _), count in calls.items() if op == "router_weights")
        for step, token in enumerate(golden.tensor("decode_tokens")):
            outputs = model(input_ids=token.view(1, 1), past_key_values=cache)
            np.testing.assert_allclose(outputs.logits[0, -1].numpy(), golden["decode_logits"][step], atol=1e-4)
    assert set(calls) and all(backend == "native" for _, backend in calls)
    assert routed == len(golden["mod_layers"]) == calls["router_weights", "native"]  # a decoding step routes nothing
    assert int(logits.argmax()) == int(golden["decode_tokens"][0])
    assert [cache.lengths(i)[0] for i in range(depth)] == golden["cache_len_final"].tolist()
    last = int(golden["mod_layers"][-1])
    for ours, theirs in ((cache.layers[last].keys, "k"), (cache.layers[last].values, "v")):
        held = ours[0, : cache.lengths(last)[0]].transpose(0, 1)
        np.testing.assert_allclose(held.numpy(), golden[f"cache_{theirs}_layer{last}"][0], atol=1e-4)


@pytest.mark.parametrize("parity", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_equal_the_official_table(schedule: str, parity: bool) -> None:
    """For 32 layers the depth constant of the official code is the depth."""
    method = dataclasses.replace(SCHEDULES[schedule], parity=parity)
    ratios = method.keep_ratios(32)
    effective = TABLE[f"{schedule}_effective"]
    assert list(ratios) == [i for i in range(32) if TABLE[f"{schedule}_raw"][i] <= float(method.layers.split("_")[2])]
    np.testing.assert_allclose([ratios.get(i, 1.0) for i in range(32)], effective, rtol=0, atol=1e-15)
    for n in (576, 1000, 2880):
        counts = [method.keep_count(n, ratios[i]) if i in ratios else n for i in range(32)]
        assert counts == TABLE[f"{schedule}_k{n}"].tolist()


def test_the_default_schedule_keeps_the_published_share_of_the_cache() -> None:
    ratios = PMoD().keep_ratios(32)
    assert len(ratios) == 24 and min(ratios) == 8
    assert sum(ratios.get(i, 1.0) for i in range(32)) / 32 == pytest.approx(0.5375, abs=1e-4)
