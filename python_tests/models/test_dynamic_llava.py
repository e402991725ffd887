"""Dynamic-LLaVA on whole models in inference: what stays, what comes out, and that every way of running agrees."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from dllava_models import (
    KEPT_OF_16,
    KEPT_OF_32,
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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pruneops
from pruneops import backends
from pruneops.cache import LengthReading
from pruneops.methods import DynamicLlava

STEPS = 9


def fed(rows: int, seed: int = 11) -> Tensor:
    """``(rows, STEPS)`` tokens to feed one by one."""
    return torch.randint(2, 100, (rows, STEPS), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def reads_of_tensors_refused() -> Iterator[None]:
    """Within it no value of a tensor gets to Python, as on a device it would make the host wait."""

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    with Refusing():
        yield


def prompt_and_steps_equal_the_formulas(family: str, method: DynamicLlava, heads: tuple[int, int], side: str) -> None:
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model, run = attached(tiny.language_model(family, **sizes), method, record=True)
    twin, tokens = by_hand(model), fed(len(ROWS))
    batch = language_batch(ROWS, side)
    with torch.no_grad(), backends.record_calls() as calls:
        outputs = model(**batch, use_cache=True)
        kept = {record.row: record.kept_positions.tolist() for record in run.records}
        cache, steps = outputs.past_key_values, []
        mask = batch["attention_mask"]
        for t in range(STEPS):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            steps.append(model(input_ids=tokens[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
        generated = torch.cat(steps, 1)
    assert {backend for _, backend in calls} == {"native"}
    dropped = 0
    for row, ids in enumerate(language_row(ids, seed=b) for b, ids in enumerate(ROWS)):
        logits, keep = reference(twin, method, ids + tokens[row].tolist(), len(ids))
        prompt = [t for t in keep if t < len(ids)]
        assert kept.get(row, prompt) == prompt
        torch.testing.assert_close(generated[row], logits[len(ids) :].float(), atol=1e-5, rtol=1e-5)
        columns = batch["attention_mask"][row].nonzero()[:, 0]
        torch.testing.assert_close(outputs.logits[row, columns[prompt]], logits[prompt].float(), atol=1e-5, rtol=1e-5)
        for i in range(tiny.LAYERS):
            assert cache.lengths(i)[row] == (len(ids) + STEPS if i < method.sparse_layer else len(keep))
            assert cache.next_positions(i)[row] == len(ids) + STEPS
        dropped += len(ids) + STEPS - len(keep)
    assert dropped > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "method",
    [METHOD, WITH_INSTRUCT, DynamicLlava(vision_keep_rate=0.55, sparse_layer=1, **SIZES)],
    ids=["default", "instruct", "from layer 1"],
)
def test_a_padded_batch_and_its_decoding_equal_the_formulas_row_by_row(method: DynamicLlava, side: str) -> None:
    prompt_and_steps_equal_the_formulas("llama", method, (4, 2), side)


@pytest.mark.parametrize("family", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2)], ids=str)
def test_every_language_model_and_head_grouping_equals_the_formulas(family: str, heads: tuple[int, int]) -> None:
    prompt_and_steps_equal_the_formulas(family, WITH_INSTRUCT, heads, "left")


@torch.no_grad()
def test_decisions_differ_between_tokens_and_rows() -> None:
    """What the comparisons above rest on."""
    model, _ = attached(tiny.language_model())
    cache, tokens = model(**language_batch(ROWS, "left"), use_cache=True).past_key_values, fed(len(ROWS))
    lengths = [cache.lengths(2)]
    for t in range(STEPS):
        model(input_ids=tokens[:, t : t + 1], past_key_values=cache)
        lengths.append(cache.lengths(2))
    stored = torch.tensor(lengths).diff(dim=0)
    assert 0 < stored.float().mean() < 1
    assert (stored.float().mean(1) % 1).any()  # a step in which some rows store and some do not


def test_the_images_of_a_row_share_one_pool_and_a_row_without_stays() -> None:
    model, run = attached(tiny.language_model(), record=True)
    with torch.no_grad():
        model(**language_batch(ROWS, "right"))
    full = [len(ids) for ids in ROWS]
    assert run.layer_lengths == [full] * 2 + [[8 + KEPT_OF_16, 11 + KEPT_OF_16, 10, 6 + KEPT_OF_32]] * 4
    kept = run.records[3].kept_positions.tolist()
    shares = [sum(t in image for t in kept) for image in (range(1, 17), range(19, 35))]
    assert sum(shares) == KEPT_OF_32 and shares[0] != shares[1]
    assert [len(record.scores) for record in run.records] == [16, 16, 0, 32]


@pytest.mark.parametrize(("tokens", "rate", "kept"), [(16, 0.2, 3), (100, 0.29, 28), (16, 1.0, 16), (16, 0.0, 0)])
def test_counts_are_the_truncated_float64_product(tokens: int, rate: float, kept: int) -> None:
    model, run = attached(tiny.language_model(), DynamicLlava(vision_keep_rate=rate, **SIZES))
    ids = torch.tensor([[5, 6] + [tiny.IMAGE] * tokens + [7]])
    with torch.no_grad():
        model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE)
    assert run.layer_lengths[-1] == [3 + kept]


@torch.no_grad()
def test_equal_scores_keep_the_first_tokens() -> None:
    model, run = attached(tiny.language_model(), record=True)
    for parameter in model.model.image_score_predictor.parameters():
        parameter.zero_()
    model(**language_batch(ROWS[:1], "left"))
    assert run.records[0].kept_positions.tolist() == [*range(3 + KEPT_OF_16), *range(19, 24)]


@torch.no_grad()
def test_a_prompt_that_ends_with_an_image_still_predicts_the_next_token() -> None:
    model, run = attached(tiny.language_model(), record=True)
    model.model.image_score_predictor.output_mlp[4].weight.zero_()  # the first tokens stay, the last one goes
    logits = model(**language_batch([tiny.row(3, 1, 0, seed=1)])).logits
    last = int(run.records[0].kept_positions[-1])
    assert last == 3 + KEPT_OF_16 - 1
    assert logits[0, -1].any() and torch.equal(logits[0, -1], logits[0, last])


# -- ways of running ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHOD, WITH_INSTRUCT], ids=["default", "instruct"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_batch_generates_what_its_rows_generate_alone(method: DynamicLlava, side: str, use_cache: bool) -> None:
    model, _ = attached(tiny.llava(), method)
    batch = tiny.llava_batch(ROWS, side)
    together = tiny.generated(model, batch, max_new_tokens=8, use_cache=use_cache)
    alone = [tiny.generated(model, inputs, max_new_tokens=8)[0] for inputs in tiny.rows_alone(batch, ROWS)]
    assert together == alone


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_beam_search_with_a_cache_equals_beam_search_without(options: dict) -> None:
    model, _ = attached(tiny.llava(), WITH_INSTRUCT)
    batch = tiny.llava_batch(ROWS[:2], "left")
    cached = model.generate(**batch, max_new_tokens=8, **options)
    assert cached.tolist() == model.generate(**batch, max_new_tokens=8, use_cache=False, **options).tolist()


@pytest.mark.parametrize("late", [False, True], ids=["lengths arrive", "lengths are late"])
@torch.no_grad()
def test_the_cache_grows_with_what_is_kept_and_results_do_not_depend_on_when(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:
        monkeypatch.setattr(LengthReading, "arrived", lambda self: None)
    model, _ = attached(tiny.language_model(max_position_embeddings=2048))
    batch, steps = language_batch(ROWS[:2], "left"), 400
    tokens = torch.randint(2, 100, (2, steps), generator=torch.Generator().manual_seed(3))
    cache = model(**batch, use_cache=True).past_key_values
    copies = 0
    for t in range(steps):
        slots = cache.layers[2].keys.data_ptr()
        logits = model(input_ids=tokens[:, t : t + 1], past_key_values=cache).logits
        copies += cache.layers[2].keys.data_ptr() != slots
        assert max(cache.lengths(2)) <= cache.layers[2].state.bound < cache.layers[2].state.capacity
    full, kept = (max(cache.lengths(i)) for i in (1, 2))
    assert kept < 0.8 * full
    if late:  # nothing waits for them
        assert cache.layers[2].state.capacity == cache.layers[1].state.capacity
    else:
        assert cache.layers[2].state.capacity <= 1.5 * kept + 64 < cache.layers[1].state.capacity
    assert copies <= 5
    # Without a cache, and so without slots: the last step again.
    ids = torch.cat([batch["input_ids"], tokens], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], 1)
    visual = batch["visual_token_mask"]
    again = model(input_ids=ids, attention_mask=mask, visual_token_mask=visual, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, again, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_decoding_step_runs_one_op_a_layer_and_leaves_lengths_on_the_device() -> None:
    model, _ = attached(tiny.language_model())
    cache = model(**language_batch(ROWS, "left"), use_cache=True).past_key_values
    with backends.record_calls() as calls, reads_of_tensors_refused():
        for token in range(5):
            model(input_ids=torch.full((4, 1), 5 + token), past_key_values=cache)
    assert dict(calls) == {("decode_attention", "native"): 5 * tiny.LAYERS}
    assert len({id(layer.state) for layer in cache.layers}) == 2  # one below the sparse layer, one from there on


@torch.no_grad()
def test_a_second_turn_prunes_its_own_images_and_leaves_earlier_turns_alone() -> None:
    model, run = attached(tiny.llava())
    batch = tiny.llava_batch(ROWS[:2], "left")
    turn = tiny.pad([tiny.row(2, 1, 3, seed=5), tiny.row(4, 0, 6, seed=6)], "left")
    first = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True)
    cache = first.past_key_values
    before = [cache.lengths(i) for i in range(tiny.LAYERS)]
    model.generate(
        input_ids=torch.cat([first.sequences, turn["input_ids"]], 1),
        attention_mask=torch.cat(
            [batch["attention_mask"], torch.ones(2, 4, dtype=torch.long), turn["attention_mask"]], 1
        ),
        pixel_values=tiny.pixels(1, seed=9),
        past_key_values=cache,
        max_new_tokens=1,
    )
    # The last token of the first turn comes with the second.
    assert run.layer_lengths == [[22, 11]] * 2 + [[6 + KEPT_OF_16, 11]] * 4
    for i in range(tiny.LAYERS):
        assert cache.lengths(i) == [n + m for n, m in zip(before[i], run.layer_lengths[i], strict=True)]
        assert cache.next_positions(i) == [24 + 3 + 22, 27 + 3 + 11]


@torch.no_grad()
def test_a_further_chunk_sees_what_earlier_turns_kept() -> None:
    """A chunk without an instruct predictor equals its tokens in one prompt that ends with an image-free turn."""
    model, _ = attached(tiny.language_model())
    prompt, chunk = language_batch(ROWS[:1]), torch.tensor([[5, 6, 7, 8]])
    cache = model(**prompt, use_cache=True).past_key_values
    logits = model(input_ids=chunk, past_key_values=cache).logits
    whole = torch.cat([prompt["input_ids"], chunk], 1)
    visual = nn.functional.pad(prompt["visual_token_mask"], (0, 4))
    expected = model(input_ids=whole, visual_token_mask=visual).logits[:, -4:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_with_an_instruct_predictor_a_chunk_sees_all_of_itself_and_stores_what_is_wanted(side: str) -> None:
    model, _ = attached(tiny.language_model(), WITH_INSTRUCT)
    other, _ = attached(tiny.language_model(), METHOD)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "instruct" not in k})
    rows = [[5, 16, 27, 38, 49, 60], [7, 18, 29]]
    turn = tiny.pad(rows, side)
    judged = []
    model.model.instruct_score_predictor.register_forward_hook(lambda *call: judged.append(call[2]))
    texts = tiny.pad([tiny.row(9, 0, 0, seed=1), tiny.row(5, 0, 0, seed=2)], "left")  # a prompt that stays whole
    logits, held = {}, {}
    for name, m in (("instruct", model), ("plain", other)):
        cache = m(**texts, use_cache=True).past_key_values
        mask = torch.cat([texts["attention_mask"], turn["attention_mask"]], 1)
        logits[name] = m(input_ids=turn["input_ids"], attention_mask=mask, past_key_values=cache).logits
        held[name] = cache
    torch.testing.assert_close(logits["instruct"], logits["plain"])
    wanted = [(j[:, 0] > j[:, 1]).tolist() for j in judged[-1].split([6, 3])]
    for row, before in enumerate((9, 5)):
        wanted[row][-1] = True
        kept = [t for t, want in enumerate(wanted[row]) if want]
        for i in range(tiny.LAYERS):
            layer, full = held["instruct"].layers[i], held["plain"].layers[i]
            columns = [*range(before), *(before + t for t in (kept if i >= 2 else range(len(rows[row]))))]
            assert held["instruct"].lengths(i)[row] == len(columns)
            torch.testing.assert_close(layer.keys[row, : len(columns)], full.keys[row, columns])
            torch.testing.assert_close(layer.values[row, : len(columns)], full.values[row, columns])
    assert 2 < sum(map(sum, wanted)) < 9
    # And a step on what was stored.
    token = torch.tensor([[5], [6]])
    steps = [m(input_ids=token, past_key_values=held[n]).logits for n, m in (("instruct", model), ("plain", other))]
    assert not torch.allclose(*steps)


@torch.no_grad()
def test_with_an_instruct_predictor_the_image_tokens_that_a_chunk_keeps_are_stored() -> None:
    model, run = attached(tiny.language_model(), WITH_INSTRUCT)
    cache = model(**language_batch(ROWS[2:3]), use_cache=True).past_key_values
    model.model.instruct_score_predictor.output_mlp[-1].bias[:] = torch.tensor([-1e3, 1e3])  # it wants nothing
    turn = language_batch([tiny.row(2, 1, 3, seed=5)])
    model(input_ids=turn["input_ids"], visual_token_mask=turn["visual_token_mask"], past_key_values=cache)
    assert run.layer_lengths == [[21]] * 2 + [[5 + KEPT_OF_16]] * 4
    assert [cache.lengths(i) for i in range(tiny.LAYERS)] == [[10 + 21]] * 2 + [[10 + KEPT_OF_16 + 1]] * 4


@torch.no_grad()
def test_a_row_that_is_padding_in_a_step_stays_as_it_was() -> None:
    model, _ = attached(tiny.language_model())
    batch = language_batch(ROWS[:2], "left")
    cache, mask = model(**batch, use_cache=True).past_key_values, batch["attention_mask"]
    alone = copy.deepcopy(cache)
    alone.batch_select_indices(torch.tensor([0]))
    before = cache.lengths(2)
    for token in fed(1)[0].tolist():
        mask = torch.cat([mask, torch.tensor([[1], [0]])], 1)
        logits = model(input_ids=torch.tensor([[token]] * 2), attention_mask=mask, past_key_values=cache).logits
        single = model(input_ids=torch.tensor([[token]]), past_key_values=alone).logits
        torch.testing.assert_close(logits[0], single[0], atol=1e-5, rtol=1e-5)
        assert cache.lengths(2) == [alone.lengths(2)[0], before[1]]
    assert before[0] < alone.lengths(2)[0] < before[0] + STEPS


def test_prune_needs_the_predictors_and_runs_on_those_that_are_there() -> None:
    model = tiny.language_model()
    with pytest.raises(ValueError, match="carries no predictors.*pruneops.attach"), pruneops.prune(model, METHOD):
        pass
    batch = language_batch(ROWS[:1], "left")
    with torch.no_grad():
        dense = model(**{k: v for k, v in batch.items() if k != "visual_token_mask"}).logits
        METHOD.prepare(model.model)
        with pruneops.prune(model, METHOD) as run:
            model(**batch)
        assert run.layer_lengths[-1] == [8 + KEPT_OF_16]
        inputs = {k: v for k, v in batch.items() if k != "visual_token_mask"}
        assert torch.equal(model(**inputs).logits, dense)
