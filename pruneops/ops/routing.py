"""Routing: how much of a block each row gets, from a learned logit."""

from __future__ import annotations

from torch import Tensor

from pruneops import backends, reference
from pruneops.ops import _checks

ACTIVATIONS = ("tanh", "sigmoid", "none")


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

    Rows outside ``target`` have a logit of -inf, so they rank last, and a weight of exactly 1.

    Parameters
    ----------
    x : ``[total, H]``
        float32, bfloat16 or float16; float64 runs on the reference backend.
    weight : ``[H]``, the dtype of ``x``
    bias : ``[1]``, the dtype of ``x``, optional
    target : bool ``[total]``, optional
        Rows that are routed, by default all. Other rows are not read.
    activation : "tanh", "sigmoid" or "none"
    scale, shift : float, finite in float32

    Returns
    -------
    logits : float32 ``[total]`` (float64 where ``x`` is)
        For ranking, without a gradient. The weights of many rows are equal once rounded; their logits are not.
    weights : float32 ``[total]`` (float64 where ``x`` is)

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device, an unknown activation, a scale or shift that is not finite.

    Notes
    -----
    O(total x H), one pass over ``x``. Arithmetic in float32. Differentiable once in ``x``, ``weight`` and ``bias``
    through ``weights``, fused; rows outside ``target`` get a gradient of exactly 0 and add none, whatever they hold.
    Deterministic, forward and backward: the gradient of ``weight`` is summed in an order that depends on the shape of
    ``x`` alone. Under autocast ``weight`` and ``bias`` are cast to the dtype of ``x``.

    Source: the router of Mixture-of-Depths (arXiv 2404.02258), with the weights of p-MoD (arXiv 2412.04449), where
    ``0.2 * tanh(logit) + 1`` leaves a model as it was as long as the router is zero.
    """
    weight, bias = _checks.autocast_to(x, weight, bias)
    _checks.tensor("x", x, 2, _checks.FLOATS)
    named = (("weight", weight, x.shape[1]), ("bias", bias, 1))
    for name, value, size in named[: 1 if bias is None else 2]:
        _checks.tensor(name, value, 1, _checks.FLOATS, x.device)
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
        if value.shape[0] != size:
            raise ValueError(f"{name} must have shape ({size},), got {tuple(value.shape)}")
    if target is not None:
        _checks.tensor("target", target, 1, _checks.BOOL, x.device, x.shape[0])
    _checks.choice("activation", activation, ACTIVATIONS)
    scale, shift = _checks.finite("scale", scale), _checks.finite("shift", shift)
    backend = backends.select("router_weights", x.device.type, x.dtype)
    if backend != backends.REFERENCE:
        return backends.kernel(backend, "router_weights")(x, weight, bias, target, activation, scale, shift)
    return reference.router_weights(x, weight, bias, target=target, activation=activation, scale=scale, shift=shift)
