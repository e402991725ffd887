"""Questions about a scene, their answers, and which of its things each answer needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pruneops.data.draws import Draws
from pruneops.data.scene import CELL, Scene, Thing
from pruneops.data.words import plural


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes
    ----------
    template : str
        Its kind, one of `TEMPLATES` or `pruneops.data.clip.CLIP_TEMPLATES`.
    text, answer : str
    evidence : tuple of int
        The things that have to be seen; for counts and descriptions all that are counted or named. Numbers count in
        ``things`` of the scene or clip.
    """

    template: str
    text: str
    answer: str
    evidence: tuple[int, ...] = ()


#: Kinds of questions about a picture, and whether few or many of its patches are needed.
TEMPLATES = {
    "colour": "few",
    "shape": "few",
    "where": "few",
    "beside": "few",
    "text": "few",
    "count": "many",
    "count_shape": "many",
    "most": "many",
    "description": "many",
}
# One of these a conversation at most: the answer to one says something about the answers to the others.
_RELATED = ("count", "count_shape", "most")


def questions(scene: Scene) -> list[Question]:
    """All questions that have one clear answer, except for the description."""
    things, plan = scene.things, scene.plan
    lone, odd, anchor = things[plan.lone_shape], things[plan.lone_colour], things[plan.anchor]
    asked = [
        Question("colour", f"What colour is the {lone.shape}?", lone.colour, (plan.lone_shape,)),
        Question("shape", f"What shape is the {odd.colour} object?", odd.shape, (plan.lone_colour,)),
        Question("where", f"Where is the {lone.shape}?", lone.region(), (plan.lone_shape,)),
    ]
    for direction, index in plan.neighbours:
        text = f"What is directly {direction} the {anchor.name}?"
        asked.append(Question("beside", text, things[index].name, (plan.anchor, index)))
    signs = [index for index, thing in enumerate(things) if thing.shape == "sign"]
    for index in signs:
        text = "What is written?" if len(signs) == 1 else f"What is written on the {things[index].colour} sign?"
        asked.append(Question("text", text, things[index].text, (index,)))
    return asked + _counts(scene)


def _counts(scene: Scene) -> list[Question]:
    things, (colour, shape) = scene.things, scene.plan.crowd
    alike = tuple(index for index, thing in enumerate(things) if thing.shape == shape)
    crowd = tuple(index for index in alike if things[index].colour == colour)
    asked = [
        Question("count", f"How many {colour} {plural(shape)} are there?", str(len(crowd)), crowd),
        Question("count_shape", f"How many {plural(shape)} are there?", str(len(alike)), alike),
    ]
    (most, first), (_, second) = Counter(thing.colour for thing in scene.shapes).most_common(2)
    if first - second >= 2:
        everything = tuple(index for index, thing in enumerate(things) if thing.shape != "sign")
        asked.append(Question("most", "Which colour is most common among the shapes?", most, everything))
    return asked


def description(scene: Scene) -> Question:
    """All things in reading order, with where they are: always more than 50 words."""
    order = sorted(range(len(scene.things)), key=lambda index: _reading_order(scene.things[index]))
    sentences = [_sentence(scene.things[index]) for index in order]
    answer = " ".join([f"The picture shows {len(scene.shapes)} shapes.", *sentences])
    return Question("description", "Describe the picture.", answer, tuple(order))


def _reading_order(thing: Thing) -> tuple[int, int]:
    cell = CELL * 8
    return thing.y // cell, thing.x // cell


def _sentence(thing: Thing) -> str:
    what = f"a {thing.colour} sign that says {thing.text}" if thing.text else f"{_article(thing.colour)} {thing.name}"
    return f"There is {what} at the {thing.region()}."


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def conversation(scene: Scene, turns: int) -> list[Question]:
    """Up to `turns` questions in random order: one of a kind, and one at most of those that give each other away."""
    draws = Draws(scene.key, "conversation")
    chosen: list[Question] = []
    for question in draws.shuffled(questions(scene)):
        kinds = {_kind(other) for other in chosen}
        if len(chosen) < turns and _kind(question) not in kinds:
            chosen.append(question)
    return chosen


def _kind(question: Question) -> str:
    return "counting" if question.template in _RELATED else question.template
