"""The mixture-of-depths layer: a decoder layer that some tokens skip, as its router says."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pruneops import ops

if TYPE_CHECKING:
    from pruneops.methods.mod_route import ModRoute

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class ModRouter(nn.Module):
    """Predicts one number for each token from its hidden state.

    Parameters
    ----------
    hidden_size : int
    bias : bool
    std : float
        The weight starts with this standard deviation, 0 starts it at zero; the bias starts at zero.
    """

    def __init__(
        self, hidden_size: int, bias: bool, std: float, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.router = nn.Linear(hidden_size, 1, bias=bias, device=device, dtype=dtype)
        with torch.no_grad():
            for parameter in self.router.parameters():
                parameter.zero_()
            if std:
                self.router.weight.normal_(0.0, std)

    def forward(self, x: Tensor, route: ModRoute) -> tuple[Tensor, Tensor]:
        """Logits and weights of the tokens, see `ModRoute.weigh`."""
        return route.weigh(self.router, x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_finite((name, value) for name, value in state_dict.items() if name.startswith(prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ModDecoderLayer(GradientCheckpointingLayer):
    """A Hugging Face decoder layer with a router beside it.

    Called as the decoder layer, it is the decoder layer. Called with a `ModRoute`, the tokens that the route chooses go
    through the decoder layer and get ``residual + weight * mlp``, the others get ``weight * token``.

    The decoder layer is called as a whole, so that whatever another library hung on it (hooks that gather sharded
    weights, for example) takes effect. With a route it is asked for the two addends of its output, and hooks on it see
    the pair; otherwise it returns what it always did.

    Parameters
    ----------
    decoder_layer : nn.Module
        Pre-norm attention and pre-norm MLP, as in Llama, Qwen2 and Mistral. `unwrap` gives it back.
    bias : bool
        Whether the router has a bias.
    std : float
        Standard deviation of the router's first weights.

    Raises
    ------
    ValueError
        If `decoder_layer` has other parts, or a forward of its own: in every mixture-of-depths layer one must be called
        that knows the addends.
    """

    #: The name of the method that these layers belong to.
    of_method = "pmod"

    def __init__(self, decoder_layer: nn.Module, bias: bool, std: float) -> None:
        super().__init__()
        parts = {name for name, _ in decoder_layer.named_children()}
        if parts != set(_PARTS):
            raise ValueError(
                f"model: got a {type(decoder_layer).__name__} made of {sorted(parts)}, expected {sorted(_PARTS)}: a "
                "mixture-of-depths layer weights what the MLP adds"
            )
        if not _has_forward_of_its_class(decoder_layer):
            raise ValueError(
                f"model: got a {type(decoder_layer).__name__} whose forward was replaced, or that occurs twice among "
                "the layers, expected a layer of its own with the forward of its class; replace it after attaching"
            )
        norm = decoder_layer.input_layernorm.weight
        if norm.is_meta and "forward" in decoder_layer.input_layernorm.__dict__:
            raise ValueError(
                "model: got one whose weights are offloaded, expected one that is offloaded after attaching"
            )
        self.decoder_layer = decoder_layer
        self.router = ModRouter(norm.shape[0], bias, std, norm.device, norm.dtype)
        # As the layer in whose place it comes: it may have been set to evaluation or to checkpointing already.
        self.train(decoder_layer.training)
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if name in decoder_layer.__dict__:
                setattr(self, name, decoder_layer.__dict__[name])
        # Not a bound method, which would be pickled as the layer's attribute of the function's name.
        decoder_layer.__dict__["forward"] = functools.partial(_forward, decoder_layer)

    def unwrap(self) -> nn.Module:
        """The decoder layer, as it was before. Whoever wrapped its forward since then holds the one of its class."""
        layer = self.decoder_layer
        for name, value in list(layer.__dict__.items()):
            if isinstance(value, functools.partial) and value.func is _forward:
                layer.__dict__[name] = MethodType(type(layer).forward, layer)
        if _has_forward_of_its_class(layer):
            layer.__dict__.pop("forward", None)
        return layer

    def forward(self, hidden_states: Tensor, *args: Any, route: ModRoute | None = None, **kwargs: Any) -> Tensor:
        """``(1, total, hidden)`` to the same shape; with a `ModRoute` ``(total, hidden)``, which is then no view."""
        if route is None:
            return self._tied(self._call_stock(hidden_states, *args, **kwargs), self.router)
        x = hidden_states.squeeze(0)
        logits, weights = self.router(x, route)
        branches = []

        def block(values: Tensor, **kwargs: Any) -> Tensor:
            residual, branch = self._call_stock(values, addends=True, **kwargs)
            branches.append(branch.squeeze(0))
            return residual

        residual, indices = route.run(block, x, logits)
        if not branches:  # nothing goes through
            return self._tied(ops.scatter_scaled(x, x[:0], x[:0], weights, indices), self.decoder_layer)
        return ops.scatter_scaled(x, residual, branches[0], weights, indices)

    def _tied(self, values: Tensor, unused: nn.Module) -> Tensor:
        """In training, makes the parameters of a part that the pass does not use part of its graph."""
        if not (torch.is_grad_enabled() and self.training):
            return values
        return _TakePart.apply(values, *unused.parameters())

    def _call_stock(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Not by the layer's own __call__, which would checkpoint within this layer's checkpoint.
        return nn.Module.__call__(self.decoder_layer, hidden_states, *args, **kwargs)


def _forward(layer: nn.Module, hidden_states: Tensor, *args: Any, addends: bool = False, **kwargs: Any) -> Any:
    """Stands in for a decoder layer's forward.

    With `addends` it returns the residual stream after attention, and what the MLP adds to it.
    """
    if not addends:
        return _without_checkpoint(layer, hidden_states, *args, **kwargs)
    attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)
    residual = hidden_states + attended
    return residual, layer.mlp(layer.post_attention_layernorm(residual))


def _without_checkpoint(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the class. Newer versions of transformers checkpoint in it, which a `ModLayer` does already."""
    if not getattr(layer, "gradient_checkpointing", False):
        return type(layer).forward(layer, *args, **kwargs)
    layer.gradient_checkpointing = False
    try:
        return type(layer).forward(layer, *args, **kwargs)
    finally:
        layer.gradient_checkpointing = True


def _has_forward_of_its_class(layer: nn.Module) -> bool:
    """Also if it was wrapped and unwrapped, which leaves a bound method behind."""
    forward = layer.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(layer).forward


class _TakePart(torch.autograd.Function):
    """Gives parameters that a pass did not need a gradient of zero, which data-parallel training waits for."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def check_finite(named_weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are not finite. Reads them.

    Raises
    ------
    ValueError
    """
    for name, weight in named_weights:
        if isinstance(weight, Tensor) and not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: got weights that are NaN or infinite, expected finite weights")
