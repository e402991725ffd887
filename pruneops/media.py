"""The images and videos of a call: how many tokens and frames each has, and which placeholders are whose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruneops.ragged import image_runs, to_device

MODALITIES = ("image", "video")
#: Where the features of videos carry how many frames each of them has, if their shape does not say so.
_FRAMES_ATTRIBUTE = "pruneops_num_frames"


@dataclass(frozen=True)
class Medium:
    """An image or a video as it stands in a prompt.

    Attributes
    ----------
    tokens : int
        Placeholders it has.
    frames : int
        1 for an image.
    separators : int
        How many of the tokens, the last ones, separate it from what follows: text, not part of any frame.
    """

    tokens: int
    frames: int = 1
    separators: int = 0


class MediaNotes:
    """What is known of the call under way: all that leads to a numbered mask of its images and videos, and its text.

    Attributes
    ----------
    media : dict
        ``"image"`` and ``"video"``: the media of that kind in order of appearance in the batch.
    placeholders : dict
        ``"image"`` and ``"video"``: ``(batch, length)`` bool, True at placeholders of that kind.
    input_ids : Tensor or None
        ``(batch, length)``, if the method asks for tokens.
    """

    def __init__(self) -> None:
        self.media: dict[str, list[Medium]] = {}
        self.placeholders: dict[str, Tensor] = {}
        self.input_ids: Tensor | None = None

    def clear(self) -> None:
        self.media, self.placeholders, self.input_ids = {}, {}, None

    def note_features(self, model: nn.Module, modality: str, outputs: Any) -> None:
        """Take down what the encoder made of all images, or of all videos."""
        media = _media_of(model, modality, outputs)
        if media is not None:
            self.media[modality] = media

    def number(self) -> tuple[Tensor, list[int]] | None:
        """Number the images and videos of each row, and forget them.

        Returns
        -------
        (Tensor, list of int) or None
            ``(batch, length)`` int64: 0 for text, i for the row's i-th image or video; and the frames of all of them
            in order of appearance in the batch. None if there are no placeholders.

        Raises
        ------
        ValueError
            If there are more or fewer placeholders than tokens, or if those of one image or video lie in two rows or
            between those of another.
        """
        placeholders, media = self.placeholders, self.media
        self.clear()
        return number_media(placeholders, media) if placeholders else None


def mark_frames(outputs: Any, num_frames: int) -> None:
    """Let the features of videos, all of `num_frames` frames, carry that number wherever they go."""
    if getattr(outputs, "pooler_output", None) is not None:
        setattr(outputs, _FRAMES_ATTRIBUTE, num_frames)


def _media_of(model: nn.Module, modality: str, outputs: Any) -> list[Medium] | None:
    """The media behind the output of an encoder of `model`; None if it is not known."""
    features = getattr(outputs, "pooler_output", None)
    if features is None:
        return None
    if all(of_one.dim() == 3 for of_one in features):  # (frames, patches, hidden) each
        return [Medium(of_one.shape[0] * of_one.shape[1], of_one.shape[0]) for of_one in features]
    if modality == "image":
        return [Medium(len(of_one)) for of_one in features]
    if model.config.model_type == "video_llava":
        return _video_llava_videos(outputs)
    return [_video(model.config, len(of_one)) for of_one in features]


def _video(config: Any, length: int) -> Medium:
    """A video of `length` features, ``frames * patches`` of them, and one for a newline in newer OneVision models."""
    if config.model_type not in ("llava_onevision", "llava_next_video"):
        return Medium(length)
    side = config.vision_config.image_size // config.vision_config.patch_size
    if config.model_type == "llava_onevision":
        patches, separators = ((side + 1) // 2) ** 2, 1
    else:
        patches, separators = (side // config.spatial_pool_stride) ** 2, 0
    frames, rest = divmod(length, patches)
    if rest > separators:  # the caller has shortened them
        return Medium(length)
    return Medium(frames * patches + separators, frames, separators)


def _video_llava_videos(outputs: Any) -> list[Medium]:
    """Features come frame by frame, ``(videos * frames, patches, hidden)``."""
    total, patches = outputs.pooler_output.shape[:2]
    frames = getattr(outputs, _FRAMES_ATTRIBUTE, None)
    if frames is None:
        raise ValueError(
            f"mm_encoder_outputs: got {total} frames that do not say to how many videos they belong, expected "
            "pixel_values_videos, or what get_video_features of the pruned model returns"
        )
    return [Medium(frames * patches, frames)] * (total // frames)


def number_media(placeholders: dict[str, Tensor], media: dict[str, list[Medium]]) -> tuple[Tensor, list[int]]:
    """See `MediaNotes.number`. Reads the placeholders back to the host, all in one transfer.

    Where it is not known which media there are, every maximal run of placeholders is an image.
    """
    stacked = torch.stack(list(placeholders.values()))
    masks = dict(zip(placeholders, stacked.cpu(), strict=True))
    columns = stacked.shape[-1]
    found: list[tuple[str, Medium, Tensor]] = []
    for modality, mask in masks.items():
        of_kind = media.get(modality)
        of_kind = [Medium(n) for n in _run_lengths(mask)] if of_kind is None else of_kind
        found += ((name, medium, places) for name, medium, places in _places_of(modality, of_kind, mask))
    found.sort(key=lambda entry: int(entry[2][0]))
    numbers = torch.zeros(stacked.shape[1] * columns, dtype=torch.int64)
    frames: list[int] = []
    row, count, last, before = -1, 0, -1, ""
    for name, medium, places in found:
        first = int(places[0])
        if first <= last:
            raise ValueError(
                f"input_ids: placeholders of {name} lie between those of {before}, expected those of one image or "
                "video to end before the next begins"
            )
        if first // columns != row:
            row, count = first // columns, 0
        last, before = int(places[-1]), name
        visual = places[: medium.tokens - medium.separators]
        if visual.numel():
            count += 1
            numbers[visual] = count
            frames.append(medium.frames)
    return to_device(numbers.view(stacked.shape[1:]), stacked.device), frames


def _places_of(modality: str, media: list[Medium], mask: Tensor) -> Iterator[tuple[str, Medium, Tensor]]:
    """Name, medium and flat places of each of the media of one kind that have any."""
    places = mask.flatten().nonzero().squeeze(1)
    expected = sum(medium.tokens for medium in media)
    if places.numel() != expected:
        raise ValueError(
            f"input_ids: got {places.numel()} {modality} placeholders, expected {expected}, one for each token of the "
            f"{len(media)} {modality}s"
        )
    columns = mask.shape[1]
    for i, (medium, own) in enumerate(zip(media, places.split([m.tokens for m in media]), strict=True)):
        if not own.numel():
            continue
        if int(own[0]) // columns != int(own[-1]) // columns:
            raise ValueError(
                f"input_ids: the placeholders of {modality} {i} are spread over two rows, expected all {medium.tokens} "
                f"in one; the rows' numbers of placeholders do not match their {modality}s"
            )
        yield f"{modality} {i}", medium, own


def _run_lengths(mask: Tensor) -> list[int]:
    """Lengths of the maximal runs of True in each row, rows behind each other."""
    return [int(n) for row in image_runs(mask) for n in torch.unique(row[row > 0], return_counts=True)[1]]
