"""The packed batch that travels through the decoder.

Tokens of all rows of a batch lie behind each other in one ``(total, hidden)`` tensor. `RaggedBatch` carries that
tensor together with everything that has to be cut in step with it, and `pack` / `RaggedBatch.unpack` are the way in
and out of the padded world of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pruneops import ops


@dataclass(frozen=True)
class Span:
    """A stretch of one row: plain text, or everything from an image's first token to its last.

    Attributes
    ----------
    image : int
        0 for text, otherwise the number of the image within its row (1, 2, ...).
    length : int
        Tokens of the span that are still there.
    visual : int
        Those of them that belong to the image. ``length - visual`` tokens (row separators and the like, which some
        processors put between the pieces of one image) are text and never pruned.
    original_visual : int
        The image's tokens before any pruning; keep ratios refer to this number.
    frames : int
        How many frames of equally many tokens the image has: more than 1 for a video.
    blocks : tuple of int
        Sizes of the groups, one behind the other, into which a method has ordered the image's tokens; empty if none
        has.
    """

    image: int
    length: int
    visual: int
    original_visual: int
    frames: int = 1
    blocks: tuple[int, ...] = ()

    def keeping(self, visual: int) -> Span:
        """The span after its image was cut to `visual` tokens."""
        return replace(self, length=self.length - self.visual + visual, visual=visual)


@dataclass(frozen=True)
class Entry:
    """What the host learned about a padded batch in its one read-back at the entry of the decoder.

    Attributes
    ----------
    padded_shape : (int, int)
        ``(batch, length)`` of the padded batch.
    source : Tensor
        ``(total,)`` int64 on the device: flat index ``row * length + column`` of every packed token.
    cu_seqlens_host : list of int
        Row borders of the batch as it was packed, before any pruning.
    query_tokens : list of list of int
        Per row the tokens (counted in the row) that the method may ask for scores: with labels the last token before
        every answer, otherwise the last prompt token.
    supervised : list of list of (int, int) or None
        With labels, per row its supervised stretches: their first token, counted in the row, and the one after their
        last. A token at the very beginning of a row is not supervised: nothing predicts it.
    bridges : tuple of (Tensor, Tensor, Tensor)
        Supervised tokens that follow a visual token: their packed index, their row and their flat padded index,
        ``(n,)`` int64 each (see `RaggedBatch.unpack`).
    question_starts : list of list of int or None
        Per row the tokens, counted in the row, at which a question begins; None: not known.
    """

    padded_shape: tuple[int, int]
    source: Tensor
    cu_seqlens_host: list[int]
    query_tokens: list[list[int]]
    supervised: list[list[tuple[int, int]]] | None
    bridges: tuple[Tensor, Tensor, Tensor]
    question_starts: list[list[int]] | None = None


@dataclass(frozen=True)
class RaggedBatch:
    """Packed tokens of a batch and what belongs to them.

    Attributes
    ----------
    values : Tensor
        ``(total, hidden)`` hidden states.
    cu_seqlens : Tensor
        ``(batch + 1,)`` int32 row borders on the device.
    lengths : list of int
        Row lengths on the host.
    position_ids : Tensor
        ``(total,)`` int64 positions for the rotary embedding.
    origin : Tensor
        ``(total,)`` int64, no two equal: index of each token in the packed batch before any pruning, of a merged token
        the one that stands for it. Ascending, except within images whose tokens a method has put into another order.
    row_ids : Tensor
        ``(total,)`` int64 row of each token.
    spans : list of list of Span
        Per row its text and image spans, in order.
    protect : Tensor or None
        ``(total,)`` bool, True for text; only present if some image has text between its pieces.
    entry : Entry
        How the batch came in.
    in_entry_order : bool
        `origin` is ascending. False once images were merged.
    """

    values: Tensor
    cu_seqlens: Tensor
    lengths: list[int]
    position_ids: Tensor
    origin: Tensor
    row_ids: Tensor
    spans: list[list[Span]]
    protect: Tensor | None
    entry: Entry
    in_entry_order: bool = True

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> range:
        return range(self.batch_size)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @property
    def offsets(self) -> Tensor:
        """``(total,)`` int64: each token's index within its row, as it stands now."""
        return offsets_in_rows(self.cu_seqlens, self.row_ids)

    @property
    def visual(self) -> Tensor:
        """``(total,)`` bool: True at tokens of images."""
        spans = [span for row in self.spans for span in row]
        lengths = torch.tensor([span.length for span in spans])
        in_image = torch.tensor([span.image > 0 for span in spans]).repeat_interleave(lengths)
        visual = to_device(in_image, self.values.device)
        return visual if self.protect is None else visual & ~self.protect

    @property
    def one_token_a_row(self) -> bool:
        return self.max_seqlen == 1 and self.values.shape[0] == self.batch_size

    def with_values(self, values: Tensor) -> RaggedBatch:
        return self._with(values=values)

    def with_position_ids(self, position_ids: Tensor) -> RaggedBatch:
        return self._with(position_ids=position_ids)

    def with_spans(self, spans: list[list[Span]]) -> RaggedBatch:
        return self._with(spans=spans)

    def _with(self, **changes: Any) -> RaggedBatch:
        # What dataclasses.replace() does, without its cost: this runs once a layer for every decoded token.
        batch = object.__new__(RaggedBatch)
        batch.__dict__.update(self.__dict__, **changes)
        return batch

    def keep_best(self, scores: Tensor, keep: list[list[int]]) -> RaggedBatch:
        """Keep the best-scored tokens of every image, all text, and the order.

        Parameters
        ----------
        scores : Tensor
            ``(total,)`` float32; read at visual tokens only.
        keep : list of list of int
            Per row and span the number of visual tokens to keep; ignored for text spans.

        Returns
        -------
        RaggedBatch
            Positions are carried along unchanged; the method renumbers them if that is its rule.
        """
        spans = [
            [span.keeping(k) if span.image else span for span, k in zip(row, row_keep, strict=True)]
            for row, row_keep in zip(self.spans, keep, strict=True)
        ]
        # One segment per span: text spans keep everything, image spans their best tokens.
        old_lengths = [span.length for row in self.spans for span in row]
        if self.protect is None:
            keep_counts = [span.length for row in spans for span in row]
        else:
            keep_counts = [span.visual for row in spans for span in row]
        return self._selected(scores, old_lengths, keep_counts, spans)

    def keep_best_of_blocks(self, scores: Tensor, keep: list[list[tuple[int, ...]]]) -> RaggedBatch:
        """`keep_best` within every block of `Span.blocks`.

        Parameters
        ----------
        scores : Tensor
            ``(total,)`` float32; read at visual tokens only.
        keep : list of list of tuple of int
            Per row and span the number of tokens to keep of each block; ignored for text spans.
        """
        spans = [
            [
                replace(span.keeping(sum(k)), blocks=k) if span.image else span
                for span, k in zip(row, keep_row, strict=True)
            ]
            for row, keep_row in zip(self.spans, keep, strict=True)
        ]
        old_lengths, keep_counts = (
            [length for row in stage for span in row for length in (span.blocks if span.image else (span.length,))]
            for stage in (self.spans, spans)
        )
        return self._selected(scores, old_lengths, keep_counts, spans)

    def best_of_rows(
        self, scores: Tensor, keep_counts: list[int], protect: Tensor | None, protected_counts: list[int]
    ) -> tuple[RaggedBatch, Tensor]:
        """The best-scored tokens of every row, whichever image they are of, and the protected ones, in their order.

        Parameters
        ----------
        scores : Tensor
            ``(total,)`` float32; read at unprotected tokens only.
        keep_counts, protected_counts : list of int
            Per row how many unprotected tokens to take, no more than there are, and how many are protected.
        protect : Tensor or None
            ``(total,)`` bool.

        Returns
        -------
        (RaggedBatch, Tensor)
            The tokens, as text, and the index of each in this batch, ``(tokens,)`` int32.
        """
        carried = [self.values, self.position_ids, self.origin, self.row_ids]
        counts = None if protect is None else protected_counts
        kept, indices, cu_seqlens = ops.select_compact(
            scores, carried, self.cu_seqlens, keep_counts, protect=protect, protected_counts=counts
        )
        lengths = [k + p for k, p in zip(keep_counts, protected_counts, strict=True)]
        return self._as_text(kept, cu_seqlens, lengths), indices

    def taking(self, indices: Tensor, cu_seqlens: Tensor, lengths: list[int]) -> RaggedBatch:
        """The tokens at some indices, as text.

        Parameters
        ----------
        indices : Tensor
            ``(tokens,)`` int32, rows one behind the other, of any order within a row.
        cu_seqlens, lengths
            As the attributes, of the result.
        """
        carried = [self.values, self.position_ids, self.origin, self.row_ids]
        return self._as_text(ops.gather_rows(carried, indices), cu_seqlens, lengths)

    def _as_text(self, carried: list[Tensor], cu_seqlens: Tensor, lengths: list[int]) -> RaggedBatch:
        values, position_ids, origin, row_ids = carried
        return self._with(
            values=values,
            position_ids=position_ids,
            origin=origin,
            row_ids=row_ids,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            spans=[[Span(0, length, 0, 0)] for length in lengths],
            protect=None,
        )

    def with_merged(self, values: Tensor, origin: Tensor, row_ids: Tensor, spans: list[list[Span]]) -> RaggedBatch:
        """The batch with other tokens in the place of its images, no text between the pieces of any.

        Parameters
        ----------
        values, origin, row_ids : Tensor
            As the attributes, for all tokens, text included.
        spans : list of list of Span
            As the attribute.

        Returns
        -------
        RaggedBatch
            Its positions count from 0 in every row.
        """
        lengths = [sum(span.length for span in row) for row in spans]
        cu_seqlens = cu_seqlens_of(lengths, values.device)
        return self._with(
            values=values,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            position_ids=offsets_in_rows(cu_seqlens, row_ids),
            origin=origin,
            row_ids=row_ids,
            spans=spans,
            protect=None,
            in_entry_order=False,
        )

    def position_after_last(self, positions: Tensor, otherwise: Tensor) -> Tensor:
        """``(batch,)`` int64: what follows each row's last of `positions` ``(total,)``, or `otherwise`."""
        if not positions.numel():
            return otherwise
        last = (self.cu_seqlens[1:].long() - 1).clamp(min=0)
        return torch.where(self.cu_seqlens.diff() > 0, positions.index_select(0, last) + 1, otherwise)

    def _selected(
        self, scores: Tensor, segment_lengths: list[int], keep_counts: list[int], spans: list[list[Span]]
    ) -> RaggedBatch:
        """The best `keep_counts` unprotected tokens of consecutive segments, and the protected ones."""
        protected = None if self.protect is None else [span.length - span.visual for row in spans for span in row]
        carried = [self.values, self.position_ids, self.origin, self.row_ids]
        if self.protect is not None:
            carried.append(self.protect)
        kept, _, _ = ops.select_compact(
            scores,
            carried,
            cu_seqlens_of(segment_lengths, self.values.device),
            keep_counts,
            protect=self.protect,
            protected_counts=protected,
        )
        lengths = [sum(span.length for span in row) for row in spans]
        return self._with(
            values=kept[0],
            position_ids=kept[1],
            origin=kept[2],
            row_ids=kept[3],
            protect=kept[4] if self.protect is not None else None,
            cu_seqlens=cu_seqlens_of(lengths, self.values.device),
            lengths=lengths,
            spans=spans,
        )

    def unpack(self) -> Tensor:
        """``(batch, length, hidden)``: every token back in its padded place, zeros where tokens were dropped.

        Two places get a copy of a surviving neighbour, so that code which knows nothing of pruning stays right:

        * the place before a supervised token whose predecessor was dropped gets the surviving predecessor, because the
          stock loss compares the logits at ``t - 1`` with the label at ``t``;
        * the last column gets the row's last surviving token where its own is padding or was dropped, because
          ``generate()`` reads the logits there.
        """
        batch, length = self.entry.padded_shape
        if self.values.shape[0] == batch * length and self.in_entry_order:
            return self.values.view(batch, length, -1)
        values, source = self.values, self.entry.source.index_select(0, self.origin)
        for rows, places in (self._bridged_predecessors(), self._last_column()):
            if places.numel():
                # A merged token may stand in a place that its neighbour needs.
                taken = torch.zeros(batch * length + 1, dtype=torch.bool, device=source.device)
                taken.index_fill_(0, places, True)  # -1, the spare last one, is no place
                source = torch.where(taken[source], -1, source)
                values = torch.cat([values, values.index_select(0, rows)])
                source = torch.cat([source, places])
        padded = ops.scatter_rows(values, source.to(torch.int32), batch * length)
        return padded.view(batch, length, -1)

    def has_predecessor(self) -> Tensor:
        """``(n,)`` bool for the supervised tokens of `Entry.bridges`: is any token left before them in their row?"""
        return self._predecessors()[1]

    def _predecessors(self) -> tuple[Tensor, Tensor]:
        """What is left right before the tokens of `Entry.bridges`: ``(n,)`` indices, and whether there is anything."""
        supervised, row, _ = self.entry.bridges
        place = torch.full_like(self.entry.source, -1)
        place.index_copy_(0, self.origin, torch.arange(self.origin.shape[0], device=place.device))
        predecessor = place.index_select(0, supervised) - 1
        return predecessor.clamp(min=0), predecessor >= self.cu_seqlens.index_select(0, row)

    def _bridged_predecessors(self) -> tuple[Tensor, Tensor]:
        supervised = self.entry.bridges[2]
        if supervised.numel() == 0 or self.origin.numel() == 0:
            return supervised[:0], supervised[:0]
        predecessor, exists = self._predecessors()
        # -1 is ignored by scatter: the predecessor is in its place, or nothing is left before the token.
        needed = exists & (self.entry.source[self.origin[predecessor]] != supervised - 1)
        return predecessor, torch.where(needed, supervised - 1, -1)

    def _last_column(self) -> tuple[Tensor, Tensor]:
        device = self.values.device
        borders = self.entry.cu_seqlens_host
        batch, length = self.entry.padded_shape
        changed = [not self.in_entry_order or spans[-1].visual < spans[-1].original_visual for spans in self.spans]
        rows = [b for b in self.rows if self.lengths[b] and (changed[b] or borders[b + 1] - borders[b] < length)]
        if not rows:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return nothing, nothing
        chosen = to_device(torch.tensor(rows, dtype=torch.int64), device)
        last = self.cu_seqlens[chosen + 1].long() - 1
        column = self.entry.source[self.origin[last]] - chosen * length
        return last, torch.where(column < length - 1, chosen * length + length - 1, -1)


