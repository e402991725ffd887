"""Training Dynamic-LLaVA with the stock Trainer: falling temperature, and a learning rate for the predictors."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from pruneops.methods import DynamicLlava
from pruneops.methods.dynamic_llava import predictors_of
from pruneops.pruning import find_text_model
from pruneops.stand_ins import RUN_ATTRIBUTE


class GumbelTemperature(TrainerCallback):
    """Sets the temperature of the predictors' draws before every step, falling exponentially over the training.

    Step ``s`` of ``n`` runs at ``start * (end / start) ** (s / n)``; both come from the attached `DynamicLlava`
    (``gumbel_start_tau`` and ``gumbel_end_tau``). A model with another method or none is left alone.

    Raises
    ------
    ValueError
        In the first step, if the Trainer's model is not one that pruneops supports (`pruneops.prune` lists them).
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        text_model = find_text_model(model)
        run = getattr(text_model, RUN_ATTRIBUTE, None)
        if run is None or not isinstance(run.method, DynamicLlava):
            return
        tau = temperature(run.method, state.global_step, state.max_steps)
        for predictor in predictors_of(text_model).values():
            predictor.gumbel_tau = tau


def temperature(method: DynamicLlava, step: int, max_steps: int) -> float:
    """Temperature at a step (counted from 0) of a training of `max_steps`."""
    progress = min(step / max_steps, 1.0) if max_steps > 0 else 0.0
    return method.gumbel_start_tau * (method.gumbel_end_tau / method.gumbel_start_tau) ** progress


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.0, predictor_lr: float = 2e-4, predictor_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameters that are trained, in groups for an optimizer: the predictors have a learning rate of their own.

    Hand the optimizer to the Trainer as ``optimizers=(AdamW(groups, lr=...), None)``; its schedule scales all rates
    alike.

    Parameters
    ----------
    model : nn.Module
        One that pruneops supports, wrapped or not, with `DynamicLlava` attached; with another method or none there are
        no predictors, and so no group of them.
    weight_decay : float
        Of the model's parameters of two or more dimensions; biases and norms have none.
    predictor_lr, predictor_weight_decay : float
        Of all parameters of the predictors; the official training uses 2e-4 and 0.

    Returns
    -------
    list of dict
        Up to three groups of those parameters that require a gradient: matrices, biases and norms, predictors. Empty
        ones are left out.

    Raises
    ------
    ValueError
        If pruneops does not support the model.
    """
    predictors = predictors_of(find_text_model(model)).values()
    special = {id(parameter) for predictor in predictors for parameter in predictor.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = [parameter for parameter in trained if id(parameter) not in special]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in plain if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in plain if p.dim() <= 1], "weight_decay": 0.0},
        {
            "params": [p for p in trained if id(p) in special],
            "weight_decay": predictor_weight_decay,
            "lr": predictor_lr,
        },
    ]
    return [group for group in groups if group["params"]]
