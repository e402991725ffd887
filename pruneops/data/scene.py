"""What is in a picture, and where: planned so that no question can be answered without looking."""

from __future__ import annotations

from dataclasses import dataclass

from pruneops.data.draws import Draws
from pruneops.data.glyphs import UNIT
from pruneops.data.words import COLOUR_NAMES, DIRECTIONS, REGIONS, SHAPES, SIGN_NAMES, SYLLABLES

#: Patches along a side of a picture; 24 x 24 = 576 visual tokens.
GRID = 24
#: Patches along a side of a cell. A cell holds at most one thing, which never touches that of another cell.
CELL = 3
_CELLS = GRID // CELL
# The cells of each third of the picture that are clearly inside of it.
_CLEARLY = ((0, 1), (3, 4), (6, 7))
# In eighths of a patch. Three quarters of a shape are in one patch, so that one patch is enough to know it.
_OFF = (1, 2, 6, 7, 8, 9, 10, 14)


@dataclass(frozen=True)
class Thing:
    """A coloured shape of one patch, or a sign of two patches side by side.

    Attributes
    ----------
    colour, shape : str
        ``shape`` is "sign" for a sign.
    x, y : int
        Its left upper corner in eighths of a patch. One of them at least is a multiple of 8, so that a shape lies in
        one patch or in two; in a picture, but not in a clip, at most a quarter of it lies in the second.
    text : str
        What is written on a sign.
    tint : (int, int, int)
        Added to red, green and blue.
    """

    colour: str
    shape: str
    x: int
    y: int
    text: str = ""
    tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def width(self) -> int:
        """In eighths of a patch."""
        return UNIT * (2 if self.text else 1)

    def region(self, grid: int = GRID) -> str:
        """The third of the picture, across and down, that its middle is in."""
        column = (2 * self.x + self.width) * 3 // (2 * UNIT * grid)
        row = (2 * self.y + UNIT) * 3 // (2 * UNIT * grid)
        return REGIONS[3 * row + column]


@dataclass(frozen=True)
class Plan:
    """Which of a scene's things its questions are about; numbers count in ``Scene.things``.

    Attributes
    ----------
    crowd : (str, str)
        Colour and shape that occur 0 to 6 times, all numbers alike.
    lone_shape, lone_colour : int
        The only thing of its shape, and the only one of its colour.
    anchor : int
        A thing whose colour and shape together occur once.
    neighbours : tuple of (str, int)
        Directions ("left of" ...) from the anchor, and what is next to it there.
    """

    crowd: tuple[str, str]
    lone_shape: int
    lone_colour: int
    anchor: int
    neighbours: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Scene:
    """The things of a picture, none touching another, and the key of its background.

    Attributes
    ----------
    key : str
        Equal keys give equal backgrounds.
    things : tuple of Thing
    plan : Plan
    """

    key: str
    things: tuple[Thing, ...]
    plan: Plan

    @property
    def shapes(self) -> list[Thing]:
        return [thing for thing in self.things if thing.shape != "sign"]

    @property
    def signs(self) -> list[Thing]:
        return [thing for thing in self.things if thing.shape == "sign"]


def draw_scene(key: str) -> Scene:
    """The scene of a key.

    Colours and shapes get their parts at random: what is true of one of them is as often true of every other. That,
    and the even draw of the crowd's size, the lone shape's region and the signs' texts, is why guessing does not help.
    """
    draws = Draws(key, "scene")
    crowd_colour, lone_colour, *colours = draws.shuffled(COLOUR_NAMES)
    crowd_shape, lone_shape, *shapes = draws.shuffled(SHAPES)
    common = [crowd_colour, *colours]
    free = [(column, row) for row in range(_CELLS) for column in range(_CELLS)]
    things: list[Thing] = []

    def put(colour: str, shape: str, cell: tuple[int, int], offset: tuple[int, int] | None = None) -> int:
        things.append(placed(draws, colour, shape, cell, offset))
        return len(things) - 1

    def take() -> tuple[int, int]:
        return free.pop(draws.below(len(free)))

    cell = (draws.choice(draws.choice(_CLEARLY)), draws.choice(draws.choice(_CLEARLY)))
    free.remove(cell)
    the_lone_shape = put(draws.choice(common), lone_shape, cell)

    # The anchor is surrounded by empty cells, but for its neighbours, which are in line with it.
    inside = range(1, _CELLS - 1)
    around = [(x, y) for x in inside for y in inside if abs(x - cell[0]) > 1 or abs(y - cell[1]) > 1]
    column, row = draws.choice(around)
    free = [(x, y) for x, y in free if abs(x - column) > 1 or abs(y - row) > 1]
    anchor_kind = draws.choice(colours), draws.choice(shapes)
    others = [(colour, shape) for colour in common for shape in shapes if (colour, shape) != anchor_kind]
    offset = draw_offset(draws)
    anchor = put(*anchor_kind, (column, row), offset)
    neighbours = []
    for name in draws.shuffled(tuple(DIRECTIONS))[: draws.between(2, 3)]:
        right, down = DIRECTIONS[name]
        neighbours.append((name, put(*draws.choice(others), (column + right, row + down), offset)))

    the_lone_colour = put(lone_colour, draws.choice([crowd_shape, *shapes]), take())
    for _ in range(draws.below(7)):
        put(crowd_colour, crowd_shape, take())
    # What shares only one trait with the crowd: counting needs both.
    for _ in range(draws.below(3)):
        put(draws.choice(colours), crowd_shape, take())
    for _ in range(draws.below(3)):
        put(crowd_colour, draws.choice(shapes), take())
    for _ in range(draws.below(3)):
        put(*draws.choice(others), take())
    for colour in draws.shuffled(SIGN_NAMES)[: draws.between(1, 2)]:
        column, row = take()
        text = draws.choice(SYLLABLES) + draws.choice(SYLLABLES)
        y = CELL * UNIT * row + UNIT * draws.below(2)
        things.append(Thing(colour, "sign", CELL * UNIT * column, y, text))
    plan = Plan((crowd_colour, crowd_shape), the_lone_shape, the_lone_colour, anchor, tuple(neighbours))
    return Scene(key, tuple(things), plan)


def draw_offset(draws: Draws) -> tuple[int, int]:
    """Where in its cell a shape lies, in eighths of a patch: in line with the patches across or down, and off by up to
    a quarter of a patch the other way."""
    off, aligned = draws.choice(_OFF), UNIT * draws.below(2)
    return (off, aligned) if draws.below(2) else (aligned, off)


def placed(
    draws: Draws, colour: str, shape: str, cell: tuple[int, int], offset: tuple[int, int] | None = None
) -> Thing:
    """A shape in a cell (column and row), at a random offset unless it is given."""
    right, down = offset or draw_offset(draws)
    red, green, blue = (draws.between(-18, 18) for _ in range(3))
    x, y = CELL * UNIT * cell[0] + right, CELL * UNIT * cell[1] + down
    return Thing(colour, shape, x, y, tint=(red, green, blue))
