r"""bits-per-byte: what it costs a model, with whatever tokenizer it has, to code plain text.

The texts are passages of Python's language reference, which comes with Python (`pydoc_data`): the
first passage of each topic, then the second of each, and so on. Only passages in ASCII are taken,
so that lower-casing and splitting mean the same for every tokenizer. The texts are those of the
running Python, and the content hash tells its versions apart.

A tokenizer that drops something of a text (case, spaces) has less to code. `round_trip` says
whether the text can be had back from the tokens; where it cannot, compare within one form and
tokenizer only.

One item:
    text "The \"assert\" statement …"
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice, zip_longest
from typing import Literal, get_args

from models.base import TokenizedLM, Trace
from tasks.base import Dataset, Item, Metric, Scores, Task, Unscored

Form = Literal["plain", "lower", "words"]

WARMUP_TOPICS = 4
# A passage is whole paragraphs of at least so many bytes, cut where the next would make it twice
# as long; longer paragraphs (tables, grammars) are left out.
_MOST_PARAGRAPH_BYTES = 1500


@dataclass(frozen=True)
class CodedText:
    """A scored text as a result.

    Attributes:
        text: JSON of its bits, its number of tokens and what they decode to.
        trace: What was done to get there.
        token_ids: None: nothing is written. The tokens of the text are the tokenizer's alone, so
            outputs compared by them would be the same whatever each token cost.
    """

    text: str
    trace: Trace
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BitsPerByte(Task[TokenizedLM]):
    """Code passages of the language reference.

    Attributes:
        passages: Number of items.
        passage_bytes: Least length of a passage.
        form: `plain` is the text as it stands; `lower` is lower-cased with single spaces; `words`
            is also split at every mark of punctuation, as BERT does, which is the only form that
            an uncased WordPiece tokenizer codes without loss.
    """

    passages: int = 48
    passage_bytes: int = 400
    form: Form = "plain"

    version = "1.1"
    data = Dataset(
        source="pydoc_data.topics of the running Python",
        revision=platform.python_version(),
        split="language reference",
        license="PSF-2.0",
    )
    capability = "TokenizedLM"
    scale = "embedded"

    def __post_init__(self) -> None:
        if self.passages < 1:
            raise ValueError(f"passages must be at least 1, got {self.passages}.")
        if self.passage_bytes < 50:
            raise ValueError(f"passage_bytes must be at least 50, got {self.passage_bytes}.")
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {self.form!r}.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Bits per byte, then whether the text came back and how much a token holds."""
        return (
            Metric(name="bits_per_byte", unit="bits/byte", kind="mean", higher_is_better=False),
            Metric(name="round_trip", unit="fraction", kind="binary"),
            Metric(name="bytes_per_token", unit="bytes", kind="mean"),
        )

    def items(self) -> Iterator[Item]:
        """Yield passages, the topics in turn."""
        rows = (
            _passages(text, self.passage_bytes, name) for name, text in _topics()[WARMUP_TOPICS:]
        )
        in_turn = (item for row in zip_longest(*rows) for item in row if item is not None)
        # Topics repeat parts of each other.
        seen = {text for _, text in self._warmup_passages()}
        found = 0
        for name, text in in_turn:
            if text in seen:
                continue
            seen.add(text)
            yield Item(name, {"text": formed(text, self.form)})
            found += 1
            if found == self.passages:
                return

    def warmup_items(self) -> Iterator[Item]:
        """Yield passages of topics that are never measured."""
        for name, text in self._warmup_passages():
            yield Item(f"warmup/{name}", {"text": formed(text, self.form)})

    def _warmup_passages(self) -> Iterator[tuple[str, str]]:
        for name, text in _topics()[:WARMUP_TOPICS]:
            yield from islice(_passages(text, self.passage_bytes, name), 2)

    def call(self, model: TokenizedLM, item: Item, *, fixed_length: bool = False) -> CodedText:
        """Code the item's text; there is no length to fix."""
        scored = model.score(item.fields["text"])
        output = {
            "bits": round(sum(scored.bits), 6),
            "tokens": len(scored.bits),
            "decoded": scored.decoded,
        }
        return CodedText(json.dumps(output), scored.trace)

    def score(self, item: Item, output: str) -> Scores:
        """Return bits over the bytes of the item's own text, however much of it was coded."""
        found = json.loads(output)
        text: str = item.fields["text"]
        size = len(text.encode())
        if not found["tokens"] or not math.isfinite(found["bits"]):
            reason = Unscored("the text was not coded")
            return {metric.name: reason for metric in self.metrics}
        return {
            "bits_per_byte": found["bits"] / size,
            # Some tokenizers put a space in front of every text.
            "round_trip": float(found["decoded"].strip() == text.strip()),
            "bytes_per_token": size / found["tokens"],
        }


def formed(text: str, form: Form) -> str:
    """Return a text in one of the forms of `BitsPerByte.form`."""
    if form == "plain":
        return text
    if form == "lower":
        return " ".join(text.lower().split())
    return " ".join(re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower()))


def _passages(text: str, least_bytes: int, topic: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each passage of a topic."""
    paragraphs: list[str] = []
    number = 0
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if not paragraph.isascii() or len(paragraph) > _MOST_PARAGRAPH_BYTES:
            paragraphs = []  # a passage is text that stands together
            continue
        paragraphs.append(paragraph)
        passage = "\n\n".join(paragraphs)
        if len(passage) > 2 * least_bytes:
            paragraphs = []
        elif len(passage) >= least_bytes:
            yield f"{topic}/{number}", passage
            number += 1
            paragraphs = []


@cache
def _topics() -> tuple[tuple[str, str], ...]:
    """Return the language reference by topic, sorted; topics with the same text once."""
    from pydoc_data.topics import topics

    seen: dict[str, str] = {}
    for name, text in sorted(topics.items()):
        seen.setdefault(text, name)
    return tuple((name, text) for text, name in seen.items())
