"""Training Dynamic-LLaVA: masks, losses and gradients as the formulas say, in every kind of row; the stock Trainer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from dllava_models import (
    PIXELS,
    ROWS,
    SIZES,
    WITH_INSTRUCT,
    attached,
    by_hand,
    image_logits,
    language_batch,
    language_row,
)
from test_trainer import Questions, collate
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import pruneops
from pruneops.methods import DynamicLlava, PyramidDrop
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.methods.dynamic_llava_predictors import gumbel_noise
from pruneops.training import GumbelTemperature, parameter_groups

#: Rows with an answer of 7, 4 and 6 tokens, and one that was cut before its answer.
CHATS = [tiny.row(3, 1, 12, seed=1), tiny.row(2, 2, 9, seed=2), tiny.row(8, 0, 8, seed=3), tiny.row(1, 1, 3, seed=4)]
ANSWERS = [[(24, 31)], [(37, 39), (41, 45)], [(10, 16)], []]
#: Of the last question, behind the last image and the answer before.
QUESTIONS = [(19, 24), (39, 41), None, (17, 20)]
TRAINED = DynamicLlava(
    vision_keep_rate=0.3,
    output_text_len_for_training=5,
    use_instruct_predictor=True,
    instruct_len_for_training=3,
    mask_loss_weight=10.0,
    **SIZES,
)


def chat_batch(side: str) -> dict[str, Tensor]:
    batch = language_batch(CHATS, side)
    labels = torch.full_like(batch["input_ids"], -100)
    for b, answers in enumerate(ANSWERS):
        first = int(batch["attention_mask"][b].nonzero()[0])
        for start, stop in answers:
            columns = slice(first + start, first + stop)
            labels[b, columns] = batch["input_ids"][b, columns]
    return {**batch, "labels": labels}


class Noise:
    """Gumbel noise that can be looked at: one packed draw a predictor and pass."""

    def __init__(self, model: nn.Module, tau: float) -> None:
        self.draws: dict[str, Tensor] = {}
        for seed, (name, predictor) in enumerate(predictors_of(model.model).items()):
            predictor.gumbel_tau = tau
            predictor.noise = lambda shape, device, name=name, seed=seed: self.draw(name, seed, shape)

    def draw(self, name: str, seed: int, shape: tuple[int, ...]) -> Tensor:
        assert name not in self.draws, "drawn again"
        generator = torch.Generator().manual_seed(seed)
        self.draws[name] = -torch.empty(shape).exponential_(generator=generator).log()
        return self.draws[name].clone()

    def rows(self, name: str, lengths: list[int]) -> list[Tensor]:
        return list(self.draws[name].double().split(lengths))


def reference_loss(twin: nn.Module, method: DynamicLlava, noise: Noise, tau: float) -> tuple[Tensor, list[Tensor]]:
    """Loss of the chats row by row, spelled out, and the logits ``(tokens, vocabulary)`` of every row."""
    text_model, predictors = twin.model, predictors_of(twin.model)
    rows = [language_row(ids, seed=b) for b, ids in enumerate(CHATS)]
    parts: dict[str, list[Tensor]] = {}
    for name in predictors:
        for b, ids in enumerate(rows):
            images = [t for t, token in enumerate(ids) if token >= PIXELS[0]]
            answer = range(*ANSWERS[b][-1]) if ANSWERS[b] else range(0)
            question = range(*QUESTIONS[b]) if QUESTIONS[b] else range(0)
            picked = {"image": images, "output": list(answer), "instruct": list(question)}[name.split("_")[0]]
            parts.setdefault(name, []).append(torch.tensor(picked, dtype=torch.int64))
    rates = {
        "image_score_predictor": (method.vision_keep_rate, 0),
        "output_text_score_predictor": (method.output_text_keep_rate, method.output_text_len_for_training),
        "instruct_score_predictor": (method.instruct_keep_rate, method.instruct_len_for_training),
    }
    drawn = {name: noise.rows(name, [len(p) for p in picked]) for name, picked in parts.items()}
    extra, total, labels, logits = torch.zeros((), dtype=torch.float64), 0.0, 0, []
    for b, ids in enumerate(rows):
        x, n = text_model.embed_tokens(torch.tensor([ids])), len(ids)
        position_embeddings = text_model.rotary_emb(x, torch.arange(n)[None])
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        policy = None
        for i, layer in enumerate(text_model.layers):
            if i == method.sparse_layer:
                policy = torch.ones(n, dtype=torch.float64)
                for name, picked in parts.items():
                    rate, shortest = rates[name]
                    where = picked[b]
                    if len(where) == 0 or len(where) < shortest:
                        continue
                    seen = x[0, where]
                    judge = predictors[name]
                    scores = image_logits(judge, seen) if name.startswith("image") else judge.output_mlp(seen)
                    soft = ((scores.log_softmax(-1) + drawn[name][b]) / tau).softmax(-1)
                    hard = nn.functional.one_hot(soft.argmax(-1), 2)
                    mask = (hard - soft.detach() + soft)[:, 0]
                    policy = policy.index_copy(0, where, mask)
                    extra = extra + (rate - mask.mean()) ** 2 / len(rows)
            if policy is None:
                mask = torch.where(causal, 0.0, -torch.inf).to(x.dtype)[None, None]
                x = layer(x, attention_mask=mask, position_embeddings=position_embeddings)
                continue
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(normed).view(n, -1, attention.head_dim).transpose(0, 1)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            cos, sin = position_embeddings
            half = q.shape[-1] // 2
            q, k = (t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin for t in (q, k))
            k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
            a = (q @ k.mT * attention.scaling).masked_fill(~causal, -torch.inf)
            eye = torch.eye(n, dtype=a.dtype)
            e = (a - a.detach().amax(-1, keepdim=True)).exp() * (policy + (1 - policy) * eye)
            weights = (e + 1e-6 / n) / (e.sum(-1, keepdim=True) + 1e-6)
            x = x + attention.o_proj((weights @ v).transpose(0, 1).reshape(n, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits.append(twin.lm_head(text_model.norm(x))[0])
        for start, stop in ANSWERS[b]:
            total = total + nn.functional.cross_entropy(
                logits[-1][start - 1 : stop - 1], torch.tensor(ids[start:stop]), reduction="sum"
            )
            labels += stop - start
    return total / labels + method.mask_loss_weight * extra, logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_loss_and_gradients_of_a_padded_batch_equal_the_formulas_row_by_row(heads: tuple[int, int], side: str) -> None:
    """Several images, an earlier answer, a short answer, a short question, no image, no answer."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model, _ = attached(tiny.language_model(**sizes), TRAINED)
    twin = by_hand(model)
    noise = Noise(model.train(), tau=0.6)
    batch = chat_batch(side)
    outputs = model(**batch)
    outputs.loss.backward()
    expected, logits = reference_loss(twin, TRAINED, noise, tau=0.6)
    expected.backward()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        outputs.logits[batch["attention_mask"].bool()], torch.cat(logits).float(), atol=2e-5, rtol=1e-4
    )
    theirs = dict(twin.named_parameters())
    largest = max(p.grad.abs().max().item() for p in theirs.values())
    for name, parameter in model.named_parameters():
        error, scale = (parameter.grad - theirs[name].grad).abs().max().item(), theirs[name].grad.abs().max().item()
        assert error < 1e-4 * scale + 1e-7 * largest, (name, error, scale)
        if "predictor" in name:
            assert scale > 0, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing_and_draws_once(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model, _ = attached(tiny.language_model(), TRAINED)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)  # the draws are those of torch's own generator
        loss = model(**chat_batch("right")).loss
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    for plain, again in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, again, atol=0, rtol=0)


