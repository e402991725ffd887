"""What Dynamic-LLaVA does in training: decisions as masks that a gradient goes through, and losses on their shares."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruneops.decoder import DecoderState
from pruneops.methods.dynamic_llava_predictors import KEEP, ImagePredictor, TextPredictor
from pruneops.methods.dynamic_llava_segments import Range, Segments, tokens_of, tokens_within
from pruneops.methods.mod_route import Targets
from pruneops.ragged import to_device

if TYPE_CHECKING:
    from pruneops.methods.dynamic_llava import DynamicLlava

#: Of the policy's softmax, as in the official code.
EPSILON = 1e-6


class MaskDraw:
    """The decisions of one training pass, drawn before its sparse layer.

    The predictors run on no tokens where there are none, so that every parameter gets a gradient in every pass, which
    data-parallel training waits for.

    Parameters
    ----------
    method : DynamicLlava
    state : DecoderState
        With the batch that enters the sparse layer, from which nothing has been pruned.

    Attributes
    ----------
    policy : Tensor
        ``(total,)`` float32: 1 for a token that is kept, 0 for one that is not, up to rounding.
    loss : Tensor
        Scalar float32: the sum over the predictors of the mean over rows of the squared deviation from their share.
    """

    def __init__(self, method: DynamicLlava, state: DecoderState) -> None:
        self._batch = state.batch
        self._device = state.batch.values.device
        self._segments = Segments.of(state.batch)
        self._method = method
        self.policy = torch.ones_like(state.batch.row_ids, dtype=torch.float32)
        self.loss = self.policy.new_zeros(())

    def images(self, predictor: ImagePredictor) -> list[Tensor]:
        """Decide about image tokens; per row the log-probabilities of keeping them."""
        batch, targets = self._batch, Targets.of_images(self._batch, 0)
        counts, indices = [0] * batch.batch_size, batch.origin[:0]
        if targets is not None:
            counts, indices = targets.counts, tokens_of(targets.mask, targets.counts, batch)
        rate = self._method.vision_keep_rate
        logits = self._apply(predictor, lambda x: predictor(x, counts), indices, counts, rate, 0)
        return list(logits.detach().float().log_softmax(-1)[:, KEEP].split(counts))

    def answers(self, predictor: TextPredictor) -> None:
        """Decide about the tokens of every row's last answer; about none without labels."""
        method = self._method
        self._text(predictor, self._segments.answers, method.output_text_keep_rate, method.output_text_len_for_training)

    def questions(self, predictor: TextPredictor) -> None:
        """Decide about the tokens of every row's last question; about none without labels, which say where it ends."""
        self._text(
            predictor, self._segments.questions, self._method.instruct_keep_rate, self._method.instruct_len_for_training
        )

    def _text(self, predictor: TextPredictor, ranges: list[Range], rate: float, shortest: int) -> None:
        indices, counts = tokens_within(ranges if self.labelled else [(0, 0)] * len(ranges), self._batch)
        self._apply(predictor, predictor, indices, counts, rate, shortest)

    def _apply(
        self,
        predictor: ImagePredictor | TextPredictor,
        judge: Callable[[Tensor], Tensor],
        indices: Tensor,
        counts: list[int],
        rate: float,
        shortest: int,
    ) -> Tensor:
        """Draw for the tokens at `indices`, rows with fewer than `shortest` of them excepted, which are kept whole."""
        logits = judge(self._batch.values.index_select(0, indices))
        mask = predictor.draw(logits)
        host = torch.tensor(counts, dtype=torch.int64)
        decided = (host >= shortest) & (host > 0)
        lengths, rows = to_device(host, self._device), to_device(decided, self._device)
        if not bool(decided.all()):
            tokens = to_device(decided.repeat_interleave(host), self._device)
            mask = torch.where(tokens, mask, 1.0)
        if mask.numel():
            share = torch.segment_reduce(mask, "sum", lengths=lengths, unsafe=True) / lengths.clamp(min=1)
            self.loss = self.loss + torch.where(rows, (rate - share).square(), 0.0).mean()
        self.policy = self.policy.index_copy(0, indices, mask)
        return logits

    @property
    def labelled(self) -> bool:
        """Whether the answers are known."""
        return self._segments.labelled


def warn_of_missing_labels() -> None:
    warnings.warn(
        "training without labels in the call of the model (label smoothing and custom losses take them out): where "
        "questions and answers are is not known, so no decisions on them are trained, and the mask losses are left in "
        "run.auxiliary_loss instead of being added to the loss",
        stacklevel=2,
    )


def warn_of_a_cache() -> None:
    warnings.warn(
        "a model in train mode is called with a cache and without labels: tokens are dropped as in inference, and no "
        "predictor is trained; train with use_cache=False",
        stacklevel=2,
    )
