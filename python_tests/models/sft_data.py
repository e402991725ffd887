"""A few conversations about images in LLaVA's format, and a checkpoint to train on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import original_layout
from PIL import Image

from pruneops.models import checkpoints

#: Two samples with an image and two of text alone; both pairs have 14 supervised tokens (one a byte, and the end).
SAMPLES: list[dict[str, Any]] = [
    {
        "id": "a",
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": "A set"},
            {"from": "human", "value": "Of what?"},
            {"from": "gpt", "value": "c"},
        ],
    },
    {
        "id": "b",
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image>\nAnd this?"}, {"from": "gpt", "value": "Edges"}],
    },
    {"id": "c", "conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi!"}]},
    {"id": "d", "conversations": [{"from": "human", "value": "1, 2, 3?"}, {"from": "gpt", "value": "four five"}]},
]


def write_data(folder: Path) -> Path:
    """The JSON file, its images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate([(40, 20), (30, 50)]):
        Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 10 + i).convert("RGB").save(folder / f"{i}.png")
    (folder / "train.json").write_text(json.dumps(SAMPLES))
    return folder / "train.json"


def write_checkpoint(folder: Path, anyres: bool = False) -> Path:
    """A tiny p-MoD model with routers that are not zero, in Hugging Face's layout."""
    original_layout.write_original(folder / "original", anyres)
    checkpoints.convert(folder / "original", folder / "hf")
    return folder / "hf"
