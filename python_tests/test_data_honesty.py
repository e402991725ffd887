"""Questions have one clear answer, which cannot be guessed, and the splits share nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

from pruneops.data import CLIP_TEMPLATES, TEMPLATES, Question, Samples, scene_tokenizer
from pruneops.data.clip import clip_questions, draw_clip
from pruneops.data.questions import conversation, description, questions, references
from pruneops.data.scene import draw_scene
from pruneops.data.words import COLOUR_NAMES, DIRECTIONS

SHORT = {name for name in TEMPLATES if name != "description"}
SEEN, HELD_OUT = 3000, 1500
#: Answers of these are planned to be equally frequent.
EVEN = ("colour", "shape", "where", "text", "count", "most", "motion", "count_moving", "count_appearing", "first")


@pytest.fixture(scope="module")
def asked() -> dict[str, dict[str, list[Question]]]:
    """Questions by template, of pictures and clips that are seen, and of others."""
    found: dict[str, dict[str, list[Question]]] = {"seen": defaultdict(list), "held out": defaultdict(list)}
    for part, size in (("seen", SEEN), ("held out", HELD_OUT)):
        for number in range(size):
            key = f"{part} {number}"
            for question in (*questions(draw_scene(key)), *clip_questions(draw_clip(key))):
                found[part][question.template].append(question)
    return found


def guessing(seen: Iterable[Question], held_out: Iterable[Question]) -> float:
    """Accuracy of the best constant answer to each wording, learned from other pictures."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in seen:
        answers[question.text][question.answer] += 1
    best = {text: counted.most_common(1)[0][0] for text, counted in answers.items()}
    right = [best.get(question.text) == question.answer for question in held_out]
    return sum(right) / len(right)


@pytest.mark.parametrize("template", sorted(SHORT | set(CLIP_TEMPLATES)))
def test_without_looking_fewer_than_a_quarter_of_the_answers_are_right(asked, template: str) -> None:
    seen, held_out = asked["seen"][template], asked["held out"][template]
    rate = guessing(seen, held_out)
    margin = 3 * math.sqrt(max(rate, 0.01) * (1 - rate) / len(held_out))
    assert rate + margin < 0.25


@pytest.mark.parametrize("template", EVEN)
def test_answers_are_equally_frequent(asked, template: str) -> None:
    counted = Counter(question.answer for part in asked.values() for question in part[template])
    expected = sum(counted.values()) / len(counted)
    statistic = sum((count - expected) ** 2 / expected for count in counted.values())
    freedom = len(counted) - 1
    # Chi-squared, which is nearly normal: five standard deviations.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_an_earlier_answer_gives_no_later_one_away() -> None:
    """Within a conversation: after each other answer, the best guess still stays below a quarter."""
    pairs: dict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
    for sample in Samples("train", 3000, turns=6):
        turns = {turn.template: turn.answer.split()[0] for turn in sample.turns}
        assert len(turns) == len(sample.turns)
        assert len({"count", "count_shape", "most"} & set(turns)) <= 1
        for first in turns:
            for second in turns:
                if first < second:
                    pairs[first, second][turns[first] == turns[second]] += 1
    assert all(counted[True] / sum(counted.values()) < 0.25 for counted in pairs.values())


def test_splits_and_seeds_share_no_picture_and_no_scene() -> None:
    pictures, scenes = Counter[bytes](), Counter[str]()
    splits = [Samples(split, 80, seed=seed) for split in ("train", "validation", "test") for seed in (0, 1)]
    for samples in splits:
        for sample in samples:
            pictures[sample.pictures[0].tobytes()] += 1
            scenes[repr([(thing.name, thing.x, thing.y) for thing in sample.source.things])] += 1
    assert set(pictures.values()) == set(scenes.values()) == {1}
    assert len(pictures) == 480


