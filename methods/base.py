"""What a method is: frozen settings and one context manager that changes a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from hardware.profile import Profile

Capability = TypeVar("Capability")


class Output(StrEnum):
    """What a method promises about its output, compared with the baseline's."""

    IDENTICAL = "identical"
    SAME_DISTRIBUTION = "same-distribution"
    APPROXIMATE = "approximate"


Role = Literal["method", "baseline", "control", "peer"]
StatePolicy = Literal["cold", "session", "hot"]


@dataclass(frozen=True, kw_only=True)
class Method(ABC, Generic[Capability]):
    """A token-level method. The fields of a subclass are its hyper-parameters.

    Class attributes:
        output: What it promises, for greedy decoding where it makes a difference.
        role: `method`; `baseline` is what speed-ups are taken against; `control` shows that a gain
            is not free (random drafts); `peer` is somebody else's implementation.
        capability: Name of the capability it takes and yields.
        owns_loop: Whether what it yields has a loop of its own over the sessions of what it was
            given. In a stack it comes last: a loop that something else is put around is not run.
        neutral: Settings at which it equals the baseline to the bit, for the conformance battery;
            None if there are none.
        trial: Settings in the place of the defaults with which the conformance battery, whose model
            is tiny and whose prompts are bare, can see the method act.
    """

    output: ClassVar[Output]
    role: ClassVar[Role] = "method"
    capability: ClassVar[str]
    owns_loop: ClassVar[bool] = False
    neutral: ClassVar[Mapping[str, Any] | None] = None
    trial: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def apply(self, model: Capability, hardware: Profile) -> AbstractContextManager[Capability]:
        """Yield an object of the same capability that runs the method; restore the model on exit.

        Entered for every sample, outside the clock.

        Raises:
            models.base.Unsupported: The model lacks what the method needs; the message says what.
        """

    @property
    def state_policy(self) -> StatePolicy:
        """What happens to state between samples: `cold` (none is kept), `session` or `hot`."""
        return "cold"

    def reset_state(self) -> None:
        """Forget what earlier samples left; the harness calls it after warm-up unless `hot`."""

    def declared_output(self, temperature: float) -> Output:
        """Return the promise at a temperature: identical text cannot be promised when sampling."""
        if temperature > 0 and self.output is Output.IDENTICAL:
            return Output.SAME_DISTRIBUTION
        return self.output

    def parameters(self) -> dict[str, Any]:
        """Return the hyper-parameters, JSON-able."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def with_parameters(self, parameters: Mapping[str, Any]) -> Self:
        """Return a method of this kind with other hyper-parameters, and without a past.

        Args:
            parameters: As `parameters` returns them.
        """
        return type(self)(**parameters)


PaperKind = Literal["method", "survey", "unpublished"]
Bound = Literal["exact", "about", "up-to", "at-least", "at-most"]
Confidence = Literal["certain", "uncertain"]
Measure = Literal[
    "speedup",
    "decode_speedup",
    "tokens_per_forward",
    "acceptance_rate",
    "work",
    "memory",
    "quality",
    "note",
    "computed",
]
Direction = Literal["above", "below", "no-loss"]
Setting = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The publication behind a method, from its `.toml`.

    Attributes:
        title: As first posted.
        arxiv: Its id without a version, `2408.08696`; empty if it is not on arXiv.
        year: Of the first posting; 0 if unknown.
        venue: Where it was published since, empty if not known.
        code: Address of the authors' repository, empty if none was released or found.
        family: Kind of method, as in docs/catalogue.md.
        task: What it is measured on here first.
        kind: `survey` for a paper whose claims are statements about methods of others;
            `unpublished` for an idea without paper and code to name.
    """

    title: str
    arxiv: str = ""
    year: int = 0
    venue: str = ""
    code: str = ""
    family: str = ""
    task: str = ""
    kind: PaperKind = "method"


