"""What the drop-in classes share: pruning that lives in the model's config and is saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruneops.methods.base import PruningMethod, method_from_dict
from pruneops.pruning import Run, attach


class PrunedModelMixin:
    """Mixed in before a Hugging Face model class: attaches the method that ``config.pruning`` describes."""

    def __init__(self, config: Any, pruning: PruningMethod | Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        pruning = pruning if pruning is not None else getattr(config, "pruning", None)
        #: The run of the attached method (`pruneops.pruning.Run`), or None if the model is not pruned.
        self.__dict__["pruning_run"] = None
        if pruning is None:
            return
        method = method_from_dict(pruning) if isinstance(pruning, Mapping) else pruning
        run: Run = attach(self, method)
        # The method as the user gave it: layers=None stays None and fits another depth later.
        config.pruning = method.to_dict()
        self.__dict__["pruning_run"] = run

    @classmethod
    def is_custom_code(cls) -> bool:
        """The weights and their names are the stock class's, so its checkpoint conversions apply."""
        return False

    @classmethod
    def from_pretrained(
        cls, *args: Any, pruning: PruningMethod | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Load a checkpoint and prune it.

        Parameters
        ----------
        *args, **kwargs
            As for the Hugging Face class.
        pruning : PruningMethod or mapping, optional
            The method, or its ``to_dict()``. None: what the checkpoint was saved with, if anything.

        Raises
        ------
        TypeError, ValueError
            If the method is not one, or does not fit the model.
        """
        if pruning is not None:
            if not isinstance(pruning, (PruningMethod, Mapping)):
                raise TypeError(
                    f"pruning: got {type(pruning).__name__}, expected a pruneops.methods.PruningMethod or its to_dict()"
                )
            # A dict: a checkpoint that has the key already puts the value into its config, which has to stay JSON.
            kwargs["pruning"] = pruning.to_dict() if isinstance(pruning, PruningMethod) else dict(pruning)
        return super().from_pretrained(*args, **kwargs)
