"""What can be said about a scene: questions with four options, captions, referring phrases.

Questions are asked only where the scene has exactly one right answer; every wrong option is
wrong. The right option stands at each of the four places equally often.
"""

from __future__ import annotations

from typing import NamedTuple

from models.embedded.scenes.generator import (
    COLOUR_NAMES,
    MAX_OBJECTS,
    PATTERNS,
    SHAPES,
    SIZES,
    WORDS,
    Draws,
    Scene,
    SceneObject,
    generate,
)

CATEGORIES = (
    "colour",
    "shape",
    "count",
    "relation",
    "quadrant",
    "number",
    "word",
    "background",
    "largest",
)
# The coarser level of MMBench's tables.
GROUPS = {
    "colour": "object",
    "shape": "object",
    "largest": "object",
    "relation": "space",
    "quadrant": "space",
    "number": "text",
    "word": "text",
    "count": "scene",
    "background": "scene",
}
LETTERS = "ABCD"
RELATIONS = ("left", "right", "above", "below")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")


class Question(NamedTuple):
    """A question, its options, four here, and the place of the right one from 0."""

    category: str
    text: str
    options: tuple[str, ...]
    answer: int

    @property
    def answer_text(self) -> str:
        """The right option's text."""
        return self.options[self.answer]


def circular(question: Question) -> list[Question]:
    """Return the question and its three copies with the options moved on, as MMBench does.

    In copy k option i of the original stands at place (i - k) mod 4.
    """
    count = len(question.options)
    return [
        question._replace(
            options=question.options[shift:] + question.options[:shift],
            answer=(question.answer - shift) % count,
        )
        for shift in range(count)
    ]


def relation(first: SceneObject, second: SceneObject) -> str | None:
    """Say where `first` lies seen from `second`, or None where no direction clearly prevails."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= 2 * abs(dy) and abs(dx) >= first.radius:
        return "left" if dx < 0 else "right"
    if abs(dy) >= 2 * abs(dx) and abs(dy) >= first.radius:
        return "above" if dy < 0 else "below"
    return None


def quadrant(item: SceneObject, size: int) -> str | None:
    """Name the quadrant of an object's centre, or None within a sixteenth of a middle line."""
    dx, dy = 2 * item.x - size, 2 * item.y - size
    if min(abs(dx), abs(dy)) * 8 < size:
        return None
    return QUADRANTS[2 * (dy > 0) + (dx > 0)]


def questions(scene: Scene, draws: Draws) -> list[Question]:
    """Ask each category that the scene can answer, relations and quadrants twice if possible.

    Args:
        scene: What is asked about.
        draws: Chooses objects, wrong options and the order of options.
    """
    asked: list[Question] = []

    def ask(category: str, text: str, right: str, wrong: list[str]) -> None:
        place = draws.below(4)
        options = [*wrong[:place], right, *wrong[place:]]
        asked.append(Question(category, text, tuple(options), place))

    items = scene.objects
    alone = [item for item in items if sum(o.shape == item.shape for o in items) == 1]
    if alone:
        item = draws.pick(alone)
        ask(
            "colour",
            f"What colour is the {item.shape}?",
            item.colour,
            _wrong(draws, item.colour, [o.colour for o in items], COLOUR_NAMES),
        )
    alone = [item for item in items if sum(o.colour == item.colour for o in items) == 1]
    if alone:
        item = draws.pick(alone)
        ask(
            "shape",
            f"What shape is the {item.colour} object?",
            item.shape,
            _wrong(draws, item.shape, [o.shape for o in items], SHAPES),
        )
    counts = [str(count) for count in range(1, MAX_OBJECTS + 1) if count != len(items)]
    ask("count", "How many objects are there?", str(len(items)), draws.sample(counts, 3))
    pairs = [
        (first, second, found)
        for first in items
        for second in items
        if first is not second and (found := relation(first, second))
    ]
    for first, second, found in draws.sample(pairs, min(2, len(pairs))):
        others = [name for name in RELATIONS if name != found]
        text = f"Where is the {first.name} relative to the {second.name}?"
        ask("relation", text, found, draws.sample(others, 3))
    placed = [(item, found) for item in items if (found := quadrant(item, scene.size))]
    for item, found in draws.sample(placed, min(2, len(placed))):
        others = [name for name in QUADRANTS if name != found]
        text = f"In which part of the image is the {item.name}?"
        ask("quadrant", text, found, draws.sample(others, 3))
    if scene.text is not None:
        kind, written = scene.text.kind, scene.text.text
        wrong = _other_numbers(draws, written) if kind == "number" else _other_words(draws, written)
        ask(kind, f"Which {kind} is written in the image?", written, wrong)
    pattern = scene.background.pattern
    others = [name for name in PATTERNS if name != pattern]
    ask("background", "What does the background look like?", pattern, draws.sample(others, 3))
    large = [item for item in items if item.size == "large"]
    if len(large) == 1 and len(items) > 1:
        names = [item.name for item in items]
        absent = [f"{colour} {shape}" for shape in SHAPES for colour in COLOUR_NAMES]
        wrong = _wrong(draws, large[0].name, names, absent)
        ask("largest", "Which object is the largest?", large[0].name, wrong)
    return asked


