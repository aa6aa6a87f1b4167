"""PPE: a merged visual token stands at several places at once.

Tokens are clustered and each cluster becomes its mean. One position would say where one member
was; here the rotary frequencies of each axis are divided into K groups, and each group turns by the
position of another member. Features and number of tokens are those of the merger alone. No
parameters, no training; does not see the question. `cascade` merges again between layers of the
decoder.

Source: arXiv 2510.22936; the authors' code at 7b6aa7d, a re-implementation without the cascade for
images. The merger is Chat-UniVi's DPC-KNN (arXiv 2311.08046). Differs from that code: no noise in
the density; members are taken evenly spaced in the order of the picture (`members`), where it
takes the last ones of an arbitrary order (`cyclic_reference`); merged tokens stand in the place of
their first member (`order`); a merger behind a layer deals its members' positions out in turn, as
the paper's figure shows, where the code copies one member's. Tiles are clustered one by one. Where
K does not divide the frequencies of an axis, each frequency is a group of its own and the K members
come round in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from methods.checks import require_choice, require_count, require_number
from methods.visual_pruning.common import VisualTokenMethod, share_out
from methods.visual_pruning.common_merging import dpc_flops, dpc_knn
from models.base import Unsupported
from models.vision_language import Merged, Numbering, Seen, VisionLanguage, VisualPlan
from models.vision_language_decoder import Positions, PromptTokens, Stage, StageView

Placement = Literal["ppe", "renumber", "centre", "mean"]
Members = Literal["spaced", "cyclic_reference", "nearest", "random"]
Order = Literal["first_member", "score"]


@dataclass(frozen=True, kw_only=True)
class Ppe(VisualTokenMethod):
    """Positional preservation embedding on top of density-peak clusters.

    Attributes:
        keep_ratio: Clusters over tokens, in (0, 1]; the number of clusters is rounded up.
        positions: `auto` only: the numbering follows from `placement`.
        placement: Where a merged token stands: at its members' places (`ppe`), at its `centre`, at
            the `mean` of the members' places, or in a sequence numbered anew (`renumber`), which is
            the merger without PPE.
        groups: Positions of a token and axis, K; at most the frequencies of each axis.
        members: Which members give their positions: evenly `spaced` ones, the `nearest` to the
            centre, `random` ones, or those of the reference code.
        order: Clusters by their first member, or by their score, best first.
        knn: Neighbours of the density in front of the decoder.
        cascade: Decoder layers behind which tokens are merged again, counted from 1; the authors'
            11, 23 and 35 of 36.
        cascade_ratio: Clusters over tokens at each of them.
        cascade_knn: Neighbours of the density there.
    """

    trial = MappingProxyType({"groups": 2})

    keep_ratio: float = 0.45
    positions: Numbering = "auto"
    placement: Placement = "ppe"
    groups: int = 8
    members: Members = "spaced"
    order: Order = "first_member"
    knn: int = 5
    cascade: tuple[int, ...] = ()
    cascade_ratio: float = 0.45
    cascade_knn: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "cascade", tuple(self.cascade))  # JSON has lists only
        require_choice("positions", self.positions, ("auto",))
        require_choice("placement", self.placement, get_args(Placement))
        require_choice("members", self.members, get_args(Members))
        require_choice("order", self.order, get_args(Order))
        require_count("groups", self.groups, 1, None, "It counts positions of a token.")
        require_count("knn", self.knn, 1, None, "It counts tokens.")
        require_count("cascade_knn", self.cascade_knn, 1, None, "It counts tokens.")
        require_number(
            "cascade_ratio",
            self.cascade_ratio,
            0,
            1,
            "It is the share kept by each stage.",
            above_low=True,
        )
        for layer in self.cascade:
            require_count("cascade", layer, 1, None, "Layers count from 1.")

    def budget(self, tokens: int) -> int:
        """Return the number of clusters of so many tokens."""
        return clusters_of(self.keep_ratio, tokens)

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan that merges tokens and says where they stand."""
        axes = model.decoder.rotary_sections
        if self.placement == "ppe" and self.groups > min(axes):
            raise Unsupported(
                f"{self.groups} positions do not fit an axis of '{model.name}', which turns by "
                f"{min(axes)} frequencies; choose at most as many groups."
            )
        sections = Sections.split(axes, self.groups if self.placement == "ppe" else 1)
        return VisualPlan(
            wanted=self.budget,
            reduce=lambda seen: self._reduce(seen, sections),
            stages=tuple(
                self._stage(count, layer, sections)
                for count, layer in enumerate(self.cascade, start=1)
            ),
            positions="compact" if self.placement == "renumber" else "auto",
            separators="rows",
        )

    def _stage(self, count: int, layer: int, sections: Sections) -> Stage:
        def wanted(tokens: int) -> int:
            for _ in range(count):
                tokens = clusters_of(self.cascade_ratio, tokens)
            return tokens

        return Stage(
            after=layer, choose=lambda view: self._merge_again(view, sections), wanted=wanted
        )

    def _reduce(self, seen: Seen, sections: Sections) -> Merged:
        merging = merge(
            seen.projected,
            seen.layout.patch_tile,
            self.budget(seen.num_patches),
            neighbours=self.knn,
            order=self.order,
        )
        seen.count(merging.flops)
        if self.placement == "renumber":
            return Merged(merging.anchors, embeddings=merging.means)
        generator = torch.Generator().manual_seed(seen.image_key)

        def slots(patches: Tensor, cluster: int) -> Tensor:
            """Return where a merged token stands, (axes, slots)."""
            members = merging.members[cluster]
            if self.placement == "mean":
                return patches[:, members].double().mean(1, keepdim=True)
            if self.placement == "centre":
                return patches[:, merging.centres[cluster], None]
            chosen = choose_members(
                merging.distances[cluster], sections.groups, self.members, generator
            )
            return patches[:, members[chosen]]

        def positions(patches: Tensor) -> Tensor:
            clusters = range(len(merging.members))
            return sections.rows(torch.stack([slots(patches, each) for each in clusters], -1))

        return Merged(
            merging.anchors,
            embeddings=merging.means,
            positions=positions,
            sections=sections.widths,
        )

    def _merge_again(self, view: StageView, sections: Sections) -> PromptTokens:
        tokens = view.tokens
        places = tokens.patches
        merging = merge(
            tokens.states[places],
            tokens.tile[places],
            clusters_of(self.cascade_ratio, len(places)),
            neighbours=self.cascade_knn,
            order=self.order,
        )
        view.count(merging.flops)
        anchors = places[merging.anchors]
        states = tokens.states.clone()
        states[anchors] = merging.means
        positions = tokens.positions
        if self.placement != "renumber":
            own = sections.slots(positions.values[:, places])

            def slots(cluster: int) -> Tensor:
                members = merging.members[cluster]
                if self.placement == "mean":
                    return own[:, :, members].double().mean(-1)
                if self.placement == "centre":
                    return own[:, :, merging.centres[cluster]]
                return deal_out([own[:, :, each] for each in members])

            rows = sections.rows(torch.stack([slots(c) for c in range(len(merging.members))], -1))
            values = positions.values.to(rows.dtype)
            values = values.index_copy(1, anchors, rows)
            positions = Positions(values, sections.widths)
        changed = replace(tokens, states=states, positions=positions)
        return changed.take(tokens.keeping(merging.anchors, "rows"))


