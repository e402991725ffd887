"""Supervised fine-tuning on LLaVA's data format: what is trained on, what a batch is, and the example script."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import original_layout
import pytest
import sft_data
import torch
from PIL import Image
from transformers import AutoProcessor, Trainer, TrainerCallback

import pruneops
from pruneops import models
from pruneops.methods import DynamicLlava, PMoD, PyramidDrop
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.models import checkpoints
from pruneops.training import Collator, Conversation, LlavaDataset, encode, render

EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = {False: models.LlavaForConditionalGeneration, True: models.LlavaNextForConditionalGeneration}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sft_data.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sft_data.write_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sft_data.write_checkpoint(tmp_path_factory.mktemp("next"), anyres=True)


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_sft

    yield train_sft
    sys.modules.pop("train_sft")


# -- conversations ----------------------------------------------------------------------------------------------------


def test_a_conversation_reads_as_llavas(processor: Any) -> None:
    text, spans = render(Conversation.from_record(sft_data.SAMPLES[0], 0), "</s>")
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A set</s>"
        "USER: Of what? ASSISTANT: c</s>"
    )
    assert [text[begin:end] for begin, end in spans] == ["A set</s>", "c</s>"]
    turns = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A set"}]
    turns += [{"role": "user", "content": "Of what?"}, {"role": "assistant", "content": "c"}]
    assert processor.apply_chat_template(turns) == text


def test_labels_are_the_answers_and_their_ends_in_every_turn(data: Path, processor: Any) -> None:
    for sample, record in zip(LlavaDataset(data, processor), sft_data.SAMPLES, strict=False):
        answers = "".join(m["value"] + "</s>" for m in record["conversations"] if m["from"] == "gpt")
        supervised = sample["labels"] != -100
        assert processor.tokenizer.decode(sample["labels"][supervised]) == answers
        assert torch.equal(sample["labels"][supervised], sample["input_ids"][supervised])
        # Trained from the first token of an answer on, given the text up to "ASSISTANT:" and its space.
        first = int(supervised.nonzero()[0])
        assert processor.tokenizer.decode(sample["input_ids"][:first]).endswith("ASSISTANT: ")


def test_a_token_that_joins_the_space_and_the_answer_is_trained_on(processor: Any) -> None:
    """As tokenizers with words do: the first word of an answer comes with the space before it."""
    joined = copy.deepcopy(processor)
    joined.tokenizer.add_tokens([" Hi"])
    sample = encode(Conversation.from_record(sft_data.SAMPLES[2], 2), [], joined)
    assert joined.tokenizer.decode(sample["labels"][sample["labels"] != -100]) == " Hi!</s>"


def test_several_images_of_a_turn_stay_where_they_are(processor: Any) -> None:
    record = {
        "image": ["a", "b"],
        "conversations": [{"from": "human", "value": "Is <image> or <image> newer?"}, {"from": "gpt", "value": "b"}],
    }
    conversation = Conversation.from_record(record, 0)
    assert "USER: Is <image> or <image> newer? ASSISTANT:" in render(conversation, "</s>")[0]
    sample = encode(conversation, [Image.new("RGB", (8, 8))] * 2, processor)
    assert int((sample["input_ids"] == processor.image_token_id).sum()) == 32 and len(sample["pixel_values"]) == 2


def test_a_long_conversation_is_cut_off_but_never_within_an_image(data: Path, processor: Any) -> None:
    whole = LlavaDataset(data, processor)[0]
    length = len(whole["input_ids"])
    cut = LlavaDataset(data, processor, max_length=length - 3)[0]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-3])
    assert torch.equal(cut["labels"], whole["labels"][:-3])
    short = LlavaDataset(data, processor, max_length=5)[0]
    assert int((short["input_ids"] == processor.image_token_id).sum()) == 16
    assert int(short["input_ids"][-1]) == processor.image_token_id


BROKEN = [
    ({"id": "x"}, r"sample 0 \('x'\): got no list of conversations"),
    ({"conversations": [{"from": "system", "value": "a"}]}, "got the message"),
    ({"conversations": [{"from": "human", "value": 3}]}, "got the message"),
    ({"conversations": [{"from": "human", "value": "a"}] * 2}, r"turns of \['user', 'user'\]"),
    ({"conversations": []}, r"turns of \[\]"),
    ({"conversations": [{"from": "human", "value": "<image>"}]}, "0 images for 1 <image>"),
    ({"image": "a.png", "conversations": [{"from": "human", "value": "a"}]}, "1 images for 0 <image>"),
    ({"image": 3, "conversations": [{"from": "human", "value": "<image>"}]}, "got the image 3, expected a path"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}]},
        "got <image> in an answer",
    ),
]


@pytest.mark.parametrize(("record", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_sample_that_cannot_be_right_is_named(
    record: dict[str, Any], message: str, tmp_path: Path, processor: Any
) -> None:
    (tmp_path / "train.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=message):
        LlavaDataset(tmp_path / "train.json", processor)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, data: Path, processor: Any) -> None:
    with pytest.raises(ValueError, match="data: cannot read"):
        LlavaDataset(tmp_path / "missing.json", processor)
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        LlavaDataset(tmp_path / "train.json", processor)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no list of samples"):
        LlavaDataset(tmp_path / "train.json", processor)
    dataset = LlavaDataset(data, processor, image_folder=tmp_path)
    with pytest.raises(ValueError, match=r"sample 0 \('a'\): cannot read the image .*0\.png"):
        dataset[0]


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyres", [False, True], ids=["llava", "llava_next"])
def test_a_batch_gives_the_loss_of_its_samples(
    anyres: bool, data: Path, checkpoint: Path, next_checkpoint: Path
) -> None:
    """Images of different tilings beside each other, a text without an image, padding on the right."""
    folder = next_checkpoint if anyres else checkpoint
    model, processor = CLASSES[anyres].from_pretrained(folder).train(), AutoProcessor.from_pretrained(folder)
    dataset, collate = LlavaDataset(data, processor), Collator(processor)
    samples = [dataset[i] for i in (0, 1, 2)]
    batch = collate(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(sample["input_ids"]) for sample in samples]
    with torch.no_grad():
        together = model(**batch).loss
        losses = [model(**collate([sample])).loss for sample in samples]
    counts = torch.tensor([int((sample["labels"] != -100).sum()) for sample in samples])
    torch.testing.assert_close(together, (torch.stack(losses) * counts).sum() / counts.sum())


@pytest.mark.parametrize("method", [None, PyramidDrop((2, 4), (0.5, 0.25)), PMoD("interleave")], ids=str)
@pytest.mark.parametrize("anyres", [False, True], ids=["llava", "llava_next"])
def test_text_alone_has_a_black_image_that_changes_nothing(
    anyres: bool, method: Any, data: Path, checkpoint: Path, next_checkpoint: Path
) -> None:
    folder = next_checkpoint if anyres else checkpoint
    processor = AutoProcessor.from_pretrained(folder)
    model = CLASSES[anyres].from_pretrained(folder).train()
    pruneops.detach(model)
    if method is not None:
        pruneops.attach(model, method)
    dataset = LlavaDataset(data, processor)
    batch = Collator(processor)([dataset[2], dataset[3]])
    image = batch["input_ids"] == processor.image_token_id
    assert image.any() and not batch["attention_mask"][image].any() and (batch["labels"][image] == -100).all()
    loss = model(**batch).loss
    loss.backward()
    projector = model.model.multi_modal_projector.linear_1.weight
    assert projector.grad is not None and not projector.grad.any()

    columns = int(batch["attention_mask"].sum(1).max())
    plain = {key: batch[key][:, :columns] for key in ("input_ids", "labels", "attention_mask")}
    plain["input_ids"] = plain["input_ids"].masked_fill(plain["input_ids"] == processor.image_token_id, 0)
    torch.testing.assert_close(model(**plain).loss, loss)


# -- the example ------------------------------------------------------------------------------------------------------


def train(script: Any, model: Path, data: Path, out: Path, *arguments: str) -> Trainer:
    base = ["--model", model, "--data", data, "--output_dir", out, "--use_cpu", "true", "--learning_rate", "3e-3"]
    return script.main([*map(str, base), "--per_device_train_batch_size", "2", *arguments])


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["dense", "pyramiddrop", "pmod"])
def test_a_stock_checkpoint_is_trained_with_every_method_and_loads_with_it(
    method: str, script: Any, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    model = models.LlavaForConditionalGeneration.from_pretrained(checkpoint)
    pruneops.detach(model)
    model.config.pruning = None
    model.save_pretrained(tmp_path / "stock")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "stock")
    arguments = ["--method", method, "--max_steps", "8", "--save_strategy", "no"]
    if method == "pmod":
        arguments += ["--method_config", '{"layers": "interleave"}']
    trainer = train(script, tmp_path / "stock", data, tmp_path / "out", *arguments)
    assert losses(trainer)[-1] < losses(trainer)[0]
    again = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    expected = {"dense": None, "pyramiddrop": PyramidDrop().to_dict(), "pmod": PMoD("interleave").to_dict()}
    assert getattr(again.config, "pruning", None) == expected[method]
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_token == "<image>"
    routers = [name for name in again.state_dict() if ".router." in name]
    assert bool(routers) == (method == "pmod")
    assert all(bool(again.state_dict()[name].any()) for name in routers[:-2])
    frozen = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(again.state_dict()[frozen], model.state_dict()[frozen])


# -- the example: Dynamic-LLaVA ---------------------------------------------------------------------------------------


class Temperatures(TrainerCallback):
    """What the predictors draw with, step by step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen += {predictor.gumbel_tau for predictor in predictors_of(model.model.language_model).values()}


