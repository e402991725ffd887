"""Frames of video files: which ones are sampled, and that they are what the file holds."""

from __future__ import annotations

import struct
import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from clips import moving_disc, number_of, numbered, write_clip

from pruneops.video import Clip, read_clip, sample_indices

# By hand: step = (total - 1) / num_frames, then int(step / 2) + round(step * i), halves to the even number.
SAMPLES = [
    (60, 16, [1, 5, 8, 12, 16, 19, 23, 27, 31, 34, 38, 42, 45, 49, 53, 56]),
    (16, 16, [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 14]),
    (11, 4, [1, 3, 6, 9]),  # 2.5 is rounded to 2, 7.5 to 8
    (8, 8, [0, 1, 2, 3, 4, 4, 5, 6]),
    (5, 8, [0, 0, 1, 2, 2, 2, 3, 4]),
    (3, 1, [1]),
    (2, 1, [0]),
    (1, 16, [0] * 16),
]


@pytest.mark.parametrize(("total", "num_frames", "expected"), SAMPLES)
def test_samples_are_those_of_the_official_evaluation(total: int, num_frames: int, expected: list[int]) -> None:
    assert sample_indices(total, num_frames) == expected


@pytest.mark.parametrize("num_frames", [1, 2, 7, 16, 64])
def test_samples_follow_numpys_rounding_and_stay_within_the_video(num_frames: int) -> None:
    for total in range(1, 400):
        step = float(total - 1) / num_frames
        samples = sample_indices(total, num_frames)
        assert samples == [int(step / 2) + int(np.round(step * i)) for i in range(num_frames)]
        assert samples == sorted(samples) and samples[0] >= 0 and samples[-1] < total


@pytest.mark.parametrize(("total", "num_frames", "name"), [(0, 4, "total"), (4, 0, "num_frames")])
def test_samples_of_nothing_are_refused(total: int, num_frames: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        sample_indices(total, num_frames)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 61])
def test_a_clip_holds_the_frames_that_its_indices_name(tmp_path: Path, count: int) -> None:
    clip = read_clip(write_clip(tmp_path / "clip.mkv", numbered(count)), 16)
    assert clip.total == count and not clip.damaged
    assert clip.indices == sample_indices(count, 16)
    assert [number_of(image) for image in clip.images] == clip.indices
    assert clip.seconds == pytest.approx([index / 24 for index in clip.indices], abs=2e-3)


LOSSY = [
    (codec, pix_fmt, suffix)
    for codec, pix_fmt, suffix in (
        ("mpeg4", "yuv420p", "avi"),
        ("mpeg4", "yuv420p", "mp4"),
        ("libx264", "yuv420p", "mp4"),
        ("libx264", "yuv420p", "ts"),
    )
    if codec in av.codecs_available
]


@pytest.mark.parametrize(("codec", "pix_fmt", "suffix"), LOSSY)
def test_usual_codecs_and_containers_are_decoded_to_their_last_frame(
    tmp_path: Path, codec: str, pix_fmt: str, suffix: str
) -> None:
    # Codecs with frames that are stored out of order hold some back until the end of the file.
    clip = read_clip(write_clip(tmp_path / f"clip.{suffix}", numbered(40, step=6), codec, pix_fmt), 40)
    assert clip.total == 40
    assert [number_of(image, step=6) for image in clip.images] == clip.indices


@pytest.mark.parametrize("size", [(33, 21), (1, 1), (7, 64)])
def test_odd_sizes_keep_their_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    frames = list(np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8))
    clip = read_clip(write_clip(tmp_path / "clip.mkv", frames), 3)
    for image, index in zip(clip.images, clip.indices, strict=True):
        assert image.mode == "RGB" and image.size == size
        np.testing.assert_array_equal(np.asarray(image), frames[index])


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)])
def test_a_video_that_says_how_it_was_held_comes_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], turns: int
) -> None:
    path = write_clip(tmp_path / "clip.mp4", moving_disc(3), "mpeg4", "yuv420p")
    stored = np.asarray(read_clip(path, 1).images[0])
    data = bytearray(path.read_bytes())
    a, b, c, d = (entry << 16 for entry in matrix)
    # The matrix of the track, 40 bytes into its header.
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    np.testing.assert_array_equal(np.asarray(read_clip(path, 1).images[0]), np.rot90(stored, turns))


def test_of_a_file_that_breaks_off_the_frames_before_the_break_are_used(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mkv", numbered(60))
    data = path.read_bytes()
    path.write_bytes(data[: int(0.7 * len(data))])
    clip = read_clip(path, 8)
    assert 8 < clip.total < 60
    assert clip.indices == sample_indices(clip.total, 8)
    assert [number_of(image) for image in clip.images] == clip.indices


def test_a_broken_packet_costs_its_frame_and_marks_the_clip_as_damaged(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.avi", moving_disc(40), "mpeg4", "yuv420p")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][10]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    clip = read_clip(path, 8)
    assert clip.damaged and clip.total == 39
    assert len(clip.images) == 8 and clip.indices == sample_indices(39, 8)


def text_file(path: Path) -> Path:
    path.write_text("frames")
    return path


def sound_file(path: Path) -> Path:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    return path


def sound_file_with_a_cover(path: Path) -> Path:
    with av.open(str(path), "w", format="mp4") as container:
        sound, cover = container.add_stream("aac", rate=16000), container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 32, 24, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.rate, samples.pts = 16000, 0
        for stream, frame in ((cover, av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")), (sound, samples)):
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def half_of_an_mp4(path: Path) -> Path:
    """Its index is at the end, so nothing can be read."""
    data = write_clip(path, moving_disc(30), "mpeg4", "yuv420p").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def header_alone(path: Path) -> Path:
    data = write_clip(path, moving_disc(4)).read_bytes()
    path.write_bytes(data[:1000])
    return path


UNUSABLE = [
    ("gone.mp4", lambda path: path, "video: no such file: .*gone.mp4"),
    ("folder", lambda path: path.mkdir() or path, "video: not a file: .*folder"),
    ("notes.mp4", text_file, "video: not a video that FFmpeg can read: .*notes.mp4: Invalid data"),
    ("empty.mp4", lambda path: path.touch() or path, "video: not a video that FFmpeg can read: .*empty.mp4"),
    ("half.mp4", half_of_an_mp4, "video: not a video that FFmpeg can read: .*half.mp4"),
    ("sound.wav", sound_file, "video: no video stream in .*sound.wav"),
    ("cover.m4a", sound_file_with_a_cover, "video: no video stream in .*cover.m4a"),
    ("header.mkv", header_alone, "video: no frame of .*header.mkv can be decoded"),
]


@pytest.mark.parametrize(("name", "make", "message"), UNUSABLE, ids=[name for name, _, _ in UNUSABLE])
def test_a_file_without_frames_is_refused_with_its_name_and_the_reason(
    tmp_path: Path, name: str, make: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_clip(make(tmp_path / name), 4)


def test_equal_files_give_equal_clips(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", moving_disc(30), "mpeg4", "yuv420p")
    first, second = read_clip(path, 5), read_clip(str(path), 5)
    assert isinstance(first, Clip) and first.indices == second.indices
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]


def test_pyav_is_imported_only_to_decode() -> None:
    code = "import sys, pruneops.video\nsys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
