"""Models that take videos beside images: each image and video is a group of its own, and rows are independent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from test_prune_context import fingerprint
from torch import Tensor

import pruneops
from pruneops import models, stand_ins
from pruneops.methods import PruneVid, PyramidDrop
from pruneops.methods.base import PruningMethod
from pruneops.methods.prunevid import MergeRecord

KEEP_ALL = PyramidDrop(layers=(1,), keep_ratios=(1.0,))
DROP = PyramidDrop(layers=(2, 4), keep_ratios=(0.5, 0.25))
MERGE = PruneVid(tau=0.6, selected_layer=3)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
FRAMES = 3

Rows = Sequence[Sequence[int | str]]
MIXED = {
    "one of each": [[3, "image", 2, "video", 5], [2, "video", 4, "image", 3]],
    "side by side": [["video", "video", 4], [1, "image", "video", "image", "image", 6]],
    "text-only row": [[3, "video", 5], [9], ["image", 4]],
}
VIDEOS_ONLY = {
    "one a row": [[3, "video", 5], [2, "video", 9]],
    "side by side": [["video", "video", 4], [1, "video", 2, "video", 6]],
    "text-only row": [[3, "video", 5], [9]],
}
CASES = [
    pytest.param(family, rows, id=f"{name}-{case}")
    for name, family in tiny.VIDEO_FAMILIES.items()
    for case, rows in (VIDEOS_ONLY if name == "pllava" else MIXED).items()
]
FAMILIES = pytest.mark.parametrize("family", tiny.VIDEO_FAMILIES.values(), ids=tiny.VIDEO_FAMILIES.keys())


def some_rows(family: tiny.VideoFamily) -> Rows:
    return VIDEOS_ONLY["side by side"] if family.build is tiny.pllava else MIXED["side by side"]


def each_alone(model: torch.nn.Module, family: tiny.VideoFamily, batch: dict[str, Tensor], rows: Rows) -> list[Tensor]:
    """Logits of each row run alone and unpadded."""
    return [model(**family.single(batch, rows, b)).logits[0] for b in range(len(rows))]


def expected_numbers(family: tiny.VideoFamily, parts: Sequence[int | str], first_image: int) -> list[int]:
    numbers, count = [], 0
    for part in parts:
        if isinstance(part, int):
            numbers += [0] * part
            continue
        count += 1
        if part == "video":
            numbers += [count] * (FRAMES * family.patches) + [0] * family.newlines
        else:
            numbers += [count] * family.image_tokens[first_image % 2]
            first_image += 1
    return numbers


# -- the same as the stock model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "rows"), CASES)
@torch.no_grad()
def test_a_padded_batch_that_keeps_everything_equals_each_rows_own_dense_run(
    family: tiny.VideoFamily, rows: Rows, side: str
) -> None:
    model = family.build()
    batch = family.batch(rows, FRAMES, side)
    expected = each_alone(model, family, batch, rows)
    with pruneops.prune(model, KEEP_ALL):
        logits = model(**batch).logits
    for b in range(len(rows)):
        torch.testing.assert_close(logits[b][batch["attention_mask"][b].bool()], expected[b], **TOLERANCE)


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
@FAMILIES
def test_generate_that_keeps_everything_gives_the_dense_tokens_and_logits(
    family: tiny.VideoFamily, options: dict
) -> None:
    model = family.build()
    # Stock generate() repeats pixel values video by video for beams, which only fits rows with one each.
    rows = VIDEOS_ONLY["one a row"] if "num_beams" in options else some_rows(family)
    batch = family.batch(rows, FRAMES)
    options = {**options, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    expected = model.generate(**batch, **options)
    with pruneops.prune(model, KEEP_ALL):
        torch.manual_seed(0)
        outputs = model.generate(**batch, **options)
    assert outputs.sequences.tolist() == expected.sequences.tolist()
    for ours, dense in zip(outputs.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, dense, **TOLERANCE)


@FAMILIES
def test_loss_and_gradients_that_keep_everything_are_the_dense_ones(family: tiny.VideoFamily) -> None:
    model = family.build().train()
    batch = family.batch([[3, "video", 5], [2, "video", 2, "video", 6]], FRAMES)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -3:] = batch["input_ids"][:, -3:]
    results = []
    for method in (None, KEEP_ALL):
        model.zero_grad()
        if method is None:
            loss = model(**batch, labels=labels, use_cache=False).loss
        else:
            with pruneops.prune(model, method):
                loss = model(**batch, labels=labels).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (dense_loss, dense), (loss, ours) = results
    torch.testing.assert_close(loss, dense_loss, **TOLERANCE)
    assert ours.keys() == dense.keys()
    assert any("multi_modal_projector" in name for name in ours)
    for name, gradient in dense.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@FAMILIES
def test_a_second_turn_with_another_video_on_the_cache(family: tiny.VideoFamily) -> None:
    model = family.build()
    model.generation_config.suppress_tokens = [tiny.IMAGE, tiny.VIDEO]
    rows = VIDEOS_ONLY["one a row"]
    first, turn = family.batch(rows, FRAMES), family.batch([[2, "video", 3], [4, "video", 6]], FRAMES)

    def two_turns() -> tuple[Tensor, Tensor]:
        answer = model.generate(**first, max_new_tokens=4, return_dict_in_generate=True)
        masks = [first["attention_mask"], torch.ones(2, 4, dtype=torch.long), turn["attention_mask"]]
        outputs = model.generate(
            input_ids=torch.cat([answer.sequences, turn["input_ids"]], 1),
            attention_mask=torch.cat(masks, 1),
            pixel_values_videos=turn["pixel_values_videos"].flip(0),
            past_key_values=answer.past_key_values,
            max_new_tokens=4,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return outputs.sequences, torch.stack(outputs.logits)

    expected_ids, expected = two_turns()
    with pruneops.prune(model, KEEP_ALL):
        ids, logits = two_turns()
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logits, expected, **TOLERANCE)


# -- which tokens are whose --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "rows"), CASES)
@torch.no_grad()
def test_images_and_videos_are_numbered_in_order_of_appearance_with_their_frames(
    family: tiny.VideoFamily, rows: Rows, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    stock = stand_ins.ragged_forward
    monkeypatch.setattr(
        stand_ins, "ragged_forward", lambda *args, **kwargs: seen.update(kwargs) or stock(*args, **kwargs)
    )
    model = family.build()
    batch = family.batch(rows, FRAMES, side)
    with pruneops.prune(model, KEEP_ALL):
        model(**batch)
    images = 0
    for b, parts in enumerate(rows):
        numbers = seen["visual_token_mask"][b][batch["attention_mask"][b].bool()].tolist()
        assert numbers == expected_numbers(family, parts, images)
        images += parts.count("image")
    media = [part for parts in rows for part in parts if isinstance(part, str)]
    assert seen["num_frames"] == [FRAMES if part == "video" else 1 for part in media]


@FAMILIES
@torch.no_grad()
def test_what_the_caller_says_of_frames_and_images_goes_first(
    family: tiny.VideoFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    stock = stand_ins.ragged_forward
    monkeypatch.setattr(
        stand_ins, "ragged_forward", lambda *args, **kwargs: seen.update(kwargs) or stock(*args, **kwargs)
    )
    model = family.build()
    batch = family.batch(VIDEOS_ONLY["one a row"], 4)
    with pruneops.prune(model, KEEP_ALL):
        model(**batch, num_frames=[2, 1])
        assert seen["num_frames"] == [2, 1]
        mask = torch.zeros_like(batch["input_ids"])
        mask[:, 20:25] = 1
        model(**batch, visual_token_mask=mask)
    assert torch.equal(seen["visual_token_mask"], mask) and seen["num_frames"] is None


@torch.no_grad()
def test_images_of_pllava_are_videos_that_stand_still() -> None:
    family = tiny.VIDEO_FAMILIES["pllava"]
    model = family.build()
    rows = [[3, "image", 5], ["image", "image", 4]]
    batch = family.batch(rows)
    repeated = batch["pixel_values"][:, None].expand(-1, 4, -1, -1, -1)
    as_videos = {key: value for key, value in batch.items() if key != "pixel_values"} | {
        "pixel_values_videos": repeated
    }
    torch.testing.assert_close(model(**batch).logits, model(**as_videos).logits, **TOLERANCE)
    with pruneops.prune(model, MERGE, record=True) as run:
        model(**batch)
    for record in run.records:
        if isinstance(record, MergeRecord):
            assert all(video.num_frames == 4 and bool(video.static[0].all()) for video in record.videos)
    # 16 static tokens become 8, and nothing else is left.
    assert run.layer_lengths[0] == [3 + 8 + 5, 8 + 8 + 4]


# -- pruned ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DROP, MERGE], ids=["pyramiddrop", "prunevid"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "rows"), CASES)
@torch.no_grad()
def test_rows_of_a_pruned_batch_equal_their_single_runs(
    family: tiny.VideoFamily, rows: Rows, side: str, method: PruningMethod
) -> None:
    model = family.build()
    batch = family.batch(rows, FRAMES, side)
    with pruneops.prune(model, method, record=True) as run:
        logits = model(**batch).logits
        lengths = run.layer_lengths
        records = run.records
        for b in range(len(rows)):
            alone = model(**family.single(batch, rows, b)).logits[0]
            assert [of_layer[b] for of_layer in lengths] == [n for (n,) in run.layer_lengths]
            torch.testing.assert_close(logits[b][batch["attention_mask"][b].bool()], alone, **TOLERANCE)
            if any(isinstance(part, str) for part in rows[b]):
                ours, theirs = ([r for r in found if r.row == row] for found, row in ((records, b), (run.records, 0)))
                assert [r.kept_positions.tolist() for r in ours] == [r.kept_positions.tolist() for r in theirs]
                assert lengths[-1][b] < batch["attention_mask"][b].sum()


@pytest.mark.parametrize("method", [DROP, MERGE], ids=["pyramiddrop", "prunevid"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["greedy", "no cache", "beams"])
@FAMILIES
def test_pruned_generate_continues_each_row_as_if_it_were_alone(
    family: tiny.VideoFamily, options: dict, method: PruningMethod
) -> None:
    model = family.build()
    rows = VIDEOS_ONLY["one a row"] if "num_beams" in options else some_rows(family)
    batch = family.batch(rows, FRAMES)
    with pruneops.prune(model, method):
        sequences = model.generate(**batch, max_new_tokens=5, **options)
        for b in range(len(rows)):
            inputs = family.single(batch, rows, b)
            alone = model.generate(**inputs, max_new_tokens=5, **options)[0, inputs["input_ids"].shape[1] :]
            assert sequences[b, batch["input_ids"].shape[1] :].tolist() == alone.tolist()


@pytest.mark.parametrize("frames", [1, 2, 6, 9])
@FAMILIES
@torch.no_grad()
def test_prunevid_takes_videos_of_any_length_apart(family: tiny.VideoFamily, frames: int) -> None:
    model = family.build()
    batch = family.batch(VIDEOS_ONLY["side by side"], frames)
    with pruneops.prune(model, MERGE, record=True) as run:
        model(**batch)
    merges = [record for record in run.records if isinstance(record, MergeRecord)]
    assert [[(v.image, v.num_frames, v.patches) for v in m.videos] for m in merges] == [
        [(1, frames, family.patches), (2, frames, family.patches)]
    ] * 2
    of_video = frames * family.patches + family.newlines
    assert [[video.first_token for video in m.videos] for m in merges] == [[0, of_video], [1, 1 + of_video + 2]]
    assert sum(run.layer_lengths[0]) < int(batch["attention_mask"].sum())


@pytest.mark.parametrize("method", [DROP, MERGE], ids=["pyramiddrop", "prunevid"])
@torch.no_grad()
def test_the_newline_behind_a_onevision_video_is_kept_behind_it(method: PruningMethod) -> None:
    family = tiny.VIDEO_FAMILIES["llava_onevision"]
    model = family.build()
    with pruneops.prune(model, method, record=True) as run:
        model(**family.batch([["video", "video", 4]], FRAMES))
    tokens = FRAMES * family.patches
    newlines = [tokens, 2 * tokens + 1]
    assert run.records
    for record in run.records:
        kept = record.kept_positions.tolist()
        for newline in newlines:
            before = kept[: kept.index(newline)]
            assert max(before) < newline < min(kept[len(before) + 1 :])
    assert len(run.records[-1].kept_positions) < 2 * tokens


@torch.no_grad()
def test_the_class_token_of_video_llava_is_a_position_of_the_frame() -> None:
    family = tiny.VIDEO_FAMILIES["video_llava"]
    model = family.build()
    with pruneops.prune(model, MERGE, record=True) as run:
        model(**family.batch([["video", 4]], FRAMES))
    (video,) = run.records[0].videos
    assert video.patches == model.config.vision_config.image_size**2 // model.config.vision_config.patch_size**2 + 1
    assert all(static.shape == (video.patches,) for static in video.static)


@FAMILIES
def test_a_pruned_training_step_with_checkpointing_has_the_gradients_of_one_without(family: tiny.VideoFamily) -> None:
    model = family.build().train()
    batch = family.batch([[3, "video", 5], [7]], FRAMES)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with pruneops.prune(model, MERGE):
            loss = model(**batch, labels=labels).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append(model.get_parameter("model.multi_modal_projector.linear_1.weight").grad.clone())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert bool(gradients[0].any())


def test_the_language_side_of_a_q_former_model_such_as_st_llm_is_a_bare_llama() -> None:
    """Queries of a Q-Former, projected, stand in ``inputs_embeds``: all that pruning needs are mask and frames."""
    torch.manual_seed(0)
    config = transformers.Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, encoder_hidden_size=16
    )
    q_former = transformers.Blip2QFormerModel(config).eval()
    model = tiny.language_model()
    project, queries, frames = torch.nn.Linear(16, 32), torch.randn(1, 32, 16), 4
    embed = model.get_input_embeddings()

    def row(text_after: int) -> tuple[Tensor, Tensor]:
        patches = torch.randn(frames, 9, 16)
        of_frames = q_former(query_embeds=queries.expand(frames, -1, -1), encoder_hidden_states=patches)
        video = project(of_frames.last_hidden_state).flatten(0, 1)
        text = embed(torch.randint(2, 100, (3 + text_after,)))
        visual = torch.tensor([0] * 3 + [1] * len(video) + [0] * text_after)
        return torch.cat([text[:3], video, text[3:]]), visual

    with torch.no_grad(), pruneops.prune(model, MERGE) as run:
        rows = [row(4), row(7)]
        width = max(len(embeds) for embeds, _ in rows)
        inputs = {
            "inputs_embeds": torch.stack([torch.cat([torch.zeros(width - len(e), 32), e]) for e, _ in rows]),
            "visual_token_mask": torch.stack([torch.cat([v.new_zeros(width - len(v)), v]) for _, v in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e, _ in rows]),
        }
        sequences = model.generate(**inputs, num_frames=torch.tensor([frames, frames]), max_new_tokens=5)
        assert run.layer_lengths[0][0] < len(rows[0][0]) and run.layer_lengths[-1] < run.layer_lengths[0]
        for b, (embeds, visual) in enumerate(rows):
            alone = model.generate(
                inputs_embeds=embeds[None], visual_token_mask=visual[None], num_frames=[frames], max_new_tokens=5
            )
            assert alone[0].tolist() == sequences[b].tolist()


# -- patching and drop-in classes --------------------------------------------------------------------------------------


@FAMILIES
@torch.no_grad()
def test_the_model_is_exactly_restored(family: tiny.VideoFamily) -> None:
    model = family.build()
    batch = family.batch(some_rows(family), FRAMES)
    expected = model(**batch).logits
    before = fingerprint(model)
    with pruneops.prune(model, MERGE):
        assert fingerprint(model) != before
        model(**batch)
    with pytest.raises(ValueError), pruneops.prune(model, DROP):
        model(**{**batch, "input_ids": batch["input_ids"].flip(0).clamp(max=5)})
    assert fingerprint(model) == before
    assert torch.equal(model(**batch).logits, expected)


DROP_INS = {
    "llava_onevision": (models.LlavaOnevisionForConditionalGeneration, "LlavaOnevisionForConditionalGeneration"),
    "llava_next_video": (models.LlavaNextVideoForConditionalGeneration, "LlavaNextVideoForConditionalGeneration"),
    "video_llava": (models.VideoLlavaForConditionalGeneration, "VideoLlavaForConditionalGeneration"),
    "pllava": (models.PllavaForConditionalGeneration, "PllavaForConditionalGeneration"),
}


@pytest.mark.parametrize("method", [DROP, MERGE], ids=["pyramiddrop", "prunevid"])
@pytest.mark.parametrize("name", DROP_INS)
def test_a_stock_checkpoint_is_pruned_and_keeps_its_method_when_saved(
    name: str, method: PruningMethod, tmp_path: Path
) -> None:
    ours, stock = DROP_INS[name]
    family = tiny.VIDEO_FAMILIES[name]
    plain = family.build()
    batch = family.batch(VIDEOS_ONLY["one a row"], FRAMES)
    plain.save_pretrained(tmp_path / "stock")
    with pruneops.prune(plain, method):
        expected = plain.generate(**batch, max_new_tokens=5).tolist()
    model = ours.from_pretrained(tmp_path / "stock", pruning=method)
    assert model.pruning_run.method == method
    assert model.generate(**batch, max_new_tokens=5, eos_token_id=None).tolist() == expected
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path / "pruned")
    again = ours.from_pretrained(tmp_path / "pruned")
    assert again.pruning_run.method == method
    assert again.generate(**batch, max_new_tokens=5, eos_token_id=None).tolist() == expected
    for key, weight in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    if hasattr(transformers, stock):
        assert isinstance(model, getattr(transformers, stock))


# -- what does not fit -------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("change", [-1, 1])
def test_a_placeholder_too_few_or_too_many_is_refused(family: tiny.VideoFamily, change: int) -> None:
    model = family.build()
    batch = family.batch([[3, "video", 5]], FRAMES)
    ids = batch["input_ids"]
    ids[0, 3 if change < 0 else 0] = 5 if change < 0 else family.video_placeholder
    placeholders = FRAMES * family.patches + family.newlines + change
    with pruneops.prune(model, KEEP_ALL), pytest.raises(ValueError, match=str(placeholders)):
        model(**batch)


@FAMILIES
def test_a_video_spread_over_two_rows_is_refused(family: tiny.VideoFamily) -> None:
    model = family.build()
    batch = family.batch([[3, "video", 1], [3, "video", 1]], FRAMES)
    batch["input_ids"][0, 3] = 5
    batch["input_ids"][1, 0] = family.video_placeholder
    with (
        pruneops.prune(model, KEEP_ALL),
        pytest.raises(ValueError, match="placeholders of video 0 are spread over two rows"),
    ):
        model(**batch)


def test_an_image_within_a_video_is_refused() -> None:
    family = tiny.VIDEO_FAMILIES["video_llava"]
    model = family.build()
    batch = family.batch([[3, "video", "image", 1]], FRAMES)
    ids = batch["input_ids"]
    ids[0, 5], ids[0, -2] = tiny.IMAGE, tiny.VIDEO
    with (
        pruneops.prune(model, KEEP_ALL),
        pytest.raises(ValueError, match="placeholders of image 0 lie between those of video 0"),
    ):
        model(**batch)


def test_pllava_refuses_images_beside_videos() -> None:
    model = tiny.pllava()
    with pytest.raises(ValueError, match="pixel_values, pixel_values_videos: got both"):
        model(
            input_ids=torch.tensor([[5]]),
            pixel_values=torch.zeros(1, 3, 32, 32),
            pixel_values_videos=torch.zeros(1, 1, 3, 32, 32),
        )


def test_pllava_refuses_frames_that_do_not_fit_its_grid() -> None:
    model = tiny.pllava()
    model.config.frame_shape = (4, 4)
    with pytest.raises(ValueError, match="got frames of 64 patches, expected 4 x 4 as in config.frame_shape"):
        model(input_ids=torch.tensor([[5]]), pixel_values_videos=torch.zeros(1, 1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"pixel_values_videos: got shape \(1, 3, 32, 32\)"):
        model(input_ids=torch.tensor([[5]]), pixel_values_videos=torch.zeros(1, 3, 32, 32))