@pytest.fixture
def temperatures(script: Any, monkeypatch: pytest.MonkeyPatch) -> Temperatures:
    """Of the training that follows."""
    watcher, make = Temperatures(), script.SftTrainer

    def trainer(*arguments: Any, callbacks: list[TrainerCallback], **settings: Any) -> Trainer:
        return make(*arguments, callbacks=[*callbacks, watcher], **settings)

    monkeypatch.setattr(script, "SftTrainer", trainer)
    return watcher


@pytest.fixture
def dynamic(tmp_path: Path) -> Path:
    """An original checkpoint of Dynamic-LLaVA, whose answers count from the first token on."""
    sparse = {**original_layout.SPARSE, "output_text_len_for_training": 3}
    original_layout.write_original(tmp_path / "dynamic", dynamic=True, sparse_config=sparse)
    return tmp_path / "dynamic"


def test_dynamic_llava_trains_its_predictors_at_a_falling_temperature(
    script: Any, temperatures: Temperatures, dynamic: Path, data: Path, tmp_path: Path
) -> None:
    before = models.LlavaForConditionalGeneration.from_pretrained(dynamic).state_dict()
    arguments = ["--method", "dynamic-llava", "--max_steps", "4", "--save_strategy", "no"]
    trainer = train(script, dynamic, data, tmp_path / "out", *arguments, "--predictor_learning_rate", "1e-2")
    assert len(losses(trainer)) == 4 and all(math.isfinite(loss) for loss in losses(trainer))
    assert temperatures.seen == pytest.approx([1.0, 0.1**0.25, 0.1**0.5, 0.1**0.75])
    after = trainer.model.state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    predictors = {name for name in after if "_score_predictor." in name}
    assert len(predictors) == 42 and predictors <= moved
    assert all(weight.isfinite().all() for weight in after.values())
    assert not any("vision_tower" in name for name in moved)
    again = models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert again.pruning_run.method == trainer.model.pruning_run.method
    for name, weight in after.items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_the_loss_of_dynamic_llava_has_the_masks_in_it(script: Any, dynamic: Path, data: Path, tmp_path: Path) -> None:
    settings = ["--method", "dynamic-llava", "--max_steps", "1", "--save_strategy", "no"]
    first = {}
    for weight in (0.0, 1000.0):
        rates = {"output_text_keep_rate": 0.0, "output_text_len_for_training": 0, "vision_keep_rate": 0.0}
        fields = {**original_layout.SPARSE, **rates, "mask_loss_weight": weight}
        arguments = [*settings, "--method_config", json.dumps(fields)]
        (first[weight],) = losses(train(script, dynamic, data, tmp_path / str(weight), *arguments))
    assert first[1000.0] > first[0.0] + 1


