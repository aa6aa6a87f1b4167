"""What a task is: items, the call that the clock sees, and a pure score of its stored output."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
)

from models.base import Trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tasks.scorers import Scorer

Capability = TypeVar("Capability")

MetricKind = Literal["binary", "mean", "pass@k", "corpus"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that a task reports.

    Attributes:
        name: As the field writes it, `pass@1`.
        unit: `fraction`, `points`, `distance`, …
        kind: How scores become a number and an interval: `binary` (Wilson, McNemar), `mean`
            (paired bootstrap), `pass@k` (unbiased estimator over groups of samples of one
            problem), `corpus` (a number of all outputs together: the task's `corpus`).
        higher_is_better: Direction.
        k: The k of pass@k.
    """

    name: str
    unit: str
    kind: MetricKind
    higher_is_better: bool = True
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Where a task's data come from.

    Attributes:
        source: Hub id, package with version, or `generated`.
        revision: Commit, file hash or generator version.
        split: Part of the data.
        license: SPDX id.
    """

    source: str
    revision: str
    split: str
    license: str


@dataclass(frozen=True)
class Item:
    """One unit of a task.

    Attributes:
        id: Stable and unique within the task.
        fields: What the item holds (prompt, reference, …); JSON-able.
        group: Id of the problem that this is one sample of; the item's own id by default.
    """

    id: str
    fields: Mapping[str, Any]
    group: str = ""


class Result(Protocol):
    """What a call returns: the text or file that is scored, its ids, and a trace.

    `models.base.Generation` is one.
    """

    @property
    def text(self) -> str:
        """What is scored."""
        ...

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The new tokens; their number is the count."""
        ...

    @property
    def trace(self) -> Trace:
        """What was done to get there."""
        ...


@dataclass(frozen=True)
class Unscored:
    """An output that cannot be scored, and why; never a zero by accident."""

    reason: str


Scores = Mapping[str, "float | Unscored"]


class Scored(NamedTuple):
    """Scores of one output, and in words what happened to it (`timeout after 3 s, bubblewrap`)."""

    scores: Scores
    detail: str


@dataclass(frozen=True, kw_only=True)
class Task(ABC, Generic[Capability]):
    """A standardized task: data, protocol and metrics, with a version and a content hash.

    Fields of a subclass are the task's parameters. The first metric is the headline.

    Class attributes:
        version: Changes whenever items, prompts or scores can change.
        data: Where the items come from.
        needs: What the machine must have: `sandbox`, `extra:image`.
        capability: Name of the model capability that `call` takes.
        unnamed: Setting that a value without a name sets, `task` for `mteb:SciFact`; none if empty.
        scale: `embedded` for what any machine can run, `paper` for the conditions of publications.
        speed_of: What tables show as speed besides the whole `call`: with `decode` also the time of
            a token after the prefill, for tasks whose prefill is long.
        bound_by: What a call is charged in the bound of a speed-up: its forwards after the prefill
            by the measured lat(width, context) with `step-cost`; by the weights and cached keys and
            values that they read with `bytes`, for contexts far longer than those of the measured
            curve; the whole call by its counted `operations`, where encoding and prefill, which
            compute and do not wait for memory, are nearly all of it.
    """

    version: ClassVar[str]
    data: ClassVar[Dataset]
    needs: ClassVar[tuple[str, ...]] = ()  # what the machine must have: "sandbox", "extra:image"
    capability: ClassVar[str]  # name of the model capability: "TextGenerator"
    unnamed: ClassVar[str] = ""  # setting that a value without a name sets: `mteb:SciFact`
    scale: ClassVar[Literal["embedded", "paper"]] = "paper"
    speed_of: ClassVar[Literal["call", "decode"]] = "call"
    bound_by: ClassVar[Literal["step-cost", "bytes", "operations"]] = "step-cost"

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics, the headline first."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Yield the items in their standard order, the same on every machine."""

    @abstractmethod
    def warmup_items(self) -> Iterator[Item]:
        """Yield items that are never measured, for warm-up and calibration; at least 4."""

    @abstractmethod
    def call(self, model: Capability, item: Item, *, fixed_length: bool = False) -> Result:
        """Run the model on an item: the only part that the clock sees.

        `fixed_length` ignores natural stops, for the scenario of that name.
        """

    def stored(self, model: Capability, item: Item, result: Result) -> Result:
        """Return what is kept of a result, outside the clock; the result itself by default.

        Here outputs are written as text (pictures), and what only the model knows about its own
        output is added to it (how likely it was).

        Args:
            model: As it is without any method.
            item: What was asked.
            result: Of `call`; tokens and trace stay.
        """
        return result

    @abstractmethod
    def score(self, item: Item, output: str) -> Scores:
        """Score a stored output; runs again on old outputs, needs no model."""

    def limited(self, items: int) -> Self:
        """Return the task of which only the first items are run; the same one by default.

        A task whose metrics name the number of outputs that they are of returns another one.
        """
        return self

    def with_room_for(self, items: int) -> Self:
        """Return the task with at least so many items; the same one where data have an end.

        A task that makes its items, as many as its settings say, returns another one.
        """
        return self

    def conditions(self) -> dict[str, str]:
        """Return what of the machine a score depends on, for the record (`sandbox`: its level).

        Raises:
            models.base.Unsupported: The machine lacks something in `needs`; says what to install.
        """
        return {}

    def score_with_detail(self, item: Item, output: str) -> Scored:
        """Score a stored output and say what happened to it, where a task has more to say."""
        return Scored(self.score(item, output), "")

    def other_scorers(self) -> Sequence[Scorer]:
        """Return other people's ways to score the same outputs; none by default."""
        return ()

    def corpus(
        self, outputs: Mapping[str, str], draws: NDArray[np.int64]
    ) -> Mapping[str, NDArray[np.float64]]:
        """Return the numbers of the `corpus` metrics on resampled items; none by default.

        Pure, like `score`: it runs again on stored outputs and needs no model. What it depends on
        besides the outputs is in the items.

        Args:
            outputs: Stored output of every item by its id, in the experiment's order, which may
                hold fewer items than the task (`--limit`).
            draws: Places of items in that order, drawn with replacement, (resamples, items). Row 0
                is every item once, so the first number is the metric itself. An item that a row
                holds twice counts twice.

        Returns:
            For each metric of kind `corpus` one number a row, (resamples,); NaN where a row has
            none (a correlation of equal values).
        """
        return {}

    def parameters(self) -> dict[str, Any]:
        """Return the settings that can change an answer, JSON-able."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def content_hash(self) -> str:
        """Return a SHA-256 over version, parameters and every item."""
        digest = hashlib.sha256(json.dumps([self.version, self.parameters()]).encode())
        for item in self.items():
            digest.update(
                json.dumps([item.id, item.group, dict(item.fields)], sort_keys=True).encode()
            )
        return digest.hexdigest()
