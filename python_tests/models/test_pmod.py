"""p-MoD on whole models: who goes through a layer, what comes out, and that every way of running agrees."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import tiny
import torch
from pmod_models import KEPT_OF_16, KEPT_OF_32, MOD_LAYERS, ROWS, attached
from torch import Tensor, nn

import pruneops
from pruneops import backends
from pruneops.methods import PMoD
from pruneops.methods.mod_layer import ModDecoderLayer
from pruneops.pruning import find_text_model


def reference_logits(model: nn.Module, method: PMoD, ids: list[int], visual: Tensor) -> tuple[Tensor, list[list[int]]]:
    """One row through the layers of a language model with p-MoD attached, spelled out with masks and plain torch.

    Returns ``(tokens, vocabulary)`` logits and what went through each layer.
    """
    text_model, went = model.model, []
    ratios = method.keep_ratios(len(text_model.layers))
    activation, scale, shift = (*method.weight_norm.split("_"), 1, 1)[:3]
    act = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softmax": lambda g: g.softmax(0), "none": lambda g: g}
    x = text_model.embed_tokens(torch.tensor([ids]))[0]
    for i, layer in enumerate(text_model.layers):
        through, weights = torch.ones(len(ids), dtype=torch.bool), x.new_ones(len(ids), 1)
        if i in ratios and visual.any():
            logits = torch.where(visual, layer.router.router(x)[:, 0], -math.inf)
            gate = float(scale) * act[activation](logits) + float(shift)
            count = int(torch.tensor(int(visual.sum()), dtype=torch.int32) * ratios[i])
            rank = float(scale) * act[activation](logits.float()) + float(shift) if method.parity else logits
            best = rank.argsort(descending=True, stable=True)[:count]
            through = ~visual
            through[best] = True
            weights = torch.where(visual, gate, 1.0)[:, None]
        dense = layer.decoder_layer if isinstance(layer, ModDecoderLayer) else layer
        inside = x[through][None]
        position_embeddings = text_model.rotary_emb(inside, through.nonzero().T)
        causal = x.new_full((inside.shape[1],) * 2, -math.inf).triu(1)[None, None]
        attention = dense.self_attn(
            dense.input_layernorm(inside), attention_mask=causal, position_embeddings=position_embeddings
        )[0]
        residual = inside + attention
        branch = dense.mlp(dense.post_attention_layernorm(residual))
        out = weights * x
        out[through] = (residual + weights[through] * branch)[0]
        x = out
        went.append(through.nonzero().squeeze(1).tolist())
    return model.lm_head(text_model.norm(x)), went


VARIANTS = {
    "default": PMoD(),
    "parity": PMoD("deep_all", parity=True),
    "interleave": PMoD("interleave", router_factor=0.3, weight_norm="sigmoid"),
    "from layer 0": PMoD("shiftedlinear_decay_1.00_0.20", weight_norm="sigmoid_0.5_-0.1"),
    "softmax": PMoD("deep_all_include_last", weight_norm="softmax_0.5_1", router_bias=False),
    "none": PMoD(weight_norm="none_0.1_1"),
    "plain tanh": PMoD(weight_norm="tanh"),
    "text too": PMoD("deep_all", target="all"),
    "text too, parity": PMoD("deep_all", target="all", parity=True),
}


def run_and_reference(family: str, method: PMoD, heads: tuple[int, int], bias: float = 0.0) -> None:
    """A padded batch, with its gradients, beside the rows one by one."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model, run = attached(tiny.language_model(family, **sizes), method, record=True)
    for layer in model.model.layers:
        if isinstance(layer, ModDecoderLayer) and method.router_bias:
            layer.router.router.bias.data.add_(bias)
    by_hand = copy.deepcopy(model)
    pruneops.detach(by_hand)
    by_hand.set_attn_implementation("eager")
    method.prepare(by_hand.model)
    by_hand.load_state_dict(model.state_dict())
    by_hand.double()
    model.train()

    batch = tiny.pad(ROWS, "left")
    visual = batch["input_ids"] == tiny.IMAGE
    with backends.record_calls() as calls:
        logits = model(**batch, visual_token_mask=visual).logits
    assert {backend for _, backend in calls} == {"native"}
    toward = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    valid = batch["attention_mask"].bool()
    (logits * toward)[valid].sum().backward()

    expected = []
    for row, ids in enumerate(ROWS):
        row_logits, went = reference_logits(by_hand, method, ids, visual[row, valid[row]] | (method.target == "all"))
        expected.append(row_logits)
        kept = {r.layer: r.kept_positions.tolist() for r in run.records if r.row == row}
        assert kept and all(positions == went[i] for i, positions in kept.items())
    torch.testing.assert_close(logits[valid], torch.cat(expected).float(), atol=1e-5, rtol=1e-5)
    (torch.cat(expected) * toward[valid]).sum().backward()
    largest = max(p.grad.abs().max().item() for p in by_hand.parameters())
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        error, scale = (ours.grad - theirs.grad).abs().max().item(), theirs.grad.abs().max().item()
        assert error < 5e-5 * scale + 1e-7 * largest, (name, error, scale)


@pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_padded_batch_and_its_gradients_equal_the_formulas_row_by_row(method: PMoD) -> None:
    run_and_reference("llama", method, (4, 2))


@pytest.mark.parametrize("family", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2)], ids=str)
def test_every_language_model_and_head_grouping_equals_the_formulas(family: str, heads: tuple[int, int]) -> None:
    run_and_reference(family, PMoD(), heads)


def test_with_parity_a_saturated_target_may_lose_its_place_to_text() -> None:
    """At logits this low the weights of targets are those of text, and of equal weights the first tokens win."""
    run_and_reference("llama", PMoD("deep_all", parity=True), (4, 2), bias=-9.5)


@torch.no_grad()
def test_places_lost_to_text_are_neither_cached_nor_seen() -> None:
    method = PMoD("deep_all", parity=True)
    model, run = attached(tiny.language_model(), method, record=True)
    for layer in model.model.layers[2:5]:
        layer.router.router.bias.fill_(-30.0)
    batch = tiny.pad(ROWS, "left")
    visual = batch["input_ids"] == tiny.IMAGE
    cache = model(**batch, visual_token_mask=visual, use_cache=True).past_key_values
    texts = [8, 11, 10, 6]
    # 8 of 16 (16 of 32) places, of which the text before the image and that between two images takes some.
    assert [cache.lengths(i) for i in (2, 3, 4)] == [[8 + 5, 11 + 6, 10, 6 + 15]] * 3
    for record in run.records:
        kept = record.kept_positions
        assert len(kept) == cache.lengths(record.layer)[record.row] >= texts[record.row]
    options = {"visual_token_mask": visual, "max_new_tokens": 6}
    assert model.generate(**batch, **options).tolist() == model.generate(**batch, **options, use_cache=False).tolist()


@torch.no_grad()
def test_parity_ranks_by_weights_of_the_models_dtype() -> None:
    """In bfloat16 many weights are equal: the first token wins, although another's logit is higher."""
    ids, visual = torch.tensor([ROWS[0]]), torch.tensor([ROWS[0]]) == tiny.IMAGE
    differ = 0
    for parity in (True, False):
        model, run = attached(tiny.language_model().bfloat16(), PMoD("deep_all", parity=parity), record=True)
        hidden = model(input_ids=ids, visual_token_mask=visual, output_hidden_states=True).hidden_states
        for record in run.records:
            router = model.model.layers[record.layer].router.router
            logits = (hidden[record.layer][0, visual[0]].float() @ router.weight[0].float()) + router.bias.float()
            rounded = 0.2 * torch.tanh(logits.bfloat16()) + 1
            by_logit, by_weight = (s.argsort(descending=True, stable=True)[:8].sort()[0] for s in (logits, rounded))
            kept = record.kept_positions[3:-5] - 3
            assert kept.tolist() == (by_weight if parity else by_logit).tolist()
            differ += by_logit.tolist() != by_weight.tolist()
    assert differ


