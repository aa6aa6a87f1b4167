"""A plug-in as an outsider would write it: one task, and methods that break in one way each."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from hardware.profile import Profile
from methods.base import Method, Output
from models.base import Decoding, Generation, Session, TextGenerator, Trace, Unsupported
from tasks.base import Dataset, Item, Metric, Scores, Task


@dataclass(frozen=True, kw_only=True)
class Parity(Task[TextGenerator]):
    """Continue a few tokens; the score says whether the answer has an even number of letters.

    Attributes:
        num_items: Number of items.
        max_new_tokens: Length of an answer.
    """

    num_items: int = 6
    max_new_tokens: int = 12

    name = "parity"
    version = "1.0"
    data = Dataset(source="generated", revision="1", split="test", license="Apache-2.0")
    capability = "TextGenerator"
    scale = "embedded"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric(name="even", unit="fraction", kind="binary"),)

    def items(self) -> Iterator[Item]:
        for number in range(self.num_items):
            words = [f"t{(number * 31 + place * 17) % 90 + 2}" for place in range(8)]
            yield Item(f"item-{number}", {"prompt": " ".join(words)})

    def warmup_items(self) -> Iterator[Item]:
        for number in range(4):
            yield Item(f"warm-{number}", {"prompt": f"t{number + 3} t4 t{number + 9}"})

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        ids = model.tokenizer.encode(item.fields["prompt"])
        decoding = Decoding(max_new_tokens=self.max_new_tokens, ignore_eos=fixed_length)
        return model.generate(ids, decoding)

    def score(self, item: Item, output: str) -> Scores:
        return {"even": float(len(output) % 2 == 0)}


class _Wrapped:
    """A text generator that can be made to misbehave."""

    def __init__(self, model: TextGenerator) -> None:
        self.inner = model
        self.name, self.tokenizer, self.facts = model.name, model.tokenizer, model.facts

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        return self.inner.generate(prompt_ids, decoding)

    def session(self, capacity: int) -> Session:
        return self.inner.session(capacity)

    def synchronize(self) -> None:
        self.inner.synchronize()


@dataclass(frozen=True, kw_only=True)
class _Plugin(Method[TextGenerator]):
    """Runs the model as it is; what follows changes one thing each.

    Attributes:
        after: Samples that go well first.
    """

    after: int = 2
    output = Output.IDENTICAL
    capability = "TextGenerator"
    wrapper: ClassVar[type[_Wrapped]] = _Wrapped
    calls: ClassVar[list[int]] = []

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        type(self).calls.append(1)
        # Warm-up counts: a method that fails there has failed.
        yield self.wrapper(model) if len(type(self).calls) > self.after else model


def _kind(name: str, wrapper: type[_Wrapped], promise: Output = Output.IDENTICAL) -> type[_Plugin]:
    namespace = {"name": name, "wrapper": wrapper, "calls": [], "__module__": __name__}
    namespace["output"] = promise
    namespace["__doc__"] = f"Misbehaves: {name}."
    return dataclass(frozen=True, kw_only=True)(
        type(name.title().replace("-", ""), (_Plugin,), namespace)
    )


class _Raises(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        raise RuntimeError("the draft table is empty")


class _Hangs(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        while True:
            time.sleep(0.1)


class _NanSession:
    def __init__(self, inner: Session) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def verify(self, tree: Any) -> torch.Tensor:
        return self.inner.verify(tree) * float("nan")


class _Nan(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        from models.decode import decode

        return decode(self, prompt_ids, decoding)

    def session(self, capacity: int) -> Session:
        return _NanSession(self.inner.session(capacity))  # type: ignore[return-value]  # delegates


class _Exits(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        os._exit(0)


class _Crashes(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        ctypes.string_at(0)
        raise AssertionError("unreachable")


class _Eats(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        eaten = []
        while True:
            eaten.append(torch.empty(256 * 1024 * 1024 // 4))  # untouched: the limit counts it


class _WrongType(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        return "a text"  # type: ignore[return-value]  # the point


class _OutOfRange(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        return Generation((5, 4000), "t5 ?", "length", Trace())


class _Lies(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        honest = self.inner.generate(prompt_ids, decoding)
        # t0 ends a text and stays.
        ids = tuple(token and token % 96 + 1 for token in honest.token_ids)
        text = self.tokenizer.decode([token for token in ids if token])
        return Generation(ids, text, honest.finish, honest.trace)


class _Declines(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        raise Unsupported("needs a model with a second head")


class _Floods(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        for _ in range(2000):
            print("x" * 1000)
        return self.inner.generate(prompt_ids, decoding)


class _RaisesInTheMiddle(_Wrapped):
    """Fails after some tokens of the text are there."""

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        from models.decode import decode

        return decode(self, prompt_ids, decoding)

    def session(self, capacity: int) -> Session:
        return _BreakingSession(self.inner.session(capacity))  # type: ignore[return-value]  # delegates


class _BreakingSession(_NanSession):
    def verify(self, tree: Any) -> torch.Tensor:
        if self.inner.length > 10:
            raise IndexError("the tree has no such node")
        return self.inner.verify(tree)


class _KillsItself(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


class _Overreports(_Wrapped):
    """Claims four tokens more than the text has."""

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        honest = self.inner.generate(prompt_ids, decoding)
        ids = (*honest.token_ids, 5, 6, 7, 8)
        return Generation(ids, honest.text, honest.finish, honest.trace)


class _Pads(_Wrapped):
    """Counts tokens that its text does not show, within the allowed length."""

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        honest = self.inner.generate(prompt_ids, decoding)
        return Generation(
            honest.token_ids, honest.text[: len(honest.text) // 2], honest.finish, honest.trace
        )


class _Mutates(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        generation = self.inner.generate(prompt_ids, decoding)
        module: Any = self.inner.module  # type: ignore[attr-defined]  # a CausalLM
        # Behind autograd's back, and only one matrix.
        next(module.parameters()).data.mul_(1.5)
        return generation


class _MutatesOneNumber(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        generation = self.inner.generate(prompt_ids, decoding)
        module: Any = self.inner.module  # type: ignore[attr-defined]  # a CausalLM
        module.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1.0
        return generation


LEAKED: list[Any] = []


class _Leaks(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        LEAKED.append(torch.ones(640 * 2**20 // 4))  # touched, so that it is held
        return self.inner.generate(prompt_ids, decoding)


class _Forks(_Wrapped):
    """Leaves a process behind that has left the session and lost its parent."""

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            if os.fork() == 0:
                if path := os.environ.get("TOKENMARK_TEST_PIDS"):
                    Path(path).write_text(f"{os.getpid()}\n")
                time.sleep(600)
            os._exit(0)
        os.waitpid(pid, 0)
        return self.inner.generate(prompt_ids, decoding)


class _ForksAndDies(_Wrapped):
    """The same, and takes the worker with it before anybody can look."""

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        _Forks(self.inner).generate(prompt_ids, decoding)
        os._exit(3)


class _Remembers(_Wrapped):
    """Answers a prompt that it has seen without running the model."""

    seen: ClassVar[dict[tuple[int, ...], Generation]] = {}

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        key = tuple(prompt_ids)
        if key not in self.seen:
            self.seen[key] = self.inner.generate(prompt_ids, decoding)
        return self.seen[key]


class _Shortens(_Wrapped):
    """Writes half of what was asked for."""

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        honest = self.inner.generate(prompt_ids, decoding)
        ids = (*honest.token_ids[: len(honest.token_ids) // 2], 0)  # t0 ends a text
        text = self.tokenizer.decode(ids[:-1])
        return Generation(ids, text, "eos", Trace())


class _KnowsTheClock(_Wrapped):
    """Works properly only the first time it sees a prompt, which is the timed one."""

    seen: ClassVar[set[tuple[int, ...]]] = set()

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        honest = self.inner.generate(prompt_ids, decoding)
        key = tuple(prompt_ids)
        if key not in self.seen:
            self.seen.add(key)
            return honest
        ids = tuple(token and token % 96 + 1 for token in honest.token_ids)
        text = self.tokenizer.decode([token for token in ids if token])
        return Generation(ids, text, honest.finish, honest.trace)


class _Overcounts(_Wrapped):
    """Tells of fewer forwards than its tokens need."""

    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        honest = self.inner.generate(prompt_ids, decoding)
        del honest.trace.forwards[2:], honest.trace.accepted[2:]
        return honest


Twin = _kind("twin", _Wrapped)
Raises = _kind("raises", _Raises)
Hangs = _kind("hangs", _Hangs)
ReturnsNan = _kind("returns-nan", _Nan)
Exits = _kind("exits", _Exits)
Crashes = _kind("crashes", _Crashes)
EatsMemory = _kind("eats-memory", _Eats)
WrongType = _kind("wrong-type", _WrongType)
OutOfRange = _kind("out-of-range", _OutOfRange)
Lies = _kind("lies", _Lies)
Declines = _kind("declines", _Declines)
Floods = _kind("floods", _Floods)
RaisesInTheMiddle = _kind("raises-in-the-middle", _RaisesInTheMiddle)
KillsItself = _kind("kills-itself", _KillsItself)
Overreports = _kind("overreports", _Overreports)
HalvesItsText = _kind("halves-its-text", _Pads)
Mutates = _kind("mutates-weights", _Mutates)
MutatesOneNumber = _kind("mutates-one-number", _MutatesOneNumber)
LeaksMemory = _kind("leaks-memory", _Leaks)
Forks = _kind("forks", _Forks)
ForksAndDies = _kind("forks-and-dies", _ForksAndDies)
Remembers = _kind("remembers", _Remembers, Output.APPROXIMATE)
Shortens = _kind("shortens", _Shortens, Output.APPROXIMATE)
KnowsTheClock = _kind("knows-the-clock", _KnowsTheClock, Output.APPROXIMATE)
Overcounts = _kind("overcounts", _Overcounts)


@dataclass(frozen=True, kw_only=True)
class RaisesInApply(_Plugin):
    """Misbehaves: it cannot even be entered."""

    name = "raises-in-apply"
    calls: ClassVar[list[int]] = []

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        raise KeyError("no layer of that name")
        yield model


@dataclass(frozen=True, kw_only=True)
class RaisesOnLeaving(_Plugin):
    """Misbehaves: it cannot be left."""

    name = "raises-on-leaving"

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        yield model
        raise KeyError("the hook is gone")


@dataclass(frozen=True, kw_only=True)
class SleepsInApply(_Plugin):
    """Misbehaves: it works where no clock looks."""

    name = "sleeps-in-apply"

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        time.sleep(0.2)
        yield model


@dataclass(frozen=True, kw_only=True)
class HangsInApply(_Plugin):
    """Misbehaves: it is never entered."""

    name = "hangs-in-apply"

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        time.sleep(600)
        yield model
