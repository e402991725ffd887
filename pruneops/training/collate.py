"""Batches of encoded conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from pruneops.models.checkpoints.processor import IMAGE_TOKEN
from pruneops.training.conversations import IGNORED


class Collator:
    """Pads conversations on the right and puts their images behind each other.

    A batch of text alone gets a black image whose tokens are masked out, so that every process of a distributed run
    uses the same weights in every step; otherwise one that has no image would wait for the others, or they for it. It
    takes no part in attention, loss or pruning.

    Parameters
    ----------
    processor : LlavaProcessor or LlavaNextProcessor
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._processor = processor
        self._black: dict[str, Tensor] | None = None

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of samples as `pruneops.training.encode` makes them.

        Returns
        -------
        dict of str to Tensor
            ``input_ids``, ``labels`` and ``attention_mask`` ``(batch, length)``, ``pixel_values`` of all images
            (tiles are filled up with zeros to the most that an image has) and, for LLaVA-NeXT, ``image_sizes``.
        """
        ids, labels = ([sample[key] for sample in samples] for key in ("input_ids", "labels"))
        masks = [torch.ones_like(row) for row in ids]
        features = [sample for sample in samples if "pixel_values" in sample]
        if not features:
            black = self._black_image()
            features = [black]
            placeholders = black["input_ids"]
            ids[0] = torch.cat((ids[0], placeholders))
            labels[0] = torch.cat((labels[0], torch.full_like(placeholders, IGNORED)))
            masks[0] = torch.cat((masks[0], torch.zeros_like(placeholders)))
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "pixel_values": _stacked([sample["pixel_values"] for sample in features]),
        }
        if "image_sizes" in features[0]:
            batch["image_sizes"] = torch.cat([sample["image_sizes"] for sample in features])
        return batch

    def _black_image(self) -> dict[str, Tensor]:
        """The image's pixels, and its tokens alone."""
        if self._black is None:
            from PIL import Image

            side = self._processor.image_processor.crop_size["height"]
            made = self._processor(images=[Image.new("RGB", (side, side))], text=[IMAGE_TOKEN], return_tensors="pt")
            ids = made["input_ids"][0]
            image_id = self._processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            self._black = {key: made[key] for key in ("pixel_values", "image_sizes") if key in made}
            self._black["input_ids"] = ids[ids == image_id]
        return self._black


def _stacked(pixels: list[Tensor]) -> Tensor:
    """``(images, 3, height, width)``, or ``(images, tiles, 3, height, width)`` with as many tiles for all."""
    if pixels[0].dim() == 5:
        tiles = max(image.shape[1] for image in pixels)
        pixels = [pad(image, (0, 0) * 3 + (0, tiles - image.shape[1])) for image in pixels]
    return torch.cat(pixels)