def test_a_new_router_weighs_every_token_1_and_keeps_the_first() -> None:
    model = tiny.language_model()
    run = pruneops.attach(model, PMoD(), record=True)
    ids = torch.tensor([ROWS[0]])
    logits = model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE).logits
    assert [r.layer for r in run.records] == MOD_LAYERS and [r.stage for r in run.records] == [0, 1, 2, 3]
    for record, count in zip(run.records, KEPT_OF_16, strict=True):
        assert record.scores.tolist() == [1.0] * 16
        assert record.kept_positions.tolist() == [*range(3 + count), *range(19, 24)]
    logits.sum().backward()
    assert all(model.model.layers[i].router.router.weight.grad.abs().sum() > 0 for i in MOD_LAYERS)


def test_the_images_of_a_row_share_one_pool() -> None:
    model, run = attached(tiny.language_model(), record=True)
    ids = torch.tensor([ROWS[3]])
    with torch.no_grad():
        model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE)
    shares = []
    for record, count in zip(run.records, KEPT_OF_32, strict=True):
        first, second = (sum(p in image for p in record.kept_positions) for image in (range(1, 17), range(19, 35)))
        assert first + second == count and len(record.scores) == 32
        shares.append((first, second))
    assert any(first != second for first, second in shares)


@torch.no_grad()
def test_an_image_may_have_text_between_its_tokens() -> None:
    model, run = attached(tiny.language_model(), PMoD("deep_all"), record=True)
    ids = torch.randint(2, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0]])
    model(input_ids=ids, visual_token_mask=mask)
    assert run.records
    for record in run.records:
        kept = record.kept_positions
        assert set((mask[0] == 0).nonzero().squeeze(1).tolist()) <= set(kept.tolist())
        assert int((mask[0, kept] > 0).sum()) == 6 and len(record.scores) == 13


# -- ways of running ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_batch_generates_what_its_rows_generate_alone(side: str, use_cache: bool) -> None:
    model, _ = attached(tiny.llava())
    batch = tiny.llava_batch(ROWS, side)
    together = tiny.generated(model, batch, max_new_tokens=6, use_cache=use_cache)
    alone = [tiny.generated(model, inputs, max_new_tokens=6)[0] for inputs in tiny.rows_alone(batch, ROWS)]
    assert together == alone


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_beam_search_with_a_cache_equals_beam_search_without(options: dict) -> None:
    model, _ = attached(tiny.llava())
    batch = tiny.llava_batch(ROWS[:2], "left")
    cached = model.generate(**batch, max_new_tokens=6, **options)
    assert cached.tolist() == model.generate(**batch, max_new_tokens=6, use_cache=False, **options).tolist()


def test_every_layer_caches_what_went_through_it_and_all_new_tokens() -> None:
    model, run = attached(tiny.llava())
    batch = tiny.llava_batch(ROWS, "left")
    cache = model.generate(**batch, max_new_tokens=5, return_dict_in_generate=True).past_key_values
    full = [len(ids) for ids in ROWS]
    lengths = [full, full]
    lengths += [[8 + k, 11 + k, 10, 6 + k_of_32] for k, k_of_32 in zip(KEPT_OF_16, KEPT_OF_32, strict=True)]
    assert run.layer_lengths == lengths
    for i in range(tiny.LAYERS):
        assert cache.lengths(i) == [n + 4 for n in lengths[i]]
        assert cache.next_positions(i) == [n + 4 for n in full]  # positions are the original ones everywhere


def test_decoding_runs_plain_layers() -> None:
    model, _ = attached(tiny.llava())
    with torch.no_grad():
        cache = model(**tiny.llava_batch(ROWS[:1]), use_cache=True).past_key_values
        with backends.record_calls() as calls:
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert {op for op, _ in calls} == {"decode_attention"}


def test_a_second_turn_routes_its_own_images_and_leaves_earlier_turns_alone() -> None:
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
    assert run.layer_lengths == [[22, 11]] * 2 + [[6 + k, 11] for k in KEPT_OF_16]
    for i in range(tiny.LAYERS):
        assert cache.lengths(i) == [n + m for n, m in zip(before[i], run.layer_lengths[i], strict=True)]
        assert cache.next_positions(i) == [24 + 3 + 22, 27 + 3 + 11]