def test_nothing_is_dropped_in_training_and_draws_differ_from_pass_to_pass() -> None:
    model, run = attached(tiny.language_model(), TRAINED, record=True)
    model.train()
    kept = []
    for _ in range(2):
        model(**chat_batch("left"))
        assert run.layer_lengths == [[len(ids) for ids in CHATS]] * tiny.LAYERS
        kept.append([record.kept_positions.tolist() for record in run.records])
    assert kept[0] != kept[1]
    assert all(len(row) < len(ids) for row, ids in zip(kept[0][:2], CHATS, strict=False))
    assert kept[0][2][:10] == list(range(10))


def test_draws_are_standard_gumbel_noise() -> None:
    noise = gumbel_noise((200_000,), torch.device("cpu"))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)


@pytest.mark.parametrize("rows", [[ROWS[2]], [[5, 6, 7]]], ids=["text only", "no answer either"])
def test_rows_that_give_the_predictors_nothing_to_do_give_them_gradients_of_zero(rows: list[list[int]]) -> None:
    """Data-parallel training waits for every gradient; and a micro-batch without answers has a finite loss."""
    model, run = attached(tiny.language_model(), WITH_INSTRUCT)
    batch = language_batch(rows)
    labels = torch.full_like(batch["input_ids"], -100)
    if len(rows[0]) > 3:
        labels[:, -2:] = batch["input_ids"][:, -2:]
    outputs = model.train()(**batch, labels=labels, num_items_in_batch=torch.tensor(5))
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    for predictor in predictors_of(model.model).values():
        assert all(p.grad is not None and not p.grad.any() for p in predictor.parameters())


