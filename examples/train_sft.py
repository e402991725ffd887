"""Supervised fine-tuning of a LLaVA or LLaVA-NeXT with the stock Trainer, with or without pruning.

    python examples/train_sft.py --model llava-hf/llava-1.5-7b-hf --data train.json --image_folder images \
        --method pmod --output_dir out --bf16
    accelerate launch --config_file examples/fsdp2.yaml examples/train_sft.py ...

Every argument of transformers' TrainingArguments is accepted as well; see examples/README.md.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from pruneops import models
from pruneops.methods import DynamicLlava, PMoD, PruningMethod, PyramidDrop, method_from_dict
from pruneops.models import checkpoints
from pruneops.training import Collator, GumbelTemperature, LlavaDataset, parameter_groups

log = logging.getLogger("train_sft")
METHODS: dict[str, type[PruningMethod] | None] = {
    "dense": None,
    "pyramiddrop": PyramidDrop,
    "pmod": PMoD,
    "dynamic-llava": DynamicLlava,
}
#: The learning rates of the published trainings: Dynamic-LLaVA begins with a model that was fine-tuned already.
LEARNING_RATE, DYNAMIC_LEARNING_RATE = 2e-5, 5e-6


@dataclass
class SftArguments:
    """What to train, and on what."""

    model: str = field(metadata={"help": "LLaVA or LLaVA-NeXT: a folder or hub name, in any layout pruneops loads"})
    data: str = field(metadata={"help": "JSON file of LLaVA's format: a list of {id, image, conversations}"})
    image_folder: str | None = field(
        default=None, metadata={"help": "where the paths of images begin (default: the folder of the JSON file)"}
    )
    method: str = field(
        default="pmod",
        metadata={"help": "the method that the model is trained with", "choices": list(METHODS)},
    )
    method_config: str | None = field(
        default=None,
        metadata={
            "help": "JSON with fields of the method, such as '{\"router_factor\": 0.4}'; the others are those of the "
            "checkpoint if it was trained with the method, otherwise the published ones"
        },
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "CLIP checkpoint, for an original layout without the weights of its tower"}
    )
    model_dtype: str = field(
        default="float32",
        metadata={
            "help": "dtype of the weights that are trained; with --bf16 the computation is in bfloat16 either way",
            "choices": ["float32", "bfloat16"],
        },
    )
    max_length: int = field(
        default=2048, metadata={"help": "tokens after which a sample is cut off, never before its last image ends"}
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "train the vision tower as well"})


@dataclass
class SftTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults that LLaVA, p-MoD and Dynamic-LLaVA were trained with."""

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"The initial learning rate (default: {LEARNING_RATE}, for dynamic-llava {DYNAMIC_LEARNING_RATE})."
        },
    )
    predictor_learning_rate: float = field(
        default=2e-4, metadata={"help": "That of the predictors of dynamic-llava; they have no weight decay."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up, or their share if below 1."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of the log."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Compute activations again to save memory."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has to be False."})


def method_of(arguments: SftArguments, carried: PruningMethod | None = None) -> PruningMethod | None:
    """The method that was asked for, None for dense. What is not asked for is as in the `carried` one of its kind."""
    cls = METHODS[arguments.method]
    fields = json.loads(arguments.method_config) if arguments.method_config else {}
    if not isinstance(fields, dict):
        raise ValueError(f"--method_config: got {arguments.method_config!r}, expected a JSON object")
    if cls is None:
        if fields:
            raise ValueError("--method_config: got fields for the dense model, which has none")
        return None
    start = carried.to_dict() if type(carried) is cls else {"method": cls.name}
    return method_from_dict({**start, **fields})


def load_model(arguments: SftArguments) -> Any:
    """The model with its method in place; weights of modules that the checkpoint does not have are new."""
    folder = checkpoints.find_folder(arguments.model)
    config = checkpoints.read_config(folder)
    if checkpoints.layout_of(config) is not None:
        source = checkpoints.read_original(folder, arguments.vision_tower)
        name, carried = source.class_name, source.method
    elif config.get("model_type") in ("llava", "llava_next"):
        name = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}[
            config["model_type"]
        ]
        carried = method_from_dict(config["pruning"]) if config.get("pruning") else None
    else:
        raise ValueError(f"--model: {arguments.model} is of the type {config.get('model_type')!r}, expected a LLaVA")
    method = method_of(arguments, carried)
    if method is None and carried is not None:
        kind = next((option for option, cls in METHODS.items() if cls is type(carried)), carried.name)
        raise ValueError(f"--method: got dense for a checkpoint of the method {kind}, expected --method {kind}")
    model = getattr(models, name).from_pretrained(
        folder, pruning=method, vision_tower=arguments.vision_tower, dtype=getattr(torch, arguments.model_dtype)
    )
    model.model.vision_tower.requires_grad_(arguments.train_vision_tower)
    return model


class SftTrainer(Trainer):
    """The stock Trainer with a learning rate of their own for the predictors of Dynamic-LLaVA.

    The optimizer is made here because sharding may put other parameters in the place of the model's first.
    """

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = self.model if model is None else model
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(
                trained, weight_decay=self.args.weight_decay, predictor_lr=self.args.predictor_learning_rate
            )
            self.optimizer_cls_and_kwargs = cls, {**settings, "params": groups}
        return super().create_optimizer(model)


def trainer_for(model: Any, training: TrainingArguments, train_dataset: Any, **settings: Any) -> Trainer:
    """The stock Trainer; for Dynamic-LLaVA one with the learning rates and falling temperature of its predictors."""
    pruning = getattr(model, "pruning_run", None)
    dynamic = pruning is not None and isinstance(pruning.method, DynamicLlava)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info("%d samples, %.3f million trained weights", len(train_dataset), trained / 1e6)
    callbacks = [GumbelTemperature()] if dynamic else None
    cls = SftTrainer if dynamic else Trainer
    return cls(model=model, args=training, train_dataset=train_dataset, callbacks=callbacks, **settings)


def begin(training: TrainingArguments) -> None:
    """Logs of the first process, and the seed."""
    logging.basicConfig(level=logging.INFO if training.process_index == 0 else logging.WARNING, stream=sys.stderr)
    set_seed(training.seed)


def run(trainer: Trainer) -> None:
    """Train, from the newest checkpoint with ``--resume_from_checkpoint last``, and save."""
    resume = trainer.args.resume_from_checkpoint
    if resume == "last":
        resume = get_last_checkpoint(trainer.args.output_dir)
        log.info("resuming from %s", resume or "the beginning: there is no checkpoint yet")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()


def main(command_line: Sequence[str] | None = None) -> Trainer:
    """Train; returns the Trainer."""
    parser = HfArgumentParser((SftArguments, SftTrainingArguments), description=__doc__.splitlines()[0])
    arguments, training = parser.parse_args_into_dataclasses(command_line)
    if training.learning_rate is None:
        training.learning_rate = DYNAMIC_LEARNING_RATE if arguments.method == "dynamic-llava" else LEARNING_RATE
    begin(training)
    processor = checkpoints.load_processor(checkpoints.find_folder(arguments.model), arguments.vision_tower)
    processor.tokenizer.padding_side = "right"
    dataset = LlavaDataset(arguments.data, processor, arguments.image_folder, arguments.max_length)
    model = load_model(arguments)
    log.info("method: %s", "dense" if model.pruning_run is None else model.pruning_run.method)
    trainer = trainer_for(model, training, dataset, data_collator=Collator(processor), processing_class=processor)
    run(trainer)
    return trainer


if __name__ == "__main__":
    main()
