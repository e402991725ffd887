"""Samples of the data set by split and number: pictures or clips, with the turns of a conversation about them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pruneops.data.clip import CLIP_GRID, FRAMES, Clip, clip_conversation, draw_clip, render_clip
from pruneops.data.labels import evidence_patches, patch_labels
from pruneops.data.questions import Question, conversation, description, references
from pruneops.data.render import check_patch_size, render
from pruneops.data.scene import GRID, Scene, draw_scene

SPLITS = ("train", "validation", "test")
#: What a sample's conversation is: several short questions about a picture, its description, questions about everything
#: in it, or questions about a clip.
KINDS = ("questions", "description", "references", "clip")


@dataclass(frozen=True)
class Sample:
    """One picture or clip with its conversation.

    Attributes
    ----------
    name : str
        Unique in the data set: seed, split and number.
    kind : str
        One of `KINDS`.
    source : Scene or Clip
    turns : tuple of Question
    patch_size : int
        Pixels along a side of a patch.
    """

    name: str
    kind: str
    source: Scene | Clip
    turns: tuple[Question, ...]
    patch_size: int

    @property
    def grid(self) -> int:
        """Patches along a side of a picture or frame."""
        return CLIP_GRID if isinstance(self.source, Clip) else GRID

    @cached_property
    def pictures(self) -> list[np.ndarray]:
        """The picture, or the clip's frames: each ``(side, side, 3)`` uint8."""
        if isinstance(self.source, Clip):
            return render_clip(self.source, self.patch_size)
        return [render(self.source.key, self.source.things, self.patch_size)]

    def labels(self, frame: int = 0) -> dict[str, np.ndarray]:
        """See `pruneops.data.patch_labels`; of a clip those of one frame."""
        things = self.source.at(frame) if isinstance(self.source, Clip) else self.source.things
        return patch_labels(things, self.grid)

    def evidence(self, turn: int) -> list[int]:
        """Numbers of the patches, row by row, that the answer of a turn is read from: what an oracle would keep.

        Raises
        ------
        ValueError
            For a clip, whose things have no one place.
        """
        if isinstance(self.source, Clip):
            raise ValueError(f"evidence: got the clip {self.name}, expected a picture")
        return evidence_patches(self.source.things, self.turns[turn].evidence)


class Samples(Sequence[Sample]):
    """The samples of a split, drawn when they are asked for.

    Sample i is the same whatever the size, and the splits of a seed, as those of two seeds, have no picture in common.

    Parameters
    ----------
    split : str
        One of `SPLITS`.
    size : int
        Number of samples.
    seed : int
        Not negative.
    kinds : sequence of str
        Of `KINDS`; sample i is of kind ``kinds[i % len(kinds)]``, so a kind that is named twice occurs twice as often.
    turns : int
        Questions in a conversation at most; a picture has up to 6 of different kinds, a clip 3, a description is one,
        and references are as many as there are.
    patch_size : int
        Pixels along a side of a patch, 8 to 32. Pictures are 24 and frames of clips 12 patches wide.
    frames : int
        Of a clip, at least 6.
    drawing : int
        Not negative; samples of another drawing have the same pictures and other questions about them.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above.
    """

    def __init__(
        self,
        split: str,
        size: int,
        *,
        seed: int = 0,
        kinds: Sequence[str] = ("questions",),
        turns: int = 4,
        patch_size: int = 8,
        frames: int = FRAMES,
        drawing: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        numbers = (
            ("size", size, 1),
            ("seed", seed, 0),
            ("turns", turns, 1),
            ("frames", frames, 6),
            ("drawing", drawing, 0),
        )
        for name, value, least in numbers:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if isinstance(kinds, str) or not kinds or any(kind not in KINDS for kind in kinds):
            raise ValueError(f"kinds must be a sequence of some of {', '.join(KINDS)}, got {kinds!r}")
        self.split, self.size, self.seed = split, size, seed
        self.kinds, self.turns, self.frames, self.drawing = tuple(kinds), turns, frames, drawing
        self.patch_size = check_patch_size(patch_size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:  # type: ignore[override]
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"index must be below {self.size}, got {index}")
        index %= self.size
        key = f"{self.seed}-{self.split}-{index:07d}"
        kind = self.kinds[index % len(self.kinds)]
        source: Scene | Clip
        if kind == "clip":
            source = draw_clip(key, self.frames)
            asked = clip_conversation(source, self.turns)
        else:
            source = draw_scene(key)
            asked = self._asked(kind, source)
        return Sample(key, kind, source, tuple(asked), self.patch_size)

    def _asked(self, kind: str, scene: Scene) -> list[Question]:
        if kind == "description":
            return [description(scene)]
        if kind == "references":
            return references(scene, self.drawing)
        return conversation(scene, self.turns, self.drawing)

    def drawn_again(self, drawing: int) -> Samples:
        """The same pictures with the questions of a later drawing, 0: the same samples."""
        again = copy.copy(self)
        again.drawing += drawing
        return again

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.size))
