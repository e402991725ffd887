"""What a video model is given: the pixels of sampled frames, and a prompt with a placeholder for each of their tokens.

The processors of transformers for video models need torchvision; this one makes the same inputs with PIL, from the
files of the same checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruneops.analysis.pictures import Box, grid_boxes

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

VIDEO_MODEL_TYPES = ("llava_next_video", "llava_onevision", "video_llava")
#: What a video processor's entries mean to an image processor that takes its frames one by one.
_FRAME_FIELDS = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
_DEFAULT_SIZES = {"shortest_edge": 224}, {"height": 224, "width": 224}
_ONEVISION_SIZES = {"height": 384, "width": 384}, None


@dataclass(frozen=True)
class FrameLayout:
    """The visual tokens of a frame.

    Attributes
    ----------
    rows, columns : int
        Their grid, after the model's own pooling.
    class_tokens : int
        Tokens before those of the grid that stand for no place.
    separators : int
        Placeholders behind the last frame of a video that belong to none.
    """

    rows: int
    columns: int
    class_tokens: int = 0
    separators: int = 0

    @property
    def tokens(self) -> int:
        return self.class_tokens + self.rows * self.columns

    def boxes(self, size: tuple[int, int]) -> list[Box | None]:
        """The box of each token in a frame of `size` (width, height); None for class tokens."""
        return [None] * self.class_tokens + grid_boxes(size, self.rows, self.columns)


def frame_layout(config: Any, height: int, width: int) -> FrameLayout:
    """The tokens that a model makes of a frame of that many pixels.

    Raises
    ------
    ValueError
        If the model is not one of `VIDEO_MODEL_TYPES`, or the frame is too small for one token.
    """
    patch = config.vision_config.patch_size
    rows, columns = height // patch, width // patch
    if config.model_type == "llava_next_video":
        stride = config.spatial_pool_stride
        layout = FrameLayout(rows // stride, columns // stride)
    elif config.model_type == "llava_onevision":
        layout = FrameLayout(math.ceil(rows / 2), math.ceil(columns / 2), separators=1)
    elif config.model_type == "video_llava":
        layout = FrameLayout(rows, columns, class_tokens=1)
    else:
        raise ValueError(
            f"config: got a model of type {config.model_type!r}, expected one that takes videos: "
            f"{', '.join(VIDEO_MODEL_TYPES)}"
        )
    if not layout.rows * layout.columns:
        raise ValueError(f"config: a frame of {width} x {height} pixels is too small for one visual token")
    return layout


@dataclass(frozen=True)
class VideoReader:
    """Makes a model's inputs of questions about videos.

    Attributes
    ----------
    config
        The model's config.
    tokenizer
        Pads on the left.
    image_processor
        Resizes, crops and normalises frames, as the checkpoint's video processor says.
    chat_template : str or None
        The checkpoint's, None if it has none.
    """

    config: Any
    tokenizer: Any
    image_processor: Any
    chat_template: str | None

    @classmethod
    def from_pretrained(cls, name_or_path: str, config: Any) -> VideoReader:
        """Reads the tokenizer, the video processor's numbers and the chat template of a checkpoint.

        Raises
        ------
        OSError
            If one of these files is missing or cannot be fetched.
        """
        from transformers import AutoTokenizer, CLIPImageProcessorPil
        from transformers.processing_utils import ProcessorMixin
        from transformers.video_processing_utils import BaseVideoProcessor

        given, _ = BaseVideoProcessor.get_video_processor_dict(name_or_path)
        size, crop_size = _ONEVISION_SIZES if config.model_type == "llava_onevision" else _DEFAULT_SIZES
        fields = {"size": size, "crop_size": crop_size, "do_center_crop": crop_size is not None}
        fields |= {name: given[name] for name in _FRAME_FIELDS if given.get(name) is not None}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        of_processor, _ = ProcessorMixin.get_processor_dict(name_or_path)
        template = of_processor.get("chat_template") or tokenizer.chat_template
        return cls(config, tokenizer, CLIPImageProcessorPil(**fields), template)

    def __call__(self, videos: Sequence[Sequence[Image]], prompts: Sequence[str]) -> Any:
        """One row for each video and its prompt, padded on the left.

        Returns
        -------
        transformers.BatchFeature
            ``input_ids`` and ``attention_mask`` ``(videos, length)`` int64, ``pixel_values_videos`` ``(videos, frames,
            3, height, width)`` float32.

        Raises
        ------
        ValueError
            If videos have different numbers of frames, or frames that come out of preprocessing in different sizes.
        """
        import torch
        from transformers import BatchFeature

        pixels = [self._pixels(frames) for frames in videos]
        shapes = sorted({tuple(video.shape) for video in pixels})
        if len(shapes) != 1:
            raise ValueError(f"videos: got frames, channels, height and width {shapes}, expected the same for all")
        frames, _, height, width = shapes[0]
        layout = frame_layout(self.config, height, width)
        placeholders = frames * layout.tokens + layout.separators
        rows = [self.encode(prompt, placeholders) for prompt in prompts]
        text = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        return BatchFeature({**text, "pixel_values_videos": torch.stack(pixels)})

    def encode(self, prompt: str, placeholders: int) -> list[int]:
        """Token ids of a chat prompt with one video that has so many tokens."""
        text = self._chat(prompt)
        ids = self.tokenizer(text, add_special_tokens=not _begins_with_bos(self.tokenizer, text))["input_ids"]
        video = self.config.video_token_id
        if ids.count(video) != 1:
            raise ValueError(
                f"prompt: got {ids.count(video)} video placeholders in what the chat template made, expected 1"
            )
        at = ids.index(video)
        return [*ids[:at], *[video] * placeholders, *ids[at + 1 :]]

    def _chat(self, prompt: str) -> str:
        if self.chat_template is None:
            return f"USER: {self.tokenizer.convert_ids_to_tokens(self.config.video_token_id)}\n{prompt} ASSISTANT:"
        content = [{"type": "video"}, {"type": "text", "text": prompt}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )

    def _pixels(self, frames: Sequence[Image]) -> torch.Tensor:
        import torch

        prepare: Callable[..., Any] = self.image_processor
        # One by one: frames of one video may differ in size.
        of_each = [prepare(images=frame, return_tensors="pt")["pixel_values"][0] for frame in frames]
        sizes = sorted({tuple(frame.shape) for frame in of_each})
        if len(sizes) != 1:
            raise ValueError(f"videos: got frames of shapes {sizes}, expected the same for all frames of a video")
        return torch.stack(of_each)


def _begins_with_bos(tokenizer: Any, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
