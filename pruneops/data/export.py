"""Samples as a folder of files: what ``examples/train_sft.py`` reads."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pruneops.data.records import picture_names, record
from pruneops.data.samples import Samples


def export(samples: Samples, folder: str | os.PathLike, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write samples as PNG files and a JSON file of LLaVA's format.

    Every file is written under another name first and then moved, so that none is ever incomplete; the JSON comes last.
    Pictures that are there already are kept, so an interrupted export goes on where it stopped.

    Parameters
    ----------
    samples : Samples
    folder : path
        Created if needed. It gets ``images/`` and ``clips/`` (8-bit RGB, PNG), ``SPLIT.json`` (LLaVA's list),
        ``SPLIT.jsonl`` (the same, one sample a line) and ``SPLIT.settings.json``. Several splits may share a folder.
    progress : callable, optional
        Called with the number of samples done and of all, after each.

    Returns
    -------
    Path
        Of ``SPLIT.json``.

    Raises
    ------
    ValueError
        If the folder is a file, or holds this split with other settings, of which pictures would be mixed up.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    _agree_on_settings(samples, folder / f"{samples.split}.settings.json")
    records = []
    for done, sample in enumerate(samples, start=1):
        paths = [folder / name for name in picture_names(sample)]
        if not all(path.exists() for path in paths):
            for path, picture in zip(paths, sample.pictures, strict=True):
                write_atomically(path, png(picture))
        records.append(record(sample))
        if progress is not None:
            progress(done, len(samples))
    lines = [json.dumps(entry) for entry in records]
    write_atomically(folder / f"{samples.split}.jsonl", ("\n".join(lines) + "\n").encode())
    target = folder / f"{samples.split}.json"
    write_atomically(target, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
    return target


def _agree_on_settings(samples: Samples, path: Path) -> None:
    """All but the size, which may grow: sample i does not depend on it."""
    names = ("seed", "kinds", "turns", "patch_size", "frames", "drawing")
    settings: dict[str, Any] = {name: getattr(samples, name) for name in names}
    settings["kinds"] = list(samples.kinds)
    if not path.exists():
        write_atomically(path, (json.dumps(settings) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{name} {found.get(name)}" for name in names if found.get(name) != settings[name]]
    except (ValueError, AttributeError):
        raise ValueError(f"folder: {path} is not what an export wrote, expected another folder") from None
    if other:
        wanted = ", ".join(f"{name} {settings[name]}" for name in names if found.get(name) != settings[name])
        raise ValueError(f"folder: {path.parent} holds {samples.split} with {', '.join(other)}, expected {wanted}")


def png(picture: np.ndarray) -> bytes:
    """A picture ``(height, width, 3)`` uint8 as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    # Noise does not compress: the fastest level is nearly as small as the best.
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that others see complete or not at all; its folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
