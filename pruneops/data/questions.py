"""Questions about a scene, their answers, and which of its things each answer needs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pruneops.data.draws import Draws
from pruneops.data.glyphs import SHAPES
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


def _count(things: Sequence[Thing], colour: str | None, shape: str) -> Question:
    """How many things of a shape there are, of one colour or, with None, of any."""
    found = tuple(i for i, thing in enumerate(things) if thing.shape == shape and colour in (None, thing.colour))
    kind, named = ("count", f"{colour} {plural(shape)}") if colour else ("count_shape", plural(shape))
    return Question(kind, f"How many {named} are there?", str(len(found)), found)


def _counts(scene: Scene) -> list[Question]:
    things, (colour, shape) = scene.things, scene.plan.crowd
    asked = [_count(things, colour, shape), _count(things, None, shape)]
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


def conversation(scene: Scene, turns: int, drawing: int = 0) -> list[Question]:
    """Up to `turns` questions in random order: one of a kind, and one at most of those that give each other away.

    Every `drawing` is another choice and order.
    """
    draws = _draws(scene, "conversation", drawing)
    kinds: dict[str, list[Question]] = defaultdict(list)
    for question in questions(scene):
        kinds["counting" if question.template in _RELATED else question.template].append(question)
    return [draws.choice(kinds[kind]) for kind in draws.shuffled(tuple(kinds))[:turns]]


def _draws(scene: Scene, purpose: str, drawing: int) -> Draws:
    return Draws(scene.key, purpose, *([drawing] if drawing else []))


def references(scene: Scene, drawing: int = 0) -> list[Question]:
    """Short questions about everything that can be named without mistake, in random order.

    They are those of `conversation` and their like, several times as many, so that a model looks up and counts more in
    every picture that it is trained on. A thing is asked about once, but for the anchor and its neighbours, so that
    hardly an answer stands in the words of another question. Every `drawing` is another choice and order.
    """
    draws, things = _draws(scene, "references", drawing), scene.things
    names, shapes = Counter(thing.name for thing in things), Counter(thing.shape for thing in things)
    colours = Counter(thing.colour for thing in scene.shapes)
    asked = [question for question in questions(scene) if question.template in ("beside", "text")]
    for index, thing in enumerate(things):
        if thing.text:
            continue
        possible = []
        if shapes[thing.shape] == 1:
            possible.append(Question("where", f"Where is the {thing.shape}?", thing.region(), (index,)))
            possible.append(Question("colour", f"What colour is the {thing.shape}?", thing.colour, (index,)))
        elif names[thing.name] == 1:
            possible.append(Question("where", f"Where is the {thing.name}?", thing.region(), (index,)))
        if colours[thing.colour] == 1:
            possible.append(Question("shape", f"What shape is the {thing.colour} object?", thing.shape, (index,)))
        if possible:
            asked.append(draws.choice(possible))
    colour, shape = scene.plan.crowd
    kinds = [(colour, shape), *((thing.colour, thing.shape) for thing in draws.shuffled(scene.shapes)[:2])]
    counted = [shape, *draws.shuffled(SHAPES)[:3]]
    asked += [_count(things, *kind) for kind in dict.fromkeys(kinds)]
    asked += [_count(things, None, kind) for kind in dict.fromkeys(counted)]
    return draws.shuffled(asked)
