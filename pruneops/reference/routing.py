"""What the routing ops mean, in plain torch, differentiable by ordinary autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def router_weights(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    target: Tensor | None = None,
    activation: str = "tanh",
    scale: float = 1.0,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The logit ``x[t] . weight + bias`` of each row, and ``scale * activation(logit) + shift``, its weight.

    Parameters
    ----------
    x : float ``[total, H]``
    weight : ``[H]``
    bias : ``[1]``, optional
    target : bool ``[total]``, optional
        Other rows have a logit of -inf and a weight of 1, and take no part in any gradient.
    activation : "tanh", "sigmoid" or "none"
    scale, shift : float

    Returns
    -------
    logits : float32 ``[total]`` (float64 where ``x`` is), detached
    weights : float32 ``[total]`` (float64 where ``x`` is)
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if target is None:
        target = x.new_ones(x.shape[0], dtype=torch.bool)
    # Rows that are not routed may hold anything; zeros in their place keep it out of every gradient.
    routed = x.to(dtype).masked_fill(~target[:, None], 0.0)
    logits = (routed * weight.to(dtype)).sum(-1)
    if bias is not None:
        logits = logits + bias.to(dtype)
    activated = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": torch.clone}[activation](logits)
    weights = torch.where(target, scale * activated + shift, 1.0)
    return torch.where(target, logits, -torch.inf).detach(), weights