def test_in_a_step_of_several_batches_each_brings_its_share_of_the_mask_loss() -> None:
    model, _ = attached(tiny.language_model(), TRAINED)
    batch, noise = chat_batch("right"), torch.zeros
    for predictor in predictors_of(model.train().model).values():
        predictor.noise = lambda shape, device: noise(shape)
    whole, answered = model(**batch).loss, sum(stop - start for row in ANSWERS for start, stop in row)
    share = model(**batch, num_items_in_batch=torch.tensor(4 * answered)).loss
    assert share.item() == pytest.approx(whole.item() / 4, rel=1e-5)
    loss, *_ = model(**batch, return_dict=False)
    assert loss.item() == pytest.approx(whole.item())


def test_without_labels_the_loss_of_the_masks_is_left_to_the_caller() -> None:
    model, run = attached(tiny.language_model(), TRAINED)
    batch = chat_batch("right")
    del batch["labels"]
    with pytest.warns(UserWarning, match="training without labels.*run.auxiliary_loss"):
        model.train()(**batch)
    run.auxiliary_loss.backward()
    gradient = predictors_of(model.model)["image_score_predictor"].output_mlp[4].weight.grad
    assert run.auxiliary_loss > 0 and gradient.abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**chat_batch("right"))
    assert run.auxiliary_loss is None


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_evaluation_with_labels_gives_the_loss_of_generating_the_answers(use_cache: bool) -> None:
    model, _ = attached(tiny.language_model())
    rows = [language_row(ids, seed=b) for b, ids in enumerate(CHATS[:1])]
    ids, visual = torch.tensor(rows), torch.tensor(rows) >= PIXELS[0]
    start, stop = ANSWERS[0][-1]
    labels = torch.full_like(ids, -100)
    labels[:, start:stop] = ids[:, start:stop]
    outputs = model(input_ids=ids, visual_token_mask=visual, labels=labels, use_cache=use_cache)
    cached = model(input_ids=ids[:, :start], visual_token_mask=visual[:, :start], use_cache=True)
    logits, cache = [cached.logits[:, -1:]], cached.past_key_values
    for t in range(start, stop):
        logits.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits)
    stepwise = torch.cat(logits, 1)
    torch.testing.assert_close(outputs.logits[:, start - 1 :], stepwise, atol=1e-5, rtol=1e-5)
    loss = nn.functional.cross_entropy(stepwise[0, :-1], ids[0, start:stop])
    assert outputs.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert cache.lengths(2)[0] < start - 12 + stop - start
    if use_cache:
        assert [outputs.past_key_values.lengths(i) for i in range(6)] == [cache.lengths(i) for i in range(6)]
        for ours, theirs in zip(outputs.past_key_values.layers, cache.layers, strict=True):
            held = slice(0, theirs.seqused_k[0])
            torch.testing.assert_close(ours.keys[:, held], theirs.keys[:, held], atol=1e-5, rtol=1e-5)


