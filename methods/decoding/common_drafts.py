"""Draft models: loading one, keeping its cache beside the target's, and drawing trees from it.

A draft model is a text generator like any other; what makes it a draft is that it shares the
target's vocabulary and costs little. Its cache follows the text: the nodes of a tree that it reads
wait behind the cache, and after verification the accepted ones are kept. Drafts that were accepted
but never read (leaves) and the bonus token are read at the beginning of the next step.
"""

from __future__ import annotations

import copy
import itertools
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import models
from hardware.profile import Profile, StepCost
from methods.decoding.common import (
    CountingDrafter,
    DecodingMethod,
    DraftedGenerator,
    calibrated_nodes,
    middle_context,
    require_text_generator,
)
from models.base import (
    Decoding,
    Forward,
    Generation,
    InvalidOutput,
    Session,
    TextGenerator,
    TextModelFacts,
    Trace,
    Unsupported,
)
from models.decode import Accepted, Drafter, NoDraft, decode
from models.draft_tree import DraftTree, Topology
from models.loading import ModelError, fetch, quiet_transformers

GREEDY = Decoding(max_new_tokens=1)

# What a step of a draft model takes beyond its share of the target's bytes: short rows are read
# less well than long ones, and there are the distribution, the draw and the bookkeeping. Measured
# with a Llama of tiny-draft's sizes beside SmolLM2-135M, native kernels, one thread of an AVX-512
# CPU: 8.3 ms where the bytes alone would take 4.8.
STEP_OVERHEAD = 1.7

# A second stream of random numbers for each seed: drafts must not depend on the draws that test
# them.
_DRAFT_STREAM = 0xD4AF7

# Columns of a row that are summed at a time: a draw looks at the sums first.
_BLOCK = 64

# Texts with special characters, digits, indentation: where tokenizers of equal size differ.
_PROBE = "def f(x):\n    return [x + 12.5, 'naïve']  # 東京\n"


# --- which model ----------------------------------------------------------------------------------

_LOADED: weakref.WeakKeyDictionary[Any, dict[str, TextGenerator]] = weakref.WeakKeyDictionary()


def draft_for(draft_id: str, target: TextGenerator) -> TextGenerator:
    """Return a target's draft model, loaded when first asked for and then kept with the target.

    Args:
        draft_id: An id of `models.loading` (embedded, `hf:…`, `path:…`), or `layers:2` for the
            target's own first two layers under its own output head.
        target: What will verify the drafts; the draft takes its device, dtype and attention kernel.

    Raises:
        Unsupported: There is no such model, or its vocabulary is not the target's.
    """
    drafts = _LOADED.setdefault(target, {})
    if draft_id not in drafts:
        draft = load_draft(draft_id, target)
        require_same_vocabulary(draft, target)
        drafts[draft_id] = draft
    return drafts[draft_id]


