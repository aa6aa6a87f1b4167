"""What draft-and-verify methods share: the wrapper around a model, and how a tree gets its size.

The loop itself is `models.decode.decode`; a method brings a drafter.
"""

from __future__ import annotations

import heapq
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hardware.profile import Profile, StepCost
from methods.base import Method, Output, StatePolicy
from methods.checks import require_choice, unsuited
from models.base import Decoding, Generation, TextGenerator
from models.decode import Accepted, Drafter, decode
from models.draft_tree import DraftTree, Topology
from models.wrapper import GeneratorWrapper

State = TypeVar("State")

RankProbabilities = npt.NDArray[np.float64]
"""P(the true next token is a node's candidate of rank j | node accepted), (depths, ranks)."""


class DraftedGenerator(GeneratorWrapper):
    """A text generator whose texts are drafted and verified; all else is the wrapped model's."""

    def __init__(self, model: TextGenerator, make_drafter: Callable[[], Drafter]) -> None:
        super().__init__(model)
        self._make_drafter = make_drafter

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids` with a fresh drafter."""
        return decode(self._model, prompt_ids, decoding, self._make_drafter())


@dataclass(frozen=True, kw_only=True)
class DecodingMethod(Method[TextGenerator]):
    """A method that is a drafter on the shared loop."""

    capability = "TextGenerator"
    owns_loop = True
    output = Output.IDENTICAL

    @abstractmethod
    def drafter(self, model: TextGenerator, hardware: Profile) -> Drafter:
        """Return a drafter for one text.

        Raises:
            models.base.Unsupported: The model lacks what the drafter needs.
        """

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its texts drafted; the model itself is not touched."""
        require_text_generator(self, model)
        yield DraftedGenerator(model, lambda: self.drafter(model, hardware))


@dataclass(frozen=True, kw_only=True)
class StatefulDecodingMethod(DecodingMethod):
    """A method whose drafter learns, and may keep what it learned for the next text.

    Attributes:
        state: `cold` forgets after every text, `session` keeps state within a run, `hot` keeps
            also what it learned on the warm-up prompts.
    """

    state: StatePolicy = "cold"
    _kept: list[tuple[weakref.ref[Any], Any]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        require_choice("state", self.state, get_args(StatePolicy))

    @property
    def state_policy(self) -> StatePolicy:
        """What happens to the state between samples."""
        return self.state

    def reset_state(self) -> None:
        """Forget what earlier texts left."""
        self._kept.clear()

    def state_for(self, model: TextGenerator, make: Callable[[], State]) -> State:
        """Return the state to start a text with: a new one, or the one kept for this model."""
        if self.state == "cold":
            return make()
        if not self._kept or self._kept[0][0]() is not model:
            self._kept[:] = [(weakref.ref(model), make())]
        kept: State = self._kept[0][1]
        return kept


def require_text_generator(method: Method[Any], model: object) -> None:
    """Raise unless the model has the capability.

    Raises:
        Unsupported: With what is missing.
    """
    if not isinstance(model, TextGenerator):
        wanted = ("name", "tokenizer", "facts", "generate", "session", "synchronize")
        missing = ", ".join(name for name in wanted if not hasattr(model, name))
        raise unsuited(method, model, "a text generator", f"has no {missing}")


def top_k(logits: Tensor, k: int, block: int = 64) -> Tensor:
    """Return the ids of the k largest logits of each row, the largest first, (rows, k), int64.

    Looks for the k best blocks of the vocabulary first: the k largest numbers lie in the k blocks
    with the largest maxima. On a row of 49,152 this takes a third of `torch.topk`'s time. Among
    equal logits any may be taken.

    Args:
        logits: (rows, vocab), vocab at least k.
        k: How many.
        block: Columns of a block.
    """
    rows, vocab = logits.shape
    blocks = vocab // block
    if blocks < 4 * k:
        return logits.topk(k, dim=-1).indices
    whole = logits[:, : blocks * block].unflatten(1, (blocks, block))
    best = whole.amax(-1).topk(k, dim=-1).indices
    offsets = torch.arange(block, device=logits.device)
    ids = (best[:, :, None] * block + offsets).reshape(rows, k * block)
    if rest := vocab - blocks * block:
        tail = torch.arange(vocab - rest, vocab, device=logits.device)
        ids = torch.cat([ids, tail.expand(rows, rest)], dim=1)
    return ids.gather(1, logits.gather(1, ids).topk(k, dim=-1).indices)


# --- the size of a tree ---------------------------------------------------------------------------


def best_template(rank_probabilities: RankProbabilities, nodes: int) -> Topology:
    """Return the static tree of the `nodes` likeliest drafts under the root.

    A rank path scores the product of its ranks' probabilities; paths are taken best first, each
    after its parent and its lower-ranked sibling, so with ranks in falling order of probability
    no other tree of that size expects more accepted tokens, and smaller trees are parts of larger.

    Args:
        rank_probabilities: (depths, ranks); they bound the tree's depth and width.
        nodes: Drafts, the root not counted; at least 0.

    Raises:
        ValueError: So many ranks paths do not exist.
    """
    return Topology.from_rank_paths(path for path, _ in _best_paths(rank_probabilities, nodes))


def expected_tokens(rank_probabilities: RankProbabilities, topology: Topology) -> float:
    """Return the tokens that a step with this tree should emit, bonus included.

    One, plus for each draft the probability that it is accepted.
    """
    scores = np.ones(len(topology))
    for node in range(1, len(topology)):
        rank = rank_probabilities[topology.depths[node] - 1, topology.ranks[node]]
        scores[node] = scores[topology.parents[node]] * rank
    return float(scores.sum())


def calibrated_nodes(
    expected: Callable[[int], float],
    step_cost: StepCost,
    context: int,
    most: int,
    share: float = 1.0,
    filled: float = 1.0,
) -> int:
    """Return the number of drafts that yields the most tokens per second.

    Args:
        expected: Tokens emitted by a step with that many drafts, bonus included.
        step_cost: Measured lat(N).
        context: Cached tokens to calibrate at.
        most: Largest number of drafts to consider.
        share: Share of steps that draft at all; the others emit one token at the cost of one.
        filled: Share of a tree's drafts that are made on the average.

    Returns:
        From 0, which is plain decoding, to `most`; the smaller of equals.
    """
    plain = step_cost.at(1, context)

    def rate(nodes: int) -> float:
        tokens = 1 - share + share * expected(nodes)
        width = 1 + round(filled * nodes)
        return tokens / ((1 - share) * plain + share * step_cost.at(width, context))

    return max(range(most + 1), key=lambda nodes: (rate(nodes), -nodes))


def middle_context(step_cost: StepCost) -> int:
    """Return the context that stands for a whole text: halfway between the measured ends."""
    return (step_cost.contexts[0] + step_cost.contexts[-1]) // 2


def _best_paths(
    rank_probabilities: RankProbabilities, nodes: int
) -> list[tuple[tuple[int, ...], float]]:
    """Return the `nodes` best rank paths with their scores, best first."""
    depths, ranks = rank_probabilities.shape
    waiting: list[tuple[float, int, tuple[int, ...]]] = []

    def offer(path: tuple[int, ...], parent_score: float) -> None:
        if len(path) <= depths and path[-1] < ranks:
            score = parent_score * float(rank_probabilities[len(path) - 1, path[-1]])
            heapq.heappush(waiting, (-score, len(path), path))

    scores: dict[tuple[int, ...], float] = {(): 1.0}
    offer((0,), 1.0)
    taken: list[tuple[tuple[int, ...], float]] = []
    while len(taken) < nodes:
        if not waiting:
            raise ValueError(
                f"a tree of {nodes} drafts does not fit into {depths} levels of {ranks} ranks."
            )
        negative, _, path = heapq.heappop(waiting)
        scores[path] = -negative
        taken.append((path, -negative))
        offer((*path, 0), -negative)
        offer((*path[:-1], path[-1] + 1), scores[path[:-1]])
    return taken


# --- measuring rank statistics --------------------------------------------------------------------


class RankedDrafter(Drafter, Protocol):
    """A drafter that ranks candidates for the token after each node."""

    def candidates(self, tree: DraftTree, node: int) -> Sequence[int]:
        """Return the candidates after a node, the best first."""
        ...


class CountingDrafter(ABC):
    """A drafter that drafts as its inner one does, and counts what became of the drafts.

    Attributes:
        trials: How often there was something to count, int64.
        hits: How often it was right, int64.
    """

    def __init__(self, inner: Drafter, trials: tuple[int, ...], hits: tuple[int, ...]) -> None:
        """Start counting.

        Args:
            inner: The drafter.
            trials, hits: Shapes of the counts.
        """
        self.inner = inner
        self.max_nodes = inner.max_nodes
        self.wants_prompt_logits = inner.wants_prompt_logits
        self.trials = np.zeros(trials, dtype=np.int64)
        self.hits = np.zeros(hits, dtype=np.int64)

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """Notes of the inner drafter."""
        return self.inner.notes

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        """See the prompt."""
        self.inner.begin(prompt_ids, logits)

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        """Return the inner drafter's tree."""
        return self.inner.draft(token_ids, budget)

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        """Count, while the inner drafter still is as it was when it drafted; then pass on."""
        self.count(tree, accepted)
        self.inner.update(tree, logits, accepted)

    @abstractmethod
    def count(self, tree: DraftTree, accepted: Accepted) -> None:
        """Count what became of a tree."""


class RankCounter(CountingDrafter):
    """Counts at which rank of the inner drafter the true next token stands.

    Attributes:
        trials: Visits of an accepted node, by depth, (depths,).
        hits: Visits whose true next token stood at each rank, (depths, ranks).
    """

    inner: RankedDrafter

    def __init__(self, inner: RankedDrafter, depths: int, ranks: int) -> None:
        super().__init__(inner, (depths,), (depths, ranks))

    def count(self, tree: DraftTree, accepted: Accepted) -> None:
        """See `CountingDrafter.count`."""
        following = [*tree.tokens[accepted.path[1:]].tolist(), accepted.bonus]
        visited = zip(accepted.path, following, strict=True)
        for depth, (node, token) in enumerate(itertools.islice(visited, len(self.trials))):
            self.trials[depth] += 1
            ranked = list(self.inner.candidates(tree, node))[: self.hits.shape[1]]
            if token in ranked:
                self.hits[depth, ranked.index(token)] += 1


def measure_rank_statistics(
    model: TextGenerator,
    prompts: Iterable[Sequence[int]],
    decoding: Decoding,
    make_drafter: Callable[[], RankedDrafter],
    *,
    depths: int,
    ranks: int,
) -> RankProbabilities:
    """Measure how often the true next token stands at each rank of the drafter's candidates.

    Args:
        model: Decodes the prompts.
        prompts: Warm-up prompts as ids; never items that are measured later.
        decoding: How to continue them.
        make_drafter: Makes the drafter of one text.
        depths: Levels to count, from the candidates after the root.
        ranks: Candidates to count.

    Returns:
        P(rank | the node was accepted), (depths, ranks); zeros at depths that were never reached.
    """
    trials, hits = np.zeros(depths), np.zeros((depths, ranks))
    for prompt_ids in prompts:
        counter = RankCounter(make_drafter(), depths, ranks)
        decode(model, prompt_ids, decoding, counter)
        trials += counter.trials
        hits += counter.hits
    return hits / np.maximum(trials, 1)[:, None]