def test_the_predictors_have_a_learning_rate_of_their_own_and_the_published_defaults(
    script: Any, dynamic: Path, data: Path, tmp_path: Path
) -> None:
    command = ["--model", dynamic, "--data", data, "--output_dir", tmp_path, "--use_cpu", "true"]
    command += ["--method", "dynamic-llava", "--max_steps", "1", "--save_strategy", "no", "--weight_decay", "0.1"]
    trainer = script.main([str(word) for word in command])
    groups = trainer.optimizer.param_groups
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(5e-6, 0.1), (5e-6, 0.0), (2e-4, 0.0)]
    predictors = predictors_of(trainer.model.model.language_model).values()
    expected = {id(weight) for predictor in predictors for weight in predictor.parameters()}
    assert {id(weight) for weight in groups[-1]["params"]} == expected


def test_a_stock_checkpoint_gets_predictors_and_is_trained(
    script: Any, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    model = models.LlavaForConditionalGeneration.from_pretrained(checkpoint)
    pruneops.detach(model)
    model.config.pruning = None
    model.save_pretrained(tmp_path / "stock")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "stock")
    method = DynamicLlava(d_model=16, nhead=2, dim_feedforward=24)
    fields = json.dumps({"d_model": 16, "nhead": 2, "dim_feedforward": 24})
    settings = ["--method", "dynamic-llava", "--method_config", fields, "--max_steps", "2", "--save_strategy", "no"]
    trainer = train(script, tmp_path / "stock", data, tmp_path / "out", *settings)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert models.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").pruning_run.method == method