def load_draft(draft_id: str, target: TextGenerator) -> TextGenerator:
    """Load a draft model; nothing is downloaded.

    Raises:
        Unsupported: It is not there, or cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    from models.text import CausalLM

    kind, _, layers = draft_id.partition(":")
    if kind == "layers":
        return own_layers(target, layers)
    folder = _folder(draft_id)
    module: Any = getattr(target, "module", None)
    like = next(module.parameters()) if isinstance(module, nn.Module) else torch.zeros(1)
    config = getattr(module, "config", None)
    # Loading may draw random numbers, which belong to the text.
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=like.dtype,
                attn_implementation=getattr(config, "_attn_implementation", None) or "sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            loaded.to(like.device)
        except (OSError, ValueError) as error:
            raise Unsupported(f"draft model '{draft_id}' cannot be loaded: {error}") from error
    _require_same_tokenizer(folder, draft_id, target)
    return CausalLM(loaded, target.tokenizer, draft_id)


def own_layers(target: TextGenerator, layers: str) -> TextGenerator:
    """Return a model of the target's first layers, under its own final norm and output head.

    It needs no training and no files, and drafts badly: for models without a draft, and for tests.

    Raises:
        Unsupported: The target is no transformers model, or has no so many layers.
    """
    from models.text import CausalLM

    module: Any = getattr(target, "module", None)
    if not (isinstance(module, nn.Module) and hasattr(module, "config")):
        raise Unsupported(f"'{target.name}' has no transformers model whose layers could draft.")
    total = target.facts.num_layers
    if not (layers.isdecimal() and 1 <= int(layers) < total):
        raise Unsupported(
            f"'layers:{layers}' must name 1 to {total - 1} of the {total} layers of "
            f"'{target.name}'."
        )
    count = int(layers)
    # The first copy shares all weights, the second one is small and owns its own: native kernels
    # pack the weights of a module, and the target's must stay where they are.
    shared = {id(each): each for each in itertools.chain(module.parameters(), module.buffers())}
    shallow: Any = copy.deepcopy(module, cast("dict[int, Any]", shared))
    stack = next(
        part for part in shallow.modules() if isinstance(part, nn.ModuleList) and len(part) == total
    )
    del stack[count:]
    config = shallow.config.get_text_config()
    config.num_hidden_layers = count
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:count]
    return CausalLM(copy.deepcopy(shallow), target.tokenizer, f"{target.name}:layers:{count}")


def require_same_vocabulary(draft: TextGenerator, target: TextGenerator) -> None:
    """Raise unless both models speak the same tokens.

    Raises:
        Unsupported: With both sizes.
    """
    ours, theirs = draft.facts.vocab_size, target.facts.vocab_size
    if ours != theirs:
        raise Unsupported(
            f"draft model '{draft.name}' has a vocabulary of {ours} tokens, '{target.name}' one of "
            f"{theirs}: a draft needs the target's tokenizer."
        )


def _require_same_tokenizer(folder: Path, draft_id: str, target: TextGenerator) -> None:
    """Raise `Unsupported` if the draft brings a tokenizer that splits a text in another way."""
    from transformers import AutoTokenizer

    hub = getattr(target.tokenizer, "hub", None)
    if hub is None or not any(folder.glob("tokenizer*")):
        return
    own = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ours, theirs = (list(each(_PROBE, add_special_tokens=False).input_ids) for each in (own, hub))
    if ours != theirs:
        raise Unsupported(
            f"draft model '{draft_id}' splits texts into other tokens than '{target.name}': a "
            f"draft needs the target's tokenizer."
        )


def _folder(draft_id: str) -> Path:
    # An embedded draft is weights and a configuration; its tokenizer is the target's.
    embedded = Path(next(iter(models.__path__))) / "embedded" / draft_id.replace("-", "_")
    if ":" not in draft_id and (embedded / "config.json").is_file():
        return embedded
    try:
        return fetch(draft_id, offline=True)
    except ModelError as error:
        raise Unsupported(f"draft model '{draft_id}': {error}") from error


# --- its cache ------------------------------------------------------------------------------------


@runtime_checkable
class GrowingSession(Session, Protocol):
    """A session that can run a tree as it grows.

    Besides, where all nodes of a chain but the last are committed, the last one goes on waiting.
    """

    def extend(self, tree: DraftTree, start: int) -> Tensor:
        """Run the nodes from `start` on behind those that wait; see `models.text`."""
        ...


class DraftModel:
    """A draft model on one text: what it has read, and the tree that it is reading.

    Attributes:
        forwards: Its forwards so far, reading the prompt included.
    """

    def __init__(self, model: TextGenerator, capacity: int) -> None:
        """Open its cache.

        Args:
            model: The draft model.
            capacity: Tokens of the text and of its largest tree, together.

        Raises:
            Unsupported: The model cannot read a tree as it grows.
        """
        session = model.session(capacity)
        if not isinstance(session, GrowingSession):
            raise Unsupported(f"'{model.name}' cannot draft: its sessions have no 'extend'.")
        self._session = session
        self._max_positions = model.facts.max_positions
        self._parents: list[int] = []
        self._tokens: list[int] = []
        self._places: dict[int, int] = {}
        self.forwards: list[Forward] = []

    @property
    def length(self) -> int:
        """Tokens of the text that are in its cache."""
        return self._session.length

    def room(self, text_length: int) -> int:
        """Return how deep a tree under a text of that length may be within the draft's context."""
        return self._max_positions - text_length

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Read the prompt; one that its context cannot hold is left alone, as `room` tells."""
        if self.room(len(prompt_ids)) > 0:
            self.forwards.append(Forward(len(prompt_ids), 0))
            self._session.prefill(prompt_ids)

    def root(self, token_ids: Sequence[int]) -> Tensor:
        """Read what is new in the text and start a tree under its last token, node 0.

        Returns:
            Logits after the text, (vocab,); they live until the next call.
        """
        unread = list(token_ids[self._session.length :])
        self.forwards.append(Forward(len(unread), self._session.length))
        logits = self._session.verify(DraftTree.chain(unread[0], unread[1:]))[-1]
        if len(unread) > 1:
            self._session.commit(range(len(unread) - 1))
        # The last token stays behind the cache: it is the root of whatever is read next.
        self._parents, self._tokens, self._places = [-1], [unread[-1]], {0: 0}
        return logits

    def expand(self, nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read more nodes of the tree, whose parents were read before.

        Args:
            nodes: Their indices in the tree as the target will see it.
            parents: Indices of their parents there.
            tokens: Their tokens.

        Returns:
            Logits after each, (nodes, vocab); they live until the next call.
        """
        start = len(self._tokens)
        for node, parent, token in zip(nodes, parents, tokens, strict=True):
            self._places[node] = len(self._tokens)
            self._parents.append(self._places[parent])
            self._tokens.append(token)
        tree = DraftTree(Topology(self._parents), np.array(self._tokens, dtype=np.int64))
        self.forwards.append(Forward(len(nodes), self._session.length + start))
        return self._session.extend(tree, start)

    def follow(self, path: Sequence[int]) -> None:
        """Keep what was read of an accepted path, root first, and forget the rest of the tree."""
        if self._places:
            # Nodes have children only if they were read, so the unread ones end the path.
            self._session.commit([self._places[node] for node in path if node in self._places])
            self._places = {}


