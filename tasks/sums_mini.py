r"""sums-mini: additions behind a few solved ones, for models that may get another tokenizer.

A tokenizer that puts digits together makes other tokens of a number than one that sets each apart,
and a model that learned to add in one form has not learned it in the other. The arithmetic probe of
transplants (arXiv 2506.06607 has GSM8K for it), small enough for a small model.

`exact_match` wants the whole sum. `answer_bits` is what the sum and its line's end cost behind the
prompt, so it tells apart models that never get one right; to draw sums of two numbers of two digits
as they occur, without adding, would cost 7.2 bits.

One item:
    prompt "34 + 25 = 59\n17 + 80 ="   answer "97"
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from models.base import Decoding, TokenizedLM, Trace
from tasks.base import Dataset, Item, Metric, Scores, Task, Unscored

GENERATOR_SEED = 250606607
WARMUP_ITEMS = 4
# There are a hundred additions of one digit, and each stands in a prompt once.
_MOST_SHOTS = 99
# A space, four digits one by one, and the end of the line.
_MOST_TOKENS = 6


@dataclass(frozen=True)
class Answered:
    """A continuation and what the right one would have cost.

    Attributes:
        text: JSON of `answer`, what was written, and `bits`.
        trace: Of the generation.
        token_ids: Of the continuation.
    """

    text: str
    trace: Trace
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SumsMini(Task[TokenizedLM]):
    """Add two numbers as in the lines before.

    Attributes:
        digits: Of each term; no term begins with 0.
        shots: Solved additions in front.
        number: Items.
    """

    digits: int = 2
    shots: int = 4
    number: int = 40

    version = "1.0"
    data = Dataset(
        source="generated", revision=str(GENERATOR_SEED), split="test", license="Apache-2.0"
    )
    capability = "TokenizedLM"
    scale = "embedded"

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 3:
            raise ValueError(f"digits must lie in [1, 3], got {self.digits}: digits of a term.")
        if not 0 <= self.shots <= _MOST_SHOTS:
            raise ValueError(f"shots must lie in [0, {_MOST_SHOTS}], got {self.shots}.")
        if self.number < 1:
            raise ValueError(f"number must be at least 1, got {self.number}.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Sums that are right, then the cost of the right ones."""
        return (
            Metric(name="exact_match", unit="fraction", kind="binary"),
            Metric(name="answer_bits", unit="bits", kind="mean", higher_is_better=False),
        )

    def items(self) -> Iterator[Item]:
        """Yield the items; no sum is asked for that stands in front of it."""
        for number in range(self.number):
            yield self._item(f"sums-mini/{number}", number)

    def warmup_items(self) -> Iterator[Item]:
        """Yield other sums of the same form."""
        for number in range(WARMUP_ITEMS):
            yield self._item(f"sums-mini/warm-up-{number}", 1_000_000 + number)

    def call(self, model: TokenizedLM, item: Item, *, fixed_length: bool = False) -> Answered:
        """Continue the prompt, and ask what the right continuation costs.

        The prompt with its answer is coded as one text, as the tokenizer would write it; a token
        may reach over the border between the two.
        """
        prompt, answer = item.fields["prompt"], item.fields["answer"]
        decoding = Decoding(max_new_tokens=_MOST_TOKENS, ignore_eos=fixed_length)
        generation = model.generate(prompt, decoding)
        bits = sum(model.score(f"{prompt} {answer}\n").bits) - sum(model.score(prompt).bits)
        output = {"answer": generation.text, "bits": round(bits, 6)}
        return Answered(json.dumps(output), generation.trace, tuple(generation.token_ids))

    def score(self, item: Item, output: str) -> Scores:
        """Compare the first line that was written with the sum."""
        found = json.loads(output)
        bits = found["bits"]
        lines = found["answer"].strip().splitlines()
        return {
            "exact_match": float(bool(lines) and lines[0].strip() == item.fields["answer"]),
            "answer_bits": bits if math.isfinite(bits) else Unscored("the sum has no finite cost"),
        }

    def _item(self, name: str, number: int) -> Item:
        draw = random.Random(f"{GENERATOR_SEED} {self.digits} {self.shots} {number}")
        least = 10 ** (self.digits - 1) if self.digits > 1 else 0
        pairs: dict[tuple[int, int], None] = {}
        while len(pairs) <= self.shots:
            first, second = (draw.randrange(least, 10**self.digits) for _ in range(2))
            pairs[first, second] = None
        lines = [f"{first} + {second} = {first + second}" for first, second in pairs]
        question, _, answer = lines[-1].rpartition(" ")
        return Item(name, {"prompt": "\n".join([*lines[:-1], question]), "answer": answer})
