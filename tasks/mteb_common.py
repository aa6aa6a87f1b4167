"""What tasks over embeddings share: items of texts, the encoding call, vectors as text.

The output of an item is its vectors: `2x384:` and base64 of little-endian float32, which comes back
to the bit. All metrics are of kind `corpus`: no text has a score of its own.
"""

from __future__ import annotations

import base64
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.base import InvalidOutput, TextEncoder, Trace
from tasks.base import Item, Scores, Task
from tasks.mteb_data import EmbeddingData
from tasks.mteb_scorers import Floats, Integers
from tasks.resampling import draw_counts

_WARM_UP = (
    "The lighthouse keeper wrote a letter every evening and never sent one.",
    "Boil the lentils for twenty minutes, then add salt, vinegar and chopped parsley.",
    "copper",
    "Parliament will vote next week on a new timetable for regional trains.",
    "A glacier is a body of ice that moves under its own weight; it carries stones and sand, and "
    "where it melts it leaves them behind in long ridges that farmers still plough around.",
    "Return the number of items in the queue.",
)


@dataclass(frozen=True)
class Embedded:
    """Vectors that a call returned, as text.

    Attributes:
        text: See `vectors_text`.
        token_ids: None: an encoder emits no tokens.
        trace: What was done; `texts` and `tokens` in its notes.
    """

    text: str
    trace: Trace
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EmbeddingTask(Task[TextEncoder]):
    """Texts are embedded one unit after another; what they are worth is computed from all vectors.

    A text that stands in several units is embedded in each: repeated texts are no cached ones.

    Attributes:
        units_per_item: Units (pairs or texts) that are encoded in one call. 1 is the latency of a
            single text; more is what a batch costs. Intervals resample items, so they are coarser.
    """

    units_per_item: int = 1

    capability = "TextEncoder"

    def __post_init__(self) -> None:
        if self.units_per_item < 1:
            raise ValueError(f"units_per_item must be at least 1, got {self.units_per_item}.")

    @abstractmethod
    def embedding_data(self) -> EmbeddingData:
        """Return the data, the same object at every call."""

    def items(self) -> Iterator[Item]:
        """Yield the units, `units_per_item` at a time."""
        data = self.embedding_data()
        units = data.units()
        for start in range(0, len(units), self.units_per_item):
            places = range(start, min(start + self.units_per_item, len(units)))
            yield Item(
                f"{start:05}",
                {
                    "texts": [text for place in places for text in units[place]],
                    "known": [data.known(place) for place in places],
                },
            )

    def warmup_items(self) -> Iterator[Item]:
        """Yield sentences of our own."""
        for number, text in enumerate(_WARM_UP):
            yield Item(f"warmup/{number}", {"texts": [text], "known": []})

    def call(self, model: TextEncoder, item: Item, *, fixed_length: bool = False) -> Embedded:
        """Embed the item's texts.

        Raises:
            models.base.InvalidOutput: A vector is missing or holds a number that is none.
        """
        texts = item.fields["texts"]
        encoding = model.encode(texts)
        vectors = encoding.vectors
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise InvalidOutput(f"{len(texts)} texts became vectors of shape {vectors.shape}.")
        if not np.isfinite(vectors).all():
            raise InvalidOutput("a vector holds NaN or infinity.")
        encoding.trace.notes |= {"texts": len(texts), "tokens": sum(encoding.token_counts)}
        return Embedded(vectors_text(vectors), encoding.trace)

    def score(self, item: Item, output: str) -> Scores:
        """Return nothing: all metrics are of all vectors together."""
        return {}

    def corpus(self, outputs: Mapping[str, str], draws: Integers) -> Mapping[str, Floats]:
        """Return the metrics on resampled items; see `tasks.base.Task.corpus`."""
        data = self.embedding_data()
        vectors = self.unit_vectors(outputs)
        counts = self.unit_counts(outputs, draws)
        return data.numbers(vectors, counts)

    def unit_vectors(self, outputs: Mapping[str, str]) -> dict[int, Floats]:
        """Return the vectors of each unit that was encoded, in float64."""
        units = self.embedding_data().units()
        found = {}
        for name, output in outputs.items():
            rows = vectors_of(output).astype(np.float64)
            used = 0
            for place in self._places(name, len(units)):
                found[place] = rows[used : used + len(units[place])]
                used += len(units[place])
        return found

    def unit_counts(self, outputs: Mapping[str, str], draws: Integers) -> Floats:
        """Return how often each unit is drawn, (resamples, units)."""
        units = len(self.embedding_data().units())
        items = draw_counts(draws, len(outputs))
        counts = np.zeros((len(draws), units))
        for column, name in enumerate(outputs):
            for place in self._places(name, units):
                counts[:, place] = items[:, column]
        return counts

    def _places(self, item_id: str, units: int) -> range:
        start = int(item_id)
        return range(start, min(start + self.units_per_item, units))


def vectors_text(vectors: NDArray[np.float32]) -> str:
    """Return vectors (texts, dimension) as text, see the module's docstring."""
    rows, columns = vectors.shape
    data = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
    return f"{rows}x{columns}:{base64.b64encode(data).decode('ascii')}"


def vectors_of(text: str) -> NDArray[np.float32]:
    """Return the vectors that `vectors_text` wrote, (texts, dimension), float32.

    Raises:
        ValueError: It is no such text.
    """
    shape, _, data = text.partition(":")
    rows, _, columns = shape.partition("x")
    found = np.frombuffer(base64.b64decode(data, validate=True), dtype="<f4")
    return found.reshape(int(rows), int(columns)).astype(np.float32)