# --- drawing from it ------------------------------------------------------------------------------


class DraftRow:
    """A draft distribution that tokens are drawn from without replacement.

    With D_1 the distribution, the k-th draw is from D_k: D_1 without the tokens drawn before,
    normalised. The distribution itself stays, since verification needs D_1.

    Attributes:
        probabilities: D_1, (vocab,), float64.
        path: Tokens from the root to the node that it stands after, for tests.
        drawn: Tokens drawn, in order.
    """

    def __init__(self, probabilities: npt.NDArray[np.float64], path: tuple[int, ...] = ()) -> None:
        self.probabilities = probabilities
        self.path = path
        self.drawn: list[int] = []
        self._sums = np.add.reduceat(probabilities, np.arange(0, len(probabilities), _BLOCK))
        self.left = float(self._sums.sum())

    @property
    def is_spent(self) -> bool:
        """Whether all of its mass has been drawn."""
        return not self.left > 0

    def share(self, token: int) -> float:
        """Return the probability of an undrawn token under D_k."""
        return float(self.probabilities[token]) / self.left

    def at(self, uniform: float) -> int:
        """Return the undrawn token at a level of D_k's cumulative distribution, in [0, 1)."""
        level = uniform * self.left
        block, level = _find(self._sums, level)
        offset, _ = _find(self._undrawn(block), level)
        return block * _BLOCK + offset

    def take(self, token: int) -> None:
        """Note that a token was drawn."""
        self.drawn.append(token)
        block = token // _BLOCK
        # Summed anew, not subtracted: what is left of a sure distribution would be rounding.
        self._sums[block] = self._undrawn(block).sum()
        self.left = float(self._sums.sum())

    def remaining(self) -> npt.NDArray[np.float64]:
        """Return D_k, (vocab,)."""
        rest = self.probabilities.copy()
        rest[self.drawn] = 0
        return rest / rest.sum()

    def _undrawn(self, block: int) -> npt.NDArray[np.float64]:
        part = self.probabilities[block * _BLOCK : (block + 1) * _BLOCK].copy()
        for token in self.drawn:
            if token // _BLOCK == block:
                part[token % _BLOCK] = 0
        return part


