"""Methods by name, and stacks of them: two methods of different families on one model, as one.

`snapkv:budget=72+prompt-lookup` applies each part to what the one before it yields, so parts stay
as they are. What can be told from the parts alone is refused here, with the reason; the rest is for
the capabilities to refuse when a stack is applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from hardware.profile import Profile
from methods.base import Method, Output, Role, StatePolicy
from runner.keys import digest, method_source
from runner.registry import Registry
from runner.request import UsageError
from runner.settings import JOINT, MethodSpec, build, format_spec, parse_method

# From the strongest promise to the weakest.
_PROMISES = (Output.IDENTICAL, Output.SAME_DISTRIBUTION, Output.APPROXIMATE)


class ImpossibleStack(UsageError):
    """Two methods that cannot be stacked, or not in this order."""


class Made(NamedTuple):
    """A method that was asked for.

    Attributes:
        spec: As text, defaults left out.
        name: Its name, or those of its parts.
        method: The method, or the stack.
        parts: Specs of a stack's parts, in their order; () for a method alone.
        family: Folder of the method, or those of its parts.
    """

    spec: str
    name: str
    method: Method[Any]
    parts: tuple[str, ...]
    family: str


@dataclass(frozen=True, kw_only=True)
class Stack(Method[Any]):
    """Methods that are applied to one model, each to what the one before it yields.

    Attributes:
        names: Of the parts, in their order.
        parts: The methods.
    """

    names: tuple[str, ...]
    parts: tuple[Method[Any], ...]

    def __post_init__(self) -> None:
        last = self.parts[-1]
        roles = [part.role for part in self.parts]
        role: Role = "control" if "control" in roles else "method"
        weakest = max((part.output for part in self.parts), key=_PROMISES.index)
        # What a method's class says of itself, a stack's parts say of it.
        own = {"capability": last.capability, "owns_loop": last.owns_loop, "role": role}
        for name, value in (own | {"output": weakest}).items():
            object.__setattr__(self, name, value)

    @contextmanager
    def apply(self, model: Any, hardware: Profile) -> Iterator[Any]:
        """Yield the model with all parts applied; they are taken off in the opposite order.

        Raises:
            models.base.Unsupported: A part does not take what the one before it yields.
        """
        with ExitStack() as applied:
            for part in self.parts:
                model = applied.enter_context(part.apply(model, hardware))
            yield model

    @property
    def state_policy(self) -> StatePolicy:
        """That of the first part: the others keep nothing."""
        return self.parts[0].state_policy

    def reset_state(self) -> None:
        """Have every part forget what earlier samples left."""
        for part in self.parts:
            part.reset_state()

    def declared_output(self, temperature: float) -> Output:
        """Return the weakest promise of the parts at a temperature."""
        return max((part.declared_output(temperature) for part in self.parts), key=_PROMISES.index)

    def with_parameters(self, parameters: Mapping[str, Any]) -> Self:
        """Return a stack of the same parts with other hyper-parameters, those of each by its name.

        Args:
            parameters: As `parameters` returns them.
        """
        parts = zip(self.names, self.parts, strict=True)
        return replace(
            self, parts=tuple(part.with_parameters(parameters[name]) for name, part in parts)
        )

    def parameters(self) -> dict[str, Any]:
        """Return the hyper-parameters of each part by its name."""
        return {name: part.parameters() for name, part in zip(self.names, self.parts, strict=True)}


def make_method(text: str, registry: Registry) -> Made:
    """Make the method that a text names, or the stack.

    Raises:
        ImpossibleStack: The parts cannot be stacked, or not in this order; says why.
        UsageError: A name or a setting is wrong.
    """
    return made_of(parse_method(text), registry)


def made_of(asked: MethodSpec, registry: Registry) -> Made:
    """Make a method that was read already; errors are those of `make_method`."""
    _check_names(asked, registry)
    made = []
    for part in asked.parts:
        method = build(registry.load_method(part.name), part.params, f"method {part.name!r}")
        family = registry.find("method", part.name).family
        made.append(Made(format_spec(method, part.name), part.name, method, (), family))
    if len(made) == 1:
        return made[0]
    spec = JOINT.join(part.spec for part in made)
    if reason := _refusal(made):
        raise ImpossibleStack(f"{spec!r} cannot be stacked: {reason}")
    names = tuple(part.name for part in made)
    return Made(
        spec=spec,
        name=asked.name,
        method=Stack(names=names, parts=tuple(part.method for part in made)),
        parts=tuple(part.spec for part in made),
        family=JOINT.join(part.family for part in made),
    )


def _check_names(asked: MethodSpec, registry: Registry) -> None:
    """Refuse a name that does not exist, which may be the rest of a value with a `+` in it."""
    for place, part in enumerate(asked.parts):
        try:
            registry.find("method", part.name)
        except UsageError as error:
            if not place:
                raise
            raise UsageError(
                f"{error} A '{JOINT}' joins two methods; in a value it stands in double quotes."
            ) from error


def source_of(name: str, registry: Registry) -> str:
    """Return a hash of a method's files, or of those of a stack's parts in their order."""
    sources = [
        method_source(registry.find("method", part.name).source)
        for part in parse_method(name).parts
    ]
    return sources[0] if len(sources) == 1 else digest(sources)


def _refusal(parts: Sequence[Made]) -> str:
    """Return why methods cannot be stacked in this order; "" where nothing speaks against it."""
    if len(parts) > 2:
        return (
            f"a stack has two parts, got {len(parts)}. What three do to one another takes eight "
            "cells to tell."
        )
    first, second = parts
    for part in parts:
        if part.method.role == "baseline":
            return f"{part.name!r} is a baseline; with it, a stack is the other part alone."
        if part.method.role == "peer":
            return (
                f"{part.name!r} is a peer, an implementation of its own that asks nothing of what "
                "it is stacked with."
            )
    takes = [part.method.capability for part in parts]
    if takes[0] != takes[1]:
        return (
            f"{first.name!r} changes a {takes[0]}, {second.name!r} a {takes[1]}, and no model is "
            "given to both."
        )
    if first.family == second.family:
        of = f"both are of the family {first.family!r}" if first.family else "neither has a family"
        return f"{of}; a stack joins two families, since methods of one are rivals for one place."
    if first.method.owns_loop and second.method.owns_loop:
        return "both have a loop of their own that writes the text, and one of them would not run."
    if first.method.owns_loop:
        return (
            f"{first.name!r} has a loop of its own, so it comes last: write "
            f"'{second.spec}{JOINT}{first.spec}'."
        )
    if second.method.state_policy != "cold":
        return (
            f"{second.name!r} keeps state for a model from one sample to the next, and in a stack "
            "each sample has a model of its own: set state=cold."
        )
    return ""
