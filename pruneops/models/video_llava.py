"""Video-LLaVA, pruned."""

from __future__ import annotations

import transformers

from pruneops.models._pruned import PrunedModelMixin


class VideoLlavaForConditionalGeneration(PrunedModelMixin, transformers.VideoLlavaForConditionalGeneration):
    """Drop-in for `transformers.VideoLlavaForConditionalGeneration` with ``from_pretrained(..., pruning=...)``.

    Images and videos may be mixed, in any order and number a row; each is ranked, merged and dropped by itself.

    *Frames.* The model keeps the class token of every frame of a video (257 tokens a frame at 16 x 16 patches): to the
    methods it is a position of the frame like any patch, so it may be merged, over time or within its frame, and
    dropped. Images come without their class token (256 tokens) and are one frame. There are no newline tokens.

    *Precomputed features.* What ``get_video_features`` returns lists frames without saying which video they are of;
    outputs given as ``mm_encoder_outputs`` have to come from the pruned model's own ``get_video_features``, which notes
    it.
    """