def clusters_of(ratio: float, tokens: int) -> int:
    """Return how many clusters a share of so many tokens is, rounded up."""
    # A product such as 0.1 * 30 lies a rounding above the whole number.
    return math.ceil(ratio * tokens - 1e-9)


@dataclass(frozen=True)
class Sections:
    """Rotary frequencies cut into sections, each of which turns by one position of its axis.

    Attributes:
        groups: Positions of a token and axis; a *slot* is one of them.
        widths: Frequencies of each section, in their order.
        axis, slot: What each section turns by.
    """

    groups: int
    widths: tuple[int, ...]
    axis: tuple[int, ...]
    slot: tuple[int, ...]

    @classmethod
    def split(cls, axes: Sequence[int], groups: int) -> Sections:
        """Cut each axis into `groups` equal sections, or all into single frequencies.

        Args:
            axes: Frequencies of each axis.
            groups: At most the frequencies of an axis.
        """
        divides = all(width % groups == 0 for width in axes)
        cut = [groups if divides else width for width in axes]
        return cls(
            groups=groups,
            widths=tuple(
                width // count for width, count in zip(axes, cut, strict=True) for _ in range(count)
            ),
            axis=tuple(axis for axis, count in enumerate(cut) for _ in range(count)),
            slot=tuple(place % groups for count in cut for place in range(count)),
        )

    def rows(self, slots: Tensor) -> Tensor:
        """Return the position of each section, (sections, tokens), from (axes, slots, tokens)."""
        return slots[list(self.axis), list(self.slot)]

    def slots(self, rows: Tensor) -> Tensor:
        """Return the positions of each slot, (axes, slots, tokens), from (sections, tokens)."""
        pairs = list(zip(self.axis, self.slot, strict=True))
        return torch.stack(
            [
                rows[[pairs.index((axis, slot)) for slot in range(self.groups)]]
                for axis in range(max(self.axis) + 1)
            ]
        )


