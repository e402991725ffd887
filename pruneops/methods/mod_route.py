"""Who goes through a mixture-of-depths layer, and with what weight."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruneops import ops
from pruneops.decoder import DecoderState
from pruneops.ragged import RaggedBatch, to_device

_NORM = re.compile(r"(tanh|sigmoid|softmax|none)(?:_(\d+(?:\.\d+)?)_(-?\d+(?:\.\d+)?))?")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda logits: logits}


@dataclass(frozen=True)
class WeightNorm:
    """The weight of a logit: ``scale * activation(logit) + shift``."""

    activation: str
    scale: float
    shift: float

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> WeightNorm:
        """From ``{activation}_{scale}_{shift}``, or ``{activation}``, with scale and shift 1.

        Raises
        ------
        ValueError
        """
        match = _NORM.fullmatch(text)
        if match is None:
            raise ValueError(
                f"weight_norm: got {text!r}, expected '{{act}}' or '{{act}}_{{scale}}_{{shift}}' with act one of tanh, "
                "sigmoid, softmax and none, such as 'tanh_0.2_1'"
            )
        activation, scale, shift = match.groups(default="1")
        return cls(activation, float(scale), float(shift))

    def weights(self, logits: Tensor, batch: RaggedBatch) -> Tensor:
        """``(total,)`` weights in the dtype of the logits, also of the -inf of tokens that are no targets.

        With softmax, those of a row without targets are NaN.
        """
        if self.activation == "softmax":
            activated = _softmax_of_rows(logits, batch)
        else:
            activated = _ACTIVATIONS[self.activation](logits)
        return self.scale * activated + self.shift


@dataclass(frozen=True)
class Targets:
    """The tokens that may skip layers.

    Attributes
    ----------
    mask, others : Tensor or None
        ``(total,)`` bool: the targets, and all other tokens. None: every token is a target.
    counts, other_counts : list of int
        How many of them each row has.
    """

    mask: Tensor | None
    others: Tensor | None
    counts: list[int]
    other_counts: list[int]

    @classmethod
    def every_token(cls, batch: RaggedBatch) -> Targets | None:
        """All tokens; None if there are none."""
        return cls(None, None, batch.lengths, [0] * batch.batch_size) if any(batch.lengths) else None

    @classmethod
    def of_images(cls, batch: RaggedBatch, skip: int) -> Targets | None:
        """The tokens of images, without the first `skip` of each; None if there are none."""
        counts = [sum(max(span.visual - skip, 0) for span in row) for row in batch.spans]
        if not any(counts):
            return None
        mask = _image_mask(batch, skip)
        return cls(mask, ~mask, counts, [n - count for n, count in zip(batch.lengths, counts, strict=True)])


class ModRoute:
    """One pass through one `ModDecoderLayer`.

    Parameters
    ----------
    norm : WeightNorm
    parity : bool
        Rank as the official code does, see `PMoD`.
    layer, stage : int
        Number of the layer, and of those layers that tokens may skip.
    ratio : float
        Share of the targets that goes through.
    targets : Targets
        Of the state's batch.
    state : DecoderState
        The state before the layer; the route changes its cache and its trace only.

    Attributes
    ----------
    weights, indices : Tensor or None
        If the pass is recorded: ``(total,)`` float32 weights, and ``(tokens,)`` int32, the tokens that went through.
    """

    def __init__(
        self,
        norm: WeightNorm,
        parity: bool,
        layer: int,
        stage: int,
        ratio: float,
        targets: Targets,
        state: DecoderState,
    ) -> None:
        self.layer, self.stage = layer, stage
        self.weights: Tensor | None = None
        self.indices: Tensor | None = None
        self._norm, self._parity, self._targets, self._state = norm, parity, targets, state
        self._keep = [keep_count(count, ratio) for count in targets.counts]

    def weigh(self, linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, without a gradient, and weights of the tokens ``x`` ``(total, hidden)``: ``(total,)`` float32 each.

        Raises
        ------
        ValueError
            If a logit is NaN; on the CPU only, where looking costs nothing.
        """
        norm, mask = self._norm, self._targets.mask
        fused = _may_be_fused(linear, x)
        if fused and norm.activation != "softmax":
            logits, weights = ops.router_weights(
                x,
                linear.weight[0],
                linear.bias,
                target=mask,
                activation=norm.activation,
                scale=norm.scale,
                shift=norm.shift,
            )
        else:
            if fused:
                _, logits = ops.router_weights(x, linear.weight[0], linear.bias, activation="none")
            else:
                logits = linear(x.to(getattr(linear, "weight", x).dtype)).squeeze(-1).float()
            logits = logits if mask is None else torch.where(mask, logits, -math.inf)
            weights = norm.weights(logits, self._state.batch)
            weights = weights if mask is None else torch.where(mask, weights, 1.0)
        logits = logits.detach()
        if logits.device.type == "cpu" and not torch.compiler.is_compiling() and bool(logits.isnan().any()):
            raise ValueError(
                f"hidden_states: the router of layer {self.layer} got or gave NaN, expected finite hidden states and "
                "router weights"
            )
        if self._state.trace.record:
            self.weights = weights.detach()
        return logits, weights

    def run(self, block: Callable[..., Tensor], x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Call `block` as a decoder layer on the tokens that go through.

        Returns
        -------
        (Tensor, Tensor)
            Its output, ``(tokens, hidden)``, and ``(tokens,)`` int32: which token each row of it is, -1 for none.
            `block` is not called if there are no tokens.
        """
        state, lost = self._state, None
        batch = state.batch.with_values(x)
        if self._parity:
            batch, indices, lost = self._chosen_officially(batch, logits)
        else:
            batch, indices = batch.best_of_rows(logits, self._keep, self._targets.others, self._targets.other_counts)
        if state.trace.record:
            self.indices = indices
        out = state.call_layer(self.layer, block, batch)
        if lost is not None and state.cache is not None:
            state.cache.drop_newest(self.layer, lost)
        return out.values, indices

    def _chosen_officially(self, batch: RaggedBatch, logits: Tensor) -> tuple[RaggedBatch, Tensor, Tensor | None]:
        """The choice of the official code.

        Returns the tokens to run on, their indices, and ``(batch,)`` int32 how many last tokens of each row are not
        really chosen: their places went to tokens which have one already. Nothing may look at them, and behind the
        others nothing does; without them the number of tokens would be known on the device only.
        """
        weights = self._norm.weights(logits.to(batch.values.dtype), batch)
        others, other_counts = self._targets.others, self._targets.other_counts
        if others is None:
            return *batch.best_of_rows(weights, self._keep, None, other_counts), None
        lengths = [k + n for k, n in zip(self._keep, other_counts, strict=True)]
        indices, cu_seqlens = ops.segment_topk(
            weights, batch.cu_seqlens, self._keep, protect=others, protected_counts=other_counts
        )
        best, _ = ops.segment_topk(weights, batch.cu_seqlens, self._keep)
        chosen = others.index_fill(0, best.long(), True).index_select(0, indices)
        rows = batch.row_ids.index_select(0, indices)
        order = torch.argsort(2 * rows + ~chosen, stable=True)
        indices, chosen = indices.index_select(0, order), chosen.index_select(0, order)
        lost = torch.zeros_like(cu_seqlens[1:]).index_add_(0, rows.index_select(0, order), (~chosen).to(torch.int32))
        return batch.taking(indices, cu_seqlens, lengths), torch.where(chosen, indices, -1), lost


@functools.lru_cache(maxsize=4096)
def keep_count(num_targets: int, ratio: float) -> int:
    """The product in float32, truncated, as the official code computes it."""
    return int(torch.tensor(num_targets, dtype=torch.float32) * torch.tensor(ratio, dtype=torch.float32))


def _may_be_fused(linear: nn.Module, x: Tensor) -> bool:
    """Whether its weights are all there is to it: no adapter, no hook, no forward of its own, no dtype of its own."""
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and not any(getattr(linear, hooks) for hooks in _HOOKS)
        and (linear.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))
    )


def _softmax_of_rows(logits: Tensor, batch: RaggedBatch) -> Tensor:
    """``(total,)`` softmax of packed ``(total,)`` logits within each row; NaN in a row of nothing but -inf."""
    place = batch.row_ids * batch.max_seqlen + batch.offsets
    padded = logits.new_full((batch.batch_size * batch.max_seqlen,), -math.inf).index_copy(0, place, logits)
    return functional.softmax(padded.view(batch.batch_size, -1), dim=1).view(-1).index_select(0, place)


def _image_mask(batch: RaggedBatch, skip: int) -> Tensor:
    """``(total,)`` bool, see `Targets.of_images`."""
    visual = batch.visual
    if not skip:
        return visual
    spans = [span for row in batch.spans for span in row]
    lengths = torch.tensor([span.length for span in spans])
    numbers = torch.tensor([span.visual for span in spans])
    first = to_device((numbers.cumsum(0) - numbers + skip).repeat_interleave(lengths), batch.values.device)
    return visual & (visual.cumsum(0) > first)
