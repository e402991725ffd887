"""Conversations in LLaVA's format: what they read like as text, and which of their tokens are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruneops.models.checkpoints.processor import IMAGE_TOKEN, SYSTEM

IGNORED = -100
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` is "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """One sample: turns that begin with the user's and alternate, and the paths of its images.

    Attributes
    ----------
    name : str
        Its id, for messages.
    turns : tuple of Turn
    images : tuple of str
        As written in the file; there is one ``<image>`` in the user's turns for each.
    """

    name: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any], index: int) -> Conversation:
        """Read an entry of a LLaVA JSON file.

        Parameters
        ----------
        record : mapping
            ``conversations``: a list of ``{"from": "human" | "gpt", "value": text}``; ``image``: a path, a list of
            paths or nothing; ``id``.
        index : int
            Its place in the file, for messages.

        Raises
        ------
        ValueError
            If it is not such an entry, or its images and ``<image>`` differ in number.
        """
        name = (
            f"sample {index} ({record['id']!r})"
            if isinstance(record, Mapping) and "id" in record
            else f"sample {index}"
        )
        if not isinstance(record, Mapping) or not isinstance(record.get("conversations"), list):
            raise ValueError(f"{name}: got no list of conversations, expected an entry of LLaVA's JSON format")
        turns = []
        for message in record["conversations"]:
            role = _ROLES.get(message.get("from")) if isinstance(message, Mapping) else None
            if role is None or not isinstance(message.get("value"), str):
                raise ValueError(
                    f"{name}: got the message {message!r}, expected {{'from': 'human' | 'gpt', 'value': text}}"
                )
            turns.append(Turn(role, message["value"].strip()))
        if turns and turns[0].role == "assistant":
            turns = turns[1:]  # as LLaVA does: an answer without a question
        if not turns or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
            raise ValueError(
                f"{name}: got turns of {[turn.role for turn in turns]}, expected user and assistant in turn"
            )
        images = record.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise ValueError(f"{name}: got the image {images!r}, expected a path or a list of paths")
        marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
        if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role == "assistant"):
            raise ValueError(f"{name}: got {IMAGE_TOKEN} in an answer, expected it in questions only")
        if marks != len(images):
            raise ValueError(f"{name}: got {len(images)} images for {marks} {IMAGE_TOKEN}, expected as many")
        return cls(name, tuple(turns), tuple(images))


def render(conversation: Conversation, eos_token: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as one text, in LLaVA's "v1" form, and where its answers lie.

    An image that is alone in its turn comes first in it, on a line of its own.

    Returns
    -------
    (str, list of (int, int))
        The text, and begin and end of every answer in it, the end-of-sequence token that follows included.
    """
    text, spans = SYSTEM + " ", []
    for turn in conversation.turns:
        if turn.role == "user":
            words = turn.text
            if words.count(IMAGE_TOKEN) == 1:
                words = f"{IMAGE_TOKEN}\n{words.replace(IMAGE_TOKEN, '').strip()}"
            text += f"USER: {words} ASSISTANT:"
        else:
            begin = len(text) + 1
            text += f" {turn.text}{eos_token}"
            spans.append((begin, len(text)))
    return text, spans


def encode(
    conversation: Conversation, images: Sequence[Any], processor: Any, max_length: int | None = None
) -> dict[str, Tensor]:
    """Token ids, labels and pixels of one conversation.

    Parameters
    ----------
    images : sequence of PIL images
        In the order of the ``<image>`` in the text.
    processor : LlavaProcessor or LlavaNextProcessor
        With a fast tokenizer, which tells where in the text a token comes from.
    max_length : int, optional
        Tokens after which the conversation is cut off, but never before the end of its last image.

    Returns
    -------
    dict of str to Tensor
        ``input_ids`` and ``labels`` ``(tokens,)`` int64 (labels -100 but for answers and their end), and with images
        what the processor makes of them (``pixel_values``, for LLaVA-NeXT ``image_sizes``).

    Raises
    ------
    ValueError
        If tokenizer and processor disagree about the text.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(f"processor: got a {type(tokenizer).__name__}, expected a fast tokenizer")
    text, spans = render(conversation, tokenizer.eos_token)
    features = dict(processor(images=list(images) or None, text=[text], return_tensors="pt"))
    input_ids = features.pop("input_ids")[0]
    features.pop("attention_mask", None)
    plain = tokenizer(text, return_offsets_mapping=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    labels, at = torch.full_like(input_ids, IGNORED), 0
    expanded = input_ids.tolist()
    for token, (begin, end) in zip(plain["input_ids"], plain["offset_mapping"], strict=True):
        if token == image_id:
            while at < len(expanded) and expanded[at] == image_id:
                at += 1
            continue
        if at >= len(expanded) or expanded[at] != token:
            raise ValueError(f"{conversation.name}: the processor and its tokenizer read the text differently")
        # A first token may hold the space before the answer, and belongs to it.
        if any(end > first and begin < last for first, last in spans):
            labels[at] = token
        at += 1
    if max_length is not None and len(expanded) > max_length:
        places = (input_ids == image_id).nonzero()
        stop = max(max_length, int(places[-1]) + 1 if len(places) else 0)
        input_ids, labels = input_ids[:stop], labels[:stop]
    return {"input_ids": input_ids, "labels": labels, **features}