@dataclass(frozen=True)
class Merging:
    """Merged tokens in the order in which the decoder reads them.

    Attributes:
        means: (clusters, width).
        anchors: Tokens in whose places they stand, ascending, (clusters,).
        members: Tokens of each cluster, ascending.
        centres: Centre of each cluster.
        distances: Of each cluster's members to its centre.
        flops: Operations.
    """

    means: Tensor
    anchors: Tensor
    members: list[Tensor]
    centres: list[int]
    distances: list[Tensor]
    flops: float


def merge(vectors: Tensor, tile: Tensor, budget: int, *, neighbours: int, order: Order) -> Merging:
    """Cluster the tokens of each tile and take their means.

    Args:
        vectors: (tokens, width).
        tile: Of each token, (tokens,).
        budget: Clusters altogether.
        neighbours: For the density.
        order: See `Ppe`.
    """
    found: list[tuple[float, Tensor, int, Tensor, Tensor]] = []
    flops = 0.0
    for number, share in enumerate(share_out(torch.bincount(tile).tolist(), budget)):
        own = (tile == number).nonzero().flatten()
        if not share:
            continue
        clusters = dpc_knn(vectors[own], share, neighbours)
        means = clusters.means(vectors[own])
        flops += dpc_flops(*vectors[own].shape)
        for rank in range(share):
            members = clusters.members(rank)
            # By score, tiles stay in their order.
            key = int(own[members[0]]) if order == "first_member" else len(found)
            centre = int(own[clusters.centres[rank]])
            found.append((key, own[members], centre, means[rank], clusters.distance[members]))
    found.sort(key=lambda each: each[0])
    return Merging(
        means=torch.stack([mean for _, _, _, mean, _ in found]),
        anchors=torch.stack([members[0] for _, members, *_ in found]).sort().values,
        members=[members for _, members, *_ in found],
        centres=[centre for _, _, centre, *_ in found],
        distances=[distance for *_, distance in found],
        flops=flops,
    )


def choose_members(
    distance: Tensor, groups: int, rule: Members, generator: torch.Generator
) -> Tensor:
    """Return which members of a cluster give their positions, (groups,).

    Fewer members than groups come round again, more are not all heard.

    Args:
        distance: Of each member to the centre, (members,), members in the order of the picture.
        groups: Positions wanted.
        rule: See `Ppe`.
        generator: For `random`.
    """
    members, turn = len(distance), torch.arange(groups)
    if rule == "spaced":
        return (2 * turn + 1) * members // (2 * groups)
    if rule == "cyclic_reference":
        return members - 1 - turn % members
    if rule == "nearest":
        return distance.cpu().sort(stable=True).indices[turn % members]
    return torch.randperm(members, generator=generator)[turn % members]


def deal_out(members: Sequence[Tensor]) -> Tensor:
    """Return the positions of a token made of tokens with several each, dealt out in turn.

    Slot s goes to member s modulo the members, which gives the first of its positions that it has
    not given yet: {2, 2, 6, 6} and {7, 5, 9, 14} make {2, 7, 6, 5}, as in the paper's figure. A
    token that no other is merged with is not dealt: it stays where it was, slot by slot.

    Args:
        members: (axes, slots) each.

    Returns:
        (axes, slots).
    """
    if len(members) == 1:
        return members[0]
    hands = []
    for slots in members:
        # Each position once, in order; a position is one number of every axis.
        hands.append(list(dict.fromkeys(tuple(column) for column in slots.T.tolist())))
    dealt = []
    for slot in range(members[0].shape[1]):
        turn, member = divmod(slot, len(hands))
        dealt.append(hands[member][turn % len(hands[member])])
    return members[0].new_tensor(dealt).T
