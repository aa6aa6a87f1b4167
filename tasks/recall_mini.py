"""recall-mini: facts told once among filler, and a question for one of them, at any length.

The language is that of `tiny-lm-retrieval` (models/embedded/tiny_lm_retrieval/data.py): made-up
words, drawn anew for each item, so that nothing can be known but what the text says. The model has
seen no text of more than 256 tokens; what it recalls from longer ones is extrapolation. Where the
fact stands is drawn uniformly, so a method that only keeps both ends recalls their share of it.

Another model sees the same words, several tokens each, without ever having learned the game.

One item:
    prompt "lupa zoga bado kimi tulo zoga … dafe bado"   values ["kimi", "tulo"]   place 3
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from models.base import Decoding, Generation, TextGenerator
from models.embedded.tiny_lm_retrieval.data import VALUES_PER_FACT, decode, draw_question
from tasks.base import Dataset, Item, Metric, Scores, Task

GENERATOR_SEED = 20241105
WARMUP_ITEMS = 4


@dataclass(frozen=True, kw_only=True)
class RecallMini(Task[TextGenerator]):
    """Recall both values of a key that was told once.

    Attributes:
        length: Tokens of the context, with `<s>`; the question, one more token, comes behind it. A
            chunk of a method that reads prompts in pieces ends where the context does if it
            divides `length`.
        facts: Facts of the context; 1 is a passkey in filler.
        number: Items.
    """

    length: int = 1024
    facts: int = 16
    number: int = 40

    version = "1.0"
    data = Dataset(
        source="generated", revision=str(GENERATOR_SEED), split="test", license="Apache-2.0"
    )
    capability = "TextGenerator"
    scale = "embedded"

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"number must be at least 1, got {self.number}.")
        # Whether so many facts fit is for the generator to say.
        draw_question(np.random.default_rng(0), self.length, self.facts)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Exact match of both values."""
        return (Metric(name="recall", unit="fraction", kind="binary"),)

    def items(self) -> Iterator[Item]:
        """Yield the items."""
        for number in range(self.number):
            yield self._item(f"recall-mini/{number}", number)

    def warmup_items(self) -> Iterator[Item]:
        """Yield other questions of the same length."""
        for number in range(WARMUP_ITEMS):
            yield self._item(f"recall-mini/warm-up-{number}", 1_000_000 + number)

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        """Continue the prompt by two words."""
        decoding = Decoding(max_new_tokens=VALUES_PER_FACT, ignore_eos=fixed_length)
        return model.generate(model.tokenizer.encode(item.fields["prompt"]), decoding)

    def score(self, item: Item, output: str) -> Scores:
        """Return 1 if the output is both values, in order."""
        return {"recall": float(output.split() == item.fields["values"])}

    def _item(self, name: str, number: int) -> Item:
        generator = np.random.default_rng([GENERATOR_SEED, self.length, self.facts, number])
        question = draw_question(generator, self.length, self.facts)
        return Item(
            name,
            {
                # The tokenizer puts `<s>` in front.
                "prompt": decode(question.prompt[1:]),
                "values": decode(question.values).split(),
                "place": question.place,
            },
        )
