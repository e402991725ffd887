"""PyramidDrop on whole models: what is kept, for whom, and that every way of running agrees."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

import pruneops
from pruneops.methods import PyramidDrop

DROP = PyramidDrop(layers=(2, 4), keep_ratios=(0.5, 0.25))
ROWS = [
    tiny.row(3, 1, 5, seed=1),
    tiny.row(2, 1, 9, seed=2),
    tiny.row(6, 0, 4, seed=3),
    tiny.row(1, 2, 3, seed=4),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_batch_generates_what_its_rows_generate_alone(side: str, use_cache: bool) -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS, side)
    with pruneops.prune(model, DROP):
        together = tiny.generated(model, batch, max_new_tokens=6, use_cache=use_cache)
        alone = [tiny.generated(model, inputs, max_new_tokens=6)[0] for inputs in tiny.rows_alone(batch, ROWS)]
    assert together == alone


@torch.no_grad()
def test_a_batch_keeps_the_tokens_that_its_rows_keep_alone() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS, "left")
    with pruneops.prune(model, DROP, record=True) as run:
        model(**batch)
        together = {(r.stage, r.row): r for r in run.records}
        for b, inputs in enumerate(tiny.rows_alone(batch, ROWS)):
            model(**inputs)
            for alone in run.records:
                assert together[alone.stage, b].kept_positions.tolist() == alone.kept_positions.tolist()
                torch.testing.assert_close(together[alone.stage, b].scores, alone.scores, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_every_image_of_a_row_is_cut_by_its_own_ratio_and_text_stays() -> None:
    model = tiny.llava()
    ids = tiny.row(2, 3, 4, seed=1, between=0)  # three images without text between them
    with pruneops.prune(model, PyramidDrop((1, 3), (0.7, 0.3)), record=True) as run:
        model(**tiny.llava_batch([ids]))
    images = [range(2 + 16 * i, 2 + 16 * (i + 1)) for i in range(3)]
    for record, kept in zip(run.records, (11, 4), strict=True):
        positions = record.kept_positions.tolist()
        assert positions == sorted(positions)
        assert [sum(p in image for p in positions) for image in images] == [kept] * 3
        assert {0, 1, *range(50, 54)} <= set(positions)
    assert [len(r.scores) for r in run.records] == [48, 33]


@pytest.mark.parametrize("family", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (8, 1)], ids=str)
@torch.no_grad()
def test_scores_are_the_attention_of_the_next_layer_to_the_image(family: str, heads: tuple[int, int]) -> None:
    """The first stage ranks by what the dense model's next layer does with the same tokens."""
    model = tiny.language_model(family, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    model.set_attn_implementation("eager")
    ids = torch.tensor([tiny.row(3, 2, 5, seed=1)])
    visual = ids == tiny.IMAGE
    for layer in (1, 3, tiny.LAYERS - 1):
        attention = model(input_ids=ids, output_attentions=True).attentions[layer]
        with pruneops.prune(model, PyramidDrop((layer,), (0.4,)), record=True) as run:
            model(input_ids=ids, visual_token_mask=visual)
        torch.testing.assert_close(run.records[0].scores, attention[0, :, -1, visual[0]].mean(0), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_kept_tokens_are_the_best_scored_ones() -> None:
    model = tiny.llava()
    with pruneops.prune(model, PyramidDrop((2,), (0.5,)), record=True) as run:
        model(**tiny.llava_batch(ROWS[:1]))
    (record,) = run.records
    best = record.scores.topk(8).indices.sort().values + 3
    assert record.kept_positions.tolist() == [0, 1, 2, *best.tolist(), *range(19, 24)]


@torch.no_grad()
def test_a_ratio_that_leaves_nothing_makes_the_image_vanish() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS[:1])
    with pruneops.prune(model, PyramidDrop((2, 4), (0.05, 0.01))) as run:
        model(**batch)
        sequences = model.generate(**batch, max_new_tokens=4)
    assert run.layer_lengths == [[24]] * 2 + [[8]] * 4
    assert sequences.shape[1] == 28


@torch.no_grad()
def test_an_image_may_have_text_between_its_tokens() -> None:
    model = tiny.language_model()
    ids = torch.randint(2, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0]])
    with pruneops.prune(model, PyramidDrop((2, 4), (0.5, 0.25)), record=True) as run:
        model(input_ids=ids, visual_token_mask=mask)
    text = (mask[0] == 0).nonzero().squeeze(1).tolist()
    for record, first, second in zip(run.records, (4, 2), (2, 1), strict=True):
        kept = record.kept_positions.tolist()
        assert set(text) <= set(kept)
        assert sum(mask[0, p] == 1 for p in kept) == first
        assert sum(mask[0, p] == 2 for p in kept) == second


