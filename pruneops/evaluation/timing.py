"""Measured time of a way beside the dense model, in alternating rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

import pruneops
from pruneops.evaluation.answers import generate, model_for
from pruneops.evaluation.candidate import Candidate
from pruneops.methods import PruningMethod

#: Tokens of the answers that are timed: as many in every way, whatever they say.
NEW_TOKENS = 8


@dataclass(frozen=True)
class Seconds:
    """Of one call: until the first token, vision tower included; of the whole answer; of the decoder layers of the
    prefill, if they ran in the ragged decoder."""

    first_token: float
    answer: float
    decoder: float | None


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds.

    Attributes
    ----------
    first_token_ms, answer_ms, decoder_ms : float
        See `Seconds`; of the whole batch.
    first_token_ratio, answer_ratio : float
        Medians of a round's time over that of the dense model in the same round.
    first_token_spread, answer_spread : (float, float)
        The lowest and the highest of these.
    """

    first_token_ms: float
    answer_ms: float
    decoder_ms: float | None
    first_token_ratio: float
    first_token_spread: tuple[float, float]
    answer_ratio: float
    answer_spread: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def clock(candidate: Candidate, inputs: Any, method: PruningMethod | None) -> Callable[[], Seconds]:
    """A call that answers a batch and tells how long that took.

    Parameters
    ----------
    inputs : BatchFeature
    method : PruningMethod or None
        None: stock transformers.
    """
    from transformers import StoppingCriteria

    model = candidate.plain if method is None else model_for(candidate, method)
    inputs = inputs.to(model.device, model.dtype)

    class FirstToken(StoppingCriteria):
        """Never stops; notes when it is asked first, which is after the first token."""

        at: float | None = None

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            if self.at is None:
                self.at = _now(model.device)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def call() -> Seconds:
        first = FirstToken()
        lengths = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        with nullcontext() if method is None else pruneops.prune(model, method) as run:
            start = _now(model.device)
            generate(candidate, model, inputs, stopping_criteria=[first], **lengths)
            end = _now(model.device)
        return Seconds(first.at - start, end - start, None if run is None else sum(run.layer_seconds))

    return call


def compare(call: Callable[[], Seconds], dense: Callable[[], Seconds], rounds: int) -> Timing:
    """Time a way and the dense model in turn, after one call of each; the one that goes first alternates."""
    call(), dense()
    ours, theirs = [], []
    for i in range(rounds):
        for one, found in ((call, ours), (dense, theirs)) if i % 2 == 0 else ((dense, theirs), (call, ours)):
            found.append(one())
    first = [a.first_token / b.first_token for a, b in zip(ours, theirs, strict=True)]
    answer = [a.answer / b.answer for a, b in zip(ours, theirs, strict=True)]
    decoder = [a.decoder for a in ours if a.decoder is not None]
    return Timing(
        first_token_ms=1e3 * statistics.median(a.first_token for a in ours),
        answer_ms=1e3 * statistics.median(a.answer for a in ours),
        decoder_ms=1e3 * statistics.median(decoder) if decoder else None,
        first_token_ratio=statistics.median(first),
        first_token_spread=(min(first), max(first)),
        answer_ratio=statistics.median(answer),
        answer_spread=(min(answer), max(answer)),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
