"""Short clips: shapes that move, stay or appear before a background that stays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pruneops.data.draws import Draws
from pruneops.data.glyphs import UNIT
from pruneops.data.questions import Question
from pruneops.data.render import background, check_patch_size, paste
from pruneops.data.scene import CELL, Thing, placed
from pruneops.data.words import COLOUR_NAMES, MOTIONS, SHAPES

#: Patches along a side of a frame; 12 x 12 = 144 visual tokens, as PLLaVA pools a frame to.
CLIP_GRID = 12
FRAMES = 8
#: From the first frame on there are `_EARLY` things, of which at least one moves and one stays; up to `_LATE` appear.
_EARLY, _LATE = 6, 5
# How far movers get, in eighths of a patch; this leaves a gap to the next cell.
_WAY = 14

#: Kinds of questions about a clip, and whether few or many of its patches are needed.
CLIP_TEMPLATES = {
    "motion": "few",
    "first": "few",
    "last": "few",
    "after": "few",
    "count_moving": "many",
    "count_appearing": "many",
}


@dataclass(frozen=True)
class Clip:
    """The things of a clip, each in a cell of its own.

    Attributes
    ----------
    key : str
        Equal keys give equal backgrounds.
    frames : int
    things : tuple of Thing
        All differ in colour or shape; where they are in the first frame that shows them.
    motions : tuple of str
        What each does, of `MOTIONS`. Movers move through the whole clip, 14 eighths of a patch in all.
    appears : tuple of int
        The first frame that shows each; no two appear in the same later frame.
    asked : int
        The thing whose motion is asked for; all motions are as likely.
    """

    key: str
    frames: int
    things: tuple[Thing, ...]
    motions: tuple[str, ...]
    appears: tuple[int, ...]
    asked: int

    @property
    def late(self) -> list[int]:
        """The things that are not there from the beginning, in the order in which they appear."""
        later = [index for index, frame in enumerate(self.appears) if frame]
        return sorted(later, key=lambda index: self.appears[index])

    def at(self, frame: int) -> list[Thing]:
        """The things of a frame, where they are then."""
        shown = []
        for thing, motion, first in zip(self.things, self.motions, self.appears, strict=True):
            if first <= frame:
                right, down = MOTIONS[motion]
                step = _WAY * frame // (self.frames - 1)
                shown.append(replace(thing, x=thing.x + right * step, y=thing.y + down * step))
        return shown


def draw_clip(key: str, frames: int = FRAMES) -> Clip:
    """The clip of a key.

    Raises
    ------
    ValueError
        If there are fewer frames than things may appear in, one after the other.
    """
    if frames <= _LATE:
        raise ValueError(f"frames must be at least {_LATE + 1}, got {frames}")
    draws, cells = Draws(key, "clip"), CLIP_GRID // CELL
    places = draws.shuffled([(column, row) for row in range(cells) for column in range(cells)])
    kinds = draws.shuffled([(colour, shape) for colour in COLOUR_NAMES for shape in SHAPES])
    moving, late = draws.between(1, _EARLY - 1), draws.between(1, _LATE)
    asked_motion = draws.choice(tuple(MOTIONS))
    directions = [name for name in MOTIONS if name != "nowhere"]
    motions = [draws.choice(directions) for _ in range(moving)] + ["nowhere"] * (_EARLY - moving + late)
    asked = moving if asked_motion == "nowhere" else 0
    motions[asked] = asked_motion
    appears = [0] * _EARLY + draws.shuffled(range(1, frames))[:late]
    things = [
        _at_start(placed(draws, *kind, place), motion, place)
        for kind, place, motion in zip(kinds, places, motions, strict=False)
    ]
    return Clip(key, frames, tuple(things), tuple(motions), tuple(appears), asked)


def _at_start(thing: Thing, motion: str, cell: tuple[int, int]) -> Thing:
    """In line with the patches across its way, and at the side of its cell from which it sets out."""
    left, top = (CELL * UNIT * place for place in cell)
    right, down = MOTIONS[motion]
    if right:
        return replace(thing, x=left + (0 if right > 0 else _WAY), y=top + UNIT)
    if down:
        return replace(thing, x=left + UNIT, y=top + (0 if down > 0 else _WAY))
    return thing


def render_clip(clip: Clip, patch_size: int) -> list[np.ndarray]:
    """Its frames, each ``(12 * patch_size, 12 * patch_size, 3)`` uint8; the background is the same in all."""
    still = background(clip.key, check_patch_size(patch_size), CLIP_GRID)
    frames = []
    for number in range(clip.frames):
        frame = still.copy()
        for thing in clip.at(number):
            paste(frame, thing, patch_size)
        frames.append(frame)
    return frames


def clip_questions(clip: Clip) -> list[Question]:
    """All questions that have one clear answer."""
    things, late = clip.things, clip.late
    movers = tuple(index for index, motion in enumerate(clip.motions) if motion != "nowhere")
    asked = things[clip.asked].name
    found = [
        Question("motion", f"Which way does the {asked} move?", clip.motions[clip.asked], (clip.asked,)),
        Question("count_moving", "How many objects move?", str(len(movers)), movers),
        Question("count_appearing", "How many objects appear?", str(len(late)), tuple(late)),
        Question("first", "What appears first?", things[late[0]].name, (late[0],)),
        Question("last", "What appears last?", things[late[-1]].name, (late[-1],)),
    ]
    for before, after in zip(late, late[1:], strict=False):
        text = f"What appears next after the {things[before].name}?"
        found.append(Question("after", text, things[after].name, (before, after)))
    return found


def clip_conversation(clip: Clip, turns: int) -> list[Question]:
    """Up to `turns` questions in random order, one at most of what appears when: they give each other away."""
    draws = Draws(clip.key, "conversation")
    chosen: dict[str, Question] = {}
    for question in draws.shuffled(clip_questions(clip)):
        group = "events" if question.template in ("first", "last", "after", "count_appearing") else question.template
        if len(chosen) < turns:
            chosen.setdefault(group, question)
    return list(chosen.values())
