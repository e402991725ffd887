"""LLaVA-NeXT (1.6), pruned."""

from __future__ import annotations

import transformers

from pruneops.models._pruned import PrunedModelMixin


class LlavaNextForConditionalGeneration(PrunedModelMixin, transformers.LlavaNextForConditionalGeneration):
    """Drop-in for `transformers.LlavaNextForConditionalGeneration` with ``from_pretrained(..., pruning=...)``.

    All tokens of an image, the base view, the tiles and the newline tokens between their rows, are ranked and dropped
    together, as PyramidDrop's authors do.
    """
