"""Training and test material of tiny-vlm as plain arrays; numpy only, so workers start fast.

Every scene comes with a caption and up to ten questions, each written out twice: as a prompt
with options and a letter as its answer, and as a prompt whose answer is a word or phrase.
Training takes scenes of the split `train`; what is reported comes from `test`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from models.embedded.scenes.generator import (
    COLOUR_NAMES,
    MAX_OBJECTS,
    PACKED,
    Scene,
    generate,
)
from models.embedded.scenes.questions import CATEGORIES, LETTERS, Question, asked_of, caption
from models.embedded.tiny_vlm.text import (
    EOS,
    caption_prompt,
    direct_prompt,
    encode,
    option_prompt,
)

QUESTIONS = 10
# Tokens of the longest prompt and answer of each kind, the end token included.
LETTER_SLOT, DIRECT_SLOT, CAPTION_SLOT = 50, 24, 64


class Items(NamedTuple):
    """Scenes with their texts; the first axis is the scene, the second the question.

    Arrays of numpy, or of torch once they are on the training device.

    Attributes:
        scene: What `Scene.pack` returns, (scenes, PACKED), int16.
        attributes: Colour counted from 1 and size, zeros where absent, (scenes, 6, 2), int16.
        caption: Tokens, (scenes, CAPTION_SLOT), int16.
        caption_end: Tokens of the caption with its prompt and end, (scenes,), int16.
        category: Index into CATEGORIES, -1 where there is no question, (scenes, 10), int16.
        letter: Tokens of the prompt with options and the answer, (scenes, 10, LETTER_SLOT).
        letter_start: Tokens of that prompt, (scenes, 10): the answer's place.
        direct: Tokens of the direct prompt and its answer, (scenes, 10, DIRECT_SLOT).
        direct_start: Tokens of the direct prompt, (scenes, 10).
        direct_end: Tokens of the direct prompt, answer and end, (scenes, 10).
    """

    scene: Any
    attributes: Any
    caption: Any
    caption_end: Any
    category: Any
    letter: Any
    letter_start: Any
    direct: Any
    direct_start: Any
    direct_end: Any


def empty(count: int, num_questions: int = QUESTIONS) -> Items:
    """Return arrays for `count` scenes without questions."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((count, *shape), np.int16)

    return Items(
        scene=zeros(PACKED),
        attributes=zeros(MAX_OBJECTS, 2),
        caption=zeros(CAPTION_SLOT),
        caption_end=zeros(),
        category=zeros(num_questions) - 1,
        letter=zeros(num_questions, LETTER_SLOT),
        letter_start=zeros(num_questions) + 1,
        direct=zeros(num_questions, DIRECT_SLOT),
        direct_start=zeros(num_questions) + 1,
        direct_end=zeros(num_questions) + 1,
    )


CAPTION_START = len(encode(caption_prompt()))


def fill(items: Items, row: int, scene: Scene, asked: list[Question]) -> None:
    """Write one scene and its questions into a row."""
    items.scene[row] = scene.pack()
    for place, item in enumerate(scene.objects):
        items.attributes[row, place] = (
            COLOUR_NAMES.index(item.colour) + 1,
            item.size == "large",
        )
    words = (*encode(caption_prompt()), *encode(caption(scene)), EOS)
    items.caption[row, : len(words)] = words
    items.caption_end[row] = len(words)
    for place, question in enumerate(asked):
        items.category[row, place] = CATEGORIES.index(question.category)
        prompt = encode(option_prompt(question))
        words = (*prompt, *encode(LETTERS[question.answer]), EOS)
        items.letter[row, place, : len(words)] = words
        items.letter_start[row, place] = len(prompt)
        prompt = encode(direct_prompt(question))
        words = (*prompt, *encode(question.answer_text), EOS)
        items.direct[row, place, : len(words)] = words
        items.direct_start[row, place] = len(prompt)
        items.direct_end[row, place] = len(words)


def make(job: tuple[str, int, int, int]) -> tuple[int, Items]:
    """Make scenes `first` to `first + count` of a split: (split, size, first, count)."""
    split, size, first, count = job
    items = empty(count)
    for row in range(count):
        scene = generate("shapes", size, split, first + row)
        fill(items, row, scene, asked_of(scene))
    return size, items


def one_question_rows(items: list[tuple[Scene, Question]]) -> Items:
    """Return one row with one question for each item."""
    arrays = empty(len(items), 1)
    for row, (scene, question) in enumerate(items):
        fill(arrays, row, scene, [question])
    return arrays
