"""A plug-in as an outsider would write it: one task, and methods that break in one way each."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

    after: int = 3
    output = Output.IDENTICAL
    capability = "TextGenerator"
    wrapper: ClassVar[type[_Wrapped]] = _Wrapped
    calls: ClassVar[list[int]] = []

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        type(self).calls.append(1)
        # Warm-up counts: a method that fails there has failed.
        yield self.wrapper(model) if len(type(self).calls) > self.after else model


def _kind(name: str, wrapper: type[_Wrapped]) -> type[_Plugin]:
    namespace = {"name": name, "wrapper": wrapper, "calls": [], "__module__": __name__}
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
        ids = tuple((token + 1) % 97 for token in honest.token_ids)
        return Generation(ids, self.tokenizer.decode(ids), honest.finish, honest.trace)


class _Declines(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        raise Unsupported("needs a model with a second head")


class _Floods(_Wrapped):
    def generate(self, prompt_ids: Any, decoding: Decoding) -> Generation:
        for _ in range(2000):
            print("x" * 1000)
        return self.inner.generate(prompt_ids, decoding)


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
