"""Training a vision tower to say what each patch shows, before a language model has to find it out from answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, rms_norm
from transformers import LlavaConfig, LlavaForConditionalGeneration

from pruneops.models._pruned import StockNamesMixin
from pruneops.training.conversations import IGNORED

_PLACES = ("row", "column")


class PatchReader(StockNamesMixin, LlavaForConditionalGeneration):
    """A LLaVA whose tower and projector are trained to name what each patch shows in the language model's own words.

    What the projector makes of a patch is compared with the embeddings of words, which stay as they are: a patch with a
    red circle becomes similar to "red" and to "circle". Real LLaVAs get this from CLIP, whose tower was trained beside
    text. Two further heads read the row and the column of the patch: what a language model is to reason about has to
    say where it comes from. Nothing but tower, projector and these heads is trained. A checkpoint is that of a LLaVA,
    which ignores the heads in it.

    Parameters
    ----------
    config : LlavaConfig
        With ``patch_words``: for each kind of label a list that has, for every value but the first, which is
        background, the ids of the tokens that name it.
    """

    accepts_loss_kwargs = False
    #: Of a background patch in the loss, against 1 for all others, which are few.
    background_weight = 0.05

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        if clash := set(config.patch_words) & set(_PLACES):
            raise ValueError(f"patch_words: got {sorted(clash)}, expected other names: these heads are there already")
        vision, width = config.vision_config, config.text_config.hidden_size
        self.grid = vision.image_size // vision.patch_size
        sizes = {**dict.fromkeys(config.patch_words, 1), **dict.fromkeys(_PLACES, self.grid)}
        self.patch_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.requires_grad_(False)
        for part in (self.model.vision_tower, self.model.multi_modal_projector, self.patch_heads):
            part.requires_grad_(True)
        self.post_init()

    def forward(self, pixel_values: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """The mean loss of all heads, and the logits of each kind.

        Parameters
        ----------
        pixel_values : Tensor
            ``(batch, 3, side, side)``.
        **labels : Tensor
            ``(batch, patches)`` int64 for each of the kinds; -100 does not count.

        Returns
        -------
        dict
            ``loss``, and under the name of each kind ``(batch, patches, values)`` float32 logits.
        """
        features = torch.cat(tuple(self.get_image_features(pixel_values, return_dict=True).pooler_output))
        # As the layers of the language model see it: without this, what names a patch may be lost in the rest of it.
        features = rms_norm(features, features.shape[-1:])
        places = torch.arange(self.grid**2, device=features.device).repeat(pixel_values.shape[0])
        losses = [
            cross_entropy(self.patch_heads["row"](features).float(), places // self.grid),
            cross_entropy(self.patch_heads["column"](features).float(), places % self.grid),
        ]
        outputs = {}
        for name, label in labels.items():
            background = self.patch_heads[name](features)
            logits = torch.cat((background, features @ self._words(name).T), dim=-1).float()
            weight = torch.ones(logits.shape[-1], device=features.device)
            weight[0] = self.background_weight
            losses.append(cross_entropy(logits, label.flatten(), weight=weight, ignore_index=IGNORED))
            outputs[name] = logits.unflatten(0, label.shape)
        return {"loss": torch.stack(losses).mean(), **outputs}

    def _words(self, name: str) -> Tensor:
        """``(values - 1, hidden)``: the mean embedding of the words of each value, of length 1."""
        embeddings = self.get_input_embeddings().weight
        return normalize(torch.stack([embeddings[ids].mean(0) for ids in self.config.patch_words[name]]), dim=-1)


def patch_accuracy(predictions: Any) -> dict[str, float]:
    """Share of the patches with something on them that each head of a `PatchReader` reads right.

    Parameters
    ----------
    predictions : transformers.EvalPrediction
        Classes and labels as tuples of ``(pictures, patches)`` arrays, in the same order.

    Returns
    -------
    dict of str to float
        ``accuracy_0``, ``accuracy_1``, ... of the kinds in that order.
    """
    found: dict[str, float] = {}
    for index, (said, label) in enumerate(zip(predictions.predictions, predictions.label_ids, strict=True)):
        known = label > 0
        found[f"accuracy_{index}"] = float((said == label)[known].mean()) if known.any() else float("nan")
    return found
