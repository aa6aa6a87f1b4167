"""Masks recovered under a strict causal mask: reordering, a window, a cache that only grows.

WeDLM's decoder over the sessions that every text method of the harness runs on. Topological
reordering is a tree of one chain: its nodes stand in *physical* order, observed tokens before
masks, and see whatever is before them there; their depths are the distances from the end of the
cache to their *logical* positions, which is what the rotary embedding is told. So the forward is
`models.base.Session.verify`, the same kernels as plain decoding, and committing the leading tokens
is `commit`: nothing in the cache is ever written again.

Source: arXiv 2512.22737, sections 3 and 5; Tencent/WeDLM at 0216110.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.base import Decoding, Forward, Generation, InvalidOutput, Session, TextGenerator, Trace
from models.decode import Draws, check_fits, count_work, greedy_choices, next_token_probabilities
from models.draft_tree import DraftTree, Topology
from models.stopping import Stopper

Refill = Literal["before", "after", "block"]
"""When masks enter the window: before the forward that commits, after it, or by whole blocks."""

NOT_FILLED = -1
"""A slot of the window that is still a mask."""


class Order(NamedTuple):
    """The physical order of a window.

    Attributes:
        slots: Slot (distance from the end of the cache) of each node, (slots,), int64: the filled
            ones ascending, then the masks ascending.
        num_filled: How many of them are filled.
    """

    slots: npt.NDArray[np.int64]
    num_filled: int


def reorder(window: Sequence[int]) -> Order:
    """Return the topological order of a window.

    Args:
        window: Token of each slot in logical order, `NOT_FILLED` for a mask.
    """
    tokens = np.asarray(window, dtype=np.int64)
    # Stable, so that each of the two parts keeps its order.
    slots = np.argsort(tokens == NOT_FILLED, kind="stable")
    return Order(slots, int((tokens != NOT_FILLED).sum()))


class Reordered(Topology):
    """A chain in physical order whose nodes stand at logical positions.

    Attributes:
        depths: Distance of each node from the end of the cache, (nodes,), int64, any order.
    """

    def __init__(self, slots: npt.NDArray[np.int64]) -> None:
        """Take the order of a window; see `reorder`."""
        super().__init__(range(-1, len(slots) - 1))
        self.depths = slots
        self.max_depth = int(slots.max())

    @cached_property
    def ancestors(self) -> npt.NDArray[np.bool_]:
        """The lower triangle: a node sees all that stand before it physically."""
        # Every window of a length has the same one; it is built once.
        return Topology.chain(len(self) - 1).ancestors


def window_tree(window: Sequence[int], order: Order, mask_id: int) -> DraftTree:
    """Return what a forward runs over: the window in physical order, its masks as `mask_id`."""
    tokens = np.asarray(window, dtype=np.int64)[order.slots]
    tokens[order.num_filled :] = mask_id
    return DraftTree(_topology(tuple(order.slots.tolist())), tokens)


@lru_cache(maxsize=256)
def _topology(slots: tuple[int, ...]) -> Reordered:
    """Return the shape of an order; few orders make up most of a text."""
    return Reordered(np.array(slots, dtype=np.int64))


def leading_run(window: Sequence[int]) -> int:
    """Return how many slots are filled before the first mask."""
    return next((n for n, token in enumerate(window) if token == NOT_FILLED), len(window))


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) along the last axis in nats, over all of it, float32.

    Raises:
        InvalidOutput: A logit is NaN.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    if bool(torch.isnan(log_probabilities).any()):
        raise InvalidOutput("the model returned NaN logits.")
    # A probability of exactly 0 adds nothing, where 0 times -inf would be NaN.
    return -torch.nansum(log_probabilities.exp() * log_probabilities, dim=-1)


def select(
    entropy: Tensor, slots: Sequence[int], *, threshold: float | None, distance_penalty: float
) -> list[int]:
    """Choose the masks to fill: all that are sure enough, or else the surest one.

    Args:
        entropy: Of the masks' distributions, nats, (masks,), at least one.
        slots: Logical place of each mask, ascending.
        threshold: Masks with a penalised entropy below it are filled; None fills one alone.
        distance_penalty: Nats added for each token between a mask and the leftmost one.

    Returns:
        Indices of the chosen masks, ascending, never empty.
    """
    distance = torch.tensor(slots, dtype=entropy.dtype, device=entropy.device) - slots[0]
    penalised = entropy + distance_penalty * distance
    if threshold is not None:
        chosen: list[int] = (penalised < threshold).nonzero()[:, 0].tolist()
        if chosen:
            return chosen
    return [int(penalised.argmin())]  # the leftmost of equals


def restrict(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Return logits with all but the candidates of sampling at -inf: top-k, then top-p of those.

    Args:
        logits: (masks, vocab).
        top_k: Candidates at most; 0 for all. Of equal ones at the border all stay.
        top_p: The smallest set whose probability reaches it stays, before any temperature.
    """
    if 0 < top_k < logits.shape[-1]:
        border = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, -torch.inf)
    if top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = torch.softmax(ordered.double(), dim=-1)
        # What comes before a candidate decides whether it is still needed.
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(
            torch.zeros_like(dropped).scatter(-1, places, dropped), -torch.inf
        )
    return logits


class Settings(NamedTuple):
    """How a text is streamed; see `methods.diffusion_lm.wedlm.WeDLM` for the meaning of each."""

    window: int
    entropy_threshold: float | None
    distance_penalty: float
    refill: Refill
    top_k: int
    top_p: float
    mask_id: int


