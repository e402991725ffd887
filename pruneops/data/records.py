"""Samples in LLaVA's format, and as torch data sets that need no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pruneops.data.samples import Sample, Samples
from pruneops.models.checkpoints.processor import IMAGE_TOKEN
from pruneops.training.conversations import Conversation, encode

if TYPE_CHECKING:
    from torch import Tensor


def picture_names(sample: Sample) -> list[str]:
    """The files of a sample's pictures: ``images/NAME.png``, and of a clip ``clips/NAME/00.png`` and so on."""
    if sample.kind != "clip":
        return [f"images/{sample.name}.png"]
    return [f"clips/{sample.name}/{frame:02d}.png" for frame in range(sample.source.frames)]


def record(sample: Sample) -> dict[str, Any]:
    """A sample as an entry of a LLaVA JSON file; a clip is several images.

    Beside LLaVA's ``id``, ``image`` and ``conversations`` it has ``kind`` and the ``templates`` of its questions.
    """
    names = picture_names(sample)
    turns = []
    for index, question in enumerate(sample.turns):
        marks = f"{IMAGE_TOKEN * len(names)}\n" if index == 0 else ""
        turns.append({"from": "human", "value": marks + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return {
        "id": sample.name,
        "image": names if sample.kind == "clip" else names[0],
        "conversations": turns,
        "kind": sample.kind,
        "templates": [question.template for question in sample.turns],
    }


class SampleDataset(Dataset):
    """What `pruneops.training.LlavaDataset` gives of exported samples, without files.

    Parameters
    ----------
    samples : Samples
    processor : LlavaProcessor
        With a fast tokenizer, for pictures of the samples' size (`pruneops.data.scene_processor`).
    max_length : int, optional
        See `pruneops.training.encode`.
    """

    def __init__(self, samples: Samples, processor: Any, max_length: int | None = None) -> None:
        self.samples = samples
        self._processor = processor
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        return self._encoded(sample, index, sample.pictures)

    def _encoded(self, sample: Sample, index: int, pictures: Sequence[np.ndarray]) -> dict[str, Tensor]:
        from PIL import Image

        conversation = Conversation.from_record(record(sample), index)
        return encode(conversation, list(map(Image.fromarray, pictures)), self._processor, self._max_length)


class PatchDataset(Dataset):
    """Pictures with what each patch shows, to train a vision tower on; of a clip, its last frame.

    Parameters
    ----------
    samples : Samples
        All pictures, or all clips: a batch holds pictures of one size.
    image_processor : CLIP image processor
        Normalises the pictures, `scene_processor(...).image_processor` does so without a change of size.
    """

    def __init__(self, samples: Samples, image_processor: Any) -> None:
        self.samples = samples
        self._image_processor = image_processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``pixel_values`` ``(3, side, side)`` float32, and a ``(patches,)`` int64 tensor for each of `LABELS`."""
        from PIL import Image

        sample = self.samples[index]
        picture = Image.fromarray(sample.pictures[-1])
        pixels = self._image_processor(images=picture, return_tensors="pt")["pixel_values"][0]
        labels = sample.labels(len(sample.pictures) - 1)
        return {"pixel_values": pixels} | {name: torch.from_numpy(found).flatten() for name, found in labels.items()}
