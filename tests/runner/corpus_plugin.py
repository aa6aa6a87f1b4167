"""A plug-in with a task whose only metric is of all outputs together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.base import Decoding, Generation, TextGenerator
from tasks.base import Dataset, Item, Metric, Scores, Task


@dataclass(frozen=True, kw_only=True)
class Letters(Task[TextGenerator]):
    """Continue a few tokens; the metric is how much the answers' numbers of letters vary.

    Attributes:
        num_items: Number of items.
        factor: What the metric is multiplied with.
    """

    num_items: int = 5
    factor: float = 1.0

    name = "letters"
    version = "1.0"
    data = Dataset(source="generated", revision="1", split="test", license="Apache-2.0")
    capability = "TextGenerator"
    scale = "embedded"
    speed_of = "decode"
    bound_by = "bytes"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric(name="spread", unit="letters", kind="corpus"),
            Metric(name="length", unit="letters", kind="mean"),
        )

    def items(self) -> Iterator[Item]:
        for number in range(self.num_items):
            words = [f"t{(number * 31 + place * 17) % 90 + 2}" for place in range(8)]
            yield Item(f"item-{number}", {"prompt": " ".join(words)})

    def warmup_items(self) -> Iterator[Item]:
        for number in range(4):
            yield Item(f"warm-{number}", {"prompt": f"t{number + 3} t4 t{number + 9}"})

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        ids = model.tokenizer.encode(item.fields["prompt"])
        return model.generate(ids, Decoding(max_new_tokens=12, ignore_eos=fixed_length))

    def score(self, item: Item, output: str) -> Scores:
        return {"length": float(len(output))}

    def corpus(
        self, outputs: Mapping[str, str], draws: NDArray[np.int64]
    ) -> Mapping[str, NDArray[np.float64]]:
        lengths = np.array([len(output) for output in outputs.values()], dtype=np.float64)
        return {"spread": self.factor * lengths[draws].std(axis=1)}