@torch.no_grad()
def test_a_further_turn_with_an_image_equals_the_same_turn_with_its_tokens_kept() -> None:
    """What goes through sees the keys of earlier turns that the layer holds, at the original positions."""
    model, run = attached(tiny.language_model(), PMoD("deep_all", router_factor=1.0))
    ids = torch.tensor([ROWS[0] + tiny.row(2, 1, 3, seed=5)])
    visual = ids == tiny.IMAGE
    whole = model(input_ids=ids, visual_token_mask=visual).logits
    cache = model(input_ids=ids[:, :24], visual_token_mask=visual[:, :24], use_cache=True).past_key_values
    chunk = model(input_ids=ids[:, 24:], visual_token_mask=visual[:, 24:], past_key_values=cache).logits
    torch.testing.assert_close(chunk, whole[:, 24:], atol=1e-5, rtol=1e-5)
    assert run.layer_lengths == [[21]] * tiny.LAYERS


@torch.no_grad()
def test_a_text_only_second_turn_equals_feeding_it_token_by_token() -> None:
    model, _ = attached(tiny.llava())
    batch = tiny.llava_batch(ROWS[:2], "left")
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    cache = model(**batch, use_cache=True).past_key_values
    stepwise_cache = copy.deepcopy(cache)
    at_once = model(input_ids=tokens, past_key_values=cache).logits
    stepwise = [model(input_ids=tokens[:, t : t + 1], past_key_values=stepwise_cache).logits for t in range(3)]
    torch.testing.assert_close(at_once, torch.cat(stepwise, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_given_positions_are_used_as_they_are() -> None:
    model, _ = attached(tiny.language_model())
    ids = torch.tensor([ROWS[0]])
    inputs = {"input_ids": ids, "visual_token_mask": ids == tiny.IMAGE}
    counted = model(**inputs).logits
    # Rotary attention is relative: a shift changes nothing, a stretch does.
    positions = torch.arange(24)[None]
    shifted, stretched = (model(**inputs, position_ids=p).logits for p in (positions + 7, positions * 2))
    torch.testing.assert_close(shifted, counted, atol=1e-5, rtol=1e-5)
    assert (stretched - counted).abs().max() > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(reentrant: bool) -> None:
    batch = tiny.llava_batch(ROWS, "left")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    results = []
    for checkpointing in (False, True):
        model, run = attached(tiny.llava().train(), record=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert all(find_text_model(model).layers[i].gradient_checkpointing for i in range(tiny.LAYERS))
        loss = model(**batch, labels=labels).loss
        before = (run.layer_lengths, len(run.records))
        loss.backward()
        assert (run.layer_lengths, len(run.records)) == before  # running a layer again leaves no trace
        assert len(run.layer_lengths) == tiny.LAYERS and len(run.records) == 4 * 4
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (loss_checkpointed, gradients_checkpointed) = results
    assert torch.equal(loss, loss_checkpointed)
    assert gradients.keys() == gradients_checkpointed.keys() and any("router" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_checkpointed[name], gradient)


def test_checkpointing_switched_on_before_attach_reaches_the_new_layers() -> None:
    model = tiny.language_model().train()
    model.gradient_checkpointing_enable()
    pruneops.attach(model, PMoD())
    runs = []
    model.model.layers[3].decoder_layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    ids = torch.tensor([ROWS[0]])
    model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE).logits.sum().backward()
    assert len(runs) == 2


def test_a_pass_that_is_not_followed_by_a_backward_pass_frees_its_memory() -> None:
    """A checkpointed layer may not hold on to what came after it: that would be a circle no collector sees."""
    model, _ = attached(tiny.language_model().train())
    model.gradient_checkpointing_enable()
    last = []
    model.model.norm.register_forward_hook(lambda module, args, output: last.append(weakref.ref(output)))
    ids = torch.tensor([ROWS[0]])
    outputs = model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE)
    assert last[0]() is not None
    del outputs
    gc.collect()
    assert last[0]() is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_without_targets_is_the_dense_model_and_gives_routers_a_gradient_of_zero(checkpointing: bool) -> None:
    """Zero, not none: data-parallel training waits for the gradient of every parameter."""
    model = tiny.language_model().train()
    ids = torch.tensor([ROWS[2]])
    expected = model(input_ids=ids).logits
    expected.sum().backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model, run = attached(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    runs = []
    model.model.layers[3].decoder_layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    logits = model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert len(runs) == 1 + checkpointing  # not a checkpoint within a checkpoint
    assert run.layer_lengths == [[10]] * tiny.LAYERS
    for name, parameter in model.named_parameters():
        gradient = dense.get(name.replace("decoder_layer.", ""), torch.zeros_like(parameter))
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_labels_are_not_asked_for(recwarn: pytest.WarningsRecorder) -> None:
    model, _ = attached(tiny.language_model().train())
    ids = torch.tensor([ROWS[0]])
    model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE)
    assert not [w for w in recwarn if "labels" in str(w.message)]


@torch.no_grad()
def test_bfloat16_stays_close_to_float32() -> None:
    batch = tiny.llava_batch(ROWS, "left")
    model, _ = attached(tiny.llava(), PMoD(router_factor=1.0, layers="deep_all"))
    expected = model(**batch).logits
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    logits = model.bfloat16()(**batch).logits
    valid = batch["attention_mask"].bool()
    assert logits.dtype == torch.bfloat16
    assert (logits[valid].float() - expected[valid]).abs().max() < 0.05 * expected[valid].abs().max()


def test_autocast_trains() -> None:
    model, _ = attached(tiny.language_model().train())
    ids = torch.tensor([ROWS[0]])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, visual_token_mask=ids == tiny.IMAGE, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


# -- target types ------------------------------------------------------------------------------------------------------


def anyres_batch(model: nn.Module) -> tuple[dict[str, Tensor], list[int]]:
    image_sizes = torch.tensor([[16, 30], [32, 14]])
    pixel_values = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        counts = [len(f) for f in model.model.get_image_features(pixel_values, image_sizes).pooler_output]
    rows = [[5, 6, *[tiny.IMAGE] * counts[0], 7, 8, 9], [4, *[tiny.IMAGE] * counts[1], 3]]
    return {**tiny.pad(rows, "left"), "pixel_values": pixel_values, "image_sizes": image_sizes}, counts


@torch.no_grad()
def test_all_tokens_of_an_anyres_image_are_targets_newlines_too() -> None:
    model, run = attached(tiny.llava_next(), PMoD("deep_all"), record=True)
    batch, counts = anyres_batch(model)
    model(**batch)
    assert [len(r.scores) for r in run.records] == counts * 3 and min(counts) > 16
    assert run.layer_lengths[2] == [5 + counts[0] // 2, 2 + counts[1] // 2]


@torch.no_grad()
def test_with_vision_hr_the_base_view_of_an_image_goes_through_every_layer() -> None:
    model, run = attached(tiny.llava_next(), PMoD("deep_all", target="vision_hr"), record=True)
    assert run.method.base_tokens == 16
    batch, counts = anyres_batch(model)
    model(**batch)
    for record in run.records:
        start = (2, 1)[record.row]
        assert len(record.scores) == counts[record.row] - 16
        assert set(range(start + 16)) <= set(record.kept_positions.tolist())
        assert len(record.kept_positions) == (5, 2)[record.row] + 16 + (counts[record.row] - 16) // 2
    assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


@torch.no_grad()
def test_with_vision_hr_tokens_are_counted_across_text_within_an_image() -> None:
    model, run = attached(tiny.language_model(), PMoD("deep_all", target="vision_hr", base_tokens=3), record=True)
    ids = torch.randint(2, 100, (1, 18), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 2, 2, 3, 3, 3, 3, 3, 0]])
    model(input_ids=ids, visual_token_mask=mask)
    targets = [5, 7, 8, 15, 16]
    for record in run.records:
        kept = record.kept_positions.tolist()
        assert len(record.scores) == 5 and set(range(18)) - set(targets) <= set(kept)
        assert sum(p in targets for p in kept) == 2