def asked_of(scene: Scene) -> list[Question]:
    """Return the questions that go with a scene, a function of its key."""
    return questions(scene, Draws(scene.key + "/questions"))


def held_out(
    split: str, size: int, per_category: int, family: str = "shapes"
) -> list[tuple[Scene, Question]]:
    """Return questions of a split, `per_category` of each category, by category.

    No scene is asked two questions of one category: two relations of a scene are not independent.
    """
    found: dict[str, list[tuple[Scene, Question]]] = {name: [] for name in CATEGORIES}
    index = 0
    while any(len(items) < per_category for items in found.values()):
        scene = generate(family, size, split, index)
        seen = set()
        for question in asked_of(scene):
            items = found[question.category]
            if len(items) < per_category and question.category not in seen:
                items.append((scene, question))
            seen.add(question.category)
        index += 1
    return [item for items in found.values() for item in items]


def _wrong(draws: Draws, right: str, present: list[str], known) -> list[str]:
    """Choose three wrong options, at least two from the scene where it has them."""
    near = sorted(set(present) - {right})
    chosen = draws.sample(near, min(len(near), 2 + draws.below(2)))
    rest = [name for name in known if name != right and name not in chosen]
    chosen += draws.sample(rest, 3 - len(chosen))
    return draws.sample(chosen, 3)


def _other_numbers(draws: Draws, number: str) -> list[str]:
    """Choose three numbers of the same length, most of them one digit away."""
    found: list[str] = []
    while len(found) < 3:
        if len(found) < 2:
            place = draws.below(len(number))
            other = number[:place] + str(draws.below(10)) + number[place + 1 :]
        else:
            other = "".join(str(draws.below(10)) for _ in number)
        if other[0] != "0" and other != number and other not in found:
            found.append(other)
    return draws.sample(found, 3)


def _other_words(draws: Draws, word: str) -> list[str]:
    """Choose three words, one of them a letter away where there is such a word."""
    near = [w for w in WORDS if sum(a != b for a, b in zip(w, word, strict=True)) == 1]
    chosen = draws.sample(near, min(1, len(near)))
    rest = [w for w in WORDS if w != word and w not in chosen]
    return draws.sample(chosen + draws.sample(rest, 3 - len(chosen)), 3)


def cell(item: SceneObject, size: int) -> tuple[int, int]:
    """Return the column and row of an object's centre on a grid of 10 x 10."""
    return item.x * 10 // size, item.y * 10 // size


def caption(scene: Scene) -> str:
    """Describe a scene: count, background, each object in reading order with its cell, text."""
    order = sorted(scene.objects, key=lambda item: (item.y * 10 // scene.size, item.x))
    clauses = []
    for item in order:
        column, row = cell(item, scene.size)
        clauses.append(f"{item.size} {item.name} at {column} {row}")
    count = len(order)
    text = f"{count} objects on {scene.background.pattern} background: {', '.join(clauses)}"
    if scene.text is not None:
        text += f"; the {scene.text.kind} {scene.text.text}"
    return text + "."


def resolve(scene: Scene, phrase: str) -> list[int]:
    """Return the places of the objects that a phrase names, ascending.

    A phrase is made of at most one size, one colour and one shape, or "object" for any shape.

    Raises:
        ValueError: A word is none of these.
    """
    known = (*SIZES, *COLOUR_NAMES, *SHAPES, "object")
    words = phrase.split()
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"cannot resolve {unknown} of {phrase!r}; known words: {', '.join(known)}")
    return [
        place
        for place, item in enumerate(scene.objects)
        if all(word in (item.size, item.colour, item.shape, "object") for word in words)
    ]


def referring_phrases(scene: Scene, place: int) -> list[str]:
    """Return the shortest phrases that name one object and no other; there is at least one."""
    item = scene.objects[place]
    for candidates in (
        [item.shape, f"{item.colour} object", f"{item.size} object"],
        [item.name, f"{item.size} {item.shape}", f"{item.size} {item.colour} object"],
    ):
        found = [phrase for phrase in candidates if resolve(scene, phrase) == [place]]
        if found:
            return found
    raise AssertionError("no two objects of a scene share shape and colour")


_NAMES = (
    *SHAPES,
    *(f"{colour} object" for colour in COLOUR_NAMES),
    *(f"{colour} {shape}" for shape in SHAPES for colour in COLOUR_NAMES),
)


def absent_phrases(scene: Scene, draws: Draws, count: int) -> list[str]:
    """Return phrases of the scene's kind that name no object of it, `count` different ones."""
    present: set[str] = set()
    for item in scene.objects:
        present |= {item.shape, f"{item.colour} object", item.name}
    return draws.sample([name for name in _NAMES if name not in present], count)
