"""The ragged decoder: runs unmodified Hugging Face decoder layers over packed tokens.

`ragged_forward` stands in for the ``forward`` of a text model (`LlamaModel` and relatives). It packs the padded batch,
calls every decoder layer on ``(1, total, hidden)``, lets the pruning method act before each layer, and puts the result
back into the padded shape. `pruneops_attention` is the attention function that the layers call meanwhile.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPast

from pruneops import ops
from pruneops.cache import Append, ChunkAppender, RaggedCache
from pruneops.ragged import RaggedBatch, pack, pack_one_token

if TYPE_CHECKING:
    from pruneops.methods.base import PruningMethod

ATTENTION_NAME = "pruneops"


@dataclass(frozen=True)
class Record:
    """What a method did to one row at one stage.

    Attributes
    ----------
    stage : int
        0 for the first time the method prunes, 1 for the second, ...
    row : int
        Row of the batch.
    layer : int
        Number of decoder layers that ran before the stage.
    scores : Tensor
        ``(visual tokens before the stage,)`` float32 importance, in token order; empty for a row without images.
    kept_positions : Tensor
        ``(tokens after the stage,)`` int64 surviving tokens of the row, text included, counted in the row's own
        (unpadded)
        tokens before any pruning.
    """

    stage: int
    row: int
    layer: int
    scores: Tensor
    kept_positions: Tensor


@dataclass
class Trace:
    """What one forward pass over a prompt left behind: lengths, times and, on request, records.

    Attributes
    ----------
    record : bool
        Whether to keep records.
    records : list of Record
    dense_lengths : list of int
        Tokens of each row before any pruning.
    layer_lengths : list of list of int
        Per layer the tokens of each row that it ran on.
    """

    record: bool = False
    records: list[Record] = field(default_factory=list)
    dense_lengths: list[int] = field(default_factory=list)
    layer_lengths: list[list[int]] = field(default_factory=list)
    #: What the method adds to the loss of the model in training.
    auxiliary_loss: Tensor | None = None
    _kv_lengths: list[list[int] | Tensor] = field(default_factory=list)
    _marks: list[Any] = field(default_factory=list)

    def restart(self, dense_lengths: list[int]) -> None:
        """Forget the previous forward pass."""
        self.dense_lengths, self.auxiliary_loss = dense_lengths, None
        self.records, self.layer_lengths, self._kv_lengths, self._marks = [], [], [], []

    def mark(self, device: torch.device) -> None:
        """Note the time without stopping the device."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    @property
    def kv_lengths(self) -> list[list[int]]:
        """Per layer the tokens of each row whose keys and values stay. Waits for the device where a method let it
        choose among them."""
        return [n.tolist() if isinstance(n, Tensor) else n for n in self._kv_lengths]

    @property
    def layer_seconds(self) -> list[float]:
        """Seconds of each layer, the pruning before it included. Waits for the device."""
        marks = self._marks
        if marks and not isinstance(marks[0], float):
            marks[-1].synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]


@dataclass(frozen=True)
class AttentionCall:
    """What the attention function needs to know about the packed batch a layer runs on."""

    cu_seqlens: Tensor
    max_seqlen: int
    one_token_a_row: bool
    cache: RaggedCache | None
    append: Append | None
    policy_epsilon: float = 0.0


class Positions(enum.Enum):
    """Which rotary positions the tokens of a pruned model have."""

    #: Those they came with.
    GIVEN = "given"
    #: Counted from 0 in the batch that enters layer 0, and kept; new tokens follow on from there.
    AT_ENTRY = "at entry"
    #: Counted from 0 again after every drop; new tokens follow on from what each layer holds.
    EACH_DROP = "each drop"