def _find(weights: npt.NDArray[np.float64], level: float) -> tuple[int, float]:
    """Return where a level of the running sum lies, and how far inside."""
    running = np.cumsum(weights)
    place = int(np.searchsorted(running, level, side="right"))
    if place == len(weights) or not weights[place] > 0:  # rounding has passed the last weight
        place = int(weights.nonzero()[0][-1])
    return place, level - (float(running[place - 1]) if place else 0.0)


Choose = Callable[[DraftRow], int]
"""Draws an undrawn token of a row; tests enumerate all of them."""


def chooser(seed: int) -> Choose:
    """Return draws from a seed's stream for drafts."""
    generator = np.random.default_rng([seed, _DRAFT_STREAM])
    return lambda row: row.at(generator.random())


Read = Callable[[Sequence[int], Sequence[int], Sequence[int]], Tensor]
"""Reads nodes, given with parents and tokens, and returns logits: `DraftModel.expand`."""


class DrawnTree:
    """A tree that grows by draws without replacement from a draft model's distributions.

    Whether and where it grows may depend on all that was drawn before; nothing drawn is ever
    dropped or reordered, so `models.decode.accept_without_replacement` stays exact.

    Attributes:
        tokens, parents, depths: Of the nodes so far; the root is node 0.
        shares: Probability of each node's token under the distribution it was drawn from.
    """

    def __init__(
        self,
        root: int,
        logits: Tensor,
        read: Read,
        *,
        temperature: float,
        choose: Choose,
        rows: npt.NDArray[np.float64],
    ) -> None:
        """Start with the root.

        Args:
            root: Token of the root.
            logits: After the root, (vocab,).
            read: Runs the draft model over nodes.
            temperature: Of the draft distributions, above 0.
            choose: Draws.
            rows: Memory for the distributions, (largest tree, vocab).
        """
        self.tokens, self.parents, self.depths = [root], [-1], [0]
        self.shares = [1.0]
        self._read = read
        self._temperature = temperature
        self.choose = choose
        self._rows = rows
        self.root_row = self._row(0, logits)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def drafts(self) -> int:
        """Nodes under the root."""
        return len(self.tokens) - 1

    def expand(self, nodes: Sequence[int]) -> list[DraftRow]:
        """Return the draft distributions after nodes, from one forward of the draft model."""
        if not nodes:
            return []
        parents, tokens = ([of[node] for node in nodes] for of in (self.parents, self.tokens))
        logits = self._read(nodes, parents, tokens)
        return [self._row(node, each) for node, each in zip(nodes, logits, strict=True)]

    def draw(self, node: int, row: DraftRow) -> int:
        """Draw one more child of a node from its row, which must not be spent; return its index."""
        return self.add(node, row, self.choose(row))

    def add(self, node: int, row: DraftRow, token: int) -> int:
        """Add a child whose token was drawn from the row; return its index."""
        self.shares.append(row.share(token))
        row.take(token)
        self.tokens.append(token)
        self.parents.append(node)
        self.depths.append(self.depths[node] + 1)
        return len(self.tokens) - 1

    def build(self) -> DraftTree:
        """Return the tree as it stands."""
        tokens = np.array(self.tokens, dtype=np.int64)
        return DraftTree(Topology(self.parents), tokens, self._rows[: len(self)])

    def _row(self, node: int, logits: Tensor) -> DraftRow:
        row = self._rows[node]
        np.copyto(row, torch.softmax(logits / self._temperature, dim=-1).cpu().numpy())
        total = row.sum()
        if not total > 0:  # also NaN
            raise InvalidOutput("the draft model returned NaN logits.")
        row /= total
        path: list[int] = []
        while node:
            path.append(self.tokens[node])
            node = self.parents[node]
        return DraftRow(row, tuple(path[::-1]))


