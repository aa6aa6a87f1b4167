"""Scenes of coloured shapes, made from a key and nothing else.

`generate(family, size, split, index)` always returns the same scene: its random numbers come
from a hash of the key, so no data file ships and any sample be made again. Which split a
scene may belong to follows from a hash of its *description* (background, objects and text,
without positions): a description seen in training never occurs in validation or test.

The family `shapes` is made of 1 to 6 objects (6 shapes x 8 colours, two sizes, no two of the same
shape and colour), maybe a number of 1 to 4 digits or a word of 3 letters, and a plain or
patterned background. Other families (widgets, stick figures, streets) join `FAMILIES` with a
function of their own and the same `Scene`.

All geometry is integer, in pixels of the image: a pixel (x, y) belongs to a shape when its centre
(x + 1/2, y + 1/2) satisfies the shape's inequality, which is evaluated in doubled coordinates.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, TypeVar

import numpy as np

from models.embedded.scenes.font import CELL, CHARACTERS

T = TypeVar("T")

# Part of every key: raising it makes other scenes. Do so whenever the generator changes.
VERSION = "1"

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 168, 62),
    "blue": (48, 84, 222),
    "yellow": (238, 214, 52),
    "purple": (150, 58, 190),
    "orange": (246, 138, 28),
    "cyan": (64, 206, 214),
    "white": (240, 240, 240),
}
COLOUR_NAMES = tuple(COLOURS)
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
MAX_OBJECTS = 6
MAX_CHARACTERS = 4

# Buckets of the description's hash, of 16. A scene belongs to exactly one split.
SPLITS = {"train": range(0, 12), "validation": range(12, 14), "test": range(14, 16)}

# Radii in pixels of a 96-pixel image; an image of 192 pixels doubles them.
_RADII = {"small": (7, 9), "large": (12, 15)}
_GROUNDS = ((58, 60, 66), (92, 92, 96), (70, 58, 48), (48, 66, 60), (84, 74, 92), (30, 32, 40))

# Common words of three letters; none is a word of the questions or the captions.
_WORD_LIST = """
bag bat bed bee bib big bug bus cab cap cat cow cub cup cut den dig dip dug ear egg elf elm
fan fig fin fit fog fox fun fur gap gas gem gum gun ham hat hen hip hog hug hut jam jar jet jig
jog jug key kid kit lab lap lid lip log lot mad man map mix mop mud mug nap net nut oak owl pan
pea peg pen pet pie pig pin pod pot pub rag ram rat rib rim rod rug sap sea sun tap tar tax tea
ten tie tin tub tug van vet wag wax web wig yak zip zoo
"""
WORDS = tuple(_WORD_LIST.split())


class SceneObject(NamedTuple):
    """One shape: names, the centre as a pixel *corner*, the radius, its colour in the image."""

    shape: str
    colour: str
    size: str
    x: int
    y: int
    radius: int
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Colour and shape, which no other object of the scene shares."""
        return f"{self.colour} {self.shape}"


class SceneText(NamedTuple):
    """A number or a word on a plate; (x, y) is the plate's upper left pixel."""

    kind: str
    text: str
    x: int
    y: int
    scale: int
    dark_on_light: bool

    @property
    def width(self) -> int:
        """Width of the plate, pixels."""
        return CELL * self.scale * len(self.text)

    @property
    def height(self) -> int:
        """Height of the plate, pixels: one cell and a row below."""
        return (CELL + 1) * self.scale