def cu_seqlens_of(lengths: list[int], device: torch.device) -> Tensor:
    """``(n + 1,)`` int32 borders on `device` from lengths on the host, without a synchronisation."""
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    return to_device(torch.tensor(borders, dtype=torch.int32), device)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; pinned, so that the copy of a plan does not stop the host."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def offsets_in_rows(cu_seqlens: Tensor, row_ids: Tensor) -> Tensor:
    """``(total,)`` int64: index of each packed token within its row."""
    position = torch.arange(row_ids.shape[0], device=row_ids.device)
    return position - cu_seqlens.index_select(0, row_ids)


def pack(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    visual_token_mask: Tensor | None,
    labels: Tensor | None,
    prompt_length: int | None = None,
    num_frames: Sequence[int] | None = None,
    question_starts: Tensor | None = None,
) -> RaggedBatch:
    """Pack a padded batch. Reads the masks (and labels) back to the host once; nothing after this does.

    Parameters
    ----------
    inputs_embeds : Tensor
        ``(batch, length, hidden)``.
    attention_mask : Tensor or None
        ``(batch, length)``, nonzero for real tokens; None means all are.
    position_ids : Tensor or None
        ``(batch or 1, length)`` int64; None numbers the real tokens of each row from 0.
    visual_token_mask : Tensor or None
        ``(batch, length)`` bool or int: 0 text, i the row's i-th image. With bool every maximal run is an image.
    labels : Tensor or None
        ``(batch, length)`` int64, -100 where nothing is supervised.
    prompt_length : int or None
        Columns that belong to the prompt, if `generate` without a cache feeds generated tokens behind it.
    num_frames : sequence of int or None
        Frames of every image, in order of appearance in the batch; None: every image is one frame.
    question_starts : Tensor or None
        ``(batch, length)`` bool, True where a question begins.
    """
    batch, length, hidden = inputs_embeds.shape
    device = inputs_embeds.device
    masks = attention_mask, visual_token_mask, labels, question_starts
    valid, numbered, labels, starts = _read_back(batch, length, *masks)
    visual = numbered * valid

    flat = valid.flatten().nonzero().squeeze(1)
    lengths = valid.sum(1).tolist()
    borders = [0]
    for n in lengths:
        borders.append(borders[-1] + n)
    packed_visual = visual.flatten()[flat]
    spans = [_spans(packed_visual[borders[b] : borders[b + 1]]) for b in range(batch)]
    if num_frames is not None:
        spans = _with_frames(spans, numbered, num_frames)
    protect = None
    if any(span.image and span.length != span.visual for row in spans for span in row):
        protect = to_device(packed_visual == 0, device)

    source = to_device(flat, device)
    row_ids = to_device(flat // max(length, 1), device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    if position_ids is None:
        packed_positions = offsets_in_rows(cu_seqlens, row_ids)
    else:
        packed_positions = position_ids.expand(batch, length).reshape(-1).index_select(0, source)
    dense = flat.numel() == batch * length
    values = inputs_embeds.reshape(batch * length, hidden)
    if not dense:
        values = ops.gather_rows(values, source.to(torch.int32))
    entry = Entry(
        padded_shape=(batch, length),
        source=source,
        cu_seqlens_host=borders,
        query_tokens=_query_tokens(valid, labels, prompt_length),
        supervised=None if labels is None else _supervised(valid, labels),
        bridges=tuple(to_device(t, device) for t in _bridges(valid, visual, labels)),
        question_starts=None if starts is None else [_places(starts[b][valid[b]] != 0) for b in range(batch)],
    )
    return RaggedBatch(
        values=values,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        position_ids=packed_positions,
        origin=torch.arange(flat.numel(), device=device),
        row_ids=row_ids,
        spans=spans,
        protect=protect,
        entry=entry,
    )


def pack_one_token(inputs_embeds: Tensor, position_ids: Tensor | None) -> RaggedBatch:
    """`pack` for a decoding step: ``(batch, 1, hidden)``, one text token in every row, nothing read back."""
    batch = inputs_embeds.shape[0]
    device = inputs_embeds.device
    borders = torch.arange(batch + 1, device=device)
    rows = borders[:batch]
    positions = torch.zeros_like(rows) if position_ids is None else position_ids[:, 0].expand(batch)
    nothing = rows[:0]
    return RaggedBatch(
        values=inputs_embeds.reshape(batch, -1),
        cu_seqlens=borders.to(torch.int32),
        lengths=[1] * batch,
        position_ids=positions,
        origin=rows,
        row_ids=rows,
        spans=[[Span(0, 1, 0, 0)]] * batch,
        protect=None,
        entry=Entry((batch, 1), rows, list(range(batch + 1)), [[0]] * batch, None, (nothing, nothing, nothing)),
    )


def image_runs(mask: Tensor) -> Tensor:
    """Number the maximal runs of True in each row of a bool mask: ``(batch, length)`` int64, 0 outside of runs."""
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    return starts.cumsum(1) * mask


def _read_back(
    batch: int,
    length: int,
    attention_mask: Tensor | None,
    visual_token_mask: Tensor | None,
    labels: Tensor | None,
    question_starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Valid mask (bool), image numbers, labels and starts (int64) on the CPU, fetched in a single transfer."""
    given = attention_mask, visual_token_mask, labels, question_starts
    wanted = [t.to(torch.int64) for t in given if t is not None]
    fetched = iter(torch.stack(wanted).cpu() if wanted else ())
    valid = next(fetched) != 0 if attention_mask is not None else torch.ones(batch, length, dtype=torch.bool)
    visual = next(fetched) if visual_token_mask is not None else torch.zeros(batch, length, dtype=torch.int64)
    if visual_token_mask is not None and visual_token_mask.dtype == torch.bool:
        visual = image_runs(visual != 0)
    if bool((visual < 0).any()):
        raise ValueError(
            f"visual_token_mask: got the value {int(visual.min())}, expected 0 for text or the number of the row's "
            "image (1, 2, ...)"
        )
    labels, starts = (None if t is None else next(fetched) for t in (labels, question_starts))
    return valid, visual, labels, starts


def _spans(visual: Tensor) -> list[Span]:
    """Spans of one packed row from its image numbers ``(n,)``."""
    spans: list[Span] = []
    at, n = 0, visual.numel()
    for image in torch.unique(visual[visual > 0]).tolist():
        places = (visual == image).nonzero().squeeze(1)
        first, last, count = int(places[0]), int(places[-1]), places.numel()
        if first < at or bool(((visual[first : last + 1] != image) & (visual[first : last + 1] != 0)).any()):
            raise ValueError(
                f"visual_token_mask: image {image} of a row overlaps another image or comes before a lower number, "
                "expected the images of a row to be numbered in order of appearance, one after the other"
            )
        if first > at:
            spans.append(Span(0, first - at, 0, 0))
        spans.append(Span(image, last + 1 - first, count, count))
        at = last + 1
    if at < n or not spans:
        spans.append(Span(0, n - at, 0, 0))
    return spans


def _with_frames(spans: list[list[Span]], numbered: Tensor, num_frames: Sequence[int]) -> list[list[Span]]:
    """The spans with the frames of their images; `numbered` ``(batch, length)`` also has images that are padding."""
    images = [torch.unique(row[row > 0]).tolist() for row in numbered]
    without_padding = [[span.image for span in row if span.image] for row in spans]
    if len(num_frames) == sum(len(row) for row in without_padding):
        images = without_padding
    expected = sum(len(row) for row in images)
    if len(num_frames) != expected:
        raise ValueError(
            f"num_frames: got {len(num_frames)} entries, expected {expected}, one for each video or image of "
            "visual_token_mask in order of appearance in the batch"
        )
    for number, frames in enumerate(num_frames):
        if frames < 1:
            raise ValueError(f"num_frames: got {frames} for video {number}, expected at least 1")
    frames_of = iter(enumerate(num_frames))
    framed = []
    for row, numbers in zip(spans, images, strict=True):
        of_row = {image: next(frames_of) for image in numbers}
        framed.append([])
        for span in row:
            number, frames = of_row.get(span.image, (0, 1))
            if span.visual % frames:
                raise ValueError(
                    f"num_frames: got {frames} for video {number}, expected a divisor of its {span.visual} visual "
                    "tokens: every frame has as many"
                )
            framed[-1].append(replace(span, frames=frames))
    return framed


def _query_tokens(valid: Tensor, labels: Tensor | None, prompt_length: int | None) -> list[list[int]]:
    """Per row the tokens, counted in the row, right before an answer (labels given) or the last prompt token."""
    queries = []
    for b in range(valid.shape[0]):
        if labels is None:
            n = int(valid[b, :prompt_length].sum())
            queries.append([n - 1] if n else [])
            continue
        supervised = labels[b][valid[b]] != -100
        starts = supervised[1:] & ~supervised[:-1]
        queries.append(_places(starts))
    return queries


def _places(mask: Tensor) -> list[int]:
    """Where a mask ``(n,)`` on the CPU is True."""
    return mask.nonzero().squeeze(1).tolist()


def _supervised(valid: Tensor, labels: Tensor) -> list[list[tuple[int, int]]]:
    """See `Entry.supervised`; CPU tensors."""
    stretches = []
    for b in range(valid.shape[0]):
        supervised = (labels[b][valid[b]] != -100).long()
        supervised[:1] = 0
        steps = supervised.diff(append=supervised.new_zeros(1))
        starts, stops = ((steps == step).nonzero().squeeze(1) + 1 for step in (1, -1))
        stretches.append(list(zip(starts.tolist(), stops.tolist(), strict=True)))
    return stretches


def _bridges(valid: Tensor, visual: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `Entry.bridges`; CPU tensors."""
    if labels is None:
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing, nothing
    after_visual = torch.zeros_like(valid)
    after_visual[:, 1:] = valid[:, 1:] & (labels[:, 1:] != -100) & (visual[:, :-1] > 0)
    rows, columns = after_visual.nonzero(as_tuple=True)
    packed_index = valid.flatten().long().cumsum(0) - 1
    supervised = rows * valid.shape[1] + columns
    return packed_index[supervised], rows, supervised
