"""What a run over the questions adds up to: right answers, tokens, FLOPs and bytes of keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruneops.report import Report

#: Of the normal distribution, for intervals of 95 %.
_Z = 1.959964


@dataclass
class Tally:
    """Right answers to the first questions of an exam, and the cost of their prefills.

    Attributes
    ----------
    right : str
        ``"1"`` or ``"0"`` for every question so far, in order.
    layer_tokens : list of int
        Per layer the tokens that it ran on, all questions together; text included.
    dense_tokens, flops, dense_flops, kv_bytes, dense_kv_bytes : int
        As in `pruneops.report.Report`, all questions together.
    """

    right: str = ""
    layer_tokens: list[int] = field(default_factory=list)
    dense_tokens: int = 0
    flops: int = 0
    dense_flops: int = 0
    kv_bytes: int = 0
    dense_kv_bytes: int = 0

    def add(self, right: Sequence[bool], report: Report) -> None:
        """Add a batch."""
        self.right += "".join("01"[answer] for answer in right)
        before = self.layer_tokens or [0] * len(report.tokens)
        self.layer_tokens = [a + b for a, b in zip(before, report.tokens, strict=True)]
        self.dense_tokens += sum(report.dense_lengths)
        self.flops += report.flops
        self.dense_flops += report.dense_flops
        self.kv_bytes += report.kv_bytes
        self.dense_kv_bytes += report.dense_kv_bytes

    @property
    def questions(self) -> int:
        return len(self.right)

    @property
    def score(self) -> int:
        """Right answers."""
        return self.right.count("1")

    @property
    def accuracy(self) -> float:
        return self.score / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """See `wilson_interval`."""
        return wilson_interval(self.score, self.questions)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a question that a layer runs on, text included, on average over layers and questions."""
        return sum(self.layer_tokens) / len(self.layer_tokens) / self.questions

    @property
    def flop_ratio(self) -> float:
        return self.flops / self.dense_flops

    @property
    def kv_ratio(self) -> float:
        return self.kv_bytes / self.dense_kv_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tally:
        return cls(**values)


def wilson_interval(score: int, questions: int) -> tuple[float, float]:
    """The 95 % interval of Wilson for a share: sensible at 0 and 1 too."""
    share, z2 = score / questions, _Z * _Z / questions
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference(right: str, reference: str) -> tuple[float, float]:
    """By how much the share of right answers differs on the same questions, and half its 95 % interval."""
    n = len(right)
    pairs = [int(a) - int(b) for a, b in zip(right, reference, strict=True)]
    mean = sum(pairs) / n
    spread = sum(pair * pair for pair in pairs) / n - mean * mean
    return mean, _Z * math.sqrt(max(spread, 0.0) / n)
