"""With a keep ratio of 1.0 the ragged decoder is the dense model, to 1e-5, in every way it can be used."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

import pruneops
from pruneops import backends
from pruneops.methods import PyramidDrop

KEEP_ALL = PyramidDrop(layers=(2, 4), keep_ratios=(1.0, 1.0))
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

ROWS = {
    "one image a row": [tiny.row(3, 1, 5, seed=1), tiny.row(2, 1, 9, seed=2)],
    "text-only row": [tiny.row(3, 1, 5, seed=1), tiny.row(9, 0, 3, seed=3)],
    "several images a row": [
        tiny.row(3, 2, 5, seed=1),
        tiny.row(1, 3, 4, seed=2, between=0),
        tiny.row(4, 1, 2, seed=3),
    ],
    "single row": [tiny.row(3, 1, 5, seed=1)],
    "only text": [tiny.row(5, 0, 4, seed=1), tiny.row(2, 0, 3, seed=2)],
}


def dense_logits_row_by_row(model: torch.nn.Module, rows: list[list[int]], pixel_values: Tensor | None) -> list[Tensor]:
    """Logits of each row run alone and unpadded."""
    logits, used = [], 0
    for ids in rows:
        images = ids.count(tiny.IMAGE) // tiny.IMAGE_TOKENS
        inputs = {"input_ids": torch.tensor([ids])}
        if images:
            inputs["pixel_values"] = pixel_values[used : used + images]
        used += images
        logits.append(model(**inputs).logits[0])
    return logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@torch.no_grad()
def test_padded_batch_equals_each_rows_own_unpadded_run(rows: list[list[int]], side: str) -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(rows, side)
    expected = dense_logits_row_by_row(model, rows, batch.get("pixel_values"))
    with pruneops.prune(model, KEEP_ALL), backends.record_calls() as calls:
        logits = model(**batch).logits
    assert {backend for _, backend in calls} == {"native"}
    for b in range(len(rows)):
        torch.testing.assert_close(logits[b][batch["attention_mask"][b].bool()], expected[b], **TOLERANCE)


@pytest.mark.parametrize("family", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (8, 1)], ids=str)
@torch.no_grad()
def test_bare_language_models_with_a_visual_token_mask(family: str, heads: tuple[int, int]) -> None:
    model = tiny.language_model(family, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    batch = tiny.pad([tiny.row(3, 1, 5, seed=1), tiny.row(9, 0, 3, seed=3)], "left")
    expected = model(**batch).logits
    with pruneops.prune(model, KEEP_ALL) as run:
        logits = model(**batch, visual_token_mask=batch["input_ids"] == tiny.IMAGE).logits
    assert run.layer_lengths == [[24, 12]] * tiny.LAYERS
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[valid], expected[valid], **TOLERANCE)


@torch.no_grad()
def test_anyres_images_of_llava_next() -> None:
    model = tiny.llava_next()
    image_sizes = torch.tensor([[16, 30], [32, 14]])
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, 3, 3, 16, 16, generator=generator)
    features = model.model.get_image_features(pixel_values, image_sizes).pooler_output
    rows = [
        [5, 6, *[tiny.IMAGE] * len(features[0]), 7, 8, 9],
        [4, *[tiny.IMAGE] * len(features[1]), 3],
    ]
    assert len(features[0]) != len(features[1])
    batch = {**tiny.pad(rows, "left"), "pixel_values": pixel_values, "image_sizes": image_sizes}
    expected = model(**batch).logits
    with pruneops.prune(model, KEEP_ALL):
        logits = model(**batch).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[valid], expected[valid], **TOLERANCE)


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "several sequences a prompt": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 3},
    "beam search, several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "without a cache": {"use_cache": False},
    "beam search without a cache": {"num_beams": 2, "use_cache": False},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
def test_generate_gives_the_dense_tokens_and_logits(options: dict) -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS["several images a row"][:1] + ROWS["text-only row"], "left")
    if options.get("num_beams", 1) * options.get("num_return_sequences", 1) > 1:
        # Stock generate() repeats pixel_values image by image, which only fits rows with one image each.
        batch = tiny.llava_batch(ROWS["one image a row"], "left")
    options = {**options, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    expected = model.generate(**batch, **options)
    with pruneops.prune(model, KEEP_ALL):
        torch.manual_seed(0)
        outputs = model.generate(**batch, **options)
    assert outputs.sequences.tolist() == expected.sequences.tolist()
    for ours, dense in zip(outputs.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, dense, **TOLERANCE)


def test_right_padded_generate_continues_each_row_as_if_it_were_alone() -> None:
    model = tiny.llava()
    rows = ROWS["one image a row"]
    batch = tiny.llava_batch(rows, "right")
    expected = []
    for b, ids in enumerate(rows):
        alone = model.generate(
            input_ids=torch.tensor([ids]), pixel_values=batch["pixel_values"][b : b + 1], max_new_tokens=5
        )
        expected.append(alone[0, len(ids) :].tolist())
    with pruneops.prune(model, KEEP_ALL):
        for options in ({}, {"use_cache": False}):
            sequences = model.generate(**batch, max_new_tokens=5, **options)
            assert sequences[:, batch["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("second_image", [False, True])
def test_a_second_turn_on_the_cache(second_image: bool) -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS["one image a row"], "left")
    turn = tiny.pad([tiny.row(2, int(second_image), 3, seed=5), tiny.row(4, int(second_image), 6, seed=6)], "left")

    def two_turns() -> tuple[Tensor, Tensor]:
        first = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, turn["input_ids"]], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long), turn["attention_mask"]], 1)
        images = {"pixel_values": tiny.pixels(2, seed=9)} if second_image else {}
        second = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            output_logits=True,
            return_dict_in_generate=True,
            **images,
        )
        return second.sequences, torch.stack(second.logits)

    expected_ids, expected = two_turns()
    with pruneops.prune(model, KEEP_ALL):
        ids, logits = two_turns()
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def labels_of(batch: dict[str, Tensor], answers: int) -> Tensor:
    """The last tokens of every row supervised."""
    labels = torch.full_like(batch["input_ids"], -100)
    for b in range(labels.shape[0]):
        valid = batch["attention_mask"][b].nonzero().squeeze(1)[-answers:]
        labels[b, valid] = batch["input_ids"][b, valid]
    return labels


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(checkpointing: bool) -> None:
    model = tiny.llava().train()
    batch = tiny.llava_batch(ROWS["text-only row"], "left")
    batch["labels"] = labels_of(batch, 3)
    expected_loss = model(**batch, use_cache=False).loss
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with pruneops.prune(model, KEEP_ALL):
        loss = model(**batch).loss
        loss.backward()
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE)
    assert set(expected) == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        error = (dict(model.named_parameters())[name].grad - gradient).abs().max()
        assert error <= 1e-5 * max(1.0, gradient.abs().max().item()), name


@torch.no_grad()
def test_autocast_is_as_accurate_as_the_dense_model_under_autocast() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS["one image a row"], "left")
    valid = batch["attention_mask"].bool()
    exact = model(**batch).logits[valid]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(**batch).logits[valid].float()
        with pruneops.prune(model, KEEP_ALL):
            ours = model(**batch).logits[valid].float()
            sequences = model.generate(**batch, max_new_tokens=3)
    rounding = (exact.to(torch.bfloat16).float() - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * (dense - exact).abs().max() + rounding
    assert sequences.shape[1] == batch["input_ids"].shape[1] + 3


@torch.no_grad()
def test_bfloat16_weights() -> None:
    model = tiny.llava().to(torch.bfloat16)
    batch = tiny.llava_batch(ROWS["one image a row"], "left")
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    valid = batch["attention_mask"].bool()
    dense = model(**batch).logits[valid].float()
    exact = model.float()(**{**batch, "pixel_values": batch["pixel_values"].float()}).logits[valid]
    model.to(torch.bfloat16)
    with pruneops.prune(model, KEEP_ALL):
        ours = model(**batch).logits[valid].float()
    rounding = (exact.to(torch.bfloat16).float() - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * (dense - exact).abs().max() + rounding


@torch.no_grad()
def test_hidden_states_of_every_layer() -> None:
    model = tiny.llava()
    batch = tiny.llava_batch(ROWS["one image a row"], "left")
    expected = model(**batch, output_hidden_states=True).hidden_states
    with pruneops.prune(model, KEEP_ALL):
        hidden_states = model(**batch, output_hidden_states=True).hidden_states
    valid = batch["attention_mask"].bool()
    assert len(hidden_states) == len(expected) == tiny.LAYERS + 1
    for ours, dense in zip(hidden_states, expected, strict=True):
        torch.testing.assert_close(ours[valid], dense[valid], **TOLERANCE)


@torch.no_grad()
def test_inputs_embeds_and_positions_given_by_the_caller() -> None:
    model = tiny.language_model()
    batch = tiny.pad([tiny.row(3, 1, 5, seed=1), tiny.row(9, 0, 3, seed=3)], "left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + 7
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
        "position_ids": positions,
    }
    expected = model(**inputs).logits
    with pruneops.prune(model, KEEP_ALL):
        logits = model(**inputs, visual_token_mask=batch["input_ids"] == tiny.IMAGE).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[valid], expected[valid], **TOLERANCE)