def test_answers_are_what_is_in_the_scene() -> None:
    """Counted and looked up here once more, from the things alone."""
    for number in range(300):
        scene = draw_scene(f"answers {number}")
        shapes = scene.shapes
        for question in (*questions(scene), *references(scene)):
            words, answer = question.text.rstrip("?").split(), question.answer
            match question.template:
                case "colour":
                    assert [thing.colour for thing in shapes if thing.shape == words[-1]] == [answer]
                case "shape":
                    assert [thing.shape for thing in shapes if thing.colour == words[-2]] == [answer]
                case "where":
                    colours = set(words) & set(COLOUR_NAMES)
                    same = [thing for thing in shapes if thing.shape == words[-1]]
                    assert [thing.region() for thing in same if not colours or thing.colour in colours] == [answer]
                case "text":
                    signs = [s for s in scene.signs if len(scene.signs) == 1 or s.colour == words[-2]]
                    assert [sign.text for sign in signs] == [answer]
                case "count":
                    assert sum(thing.name == f"{words[2]} {_singular(words[3])}" for thing in shapes) == int(answer)
                case "count_shape":
                    assert sum(thing.shape == _singular(words[2]) for thing in shapes) == int(answer)
                case "most":
                    (first, most), (_, next_most) = Counter(thing.colour for thing in shapes).most_common(2)
                    assert first == answer and most >= next_most + 2
                case "beside":
                    (anchor,) = [thing for thing in shapes if thing.name == " ".join(words[-2:])]
                    direction = question.text.split("directly ")[1].split(" the ")[0]
                    right, down = DIRECTIONS[direction]
                    place = anchor.x + 24 * right, anchor.y + 24 * down
                    assert [thing.name for thing in shapes if (thing.x, thing.y) == place] == [answer]


def test_references_are_short_questions_about_everything_that_can_be_named() -> None:
    for number in range(150):
        scene = draw_scene(f"references {number}")
        asked = references(scene)
        about = [question.evidence for question in asked if question.template in ("colour", "shape", "where")]
        assert len(about) == len(set(about)) and {question.template for question in asked} <= SHORT
        names = Counter(thing.name for thing in scene.shapes)
        assert sum(count == 1 for count in names.values()) <= len(about) < len(scene.things)
        assert {number for question in asked if question.template == "text" for number in question.evidence} == {
            number for number, thing in enumerate(scene.things) if thing.text
        }


def _singular(word: str) -> str:
    return {"crosses": "cross", "pluses": "plus"}.get(word, word.removesuffix("s"))


def test_answers_about_a_clip_are_what_happens_in_it() -> None:
    for number in range(300):
        clip = draw_clip(f"answers {number}")
        begin, end = clip.at(0), clip.at(clip.frames - 1)
        moved = {a.name for a in begin for b in end if a.name == b.name and (a.x, a.y) != (b.x, b.y)}
        shown = [{thing.name for thing in clip.at(frame)} for frame in range(clip.frames)]
        order = [name for a, b in zip(shown, shown[1:], strict=False) for name in b - a]
        expected = {
            "count_moving": str(len(moved)),
            "count_appearing": str(len(order)),
            "first": order[0],
            "last": order[-1],
        }
        for question in clip_questions(clip):
            if question.template in expected:
                assert question.answer == expected[question.template]
            elif question.template == "after":
                before = question.text.split(" the ")[1].rstrip("?")
                assert order[order.index(before) + 1] == question.answer
            else:
                name = question.text.split(" the ")[1].removesuffix(" move?")
                (a,), (b,) = ([thing for thing in things if thing.name == name] for things in (begin, end))
                ways = {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up", (0, 0): "nowhere"}
                assert ways[(b.x > a.x) - (b.x < a.x), (b.y > a.y) - (b.y < a.y)] == question.answer


def test_a_description_names_everything_in_more_than_50_tokens() -> None:
    tokenizer = scene_tokenizer()
    for number in range(150):
        scene = draw_scene(f"description {number}")
        answer = description(scene).answer
        assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) > 50
        assert answer.count("There is") == len(scene.things)
        assert all((thing.text or thing.name) in answer for thing in scene.things)


def test_a_conversation_has_several_turns_and_needs_few_patches_and_many() -> None:
    turns = [conversation(draw_scene(f"turns {number}"), turns=4) for number in range(300)]
    assert {len(chosen) for chosen in turns} == {4}
    needed = Counter(TEMPLATES[question.template] for chosen in turns for question in chosen)
    assert set(needed) == {"few", "many"} and needed["many"] > 200
    assert {question.template for chosen in turns for question in chosen} == SHORT
