"""Training a small LLaVA from nothing: the tower on labels of patches, alignment on some patches, and the example."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from pruneops import models
from pruneops.data import (
    KINDS,
    LABELS,
    CurriculumDataset,
    PatchDataset,
    SampleDataset,
    Samples,
    scene_llava_config,
    scene_processor,
)
from pruneops.methods import DynamicLlava, PMoD, PyramidDrop
from pruneops.training import (
    AlignedLlavaForConditionalGeneration,
    AlignmentCollator,
    Collator,
    PatchReader,
    ReadPictures,
    match_and_copy,
    patch_accuracy,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = {
    name: [[10 * value + kind] for value in range(1, len(values))] for kind, (name, values) in enumerate(LABELS.items())
}
SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vision_hidden_size": 32,
    "vision_layers": 2,
}


@pytest.fixture(scope="module")
def processor() -> Any:
    processor = scene_processor()
    processor.tokenizer.padding_side = "right"
    return processor


@pytest.fixture(scope="module")
def aligned() -> AlignedLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return AlignedLlavaForConditionalGeneration(scene_llava_config(num_hidden_layers=2, **SMALL)).eval()


# -- the beginning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attention_begins_by_matching_tokens_and_copying_them(heads: int, key_heads: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    text = AlignedLlavaForConditionalGeneration(scene_llava_config(num_hidden_layers=2, **{**SMALL, **sizes})).model
    match_and_copy(text.language_model)
    tokens = torch.randn(200, 32)
    for layer in text.language_model.layers:
        attention = layer.self_attn
        queries, keys, values = (
            linear(tokens).unflatten(-1, (-1, 8)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        group = heads // key_heads
        for head in range(0, heads, group):  # the head whose keys these are
            scores = queries[:, head] @ keys[:, head // group].T
            to_others = scores[~torch.eye(200, dtype=torch.bool)]
            assert scores.diagonal().min() > 0 and scores.diagonal().mean() > 2 * to_others.std()
        copied = attention.o_proj(values.repeat_interleave(group, dim=1).flatten(1))
        likeness = torch.cosine_similarity(copied, tokens)
        assert likeness.min() > 0 and likeness.mean() > 0.3


# -- the tower --------------------------------------------------------------------------------------------------------


def reader(**changes: Any) -> PatchReader:
    torch.manual_seed(0)
    return PatchReader(scene_llava_config(num_hidden_layers=2, patch_words=WORDS, **{**SMALL, **changes}))


def patches(count: int, processor: Any) -> dict[str, torch.Tensor]:
    data = PatchDataset(Samples("train", count), processor.image_processor)
    return torch.utils.data.default_collate([data[index] for index in range(count)])


def test_tower_and_projector_are_trained_up_to_the_layer_that_is_read_and_nothing_else(processor: Any) -> None:
    model = reader(vision_layers=3)
    model(**patches(2, processor))["loss"].backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    parts = "vision_tower", "multi_modal_projector", "patch_heads"
    assert moved < trained and all(any(part in name for part in parts) for name in trained)
    assert any("encoder.layers.1." in name for name in moved)
    assert not any("encoder.layers.2." in name for name in moved)  # the features are those before the last layer


def test_the_tower_learns_places_and_what_patches_show(processor: Any) -> None:
    model, batch = reader(), patches(4, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_patches_without_a_label_do_not_count(processor: Any) -> None:
    model, batch = reader(), patches(2, processor)
    assert (batch["shape"] == -100).any()
    with torch.no_grad():
        outputs = model(**batch)
        for name in LABELS:
            assert outputs[name].shape == (2, 576, len(LABELS[name]))
        some = torch.full_like(batch["shape"], -100)
        some[:, :24] = batch["shape"][:, :24]
        row = outputs["shape"][:, :24].flatten(0, 1)
        weight = torch.tensor([0.05] + [1.0] * (row.shape[1] - 1))
        alone = torch.nn.functional.cross_entropy(row, some[:, :24].flatten(), weight)
        places = model(batch["pixel_values"])["loss"]  # of two heads
        torch.testing.assert_close(model(batch["pixel_values"], shape=some)["loss"], (2 * places + alone) / 3)


def test_a_patch_becomes_similar_to_the_words_for_it(processor: Any) -> None:
    model, batch = reader(), patches(2, processor)
    words = model.get_input_embeddings().weight.clone()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    for _ in range(40):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.get_input_embeddings().weight, words)
    with torch.no_grad():
        features = torch.stack(tuple(model.get_image_features(batch["pixel_values"]).pooler_output))
    colours = torch.cat([words[ids] for ids in WORDS["colour"]])
    shown = batch["colour"] > 0
    nearest = torch.nn.functional.cosine_similarity(features[shown][:, None], colours, dim=-1).argmax(-1) + 1
    assert float((nearest == batch["colour"][shown]).float().mean()) > 0.4  # by chance 0.1


def test_kinds_of_labels_may_not_be_called_as_the_places() -> None:
    with pytest.raises(ValueError, match=r"patch_words: got \['row'\]"):
        PatchReader(scene_llava_config(num_hidden_layers=2, patch_words={"row": [[3]]}, **SMALL))


def test_a_checkpoint_of_the_tower_is_that_of_a_llava(tmp_path: Path) -> None:
    model = reader()
    model.save_pretrained(tmp_path)
    plain, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and all(key.startswith("patch_heads.") for key in info["unexpected_keys"])
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_the_accuracy_of_the_tower_is_that_on_patches_with_something_on_them() -> None:
    said = np.array([[0, 1, 2, 3]]), np.array([[5, 5, 5, 5]])
    labels = np.array([[0, 1, 3, -100]]), np.array([[0, 0, -100, 0]])
    found = patch_accuracy(SimpleNamespace(predictions=said, label_ids=labels))
    assert found["accuracy_0"] == 0.5 and np.isnan(found["accuracy_1"])


# -- alignment --------------------------------------------------------------------------------------------------------


def test_what_answers_hang_on_is_always_shown_and_more_and_more_of_the_rest(processor: Any) -> None:
    data = CurriculumDataset(Samples("train", 40), processor, background_share=0.5)
    of_things, of_empty = [], []
    for index in range(40):
        sample, shown = data.samples[index], data.shown(index)
        evidence = torch.zeros(576, dtype=torch.bool)
        for turn in range(len(sample.turns)):
            evidence[sample.evidence(turn)] = True
        covered = torch.from_numpy(sample.labels()["shape"] != 0).flatten()
        assert shown[evidence].all()
        of_things.append(float((shown & covered & ~evidence).sum() / (covered & ~evidence).sum()))
        of_empty.append(float((shown & ~covered).sum() / (~covered).sum()))
    assert max(of_things[:12]) == max(of_empty[:12]) == 0.0
    assert 0.0 < sum(of_things[12:32]) / 20 < sum(of_things[32:]) / 8 and max(of_things[32:]) > 0.7
    assert 0.0 < sum(of_empty[12:32]) / 20 < sum(of_empty[32:]) / 8 <= 0.5
    assert data.bound(0) == 0.0 and data.bound(39) == 1.0


def test_every_pass_goes_through_all_pictures_with_other_questions_and_patches(processor: Any) -> None:
    data = CurriculumDataset(Samples("train", 4), processor, background_share=0.5, passes=3)
    assert len(data) == 12 and data.bound(11) == 1.0
    for early, late in ((7, 11), (6, 10)):
        assert torch.equal(data[early]["pixel_values"], data[late]["pixel_values"])
        assert not torch.equal(data[early]["input_ids"], data[late]["input_ids"])
        assert not torch.equal(data[early]["shown"], data[late]["shown"])
    assert torch.equal(data[2]["input_ids"], SampleDataset(Samples("train", 4), processor)[2]["input_ids"])


def test_the_text_of_an_entry_needs_no_rendering(processor: Any) -> None:
    data = CurriculumDataset(Samples("train", 4, kinds=KINDS[:3]), processor, passes=2)
    for index in range(8):
        text, entry = data.text(index), data[index]
        assert set(text) == {"input_ids", "labels"} and all(torch.equal(text[name], entry[name]) for name in text)


def test_what_is_shown_of_a_sample_is_always_the_same(processor: Any) -> None:
    one, other = (CurriculumDataset(Samples("train", 5), processor, 0.3) for _ in range(2))
    assert torch.equal(one[4]["shown"], other[4]["shown"]) and one[4]["shown"].sum() > 0


def test_without_a_background_share_empty_patches_are_never_shown(processor: Any) -> None:
    data = CurriculumDataset(Samples("train", 5), processor, background_share=0.0)
    for index in range(5):
        assert not data.shown(index)[torch.from_numpy(data.samples[index].labels()["shape"] == 0).flatten()].any()


def read(model: Any, processor: Any, count: int, **options: Any) -> ReadPictures:
    return ReadPictures(model, CurriculumDataset(Samples("train", count, turns=6), processor, **options), batch_size=2)


def batched(model: Any, processor: Any, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return AlignmentCollator(model.config.image_token_id, processor.tokenizer.pad_token_id)(samples)


def test_every_picture_is_read_once(processor: Any, aligned: Any) -> None:
    seen: list[int] = []
    data = CurriculumDataset(Samples("train", 3), processor, passes=2)
    pictures = ReadPictures(aligned, data, batch_size=2, progress=seen.append)
    assert seen == [2, 1] and len(pictures) == 6
    for index in range(6):
        expected, found = data[index], pictures[index]
        for name in ("input_ids", "labels", "shown"):
            assert torch.equal(found[name], expected[name]), name
        features = aligned.get_image_features(expected["pixel_values"], return_dict=True).pooler_output[0]
        torch.testing.assert_close(found["image_features"].float(), features[found["shown"]], rtol=1e-3, atol=1e-4)


def test_what_is_shown_keeps_its_position(processor: Any, aligned: Any) -> None:
    samples, image = read(aligned, processor, 2, background_share=0.2), aligned.config.image_token_id
    batch = batched(aligned, processor, [samples[0], samples[1]])
    for row, sample in enumerate((samples[0], samples[1])):
        positions = batch["position_ids"][row][batch["attention_mask"][row].bool()]
        rest = slice(len(positions))
        assert torch.equal(batch["input_ids"][row][rest], sample["input_ids"][positions])
        assert torch.equal(batch["labels"][row][rest], sample["labels"][positions])
        places = (sample["input_ids"] == image).nonzero()[:, 0]
        assert torch.equal(positions[batch["input_ids"][row][rest] == image], places[sample["shown"]])
        assert set((sample["input_ids"] != image).nonzero()[:, 0].tolist()) <= set(positions.tolist())
        assert (batch["labels"][row][len(positions) :] == -100).all()
    assert len(batch["image_features"]) == int((batch["input_ids"] == image).sum())


def test_with_all_patches_shown_it_is_the_loss_of_the_stock_model(processor: Any, aligned: Any) -> None:
    data = CurriculumDataset(Samples("train", 2, turns=6), processor)
    data.shown = lambda index: torch.ones(576, dtype=torch.bool)
    pictures = ReadPictures(aligned, data)
    stock = LlavaForConditionalGeneration(aligned.config).eval()
    stock.load_state_dict(aligned.state_dict())
    plain = [{name: sample[name] for name in sample if name != "shown"} for sample in (data[0], data[1])]
    with torch.no_grad():
        found = aligned(**batched(aligned, processor, [pictures[0], pictures[1]])).loss
        # The features were rounded to half precision.
        torch.testing.assert_close(found, stock(**Collator(processor)(plain)).loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_named(share: float, processor: Any) -> None:
    with pytest.raises(ValueError, match="background_share: got .*, expected a share in"):
        CurriculumDataset(Samples("train", 5), processor, share)


def test_passes_out_of_range_are_named(processor: Any) -> None:
    with pytest.raises(ValueError, match="passes: got 0, expected at least 1"):
        CurriculumDataset(Samples("train", 5), processor, passes=0)


@pytest.mark.parametrize("ramp", [(0.5, 0.2), (-0.1, 0.5), (0.5, 1.5), (0.5,)])
def test_a_ramp_that_does_not_rise_is_named(ramp: tuple[float, ...], processor: Any) -> None:
    with pytest.raises(ValueError, match="ramp: got .*, expected two shares in"):
        CurriculumDataset(Samples("train", 5), processor, ramp=ramp)


def test_the_ramp_says_when_more_is_shown(processor: Any) -> None:
    bounds = [CurriculumDataset(Samples("train", 4), processor, ramp=ramp).bound for ramp in ((0, 0), (0.25, 0.75))]
    assert [[bound(index) for index in range(4)] for bound in bounds] == [[1.0] * 4, [0.0, 0.0, 0.5, 1.0]]


# -- the example ------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_llava

    config = train_llava.scene_llava_config
    monkeypatch.setattr(
        train_llava, "scene_llava_config", lambda **options: config(num_hidden_layers=4, **SMALL, **options)
    )
    yield train_llava
    for name in ("train_llava", "train_sft"):
        sys.modules.pop(name)


def train(script: Any, stage: str, folder: Path, *more: str, model: Path | None = None) -> Any:
    command = ["--stage", stage, "--output_dir", str(folder), "--samples", "8", "--per_device_train_batch_size", "2"]
    command += ["--held_out", "2", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
    command += ["--dataloader_num_workers", "0", "--logging_steps", "1", "--passes", "1"]
    return script.main([*command, *(["--model", str(model)] if model else []), *more])


SHORT = ["--max_steps", "2", "--warmup_steps", "0", "--save_strategy", "no"]


@pytest.fixture
def tower(script: Any, tmp_path: Path) -> Path:
    train(script, "tower", tmp_path / "tower", *SHORT)
    return tmp_path / "tower"


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_words_for_one_and_for_many_begin_alike(script: Any) -> None:
    torch.manual_seed(0)
    model = script.beginning(SimpleNamespace(model=None, stage="tower"))
    words = model.get_input_embeddings().weight
    for one, many in script.patch_words()["shape"][:-1]:
        assert one != many and torch.equal(words[one], words[many])
    for one, many in script.patch_words()["text"]:
        assert not torch.equal(words[one], words[many])


def test_the_stages_follow_each_other(script: Any, tower: Path, tmp_path: Path) -> None:
    assert set(json.loads((tower / "eval_results.json").read_text())) > {"eval_loss", "eval_accuracy_0"}
    align = train(script, "align", tmp_path / "align", *SHORT, model=tower)
    assert align.state.log_history[-1]["eval_accuracy"] >= 0
    dense = train(script, "tune", tmp_path / "dense", *SHORT, model=tmp_path / "align")
    # The tower stays as the first stage left it, the projector until the last, and a stock checkpoint comes out.
    before, after = (
        LlavaForConditionalGeneration.from_pretrained(path).state_dict() for path in (tower, tmp_path / "dense")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision_tower" in name for name in changed)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and "pruning" not in config
    assert dense.model.config.image_seq_length == 576


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("pyramiddrop", PyramidDrop, {}),
        ("pmod", PMoD, {}),
        ("dynamic-llava", DynamicLlava, {"d_model": 16, "nhead": 2, "dim_feedforward": 16, "num_layers": 1}),
    ],
)
def test_tuning_with_a_method_saves_it_with_the_model(
    name: str, kind: type, fields: dict[str, int], script: Any, tower: Path, tmp_path: Path
) -> None:
    extra = ["--method", name, "--method_config", json.dumps(fields), "--train_vision_tower", "true"]
    train(script, "tune", tmp_path / "out", *SHORT, *extra, model=tower)
    loaded = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert type(loaded.pruning_run.method) is kind
    before = LlavaForConditionalGeneration.from_pretrained(tower).model.vision_tower.state_dict()
    after = loaded.model.vision_tower.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)  # --train_vision_tower


@pytest.mark.parametrize("stage", ["tower", "align", "tune"])
def test_a_stage_that_was_interrupted_goes_on_as_if_it_had_not_been(
    stage: str, script: Any, tower: Path, tmp_path: Path
) -> None:
    settings = ["--save_strategy", "steps", "--save_steps", "2"]
    model = None if stage == "tower" else tower
    whole = train(script, stage, tmp_path / "whole", *settings, model=model)
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(interrupted / "checkpoint-2")
    resumed = train(script, stage, interrupted, *settings, "--resume_from_checkpoint", "last", model=model)
    assert losses(resumed)[2:] == losses(whole)[2:] and len(losses(whole)) == 4
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_a_beginning_that_does_not_fit_is_refused(script: Any, tower: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--model: got none for the stage align"):
        train(script, "align", tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="is of the type 'llama', expected 'llava'"):
        train(script, "tune", tmp_path / "out", model=other)
    train(script, "tune", tmp_path / "pruned", *SHORT, "--method", "pyramiddrop", model=tower)
    with pytest.raises(ValueError, match="was trained with pyramiddrop, expected a dense model"):
        train(script, "tune", tmp_path / "out", model=tmp_path / "pruned")
    with pytest.raises(ValueError, match=r"kinds must be a sequence of some of questions, .*, got \['films'\]"):
        train(script, "align", tmp_path / "out", "--kinds", "films", model=tower)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_help_names_the_stages(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "{tower,align,tune}" in text and "--background_share" in text and "--learning_rate" in text
