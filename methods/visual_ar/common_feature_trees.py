"""Trees of a feature drafter: growing them, reading them at once, walking down what stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from methods.visual_ar.common_drafts import FeatureDrafting, Guess, count_drafting
from methods.visual_ar.common_verification import (
    NeighbourRule,
    Tally,
    VerifiedTree,
    overlap,
    verify_tree,
)
from models.base import AutoregressiveImageModel, Condition, ImageSession, WindowOutput
from models.draft_tree import ROOT_ONLY, Topology
from models.embedded.tiny_ar_image.drafter import FeatureDrafter
from models.image_generation import ImageDraws, TokenPipeline, draw_tokens

Tree = Literal["dynamic", "static", "static-57", "chain"]
Numbers = Callable[[int], Tensor]
"""Returns the next numbers in [0, 1) of an image's stream."""

# How many children the nodes at each rank path of a static tree have; leaves are left out.
_STATIC_CHILDREN: Mapping[Tree, Mapping[str, int]] = {
    "static": {
        **{"": 4, "0": 3, "1": 2, "2": 2, "3": 1},
        **{"00": 3, "01": 2, "02": 2, "10": 1},
        **{"000": 3, "0000": 2},
    },
    "static-57": {
        **{"": 5, "0": 4, "1": 3, "2": 3, "3": 2, "4": 1},
        **{"00": 4, "01": 3, "02": 3, "03": 2, "10": 2, "11": 1, "20": 1},
        **{"000": 4, "001": 3, "002": 2, "003": 1, "010": 2, "011": 1, "020": 1},
        **{"0000": 3, "0001": 2, "0010": 2, "0011": 1, "0020": 1},
    },
}
STATIC_TREES: Mapping[Tree, Topology] = {
    name: Topology.from_rank_paths(
        (*map(int, parent), rank) for parent, count in children.items() for rank in range(count)
    )
    for name, children in _STATIC_CHILDREN.items()
}


class TreeShape(NamedTuple):
    """What trees are grown.

    Attributes:
        tree: `dynamic`: the likeliest nodes by the drafter's own probabilities; `static`: EAGLE's
            25 nodes; `static-57`: LANTERN's extension of it; `chain`: one branch.
        nodes: Drafts of a dynamic tree.
        depth: Most levels.
        branching: Children of a node, and nodes expanded a level, of a dynamic tree.
    """

    tree: Tree
    nodes: int
    depth: int
    branching: int

    @property
    def most_nodes(self) -> int:
        """Drafts of the largest tree."""
        if self.tree == "dynamic":
            return self.nodes
        return len(self.template) - 1

    @property
    def most_read(self) -> int:
        """Nodes that the drafter reads for the largest tree; it does not read the last level."""
        if self.tree == "dynamic":
            return self.branching * (self.depth - 1)
        return len(self.template)

    @property
    def template(self) -> Topology:
        """The shape of trees that are not dynamic."""
        return Topology.chain(self.depth) if self.tree == "chain" else STATIC_TREES[self.tree]


class Proposal(NamedTuple):
    """A tree of drafts.

    Attributes:
        topology: The shape.
        tokens: Of each node but the root, in their order.
        draft: What the children of each node were drawn from, (nodes, vocab); None if they were
            chosen.
    """

    topology: Topology
    tokens: list[int]
    draft: Tensor | None = None


