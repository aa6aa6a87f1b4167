"""arithmetic-mini: word problems of one to four steps, judged by the number behind `####`.

The language is that of `tiny-dllm` and its causal twin (models/embedded/tiny_dllm/data.py): every
word and every digit a token. No pair of operands of an item is in any training problem, so sums are
worked out, not remembered. Template words are all but certain once the problem is read; digits hang
on each other: where a decoder that writes several tokens at once can truly fail.

An answer without a number behind `####`, or with more behind it than that, is wrong: to say the
result is what is asked. One item:
    prompt "Ann has 2 3 pens . she finds 1 8 more . how many pens does she have now ?"
    result 41   steps 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from models.base import Decoding, Generation, TextGenerator
from models.embedded.tiny_dllm.data import ANSWER_LENGTH, MAX_STEPS, decode, generate
from tasks.base import Dataset, Item, Metric, Scores, Task

GENERATOR_SEED = 20251007
WARMUP_ITEMS = 4
MARKER = "####"


@dataclass(frozen=True, kw_only=True)
class ArithmeticMini(Task[TextGenerator]):
    """Work out a word problem step by step and say the result.

    Attributes:
        steps: Operations of a problem; 0 takes problems of each number of steps in turn, so that
            every prefix holds as many of each.
        max_new_tokens: Longest answer; for a masked-diffusion model the number of masks, most of
            which end up as end of text.
        number: Items.
    """

    steps: int = 0
    max_new_tokens: int = ANSWER_LENGTH
    number: int = 500

    version = "1.0"
    data = Dataset(
        source="generated", revision=str(GENERATOR_SEED), split="held-out", license="Apache-2.0"
    )
    capability = "TextGenerator"
    scale = "embedded"

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= MAX_STEPS:
            raise ValueError(
                f"steps must be 0, for all, or lie in [1, {MAX_STEPS}], got {self.steps}."
            )
        for name in ("max_new_tokens", "number"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Share of right results, and the same for each number of steps."""
        names = ["exact-match", *map(_metric_of, self._levels if not self.steps else ())]
        return tuple(Metric(name=name, unit="fraction", kind="binary") for name in names)

    @property
    def _levels(self) -> tuple[int, ...]:
        return (self.steps,) if self.steps else tuple(range(1, MAX_STEPS + 1))

    def items(self) -> Iterator[Item]:
        """Yield the problems, the numbers of steps in turn."""
        yield from self._draw(self.number, "", GENERATOR_SEED)

    def warmup_items(self) -> Iterator[Item]:
        """Yield other problems."""
        yield from self._draw(WARMUP_ITEMS, "warm-up-", GENERATOR_SEED + 1)

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        """Continue the problem by its answer."""
        decoding = Decoding(max_new_tokens=self.max_new_tokens, ignore_eos=fixed_length)
        return model.generate(model.tokenizer.encode(item.fields["prompt"]), decoding)

    def score(self, item: Item, output: str) -> Scores:
        """Return 1 if the number behind the first marker is right and nothing follows it."""
        right = float(final_number(output) == item.fields["result"])
        if self.steps:
            return {"exact-match": right}
        return {"exact-match": right, _metric_of(item.fields["steps"]): right}

    def _draw(self, number: int, name: str, seed: int) -> Iterator[Item]:
        levels = self._levels
        count = -(-number // len(levels))
        drawn = [generate(count, steps=steps, split="held-out", seed=seed) for steps in levels]
        for place in range(number):
            steps, problems = levels[place % len(levels)], drawn[place % len(levels)]
            row = place // len(levels)
            yield Item(
                f"arithmetic-mini/{name}{steps}-{row}",
                {
                    "prompt": decode(problems.prompts[row]),
                    "result": int(problems.results[row]),
                    "steps": steps,
                },
            )


def final_number(answer: str) -> int | None:
    """Return the number behind the first `####`, digit by digit; None if there is none.

    The same as `models.embedded.tiny_dllm.data.final_number` says of ids.
    """
    _, marker, behind = answer.partition(MARKER)
    digits = behind.split()
    if (
        not marker
        or not digits
        or not all(len(each) == 1 and each in "0123456789" for each in digits)
    ):
        return None
    return int("".join(digits))


def _metric_of(steps: int) -> str:
    return f"exact-match-{steps}"
