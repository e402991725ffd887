"""Trains a small LLaVA from nothing on rendered pictures, and fine-tunes it with a pruning method.

    python examples/train_llava.py --stage tower --output_dir runs/tower
    python examples/train_llava.py --stage align --model runs/tower --output_dir runs/align
    python examples/train_llava.py --stage tune --model runs/align --output_dir runs/dense
    python examples/train_llava.py --stage tune --model runs/dense --method pyramiddrop --output_dir runs/pyramiddrop

Every argument of transformers' TrainingArguments is accepted as well; see examples/README.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import train_sft
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import pruneops
from pruneops.data import (
    LABELS,
    CurriculumDataset,
    PatchDataset,
    SampleDataset,
    Samples,
    scene_llava_config,
    scene_processor,
    scene_tokenizer,
)
from pruneops.data.curriculum import RAMP
from pruneops.data.glyphs import SHAPES
from pruneops.data.words import plural
from pruneops.methods import KEEP_ALL
from pruneops.models import checkpoints
from pruneops.models.checkpoints.loading import accept_published_names
from pruneops.training import (
    AlignedLlavaForConditionalGeneration,
    AlignmentCollator,
    Collator,
    PatchReader,
    ReadPictures,
    match_and_copy,
    patch_accuracy,
)
from pruneops.training.conversations import IGNORED

log = logging.getLogger("train_llava")
STAGES = ("tower", "align", "tune")
#: Pictures of each stage: what it takes on two cores within two hours, all of them together.
SAMPLES = {"tower": 9600, "align": 9600, "tune": 4800}
#: Kinds of conversations of each stage.
KINDS = {"tower": "questions", "align": "questions,references,description,references", "tune": "questions,references"}


@dataclass
class LlavaArguments:
    """Which stage, and on what."""

    stage: str = field(
        metadata={
            "help": "tower: the vision tower alone, on what each patch shows; align: the language model alone, on "
            "more and more of the patches; tune: projector and language model on all of them, with or without a "
            "pruning method",
            "choices": list(STAGES),
        }
    )
    model: str | None = field(
        default=None, metadata={"help": "folder of the model to begin with (default: a new one, for the tower only)"}
    )
    method: str = field(
        default="dense", metadata={"help": "the method to tune with", "choices": list(train_sft.METHODS)}
    )
    method_config: str | None = field(
        default=None, metadata={"help": "JSON with fields of the method, such as '{\"keep_ratios\": [0.5, 0.25]}'"}
    )
    samples: int | None = field(
        default=None, metadata={"help": f"pictures to train on (default: {SAMPLES})".replace("'", "")}
    )
    picture_seed: int = field(default=0, metadata={"help": "seed of the pictures"})
    turns: int = field(default=6, metadata={"help": "questions about a picture, at most"})
    kinds: str | None = field(
        default=None,
        metadata={"help": f"kinds of conversations in turn, one a picture (default: {KINDS})".replace("'", "")},
    )
    passes: int = field(
        default=6, metadata={"help": "align: how often every picture is gone through, as it was read once"}
    )
    background_share: float = field(
        default=0.2,
        metadata={"help": "align: share of the empty patches that is shown where everything else is"},
    )
    ramp: list[float] = field(
        default_factory=lambda: list(RAMP),
        metadata={
            "help": "align: the shares of the training before which nothing but evidence is shown, and from which on "
            f"all of a picture may be (default: {RAMP[0]} {RAMP[1]})"
        },
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "tune: train the tower as well"})
    held_out: int = field(default=256, metadata={"help": "pictures of the validation split to evaluate on"})


@dataclass
class LlavaTrainingArguments(train_sft.SftTrainingArguments):
    """TrainingArguments with the defaults that a model of this size learns with."""

    learning_rate: float | None = field(default=1e-3, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    adam_beta2: float = field(default=0.98, metadata={"help": "The second beta of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or their share if below 1."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pictures a step and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Pictures an evaluation step and device."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two lines of the log."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Compute activations again to save memory."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that render pictures."})


def beginning(arguments: LlavaArguments) -> Any:
    """The model that a stage begins with."""
    if arguments.model is None:
        if arguments.stage != "tower":
            raise ValueError(f"--model: got none for the stage {arguments.stage}, expected the folder of a model")
        reader = PatchReader(scene_llava_config(patch_words=patch_words()))
        match_and_copy(reader.model.language_model)
        one_word_as_many(reader)
        return reader
    folder = checkpoints.find_folder(arguments.model)
    config = checkpoints.read_config(folder)
    if config.get("model_type") != "llava":
        raise ValueError(f"--model: {arguments.model} is of the type {config.get('model_type')!r}, expected 'llava'")
    if arguments.stage == "tower":
        return PatchReader.from_pretrained(folder, patch_words=patch_words())
    dense = arguments.stage == "align" or arguments.method == "dense"
    if dense and config.get("pruning"):
        raise ValueError(
            f"--model: {arguments.model} was trained with {config['pruning']['method']}, expected a dense model"
        )
    if dense:
        if arguments.stage == "align":
            model = AlignedLlavaForConditionalGeneration.from_pretrained(folder)
        else:
            model = LlavaForConditionalGeneration.from_pretrained(folder)
            accept_published_names(model)
        # Without padding a step takes less time.
        pruneops.attach(model, KEEP_ALL)
    else:
        chosen = {"method": arguments.method, "method_config": arguments.method_config}
        model = train_sft.load_model(train_sft.SftArguments(arguments.model, "", **chosen))
    tuned = arguments.stage == "tune"
    model.model.vision_tower.requires_grad_(tuned and arguments.train_vision_tower)
    model.model.multi_modal_projector.requires_grad_(tuned)
    return model


@torch.no_grad()
def one_word_as_many(model: Any) -> None:
    """Begin with one embedding for the word of a shape and that of many: who asks for either means the same patches."""
    words = model.get_input_embeddings().weight
    for one, *many in patch_words()["shape"]:
        words[many] = words[one].clone()


def patch_words() -> dict[str, list[list[int]]]:
    """For each kind of label and each value but background the tokens that name it: of a shape one and many, of a
    syllable as the first and the second of a sign."""
    tokenizer = scene_tokenizer()

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def named(kind: str, value: str) -> list[int]:
        if kind == "shape":
            return tokens(f" {value} {plural(value)}" if value in SHAPES else f" {value}")
        return tokens(f" {value}{value}" if kind == "text" else f" {value}")

    return {kind: [named(kind, value) for value in values[1:]] for kind, values in LABELS.items()}


def datasets(arguments: LlavaArguments, training: TrainingArguments, processor: Any, model: Any) -> list[Dataset]:
    """Pictures to train on, and others to evaluate on."""
    made: list[Dataset] = []
    size = arguments.samples or SAMPLES[arguments.stage]
    kinds = (arguments.kinds or KINDS[arguments.stage]).split(",")
    for split, count, passes in (("train", size, arguments.passes), ("validation", arguments.held_out, 1)):
        options = {"seed": arguments.picture_seed, "turns": arguments.turns}
        if arguments.stage == "tower":
            made.append(PatchDataset(Samples(split, count, **options), processor.image_processor))
            continue
        samples = Samples(split, count, kinds=kinds, **options)
        if arguments.stage == "tune":
            made.append(SampleDataset(samples, processor))
            continue
        data = CurriculumDataset(samples, processor, arguments.background_share, passes, arguments.ramp)
        half = torch.autocast(training.device.type, torch.bfloat16, enabled=training.bf16)
        with half, tqdm(total=count, desc=f"reading pictures, {split}", disable=training.disable_tqdm) as bar:
            made.append(ReadPictures(model.to(training.device), data, progress=bar.update))
    return made


def answer_accuracy(predictions: Any) -> dict[str, float]:
    """Share of the tokens of answers that are right."""
    labels = predictions.label_ids[:, 1:]
    known = labels != IGNORED
    return {"accuracy": float((predictions.predictions[:, :-1] == labels)[known].mean())}


def make_trainer(arguments: LlavaArguments, training: LlavaTrainingArguments) -> Trainer:
    """The Trainer of a stage."""
    model = beginning(arguments)
    processor = scene_processor()
    processor.tokenizer.padding_side = "right"
    train, held_out = datasets(arguments, training, processor, model)
    collator: Any = Collator(processor)
    training.label_names = list(LABELS) if arguments.stage == "tower" else ["labels"]
    if arguments.stage == "tower":
        collator = default_data_collator
    elif arguments.stage == "align":
        collator = AlignmentCollator(model.config.image_token_id, processor.tokenizer.pad_token_id)
        training.train_sampling_strategy = "sequential"  # the curriculum is the order of the samples
    return train_sft.trainer_for(
        model,
        training,
        train,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=processor,
        compute_metrics=patch_accuracy if arguments.stage == "tower" else answer_accuracy,
        preprocess_logits_for_metrics=best_of_each,
    )


def best_of_each(logits: Any, labels: Any) -> Any:
    """What the evaluation keeps of logits."""
    return tuple(each.argmax(-1) for each in logits) if isinstance(logits, tuple) else logits.argmax(-1)


def main(command_line: Sequence[str] | None = None) -> Trainer:
    """Train a stage; returns the Trainer."""
    parser = HfArgumentParser((LlavaArguments, LlavaTrainingArguments), description=__doc__.splitlines()[0])
    arguments, training = parser.parse_args_into_dataclasses(command_line)
    train_sft.begin(training)
    trainer = make_trainer(arguments, training)
    train_sft.run(trainer)
    # Of what the model returns only the logits are of use, and a cache could not be gathered.
    metrics = trainer.evaluate(ignore_keys=["past_key_values", "image_hidden_states"])
    log.info(
        "held out: %s",
        {name: round(value, 4) for name, value in metrics.items() if "accuracy" in name or "loss" in name},
    )
    trainer.save_metrics("eval", metrics)
    return trainer


if __name__ == "__main__":
    main()