@torch.no_grad()
def test_a_bool_mask_means_that_every_run_is_an_image() -> None:
    model = tiny.language_model()
    ids = torch.randint(2, 100, (1, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0, 0]])
    with pruneops.prune(model, DROP, record=True) as run:
        model(input_ids=ids, visual_token_mask=mask)
        numbered = [r.kept_positions.tolist() for r in run.records]
        model(input_ids=ids, visual_token_mask=mask > 0)
        assert [r.kept_positions.tolist() for r in run.records] == numbered


@torch.no_grad()
def test_dropped_places_are_zero_and_kept_ones_are_not() -> None:
    model = tiny.language_model()
    batch = tiny.pad([tiny.row(3, 1, 5, seed=1), tiny.row(9, 0, 3, seed=3)], "left")
    with pruneops.prune(model, DROP, record=True) as run:
        hidden = model.model(**batch, visual_token_mask=batch["input_ids"] == tiny.IMAGE).last_hidden_state
    for record in run.records[-2:]:
        valid = batch["attention_mask"][record.row].nonzero().squeeze(1)
        alive = torch.zeros(hidden.shape[1], dtype=torch.bool)
        alive[valid[record.kept_positions]] = True
        assert (hidden[record.row].abs().sum(1) > 0).tolist() == alive.tolist()


@torch.no_grad()
def test_a_prompt_may_end_in_an_image_whose_last_token_is_dropped() -> None:
    model = tiny.llava()
    ids = tiny.row(5, 1, 0, seed=1)
    images = tiny.pixels(8)
    ends_dropped = 0
    for seed in range(8):
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": images[seed : seed + 1]}
        with pruneops.prune(model, PyramidDrop((1,), (0.1,)), record=True) as run:
            logits = model(**inputs).logits[0]
        last = int(run.records[0].kept_positions[-1])
        ends_dropped += last != len(ids) - 1
        torch.testing.assert_close(logits[-1], logits[last])
        assert logits[-1].any()
    assert ends_dropped


def test_the_cache_of_each_layer_holds_the_tokens_of_its_stage() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS, "left")
    with pruneops.prune(model, DROP):
        cache = model.generate(**batch, max_new_tokens=5, return_dict_in_generate=True).past_key_values
    prompt = [[24, 27, 10, 38]] * 2 + [[16, 19, 10, 22]] * 2 + [[12, 15, 10, 14]] * 2
    assert [cache.lengths(i) for i in range(tiny.LAYERS)] == [[n + 4 for n in row] for row in prompt]
    assert [cache.next_positions(i) for i in range(tiny.LAYERS)] == [[n + 4 for n in row] for row in prompt]
    assert cache.get_seq_length() == batch["input_ids"].shape[1] + 4


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_beam_search_with_a_cache_equals_beam_search_without(options: dict) -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS[:2], "left")
    with pruneops.prune(model, DROP):
        cached = model.generate(**batch, max_new_tokens=6, **options)
        uncached = model.generate(**batch, max_new_tokens=6, use_cache=False, **options)
    assert cached.tolist() == uncached.tolist()


def test_a_second_turn_prunes_its_own_images_and_leaves_earlier_turns_alone() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS[:2], "left")
    turn = tiny.pad([tiny.row(2, 1, 3, seed=5), tiny.row(4, 0, 6, seed=6)], "left")
    with pruneops.prune(model, DROP) as run:
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
        assert run.layer_lengths == [[22, 11]] * 2 + [[14, 11]] * 2 + [[10, 11]] * 2
    for i in range(tiny.LAYERS):
        assert cache.lengths(i) == [n + m for n, m in zip(before[i], run.layer_lengths[i], strict=True)]
        assert cache.next_positions(i) == cache.lengths(i)


@torch.no_grad()
def test_a_text_only_second_turn_equals_feeding_it_token_by_token() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS[:2], "left")
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with pruneops.prune(model, DROP):
        cache = model(**batch, use_cache=True).past_key_values
        stepwise_cache = copy.deepcopy(cache)
        at_once = model(input_ids=tokens, past_key_values=cache).logits
        stepwise = [model(input_ids=tokens[:, t : t + 1], past_key_values=stepwise_cache).logits for t in range(3)]
    torch.testing.assert_close(at_once, torch.cat(stepwise, 1), atol=1e-5, rtol=1e-5)
    assert [cache.lengths(i) for i in range(tiny.LAYERS)] == [stepwise_cache.lengths(i) for i in range(tiny.LAYERS)]


def shortened_loss(logits: Tensor, labels: Tensor, kept: list[Tensor]) -> Tensor:
    """Mean cross entropy over the shortened rows: what a model that never saw the dropped tokens would compute."""
    predictions = torch.cat([logits[b, k[:-1]] for b, k in enumerate(kept)])
    targets = torch.cat([labels[b, k[1:]] for b, k in enumerate(kept)])
    return nn.functional.cross_entropy(predictions, targets, ignore_index=-100)


