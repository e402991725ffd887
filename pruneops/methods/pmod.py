"""p-MoD: layers that only a share of the visual tokens goes through, fewer with depth, chosen by a learned router."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import nn

from pruneops.decoder import DecoderState, Positions, Record
from pruneops.methods.base import PruningMethod
from pruneops.methods.mod_layer import ModDecoderLayer, check_finite
from pruneops.methods.mod_route import ModRoute, Targets, WeightNorm, keep_count

#: The last layer of the depth that the official code assumes, whatever the model's.
_OFFICIAL_LAST_LAYER = 31
_DECAY = re.compile(r"(shiftedcos|shiftedlinear)_decay_(\d+\.\d+)_(\d+\.\d+)")
_PATTERNS: dict[str, Callable[[int], range]] = {
    "deep_all": lambda depth: range(2, depth - 1),
    "deep_all_include_last": lambda depth: range(2, depth),
    "interleave": lambda depth: range(1, depth, 2),
}
_TARGETS = ("vision_all", "vision_hr", "all")
_OFFICIAL_KEYS = {
    "mod_target_layers": "layers",
    "mod_target_token_type": "target",
    "mod_router_factor": "router_factor",
    "mod_weight_norm": "weight_norm",
    "mod_bias_enabled": "router_bias",
    "mod_special_init": "zero_init",
}


@dataclass(frozen=True)
class PMoD(PruningMethod):
    """p-MoD (Zhang et al., "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", arXiv 2412.04449).

    Deeper layers become mixture-of-depths layers. In each, a router (one linear map of the hidden state that enters the
    layer) gives every visual token a weight ``w = scale * act(logit) + shift``. The tokens of a row with the highest
    weights, and all text, go through the layer, attend to each other at their original positions, and leave it as
    ``residual + w * mlp``; the other visual tokens skip it and leave as ``w * token``. Text has weight 1. Nothing is
    dropped from the sequence, but a layer's key/value cache holds only what went through it. All images of a row share
    one pool. Decoding steps, and passes without any target, run the plain layers.

    The method is trainable: `pruneops.attach` puts `ModDecoderLayer` modules in place of decoder layers, with the
    official names of parameters, ``layers.{i}.decoder_layer.*`` and ``layers.{i}.router.router.{weight,bias}``;
    `pruneops.detach` takes them out. Gradients flow through ``w`` for tokens that went through and for those that
    skipped; the selection has none.

    Parameters
    ----------
    layers : str
        Which layers, counted from 0, and what share of the targets goes through them. ``shiftedcos_decay_{max}_{min}``:
        with ``raw(l) = cos(l * pi / D) / 2 + router_factor``, layers of ``raw(l) <= max`` keep ``max(raw(l), min)``;
        ``shiftedlinear_decay_{max}_{min}``: the same with ``raw(l) = 1 / 2 - l / D + router_factor`` (both numbers with
        a decimal point). ``D`` is the model's depth - 1, with `parity` always 31. ``deep_all``: layers 2 to depth - 2,
        ``deep_all_include_last``: 2 to depth - 1, ``interleave``: 1, 3, 5, ...; all of these keep `router_factor`.
    router_factor : float
        In (0, 1], see `layers`.
    weight_norm : str
        ``{act}_{scale}_{shift}``, act one of tanh, sigmoid, softmax (over the targets of a row) and none; plain
        ``{act}``: scale and shift are 1.
    target : str
        Which tokens may skip a layer. ``vision_all``: those of images. ``vision_hr``: those behind the base view of an
        image in several resolutions, newline tokens included. ``all``: every token, text too.
    router_bias : bool
        The routers have a bias.
    zero_init : bool
        New routers start at zero: every weight is `shift` (1) and the first tokens of a row are kept. Otherwise they
        start as the model's other linear maps do, with its ``initializer_range``.
    parity : bool
        Decide as the official code does, for models that were trained with it. Apart from ``D`` this concerns ranking,
        see below.
    base_tokens : int, optional
        For ``vision_hr``: tokens of the base view, with which every image begins. None: taken from the config of a
        model of several resolutions (LLaVA-NeXT: the patches of one tile).

    Notes
    -----
    *Ranking* is by the float32 logit among the targets, ties go to the lowest index. The weights themselves would not
    do: in bfloat16, ``0.2 * tanh + 1`` has 78 different values. With `parity` it is by the weight in the model's dtype
    over the whole row, in which other tokens have the weight of the logit -inf; ties go to the lowest index where the
    official code leaves them to the backend. A target that has sunk to this same weight may then lose its place to a
    text token, which has one already; it skips the layer and the layer runs on fewer tokens than reported. Padding
    never takes a place.

    *Counts* are ``int(n * ratio)`` in float32, as in the official code; 0 is allowed.

    *Where the official code fails or is limited* (batches in ``generate``, left padding with positions, rows that keep
    equally many tokens, text-only rows under softmax, a mixture-of-depths layer 0) this does what the paper means.

    *Continuation* (another turn on the cache): images of the new chunk are routed within the chunk, see the keys that
    each layer holds of earlier turns, and are never revisited. With ``all`` every chunk of more than one token is
    routed; without a cache `generate` then routes what it has generated as well.

    *Layers that nothing goes through* run their router only and cache nothing.

    *Other libraries* may hang hooks and wrappers on the layers and routers of an attached model. In a pruned pass a
    hook on the stock layer sees a pair, the residual stream and what the MLP adds to it; where nothing goes through
    a layer it is not called, so shard whole mixture-of-depths layers, not what is in them. Layers whose forward was
    replaced before are refused, and an attached model cannot be pickled. A stock Hugging Face class saves the routers
    but not the method; the classes in `pruneops.models` save both.

    *NaN*: router weights are checked when they are attached and loaded, logits on the CPU in every pass. On a GPU a
    logit that is NaN ranks last.

    Raises
    ------
    TypeError, ValueError
        For values that break the rules above.
    """

    layers: str = "shiftedcos_decay_0.85_0.15"
    router_factor: float = 0.5
    weight_norm: str = "tanh_0.2_1"
    target: str = "vision_all"
    router_bias: bool = True
    zero_init: bool = True
    parity: bool = False
    base_tokens: int | None = None

    name: ClassVar[str] = "pmod"
    positions: ClassVar[Positions] = Positions.GIVEN
    asks_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in ("layers", "weight_norm", "target"):
            if not isinstance(getattr(self, field), str):
                raise TypeError(f"{field}: got {getattr(self, field)!r}, expected a string")
        for field in ("router_bias", "zero_init", "parity"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field}: got {getattr(self, field)!r}, expected a bool")
        if isinstance(self.router_factor, bool) or not isinstance(self.router_factor, Real):
            raise TypeError(f"router_factor: got {self.router_factor!r}, expected a number in (0, 1]")
        if not 0 < self.router_factor <= 1:
            raise ValueError(f"router_factor: got {self.router_factor}, expected a number in (0, 1]")
        object.__setattr__(self, "router_factor", float(self.router_factor))
        if self.layers not in _PATTERNS:
            _decay_bounds(self.layers)
        WeightNorm.parse(self.weight_norm)
        if self.target not in _TARGETS:
            raise ValueError(f"target: got {self.target!r}, expected one of {', '.join(_TARGETS)}")
        if self.base_tokens is not None and (type(self.base_tokens) is not int or self.base_tokens < 0):
            raise ValueError(f"base_tokens: got {self.base_tokens!r}, expected a whole number of at least 0, or None")

    @classmethod
    def from_official(cls, mapping: Mapping[str, Any]) -> PMoD:
        """The method of an official config, in parity mode.

        Parameters
        ----------
        mapping : mapping
            ``mod_target_layers`` and ``mod_weight_norm``, and if they differ from the official defaults (in brackets)
            ``mod_target_token_type`` ("vision_all"), ``mod_router_factor`` (0.5), ``mod_bias_enabled`` (False) and
            ``mod_special_init`` (False). Other keys are ignored, so a whole config will do.

        Raises
        ------
        TypeError, ValueError
            If the mapping does not describe a p-MoD model.
        """
        for key in ("mod_target_layers", "mod_weight_norm"):
            if mapping.get(key) is None:
                raise ValueError(f"{key}: got None, expected the value of an official p-MoD config")
        fields = {"router_bias": False, "zero_init": False}
        fields |= {field: mapping[key] for key, field in _OFFICIAL_KEYS.items() if mapping.get(key) is not None}
        return cls(**fields, parity=True)

    def to_official(self) -> dict[str, Any]:
        """The official config keys of the method.

        The official code reads them as `from_official` does: it assumes 32 layers and ranks by rounded weights.
        """
        return {key: getattr(self, field) for key, field in _OFFICIAL_KEYS.items()}

    # -- which layers, how many tokens -------------------------------------------------------------------------------

    def keep_ratios(self, num_layers: int) -> dict[int, float]:
        """Share of the targets that goes through each mixture-of-depths layer of a model of `num_layers` layers.

        Layers are counted from 0; those that are not in the result are plain.
        """
        return dict(_keep_ratios(self.layers, self.router_factor, self.parity, num_layers))

    @staticmethod
    def keep_count(num_targets: int, ratio: float) -> int:
        """How many of a row's targets go through a layer: the product in float32, truncated."""
        return keep_count(num_targets, ratio)

    def for_depth(self, num_layers: int) -> PMoD:
        if not self.keep_ratios(num_layers):
            reason = "the model is too shallow for the pattern"
            if self.layers not in _PATTERNS:
                highest = _decay_bounds(self.layers)[1]
                reason = f"the schedule does not sink to {highest} in them"
                if self.parity and num_layers <= _OFFICIAL_LAST_LAYER:
                    reason += (
                        ", because parity=True takes the depth to be 32 as the official code does; pass parity=False, "
                        "which spreads the schedule over the layers that there are"
                    )
            raise ValueError(
                f"layers: got {self.layers!r}, which makes none of the model's {num_layers} layers a mixture-of-depths "
                f"layer, expected at least one: {reason}"
            )
        return self

    def for_model(self, num_layers: int, config: Any) -> PMoD:
        method = self.for_depth(num_layers)
        if self.target != "vision_hr" or self.base_tokens is not None:
            return method
        if not hasattr(config, "image_grid_pinpoints"):
            raise ValueError(
                f"target: got 'vision_hr' for a {type(config).__name__}, expected a model that sees images in several "
                "resolutions, such as LLaVA-NeXT, or base_tokens; of a bare language model, mark the high-resolution "
                "tokens in visual_token_mask and use target='vision_all'"
            )
        vision = config.vision_config
        class_token = vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full"
        return replace(method, base_tokens=(vision.image_size // vision.patch_size) ** 2 + class_token)

    # -- modules -----------------------------------------------------------------------------------------------------

    def prepare(self, text_model: nn.Module) -> None:
        if any(isinstance(layer, ModDecoderLayer) for layer in text_model.layers):
            self.check_modules(text_model)
            return
        config = text_model.config
        std = 0.0 if self.zero_init else config.initializer_range
        made: dict[int, ModDecoderLayer] = {}
        try:
            for i in self.keep_ratios(config.num_hidden_layers):
                made[i] = ModDecoderLayer(text_model.layers[i], self.router_bias, std)
        except ValueError:
            for layer in made.values():
                layer.unwrap()
            raise
        for i, layer in made.items():
            text_model.layers[i] = layer

    def restore(self, text_model: nn.Module) -> None:
        for i, layer in enumerate(text_model.layers):
            if isinstance(layer, ModDecoderLayer):
                text_model.layers[i] = layer.unwrap()

    def check_modules(self, text_model: nn.Module, missing_keys: Iterable[str] = ()) -> None:
        super().check_modules(text_model)
        routers = {i: layer.router for i, layer in enumerate(text_model.layers) if isinstance(layer, ModDecoderLayer)}
        expected = self.keep_ratios(text_model.config.num_hidden_layers)
        if not routers:
            raise ValueError(
                "model: carries no mixture-of-depths layers, which PMoD needs because its routers are trained; use "
                "pruneops.attach(model, method), which puts them in"
            )
        if list(routers) != list(expected):
            raise ValueError(
                f"layers: got {self.layers!r}, which makes layers {list(expected)} mixture-of-depths layers, expected "
                f"{list(routers)}, which the model carries; call pruneops.detach(model) first to start with new routers"
            )
        biases = {getattr(router.router, "bias", None) is not None for router in routers.values()}
        if biases != {self.router_bias}:
            raise ValueError(
                f"router_bias: got {self.router_bias}, expected {not self.router_bias} as in the routers of the model"
            )
        missing = sorted(key for key in missing_keys if ".router.router." in key)
        if missing:
            raise ValueError(
                f"checkpoint: has no weights for {len(missing)} of the routers' parameters, the first of them "
                f"{missing[0]}, although its config says {self}; expected one that was saved with PMoD attached"
            )
        check_finite(
            (f"layers.{i}.router.{name}", weight)
            for i, router in routers.items()
            for name, weight in router.named_parameters()
        )

    # -- a pass ------------------------------------------------------------------------------------------------------

    def before_decoder(self, state: DecoderState) -> None:
        if not state.decoding:
            every = self.target == "all"
            skip = self.base_tokens if self.target == "vision_hr" else 0
            state.notes = Targets.every_token(state.batch) if every else Targets.of_images(state.batch, skip)

    def run_layer(self, i: int, layer: nn.Module, state: DecoderState) -> None:
        ratios = _keep_ratios(self.layers, self.router_factor, self.parity, state.num_layers)
        if i not in ratios or state.notes is None:
            super().run_layer(i, layer, state)
            return
        # The state as it is now: a checkpoint of the layer keeps the route, which must not keep what comes after it.
        norm, stage = WeightNorm.parse(self.weight_norm), list(ratios).index(i)
        route = ModRoute(norm, self.parity, i, stage, ratios[i], state.notes, copy.copy(state))
        values = layer(state.batch.values.unsqueeze(0), route=route)
        if state.trace.record:
            _record(state, route)
        state.batch = state.batch.with_values(values)


def _record(state: DecoderState, route: ModRoute) -> None:
    """Per row the weights of its targets, and which tokens went through."""
    batch, targets = state.batch, state.notes
    through = torch.zeros_like(batch.row_ids, dtype=torch.bool)
    through.index_fill_(0, route.indices[route.indices >= 0].long(), True)
    start = 0
    for b in batch.rows:
        row = slice(start, start + batch.lengths[b])
        scores = route.weights[row] if targets.mask is None else route.weights[row][targets.mask[row]]
        kept = batch.origin[row][through[row]] - batch.entry.cu_seqlens_host[b]
        state.trace.records.append(Record(route.stage, b, route.layer, scores, kept))
        start = row.stop


@functools.lru_cache(maxsize=64)
def _keep_ratios(layers: str, factor: float, parity: bool, num_layers: int) -> dict[int, float]:
    """See `PMoD.keep_ratios`. Callers must not change the result."""
    if layers in _PATTERNS:
        return dict.fromkeys(_PATTERNS[layers](num_layers), factor)
    shape, highest, lowest = _decay_bounds(layers)
    last = _OFFICIAL_LAST_LAYER if parity else max(num_layers - 1, 1)
    ratios = {}
    for i in range(num_layers):
        raw = math.cos(i * math.pi / last) / 2 + factor if shape == "shiftedcos" else 0.5 - i / last + factor
        if raw <= highest:
            ratios[i] = max(raw, lowest)
    return ratios


def _decay_bounds(layers: str) -> tuple[str, float, float]:
    """Shape, highest and lowest ratio of a decaying schedule."""
    match = _DECAY.fullmatch(layers)
    if match is None:
        raise ValueError(
            f"layers: got {layers!r}, expected 'shiftedcos_decay_0.85_0.15' or the like, 'shiftedlinear_decay_...', or "
            f"one of {', '.join(_PATTERNS)}"
        )
    shape, highest, lowest = match[1], float(match[2]), float(match[3])
    if not 0 <= lowest <= highest <= 1 or highest == 0:
        raise ValueError(
            f"layers: got {layers!r}, expected ratios 0 <= min <= max <= 1 and max above 0, the larger one first"
        )
    return shape, highest, lowest
