"""Answering a batch of questions in one way, and whether the answers are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pruneops
from pruneops.evaluation.candidate import Candidate
from pruneops.evaluation.exam import Exam
from pruneops.evaluation.tally import Tally
from pruneops.methods import KEEP_ALL, PruningMethod

if TYPE_CHECKING:
    from pruneops.report import Report


def accuracy(
    candidate: Candidate,
    method: PruningMethod | None = None,
    *,
    exam: Exam | None = None,
    batch_size: int = 32,
    blank: bool = False,
) -> Tally:
    """How many held-out questions a model answers right, and what its prefill costs.

    Parameters
    ----------
    candidate : Candidate
        See `load_candidate`.
    method : PruningMethod, optional
        None: what the model was trained with, or nothing.
    exam : Exam, optional
        The questions; None: the first 500 of the test split.
    batch_size : int
        Questions at a time.
    blank : bool
        An even grey takes the place of every picture.
    """
    exam = Exam(size=500, patch_size=candidate.patch_size) if exam is None else exam
    method = method or candidate.trained_with or KEEP_ALL
    tally = Tally()
    for start in range(0, exam.size, batch_size):
        numbers = range(start, min(start + batch_size, exam.size))
        inputs = exam.batch(candidate.processor, numbers, blank)
        tally.add(*examine(candidate, method, exam, numbers, inputs))
    return tally


def examine(
    candidate: Candidate, method: PruningMethod, exam: Exam, numbers: Sequence[int], inputs: Any
) -> tuple[list[bool], Report]:
    """Answers the questions of a batch greedily; which answers are exactly right, and the report of the prefill."""
    tokenizer, model = candidate.processor.tokenizer, model_for(candidate, method)
    new_tokens = exam.longest_answer(tokenizer, numbers)
    with pruneops.prune(model, method) as run:
        new = generate(candidate, model, inputs, max_new_tokens=new_tokens)
    # An answer that does not end where the longest true one does is longer than any of them, and so not equal to one.
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    truths = [exam.questions[number].answer for number in numbers]
    return [text.strip() == truth for text, truth in zip(texts, truths, strict=True)], run.report()


def model_for(candidate: Candidate, method: PruningMethod) -> Any:
    """The form of the model that a method runs on: with its modules if they are of this method."""
    return candidate.model if type(method) is type(candidate.trained_with) else candidate.plain


@torch.inference_mode()
def generate(candidate: Candidate, model: Any, inputs: Any, **options: Any) -> Tensor:
    """The tokens that follow the prompts, chosen greedily: ``(batch, new tokens)``."""
    pad = candidate.processor.tokenizer.pad_token_id
    moved = inputs.to(model.device, model.dtype)
    ids = model.generate(**moved, do_sample=False, num_beams=1, pad_token_id=pad, **options)
    return ids[:, inputs["input_ids"].shape[1] :]


@contextmanager
def remembering_last_call(module: nn.Module) -> Iterator[None]:
    """Within the context, a module that is called again with the same tensor returns what it returned before.

    The ways of running a model then share the work of its vision tower.
    """
    stock = module.forward
    last: list[tuple[Tensor, Any]] = []

    def forward(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not last or last[0][0].shape != pixel_values.shape or not torch.equal(last[0][0], pixel_values):
            last[:] = [(pixel_values, stock(pixel_values, *args, **kwargs))]
        return last[0][1]

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
