"""The held-out questions: what is asked, what is true, and the batches that a model sees."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pruneops.data import Question, Samples
from pruneops.models.checkpoints.processor import chat_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BatchFeature


@dataclass(frozen=True)
class Exam:
    """One question about each of the first pictures of a split, rendered when they are asked for.

    Attributes
    ----------
    split : str
        One of `pruneops.data.SPLITS`.
    size : int
        Questions.
    seed : int
        Of the pictures.
    patch_size : int
        Pixels along a side of a patch.

    Raises
    ------
    TypeError, ValueError
        If one is not as `pruneops.data.Samples` wants it.
    """

    split: str = "test"
    size: int = 4000
    seed: int = 0
    patch_size: int = 8

    def __post_init__(self) -> None:
        _ = self.samples  # checks the fields

    @cached_property
    def samples(self) -> Samples:
        return Samples(self.split, self.size, seed=self.seed, turns=1, patch_size=self.patch_size)

    @cached_property
    def questions(self) -> list[Question]:
        """What is asked, without the pictures."""
        return [sample.turns[0] for sample in self.samples]

    @property
    def constant_score(self) -> int:
        """Right answers of whoever knows nothing but the most frequent answer to every kind of question here."""
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for question in self.questions:
            answers[question.template][question.answer] += 1
        return sum(max(counted.values()) for counted in answers.values())

    def shares(self, right: str) -> dict[str, float]:
        """Share of right answers by the kind of question, of a tally of all questions; ``"1"`` is right."""
        asked = Counter(question.template for question in self.questions)
        good = Counter(q.template for q, answer in zip(self.questions, right, strict=True) if answer == "1")
        return {kind: good[kind] / asked[kind] for kind in sorted(asked)}

    def longest_answer(self, tokenizer: Any, numbers: Sequence[int]) -> int:
        """Tokens of the longest true answer to some questions, its end included."""
        return 1 + max(len(tokenizer.tokenize(f" {self.questions[number].answer}")) for number in numbers)

    def batch(self, processor: Any, numbers: Sequence[int], blank: bool = False) -> BatchFeature:
        """Prompts of some questions with their pictures, padded on the left.

        Parameters
        ----------
        processor : LlavaProcessor
            With a chat template.
        numbers : sequence of int
            Of the questions, from 0.
        blank : bool
            An even grey takes the place of every picture.
        """
        from PIL import Image

        pictures = []
        for number in numbers:
            picture = self.samples[number].pictures[0]
            pictures.append(Image.fromarray(np.full_like(picture, 128) if blank else picture))
        prompts = [chat_prompt(processor, self.questions[number].text) for number in numbers]
        return processor(images=pictures, text=prompts, padding=True, padding_side="left", return_tensors="pt")
