"""Dynamic-LLaVA in conversations of several turns: which tokens are the question, what later turns see, beams."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from dllava_models import (
    KEPT_OF_16,
    METHOD,
    ROWS,
    SIZES,
    WITH_INSTRUCT,
    attached,
    by_hand,
    language_batch,
    language_row,
    reference,
)
from torch import Tensor

from pruneops.methods import DynamicLlava

#: Tokens that begin a question; no row has them by chance.
USER = [1, 7]
WITH_START = DynamicLlava(vision_keep_rate=0.3, use_instruct_predictor=True, question_start=USER, **SIZES)
#: An image, then a question, its answer and a second question; text alone; a question behind the second image.
TURNS = [
    tiny.row(3, 1, 6, seed=1) + tiny.row(6, 0, 0, seed=2) + USER + tiny.row(5, 0, 0, seed=3),
    tiny.row(4, 0, 5, seed=4) + USER + tiny.row(3, 0, 0, seed=5),
    USER + tiny.row(2, 2, 8, seed=6),
]
#: Of the second question, and of all that lies behind the last image.
LAST, ALL = [(31, 38), None, (38, 46)], [(19, 38), None, (38, 46)]


def fed(rows: int, steps: int, seed: int) -> Tensor:
    return torch.randint(2, 100, (rows, steps), generator=torch.Generator().manual_seed(seed))


def kept_by_row(run: Any) -> dict[int, list[int]]:
    return {record.row: record.kept_positions.tolist() for record in run.records}


# -- where a question begins -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("method", "questions"), [(WITH_START, LAST), (WITH_INSTRUCT, ALL)], ids=["start", "none"])
@torch.no_grad()
def test_of_a_prompt_of_several_turns_the_last_question_is_judged_if_its_start_is_known(
    method: DynamicLlava, questions: list[tuple[int, int] | None], side: str
) -> None:
    model, run = attached(tiny.language_model(), method, record=True)
    twin, batch = by_hand(model), language_batch(TURNS, side)
    logits, kept, dropped = model(**batch).logits, kept_by_row(run), []
    for row, ids in enumerate(language_row(ids, seed=b) for b, ids in enumerate(TURNS)):
        question = range(*questions[row]) if questions[row] else None
        expected, keep = reference(twin, method, ids, len(ids), question)
        assert kept[row] == keep
        columns = batch["attention_mask"][row].nonzero()[:, 0]
        torch.testing.assert_close(logits[row, columns[keep]], expected[keep].float(), atol=1e-5, rtol=1e-5)
        dropped.append([t for t in range(len(ids)) if t not in keep and TURNS[row][t] != tiny.IMAGE])
    assert dropped[0] and dropped[2] and not dropped[1]
    assert (min(dropped[0]) >= 31) == (method is WITH_START)


@torch.no_grad()
def test_a_conversation_has_the_loss_in_evaluation_that_its_last_answer_has_when_it_is_generated() -> None:
    model, run = attached(tiny.language_model(), WITH_START, record=True)
    ids = torch.tensor([language_row(TURNS[0]) + tiny.row(6, 0, 0, seed=9)])
    visual, labels, prompt = ids >= 100, torch.full_like(ids, -100), len(TURNS[0])
    labels[:, prompt:] = ids[:, prompt:]
    for earlier in (False, True):  # labelled as well, or not
        if earlier:
            labels[:, 25:31] = ids[:, 25:31]
        whole = model(input_ids=ids, visual_token_mask=visual, labels=labels).logits[:, prompt - 1 : -1]
        evaluated = [t for t in kept_by_row(run)[0] if t < prompt]
        outputs = model(input_ids=ids[:, :prompt], visual_token_mask=visual[:, :prompt], use_cache=True)
        assert kept_by_row(run)[0] == evaluated
        steps, cache = [outputs.logits[:, -1:]], outputs.past_key_values
        for t in range(prompt, ids.shape[1] - 1):
            steps.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits)
        torch.testing.assert_close(whole, torch.cat(steps, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_llava_finds_the_questions_of_a_padded_batch_in_its_input_ids(use_cache: bool, side: str) -> None:
    model, run = attached(tiny.llava(), WITH_START, record=True)
    batch = tiny.llava_batch(TURNS, side)
    together = tiny.generated(model, batch, max_new_tokens=6, use_cache=use_cache)
    assert together == [tiny.generated(model, i, max_new_tokens=6)[0] for i in tiny.rows_alone(batch, TURNS)]
    with torch.no_grad():
        model(**batch)
    kept = kept_by_row(run)
    assert set(range(19, 31)) <= set(kept[0]) and kept[1] == list(range(len(TURNS[1])))
    assert len(kept[0]) < 15 + 4 + 7


@torch.no_grad()
def test_without_input_ids_a_start_cannot_be_found_and_the_model_says_so() -> None:
    model, run = attached(tiny.language_model(), WITH_START, record=True)
    batch = language_batch(TURNS, "left")
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.warns(UserWarning, match="question_start: the model got inputs_embeds without input_ids"):
        cache = model(inputs_embeds=embeds, **batch, use_cache=True).past_key_values
    assert not set(range(19, 31)) <= set(kept_by_row(run)[0])
    model(inputs_embeds=embeds[:, :1], past_key_values=cache)  # a decoding step has no question


# -- a further turn ----------------------------------------------------------------------------------------------------

FIRST_STEPS, LATER_STEPS = 7, 3
#: Of the further turn: the end of the answer before, and a question.
CHUNKS = [tiny.row(2, 0, 0, seed=21) + USER + tiny.row(6, 0, 0, seed=22), tiny.row(5, 0, 0, seed=23), [*USER, 9, 30]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [METHOD, WITH_INSTRUCT, WITH_START], ids=["default", "instruct", "start"])
@torch.no_grad()
def test_a_turn_after_steps_with_dropped_tokens_and_what_follows_it_equal_the_formulas(
    method: DynamicLlava, side: str
) -> None:
    model, run = attached(tiny.language_model(), method)
    rows = ROWS[:3]
    twin, batch, first, later = by_hand(model), language_batch(rows, "left"), fed(3, 7, 11), fed(3, 3, 12)
    chunk, mask = tiny.pad(CHUNKS, side), batch["attention_mask"]
    cache, ours = model(**batch, use_cache=True).past_key_values, []

    def feed(tokens: Tensor, new: Tensor) -> Tensor:
        nonlocal mask
        mask = torch.cat([mask, new], 1)
        return model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits

    one = torch.ones(3, 1, dtype=torch.int64)
    for token in first.split(1, 1):
        feed(token, one)
    held = [cache.lengths(i) for i in range(tiny.LAYERS)]
    turn_logits = feed(chunk["input_ids"], chunk["attention_mask"])
    # What the report says was stored is what the cache has got.
    stored = [[n - m for n, m in zip(cache.lengths(i), held[i], strict=True)] for i in range(tiny.LAYERS)]
    assert run.trace.kv_lengths == stored
    assert run.report().kv_bytes == sum(map(sum, stored)) * (2 * 2 * 8 * 4)
    ours = [feed(token, one) for token in later.split(1, 1)]
    lost_in_turn = 0
    for b, ids in enumerate(language_row(ids, seed=b) for b, ids in enumerate(rows)):
        start = len(ids) + FIRST_STEPS
        turn = range(start, start + len(CHUNKS[b]))
        asked = range(start + 2, turn.stop) if method is WITH_START and b == 0 else None
        sequence = ids + first[b].tolist() + CHUNKS[b] + later[b].tolist()
        expected, keep = reference(twin, method, sequence, len(ids), None, turn, asked)
        expected = expected.float()
        columns = chunk["attention_mask"][b].nonzero()[:, 0]
        torch.testing.assert_close(turn_logits[b, columns], expected[turn.start : turn.stop], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat(ours, 1)[b], expected[turn.stop :], atol=1e-5, rtol=1e-5)
        assert [cache.lengths(i)[b] for i in range(tiny.LAYERS)] == [len(sequence)] * 2 + [len(keep)] * 4
        assert sum(t in keep for t in range(len(ids), start)) < FIRST_STEPS  # something was dropped before
        lost = [t for t in turn if t not in keep]
        assert all(t in (asked or turn) for t in lost)
        lost_in_turn += len(lost)
    assert (lost_in_turn > 0) == method.use_instruct_predictor


@torch.no_grad()
def test_text_before_the_question_of_a_further_turn_is_stored_and_so_are_the_image_tokens_it_keeps() -> None:
    model, run = attached(tiny.language_model(), WITH_START)
    cache = model(**language_batch(ROWS[2:3]), use_cache=True).past_key_values
    model.model.instruct_score_predictor.output_mlp[-1].bias[:] = torch.tensor([-1e3, 1e3])  # it wants nothing
    for chunk, stored in (
        (tiny.row(2, 1, 3, seed=5), 2 + KEPT_OF_16 + 1),  # the question is behind the image
        (tiny.row(2, 1, 3, seed=5) + USER + [9, 8], 2 + KEPT_OF_16 + 3 + 1),
        ([4, 3, *USER, 9, 8], 2 + 1),
        ([4, 3, 9, 8], 1),
    ):
        before, turn = cache.lengths(5)[0], language_batch([chunk])
        model(input_ids=turn["input_ids"], visual_token_mask=turn["visual_token_mask"], past_key_values=cache)
        assert cache.lengths(5)[0] - before == stored == run.trace.kv_lengths[5][0]


# -- beams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHOD, WITH_START], ids=["default", "start"])
def test_beams_of_rows_with_two_images_and_of_answers_that_end_equal_those_without_a_cache(
    method: DynamicLlava,
) -> None:
    """On a language model: LLaVA's own `generate` gives the beams of such rows the wrong images, pruned or not.

    It repeats images in place of rows of images (transformers 5.17).
    """
    model, _ = attached(tiny.language_model(), method)
    batch = language_batch([TURNS[0], ROWS[3], TURNS[2]], "left")
    free = model.generate(**batch, max_new_tokens=8, num_beams=3)
    # A token of one of the answers ends it from now on.
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": int(free[1, -6])}
    cached = model.generate(**batch, **options)
    assert cached.tolist() == model.generate(**batch, use_cache=False, **options).tolist()
    answers = cached[:, batch["input_ids"].shape[1] :]
    assert (answers == options["eos_token_id"]).any() and (answers != tiny.PAD).all(1).any()