class DecoderState:
    """The state that a pruning method sees and changes between layers.

    Attributes
    ----------
    batch : RaggedBatch
        The packed tokens; a method replaces it by a shorter one.
    rotary : callable
        ``rotary(position_ids) -> (cos, sin)``, each ``(1, total, head_dim)``, for ``(total,)`` int64 positions.
    trace : Trace
        Where to record.
    decoding : bool
        Every row gets one token behind a cache: nothing to prune.
    cache : RaggedCache or None
        Where layers store their keys and values, each those of the batch it was called with.
    num_layers : int
        Depth of the model.
    text_model : nn.Module
        The model whose layers run; a trainable method finds its modules there.
    notes : object
        What the method wants to remember until the end of the pass.
    """

    def __init__(
        self,
        batch: RaggedBatch,
        rotary: Callable[[Tensor], tuple[Tensor, Tensor]],
        trace: Trace,
        decoding: bool,
        cache: RaggedCache | None,
        num_layers: int,
        text_model: nn.Module,
    ) -> None:
        self.batch = batch
        self.rotary = _RotaryMemo(rotary)
        self.trace = trace
        self.decoding = decoding
        self.cache = cache
        self.num_layers = num_layers
        self.text_model = text_model
        self.notes: Any = None
        self._appender: ChunkAppender | None = None
        # Those of this pass: checkpointing may run a layer again when the trace is of another one.
        self._layer_lengths, self._kv_lengths = trace.layer_lengths, trace._kv_lengths
        self._stored: Tensor | None = None
        self._policy: Tensor | None = None
        self._policy_epsilon = 0.0

    def settle_positions(self, positions: Positions, given: bool) -> None:
        """Fix the positions of the batch, once it is the one that enters layer 0.

        Parameters
        ----------
        positions : Positions
            The method's rule.
        given : bool
            The batch came with positions.
        """
        cache, batch, next_position = self.cache, self.batch, None
        if positions is not Positions.EACH_DROP:
            earlier = None if cache is None else cache.layers[0].state
            if earlier is None:
                start = torch.zeros(batch.batch_size, dtype=torch.int64, device=batch.values.device)
            else:
                start = earlier.next_position
            if not given or positions is Positions.AT_ENTRY:
                follow = start if batch.one_token_a_row else start.index_select(0, batch.row_ids) + batch.offsets
                self.batch = batch = batch.with_position_ids(follow)
            if batch.one_token_a_row:  # every decoding step: the fewest operations
                next_position = batch.position_ids + 1
            else:
                next_position = batch.position_after_last(batch.position_ids, start)
        if cache is not None:
            self._appender = ChunkAppender(cache, next_position)

    def keep_in_cache(self, keep: Tensor) -> None:
        """From here on, layers see all tokens of the batch, and their caches keep some of them only.

        Parameters
        ----------
        keep : Tensor
            ``(total,)`` bool, on the device; nothing reads it back before `Trace.kv_lengths` is asked for.
        """
        if self._appender is not None:
            self._appender.keep = keep
        if not self.decoding:
            counts = torch.zeros_like(self.batch.cu_seqlens[1:])
            self._stored = counts.index_add_(0, self.batch.row_ids, keep.to(counts.dtype))

    def mask_keys(self, policy: Tensor, epsilon: float) -> None:
        """From here on, the attention among the tokens of the batch is `pruneops.ops.policy_attention`.

        Parameters
        ----------
        policy : Tensor
            ``(total,)`` float32 weight of each token as a key for the others; may want a gradient.
        epsilon : float
            That of the op.
        """
        self._policy, self._policy_epsilon = policy, epsilon

    def call_layer(self, i: int, layer: Callable[..., Tensor], batch: RaggedBatch) -> RaggedBatch:
        """Call decoder layer `i`, or a part of it, on packed tokens; their keys and values go into its cache.

        Parameters
        ----------
        layer : callable
            Takes what a Hugging Face decoder layer takes.
        batch : RaggedBatch
            What to run on: ``state.batch`` or a part of it.

        Returns
        -------
        RaggedBatch
            The same tokens with the values that `layer` returned and the positions that it saw. Without tokens there is
            nothing to call it on, and it is not called.
        """
        append = None
        if self._appender is not None:
            append = self._appender.plan(i, batch)
            batch = batch.with_position_ids(append.position_ids)
        if not self.decoding and len(self._layer_lengths) == i:  # not when checkpointing runs the layer again
            self._layer_lengths.append(batch.lengths)
            self._kv_lengths.append(batch.lengths if self._stored is None else self._stored)
        if not batch.values.shape[0]:
            if append is not None:
                self.cache.layers[i].state = append.after
            return batch
        call = AttentionCall(
            batch.cu_seqlens, batch.max_seqlen, batch.one_token_a_row, self.cache, append, self._policy_epsilon
        )
        # The policy goes by place: reentrant checkpoints give gradients to such arguments only.
        policy = () if self._policy is None else (self._policy,)
        mask = {} if policy else {"attention_mask": None}
        values = layer(
            batch.values.unsqueeze(0),
            *policy,
            **mask,
            position_ids=batch.position_ids.unsqueeze(0),
            position_embeddings=self.rotary(batch.position_ids),
            ragged=call,
        )
        return batch.with_values(values.squeeze(0))

    def drop_earlier(self, num_layers: int, before: RaggedBatch) -> None:
        """Take from the caches of the first layers what is no longer in the batch.

        Parameters
        ----------
        num_layers : int
            Layers 0 to ``num_layers - 1`` are cut.
        before : RaggedBatch
            What they ran on.
        """
        self._kv_lengths[:num_layers] = [self.batch.lengths] * num_layers
        if self.cache is not None:
            self.cache.keep_of_chunk(num_layers, before, self.batch)


