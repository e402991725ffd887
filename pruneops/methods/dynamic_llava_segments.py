"""Where in its rows Dynamic-LLaVA finds questions and answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruneops import ops
from pruneops.ragged import RaggedBatch, Span, to_device

Range = tuple[int, int]


@dataclass(frozen=True)
class Segments:
    """Parts of the rows of a batch, known on the host.

    Attributes
    ----------
    questions : list of (int, int)
        Per row the first token of the question and the one after its last, counted in the row before any pruning. Empty
        in a row without images, unless it continues a conversation.
    answers : list of (int, int)
        The same of the answer; empty where there is none.
    labelled : bool
        Whether labels said where the answers are.
    """

    questions: list[Range]
    answers: list[Range]
    labelled: bool

    @classmethod
    def of(cls, batch: RaggedBatch, further: bool = False) -> Segments:
        """Those of a batch from which nothing has been pruned.

        Parameters
        ----------
        further : bool
            It continues conversations, whose images may have come in earlier turns.
        """
        entry, questions, answers = batch.entry, [], []
        labelled = entry.supervised is not None
        for b in batch.rows:
            length = entry.cu_seqlens_host[b + 1] - entry.cu_seqlens_host[b]
            image_end = _image_end(batch.spans[b])
            begin = image_end
            if not labelled:
                end = entry.query_tokens[b][-1] + 1 if entry.query_tokens[b] else 0
                answers.append((end, length))
            elif entry.supervised[b]:
                *earlier, answer = entry.supervised[b]
                begin, end = max(begin, earlier[-1][1] if earlier else 0), answer[0]
                answers.append(answer)
            else:
                end = length
                answers.append((length, length))
            if image_end or further:
                starts = entry.question_starts[b] if entry.question_starts is not None else ()
                begin = max([begin, *(start for start in starts if start < end)])
                questions.append((min(begin, end), end))
            else:
                questions.append((end, end))
        return cls(questions, answers, labelled)


def without_last(ranges: list[Range]) -> list[Range]:
    """The ranges without the last token of each."""
    return [(start, max(stop - 1, start)) for start, stop in ranges]


def tokens_within(ranges: list[Range], batch: RaggedBatch) -> tuple[Tensor, list[int]]:
    """The tokens of ranges like those of `Segments`, none of which have been pruned.

    Returns
    -------
    (Tensor, list of int)
        ``(tokens,)`` int64 ascending indices into `batch` as it is now, and how many of them each row has.
    """
    counts = [stop - start for start, stop in ranges]
    if not any(counts):
        return batch.origin[:0], counts
    borders = batch.entry.cu_seqlens_host
    within = torch.zeros(borders[-1], dtype=torch.float32)
    for first, (start, stop) in zip(borders, ranges, strict=False):
        within[first + start : first + stop] = 1.0
    return tokens_of(to_device(within, batch.values.device).index_select(0, batch.origin), counts, batch), counts


def tokens_of(mask: Tensor, counts: list[int], batch: RaggedBatch) -> Tensor:
    """``(tokens,)`` int64: indices of the nonzero entries of `mask` ``(total,)``, of which row b has ``counts[b]``.

    As `Tensor.nonzero`, but does not wait for the device.
    """
    return ops.segment_topk(mask.float(), batch.cu_seqlens, counts)[0].long()


def _image_end(spans: list[Span]) -> int:
    """The token after the last image of a row; 0 without images."""
    end = at = 0
    for span in spans:
        at += span.length
        end = at if span.image else end
    return end
