"""Dynamic-LLaVA reproduces what the official implementation computed: predictors, kept tokens, decoding, training."""

from __future__ import annotations

import ast
import json

import numpy as np
import pytest
import torch
from golden_support import GOLDENS, Golden, untrained_llama, weight_of_key
from transformers import LlamaForCausalLM

import pruneops
from pruneops import backends
from pruneops.methods import DynamicLlava
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.pruning import Run

NAMES = sorted(path.stem for path in GOLDENS.glob("dllava_*.npz"))
DECODING = [name for name in NAMES if "step0_tokens" in Golden(name)]


def attached_model(golden: Golden) -> tuple[LlamaForCausalLM, Run]:
    """The golden's model with its recorded weights, under the official names, and the method attached to it."""
    config = {**golden.config, "kv_heads": golden.config.get("kv", golden.config["heads"])}
    model = untrained_llama(config).eval()
    run = pruneops.attach(model, DynamicLlava.from_official(config["sparse"]), record=True)
    shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    if "w_keys" in golden:
        recorded = zip(golden["w_keys"], golden["w_shapes"], strict=True)
        assert shapes == {str(key): tuple(ast.literal_eval(str(shape))) for key, shape in recorded}
    state = {key: weight_of_key(key, shape, config["seed"]) for key, shape in shapes.items()}
    for key, total in zip(golden["w_keys"], golden["w_sums"], strict=True) if "w_sums" in golden else ():
        assert state[str(key)].double().sum().item() == pytest.approx(float(total), abs=1e-6)
    model.load_state_dict(state)
    return model, run


def segments_of(golden: Golden) -> list[dict[str, list[int]]]:
    return json.loads(str(golden["indices_json"]))


def visual_mask(golden: Golden) -> torch.Tensor:
    mask = torch.zeros(golden["inputs_embeds"].shape[:2], dtype=torch.bool)
    for row, segments in zip(mask, segments_of(golden), strict=True):
        row[slice(*segments["image"])] = True
    return mask


@torch.no_grad()
def test_predictors_and_the_image_tokens_kept_equal_the_official_ones() -> None:
    golden = Golden("dllava_fn_predictors")
    model, run = attached_model(golden)
    batch, tokens, hidden = golden["x_shape"].tolist()
    draw = np.random.RandomState(int(golden["x_seed"])).standard_normal((batch, tokens, hidden))
    x = torch.from_numpy(draw.astype(np.float32))
    logits = model.model.image_score_predictor(x.view(-1, hidden), [tokens] * batch).view(batch, tokens, 2)
    np.testing.assert_allclose(logits.numpy(), golden["image_logits"], atol=1e-5)
    text = golden["text_logits_first40"]
    ours = model.model.output_text_score_predictor(x[:, : text.shape[1]].reshape(-1, hidden)).view(text.shape)
    np.testing.assert_allclose(ours.numpy(), text, atol=1e-5)
    # The same tokens before the sparse layer of a model, with layers before it that change nothing.
    for layer in model.model.layers[: run.method.sparse_layer]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model(inputs_embeds=x, visual_token_mask=torch.ones(batch, tokens, dtype=torch.bool))
    assert [record.kept_positions.tolist() for record in run.records] == golden["keep_index"].tolist()
    assert run.layer_lengths == [[tokens] * batch] * 2 + [[golden["keep_index"].shape[1]] * batch] * 4


@pytest.mark.parametrize("name", DECODING)
@torch.no_grad()
def test_prompt_and_decoding_equal_the_official_decisions_logits_and_caches(name: str) -> None:
    golden = Golden(name)
    model, run = attached_model(golden)
    method, depth, rows = run.method, golden.config["layers"], range(len(golden["attention_mask"]))
    judged: list[torch.Tensor] = []
    with backends.record_calls() as calls:
        outputs = model(
            inputs_embeds=golden.tensor("inputs_embeds"),
            attention_mask=golden.tensor("attention_mask"),
            visual_token_mask=visual_mask(golden),
            use_cache=True,
            output_hidden_states=True,
        )
        cache = outputs.past_key_values
        stages = {}  # the latest stage of every row
        for record in run.records:
            stages[record.row] = record.kept_positions
            if not record.stage:
                scores = golden.tensor("image_predictor_logits")[record.row].log_softmax(-1)[:, 0]
                torch.testing.assert_close(record.scores, scores, atol=1e-5, rtol=0)
        for row in rows:
            kept = stages[row]
            assert kept.tolist() == golden["position_ids_after"][row].tolist()
            ours = outputs.logits[row, kept].numpy()
            np.testing.assert_allclose(ours, golden["prefill_logits"][row], atol=1e-4)
            for layer in range(method.sparse_layer, depth - 1):
                if f"prefill_hidden_after_layer{layer}" in golden:
                    hidden = outputs.hidden_states[layer + 1][row, kept].numpy()
                    np.testing.assert_allclose(hidden, golden[f"prefill_hidden_after_layer{layer}"][row], atol=1e-4)
        assert [cache.lengths(i)[0] for i in range(depth)] == golden["cache_len_prefill"].tolist()

        model.model.output_text_score_predictor.register_forward_hook(lambda *call: judged.append(call[2]))
        compared, before = 0, cache.lengths(depth - 1)
        for step, lengths in enumerate(golden["true_cache_lens_per_step"]):
            # Behind the zeros in the cache of a shorter row the official code computes something else.
            if len(set(before)) > 1:
                break
            outputs = model(input_ids=golden.tensor(f"step{step}_tokens"), past_key_values=cache)
            np.testing.assert_allclose(outputs.logits.numpy(), golden[f"step{step}_logits"], atol=1e-4)
            np.testing.assert_allclose(judged[-1].numpy(), golden[f"step{step}_predictor_logits"][:, 0], atol=1e-4)
            assert [cache.lengths(i) for i in range(depth)] == lengths.tolist()
            kept = (np.array(cache.lengths(depth - 1)) - before).tolist()
            assert kept == golden[f"step{step}_decision"][:, 0].astype(int).tolist()
            compared, before = compared + 1, cache.lengths(depth - 1)
    assert compared >= 3
    assert set(calls) and all(backend == "native" for _, backend in calls)
    if compared == len(golden["true_cache_lens_per_step"]):
        last = cache.layers[depth - 1]
        for ours, theirs in ((last.keys, "k"), (last.values, "v")):
            for row in rows:
                held = ours[row, : before[row]].transpose(0, 1).numpy()
                np.testing.assert_allclose(held, golden[f"final_cache_{theirs}_layer{depth - 1}"][row], atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if "step_lengths" in Golden(name)])
