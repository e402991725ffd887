"""Teaching a language model to read a tower's features from a part of the patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from pruneops.models._pruned import StockNamesMixin
from pruneops.training.collate import Collator


class AlignmentCollator:
    """Batches in which only some of a picture's patches are shown, each at its own position.

    Parameters
    ----------
    processor : LlavaProcessor
    image_token_id : int
    """

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self._collate = Collator(processor)
        self._image_token_id = image_token_id

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of samples of one picture each, with their ``shown``, ``(patches,)`` bool.

        Returns
        -------
        dict of str to Tensor
            ``input_ids``, ``labels``, ``attention_mask`` and ``position_ids`` ``(batch, length)`` of the tokens that
            stay, ``pixel_values``, and ``shown`` ``(batch, patches)`` bool.
        """
        kept, positions = [], []
        for sample in samples:
            visual = sample["input_ids"] == self._image_token_id
            stays = ~visual
            stays[visual] = sample["shown"]
            positions.append(stays.nonzero()[:, 0])
            rest = {name: sample[name][stays] for name in ("input_ids", "labels")}
            kept.append({**rest, "pixel_values": sample["pixel_values"]})
        batch = self._collate(kept)
        batch["position_ids"] = pad_sequence(positions, batch_first=True)
        return {**batch, "shown": torch.stack([sample["shown"] for sample in samples])}


class AlignedLlavaForConditionalGeneration(StockNamesMixin, LlavaForConditionalGeneration):
    """A LLaVA that takes the batches of an `AlignmentCollator`. Its checkpoints are those of a LLaVA."""

    # What is left of training the tower has done its work.
    _keys_to_ignore_on_load_unexpected = (r"^patch_heads\.",)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, shown: Tensor, **kwargs: Any
    ) -> LlavaCausalLMOutputWithPast:
        """The stock ``forward`` on the patches that are shown.

        Parameters
        ----------
        input_ids : Tensor
            ``(batch, length)`` with one image token for each of them.
        pixel_values : Tensor
            ``(batch, 3, side, side)``.
        shown : Tensor
            ``(batch, patches)`` bool.
        **kwargs
            Of the stock ``forward``.
        """
        features = torch.stack(tuple(self.get_image_features(pixel_values, return_dict=True).pooler_output))
        embeds = self.get_input_embeddings()(input_ids)
        places = (input_ids == self.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, features[shown].to(embeds.dtype))
        return super().forward(inputs_embeds=embeds, **kwargs)
