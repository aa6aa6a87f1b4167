"""DySpec: a draft tree that grows where the draft model expects its drafts to be accepted.

A slot is one more draw for a node: (node, what its draft distribution has left, v), with v the
estimated probability that verification gets as far as this draw. Drawing y with probability R(y)
opens two slots: the next sibling, worth v * (1 - R(y)), and the first child of y, worth v * R(y).
The draft's own probabilities stand for probabilities of acceptance.

`greedy` always fills the best slot, one at a time; a node is read by the draft model when its first
child slot is the best, not when it is drawn, which gives the same tree for fewer forwards.
`threshold` fills, level by level, all slots worth at least a threshold; a level is one forward.

Source: arXiv 2410.11744: algorithm 1 (greedy), 2 (threshold; its printed loop condition has the
inequality reversed), 3 (verification; its uniform draw is printed as a normal one). No code was
released. Verification without replacement is `models.decode.accept_without_replacement`.
Not here: the depth-first reordering for block-sparse kernels, of which none is used.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from hardware.profile import Profile
from methods.checks import require_choice, require_count
from methods.decoding.common_drafts import (
    Choose,
    DraftModelMethod,
    DraftRow,
    DrawnTree,
    MeasuredDrafts,
    ModelDrafter,
    best_size,
    nearest_temperature,
    require_draft_temperature,
)
from models.base import Decoding, TextGenerator, TextModelFacts
from models.draft_tree import DraftTree

MOST_NODES = 768
PUBLISHED_NODES = 64

# Chosen for "auto" on a CPU where no step cost was measured.
CPU_NODES = 12

Mode = Literal["greedy", "threshold"]

# What "auto" knows about trees of tiny-draft, by mode and temperature of the text: measured on
# SmolLM2-135M's own texts behind 6 prompts of tests/methods/decoding/heads.py, 48 tokens each.
# `python -m tests.methods.decoding.measure_drafts smollm2-135m tiny-draft 6` prints them anew.
MEASURED: Mapping[Mode, Mapping[float, MeasuredDrafts]] = MappingProxyType(
    {
        "greedy": {
            0.0: MeasuredDrafts(
                drafts=(1, 4, 8, 16, 48),
                tokens=(1.3, 1.61, 1.76, 1.85, 2.17),
                forwards=(0.98, 2.07, 3.25, 5.06, 11.65),
            ),
            0.8: MeasuredDrafts(
                drafts=(1, 4, 8, 16, 48),
                tokens=(1.36, 1.58, 1.58, 1.97, 1.97),
                forwards=(0.99, 2.14, 3.42, 6.10, 12.57),
            ),
        },
        "threshold": {
            0.0: MeasuredDrafts(
                drafts=(1, 4, 8, 16, 48),
                tokens=(1.3, 1.63, 1.77, 1.92, 2.12),
                forwards=(0.98, 1.82, 2.05, 2.24, 2.54),
            ),
            0.8: MeasuredDrafts(
                drafts=(1, 4, 8, 16, 48),
                tokens=(1.36, 1.59, 1.74, 1.84, 2.10),
                forwards=(0.99, 1.72, 2.25, 2.45, 2.46),
            ),
        },
    }
)


class Filled(NamedTuple):
    """A slot that was filled.

    Attributes:
        child: The node that was drawn.
        value: What the slot was worth: the estimated probability that verification reaches it.
    """

    child: int
    value: float


class DynamicDrafter(ModelDrafter):
    """Grows a tree of its own for every step."""

    def __init__(
        self,
        draft: TextGenerator,
        decoding: Decoding,
        nodes: int,
        *,
        mode: Mode,
        threshold: float,
        temperature: float,
        choose: Choose | None = None,
    ) -> None:
        super().__init__(draft, decoding, nodes, temperature=temperature, choose=choose)
        self._mode = mode
        self._threshold = threshold

    def propose(self, token_ids: Sequence[int], depth: int) -> DraftTree:
        """Return the tree that suits the text."""
        tree, nodes = self.drawn_tree(token_ids), self.max_nodes - 1
        if self._mode == "greedy":
            grow_greedily(tree, nodes, depth)
        else:
            grow_by_threshold(tree, nodes, depth, self._threshold)
        return tree.build()


def grow_greedily(tree: DrawnTree, nodes: int, depth: int) -> list[Filled]:
    """Fill the best slots, one after the other.

    Args:
        tree: The root alone.
        nodes: Drafts to draw; fewer only where no slot is left.
        depth: Deepest node allowed.

    Returns:
        The filled slots in order; their values never rise.
    """
    # (-value, order of creation, node, its row once the draft model has read it)
    slots: list[tuple[float, int, int, DraftRow | None]] = [(-1.0, 0, 0, tree.root_row)]
    created = 1
    filled: list[Filled] = []
    while slots and len(filled) < nodes:
        negative, _, node, row = heapq.heappop(slots)
        value = -negative
        if row is None:
            [row] = tree.expand([node])
        child = tree.draw(node, row)
        share = tree.shares[child]
        filled.append(Filled(child, value))
        if not row.is_spent:
            heapq.heappush(slots, (-value * (1 - share), created, node, row))
        if tree.depths[child] < depth:
            heapq.heappush(slots, (-value * share, created + 1, child, None))
        created += 2
    return filled


def grow_by_threshold(tree: DrawnTree, nodes: int, depth: int, threshold: float) -> list[Filled]:
    """Fill all slots worth at least `threshold`, level by level.

    Where the nodes run out within a level, its better parents have had their turn: the order of
    parents depends on what was drawn above them only, so the drafts stay exact.

    Args:
        tree: The root alone.
        nodes: Most drafts to draw.
        depth: Deepest node allowed.
        threshold: Least value of a slot.

    Returns:
        The filled slots in order.
    """
    level = [(0, 1.0, tree.root_row)]
    filled: list[Filled] = []
    for reached in range(1, depth + 1):
        opened: list[tuple[float, int]] = []
        for node, worth, row in level:
            value = worth
            while value >= threshold and not row.is_spent and len(filled) < nodes:
                child = tree.draw(node, row)
                share = tree.shares[child]
                filled.append(Filled(child, value))
                opened.append((value * share, child))
                value *= 1 - share
        wanted = sorted((each for each in opened if each[0] >= threshold), key=lambda e: -e[0])
        if not wanted or len(filled) >= nodes or reached == depth:
            break
        rows = tree.expand([child for _, child in wanted])
        level = [(child, value, row) for (value, child), row in zip(wanted, rows, strict=True)]
    return filled


@dataclass(frozen=True, kw_only=True)
class DySpec(DraftModelMethod):
    """Dynamic trees.

    Attributes:
        tree_nodes: Most drafts in a tree; `auto` takes the number that the measured step cost
            favours. 0 decodes plainly.
        mode: `greedy` fills the best slot until the tree is full, `threshold` all slots worth at
            least `threshold`, level by level.
        threshold: Least value of a slot in the threshold mode; `auto` is 1 / tree_nodes.
        draft_temperature: Of the draft distributions, drawn from and tested with.
    """

    tree_nodes: int | Literal["auto"] = PUBLISHED_NODES
    mode: Mode = "greedy"
    threshold: float | Literal["auto"] = "auto"
    draft_temperature: float = 0.6
    neutral = MappingProxyType({"tree_nodes": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("mode", self.mode, ("greedy", "threshold"))
        if self.tree_nodes != "auto":
            require_count("tree_nodes", self.tree_nodes, 0, MOST_NODES, "Or 'auto'.")
        if self.threshold != "auto" and not (
            isinstance(self.threshold, (int, float)) and 0 < self.threshold <= 1
        ):
            raise ValueError(
                f"threshold must lie in (0, 1] or be auto, got {self.threshold!r}. It is the least "
                f"estimated probability that verification reaches a draft."
            )
        require_draft_temperature(self.draft_temperature, target_allowed=False)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return self.tree_nodes == 0

    def chosen_size(
        self, hardware: Profile, target: TextModelFacts, draft: TextModelFacts, decoding: Decoding
    ) -> int:
        """Return the most drafts of a tree."""
        if self.tree_nodes != "auto":
            return self.tree_nodes
        measured = nearest_temperature(MEASURED[self.mode], decoding.temperature)
        best = best_size(measured, hardware, target, draft)
        if best is not None:
            return best
        return CPU_NODES if hardware.kind == "cpu" else PUBLISHED_NODES

    def model_drafter(self, draft: TextGenerator, size: int, decoding: Decoding) -> DynamicDrafter:
        """Return a drafter for one text."""
        return DynamicDrafter(
            draft,
            decoding,
            size,
            mode=self.mode,
            threshold=1 / size if self.threshold == "auto" else self.threshold,
            temperature=self.draft_temperature,
        )