@pytest.mark.parametrize("ratios", [(0.5, 0.25), (0.5, 0.01)], ids=str)
def test_the_loss_is_that_of_the_shortened_rows_even_right_behind_an_image(ratios: tuple[float, ...]) -> None:
    """An answer right behind an image loses its predecessor; the surviving one before it predicts it."""
    model = tiny.language_model()
    ids = torch.tensor([tiny.row(3, 1, 6, seed=1), tiny.row(2, 1, 7, seed=2)])
    visual = ids == tiny.IMAGE
    labels = torch.full_like(ids, -100)
    labels[0, 19:22] = ids[0, 19:22]  # right behind the image
    labels[0, 23:] = ids[0, 23:]
    labels[1, 20:] = ids[1, 20:]
    with pruneops.prune(model, PyramidDrop((2, 4), ratios), record=True) as run:
        outputs = model(input_ids=ids, visual_token_mask=visual, labels=labels)
    kept = [r.kept_positions for r in run.records[-2:]]
    logits = outputs.logits.clone()
    last_before = int(kept[0][kept[0] < 19][-1])
    torch.testing.assert_close(logits[0, 18], logits[0, last_before])
    torch.testing.assert_close(outputs.loss, shortened_loss(logits, labels, kept))


def test_a_supervised_token_with_nothing_left_before_it_is_ignored() -> None:
    model = tiny.language_model()
    ids = torch.tensor([[tiny.IMAGE] * 16 + [5, 6, 7, 8]])
    labels = torch.where(ids == tiny.IMAGE, -100, ids)
    given = labels.clone()
    with pruneops.prune(model, PyramidDrop((2,), (0.01,)), record=True) as run:
        outputs = model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE, labels=labels)
    assert run.records[-1].kept_positions.tolist() == [16, 17, 18, 19]
    torch.testing.assert_close(outputs.loss, shortened_loss(outputs.logits, labels, [run.records[-1].kept_positions]))
    assert labels.tolist() == given.tolist()


def test_a_training_row_without_an_answer_is_left_alone() -> None:
    model = tiny.language_model().train()
    ids = torch.tensor([tiny.row(3, 1, 6, seed=1), tiny.row(2, 1, 7, seed=2)])
    labels = torch.full_like(ids, -100)
    labels[0, 20:] = ids[0, 20:]
    with pruneops.prune(model, DROP) as run:
        model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE, labels=labels).loss.backward()
    assert run.layer_lengths == [[25, 25]] * 2 + [[17, 25]] * 2 + [[13, 25]] * 2


def test_several_answers_average_the_scores_of_their_queries() -> None:
    model = tiny.language_model()
    ids = torch.tensor([tiny.row(3, 1, 9, seed=1)])
    visual = ids == tiny.IMAGE
    stage = PyramidDrop((2,), (0.5,))

    def scores(*answers: slice) -> Tensor:
        labels = torch.full_like(ids, -100)
        for answer in answers:
            labels[0, answer] = ids[0, answer]
        with torch.no_grad(), pruneops.prune(model, stage, record=True) as run:
            model(input_ids=ids, visual_token_mask=visual, labels=labels)
        return run.records[0].scores

    first, second = slice(21, 23), slice(25, 28)
    torch.testing.assert_close(scores(first, second), (scores(first) + scores(second)) / 2)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients() -> None:
    batch = tiny.llava_batch(ROWS, "left")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    results = []
    for checkpointing in (False, True):
        model = tiny.llava().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with pruneops.prune(model, DROP):
            loss = model(**batch, labels=labels).loss
            loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (loss_checkpointed, gradients_checkpointed) = results
    assert torch.equal(loss, loss_checkpointed)
    assert gradients.keys() == gradients_checkpointed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_checkpointed[name], gradient)


def test_reentrant_checkpointing_works_too() -> None:
    model = tiny.llava().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    batch = tiny.llava_batch(ROWS[:2], "left")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    with pruneops.prune(model, DROP):
        model(**batch, labels=labels).loss.backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_ranking_projects_only_the_keys_and_the_query_rows_it_needs() -> None:
    model = tiny.language_model()
    batch = tiny.pad([tiny.row(3, 1, 5, seed=1), tiny.row(9, 0, 3, seed=3)], "left")
    attention = model.model.layers[2].self_attn
    rows: dict[str, list[int]] = {"q_proj": [], "k_proj": [], "v_proj": []}
    for name, sizes in rows.items():
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, sizes=sizes: sizes.append(args[0].numel() // args[0].shape[-1])
        )
    with pruneops.prune(model, PyramidDrop((2,), (0.5,))):
        model(**batch, visual_token_mask=batch["input_ids"] == tiny.IMAGE)
    # The ranking sees the 24 tokens of the row with an image; the layer itself then sees 16 + 12.
    assert rows == {"q_proj": [1, 28], "k_proj": [24, 28], "v_proj": [28]}


def test_default_stages_are_the_quarter_points_of_the_depth() -> None:
    method = PyramidDrop()
    assert method.keep_ratios == (0.5, 0.25, 0.125)
    assert method.for_depth(32).layers == (8, 16, 24)
    assert method.for_depth(8).layers == (2, 4, 6)
    assert PyramidDrop(keep_ratios=(0.5,)).for_depth(6).layers == (3,)
