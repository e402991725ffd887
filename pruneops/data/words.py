"""What the pictures' things, places and texts are called."""

from __future__ import annotations

from pruneops.data.glyphs import SHAPES

#: Colours of shapes, and the red, green and blue that they are mixed around.
COLOURS = {
    "red": (225, 30, 35),
    "orange": (250, 140, 10),
    "yellow": (250, 225, 40),
    "green": (30, 165, 50),
    "cyan": (50, 220, 225),
    "blue": (30, 60, 225),
    "purple": (135, 35, 185),
    "pink": (250, 135, 195),
}
COLOUR_NAMES = tuple(COLOURS)
#: Colours of signs: of the plate, and of the ink on it.
SIGNS = {"white": ((245, 245, 245), (15, 15, 15)), "black": ((15, 15, 15), (245, 245, 245))}
SIGN_NAMES = tuple(SIGNS)
#: A word on a sign is two of these, and each fills a patch.
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "po", "ri", "su", "te")

#: Thirds of the picture, row by row.
REGIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
#: Steps to the right and down.
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
#: What a thing of a clip does, with its steps to the right and down.
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}

NUMBERS = tuple(str(number) for number in range(31))


def plural(shape: str) -> str:
    """``"circles"``, ``"crosses"``."""
    return shape + ("es" if shape.endswith("s") else "s")


__all__ = [
    "COLOURS",
    "COLOUR_NAMES",
    "DIRECTIONS",
    "MOTIONS",
    "NUMBERS",
    "REGIONS",
    "SHAPES",
    "SIGNS",
    "SIGN_NAMES",
    "SYLLABLES",
    "plural",
]
