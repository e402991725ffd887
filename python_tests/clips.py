"""Video files for tests, rendered on the spot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np


def write_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    fps: int = 24,
) -> Path:
    """Encodes ``(height, width, 3)`` uint8 frames; with the default codec they come back exactly as they are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.pix_fmt, stream.bit_rate = pix_fmt, 8_000_000
        stream.height, stream.width = frames[0].shape[:2]
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbered(count: int, step: int = 3) -> list[np.ndarray]:
    """Frames of one grey each, by ``step`` brighter than the one before; `number_of` reads which frame one is."""
    return [np.full((24, 32, 3), step * index, np.uint8) for index in range(count)]


def number_of(image: object, step: int = 3) -> int:
    """The number of a frame of `numbered`; a lossy codec may change its grey by less than half a step."""
    return round(float(np.asarray(image).mean()) / step)


def moving_disc(
    count: int, width: int = 96, height: int = 72, cut_at: int | None = None, seed: int = 0
) -> list[np.ndarray]:
    """A bright disc on a background that stands still, apart from a cut to another one before frame ``cut_at``."""
    rng = np.random.default_rng(seed)
    scenes = [
        np.kron(rng.integers(30, 180, (6, 8, 3), dtype=np.uint8), np.ones((-(-height // 6), -(-width // 8), 1), "u1"))
        for _ in range(2)
    ]
    scenes = [scene[:height, :width] for scene in scenes]
    y, x = np.mgrid[:height, :width]
    frames = []
    for index in range(count):
        frame = scenes[cut_at is not None and index >= cut_at].copy()
        centre_x, centre_y = width * (0.2 + 0.6 * index / count), height * (0.5 + 0.25 * math.sin(index / 5))
        frame[(x - centre_x) ** 2 + (y - centre_y) ** 2 < (height / 7) ** 2] = (250, 240, 20)
        frames.append(frame)
    return frames