def pruneops_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ragged: AttentionCall | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed tokens, as transformers' ``AttentionInterface`` calls it.

    Parameters
    ----------
    query : Tensor
        ``(1, heads, total, head_dim)``.
    key, value : Tensor
        ``(1, kv_heads, total, head_dim)``.
    attention_mask : Tensor or None
        ``(total,)`` policy over the keys, see `DecoderState.mask_keys`.
    ragged : AttentionCall
        Borders of the rows and the cache; only the ragged decoder passes it.

    Returns
    -------
    (Tensor, None)
        ``(1, total, heads, head_dim)`` and no attention weights.
    """
    if ragged is None:
        raise ValueError(
            f"attn_implementation={ATTENTION_NAME!r} works inside the ragged decoder only; enter "
            "pruneops.prune(model, ...) instead of setting it by hand"
        )
    if dropout:
        raise ValueError(f"attention_dropout: got {dropout}, expected 0; the ragged attention kernels have no dropout")
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    if torch.is_autocast_enabled(query.device.type):
        # The rotary embedding leaves queries and keys in float32, the values are in the autocast dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    append = ragged.append
    longest = ragged.max_seqlen if append is None else append.after.bound
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(
            f"sliding_window: the model attends {sliding_window} tokens back and the batch is {longest} tokens long, "
            "expected no more than the window; sliding-window attention over pruned tokens is not defined"
        )
    if append is not None:
        layer = ragged.cache.layers[module.layer_idx]
        layer.write(key, value, append.destination, append.after, ragged.cu_seqlens.shape[0] - 1)
    if append is None or append.fresh:
        cu_seqlens, max_seqlen = ragged.cu_seqlens, ragged.max_seqlen
        if attention_mask is not None:
            # Mixed-precision wrappers cast it on its way through the layer.
            policy = attention_mask.to(torch.promote_types(query.dtype, torch.float32))
            epsilon = ragged.policy_epsilon
            out = ops.policy_attention(
                query, key, value, policy, cu_seqlens, max_seqlen, softmax_scale=scaling, epsilon=epsilon
            )
        else:
            out = ops.varlen_attention(
                query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scaling
            )
    else:
        with torch.no_grad():
            used = append.after.seqused_k
            if ragged.one_token_a_row:
                out = ops.decode_attention(query, layer.keys, layer.values, used, softmax_scale=scaling)
            else:
                slots = {"seqused_k": used, "softmax_scale": scaling}
                limits = ragged.max_seqlen, append.after.bound
                out = ops.varlen_attention(query, layer.keys, layer.values, ragged.cu_seqlens, None, *limits, **slots)
        if torch.is_grad_enabled() and query.requires_grad:
            out = _NoGradientThroughCache.apply(out, query)
    if append is not None:
        layer.settle(key, value, append)
    return out.unsqueeze(0), None


class _NoGradientThroughCache(torch.autograd.Function):
    """Cached keys and values carry no gradient: a backward pass through them must fail, not be quietly wrong."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "past_key_values: a pass on a filled cache has no gradient, because the cache holds detached keys and "
            "values; run the whole sequence with use_cache=False to train"
        )