def test_a_run_of_dynamic_llava_that_was_interrupted_goes_on_as_if_it_had_not_been(
    script: Any, temperatures: Temperatures, dynamic: Path, data: Path, tmp_path: Path
) -> None:
    settings = ["--method", "dynamic-llava", "--save_strategy", "steps", "--save_steps", "2", "--num_train_epochs", "2"]
    whole = train(script, dynamic, data, tmp_path / "whole", *settings)
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(interrupted / "checkpoint-2")
    resumed = train(script, dynamic, data, interrupted, *settings, "--resume_from_checkpoint", "last")
    assert losses(resumed)[2:] == losses(whole)[2:] and len(losses(whole)) == 4
    assert temperatures.seen == pytest.approx([0.1 ** (step / 4) for step in (0, 1, 2, 3, 2, 3)])
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_a_checkpoint_of_dynamic_llava_is_not_trained_dense(
    script: Any, dynamic: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="checkpoint of the method dynamic-llava, expected --method dynamic-llava"):
        train(script, dynamic, data, tmp_path, "--method", "dense")


# -- the example: any method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pmod", "dynamic-llava"])
def test_fields_that_are_not_asked_for_stay_as_the_checkpoint_has_them(name: str, script: Any, tmp_path: Path) -> None:
    """In both layouts."""
    sparse = {**original_layout.SPARSE, "sparse_layer": 3, "output_text_len_for_training": 3}
    asked, changes = {"vision_keep_rate": 0.3}, {"dynamic": True, "sparse_config": sparse}
    if name == "pmod":
        asked, changes = {"weight_norm": "tanh_0.3_1"}, {}
    original_layout.write_original(tmp_path / "original", **changes)
    checkpoints.convert(tmp_path / "original", tmp_path / "hf")
    for layout in ("original", "hf"):
        methods = []
        for fields in (None, json.dumps(asked)):
            arguments = script.SftArguments(model=str(tmp_path / layout), data="", method=name, method_config=fields)
            methods.append(script.load_model(arguments).pruning_run.method)
        assert methods[1] == dataclasses.replace(methods[0], **asked)
        assert methods[0].parity if name == "pmod" else methods[0].sparse_layer == 3


def test_an_original_checkpoint_is_trained_as_it_is(script: Any, data: Path, tmp_path: Path) -> None:
    original_layout.write_original(tmp_path / "in", True)
    trainer = train(script, tmp_path / "in", data, tmp_path / "out", "--max_steps", "2", "--save_strategy", "no")
    assert trainer.model.pruning_run.method == PMoD(parity=True)
    assert len(losses(trainer)) == 2


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(
    script: Any, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    settings = ["--save_strategy", "steps", "--save_steps", "2", "--num_train_epochs", "2"]
    whole = train(script, checkpoint, data, tmp_path / "whole", *settings)
    # Stopped after step 2 of 4: the schedule is that of the whole run.
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(interrupted / "checkpoint-2")
    resumed = train(script, checkpoint, data, interrupted, *settings, "--resume_from_checkpoint", "last")
    assert losses(resumed)[2:] == losses(whole)[2:] and len(losses(whole)) == 4
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_gradient_checkpointing_changes_nothing(script: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    settings = ["--max_steps", "2", "--save_strategy", "no"]
    on, off = (
        train(script, checkpoint, data, tmp_path / value, *settings, "--gradient_checkpointing", value)
        for value in ("true", "false")
    )
    assert on.model.model.language_model.gradient_checkpointing
    assert not off.model.model.language_model.gradient_checkpointing
    assert losses(on) == losses(off)
    for name, weight in on.model.state_dict().items():
        assert torch.equal(off.model.state_dict()[name], weight), name


def test_bfloat16_trains(script: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    settings = ["--max_steps", "8", "--save_strategy", "no", "--bf16", "true"]
    mixed = train(script, checkpoint, data, tmp_path / "mixed", *settings)
    pure = train(script, checkpoint, data, tmp_path / "pure", *settings, "--model_dtype", "bfloat16")
    assert mixed.model.dtype == torch.float32 and pure.model.dtype == torch.bfloat16
    for trainer in (mixed, pure):
        assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dense"], "--method: got dense for a checkpoint of the method pmod"),
        (["--method", "dense", "--method_config", '{"a": 1}'], "got fields for the dense model"),
        (["--method_config", "[1]"], "expected a JSON object"),
        (["--method_config", '{"speed": 9}'], r"pmod: got the unknown fields \['speed'\]"),
        (["--method_config", '{"layers": "interleave"}'], r"expected \[8, 9, 10, 11\], which the model carries"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused(
    arguments: list[str], message: str, script: Any, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(script, checkpoint, data, tmp_path, *arguments)


def test_help_explains_the_arguments(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for word in (
        "--method {dense,pyramiddrop,pmod,dynamic-llava}",
        "--image_folder",
        "--max_length",
        "--gradient_checkpointing",
    ):
        assert word in out
