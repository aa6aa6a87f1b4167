"""Training and test material of tiny-detector as plain arrays; numpy only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from models.detector_format import quantise
from models.embedded.scenes.generator import (
    COLOUR_NAMES,
    MAX_OBJECTS,
    PACKED,
    SHAPES,
    SIZES,
    Draws,
    Scene,
    SceneObject,
    generate,
    templates,
)
from models.embedded.scenes.questions import absent_phrases, resolve
from models.embedded.tiny_detector.text import (
    MOST_PHRASES,
    OUTPUTS,
    Found,
    encode_answer,
    encode_prompt,
    prompt,
)

SIZE = 96
# What stands behind one image in training, and the tokens of each.
SLOT_KINDS = ("box", "box", "box", "point", "outline")
SLOT_TOKENS = {"box": 128, "point": 96, "outline": 96}
WORDS = sum(SLOT_TOKENS[kind] for kind in SLOT_KINDS)
_MOST_PHRASES = {kind: MOST_PHRASES[OUTPUTS[kind]] for kind in SLOT_TOKENS}
ABSENT_SHARE = 0.3


class Items(NamedTuple):
    """Scenes with packed requests; the first axis is the scene.

    Attributes:
        scene: What `Scene.pack` returns, (scenes, PACKED), int16.
        attributes: Colour counted from 1 and size, as tiny-vlm's, (scenes, 6, 2), int16.
        tokens: The slots of SLOT_KINDS one after the other, (scenes, WORDS), int16.
        answer: 1 where a token belongs to an answer, (scenes, WORDS), int16.
    """

    scene: Any
    attributes: Any
    tokens: Any
    answer: Any


@lru_cache(maxsize=1024)
def _drawn(shape: str, radius: int, kind: str) -> tuple[float, ...]:
    """Return a box, point or outline relative to the shape's centre, pixels."""
    mask: np.ndarray = templates()[SHAPES.index(shape), radius, : 2 * radius, : 2 * radius]
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    if kind == "box":
        return tuple(float(edge - radius) for edge in box)
    if kind == "point":
        return ((box[0] + box[2]) / 2 - radius, (box[1] + box[3]) / 2 - radius)
    # Eight corners: where rays from the centre, clockwise from the top, leave the shape.
    corners: list[float] = []
    reach = np.arange(0, 1.5 * radius, 0.25)
    for turn in range(8):
        dx, dy = np.sin(turn * np.pi / 4), -np.cos(turn * np.pi / 4)
        i = np.floor(reach * dx + radius).astype(int)
        j = np.floor(reach * dy + radius).astype(int)
        within = (i >= 0) & (j >= 0) & (i < 2 * radius) & (j < 2 * radius)
        inside = within & mask[j.clip(0, 2 * radius - 1), i.clip(0, 2 * radius - 1)]
        last = reach[np.nonzero(inside)[0].max()] + 0.25 if inside.any() else 0.0
        corners += [float(last * dx), float(last * dy)]
    return tuple(corners)


def geometry(item: SceneObject, kind: str) -> tuple[float, ...]:
    """Return an object's box edges, central point or outline, pixels, x before y."""
    shape = _drawn(item.shape, item.radius, kind)
    return tuple(value + (item.y if place % 2 else item.x) for place, value in enumerate(shape))


def bins(item: SceneObject, kind: str, size: int = SIZE) -> tuple[int, ...]:
    """Return an object's coordinates as bins."""
    return tuple(quantise(value, size) for value in geometry(item, kind))


def present_phrases(scene: Scene, draws: Draws) -> list[str]:
    """Return phrases that name at least one object, in random order."""
    found: dict[str, None] = {}
    for item in scene.objects:
        for phrase in (
            item.shape,
            f"{item.colour} object",
            item.name,
            f"{item.size} {item.shape}",
            f"{item.size} object",
        ):
            found[phrase] = None
    return draws.sample(list(found), len(found))


def request(scene: Scene, kind: str, draws: Draws) -> tuple[list[str], list[Found]]:
    """Draw phrases and return them with their answers.

    One request in four names all shapes, as a data set's categories are asked; the others are
    mixed phrases, some of which name nothing.
    """
    most = _MOST_PHRASES[kind]
    if most == len(SHAPES) and draws.chance(0.25):
        phrases = draws.sample(SHAPES, len(SHAPES))
    else:
        count = draws.between(1, most)
        absent = sum(draws.chance(ABSENT_SHARE) for _ in range(count))
        phrases = present_phrases(scene, draws)[: count - absent]
        phrases += absent_phrases(scene, draws, absent)
        phrases = draws.sample(phrases, len(phrases))
    return phrases, answers(scene, kind, phrases)


def answers(scene: Scene, kind: str, phrases: list[str]) -> list[Found]:
    """Return the right answer to each phrase."""
    return [
        Found(
            phrase,
            sorted(
                bins(scene.objects[place], kind, scene.size) for place in resolve(scene, phrase)
            ),
        )
        for phrase in phrases
    ]


def empty(count: int) -> Items:
    """Return arrays for `count` scenes."""
    return Items(
        np.zeros((count, PACKED), np.int16),
        np.zeros((count, MAX_OBJECTS, 2), np.int16),
        np.zeros((count, WORDS), np.int16),
        np.zeros((count, WORDS), np.int16),
    )


def make(job: tuple[str, int, int]) -> tuple[int, Items]:
    """Make scenes `first` to `first + count` of a split: (split, first, count)."""
    split, first, count = job
    items = empty(count)
    for row in range(count):
        scene = generate("shapes", SIZE, split, first + row)
        items.scene[row] = scene.pack()
        for place, item in enumerate(scene.objects):
            items.attributes[row, place] = (
                COLOUR_NAMES.index(item.colour) + 1,
                SIZES.index(item.size),
            )
        draws = Draws(scene.key + "/requests")
        start = 0
        for kind in SLOT_KINDS:
            length = SLOT_TOKENS[kind]
            phrases, found = request(scene, kind, draws)
            asked = encode_prompt(prompt(kind, phrases))
            answer = encode_answer(found)
            while len(asked) + len(answer) > length:
                phrases, found = phrases[:-1], found[:-1]
                asked, answer = encode_prompt(prompt(kind, phrases)), encode_answer(found)
            middle, end = start + len(asked), start + len(asked) + len(answer)
            items.tokens[row, start:end] = asked + answer
            items.answer[row, middle:end] = 1
            start += length
    return SIZE, items
