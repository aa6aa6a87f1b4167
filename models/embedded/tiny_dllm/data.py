"""The language of `tiny-dllm`: arithmetic word problems of one to four steps, word by word.

A problem and its answer, one token a word, every digit a token:

    Ann has 2 3 pens . she finds 1 8 more . she sells 5 of them . how many pens does she have now ?
    2 3 + 1 8 = 4 1 ; 4 1 - 5 = 3 6 ; #### 3 6 <eot> <eot> ...

Template tokens are all but certain once the problem is read; digits hang on each other (carries,
the result of one step is an operand of the next), so that parallel decoding can truly fail.

Training and held-out problems share no operand pair: each triple (operation, a, b), + and * taken
without order, belongs to one of the two splits, and all steps of a problem are of its split.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Split = Literal["train", "held-out"]
Ids = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

PROMPT_LENGTH, ANSWER_LENGTH = 48, 96
MAX_STEPS = 4
# Running totals stay below 200, second operands below 100: three-digit totals occur, and carries
# into them, while the pairs remain few enough to be split.
MAX_TOTAL, MAX_OPERAND, MAX_FACTOR = 199, 99, 9
HELD_OUT_SHARE = 0.1
SPLIT_SEED = 20221

OPERATIONS = ("+", "-", "*")
# Of + and - equally many; there are few products below 200, which is why they are rare.
OPERATION_WEIGHTS = (0.45, 0.45, 0.1)

_NAMES = (
    ("Ann", "Cara", "Eva", "Gina", "Iris", "Kim", "Mia"),
    ("Ben", "Dan", "Finn", "Hugo", "Jan", "Leo", "Nick"),
)
_PRONOUNS = ("she", "he")
_NOUNS = (
    "apples", "books", "cards", "coins", "eggs", "kites", "nuts",
    "pears", "pens", "plums", "rings", "shells", "stamps", "toys",
)  # fmt: skip
_GAINS = ("finds", "buys", "gets", "wins")
_LOSSES = ("sells", "loses", "eats", "gives")

PAD, MASK, EOT = 0, 1, 2
VOCABULARY: tuple[str, ...] = (
    "<pad>", "<mask>", "<eot>",
    *"0123456789",
    *OPERATIONS, "=", ";", "####", ".", "?",
    *_NAMES[0], *_NAMES[1], *_PRONOUNS, *_NOUNS, *_GAINS, *_LOSSES,
    "has", "more", "of", "them", "then", "times", "as", "many", "how", "does", "have", "now",
)  # fmt: skip
TOKEN_ID = {word: number for number, word in enumerate(VOCABULARY)}
_DIGIT_0 = TOKEN_ID["0"]


class Problems(NamedTuple):
    """Problems as arrays, one row each.

    Attributes:
        prompts: Ids, padded on the left with PAD, (problems, PROMPT_LENGTH).
        answers: Ids, filled up with EOT, (problems, ANSWER_LENGTH).
        results: Number after `####`, (problems,).
        steps: Operations of each problem, (problems,).
        operands: (operation, a, b) of each step, -1 behind the last, (problems, MAX_STEPS, 3).
    """

    prompts: Ids
    answers: Ids
    results: Integers
    steps: Integers
    operands: Integers


def apply_operation(operation: int, first: int, second: int) -> int:
    """Return `first <operation> second`, the operation by its place in `OPERATIONS`."""
    return (first + second, first - second, first * second)[operation]


def pair_key(operation: int, first: int, second: int) -> tuple[int, int, int]:
    """Return what a step is split by: + and * do not mind the order of their operands."""
    if OPERATIONS[operation] == "-":
        return operation, first, second
    return operation, min(first, second), max(first, second)


@functools.cache
def held_out_pairs() -> frozenset[tuple[int, int, int]]:
    """Return the keys of the operand pairs that no training problem has."""
    rng = np.random.default_rng(SPLIT_SEED)
    held_out: set[tuple[int, int, int]] = set()
    for operation in range(len(OPERATIONS)):
        keys = sorted({pair_key(*step) for step in _all_steps() if step[0] == operation})
        chosen = rng.permutation(len(keys))[: round(HELD_OUT_SHARE * len(keys))]
        held_out.update(keys[number] for number in chosen)
    return frozenset(held_out)


def generate(
    count: int,
    *,
    steps: int | None,
    split: Split,
    seed: int,
    answer_length: int = ANSWER_LENGTH,
) -> Problems:
    """Draw problems.

    Args:
        count: How many.
        steps: Operations of each, in [1, MAX_STEPS]; None draws it uniformly for each problem.
        split: Which operand pairs may occur.
        seed: Of the draws. Equal seeds of different splits share nothing but the templates.
        answer_length: Columns of the answers, at least ANSWER_LENGTH.

    Raises:
        ValueError: A number is out of its range.
    """
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must lie in [1, {MAX_STEPS}] or be None, got {steps}.")
    if answer_length < ANSWER_LENGTH:
        raise ValueError(f"answer_length must be at least {ANSWER_LENGTH}, got {answer_length}.")
    rng = np.random.default_rng((seed, split == "held-out"))
    second_operands, choices = _choices(split)
    if steps is None:
        num_steps = rng.integers(1, MAX_STEPS + 1, size=count)
    else:
        num_steps = np.full(count, steps)
    prompt, answer = _Writer(count, PROMPT_LENGTH, PAD), _Writer(count, answer_length, EOT)
    everywhere = np.ones(count, dtype=np.bool_)
    gender = rng.integers(len(_NAMES), size=count)
    names = np.array([[TOKEN_ID[name] for name in group] for group in _NAMES])
    pronoun = np.array([TOKEN_ID[word] for word in _PRONOUNS])[gender]
    noun = _pick(rng, _NOUNS, count)
    # A first number without any step of this split ahead of it would leave the problem empty.
    possible_totals = np.flatnonzero((choices[:, : MAX_OPERAND + 1] > 0).any(axis=0))
    total = rng.choice(possible_totals, size=count)

    prompt.write(names[gender, rng.integers(names.shape[1], size=count)], everywhere)
    prompt.words("has", everywhere)
    prompt.number(total, everywhere)
    prompt.write(noun, everywhere)
    prompt.words(".", everywhere)
    operands = np.full((count, MAX_STEPS, 3), -1, dtype=np.int64)
    weights = np.array(OPERATION_WEIGHTS)
    for step in range(MAX_STEPS):
        active = num_steps > step
        possible = weights * (choices[:, total].T > 0)
        if step == 0 or active.any():
            assert (possible[active].sum(1) > 0).all()
        bounds = possible.cumsum(1)
        draw = rng.random(count) * bounds[:, -1]
        operation = np.minimum((draw[:, None] >= bounds).sum(1), len(OPERATIONS) - 1)
        number = (rng.random(count) * choices[operation, total]).astype(np.int64)
        second = second_operands[operation, total, number]
        gain, loss, product = (active & (operation == code) for code in range(3))
        after = np.select(
            [gain, loss, product], [total + second, total - second, total * second], total
        )
        lost = _pick(rng, _LOSSES, count)
        prompt.write(pronoun, gain | loss)
        prompt.write(np.where(gain, _pick(rng, _GAINS, count), lost), gain | loss)
        prompt.words("then", product)
        prompt.write(pronoun, product)
        prompt.words("has", product)
        prompt.number(second, active)
        prompt.words("more", gain)
        prompt.words("of them", loss)
        prompt.words("times as many", product)
        prompt.words(".", active)
        answer.number(total, active)
        answer.write(np.full(count, TOKEN_ID["+"]) + operation, active)
        answer.number(second, active)
        answer.words("=", active)
        answer.number(after, active)
        answer.words(";", active)
        operands[active, step] = np.stack([operation, total, second], axis=1)[active]
        total = after
    prompt.words("how many", everywhere)
    prompt.write(noun, everywhere)
    prompt.words("does", everywhere)
    prompt.write(pronoun, everywhere)
    prompt.words("have now ?", everywhere)
    answer.words("####", everywhere)
    answer.number(total, everywhere)
    return Problems(prompt.right_aligned(), answer.ids, total, num_steps, operands)


def encode(text: str) -> list[int]:
    """Return the ids of space-separated words.

    Raises:
        ValueError: A word is not of the language.
    """
    if unknown := [word for word in text.split() if word not in TOKEN_ID]:
        raise ValueError(f"the language of tiny-dllm has no word {unknown[0]!r}.")
    return [TOKEN_ID[word] for word in text.split()]


def decode(ids: Iterable[int]) -> str:
    """Return the words of ids up to the first EOT, padding left out."""
    words = []
    for token in ids:
        if token == EOT:
            break
        if token != PAD:
            words.append(VOCABULARY[token])
    return " ".join(words)


def final_number(answer: Sequence[int]) -> int | None:
    """Return the number after the first `####` of an answer, or None if there is none.

    It is the run of digits right behind the marker, and an EOT or the answer's end must follow:
    `#### 3 6 + <eot>` is no answer, because the model did not stop there.
    """
    tokens = [int(token) for token in answer]
    if TOKEN_ID["####"] not in tokens:
        return None
    digits = ""
    for token in tokens[tokens.index(TOKEN_ID["####"]) + 1 :]:
        if token == EOT:
            break
        if not _DIGIT_0 <= token < _DIGIT_0 + 10:
            return None
        digits += VOCABULARY[token]
    return int(digits) if digits else None


class _Writer:
    """Appends tokens to many rows at once, each at its own length."""

    def __init__(self, rows: int, width: int, filler: int) -> None:
        self.ids: Ids = np.full((rows, width), filler, dtype=np.uint8)
        self._filler = filler
        self._length = np.zeros(rows, dtype=np.int64)

    def write(self, tokens: Integers, where: npt.NDArray[np.bool_]) -> None:
        rows = np.flatnonzero(where)
        self.ids[rows, self._length[rows]] = tokens[rows]
        self._length[rows] += 1

    def words(self, text: str, where: npt.NDArray[np.bool_]) -> None:
        for word in text.split():
            self.write(np.full(len(where), TOKEN_ID[word]), where)

    def number(self, values: Integers, where: npt.NDArray[np.bool_]) -> None:
        for power in (100, 10, 1):
            self.write(_DIGIT_0 + values // power % 10, where & ((values >= power) | (power == 1)))

    def right_aligned(self) -> Ids:
        width = self.ids.shape[1]
        column = np.arange(width) - (width - self._length[:, None])
        moved = np.take_along_axis(self.ids, np.maximum(column, 0), axis=1)
        return np.where(column >= 0, moved, self._filler).astype(np.uint8)


def _pick(rng: np.random.Generator, words: Sequence[str], count: int) -> Integers:
    ids = np.array([TOKEN_ID[word] for word in words], dtype=np.int64)
    return ids[rng.integers(len(words), size=count)]


def _all_steps() -> list[tuple[int, int, int]]:
    """Return every (operation, a, b) of the language."""
    steps = []
    for first in range(1, MAX_TOTAL + 1):
        for second in range(1, MAX_OPERAND + 1):
            for operation in range(len(OPERATIONS)):
                if OPERATIONS[operation] == "*" and not 2 <= second <= MAX_FACTOR:
                    continue
                if 1 <= apply_operation(operation, first, second) <= MAX_TOTAL:
                    steps.append((operation, first, second))
    return steps


@functools.cache
def _choices(split: Split) -> tuple[Integers, Integers]:
    """Return the second operands of each operation and total, and how many there are.

    Returns:
        (operations, MAX_TOTAL + 1, most) padded with 0, and (operations, MAX_TOTAL + 1).
    """
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', got {split!r}.")
    lists: dict[tuple[int, int], list[int]] = {}
    for operation, first, second in _all_steps():
        is_held_out = pair_key(operation, first, second) in held_out_pairs()
        if is_held_out == (split == "held-out"):
            lists.setdefault((operation, first), []).append(second)
    most = max(len(seconds) for seconds in lists.values())
    table = np.zeros((len(OPERATIONS), MAX_TOTAL + 1, most), dtype=np.int64)
    counts = np.zeros((len(OPERATIONS), MAX_TOTAL + 1), dtype=np.int64)
    for (operation, first), seconds in lists.items():
        table[operation, first, : len(seconds)] = seconds
        counts[operation, first] = len(seconds)
    return table, counts