@dataclass(frozen=True, kw_only=True)
class Check:
    """How a measurement of ours tests a claim, from a `[claim.check]` table.

    Attributes:
        measure: What is compared, method against rival: `speedup` (time of an output token, rival
            over method), `decode_speedup` (the same of a token after the prefill, without it),
            `tokens_per_forward`, `acceptance_rate` (accepted over drafted tokens), `work`
            (operations of an output token), `memory` (peak bytes), each method over rival;
            `quality` (`metric`, method less rival); `note`, a count that methods leave in
            their notes, method over rival; or `computed`, which compares `quantity / per * times`
            with the claim's number and depends on no scale.
        metric: For `quality`, which metric of the task; empty for its headline.
        direction: On which side of "no difference" the claim puts it; `no-loss` is not worse by
            more than the margin of the experiment.
        params: Settings that the method's cell must have; others may have any value.
        rival: Method compared with; empty for the baseline.
        rival_params: Settings that the rival's cell must have.
        task: Task of the embedded measurement.
        task_params: Settings that it must have (`temperature = 0.6`); others may have any value.
        model: Embedded model.
        expected: What the claim's number means in terms of `measure`, where it is not that number
            itself (30% faster: 1.3).
        tolerance: Relative distance at which a number still counts as reached.
        quantity, per, times: For `computed`: a note of the cell or the sum of a column of its
            samples; another one to divide by; and a factor. For `note`: the quantity alone.
        paper_model: `hf:` id to test it with at the paper's scale.
        paper_params: Settings there, in place of `params`, where they differ.
        paper_task: Our task of that measurement, if it is the claim's own; empty if we lack it.
        paper_task_params: Settings that it must have; `task_params` where none are given and the
            task is the same.
        paper_hardware: Hardware profiles on which the number itself can be tested; empty for any.
    """

    measure: Measure
    metric: str = ""
    direction: Direction = "above"
    params: Mapping[str, Setting] = field(default_factory=dict)
    rival: str = ""
    rival_params: Mapping[str, Setting] = field(default_factory=dict)
    task: str
    task_params: Mapping[str, Setting] = field(default_factory=dict)
    model: str
    expected: float | None = None
    tolerance: float = 0.1
    quantity: str = ""
    per: str = ""
    times: float = 1.0
    paper_model: str = ""
    paper_params: Mapping[str, Setting] = field(default_factory=dict)
    paper_task: str = ""
    paper_task_params: Mapping[str, Setting] = field(default_factory=dict)
    paper_hardware: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper with its conditions, from a `[[claim]]` table.

    Attributes:
        id: As on the method's card, `TR-1`; one row of several numbers becomes `TR-5a`, `TR-5b`.
        metric: What was measured.
        value: As claimed, with its unit, in words if it is no single number.
        number: The value as a number where there is one: ratios as factors (2.0 is twice), changes
            with their sign.
        bound: How the number is meant; `up-to` is the best case seen, `at-least` and `at-most` are
            limits. None without a number.
        unit: Of the number, `x` for a factor, `%`, `points`, ...; empty for a plain figure (FID).
        baseline, model, task, hardware, conditions: What it was measured against and on; empty
            where nothing is said.
        where: Place in the paper or elsewhere; a third party is named.
        confidence: `certain` or `uncertain`: how sure the reading is, not how likely the claim.
        note: What is uncertain, or what must be known to judge the claim.
        ceiling: Largest value, in the number's unit, that the paper's own counts allow; None where
            none are stated.
        ceiling_from: Which counts, and why nothing can exceed them.
        differs: How the claim's protocol differs from any measurement of ours, where it does so for
            certain.
        missing: What it takes to test the claim besides weights, data and hardware (`Medusa`).
        check: How our measurements test it; None where none does.
    """

    id: str
    metric: str
    value: str
    number: float | None = None
    bound: Bound | None = None
    unit: str = ""
    baseline: str = ""
    model: str = ""
    task: str = ""
    hardware: str = ""
    conditions: str = ""
    where: str
    confidence: Confidence = "certain"
    note: str = ""
    ceiling: float | None = None
    ceiling_from: str = ""
    differs: str = ""
    missing: tuple[str, ...] = ()
    check: Check | None = None
