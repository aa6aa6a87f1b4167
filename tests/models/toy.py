"""A language model that is a table, its sessions that check every call, and exact enumeration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.base import Decoding, Generation, TextModelFacts
from models.decode import Draws, decode
from models.draft_tree import DraftTree

Outcome = TypeVar("Outcome", bound=Hashable)


class LetterTokenizer:
    """Token 0 is `a`, 1 is `b`, …; ids from 100 on are special and have no text."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids if token < 100)


class TableModel:
    """The logits after a token depend on the last one or two tokens, by a table."""

    def __init__(
        self,
        table: npt.ArrayLike,
        *,
        eos_ids: frozenset[int] = frozenset(),
        max_positions: int = 1000,
        name: str = "table",
    ) -> None:
        self.table = torch.tensor(np.asarray(table, dtype=np.float32))
        self.name = name
        self.tokenizer = LetterTokenizer()
        self.sessions: list[TableSession] = []
        self.facts = TextModelFacts(
            vocab_size=self.table.shape[-1],
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            matrix_parameters=1,
            head_parameters=0,
            weight_bytes=4,
            kv_item_bytes=4,
            max_positions=max_positions,
            eos_ids=eos_ids,
            dtype="float32",
        )

    @property
    def order(self) -> int:
        """How many tokens the logits depend on."""
        return self.table.ndim - 1

    def logits_after(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits after a text; in front of it stand tokens 0."""
        last = ([0] * self.order + list(token_ids))[-self.order :]
        return self.table[tuple(last)]

    def probability(self, prompt_ids: Sequence[int], output: Sequence[int], heat: float) -> float:
        """Return the probability that sampling continues the prompt with `output`."""
        text, result = list(prompt_ids), 1.0
        for token in output:
            result *= float(torch.softmax(self.logits_after(text).double() / heat, -1)[token])
            text.append(token)
        return result

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        return decode(self, prompt_ids, decoding)

    def session(self, capacity: int) -> TableSession:
        self.sessions.append(TableSession(self, capacity))
        return self.sessions[-1]

    def synchronize(self) -> None:
        pass


class TableSession:
    """A session that raises at every call that a real cache could not survive."""

    def __init__(self, model: TableModel, capacity: int) -> None:
        self._model = model
        self._waiting: DraftTree | None = None
        self.capacity = capacity
        self.cached: list[int] = []

    @property
    def length(self) -> int:
        return len(self.cached)

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        assert self._waiting is None, "prefill over a tree that was never committed"
        assert self.length + len(token_ids) <= self.capacity
        start = self.length
        self.cached += token_ids
        ends = range(start + 1 if all_logits else self.length, self.length + 1)
        return torch.stack([self._model.logits_after(self.cached[:end]) for end in ends])

    def verify(self, tree: DraftTree) -> Tensor:
        assert self._waiting is None, "two verifications without a commit"
        assert self.length + len(tree) <= self.capacity, "the tree overflows the cache"
        last_position = self.length + tree.topology.max_depth
        assert last_position < self._model.facts.max_positions, "a node stands past the context"
        self._waiting = tree
        return torch.stack(
            [
                self._model.logits_after([*self.cached, *tree.tokens[path_to(tree, node)].tolist()])
                for node in range(len(tree))
            ]
        )

    def commit(self, path: Sequence[int]) -> None:
        assert self._waiting is not None, "a commit without a verification"
        assert path[0] == 0
        parents = self._waiting.topology.parents
        assert [int(parents[node]) for node in path[1:]] == list(path[:-1]), "no path of the tree"
        self.cached += self._waiting.tokens[list(path)].tolist()
        self._waiting = None


def path_to(tree: DraftTree, node: int) -> list[int]:
    """Return the nodes from the root down to `node`."""
    path = [node]
    while path[0]:
        path.insert(0, int(tree.topology.parents[path[0]]))
    return path


def random_table(vocab_size: int, order: int = 1, *, seed: int = 0, spread: float = 1.5) -> Tensor:
    """Return random logits, (vocab,) * (order + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((vocab_size,) * (order + 1), generator=generator) * spread


def cycle_table(length: int, vocab_size: int | None = None) -> npt.NDArray[np.float32]:
    """Return a table by which token i is always followed by i + 1, and the last by 0."""
    vocab_size = vocab_size or length
    table = np.zeros((vocab_size, vocab_size), dtype=np.float32)
    for token in range(vocab_size):
        table[token, (token + 1) % length] = 5
    return table


class EnumeratedDraws(Draws):
    """Takes a scripted way through all possible outcomes of random draws, and weighs it."""

    def __init__(self, script: Sequence[int]) -> None:
        self._script = list(script)
        self.taken: list[tuple[int, int]] = []
        self.weight = 1.0

    def token(self, probabilities: Tensor) -> int:
        weights = probabilities.double() / probabilities.double().sum()
        options = weights.nonzero()[:, 0].tolist()
        return options[self._choose([float(weights[option]) for option in options])]

    def event(self, probability: float) -> bool:
        if probability >= 1 or probability <= 0:
            return probability >= 1
        return not self._choose([probability, 1 - probability])

    def _choose(self, weights: list[float]) -> int:
        choice = self._script[len(self.taken)] if len(self.taken) < len(self._script) else 0
        self.taken.append((choice, len(weights)))
        self.weight *= weights[choice]
        return choice


def distribution(run: Callable[[EnumeratedDraws], Outcome]) -> dict[Outcome, float]:
    """Return the exact probability of every outcome of a procedure that draws at random."""
    result: dict[Outcome, float] = defaultdict(float)
    script: list[int] = []
    while True:
        draws = EnumeratedDraws(script)
        result[run(draws)] += draws.weight
        taken = draws.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return dict(result)
        script = [choice for choice, _ in taken]
        script[-1] += 1


def total_variation(one: dict[Outcome, float], other: dict[Outcome, float]) -> float:
    """Return half the summed absolute difference of two distributions."""
    keys = one.keys() | other.keys()
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in keys) / 2
