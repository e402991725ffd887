"""Drop-in model classes: Hugging Face's own, with a ``pruning`` argument."""

from pruneops.models.llava import LlavaForConditionalGeneration
from pruneops.models.llava_next import LlavaNextForConditionalGeneration

__all__ = ["LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"]