class Background(NamedTuple):
    """A colour and a pattern laid over it; what `first` to `third` mean is the pattern's."""

    pattern: str
    rgb: tuple[int, int, int]
    tone: int
    first: int
    second: int
    third: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene and the key that makes it again.

    Attributes:
        family: Kind of scene, of `FAMILIES`.
        size: Width and height of the image, pixels.
        split: Of `SPLITS`.
        index: Number within the split, from 0.
        background: What lies behind.
        objects: In painter's order: a later one covers an earlier one.
        text: The number or word, painted last, or None.
    """

    family: str
    size: int
    split: str
    index: int
    background: Background
    objects: tuple[SceneObject, ...]
    text: SceneText | None

    @property
    def key(self) -> str:
        """What regenerates the scene, as `version/family/size/split/index`."""
        return f"{VERSION}/{self.family}/{self.size}/{self.split}/{self.index}"

    @property
    def description(self) -> str:
        """What the scene shows, without positions; decides the split."""
        return _description(
            self.background.pattern,
            [(item.shape, item.colour, item.size) for item in self.objects],
            self.text.text if self.text else "",
        )

    def pack(self) -> np.ndarray:
        """Return the numbers that both renderers draw from, (PACKED,), int16."""
        ground = self.background
        row = [PATTERNS.index(ground.pattern), *ground.rgb, ground.tone, *ground[3:]]
        if self.text is None:
            row += [0] * 9
        else:
            codes = [CHARACTERS.index(character) for character in self.text.text]
            row += [len(codes), *codes, *[0] * (MAX_CHARACTERS - len(codes))]
            row += [self.text.x, self.text.y, self.text.scale, int(self.text.dark_on_light)]
        for item in self.objects:
            row += [SHAPES.index(item.shape), item.radius, item.x, item.y, *item.rgb]
        # A radius of 0 has no pixels: absent objects draw nothing.
        return np.array(row + [0] * (PACKED - len(row)), np.int16)


# Background 8, text 9, then 7 for each object: see Scene.pack.
PACKED = 17 + 7 * MAX_OBJECTS


def _description(pattern: str, objects: list[tuple[str, str, str]], text: str) -> str:
    return "|".join([pattern, text, *sorted(" ".join(item) for item in objects)])


def bucket(description: str) -> int:
    """Return the bucket of a description, 0 to 15."""
    return blake2b(description.encode(), digest_size=1).digest()[0] % 16


class Draws:
    """Random choices made of nothing but uniform numbers, so equal on every Python version."""

    def __init__(self, key: str) -> None:
        self._uniform = random.Random(
            int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
        ).random

    def below(self, count: int) -> int:
        """Return an integer in [0, count)."""
        return int(self._uniform() * count)

    def between(self, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return low + int(self._uniform() * (high - low + 1))

    def chance(self, share: float) -> bool:
        """Return True with the given probability."""
        return self._uniform() < share

    def pick(self, items: tuple[T, ...] | list[T]) -> T:
        """Return one of the items."""
        return items[int(self._uniform() * len(items))]

    def sample(self, items: tuple[T, ...] | list[T], count: int) -> list[T]:
        """Return `count` different items in random order."""
        rest = list(items)
        return [rest.pop(int(self._uniform() * len(rest))) for _ in range(count)]


def _draw_content(
    draws: Draws,
) -> tuple[str, list[tuple[str, str, str]], tuple[str, str] | None]:
    """Draw what a scene shows: the pattern, the objects, the text."""
    count = draws.between(1, MAX_OBJECTS)
    pairs = draws.sample(_PAIRS, count)
    # Scenes with exactly one large object are what "the largest" can be asked of.
    if count > 1 and draws.chance(0.4):
        large = {draws.below(count)}
    else:
        large = {place for place in range(count) if draws.chance(0.4)}
        large = set(sorted(large)[:3])
    objects = [
        (shape, colour, SIZES[place in large]) for place, (shape, colour) in enumerate(pairs)
    ]
    kind = draws.below(10)
    text = None
    if kind < 4:
        length = draws.between(1, MAX_CHARACTERS)
        # No leading zero, as a number is read and written.
        digits = str(draws.between(1, 9)) + "".join(str(draws.below(10)) for _ in range(length - 1))
        text = ("number", digits)
    elif kind < 7:
        text = ("word", draws.pick(WORDS))
    return draws.pick(PATTERNS), objects, text


_PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOUR_NAMES)


def _draw_background(draws: Draws, pattern: str, scale: int) -> Background:
    rgb = draws.pick(_GROUNDS)
    tone = draws.between(22, 36)
    if pattern == "striped":
        numbers = (draws.between(3, 6) * scale, draws.below(4), draws.below(24))
    elif pattern == "dotted":
        numbers = (draws.between(7, 10) * scale, draws.below(20), draws.below(20))
    elif pattern == "checkered":
        numbers = (draws.between(5, 9) * scale, draws.below(20), draws.below(20))
    else:
        numbers = (1, 0, 0)
    return Background(pattern, rgb, tone, *numbers)


def _place_text(draws: Draws, kind: str, text: str, size: int, scale: int) -> SceneText:
    """Place the plate; in large images it stays within one of the four crops."""
    glyph_scale = draws.between(1, scale)
    width, height = CELL * glyph_scale * len(text), (CELL + 1) * glyph_scale
    crop = size // scale
    left, top = (draws.below(scale) * crop, draws.below(scale) * crop)
    x, y = left + draws.below(crop - width + 1), top + draws.below(crop - height + 1)
    return SceneText(kind, text, x, y, glyph_scale, draws.chance(0.5))


def _place_objects(
    draws: Draws,
    contents: list[tuple[str, str, str]],
    text: SceneText | None,
    size: int,
    scale: int,
) -> tuple[SceneObject, ...] | None:
    """Place the objects apart from one another and from the text, or return None."""
    placed: list[SceneObject] = []
    # Large ones first: they are the hardest to place.
    for shape, colour, name in sorted(contents, key=lambda item: item[2]):
        low, high = _RADII[name]
        radius = draws.between(low * scale, high * scale)
        margin = radius + 1
        for _ in range(25):
            x, y = draws.between(margin, size - margin), draws.between(margin, size - margin)
            if text is not None:
                dx = max(text.x - x, 0, x - text.x - text.width)
                dy = max(text.y - y, 0, y - text.y - text.height)
                if dx * dx + dy * dy < (radius + 2) ** 2:
                    continue
            if all(
                (x - other.x) ** 2 + (y - other.y) ** 2 >= (radius + other.radius + 2) ** 2
                for other in placed
            ):
                break
        else:
            return None
        red, green, blue = COLOURS[colour]
        shade = draws.between(-10, 10)
        rgb = (min(red + shade, 255), min(green + shade, 255), min(blue + shade, 255))
        placed.append(SceneObject(shape, colour, name, x, y, radius, rgb))
    return tuple(placed)


def _generate_shapes(size: int, split: str, index: int, draws: Draws) -> Scene:
    if size % 96:
        raise ValueError(f"size must be a multiple of 96 for the family shapes, got {size}.")
    scale = size // 96
    while True:
        pattern, contents, written = _draw_content(draws)
        description = _description(pattern, contents, written[1] if written else "")
        if bucket(description) in SPLITS[split]:
            break
    background = _draw_background(draws, pattern, scale)
    while True:
        text = _place_text(draws, *written, size, scale) if written else None
        objects = _place_objects(draws, contents, text, size, scale)
        if objects is not None:
            return Scene("shapes", size, split, index, background, objects, text)


FAMILIES: dict[str, Callable[[int, str, int, Draws], Scene]] = {"shapes": _generate_shapes}


def generate(family: str, size: int, split: str, index: int) -> Scene:
    """Make the scene of a key.

    Args:
        family: Of `FAMILIES`.
        size: Width and height of the image, pixels; 96 or 192 for shapes.
        split: Of `SPLITS`.
        index: Number within the split, from 0.

    Raises:
        ValueError: The family, the split or the size does not exist.
    """
    if family not in FAMILIES:
        raise ValueError(f"no scene family {family!r}; there are {', '.join(FAMILIES)}.")
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}.")
    draws = Draws(f"{VERSION}/{family}/{size}/{split}/{index}")
    return FAMILIES[family](size, split, index, draws)


@lru_cache(maxsize=1)
def templates() -> np.ndarray:
    """Return the pixels of every shape at every radius, (6, 33, 64, 64), bool.

    `templates()[shape, radius, j, i]` says whether the pixel i right of and j below the upper
    left corner of the square around the shape belongs to it. With (u, v) the doubled offset of
    the pixel's centre and R the doubled radius: circle u² + v² <= R²; square max(|u|, |v|) <=
    0.8 R; triangle 2|u| <= v + R and v <= 0.8 R; diamond |u| + |v| <= R; cross min(|u|, |v|) <=
    0.35 R; star: at least four of a pentagon's five half-planes, all inside the circle's square.
    """
    table = np.zeros((len(SHAPES), MAX_RADIUS + 1, 2 * MAX_RADIUS, 2 * MAX_RADIUS), bool)
    # Outward normals of the pentagon inside a star that points upwards, in thousandths.
    normals = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))
    for radius in range(1, MAX_RADIUS + 1):
        doubled = 2 * radius
        offsets = 2 * np.arange(doubled) + 1 - doubled
        u, v = offsets[None, :], offsets[:, None]
        planes = sum((nx * u + ny * v <= 309 * doubled).astype(int) for nx, ny in normals)
        drawn = {
            "circle": u * u + v * v <= doubled * doubled,
            "square": 5 * np.maximum(abs(u), abs(v)) <= 4 * doubled,
            "triangle": (2 * abs(u) <= v + doubled) & (5 * v <= 4 * doubled),
            "diamond": abs(u) + abs(v) <= doubled,
            "cross": 20 * np.minimum(abs(u), abs(v)) <= 7 * doubled,
            "star": planes >= 4,
        }
        for number, shape in enumerate(SHAPES):
            table[number, radius, :doubled, :doubled] = drawn[shape]
    return table


MAX_RADIUS = 32
