"""The language of `tiny-lm-retrieval`: facts among filler, said once and asked for later.

A fact is a key and its two values: `bado kimi tulo`. Every word is one token. Wherever a key comes
again its values follow, so the continuation of a text that ends in a known key is a recall. Words
are drawn anew for each text: nothing can be known but what the text says.

    <s> lupa zoga bado kimi tulo zoga neri … dafe bado        ->   kimi tulo
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

VALUES_PER_FACT: Final = 2
FACT_LENGTH: Final = 1 + VALUES_PER_FACT
NUM_KEYS, NUM_VALUES, NUM_FILLERS = 128, 256, 128
BEGIN, END, UNKNOWN = 0, 1, 2
_SPECIAL = ("<s>", "<end>", "<unknown>")
_SYLLABLES = tuple(first + second for first in "bdfgklmnprstvz" for second in "aeiou")
# Prime to the 4,900 pairs of syllables, so that no word comes twice.
_STRIDE = 1511


def _word(number: int) -> str:
    """Return a word of two syllables, another one for each number below 4,900."""
    place = number * _STRIDE % len(_SYLLABLES) ** 2
    return _SYLLABLES[place // len(_SYLLABLES)] + _SYLLABLES[place % len(_SYLLABLES)]


VOCABULARY: Final = (
    *_SPECIAL,
    *(_word(number) for number in range(NUM_KEYS + NUM_VALUES + NUM_FILLERS)),
)
FIRST_KEY: Final = len(_SPECIAL)
FIRST_VALUE: Final = FIRST_KEY + NUM_KEYS
FIRST_FILLER: Final = FIRST_VALUE + NUM_VALUES
MOST_FACTS: Final = NUM_VALUES // VALUES_PER_FACT
_IDS: Final = {word: number for number, word in enumerate(VOCABULARY)}


class Batch(NamedTuple):
    """Texts to train on.

    Attributes:
        ids: (rows, length), int64; the first column is BEGIN.
        recalled: Whether the token follows from what stands before it, (rows, length), bool.
    """

    ids: Ids
    recalled: npt.NDArray[np.bool_]


class Question(NamedTuple):
    """A context with a question about it.

    Attributes:
        context: Token ids, BEGIN first.
        key: The key asked for; prompt is context and key.
        values: The answer.
        place: Position of the fact's key in the context.
    """

    context: tuple[int, ...]
    key: int
    values: tuple[int, ...]
    place: int

    @property
    def prompt(self) -> list[int]:
        """The token ids to continue."""
        return [*self.context, self.key]


def draw_batch(
    generator: np.random.Generator,
    rows: int,
    length: int,
    most_facts: int = 24,
    least_share: float = 0.15,
) -> Batch:
    """Return texts in which facts come again.

    Each row has its own number of facts and its own share of filler; facts lie on a grid whose
    step, at least a fact's length, is drawn for the batch, so that distances take all values.

    Args:
        generator: Of the texts.
        rows: Texts.
        length: Tokens in each, BEGIN included; at least 8.
        most_facts: Largest number of facts of a text, at most `MOST_FACTS`.
        least_share: Smallest share of the grid's places that tell a fact, at most 0.95.

    Raises:
        ValueError: `length` or `most_facts` is out of range.
    """
    if length < 8:
        raise ValueError(f"length must be at least 8 tokens, got {length}.")
    _check_facts("most_facts", most_facts)
    step = int(generator.integers(FACT_LENGTH, FACT_LENGTH + 3))
    slots = (length - 1) // step
    number = generator.integers(1, most_facts + 1, rows)
    share = generator.uniform(least_share, 0.95, rows)
    keys = FIRST_KEY + _distinct(generator, rows, NUM_KEYS, most_facts)
    values = FIRST_VALUE + _distinct(generator, rows, NUM_VALUES, most_facts * VALUES_PER_FACT)
    facts = np.concatenate(
        [keys[:, :, None], values.reshape(rows, most_facts, VALUES_PER_FACT)], axis=2
    )
    which = (generator.random((rows, slots)) * number[:, None]).astype(np.int64)
    told = generator.random((rows, slots)) < share[:, None]
    counted = np.cumsum(told[:, :, None] & (which[:, :, None] == np.arange(most_facts)), axis=1)
    again = told & (np.take_along_axis(counted, which[:, :, None], axis=2)[:, :, 0] > 1)

    grid = FIRST_FILLER + generator.integers(0, NUM_FILLERS, (rows, slots, step))
    row, slot = np.nonzero(told)
    grid[row, slot, :FACT_LENGTH] = facts[row, which[row, slot]]
    recalled = np.zeros((rows, slots, step), dtype=bool)
    recalled[:, :, 1:FACT_LENGTH] = again[:, :, None]

    rest = length - 1 - slots * step
    padding = FIRST_FILLER + generator.integers(0, NUM_FILLERS, (rows, rest))
    begin = np.full((rows, 1), BEGIN)
    nothing = np.zeros((rows, 1 + rest), dtype=bool)
    return Batch(
        np.concatenate([begin, padding, grid.reshape(rows, -1)], axis=1),
        np.concatenate([nothing, recalled.reshape(rows, -1)], axis=1),
    )


def draw_question(generator: np.random.Generator, length: int, facts: int) -> Question:
    """Return a context in which each fact is told once, and a question for one of them.

    Args:
        generator: Of words and places.
        length: Tokens of the context, BEGIN included; the question comes behind them.
        facts: How many; 1 is a passkey in filler.

    Raises:
        ValueError: The facts do not fit, or there are too few words for them.
    """
    _check_facts("facts", facts)
    free = length - 1 - facts * FACT_LENGTH
    if free < 0:
        raise ValueError(
            f"{facts} facts take {facts * FACT_LENGTH} tokens and <s> one; length must be at least "
            f"that, got {length}."
        )
    keys = FIRST_KEY + generator.permutation(NUM_KEYS)[:facts]
    words = FIRST_VALUE + generator.permutation(NUM_VALUES)[: facts * VALUES_PER_FACT]
    values = words.reshape(facts, VALUES_PER_FACT)
    # Filler words before each fact: a uniform choice of the facts' places among filler and facts.
    starts = np.sort(generator.permutation(free + facts)[:facts]) - np.arange(facts)
    context = FIRST_FILLER + generator.integers(0, NUM_FILLERS, length)
    context[0] = BEGIN
    places = 1 + starts + FACT_LENGTH * np.arange(facts)
    for place, key, pair in zip(places, keys, values, strict=True):
        context[place : place + FACT_LENGTH] = (key, *pair)
    asked = int(generator.integers(facts))
    return Question(
        tuple(context.tolist()),
        int(keys[asked]),
        tuple(values[asked].tolist()),
        int(places[asked]),
    )


def encode(text: str) -> list[int]:
    """Return the ids of words apart by spaces, without BEGIN in front.

    Raises:
        ValueError: The language has no such word.
    """
    for word in text.split():
        if word not in _IDS:
            raise ValueError(f"the language of tiny-lm-retrieval has no word {word!r}.")
    return [_IDS[word] for word in text.split()]


def decode(token_ids: list[int] | tuple[int, ...]) -> str:
    """Return the words of ids, apart by spaces."""
    return " ".join(VOCABULARY[token] for token in token_ids)


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and its settings: words apart by spaces, `<s>` in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(dict(_IDS), unk_token=VOCABULARY[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{VOCABULARY[BEGIN]} $A", special_tokens=[(VOCABULARY[BEGIN], BEGIN)]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": VOCABULARY[BEGIN],
        "eos_token": VOCABULARY[END],
        "unk_token": VOCABULARY[UNKNOWN],
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _distinct(generator: np.random.Generator, rows: int, pool: int, count: int) -> Ids:
    """Return `count` different numbers below `pool` for each row."""
    return np.argsort(generator.random((rows, pool)), axis=1)[:, :count]


def _check_facts(name: str, facts: int) -> None:
    most = min(MOST_FACTS, NUM_KEYS)
    if not 1 <= facts <= most:
        raise ValueError(
            f"{name} must lie in [1, {most}], got {facts}: there are {NUM_KEYS} keys and "
            f"{NUM_VALUES} values."
        )