# -- the stock Trainer -------------------------------------------------------------------------------------------------


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(folder), **{**options, **changes})


def test_the_stock_trainer_trains_predictors_at_a_falling_temperature(tmp_path: Path) -> None:
    model, _ = attached(tiny.llava(), DynamicLlava(vision_keep_rate=0.5, output_text_len_for_training=2, **SIZES))
    predictors = predictors_of(model.model.language_model)
    before, seen = copy.deepcopy(model.state_dict()), []
    predictors["image_score_predictor"].register_forward_hook(
        lambda module, *call: seen.append(module.gumbel_tau) if module.training else None
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, predictor_lr=2e-2), lr=1e-4)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=2, gradient_checkpointing=True),
        train_dataset=Questions(),
        eval_dataset=Questions(),
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=[GumbelTemperature()],
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    expected = [0.1 ** (step / 5) for step in range(5) for _ in range(2)]
    assert seen == pytest.approx(expected)
    moved = {name: (weight - before[name]).abs().max().item() for name, weight in model.state_dict().items()}
    text = moved["model.language_model.layers.3.mlp.up_proj.weight"]
    for name in ("image_score_predictor.output_mlp.4", "output_text_score_predictor.output_mlp.7"):
        assert moved[f"model.language_model.{name}.weight"] > 20 * text > 0


def test_parameter_groups_hold_every_trained_parameter_once() -> None:
    model, _ = attached(tiny.llava())
    model.model.vision_tower.requires_grad_(False)
    matrices, vectors, predictors = parameter_groups(model, weight_decay=0.1, predictor_lr=3e-4)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in (matrices, vectors, predictors) for p in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert {names[id(p)] for p in predictors["params"]} == {n for n in names.values() if "predictor" in n}
    assert (predictors["lr"], predictors["weight_decay"]) == (3e-4, 0.0) and "lr" not in matrices
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in vectors["params"])
    assert len(parameter_groups(tiny.language_model())) == 2


def test_the_temperature_of_other_models_is_nobodys(tmp_path: Path) -> None:
    model = tiny.llava()
    pruneops.attach(model, PyramidDrop((2,), (0.5,)))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=Questions(),
        data_collator=collate,
        callbacks=[GumbelTemperature()],
    )
    trainer.train()


@pytest.mark.parametrize("rates", [(0.1, 0.9), (0.9, 0.1)], ids=str)
def test_mask_losses_draw_the_kept_shares_to_the_rates(rates: tuple[float, float]) -> None:
    image_rate, text_rate = rates
    method = DynamicLlava(image_rate, text_rate, output_text_len_for_training=2, **SIZES)
    model, run = attached(tiny.language_model(), method, record=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, predictor_lr=5e-3), lr=0.0, weight_decay=0.0)
    batch, shares = chat_batch("right"), []
    image, answer = batch["visual_token_mask"], torch.zeros_like(batch["visual_token_mask"])
    for b, spans in enumerate(ANSWERS):
        answer[b, slice(*spans[-1]) if spans else slice(0)] = True
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        kept = torch.zeros_like(answer)
        for record in run.records:
            kept[record.row, record.kept_positions] = True
        shares.append([kept[where].float().mean() for where in (image, answer)])
    assert torch.tensor(shares)[-20:].mean(0).tolist() == pytest.approx(rates, abs=0.15)
