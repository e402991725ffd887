"""LLaVA-NeXT-Video, pruned."""

from __future__ import annotations

import transformers

from pruneops.models._pruned import PrunedModelMixin


class LlavaNextVideoForConditionalGeneration(PrunedModelMixin, transformers.LlavaNextVideoForConditionalGeneration):
    """Drop-in for `transformers.LlavaNextVideoForConditionalGeneration` with ``from_pretrained(..., pruning=...)``.

    Images and videos may be mixed, in any order and number a row; each is ranked, merged and dropped by itself.

    *Newline tokens.* Videos have none. Those between the rows of an image's tiles are part of the image, as for
    LLaVA-NeXT.

    *Frames.* A video has as many tokens a frame as the model's own pooling leaves (144 of 24 x 24 patches at stride 2);
    an image is one frame.
    """
