"""Teaching a language model to read a tower's features from the patches that matter, before it has to find them."""

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

    What an answer hangs on is always there. Of the other patches with something on them a share is shown, drawn for
    each picture between none and all, and of the empty ones that share of `background_share`. So every batch has
    pictures in which there is little to choose from, on which reading is learnt first, and others for finding; and a
    step costs a fraction of one on whole pictures (the idea of Li et al., "Scaling Language-Image Pre-training via
    Masking", arXiv 2212.00794, with labels in the place of chance).

    Parameters
    ----------
    processor : LlavaProcessor
    image_token_id : int
    background_share : float
        Of the patches without anything on them, in [0, 1]; where everything else is shown.

    Raises
    ------
    ValueError
        If the share is not in its range.
    """

    def __init__(self, processor: Any, image_token_id: int, background_share: float) -> None:
        if not 0 <= background_share <= 1:
            raise ValueError(f"background_share: got {background_share}, expected a share in [0, 1]")
        self._collate = Collator(processor)
        self._image_token_id = image_token_id
        self._background_share = background_share

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of samples of one picture each, with their ``covered`` and ``evidence``.

        Both are ``(patches,)`` bool: whether a patch has something on it, and whether an answer hangs on it.

        Returns
        -------
        dict of str to Tensor
            ``input_ids``, ``labels``, ``attention_mask`` and ``position_ids`` ``(batch, length)`` of the tokens that
            stay, ``pixel_values``, and ``shown`` ``(batch, patches)`` bool.
        """
        covered, evidence = (torch.stack([sample[name] for sample in samples]) for name in ("covered", "evidence"))
        share = torch.rand(len(samples), 1) * torch.where(covered, 1.0, self._background_share)
        shown = evidence | (torch.rand(covered.shape) < share)
        kept, positions = [], []
        for sample, patches in zip(samples, shown, strict=True):
            visual = sample["input_ids"] == self._image_token_id
            stays = ~visual
            stays[visual] = patches
            positions.append(stays.nonzero()[:, 0])
            rest = {name: sample[name][stays] for name in ("input_ids", "labels")}
            kept.append({**rest, "pixel_values": sample["pixel_values"]})
        batch = self._collate(kept)
        batch["position_ids"] = pad_sequence(positions, batch_first=True)
        return {**batch, "shown": shown}


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