@torch.no_grad()
def test_without_a_cache_what_is_kept_and_the_logits_equal_the_official_ones(name: str) -> None:
    """But for the first step, where the official code has the last prompt token twice."""
    golden = Golden(name)
    model, run = attached_model(golden)
    prompt, visual = golden.tensor("inputs_embeds"), visual_mask(golden)
    generated = model.model.embed_tokens(golden.tensor("generated_tokens"))
    for n in golden["step_lengths"].tolist():
        inputs = torch.cat([prompt, generated[:, :n]], 1)
        outputs = model(inputs_embeds=inputs, visual_token_mask=visual, use_cache=False, output_hidden_states=True)
        kept = {record.row: record.kept_positions for record in run.records}
        for row, positions in kept.items():
            expected = golden[f"n{n}_position_ids_after"][row]
            assert positions.tolist() == expected[: len(expected) - (n == 0)].tolist()
            assert int((positions < prompt.shape[1]).sum()) == golden[f"n{n}_answer_start"]
            if n:
                sparse = run.method.sparse_layer
                hidden = outputs.hidden_states[sparse + 1][row, positions].numpy()
                np.testing.assert_allclose(hidden, golden[f"n{n}_hidden_after_layer{sparse}"][row], atol=1e-4)
                ours = outputs.logits[row, positions].numpy()
                np.testing.assert_allclose(ours, golden[f"n{n}_logits"][row], atol=1e-4)


TRAINING = [name for name in NAMES if "loss" in Golden(name)]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("name", TRAINING)
def test_policy_loss_and_gradients_equal_the_official_ones(name: str, checkpointing: bool | None) -> None:
    golden = Golden(name)
    model, run = attached_model(golden)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    segments, predictors = segments_of(golden), predictors_of(model.model)
    ranges = {"image_score_predictor": "image", "output_text_score_predictor": "answer"}
    ranges["instruct_score_predictor"] = "last_instruct"
    draws = 0
    for name_of, predictor in predictors.items():
        predictor.gumbel_tau = golden.config["tau"]
        padded = zip(golden.tensor(f"gumbel_noise_{draws}"), segments, strict=True)
        packed = torch.cat([row[: parts[ranges[name_of]][1] - parts[ranges[name_of]][0]] for row, parts in padded])
        predictor.noise = lambda shape, device, packed=packed: packed
        draws += 1
    assert f"gumbel_noise_{draws}" not in golden

    policies = []
    sparse = model.model.layers[run.method.sparse_layer]
    sparse.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: policies.append(kwargs["attention_mask"]), with_kwargs=True
    )
    embeds, valid = golden.tensor("inputs_embeds").requires_grad_(), golden["attention_mask"]
    with backends.record_calls() as calls:
        outputs = model(
            inputs_embeds=embeds,
            attention_mask=golden.tensor("attention_mask"),
            labels=golden.tensor("labels"),
            visual_token_mask=visual_mask(golden),
            output_hidden_states=True,
        )
        outputs.loss.backward()
    assert ("policy_attention", "native") in calls and all(backend == "native" for _, backend in calls)
    np.testing.assert_allclose(policies[0].detach().numpy(), golden["policy"][..., 0][valid], atol=1e-6)
    assert len(policies) == (1 if checkpointing is None else 2)  # drawn once
    assert torch.equal(policies[0], policies[-1])
    assert outputs.loss.item() == pytest.approx(float(golden["loss"]), abs=1e-5)
    np.testing.assert_allclose(outputs.logits.detach().numpy()[valid], golden["logits"][valid], atol=1e-4)
    compared = 0
    for layer in range(golden.config["layers"] - 1):
        if f"hidden_after_layer{layer}" in golden:
            hidden = outputs.hidden_states[layer + 1].detach().numpy()
            np.testing.assert_allclose(hidden[valid], golden[f"hidden_after_layer{layer}"][valid], atol=1e-4)
            compared += 1
    assert compared
    parameters = dict(model.named_parameters())
    gradients = {key: parameters[key.removeprefix("grad:")].grad for key in golden if key.startswith("grad:")}
    assert sum("predictor" in key for key in gradients) == sum(1 for key in parameters if "predictor" in key)
    gradients["grad_inputs_embeds"] = embeds.grad
    for key, gradient in gradients.items():
        largest = np.abs(golden[key]).max()
        np.testing.assert_allclose(gradient.numpy(), golden[key], atol=1e-5 * max(largest, 1e-2), err_msg=key)
