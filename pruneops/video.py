"""Frames of a video file: decoded with PyAV and sampled as video language models are evaluated.

Needs the optional extra ``pruneops[video]``, and no other program: PyAV's wheels hold FFmpeg.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Clip:
    """Sampled frames of a video file.

    Attributes
    ----------
    path : Path
    images : list of PIL.Image.Image
        RGB, upright, in the size of the video; frames may differ in size if the file says so.
    indices : list of int
        Which frames they are, counted from 0 among those that can be decoded. Not decreasing; a video that is shorter
        than the number of samples has some of its frames more than once.
    seconds : list of float or None
        When each is shown; None where the file does not say.
    total : int
        Frames that can be decoded.
    damaged : bool
        Whether there are parts of the file that cannot be.
    """

    path: Path
    images: list[Image]
    indices: list[int]
    seconds: list[float | None]
    total: int
    damaged: bool


def sample_indices(total: int, num_frames: int) -> list[int]:
    """Which of `total` frames to look at: evenly spaced, from half a step behind the start.

    With ``step = (total - 1) / num_frames``, sample i is frame ``int(step / 2) + round(step * i)``, where round takes
    halves to the even number. These are the samples of the official evaluations of PLLaVA and PruneVid (arXiv
    2412.16117). If there are fewer frames than samples, some come more than once.

    Raises
    ------
    ValueError
        If one of the numbers is below 1.
    """
    for name, value in (("total", total), ("num_frames", num_frames)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1 frame")
    step = (total - 1) / num_frames
    return [min(int(step / 2) + round(step * i), total - 1) for i in range(num_frames)]


def read_clip(path: str | Path, num_frames: int) -> Clip:
    """Decode a video file and sample frames of it.

    The file is decoded twice, since what its header says of its length is often wrong: once to count the frames, once
    to keep those sampled. Memory is that of the sampled frames.

    Parameters
    ----------
    path : str or Path
        Any file with a video stream that FFmpeg can decode; the first such stream counts. Covers of music files do not.
    num_frames : int
        Samples, at least 1.

    Raises
    ------
    ValueError
        If there is no such file, it is no media file, has no video stream, or no frame of it can be decoded.
    ModuleNotFoundError
        If PyAV is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"video: no such file: {path}")
    if not path.is_file():
        raise ValueError(f"video: not a file: {path}")
    counted = _Decoding(path)
    total = sum(1 for _ in counted.frames())
    if not total:
        why = f": {counted.error}" if counted.error else ""
        raise ValueError(f"video: no frame of {path} can be decoded{why}")
    indices = sample_indices(total, num_frames)
    sampled: dict[int, tuple[Image, float | None]] = {}
    for index, frame in enumerate(_Decoding(path).frames()):
        if index in indices:
            sampled[index] = _upright(frame), frame.time
        if index == indices[-1]:
            break
    if not set(indices) <= set(sampled):
        raise ValueError(f"video: {path} changed while it was read")
    images, seconds = zip(*(sampled[index] for index in indices), strict=True)
    return Clip(path, list(images), indices, list(seconds), total, damaged=bool(counted.error))


class _Decoding:
    """One pass over the frames of a file. ``error`` is the first reason why a part of it could not be decoded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error = ""

    def frames(self) -> Iterator[Any]:
        import av

        with _opened(self.path) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise ValueError(f"video: no video stream in {self.path}")
            stream = streams[0]
            if stream.codec_context is None:
                raise ValueError(f"video: {self.path} is in a format that this build of FFmpeg cannot decode")
            stream.thread_type = "AUTO"
            packets = container.demux(stream)
            while True:
                # A broken packet is left out, like a packet that was lost; the ones behind it are decoded.
                try:
                    decoded = next(packets).decode()
                except (StopIteration, av.error.EOFError):
                    return
                except av.error.FFmpegError as error:
                    self.error = self.error or _reason(error)
                    continue
                self.error = self.error or ("a frame is broken" if any(f.is_corrupt for f in decoded) else "")
                yield from decoded


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import av

    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise ValueError(f"video: not a video that FFmpeg can read: {path}: {_reason(error)}") from None
    with container:
        yield container


def _upright(frame: Any) -> Image:
    """The frame as it is meant to be seen: telephones store how they were held beside the picture."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