# --- drafters and methods -------------------------------------------------------------------------


class ModelDrafter(ABC):
    """A drafter that asks a draft model. One lives for one text."""

    wants_prompt_logits = False

    def __init__(
        self,
        draft: TextGenerator,
        decoding: Decoding,
        most_drafts: int,
        *,
        temperature: float,
        choose: Choose | None = None,
    ) -> None:
        """Prepare for a text.

        Args:
            draft: The draft model.
            decoding: How the text will be continued.
            most_drafts: Largest tree, its root not counted.
            temperature: Of the draft distributions.
            choose: Draws from them; by default from the seed of `decoding`.
        """
        self.max_nodes = 1 + most_drafts
        self.temperature = temperature
        self.choose = choose or chooser(decoding.seed)
        self._model = draft
        self._decoding = decoding
        self._rows: npt.NDArray[np.float64] | None = None
        self._seconds = 0.0
        self.draft_model: DraftModel

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """The draft model, the size of the largest tree, and the seconds of all drafting.

        Reading the prompt belongs to the prefill and is not among the seconds.
        """
        return {
            "draft": self._model.name,
            "draft_nodes": self.max_nodes - 1,
            "draft_seconds": self._seconds,
        }

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        """Let the draft model read the prompt."""
        capacity = len(prompt_ids) + self._decoding.max_new_tokens + self.max_nodes
        self.draft_model = DraftModel(self._model, capacity)
        self.draft_model.begin(prompt_ids)

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        """Return a tree no deeper than `budget` and the draft model's context allow."""
        depth = min(budget, self.draft_model.room(len(token_ids)))
        if depth < 1:
            return DraftTree.root(token_ids[-1])
        started = time.perf_counter()
        tree = self.propose(token_ids, depth)
        self._seconds += time.perf_counter() - started
        return tree

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        """Let the draft model's cache follow the text."""
        self.draft_model.follow(accepted.path)

    @abstractmethod
    def propose(self, token_ids: Sequence[int], depth: int) -> DraftTree:
        """Return a tree under the text, no deeper than `depth`, which is at least 1."""

    def drawn_tree(self, token_ids: Sequence[int]) -> DrawnTree:
        """Return a tree of the root alone, ready to be drawn."""
        logits = self.draft_model.root(token_ids)
        if self._rows is None:
            self._rows = np.empty((self.max_nodes, len(logits)))
        return DrawnTree(
            token_ids[-1],
            logits,
            self.draft_model.expand,
            temperature=self.temperature,
            choose=self.choose,
            rows=self._rows,
        )

    def count_work(self, trace: Trace, target: TextModelFacts) -> None:
        """Add the draft model's forwards to a trace, and what one costs of a target's at least.

        Nodes that kernels run again because they know whole trees only are not counted.
        """
        facts = self._model.facts
        for number, forward in enumerate(self.draft_model.forwards):
            trace.flops += facts.flops(forward, 1 if number == 0 else None)
            trace.kv_bytes += facts.kv_read(forward)
        trace.draft_forwards += len(self.draft_model.forwards)
        trace.notes["draft_share"] = facts.weight_bytes / target.weight_bytes


