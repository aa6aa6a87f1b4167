"""A table model with a constraint, and every distribution over its texts by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hardware.profile import Profile
from methods.base import Method
from models.base import Generation, TextGenerator
from models.constraints import ConstrainedDecoding, accepts
from models.draft_tree import DraftTree
from models.regular import regex
from tests.models.toy import TableModel, TableSession, random_table

CPU = Profile(name="test", kind="cpu", label="test")
PROMPT = [0, 1]
EOS = 4
LIMIT = 4
# Over a, b, c, d; e is the end. Half of what begins well cannot be finished in time.
PATTERN = "a*b|[cd][ab]a|(?:ab)+c|d*"


class PatientSession(TableSession):
    """Allows a forward over the nodes of the one before, which were not committed."""

    def verify(self, tree: DraftTree) -> Tensor:
        self._waiting = None
        return super().verify(tree)


class LanguageModel(TableModel):
    """A random table over five tokens, the last of which ends a text."""

    def __init__(self, seed: int = 0) -> None:
        table = random_table(5, 1, seed=seed, spread=1.2)
        super().__init__(table, eos_ids=frozenset({EOS}), name="language")

    def session(self, capacity: int) -> TableSession:
        self.sessions.append(PatientSession(self, capacity))
        return self.sessions[-1]


def request(seed: int = 0, **settings: object) -> ConstrainedDecoding:
    values = {
        "max_new_tokens": LIMIT,
        "temperature": 1.0,
        "constraint": regex(PATTERN),
        "seed": seed,
    }
    return ConstrainedDecoding(**{**values, **settings})  # type: ignore[arg-type]  # by tests


def write(
    method: Method[TextGenerator], model: TextGenerator, decoding: ConstrainedDecoding
) -> Generation:
    with method.apply(model, CPU) as changed:
        return changed.generate(PROMPT, decoding)


def texts() -> list[tuple[int, ...]]:
    """Return every text of the language that fits, its end included."""
    found = []
    for length in range(LIMIT):
        for text in itertools.product(range(4), repeat=length):
            if accepts(regex(PATTERN), "".join("abcd"[token] for token in text)):
                found.append((*text, EOS))
    return found


def normaliser(model: LanguageModel, heat: float = 1.0) -> float:
    """Return the probability that the model writes a text of the language that fits."""
    return sum(model.probability(PROMPT, text, heat) for text in texts())


def target(model: LanguageModel, heat: float = 1.0) -> dict[tuple[int, ...], float]:
    """Return the model's distribution given that the text is of the language and fits."""
    total = normaliser(model, heat)
    return {text: model.probability(PROMPT, text, heat) / total for text in texts()}


def local(model: LanguageModel) -> dict[tuple[int, ...], float]:
    """Return the distribution of locally constrained decoding; texts that got stuck lack an end."""
    found: dict[tuple[int, ...], float] = {}

    def go(text: tuple[int, ...], probability: float) -> None:
        state = regex(PATTERN).after("".join("abcd"[t] for t in text).encode())
        assert state is not None
        p = np.array([model.probability([*PROMPT, *text], [token], 1.0) for token in range(5)])
        options: Sequence[int] = [t for t in range(4) if state.after(b"abcd"[t : t + 1])]
        if len(text) == LIMIT - 1:
            options = []
        options = [*options, *([EOS] if state.is_complete else [])]
        if not options:
            found[text] = found.get(text, 0.0) + probability
            return
        for token in options:
            share = probability * p[token] / p[list(options)].sum()
            if token == EOS:
                found[(*text, EOS)] = found.get((*text, EOS), 0.0) + share
            else:
                go((*text, token), share)

    go((), 1.0)
    return found