class FeatureTreeLoop:
    """Draws images one after the other with trees of a feature drafter.

    A path through a tree is one for all rows of a cache, so the rows of a batch take turns.

    Attributes:
        headroom: Drafts of the largest tree.
        tally: The nodes judged so far, by the level of their children.
        notes: Acceptance, its excess over the exact rule's, and the drafter's share of the target's
            weights, the head included. Where drafts were chosen, the test of a node is whether any
            child stands, and the exact chance what p gives to all of them; where they were drawn,
            it is the test of a node's first child. Either way the excess is a lower bound of the
            shift of the token emitted there.
    """

    def __init__(self, rule: NeighbourRule, drafter: FeatureDrafter, shape: TreeShape) -> None:
        """Set up a loop for one batch.

        Args:
            rule: Judges the drafts.
            drafter: Guesses features.
            shape: What trees are grown.
        """
        self._rule = rule
        self._drafter = drafter
        self._shape = shape
        self.tally = Tally()
        self._share = 0.0
        self.headroom = shape.most_nodes

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """What became of the drafts."""
        return {**self.tally.notes, "draft_share": self._share}

    def run(
        self,
        model: AutoregressiveImageModel,
        session: ImageSession,
        pipeline: TokenPipeline,
        draws: ImageDraws,
        conditions: Sequence[Condition],
    ) -> Tensor:
        """See `models.image_generation.TokenLoop.run`."""
        tests, drafts = draws.stream("tests"), draws.stream("drafts")
        images = []
        for row, condition in enumerate(conditions):
            own = session
            if session.rows > 1:
                own = model.session(
                    [condition],
                    guided=session.is_guided,
                    capacity=model.facts.image_tokens + self.headroom,
                    trace=session.trace,
                )
            image = _Image(
                rule=self._rule,
                drafter=self._drafter,
                shape=self._shape,
                tally=self.tally,
                model=model,
                session=own,
                pipeline=pipeline,
                emitting=partial(draws.uniform, row),
                testing=partial(tests.uniform, row),
                drawing=partial(drafts.uniform, row),
            )
            images.append(image.draw())
            self._share = image.drafting.facts.weight_bytes / model.facts.weight_bytes
        return torch.stack(images)


