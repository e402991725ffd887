"""LLaVA 1.5 and relatives, pruned."""

from __future__ import annotations

import transformers

from pruneops.models._pruned import PrunedModelMixin


class LlavaForConditionalGeneration(PrunedModelMixin, transformers.LlavaForConditionalGeneration):
    """Drop-in for `transformers.LlavaForConditionalGeneration` with ``from_pretrained(..., pruning=...)``.

    The method is stored in ``config.pruning``, so ``save_pretrained`` and ``from_pretrained`` keep it.
    """
