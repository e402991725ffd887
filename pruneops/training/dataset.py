"""A LLaVA JSON file and its folder of images as a dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from pruneops.training.conversations import Conversation, encode


class LlavaDataset(Dataset):
    """Conversations about images, encoded when asked for.

    Parameters
    ----------
    path : str or path
        JSON: a list of ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}``; ``image`` is a path,
        a list of paths, or missing for text alone.
    image_folder : str or path, optional
        Where relative paths of images begin. None: the folder of the JSON file.
    processor : LlavaProcessor or LlavaNextProcessor
        With a fast tokenizer.
    max_length : int, optional
        See `pruneops.training.encode`.

    Raises
    ------
    ValueError
        If the file is missing or an entry is not as above (all are checked at once); when an entry is taken, if one of
        its images cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        processor: Any,
        image_folder: str | os.PathLike | None = None,
        max_length: int | None = None,
    ) -> None:
        path = Path(path)
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"data: cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"data: {path} is not JSON: {error}") from None
        if not isinstance(records, list) or not records:
            raise ValueError(f"data: {path} holds no list of samples, expected LLaVA's JSON format")
        self.conversations = [Conversation.from_record(record, index) for index, record in enumerate(records)]
        self._folder = path.parent if image_folder is None else Path(image_folder)
        self._processor = processor
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from PIL import Image, UnidentifiedImageError

        conversation, images = self.conversations[index], []
        for name in conversation.images:
            try:
                with Image.open(self._folder / name) as image:
                    images.append(image.convert("RGB"))
            except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"{conversation.name}: cannot read the image {self._folder / name}: {error}") from None
        return encode(conversation, images, self._processor, self._max_length)
