"""Drop-in model classes: Hugging Face's own, with a ``pruning`` argument, and PLLaVA."""

from pruneops.models.llava import LlavaForConditionalGeneration
from pruneops.models.llava_next import LlavaNextForConditionalGeneration
from pruneops.models.llava_next_video import LlavaNextVideoForConditionalGeneration
from pruneops.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from pruneops.models.pllava import PllavaConfig, PllavaForConditionalGeneration
from pruneops.models.video_llava import VideoLlavaForConditionalGeneration

__all__ = [
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "PllavaConfig",
    "PllavaForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
]