AttentionInterface.register(ATTENTION_NAME, pruneops_attention)


def ragged_forward(
    text_model: nn.Module,
    method: PruningMethod,
    trace: Trace,
    *,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    visual_token_mask: Tensor | None,
    num_frames: Sequence[int] | None,
    labels: Tensor | None,
    past_key_values: Any,
    use_cache: bool,
    output_hidden_states: bool,
    prompt_length: int | None,
    question_starts: Tensor | None,
) -> BaseModelOutputWithPast:
    """Run the decoder over a padded batch, pruned by `method`.

    Shapes are those of a Hugging Face text model; `visual_token_mask`, `labels` and `question_starts` are ``(batch,
    length)`` for the columns of `inputs_embeds`, `num_frames` has an entry for every image or video among them. The
    `labels` are masked in place where a pruned row has no token left to predict them from.
    """
    batch_size, columns = inputs_embeds.shape[:2]
    cache = (
        RaggedCache.adopt(past_key_values, len(text_model.layers)) if use_cache or past_key_values is not None else None
    )
    continues = cache is not None and cache.get_seq_length() > 0
    if continues and cache.batch_size != batch_size:
        raise ValueError(f"past_key_values: holds {cache.batch_size} rows, expected {batch_size} as in the input")
    decoding = continues and columns == 1
    if decoding and (inputs_embeds.device.type != "cpu" or attention_mask is None or bool(attention_mask.all())):
        # One new token in every row: nothing to read back. A mask on a device is taken to be 1 for the new tokens.
        batch = pack_one_token(inputs_embeds, position_ids)
    else:
        batch = pack(
            inputs_embeds,
            attention_mask,
            position_ids,
            visual_token_mask,
            labels,
            prompt_length,
            num_frames,
            question_starts,
        )
    if not decoding:
        trace.restart(batch.lengths)
        trace.mark(inputs_embeds.device)
    state = DecoderState(
        batch=batch,
        rotary=lambda positions: text_model.rotary_emb(inputs_embeds, positions.unsqueeze(0)),
        trace=trace,
        decoding=decoding,
        cache=cache,
        num_layers=text_model.config.num_hidden_layers,
        text_model=text_model,
    )
    method.before_decoder(state)
    state.settle_positions(method.positions, position_ids is not None)
    hidden_states: list[Tensor] = []
    for i, layer in enumerate(text_model.layers[: text_model.config.num_hidden_layers]):
        method.before_layer(i, layer, state)
        if output_hidden_states:
            hidden_states.append(state.batch.unpack())
        method.run_layer(i, layer, state)
        if not decoding:
            trace.mark(inputs_embeds.device)
    state.batch = state.batch.with_values(text_model.norm(state.batch.values))
    if cache is not None:
        cache.advance(columns)
    if labels is not None and state.batch.entry.bridges[0].numel():
        supervised = state.batch.entry.bridges[2]
        flat = labels.view(-1)
        flat[supervised] = torch.where(state.batch.has_predecessor(), flat[supervised], -100)
    last_hidden_state = state.batch.unpack()
    if output_hidden_states:
        hidden_states.append(last_hidden_state)
    return BaseModelOutputWithPast(
        last_hidden_state=last_hidden_state,
        past_key_values=cache,
        hidden_states=tuple(hidden_states) if output_hidden_states else None,
    )


class _RotaryMemo:
    """Computes cos and sin once for neighbouring layers that share their positions."""

    def __init__(self, rotary: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self._rotary = rotary
        self._positions: Tensor | None = None
        self._cos_sin: tuple[Tensor, Tensor] | None = None

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if position_ids is not self._positions:
            self._positions, self._cos_sin = position_ids, self._rotary(position_ids)
        return self._cos_sin
