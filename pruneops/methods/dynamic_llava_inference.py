"""What Dynamic-LLaVA does with a prompt, a further turn and an evaluation: tokens are dropped, masked or not stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruneops.decoder import DecoderState, Record
from pruneops.methods.dynamic_llava_predictors import (
    IMAGE,
    INSTRUCT,
    KEEP,
    OUTPUT_TEXT,
    ImagePredictor,
    Predictor,
    TextPredictor,
)
from pruneops.methods.dynamic_llava_segments import Range, Segments, tokens_of, tokens_within, without_last
from pruneops.methods.mod_route import Targets
from pruneops.ragged import Span

if TYPE_CHECKING:
    from pruneops.methods.dynamic_llava import DynamicLlava

#: Of the evaluation with labels, where a softmax over what was kept must not see anything else.
_NO_LEAK = 1e-20


def prune_text_and_images(method: DynamicLlava, predictors: Mapping[str, Predictor], state: DecoderState) -> None:
    """Decide about everything that enters the sparse layer but the single tokens of decoding."""
    whole, further = state.batch, state.cache is not None and state.cache.get_seq_length() > 0
    targets, segments = Targets.of_images(whole, 0), Segments.of(whole, further)
    if IMAGE in predictors and targets is not None:
        _prune_images(predictors[IMAGE], method.vision_keep_rate, targets, state)
    if further:
        if INSTRUCT in predictors:
            questions = None if method.question_start is None else segments.questions
            _store_wanted(predictors[INSTRUCT], questions, targets, state)
        return
    ranges = {INSTRUCT: segments.questions}
    if state.cache is None and not segments.labelled:
        ranges[OUTPUT_TEXT] = segments.answers  # what generate() has made so far
    _drop_text({predictors[name]: ranges[name] for name in ranges if name in predictors}, state)
    if OUTPUT_TEXT in predictors and segments.labelled:
        _mask_answers(predictors[OUTPUT_TEXT], segments.answers, state)


def _prune_images(predictor: ImagePredictor, rate: float, targets: Targets, state: DecoderState) -> None:
    batch = state.batch
    keep = [int(n * rate) for n in targets.counts]
    if keep == targets.counts and not state.trace.record:
        return
    indices = tokens_of(targets.mask, targets.counts, batch)
    logits = predictor(batch.values.index_select(0, indices), targets.counts)
    scores = logits.float().log_softmax(-1)[:, KEEP]
    everywhere = scores.new_zeros(batch.values.shape[0]).index_copy_(0, indices, scores)
    shorter, _ = batch.best_of_rows(everywhere, keep, targets.others, targets.other_counts)
    state.batch = shorter.with_spans(
        [
            # One span a row: that of an image if the row ends with one.
            [Span(1, n, k, count) if spans[-1].image else Span(0, n, 0, 0)]
            for n, k, count, spans in zip(shorter.lengths, keep, targets.counts, batch.spans, strict=True)
        ]
    )
    if state.trace.record:
        record_kept(state, 0, list(scores.split(targets.counts)))


def _drop_text(ranges: dict[TextPredictor, list[Range]], state: DecoderState) -> None:
    """Drop tokens that their predictor does not keep, but never the last of a range. Reads back how many stay, if any
    may go."""
    batch, keep = state.batch, None
    for predictor, row_ranges in ranges.items():
        indices, _ = tokens_within(without_last(row_ranges), batch)
        if indices.numel():
            keep = torch.ones_like(batch.row_ids, dtype=torch.float32) if keep is None else keep
            keep.index_copy_(0, indices, predictor.keeps(batch.values.index_select(0, indices)).float())
    if keep is None:
        return
    counts = keep.new_zeros(batch.batch_size).index_add_(0, batch.row_ids, keep).int().tolist()
    shorter, _ = batch.best_of_rows(keep, counts, None, [0] * batch.batch_size)
    state.batch = shorter.with_spans(
        [
            [replace(spans[-1], length=n, visual=min(spans[-1].visual, n))]
            for n, spans in zip(counts, batch.spans, strict=True)
        ]
    )
    if state.trace.record:
        record_kept(state, 1, [batch.values.new_empty(0, dtype=torch.float32)] * batch.batch_size)


def _store_wanted(
    predictor: TextPredictor, questions: list[Range] | None, targets: Targets | None, state: DecoderState
) -> None:
    """A further chunk: the instruct predictor decides which tokens of its questions, or if these are None of all its
    text, are stored, besides the last of every row."""
    batch = state.batch
    if questions is None:
        keep = predictor.keeps(batch.values)
        if targets is not None:
            keep |= targets.mask.index_select(0, batch.origin)
        keep |= batch.offsets + 1 == batch.cu_seqlens.diff().index_select(0, batch.row_ids)
    else:
        keep = _kept_within(predictor, without_last(questions), state)
    if keep is not None:
        state.keep_in_cache(keep)


def _mask_answers(predictor: TextPredictor, answers: list[Range], state: DecoderState) -> None:
    """Evaluation with labels: every token of an answer sees what was kept before it, as in decoding."""
    keep = _kept_within(predictor, answers, state)
    if keep is not None:
        state.mask_keys(keep.float(), _NO_LEAK)
        state.keep_in_cache(keep)


def _kept_within(predictor: TextPredictor, ranges: list[Range], state: DecoderState) -> Tensor | None:
    """``(total,)`` bool: the tokens of the batch without those in the ranges that the predictor does not keep; None if
    the ranges are empty."""
    batch = state.batch
    indices, _ = tokens_within(ranges, batch)
    if not indices.numel():
        return None
    keep = torch.ones_like(batch.row_ids, dtype=torch.bool)
    return keep.index_copy_(0, indices, predictor.keeps(batch.values.index_select(0, indices)))


def record_kept(state: DecoderState, stage: int, scores: list[Tensor], kept: Tensor | None = None) -> None:
    """Per row the scores of its image tokens, and the tokens that are left, or of them those ``kept`` ``(total,)``."""
    batch, start = state.batch, 0
    for b in batch.rows:
        row = slice(start, start + batch.lengths[b])
        origin = batch.origin[row] if kept is None else batch.origin[row][kept[row]]
        positions = origin - batch.entry.cu_seqlens_host[b]
        state.trace.records.append(Record(stage, b, len(state.trace.layer_lengths), scores[b], positions))
        start = row.stop
