"""Tiny models with p-MoD attached."""

from __future__ import annotations

import tiny
import torch
from torch import nn

import pruneops
from pruneops.methods import PMoD
from pruneops.methods.mod_layer import ModDecoderLayer
from pruneops.pruning import Run, find_text_model

ROWS = [
    tiny.row(3, 1, 5, seed=1),
    tiny.row(2, 1, 9, seed=2),
    tiny.row(6, 0, 4, seed=3),
    tiny.row(1, 2, 3, seed=4),
]
#: The default schedule in a model of 6 layers, and what goes through of 16 and of 32 tokens.
MOD_LAYERS, KEPT_OF_16, KEPT_OF_32 = [2, 3, 4, 5], [10, 5, 2, 2], [20, 11, 4, 4]


def trained(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Routers that prefer some tokens to others."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in find_text_model(model).layers:
            if isinstance(layer, ModDecoderLayer):
                for parameter in layer.router.parameters():
                    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def attached(model: nn.Module, method: PMoD = PMoD(), record: bool = False) -> tuple[nn.Module, Run]:  # noqa: B008
    run = pruneops.attach(model, method, record)
    return trained(model), run