@dataclass
class _Image:
    """One image in progress."""

    rule: NeighbourRule
    drafter: FeatureDrafter
    shape: TreeShape
    tally: Tally
    model: AutoregressiveImageModel
    session: ImageSession
    pipeline: TokenPipeline
    emitting: Numbers
    testing: Numbers
    drawing: Numbers

    def __post_init__(self) -> None:
        sampling = self.pipeline.sampling
        self.is_greedy = sampling.temperature == 0
        # The drafter's own judgement of its drafts, and the law that greedy images are judged by.
        self.plain = replace(
            self.pipeline, sampling=replace(sampling, temperature=1.0, top_k=0, top_p=1.0)
        )
        self.drafting = FeatureDrafting(
            self.drafter,
            self.model,
            guidance_scale=sampling.guidance_scale,
            guided_session=self.session.is_guided,
            headroom=self.shape.most_read,
        )

    def draw(self) -> Tensor:
        """Return the image's tokens, (image_tokens,)."""
        total, device = self.model.facts.image_tokens, self.model.device
        output = self.session.prefill()
        law = self.pipeline.probabilities(output, [0])[0, 0]
        image = [int(draw_tokens(law, self.emitting(1)[0].to(device)))]
        features, new = output.hidden, image[:]
        while len(image) < total:
            known = len(image)
            proposal = self.propose(new, features, known, total - known - 1)
            topology = proposal.topology
            nodes = torch.tensor([image[-1], *proposal.tokens], device=device)
            places = torch.from_numpy(topology.depths).to(device) + (known - 1)
            output = self.session.forward(
                nodes[None], places, torch.from_numpy(topology.ancestors).to(device)
            )
            verified = self.verify(output, places + 1, proposal, nodes)
            new = [*nodes[verified.path[1:]].tolist(), verified.token]
            image += new
            features = output.hidden[:, verified.path]
            self.session.keep(known - 1, verified.path)
            self.session.trace.accepted.append(len(new) - 1)
        count_drafting(self.session.trace, self.drafting.work)
        return torch.tensor(image, device=device)

    # -- growing

    def propose(self, new: Sequence[int], features: Tensor, known: int, budget: int) -> Proposal:
        """Grow a tree under the last token.

        Args:
            new: Tokens committed since the last tree.
            features: The target's, of the element before each, (branches, new, width).
            known: Tokens committed.
            budget: Most levels that the image has room for.
        """
        if not self.shape.most_nodes:
            return Proposal(ROOT_ONLY, [])
        # Read even if nothing can be drafted any more: the image may end in the next step only.
        root = self.drafting.begin_step(torch.tensor(new, device=self.model.device), features)
        levels = min(self.shape.depth, budget)
        if not levels:
            return Proposal(ROOT_ONLY, [])
        grow = self._dynamic if self.shape.tree == "dynamic" else self._static
        return grow(root, known, levels)

    def _dynamic(self, root: Guess, known: int, levels: int) -> Proposal:
        """EAGLE-2: expand the likeliest nodes of each level, keep the likeliest of all."""
        width = self.shape.branching
        parents, tokens, scores = list[int](), list[int](), list[float]()
        guess, rows, numbers = root, [-1], [-1]
        base = torch.zeros(1, dtype=torch.float64)
        for depth in range(1, levels + 1):
            places = [known + depth - 1] * len(guess.logits)
            laws = self.plain.from_logits(guess.logits, places).double()
            best = laws.topk(min(width, laws.shape[-1]), dim=-1)
            found = (base[:, None] + best.values.log().cpu()).flatten()
            likely = (found > -torch.inf).nonzero()[:, 0]
            first = len(tokens)
            picked = best.indices.flatten().cpu()[likely]
            sources = likely // best.indices.shape[1]
            tokens += picked.tolist()
            scores += found[likely].tolist()
            parents += [rows[source] for source in sources.tolist()]
            if depth == levels or not len(likely):
                break
            chosen = found[likely].topk(min(width, len(likely)))
            kept = chosen.indices.sort().values
            from_rows = sources[kept]
            guess, taken = self.drafting.expand(
                picked[kept].to(guess.logits.device),
                guess.features[:, from_rows.to(guess.features.device)],
                [numbers[source] for source in from_rows.tolist()],
                depth,
            )
            base = found[likely][kept]
            rows, numbers = (first + kept).tolist(), taken
        # A child is never likelier than its parent, and stands behind it among equals.
        order = sorted(range(len(tokens)), key=lambda node: (-scores[node], node))
        keep = sorted(order[: self.shape.nodes])
        index = {-1: 0} | {node: place for place, node in enumerate(keep, 1)}
        topology = Topology([-1, *(index[parents[node]] for node in keep)])
        return Proposal(topology, [tokens[node] for node in keep])

    def _static(self, root: Guess, known: int, levels: int) -> Proposal:
        """EAGLE: a fixed shape; children are drawn without replacement, or the likeliest."""
        template = self.shape.template
        pipeline = self.plain if self.is_greedy else self.pipeline
        # Node of the template to node of the tree; a law with few tokens has few children.
        built = {0: 0}
        parents, tokens = [-1], [-1]
        device = root.logits.device
        laws: dict[int, Tensor] = {}
        guess, level, numbers = root, [0], [-1]
        for depth in range(1, levels + 1):
            found = pipeline.from_logits(guess.logits, [known + depth - 1] * len(level)).double()
            rows = {node: row for row, node in enumerate(level)}
            for node in level:
                law = found[rows[node]]
                laws[built[node]] = law
                children = template.children[node]
                for child, token in zip(children, self._children(law, len(children)), strict=False):
                    built[child] = len(tokens)
                    parents.append(built[node])
                    tokens.append(token)
            following = [
                node for node in built if template.depths[node] == depth and template.children[node]
            ]
            if depth == levels or not following:
                break
            above = [rows[int(template.parents[node])] for node in following]
            guess, numbers = self.drafting.expand(
                torch.tensor([tokens[built[node]] for node in following], device=device),
                guess.features[:, above],
                [numbers[row] for row in above],
                depth,
            )
            level = following
        draft = None
        if not self.is_greedy:
            draft = torch.zeros(len(tokens), self.model.facts.vocab_size, device=device).double()
            for place, law in laws.items():
                draft[place] = law
        return Proposal(Topology(parents), tokens[1:], draft)

    def _children(self, law: Tensor, count: int) -> list[int]:
        if self.is_greedy:
            chosen: list[int] = law.topk(min(count, len(law))).indices.tolist()
            return chosen
        tokens: list[int] = []
        numbers = self.drawing(count).to(law.device)
        left = law.clone()
        for number in numbers:
            if not float(left.sum()) > 0:
                break
            tokens.append(int(draw_tokens(left, number)))
            left[tokens[-1]] = 0.0
        return tokens

    # -- judging

    def verify(
        self, output: WindowOutput, places: Tensor, proposal: Proposal, nodes: Tensor
    ) -> VerifiedTree:
        """Return the path that stands, and what is emitted behind it."""
        uniforms = torch.cat([self.testing(len(nodes)), self.emitting(1)]).to(nodes.device)
        if self.is_greedy:
            laws = self.plain.probabilities(output, places)[0].double()
            best = self.pipeline.probabilities(output, places)[0].argmax(-1)
            return walk_greedily(self.rule, proposal.topology, nodes, laws, best)
        laws = self.pipeline.probabilities(output, places)[0].double()
        found = verify_tree(
            self.rule, proposal.topology, nodes.tolist(), laws, uniforms, draft=proposal.draft
        )
        self._count(found, proposal, nodes, laws)
        return found

    def _count(self, found: VerifiedTree, proposal: Proposal, nodes: Tensor, laws: Tensor) -> None:
        for step, node in enumerate(found.path):
            children = proposal.topology.children[node]
            if not children:
                continue
            law = laws[node]
            tokens = nodes[list(children)]
            borrowed, _, taken = self.rule.borrowed(law.expand(len(tokens), -1), tokens)
            # Neighbours of no probability are taken by any budget, also by none.
            self.tally.add_borrowed(taken & (borrowed > 0)[:, None])
            if proposal.draft is None:
                stands = torch.tensor(float(step + 1 < len(found.path)), device=law.device)
                exact = law[tokens].sum()
            else:
                draft = proposal.draft[node]
                stands = self.rule.acceptance(law, draft, tokens[0])
                exact = overlap(law, draft)
            test = torch.ones(1, 1, dtype=torch.bool, device=law.device)
            self.tally.add(stands[None, None], exact[None, None], test, first_depth=step + 1)
        self.tally.fallbacks += found.fallbacks


