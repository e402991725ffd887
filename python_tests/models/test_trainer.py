"""The stock Trainer trains a pruned model."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from transformers import Trainer, TrainingArguments

import pruneops
from pruneops.methods import PyramidDrop

DROP = PyramidDrop(layers=(2, 4), keep_ratios=(0.5, 0.25))


class Questions(torch.utils.data.Dataset):
    """Rows with an image and an answer, one of them without an image."""

    rows = [tiny.row(3, 1, 5, seed=1), tiny.row(2, 1, 9, seed=2), tiny.row(6, 0, 4, seed=3), tiny.row(4, 1, 6, seed=4)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[int]:
        return self.rows[index]


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    batch = tiny.llava_batch(rows, "right")
    labels = torch.full_like(batch["input_ids"], -100)
    for b, ids in enumerate(rows):
        labels[b, len(ids) - 2 : len(ids)] = torch.tensor(ids[-2:])
    return {**batch, "labels": labels}


def test_the_stock_trainer_trains_saves_and_evaluates_a_pruned_model(tmp_path: Path) -> None:
    model = tiny.llava()
    run = pruneops.attach(model, DROP)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        seed=0,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Questions(), eval_dataset=Questions(), data_collator=collate
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert sum(run.layer_lengths[-1]) < sum(run.layer_lengths[0])
    trainer.save_model(str(tmp_path / "trained"))
    pruneops.detach(model)
    again = type(model).from_pretrained(tmp_path / "trained")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
