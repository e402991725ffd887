"""LLaVA-OneVision, pruned."""

from __future__ import annotations

import transformers

from pruneops.models._pruned import PrunedModelMixin


class LlavaOnevisionForConditionalGeneration(PrunedModelMixin, transformers.LlavaOnevisionForConditionalGeneration):
    """Drop-in for `transformers.LlavaOnevisionForConditionalGeneration` with ``from_pretrained(..., pruning=...)``.

    Images and videos may be mixed, in any order and number a row; each is ranked, merged and dropped by itself.

    *Newline tokens.* The model puts one newline behind every video. It is text: no method drops or merges it, and it
    stays behind what is left of its video. The newlines of an image (one behind each row of its tiles, or a single one
    behind an image that is not tiled) are part of the image, as for LLaVA-NeXT.

    *Frames.* A video has ``ceil(side / 2) ** 2`` tokens a frame after the model's own pooling (196 at 27 x 27 patches);
    an image is one frame.
    """
