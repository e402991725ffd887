"""Teaching a language model to read pictures that a frozen tower and projector have turned into features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from pruneops.models._pruned import StockNamesMixin
from pruneops.training.conversations import IGNORED


class ReadPictures(Dataset):
    """Conversations about pictures, with the features of the patches that are shown.

    Every picture is read once, when the data set is made: what comes before the language model takes most of the time
    of a step and is always the same while it is frozen. Features are held in half precision, 0.2 MB for 576 of a width
    of 160.

    Parameters
    ----------
    model : LlavaForConditionalGeneration
        Its tower and projector read the pictures.
    data : CurriculumDataset
        Or another whose entries ``i``, ``i + pictures``, ... are of the same picture, and that has ``samples``, one for
        each of the pictures, ``text`` and ``shown``.
    batch_size : int
        Pictures that are read at a time.
    progress : callable, optional
        Called with the number of pictures that have been read since the last call.
    """

    def __init__(
        self, model: Any, data: Any, batch_size: int = 16, progress: Callable[[int], object] | None = None
    ) -> None:
        self._data, self._pictures = data, len(data.samples)
        self._features: Any = None
        for start in range(0, self._pictures, batch_size):
            read = [data[index] for index in range(start, min(start + batch_size, self._pictures))]
            pixels = torch.cat([sample["pixel_values"] for sample in read]).to(model.device, model.dtype)
            with torch.inference_mode():
                found = torch.stack(tuple(model.get_image_features(pixels, return_dict=True).pooler_output))
            if self._features is None:
                self._features = torch.empty(self._pictures, *found.shape[1:], dtype=torch.float16)
            self._features[start : start + len(read)] = found
            if progress is not None:
                progress(len(read))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` ``(tokens,)`` of the whole conversation, ``shown`` ``(patches,)`` bool, and
        ``image_features`` ``(shown, hidden)`` float16."""
        picture, shown = index % self._pictures, self._data.shown(index)
        return {**self._data.text(index), "shown": shown, "image_features": self._features[picture][shown]}


class AlignmentCollator:
    """Batches of `ReadPictures`: every patch that is shown stays at its own position.

    Parameters
    ----------
    image_token_id, pad_token_id : int
    """

    def __init__(self, image_token_id: int, pad_token_id: int) -> None:
        self._image_token_id, self._pad_token_id = image_token_id, pad_token_id

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, padded on the right.

        Returns
        -------
        dict of str to Tensor
            ``input_ids``, ``labels``, ``attention_mask`` and ``position_ids`` ``(batch, length)`` of the tokens that
            stay, and ``image_features`` ``(shown in all, hidden)``.
        """
        rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
        for sample in samples:
            visual = sample["input_ids"] == self._image_token_id
            stays = ~visual
            stays[visual] = sample["shown"]
            rows["position_ids"].append(stays.nonzero()[:, 0])
            rows["attention_mask"].append(torch.ones_like(rows["position_ids"][-1]))
            for name in ("input_ids", "labels"):
                rows[name].append(sample[name][stays])
        fill = {"input_ids": self._pad_token_id, "labels": IGNORED}
        batch = {name: pad_sequence(each, True, fill.get(name, 0)) for name, each in rows.items()}
        return {**batch, "image_features": torch.cat([sample["image_features"] for sample in samples])}


class AlignedLlavaForConditionalGeneration(StockNamesMixin, LlavaForConditionalGeneration):
    """A LLaVA that takes the batches of an `AlignmentCollator`. Its checkpoints are those of a LLaVA."""

    # What is left of training the tower has done its work.
    _keys_to_ignore_on_load_unexpected = (r"^patch_heads\.",)

    def forward(self, input_ids: Tensor, image_features: Tensor, **kwargs: Any) -> LlavaCausalLMOutputWithPast:
        """The stock ``forward`` on features in the place of pixels.

        Parameters
        ----------
        input_ids : Tensor
            ``(batch, length)`` with one image token for each feature.
        image_features : Tensor
            ``(image tokens, hidden)``.
        **kwargs
            Of the stock ``forward``.
        """
        embeds = self.get_input_embeddings()(input_ids)
        places = (input_ids == self.config.image_token_id).unsqueeze(-1)
        return super().forward(inputs_embeds=embeds.masked_scatter(places, image_features.to(embeds.dtype)), **kwargs)
