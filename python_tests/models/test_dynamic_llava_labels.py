"""Dynamic-LLaVA and labels: which tokens they make answers, the loss of an evaluation, and calls that lack them."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from dllava_models import METHOD, ROWS, SIZES, WITH_INSTRUCT, attached, by_hand, language_batch, language_row, reference
from test_dynamic_llava_training import ANSWERS, CHATS, QUESTIONS, TRAINED, chat_batch
from torch import Tensor, nn
from transformers import DynamicCache

from pruneops.methods import DynamicLlava
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.pruning import find_text_model


def without_noise(model: nn.Module) -> dict[str, int]:
    """Makes the draws deterministic; gives how many tokens every predictor drew for in its latest pass."""
    drawn: dict[str, int] = {}

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        drawn[name] = shape[0]
        return torch.zeros(shape)

    for name, predictor in predictors_of(find_text_model(model)).items():
        predictor.noise = lambda shape, device, name=name: draw(name, shape)
    return drawn


def predictor_gradients(model: nn.Module) -> int:
    return sum(bool(p.grad is not None and p.grad.any()) for n, p in model.named_parameters() if "_predictor" in n)


# -- image tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_labels_on_image_tokens_do_not_count(train: bool, side: str) -> None:
    """As in ``labels = input_ids.clone()`` with padding at -100."""
    results = []
    for on_images in (True, False):
        model, run = attached(tiny.language_model(), TRAINED, record=True)
        drawn, batch = without_noise(model), language_batch(CHATS, side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if not on_images:
            labels = labels.masked_fill(batch["visual_token_mask"], -100)
        given = labels.clone()
        outputs = model.train(train)(**batch, labels=labels)
        assert torch.equal(labels, given)
        kept = [record.kept_positions.tolist() for record in run.records]
        results.append((outputs.loss.item(), kept, dict(drawn)))
    assert results[0] == results[1]
    if train:
        # Behind the last image everything is the answer.
        assert results[0][2] == {
            "image_score_predictor": 4 * 16,
            "output_text_score_predictor": 12 + 9 + 15 + 3,
            "instruct_score_predictor": 0,
        }


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [METHOD, WITH_INSTRUCT], ids=["default", "instruct"])
@torch.no_grad()
def test_evaluation_of_a_padded_batch_equals_generating_the_last_answers_by_the_formulas(
    method: DynamicLlava, side: str
) -> None:
    """Two turns, several images, none, and a row without an answer."""
    model, run = attached(tiny.language_model(), method)
    twin, batch = by_hand(model), chat_batch(side)
    outputs, cache = model(**batch, use_cache=False), model(**batch, use_cache=True).past_key_values
    kv_lengths, total, supervised, dropped = run.trace.kv_lengths, 0.0, 0, 0
    for row, ids in enumerate(language_row(ids, seed=b) for b, ids in enumerate(CHATS)):
        prompt = ANSWERS[row][-1][0] if ANSWERS[row] else len(ids)
        question = range(*QUESTIONS[row]) if QUESTIONS[row] else None
        expected, keep = reference(twin, method, ids, prompt, question)
        here = [t for t in range(len(ids)) if t in keep or t >= prompt]  # the others are not computed
        columns = batch["attention_mask"][row].nonzero()[:, 0]
        torch.testing.assert_close(outputs.logits[row, columns[here]], expected[here].float(), atol=1e-5, rtol=1e-5)
        for start, stop in ANSWERS[row]:
            target = torch.tensor(ids[start:stop])
            total += nn.functional.cross_entropy(expected[start - 1 : stop - 1], target, reduction="sum").item()
            supervised += stop - start
        assert [cache.lengths(i)[row] for i in range(6)] == [len(ids)] * 2 + [len(keep)] * 4
        assert [lengths[row] for lengths in kv_lengths] == [len(ids)] * 2 + [len(keep)] * 4
        dropped += sum(t not in keep for t in range(prompt, len(ids)))
    assert outputs.loss.item() == pytest.approx(total / supervised, rel=1e-5)
    assert 0 < dropped < 7 + 4 + 6


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_report_of_an_evaluation_counts_what_is_stored(use_cache: bool) -> None:
    model, run = attached(tiny.language_model())
    cache = model(**chat_batch("right"), use_cache=True).past_key_values
    model(**chat_batch("right"), use_cache=use_cache)
    assert run.report().kv_bytes == cache.nbytes() < run.report().dense_kv_bytes
    assert run.trace.kv_lengths[2] < run.layer_lengths[2] and run.trace.kv_lengths[1] == run.layer_lengths[1]


@torch.no_grad()
def test_labels_on_a_filled_cache_are_refused_and_the_cache_stays_as_it_was() -> None:
    model, _ = attached(tiny.language_model())
    cache = model(**language_batch(ROWS[:1]), use_cache=True).past_key_values
    before = [cache.lengths(i) for i in range(tiny.LAYERS)]
    for columns in (1, 4):
        chunk = torch.full((1, columns), 5)
        with pytest.raises(ValueError, match="labels: got some together with a cache that holds 24 columns"):
            model(input_ids=chunk, labels=chunk, past_key_values=cache)
    assert [cache.lengths(i) for i in range(tiny.LAYERS)] == before and cache.get_seq_length() == 24


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"use_text_predictor": False}, {"use_output_text_predictor": False, "use_instruct_predictor": True}, {}],
    ids=str,
)
def test_training_without_labels_says_so_whichever_predictors_there_are(fields: dict[str, bool]) -> None:
    model, run = attached(tiny.language_model(), DynamicLlava(vision_keep_rate=0.3, **fields, **SIZES))
    with pytest.warns(UserWarning, match="training without labels.*run.auxiliary_loss"):
        model.train()(**language_batch(CHATS))
    assert run.auxiliary_loss > 0


def test_without_labels_neither_questions_nor_answers_are_drawn_on() -> None:
    model, _ = attached(tiny.language_model(), TRAINED)
    drawn, batch = without_noise(model.train()), chat_batch("right")
    model(**batch)
    assert drawn["output_text_score_predictor"] == 17 and drawn["instruct_score_predictor"] == 10
    del batch["labels"]
    batch["visual_token_mask"] = batch["visual_token_mask"][:, :40]  # what lies behind is not taken for an answer
    with pytest.warns(UserWarning, match="training without labels"):
        model(**batch)
    assert drawn == {
        "image_score_predictor": 4 * 16,
        "output_text_score_predictor": 0,
        "instruct_score_predictor": 0,
    }


@pytest.mark.parametrize("wish", [{"use_cache": True}, {"past_key_values": None}], ids=["use_cache", "empty cache"])
@pytest.mark.parametrize("build", [tiny.language_model, tiny.llava])
def test_training_with_a_cache_ignores_the_cache_and_says_so(build: object, wish: dict[str, object]) -> None:
    model, _ = attached(build(), TRAINED)
    without_noise(model.train())
    if build is tiny.llava:
        batch = tiny.llava_batch(CHATS, "right")
        batch["labels"] = chat_batch("right")["labels"]
    else:
        batch = chat_batch("right")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = model(**batch).loss
    wish = {"past_key_values": DynamicCache()} if "past_key_values" in wish else wish
    with pytest.warns(UserWarning, match="`use_cache=True` is incompatible with training.*Setting `use_cache=False`"):
        outputs = model(**batch, **wish)
    assert outputs.past_key_values is None and outputs.loss.item() == plain.item()
    outputs.loss.backward()
    assert predictor_gradients(model) > 42


def test_a_call_in_train_mode_with_a_cache_but_no_labels_is_inference_and_says_so() -> None:
    model, run = attached(tiny.llava(), METHOD)
    batch = tiny.llava_batch(ROWS[:1])
    with pytest.warns(UserWarning, match="with a cache and without labels.*no predictor is trained"):
        model.train()(**batch, use_cache=True)
    assert run.layer_lengths[-1] == [12] and run.auxiliary_loss is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**batch, max_new_tokens=2)  # wants no gradients