def stream(
    model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding, settings: Settings
) -> Generation:
    """Continue a prompt by filling a sliding window of masks.

    A forward emits the tokens by which it lengthens the run of filled slots behind the text. Their
    keys and values follow with the next forward: they come to stand directly behind the cache
    there, so what it computes for them is final. The text ends as soon as its end is among the
    emitted tokens; the forward that would only have completed the cache is not run.

    Returns:
        The trimmed text. Its trace notes `slots`, all slots that were fed (the paper's N_fwd),
        `cached_tokens`, those whose keys and values were kept, and `slots_per_token`.

    Raises:
        models.base.Unsupported: Prompt and output do not fit the model's context.
        ValueError: The prompt is empty or holds a mask.
        models.base.InvalidOutput: The model returned NaN.
    """
    check_fits(model, prompt_ids, decoding)
    if settings.mask_id in prompt_ids:
        raise ValueError(
            f"the prompt holds the mask (token {settings.mask_id}): a mask is what is to be "
            "written, so no prompt may contain it."
        )
    return _Text(model, prompt_ids, decoding, settings).run()


class _Text:
    """One text in progress.

    Attributes:
        window: Slots behind the cached tokens, in logical order.
        emitted: Tokens behind the prompt before the first mask; the first ones of them are cached.
    """

    def __init__(
        self,
        model: TextGenerator,
        prompt_ids: Sequence[int],
        decoding: Decoding,
        settings: Settings,
    ) -> None:
        self.model = model
        self.prompt_ids = prompt_ids
        self.decoding = decoding
        self.settings = settings
        self.stopper = Stopper(model.tokenizer, decoding, model.facts.eos_ids)
        self.draws = Draws(decoding.seed)
        self.trace = Trace()
        # The window lies inside the text that is asked for, so nothing needs room behind it.
        self.session: Session = model.session(len(prompt_ids) + decoding.max_new_tokens)
        self.window: list[int] = []
        self.emitted: list[int] = []

    def run(self) -> Generation:
        """Write the text."""
        self.session.prefill(self.prompt_ids)
        self.trace.prefill.append(Forward(len(self.prompt_ids), 0))
        self.trace.mark("prefill", self.model.synchronize)
        self._add_masks(self.settings.window)
        end = self.stopper.find(self.emitted)
        while not end.finish:
            known = len(self.emitted)
            self._step()
            end = self.stopper.find(self.emitted, known)
            # What stands behind the end of the text was filled in vain and does not count.
            self.trace.accepted.append(min(len(self.emitted), end.num_tokens) - known - 1)
        self.trace.mark("decode", self.model.synchronize)
        count_work(self.trace, self.model)
        slots = sum(forward.width for forward in self.trace.forwards)
        self.trace.notes.update(
            prefill_tokens=0,
            slots=slots,
            cached_tokens=self._cached,
            slots_per_token=slots / end.num_tokens,
        )
        kept = tuple(self.emitted[: end.num_tokens])
        return Generation(kept, self.stopper.text(kept), end.finish, self.trace)

    @property
    def _cached(self) -> int:
        """Tokens behind the prompt whose keys and values are kept."""
        return self.session.length - len(self.prompt_ids)

    def _step(self) -> None:
        """Run one forward: refill, reorder, commit, fill."""
        refill = self.settings.refill
        if refill == "before":
            self._add_masks(leading_run(self.window))
        # Only what this forward sees filled before its first mask can be kept of it.
        run = leading_run(self.window)
        order = reorder(self.window)
        tree = window_tree(self.window, order, self.settings.mask_id)
        self.trace.forwards.append(Forward(len(tree), self.session.length))
        logits = self.session.verify(tree)
        masks = order.slots[order.num_filled :].tolist()
        if masks:
            for slot, token in self._fill(logits[order.num_filled :], masks):
                self.window[slot] = token
        committed = self._commit(run)
        self.emitted[self._cached :] = self.window[: leading_run(self.window)]
        if refill != "before":
            self._add_masks(committed)

    def _fill(self, logits: Tensor, slots: list[int]) -> list[tuple[int, int]]:
        """Return slots and tokens to write, by the logits of the masks at `slots`."""
        settings = self.settings
        chosen = select(
            entropies(logits),
            slots,
            threshold=settings.entropy_threshold,
            distance_penalty=settings.distance_penalty,
        )
        rows = logits[chosen]
        rows[:, settings.mask_id] = -torch.inf  # a mask is no token of the text
        if self.decoding.temperature == 0:
            tokens = greedy_choices(rows)
        else:
            rows = restrict(rows, top_k=settings.top_k, top_p=settings.top_p)
            probabilities = next_token_probabilities(rows, self.decoding)
            tokens = [self.draws.token(row) for row in probabilities]
        return [(slots[number], token) for number, token in zip(chosen, tokens, strict=True)]

    def _commit(self, run: int) -> int:
        """Keep the keys and values of the first `run` slots; return how many that were."""
        if self.settings.refill == "block" and run < len(self.window):
            return 0
        if run:
            # Physical and logical order agree there: filled slots stand first, ascending.
            self.session.commit(range(run))
            del self.window[:run]
        return run

    def _add_masks(self, count: int) -> None:
        """Append masks, no more than the text may still get."""
        room = self.decoding.max_new_tokens - self._cached - len(self.window)
        self.window += [NOT_FILLED] * min(count, room)


def mask_token_of(model: Any) -> int | None:
    """Return the id of a model's mask token: its tokenizer's, else its configuration's."""
    hub = getattr(model.tokenizer, "hub", None)
    config = getattr(getattr(model, "module", None), "config", None)
    for found in (getattr(hub, "mask_token_id", None), getattr(config, "mask_token_id", None)):
        if found is not None:
            return int(found)
    return None
