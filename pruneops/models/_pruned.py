"""What the drop-in classes share: pruning that lives in the model's config and is saved with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import NoneType
from typing import Any

from pruneops.methods.base import PruningMethod, method_from_dict
from pruneops.models.checkpoints.loading import accept_published_names, loading_arguments
from pruneops.pruning import Run, attach, detach, find_text_model
from pruneops.stand_ins import RUN_ATTRIBUTE


class StockNamesMixin:
    """Mixed in before a Hugging Face model class: checkpoints have the names of weights that the stock class's have."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        accept_published_names(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """The weights and their names are the stock class's, so its checkpoint conversions apply."""
        return False


class PrunedModelMixin(StockNamesMixin):
    """Mixed in before a Hugging Face model class: attaches the method that ``config.pruning`` describes."""

    def __init__(self, config: Any, pruning: PruningMethod | Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        pruning = pruning if pruning is not None else getattr(config, "pruning", None)
        if pruning is not None:
            self._attach(method_from_dict(pruning) if isinstance(pruning, Mapping) else pruning)

    @property
    def pruning_run(self) -> Run | None:
        """The run of the attached method, or None if the model is not pruned."""
        return getattr(find_text_model(self), RUN_ATTRIBUTE, None)

    def _attach(self, method: PruningMethod) -> None:
        run = self.pruning_run
        if run is not None and type(run.method) is type(method):
            run.remove()  # the modules of a trainable method stay
        elif run is not None:
            detach(self)
        self.config.pruning = attach(self, method).given_method.to_dict()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as the Hugging Face class does, with the method that prunes the model now, or as a plain model."""
        run = self.pruning_run
        if run is None:
            self.config.__dict__.pop("pruning", None)
        else:
            self.config.pruning = run.given_method.to_dict()
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        pruning: PruningMethod | Mapping[str, Any] | None = None,
        vision_tower: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint and prune it.

        A checkpoint in the layout of a method's authors, as its ``config.json`` tells, is loaded as well, with its
        method (see `pruneops.models.checkpoints`).

        Parameters
        ----------
        pretrained_model_name_or_path, *args, **kwargs
            As for the Hugging Face class.
        pruning : PruningMethod or mapping, optional
            The method, or its ``to_dict()``. None: what the checkpoint was saved with, if anything. A trainable method
            gets the checkpoint's modules where it was saved with them, otherwise new ones.
        vision_tower : str or path, optional
            Only for a checkpoint in the layout of a method's authors that lacks the weights of its vision tower: the
            CLIP checkpoint that has them, a folder or a hub name.

        Raises
        ------
        TypeError, ValueError
            If the method is not one, or does not fit the model, or if weights of its modules are missing in the
            checkpoint or not finite; if a checkpoint in the layout of a method's authors is not complete.
        """
        if not isinstance(pruning, (PruningMethod, Mapping, NoneType)):
            raise TypeError(
                f"pruning: got {type(pruning).__name__}, expected a pruneops.methods.PruningMethod or its to_dict()"
            )
        method = method_from_dict(pruning) if isinstance(pruning, Mapping) else pruning
        wants_info = kwargs.pop("output_loading_info", False)
        checkpoint = pretrained_model_name_or_path
        converted = loading_arguments(cls.__name__, checkpoint, vision_tower, kwargs)
        if converted is not None:
            checkpoint, kwargs = None, {**kwargs, **converted}
        # What the checkpoint was saved with comes first: it decides the names of the weights.
        model, info = super().from_pretrained(checkpoint, *args, output_loading_info=True, **kwargs)
        if model.pruning_run is not None:
            model.pruning_run.check_modules(info["missing_keys"])
        if method is not None:
            model._attach(method)
        return (model, info) if wants_info else model