class _ModelDraftedGenerator(DraftedGenerator):
    """A text generator whose drafters know how the text is to be continued."""

    def __init__(self, model: TextGenerator, make_drafter: Callable[[Decoding], Drafter]) -> None:
        super().__init__(model, lambda: make_drafter(GREEDY))
        self._make_drafter_for = make_drafter

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids` with a fresh drafter; its work is in the trace."""
        drafter = self._make_drafter_for(decoding)
        result = decode(self._model, prompt_ids, decoding, drafter)
        if isinstance(drafter, ModelDrafter):
            drafter.count_work(result.trace, self._model.facts)
        return result


@dataclass(frozen=True, kw_only=True)
class DraftModelMethod(DecodingMethod):
    """A method with a draft model.

    Class attributes:
        trial: A draft that the battery's model has.

    Attributes:
        draft: The draft model: an embedded one, `hf:<id>`, `path:<folder>`, or `layers:2` for the
            target's own first two layers. It must share the target's vocabulary.
    """

    draft: str = "tiny-draft"
    trial: ClassVar[Mapping[str, Any]] = MappingProxyType({"draft": "layers:1"})

    def __post_init__(self) -> None:
        require_draft(self.draft)

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its texts drafted; the draft is loaded here, outside the clock.

        Raises:
            Unsupported: There is no such draft model, or its vocabulary is not the target's.
        """
        require_text_generator(self, model)
        self.drafter(model, hardware)
        yield _ModelDraftedGenerator(
            model, lambda decoding: self.drafter(model, hardware, decoding)
        )

    def drafter(
        self, model: TextGenerator, hardware: Profile, decoding: Decoding = GREEDY
    ) -> Drafter:
        """Return a drafter for one text.

        Raises:
            Unsupported: There is no such draft model, or its vocabulary is not the target's.
        """
        if self.is_plain:
            return NoDraft()
        draft = draft_for(self.draft, model)
        size = self.chosen_size(hardware, model.facts, draft.facts, decoding)
        return self.model_drafter(draft, size, decoding) if size else NoDraft()

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Whether these settings decode plainly, so that no draft model is needed."""

    @abstractmethod
    def chosen_size(
        self, hardware: Profile, target: TextModelFacts, draft: TextModelFacts, decoding: Decoding
    ) -> int:
        """Return the size that a setting or the measured costs ask for."""

    @abstractmethod
    def model_drafter(self, draft: TextGenerator, size: int, decoding: Decoding) -> ModelDrafter:
        """Return a drafter for one text."""


def require_draft(value: object) -> None:
    """Raise ValueError unless `value` can be the id of a draft model."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"draft must be the id of a model, got {value!r}.")


def draft_temperature_of(setting: float | Literal["target"], decoding: Decoding) -> float:
    """Return the temperature to draft at; 0 takes the likeliest tokens."""
    return decoding.temperature if setting == "target" else setting


def require_draft_temperature(value: object, *, target_allowed: bool) -> None:
    """Raise ValueError unless a draft temperature is one that distributions can be drawn at."""
    if target_allowed and value == "target":
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.05 <= cast(float, value) <= 10:
        raise ValueError(
            f"draft_temperature must lie in [0.05, 10]{' or be target' if target_allowed else ''},"
            f" got {value!r}."
        )


# --- how large a tree -----------------------------------------------------------------------------


class MeasuredDrafts(NamedTuple):
    """What trees of several sizes were measured to give; 0 drafts give 1 token for nothing.

    Attributes:
        drafts: Sizes, ascending, from 1 on.
        tokens: Tokens that a step emits, bonus included.
        forwards: Forwards of the draft model in a step.
    """

    drafts: tuple[int, ...]
    tokens: tuple[float, ...]
    forwards: tuple[float, ...]

    def tokens_at(self, drafts: int) -> float:
        """Return the tokens of a step, linear between the measured sizes."""
        return float(np.interp(drafts, (0, *self.drafts), (1.0, *self.tokens)))

    def forwards_at(self, drafts: int) -> float:
        """Return the draft forwards of a step, linear between the measured sizes."""
        return float(np.interp(drafts, (0, *self.drafts), (0.0, *self.forwards)))


def nearest_temperature(
    measured: Mapping[float, MeasuredDrafts], temperature: float
) -> MeasuredDrafts:
    """Return what was measured at the temperature nearest to the one asked for."""
    return measured[min(measured, key=lambda known: abs(known - temperature))]


def best_size(
    measured: MeasuredDrafts, hardware: Profile, target: TextModelFacts, draft: TextModelFacts
) -> int | None:
    """Return the number of drafts with the most tokens per second.

    A step costs lat(N) of the target and its draft forwards; these cost what the target's would at
    the same width, times the draft's share of the target's bytes, plus `STEP_OVERHEAD`. On a GPU,
    where a small model's forward takes the time of launching its kernels, the share is that of the
    layers where it is larger.

    Returns:
        From 0 to the largest measured size; None without a measured step cost.
    """
    cost = hardware.step_cost
    if cost is None:
        return None
    context = middle_context(cost)
    most = measured.drafts[-1]

    def step_seconds(drafts: int) -> float:
        forwards = measured.forwards_at(drafts)
        width = max(1, round(drafts / forwards)) if forwards else 1
        drafting = forwards * draft_share(hardware, target, draft) * cost.at(width, context)
        return cost.at(1 + drafts, context) + drafting

    widths = range(1, most + 2)
    with_drafting = StepCost(
        tuple(widths), (context,), (tuple(step_seconds(width - 1) for width in widths),)
    )
    return calibrated_nodes(measured.tokens_at, with_drafting, context, most)


def draft_share(hardware: Profile, target: TextModelFacts, draft: TextModelFacts) -> float:
    """Return what a step of the draft model costs, as a share of a step of the target."""
    share = draft.weight_bytes / target.weight_bytes
    if hardware.kind == "cuda":
        share = max(share, draft.num_layers / target.num_layers)
    return STEP_OVERHEAD * share


# --- what is accepted -----------------------------------------------------------------------------


class AcceptanceCounter(CountingDrafter):
    """Counts which drafts are accepted, by sibling order.

    Attributes:
        trials: Visited nodes that had a child of each order, (orders,).
        hits: Of these, how often that child was accepted, (orders,).
    """

    def __init__(self, inner: Drafter, orders: int) -> None:
        super().__init__(inner, (orders,), (orders,))

    def count(self, tree: DraftTree, accepted: Accepted) -> None:
        """See `CountingDrafter.count`."""
        orders = len(self.trials)
        for node, following in itertools.zip_longest(accepted.path, accepted.path[1:]):
            children = tree.topology.children[node][:orders]
            self.trials[: len(children)] += 1
            if following in children:
                self.hits[children.index(following)] += 1


class ShareCounter(CountingDrafter):
    """Counts how often drafts are accepted, by the probability they were drawn with.

    For DySpec's claim that the one predicts the other. A draft counts once verification tests it:
    its parent was accepted, its earlier siblings were not.

    Attributes:
        trials: Drafts tested, by equal bins of the probability under the distribution drawn from,
            (bins,).
        hits: Of these, the accepted ones, (bins,).
    """

    def __init__(self, inner: Drafter, bins: int) -> None:
        super().__init__(inner, (bins,), (bins,))

    def count(self, tree: DraftTree, accepted: Accepted) -> None:
        """See `CountingDrafter.count`."""
        bins = len(self.trials)
        for node, following in itertools.zip_longest(accepted.path, accepted.path[1:]):
            children = tree.topology.children[node]
            if not children or tree.draft_probabilities is None:
                continue
            row = DraftRow(tree.draft_probabilities[node])
            for child in children:
                token = int(tree.tokens[child])
                place = min(int(row.share(token) * bins), bins - 1)
                self.trials[place] += 1
                if child == following:
                    self.hits[place] += 1
                    break
                row.take(token)