def walk_greedily(
    rule: NeighbourRule, topology: Topology, nodes: Tensor, laws: Tensor, best: Tensor
) -> VerifiedTree:
    """Return the longest path on which every draft, with what it borrows, is the likeliest token.

    Without a budget these are the drafts that plain greedy decoding would have emitted.

    Args:
        rule: Says what a draft borrows.
        topology: The shape.
        nodes: Tokens, (nodes,).
        laws: p after each node at temperature 1, (nodes, vocab).
        best: Likeliest token after each node, (nodes,).
    """
    stands = [True]
    if len(topology) > 1:
        above = laws[torch.from_numpy(topology.parents[1:]).to(laws.device)]
        drafts = nodes[1:]
        borrowed, _, _ = rule.borrowed(above, drafts)
        own = torch.take_along_dim(above, drafts[:, None], dim=-1)[:, 0] + borrowed
        rivals = above.scatter(-1, drafts[:, None], -1.0).max(-1)
        # The lowest id among equals is the likeliest, as in plain decoding.
        wins = (own > rivals.values) | ((own == rivals.values) & (drafts < rivals.indices))
        for node, stand in enumerate(wins.tolist(), 1):
            stands.append(stand and stands[topology.parents[node]])
    depths = topology.depths.tolist()
    last = max(range(len(topology)), key=lambda node: (stands[node], depths[node], -node))
    path = [last]
    while path[-1]:
        path.append(int(topology.parents[path[-1]]))
    return VerifiedTree(path[::-1], int(best[last]), 0)
