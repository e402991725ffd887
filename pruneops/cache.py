"""A key/value cache whose layers, and whose rows within a layer, each have their own length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from pruneops import ops
from pruneops.ragged import RaggedBatch

_BLOCK = 64  # slots are handed out in blocks of this many tokens
_LEAD = 16  # lengths are read back this many tokens before they are needed


@dataclass
class RowState:
    """How full the rows are; shared by neighbouring layers, which always hold the same tokens.

    Attributes
    ----------
    seqused_k : Tensor
        ``(batch,)`` int32 on the device: used slots per row.
    next_position : Tensor
        ``(batch,)`` int64 on the device: rotary position of the row's next token at these layers.
    bound : int
        Upper bound of `seqused_k`, known on the host.
    capacity : int
        Slots per row.
    reading : LengthReading or None
        A look at the lengths that is under way, where tokens are not always kept.
    """

    seqused_k: Tensor
    next_position: Tensor
    bound: int
    capacity: int
    reading: LengthReading | None = None

    def grown(self, tokens: int) -> tuple[int, int]:
        """`bound` and `capacity` once every row has got up to `tokens` more."""
        bound, capacity = self.bound + tokens, self.capacity
        if bound >= capacity:
            # Half as much again: the copies that growth costs stay O(1) per token.
            capacity = _round_up(max(bound + 1, capacity + capacity // 2))
        return bound, capacity

    def rows(self, index: Tensor) -> RowState:
        return RowState(
            self.seqused_k.index_select(0, index),
            self.next_position.index_select(0, index),
            self.bound,
            self.capacity,
            self.reading,
        )

    def measured(self, tokens: int) -> RowState:
        """The state before up to `tokens` more come, with a lower `bound` if its slots would not do and it can be had.

        Lengths are read back some tokens before the bound reaches the capacity, so that the copy has arrived when it
        is needed; nothing waits for it.
        """
        state = self
        if state.reading is not None and state.bound + tokens >= state.capacity:
            longest = state.reading.arrived()
            if longest is not None:
                state = replace(state, bound=longest + state.bound - state.reading.bound, reading=None)
        if state.reading is None and state.bound + tokens + _LEAD >= state.capacity:
            state = replace(state, reading=LengthReading(state.seqused_k, state.bound))
        return state


class LengthReading:
    """A copy of the lengths on its way to the host.

    Parameters
    ----------
    seqused_k : Tensor
        ``(batch,)`` int32 lengths.
    bound : int
        Their upper bound, as it was known when the copy was started.
    """

    def __init__(self, seqused_k: Tensor, bound: int) -> None:
        self.bound = bound
        self._event: torch.cuda.Event | None = None
        if seqused_k.device.type == "cuda":
            self._host = torch.empty(seqused_k.shape, dtype=seqused_k.dtype, pin_memory=True)
            self._host.copy_(seqused_k, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = seqused_k

    def arrived(self) -> int | None:
        """The longest length, or None if the copy is still under way."""
        if self._event is not None and not self._event.query():
            return None
        return int(self._host.max()) if self._host.numel() else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LengthReading:
        return self  # never changes


class RaggedCacheLayer:
    """Keys and values of one layer: slots ``(batch, capacity, kv_heads, head_dim)``."""

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.state: RowState | None = None

    @property
    def seqused_k(self) -> Tensor | None:
        """``(batch,)`` int32: used slots per row, or None before the first token."""
        return None if self.state is None else self.state.seqused_k

    def write(self, keys: Tensor, values: Tensor, destination: Tensor, state: RowState, batch: int) -> None:
        """Store packed keys and values.

        Parameters
        ----------
        keys, values : Tensor
            ``(total, kv_heads, head_dim)``.
        destination : Tensor
            ``(total,)`` int64 flat slots ``row * capacity + slot``.
        state : RowState
            The lengths once these tokens are in.
        batch : int
            Number of rows.
        """
        with torch.no_grad():
            self.keys = self._store(self.keys, keys.detach(), destination, state.capacity, batch)
            self.values = self._store(self.values, values.detach(), destination, state.capacity, batch)
        self.state = state

    @staticmethod
    def _store(slots: Tensor | None, new: Tensor, destination: Tensor, capacity: int, batch: int) -> Tensor:
        if slots is None or slots.shape[1] < capacity:
            # Zeros, not empty: slots past a row's length are never read, but a NaN there would poison a masked product.
            grown = new.new_zeros(batch, capacity, *new.shape[1:])
            if slots is not None:
                grown[:, : slots.shape[1]] = slots
            slots = grown
        elif slots.is_inference() and not torch.is_inference_mode_enabled():
            slots = slots.clone()  # an earlier turn ran in inference mode; its tensors may not be written outside
        slots.view(batch * slots.shape[1], *new.shape[1:]).index_copy_(0, destination, new.to(slots.dtype))
        return slots

    def settle(self, keys: Tensor, values: Tensor, append: Append) -> None:
        """Forget the tokens that `append` does not keep, once the layer has attended to all of those written."""
        if append.kept is not None:
            if append.packed_slots is not None:
                batch = append.kept.seqused_k.shape[0]
                with torch.no_grad():
                    self.keys = self._store(self.keys, keys.detach(), append.packed_slots, append.kept.capacity, batch)
                    self.values = self._store(
                        self.values, values.detach(), append.packed_slots, append.kept.capacity, batch
                    )
            self.state = append.kept

    def select(self, index: Tensor, state: RowState) -> None:
        if self.keys is not None:
            self.keys = self.keys.index_select(0, index)
            self.values = self.values.index_select(0, index)
        self.state = state

    def move(self, source: Tensor, destination: Tensor, state: RowState) -> None:
        """Keep some slots, in new places; the memory of the others is given back.

        Parameters
        ----------
        source, destination : Tensor
            ``(n,)`` int32 flat slots ``row * capacity + slot`` of the old and of the new capacity.
        state : RowState
            The lengths and the capacity afterwards.
        """
        if self.keys is None:  # no row has had a token
            self.state = state
            return
        batch = self.keys.shape[0]
        with torch.no_grad():
            slots = [t.view(-1, *t.shape[2:]) for t in (self.keys, self.values)]
            moved = ops.scatter_rows(ops.gather_rows(slots, source), destination, batch * state.capacity)
        self.keys, self.values = (t.view(batch, state.capacity, *t.shape[1:]) for t in moved)
        self.state = state

    def reset(self) -> None:
        self.keys = self.values = self.state = None


class RaggedCache(Cache):
    """Cache of a pruned model: per-layer, per-row lengths beside the one logical length that `generate()` counts.

    `generate()` may carry it through greedy search, sampling and beam search, and it can be handed back for another
    turn (``past_key_values=cache``). It cannot be cropped, so assisted decoding is refused.
    """

    layers: list[RaggedCacheLayer]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[RaggedCacheLayer() for _ in range(num_layers)])
        self._logical_length = 0

    @classmethod
    def adopt(cls, cache: Any, num_layers: int) -> RaggedCache:
        """The cache to continue with, given what the caller of the model passed.

        An empty `DynamicCache` is turned into a `RaggedCache` in place: whoever created it (`generate()`, or a user who
        wants to continue on it later) keeps a reference and must find the tokens there.
        """
        if cache is None:
            return cls(num_layers)
        if isinstance(cache, cls):
            if len(cache.layers) != num_layers:
                raise ValueError(
                    f"past_key_values: got a RaggedCache of {len(cache.layers)} layers, expected one of {num_layers}, "
                    "the "
                    "depth of this model"
                )
            return cache
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            raise ValueError(
                f"past_key_values: got a {type(cache).__name__}, expected a pruneops RaggedCache or an empty "
                "DynamicCache; static, quantized and offloaded caches give every row and layer the same length, "
                "pruning does not"
            )
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values: got a DynamicCache with {cache.get_seq_length()} tokens, expected an empty one or a "
                "RaggedCache; tokens that were cached without pruning cannot be continued with it"
            )
        user_defined = getattr(cache, "_is_user_defined", False)
        cache.__class__ = cls
        cache.__init__(num_layers)
        cache._is_user_defined = user_defined
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: columns of the padded batch fed so far, pruned ones included; the same for every layer."""
        return self._logical_length

    def advance(self, columns: int) -> None:
        """Count `columns` more columns of the padded batch."""
        self._logical_length += columns

    def keep_of_chunk(self, num_layers: int, before: RaggedBatch, after: RaggedBatch) -> None:
        """Drop tokens of the latest chunk from the first layers, which have stored all of it.

        Parameters
        ----------
        num_layers : int
            Layers 0 to ``num_layers - 1`` are cut.
        before, after : RaggedBatch
            The chunk as these layers stored it, and what stays of it, in the same order.
        """
        new, old = after.cu_seqlens.diff(), before.cu_seqlens.diff()
        # Where each token that stays was in its row.
        place = torch.empty_like(before.entry.source)
        place.index_copy_(0, before.origin, before.offsets)
        was = place.index_select(0, after.origin)
        moves: dict[int, tuple[Tensor, Tensor, RowState]] = {}
        for layer in self.layers[:num_layers]:
            state = layer.state
            if id(state) not in moves:
                start = state.seqused_k - old
                earlier_bound = state.bound - before.max_seqlen
                bound = earlier_bound + after.max_seqlen
                shorter = RowState(start + new, state.next_position, bound, _round_up(bound + 1))
                earlier = torch.arange(earlier_bound, device=start.device).expand(start.shape[0], -1)
                first = start.index_select(0, after.row_ids)
                source, destination = (
                    torch.cat([_slots(earlier, start, capacity), after.row_ids * capacity + first + offsets])
                    for capacity, offsets in ((state.capacity, was), (shorter.capacity, after.offsets))
                )
                moves[id(state)] = source.to(torch.int32), destination.to(torch.int32), shorter
            layer.move(*moves[id(state)])

    def drop_newest(self, layer_idx: int, counts: Tensor) -> None:
        """Take the newest tokens of every row from a layer: ``counts`` ``(batch,)`` int32, on the device."""
        layer = self.layers[layer_idx]
        layer.state = replace(layer.state, seqused_k=layer.state.seqused_k - counts)

    def lengths(self, layer_idx: int) -> list[int]:
        """Tokens that each row really holds at a layer. Reads them from the device."""
        state = self.layers[layer_idx].state
        return [] if state is None else state.seqused_k.tolist()

    def next_positions(self, layer_idx: int) -> list[int]:
        """Rotary position of each row's next token at a layer. Reads them from the device."""
        state = self.layers[layer_idx].state
        return [] if state is None else state.next_position.tolist()

    def nbytes(self, used: bool = True) -> int:
        """Bytes of keys and values: of the tokens held (`used`, reads the lengths), or of all slots allocated."""
        total = 0
        for i, layer in enumerate(self.layers):
            if layer.keys is not None:
                slot = layer.keys[0, 0].numel() * layer.keys.element_size()
                slots = sum(self.lengths(i)) if used else layer.keys.shape[0] * layer.keys.shape[1]
                total += 2 * slot * slots
        return total

    @property
    def batch_size(self) -> int:
        state = self.layers[0].state
        return -1 if state is None else state.seqused_k.shape[0]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.layers[0].state is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows, lengths and positions included (beam search)."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        state = self.layers[0].state
        if state is not None:
            rows = torch.arange(state.seqused_k.shape[0], device=state.seqused_k.device)
            self._select(rows.repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        states: dict[int, RowState] = {}
        for layer in self.layers:
            if layer.state is not None:
                index = index.to(layer.state.seqused_k.device)
                if id(layer.state) not in states:
                    states[id(layer.state)] = layer.state.rows(index)
                layer.select(index, states[id(layer.state)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, expected 0; a pruned cache cannot be cropped, because its "
                "layers hold different tokens (this rules out assisted and prompt-lookup decoding)"
            )

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self._logical_length = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise self._not_pruned()

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        raise self._not_pruned()

    @staticmethod
    def _not_pruned() -> ValueError:
        return ValueError(
            "past_key_values: a RaggedCache is written by the ragged decoder only; it was handed to a model that is "
            "not being pruned. Enter pruneops.prune(model, ...) first, or start this model with a cache of its own"
        )


@dataclass(frozen=True)
class Append:
    """Where the tokens of one packed batch go in the cache layers that share a `RowState`.

    Attributes
    ----------
    destination : Tensor
        ``(total,)`` int64 flat slots.
    after : RowState
        The lengths once the tokens are in.
    fresh : bool
        The rows were empty: the chunk's own keys are all there is.
    position_ids : Tensor
        ``(total,)`` int64 rotary positions of the tokens at these layers.
    kept : RowState or None
        The lengths after attention, if not all of the tokens stay.
    packed_slots : Tensor or None
        ``(total,)`` int64 flat slots that put the tokens that stay before the others; None: they are there already.
    """

    destination: Tensor
    after: RowState
    fresh: bool
    position_ids: Tensor
    kept: RowState | None = None
    packed_slots: Tensor | None = None


class ChunkAppender:
    """Plans, for one forward pass, the appends of its layers; layers that agree share one plan and one `RowState`.

    Parameters
    ----------
    cache : RaggedCache
    next_position : Tensor or None
        ``(batch,)`` int64 positions that follow on the batch, whose own positions are final. None: at each layer the
        tokens of a further chunk follow on from the layer's next position.
    """

    def __init__(self, cache: RaggedCache, next_position: Tensor | None = None) -> None:
        self.cache = cache
        self.next_position = next_position
        #: ``(total,)`` bool: which tokens of the batch the layers that are planned from now on keep. None: all.
        self.keep: Tensor | None = None
        self._plans: dict[tuple[int, int, int], Append] = {}
        self._pinned: list[Any] = []  # keeps the objects alive whose ids are keys

    def plan(self, layer_idx: int, batch: RaggedBatch) -> Append:
        state = self.cache.layers[layer_idx].state
        key = (id(state), id(batch.origin), id(self.keep))
        if key not in self._plans:
            self._pinned += [state, batch.origin, self.keep]
            if state is not None and batch.one_token_a_row:
                self._plans[key] = self._one_token(state, batch)
            else:
                self._plans[key] = self._make(state, batch)
        return self._plans[key]

    def _one_token(self, state: RowState, batch: RaggedBatch) -> Append:
        """`_make` for a decoding step, where it runs for every token: the fewest operations."""
        if self.keep is not None:
            state = state.measured(1)
        bound, capacity = state.grown(1)
        if self.next_position is None:
            positions, next_position = state.next_position, state.next_position + 1
        else:
            positions, next_position = batch.position_ids, self.next_position
        after = RowState(state.seqused_k + 1, next_position, bound, capacity)
        kept = None
        if self.keep is not None:
            kept = RowState(state.seqused_k + self.keep, next_position, bound, capacity, state.reading)
        return Append(torch.add(state.seqused_k, batch.row_ids, alpha=capacity), after, False, positions, kept)

    def _make(self, state: RowState | None, batch: RaggedBatch) -> Append:
        new = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).to(torch.int32)
        if state is None:
            state = RowState(torch.zeros_like(new), torch.zeros_like(new, dtype=torch.int64), 0, 0)
            fresh, positions = True, batch.position_ids
        else:
            fresh, positions = False, batch.position_ids
            if self.next_position is None:
                positions = state.next_position.index_select(0, batch.row_ids) + batch.offsets
        if self.keep is not None:
            state = state.measured(batch.max_seqlen)
        bound, capacity = state.grown(batch.max_seqlen)
        slot = state.seqused_k.index_select(0, batch.row_ids) + batch.offsets
        next_position = self.next_position
        if next_position is None:
            next_position = batch.position_after_last(positions, state.next_position)
        after = RowState(state.seqused_k + new, next_position, bound, capacity)
        kept = packed_slots = None
        if self.keep is not None:
            counts, place = _kept_first(self.keep, batch)
            kept = RowState(state.seqused_k + counts, next_position, bound, capacity, state.reading)
            packed_slots = batch.row_ids * capacity + slot - batch.offsets + place
        return Append(batch.row_ids * capacity + slot, after, fresh, positions, kept, packed_slots)


def _kept_first(keep: Tensor, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """``(batch,)`` int32 how many tokens of each row are kept, ``(total,)`` int64 places in the row, those first."""
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    borders = before.index_select(0, batch.cu_seqlens)
    counts = borders.diff()
    kept_before = before[:-1] - borders.index_select(0, batch.row_ids)
    dropped = counts.index_select(0, batch.row_ids) + batch.offsets - kept_before
    return counts.to(torch.int32), torch.where(keep, kept_before, dropped)


def _slots(columns: Tensor, used: Tensor, capacity: int) -> Tensor:
    """``(rows * columns,)`` flat slots of the given columns of every row, -1 behind the used ones."""
    row = torch.arange(columns.shape[0], device=columns.device).unsqueeze(1)
    return torch.where(columns < used.unsqueeze(1), row * capacity + columns, -1).flatten()


def _round_up(tokens: int) -> int:
    return -(-tokens // _BLOCK) * _BLOCK
