"""Training a vision tower to say what each patch shows, before a language model has to find it out from answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaConfig, LlavaForConditionalGeneration

from pruneops.training.conversations import IGNORED

_PLACES = ("row", "column")


class PatchReader(LlavaForConditionalGeneration):
    """A LLaVA whose vision tower is trained on labels of patches, by linear heads on the features its projector reads.

    There is one head for each kind of label, and two for the row and the column of the patch: features that a language
    model is to reason about have to say where they come from. Nothing but tower and heads is trained. A checkpoint is
    that of a LLaVA, which ignores the heads in it.

    Parameters
    ----------
    config : LlavaConfig
        With ``patch_classes``: kinds of labels and how many values each has; value 0 is background.
    """

    accepts_loss_kwargs = False
    #: Of a background patch in the loss, against 1 for all others, which are few.
    background_weight = 0.05

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        if clash := set(config.patch_classes) & set(_PLACES):
            raise ValueError(f"patch_classes: got {sorted(clash)}, expected other names: these heads are there already")
        vision = config.vision_config
        self.grid = vision.image_size // vision.patch_size
        sizes = {**config.patch_classes, **dict.fromkeys(_PLACES, self.grid)}
        self.patch_heads = nn.ModuleDict({name: nn.Linear(vision.hidden_size, size) for name, size in sizes.items()})
        self.requires_grad_(False)
        self.model.vision_tower.requires_grad_(True)
        self.patch_heads.requires_grad_(True)
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
        hidden_states = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features = hidden_states[self.config.vision_feature_layer][:, 1:]
        logits = {name: head(features).float().flatten(0, 1) for name, head in self.patch_heads.items()}
        places = torch.arange(self.grid**2, device=features.device).repeat(features.shape[0])
        losses = [
            cross_entropy(logits["row"], places // self.grid),
            cross_entropy(logits["column"], places % self.grid),
        ]
        for name, label in labels.items():
            weight = torch.ones(logits[name].shape[-1], device=features.device)
            weight[0] = self.background_weight
            losses.append(cross_entropy(logits[name], label.flatten(), weight=weight, ignore_index=IGNORED))
        return {
            "loss": torch.stack(losses).mean(),
            **{name: logits[name].unflatten(0, label.shape) for name, label in labels.items()},
        }


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
