"""Rules and kernels against slow definitions, enumeration, an independent package, and bad copies.

A kernel's law is read off the kernel itself: as a function of one uniform number its decision
changes at the acceptance, and its token at the sums of the law it draws from, so bisection finds
both to 1e-9 without sampling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from methods.visual_ar.common_geometry import nearest_neighbours, squared_distances
from methods.visual_ar.common_verification import (
    AddedRule,
    AmplifiedRule,
    ClusterRule,
    EqualityRule,
    ExactRule,
    NeighbourRule,
    Rule,
    Tally,
    output_law,
    overlap,
    replacement,
    verify_chain,
    verify_tree,
)
from models.draft_tree import Topology

VOCAB = 8
seeds = st.integers(0, 10**6)


def laws(seed: int, count: int = 2, vocab: int = VOCAB, sharpness: float = 0.7) -> Tensor:
    """Random distributions, (count, vocab), float64, some with tokens of no probability."""
    random = np.random.default_rng(seed)
    drawn = random.dirichlet([sharpness] * vocab, size=count)
    drawn[:, random.integers(vocab)] *= random.integers(2)
    return torch.from_numpy(drawn / drawn.sum(1, keepdims=True))


def neighbours(seed: int, count: int, vocab: int = VOCAB) -> Tensor:
    vectors = torch.from_numpy(np.random.default_rng(seed).normal(size=(vocab, 3)))
    return nearest_neighbours(vectors, count)


def exact_rules() -> dict[str, Rule]:
    return {
        "exact": ExactRule(),
        "clusters of one": ClusterRule(1),
        "no embedding near": ClusterRule(5, embeddings=torch.eye(VOCAB).double(), distance=0.0),
        "no margin": ClusterRule(5, margin=0.0),
        "factor 1": AmplifiedRule(1.0),
        "nothing added": AddedRule(0.0),
        "no budget": NeighbourRule(neighbours(0, 5), 0.0),
        "equality": EqualityRule(),
    }


def relaxed_rules() -> dict[str, Rule]:
    return {
        "dynamic": ClusterRule(4, margin=0.1),
        "by-p": ClusterRule(4, "by-p"),
        "by-q": ClusterRule(3, "by-q"),
        "static": ClusterRule(3, "static", neighbours=neighbours(1, 5)),
        "partition": ClusterRule(3, "partition"),
        "partition-group": ClusterRule(3, "partition", replaces_by_group=True),
        "amplify": AmplifiedRule(2.0),
        "add": AddedRule(0.05),
        "lantern": NeighbourRule(neighbours(2, 4), 0.2),
        "lantern++": NeighbourRule(neighbours(2, 4), 0.0, growth=3.0),
    }


# ----------------------------------------------------------------------------- slow definitions


def slow_cluster(p: Sequence[float], token: int, size: int, margin: float) -> set[int]:
    """GSD's dynamic cluster: r - G/2 <= rank < r + G/2 in ascending order, then the filter."""
    ascending = sorted(range(len(p)), key=lambda each: (p[each], -each))
    rank = ascending.index(token)
    inside = {
        each
        for place, each in enumerate(ascending)
        if rank - size / 2 <= place < rank + size / 2 and abs(p[each] - p[token]) < margin
    }
    return inside | {token}


def slow_borrowed(
    p: Sequence[float], token: int, near: Sequence[int], budget: float
) -> tuple[float, list[int]]:
    total, taken = 0.0, []
    for each in near:
        if total + p[each] > budget:
            break
        total += p[each]
        taken.append(each)
    return total, taken


def slow_law(
    p: Sequence[float],
    q: Sequence[float],
    accepts: Callable[[int], float],
    residual: Callable[[int], list[float]],
) -> list[float]:
    """The law of the emitted token, summed draft by draft."""
    out = [0.0] * len(p)
    for token, chance in enumerate(q):
        if not chance:
            continue
        out[token] += chance * accepts(token)
        left = residual(token)
        total = sum(left)
        for each, mass in enumerate(left):
            share = mass / total if total > 0 else p[each]
            out[each] += chance * (1 - accepts(token)) * share
    return out


# ------------------------------------------------------------------------------------ one draft


@pytest.mark.parametrize("name", exact_rules())
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_exact_rules_emit_the_targets_distribution(name: str, seed: int):
    p, q = laws(seed)
    found = output_law(exact_rules()[name], p, q)
    assert (found.law - p).abs().max() < 1e-12
    if name != "equality":
        assert found.acceptance == pytest.approx(1 - 0.5 * float((p - q).abs().sum()))
    else:
        assert found.acceptance == pytest.approx(float((p * q).sum()))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, size=st.integers(1, 6), margin=st.sampled_from([0.02, 0.1, 1.0]))
def test_dynamic_clusters_are_those_of_the_paper(seed: int, size: int, margin: float):
    p, q = laws(seed)
    rule = ClusterRule(size, margin=margin)
    members, kept = rule.members(p[None], q[None], torch.arange(VOCAB))
    values = p.tolist()
    for token in range(VOCAB):
        found = set(members[token][kept[token]].tolist())
        assert found == slow_cluster(values, token, size, margin)
        clusters = [sum(law[each] for each in found) for law in (values, q.tolist())]
        if q[token] > 0:
            chance = float(rule.acceptance(p, q, torch.tensor(token)))
            assert chance == pytest.approx(min(1.0, clusters[0] / clusters[1]))


def test_embeddings_too_far_apart_leave_the_cluster():
    p = torch.full((4,), 0.25).double()
    places = torch.tensor([[0.0], [1.0], [2.0], [9.0]]).double()
    rule = ClusterRule(4, "dynamic", embeddings=places, distance=4.1)
    members, kept = rule.members(p[None], p[None], torch.arange(4))
    found = [set(members[token][kept[token]].tolist()) for token in range(4)]
    # Squared distances; ties of rank are ordered by id, and a cluster of 4 reaches 1 up, 2 down.
    assert found == [{0, 1, 2}, {0, 1, 2}, {1, 2}, {3}]


@settings(max_examples=40, deadline=None)
@given(seed=seeds, count=st.integers(0, 7), budget=st.floats(0, 0.6), growth=st.booleans())
def test_what_a_draft_borrows_is_a_prefix_of_its_neighbours_within_the_budget(
    seed: int, count: int, budget: float, growth: bool
):
    (p,) = laws(seed, 1)
    near = neighbours(seed, count)
    rule = NeighbourRule(near, 0.0 if growth else budget, 1.01 + 4 * budget if growth else 0.0)
    masses, table, taken = rule.borrowed(p[None], torch.arange(VOCAB))
    relaxed = rule.relaxed(p[None], torch.arange(VOCAB))
    for token in range(VOCAB):
        allowed = (rule.growth - 1) * float(p[token]) if growth else budget
        slow_mass, slow_taken = slow_borrowed(p.tolist(), token, near[token].tolist(), allowed)
        assert table[token][taken[token]].tolist() == slow_taken
        assert token not in slow_taken
        assert float(masses[token]) == pytest.approx(slow_mass)
        assert slow_mass <= allowed
        wanted = p.clone()
        wanted[slow_taken] = 0.0
        wanted[token] = p[token] + slow_mass
        torch.testing.assert_close(relaxed[token], wanted)
        # TV(p_x, p) is what was borrowed.
        assert 0.5 * float((relaxed[token] - p).abs().sum()) == pytest.approx(slow_mass)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_the_law_of_a_relaxed_rule_is_the_sum_over_its_drafts(seed: int):
    p, q = laws(seed)
    near = neighbours(2, 4)
    rule = relaxed_rules()["lantern"]

    def borrowed(token: int) -> tuple[float, list[int]]:
        return slow_borrowed(p.tolist(), token, near[token].tolist(), 0.2)

    def residual(token: int) -> list[float]:
        mass, taken = borrowed(token)
        moved = [0.0 if each in taken else value for each, value in enumerate(p.tolist())]
        moved[token] += mass
        return [max(0.0, a - b) for a, b in zip(moved, q.tolist(), strict=True)]

    wanted = slow_law(
        p.tolist(),
        q.tolist(),
        lambda token: min(1.0, (float(p[token]) + borrowed(token)[0]) / float(q[token])),
        residual,
    )
    assert output_law(rule, p, q).law.tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", relaxed_rules())
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_what_is_accepted_too_often_shifts_the_output_by_at_least_as_much(name: str, seed: int):
    p, q = laws(seed)
    found = output_law(relaxed_rules()[name], p, q)
    assert float(found.law.sum()) == pytest.approx(1)
    assert found.distance >= found.excess_acceptance - 1e-12


@pytest.mark.parametrize("rule", [AmplifiedRule(1.7), AddedRule(0.04)], ids=["amplify", "add"])
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_the_bound_is_reached_by_rules_that_accept_no_token_less_than_the_exact_one(
    rule: Rule, seed: int
):
    # The replacement is the exact one, so all that shifts the output is the excess acceptance.
    p, q = laws(seed)
    found = output_law(rule, p, q)
    assert found.distance == pytest.approx(found.excess_acceptance, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=st.integers(1, 5))
def test_disjoint_clusters_accept_as_their_masses_agree_and_never_less_than_the_exact_rule(
    seed: int, size: int
):
    p, q = laws(seed)
    found = output_law(ClusterRule(size, "partition"), p, q)
    order = sorted(range(VOCAB), key=lambda each: (-float(p[each]), each))
    groups = [order[start : start + size] for start in range(0, VOCAB, size)]
    apart = 0.5 * sum(abs(float(p[group].sum() - q[group].sum())) for group in groups)
    assert found.acceptance == pytest.approx(1 - apart)
    assert found.acceptance >= found.exact_acceptance - 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=st.integers(2, 5))
def test_replacing_by_group_keeps_the_masses_of_the_groups_and_not_those_of_the_tokens(
    seed: int, size: int
):
    p, q = laws(seed)
    order = sorted(range(VOCAB), key=lambda each: (-float(p[each]), each))
    groups = [order[start : start + size] for start in range(0, VOCAB, size)]
    by_group, by_token = (
        output_law(ClusterRule(size, "partition", replaces_by_group=way), p, q)
        for way in (True, False)
    )
    shifts = [
        max(abs(float(law[group].sum() - p[group].sum())) for group in groups)
        for law in (by_group.law, by_token.law)
    ]
    assert shifts[0] < 1e-12
    if by_token.excess_acceptance > 0.05:
        assert by_group.distance > 1e-3


def test_overlapping_clusters_can_accept_less_than_the_exact_rule():
    # So the paper's theorem, proved for disjoint clusters, does not cover its own rule.
    p = torch.tensor([15, 17, 0, 0]).double() / 32
    q = torch.tensor([18, 1, 19, 1]).double() / 39
    assert output_law(ClusterRule(2), p, q).excess_acceptance < -0.2
    means = [
        np.mean([output_law(ClusterRule(size), *laws(seed)).acceptance for seed in range(40)])
        for size in (1, 2, 3, 5, 8)
    ]
    assert means == sorted(means)
    assert means[2] > means[0] + 0.05


def test_a_per_draft_budget_does_not_bound_the_output():
    # 1,024 tokens, flat laws: a budget of 0.05 a draft lets nearly every draft stand.
    random = np.random.default_rng(0)
    p, q = (torch.from_numpy(random.dirichlet([1.0] * 1024)) for _ in range(2))
    codes = torch.from_numpy(random.normal(size=(1024, 8)))
    rule = NeighbourRule(nearest_neighbours(codes, 100), 0.05)
    found = output_law(rule, p, q)
    apart = 0.5 * float((p - q).abs().sum())
    assert found.acceptance > 0.99
    assert found.distance == pytest.approx(apart, abs=0.01)
    assert found.distance > 5 * 0.05
    # No token is likelier than in p but those accepted too often, so the bound is the shift itself.
    for delta in (0.0005, 0.002, 0.05):
        shifted = output_law(NeighbourRule(rule.neighbours, delta), p, q)
        assert shifted.distance == pytest.approx(shifted.excess_acceptance, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_a_larger_budget_or_more_neighbours_never_accept_less(seed: int):
    p, q = laws(seed)
    drawn = q.nonzero()[:, 0]

    def chances(count: int, delta: float) -> Tensor:
        rule = NeighbourRule(neighbours(seed, count), delta)
        return rule.acceptance(p[None], q[None], drawn)

    for low, high in itertools.pairwise([0.0, 0.05, 0.2, 0.9]):
        assert bool((chances(5, low) <= chances(5, high) + 1e-12).all())
        assert bool((chances(1, high) <= chances(5, high) + 1e-12).all())


def test_a_cluster_of_everything_accepts_every_draft_so_the_output_is_the_drafts():
    p, q = laws(3)
    found = output_law(ClusterRule(2 * VOCAB, "by-p"), p, q)
    assert found.acceptance == pytest.approx(1)
    torch.testing.assert_close(found.law, q)
    flat = torch.full((VOCAB,), 1 / VOCAB).double()
    for size in (1, 2, 5):
        assert output_law(ClusterRule(size), flat, flat).acceptance == pytest.approx(1)


def test_where_nothing_is_left_of_the_residual_the_target_is_drawn_from_and_it_is_counted():
    p, _ = laws(1)
    found = replacement(ExactRule(), p, p, torch.tensor(int(p.argmax())))
    torch.testing.assert_close(found.law, p)
    assert bool(found.fell_back)
    # A number this close to 1 refuses even a draft that is certain up to rounding.
    almost = torch.tensor([1.0 - 2**-53, 0.5]).double()
    law = p * (1 - 1e-15)
    verified = verify_chain(ExactRule(), torch.stack([law, p]), p[None], p.argmax()[None], almost)
    assert int(verified.accepted) == 0
    assert bool(verified.fell_back)


# ----------------------------------------------------------------------------------- the kernels


def threshold(decides: Callable[[float], bool]) -> float:
    """Where a decision that holds for small numbers ceases to hold, by bisection."""
    low, high = 0.0, 1.0
    if not decides(0.0):
        return 0.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if decides(middle) else (low, middle)
    return (low + high) / 2


def law_of(token_at: Callable[[float], int], vocab: int) -> list[float]:
    """The law behind an inversion: token t is drawn between the sums before and after it."""
    sums = [threshold(lambda u, t=token: token_at(u) <= t) for token in range(vocab)]
    return [high - low for low, high in itertools.pairwise([0.0, *sums])]


@pytest.mark.parametrize("seed", range(3))
def test_the_chain_kernel_emits_the_targets_distribution_by_enumeration(seed: int):
    vocab = 5
    p = laws(seed, 3, vocab)
    q = laws(seed + 50, 2, vocab)
    out = torch.zeros(vocab).double()
    for token in q[0].nonzero()[:, 0].tolist():
        drafts = torch.tensor([token, int(q[1].argmax())])

        def run(first: float, last: float, drafts: Tensor = drafts) -> tuple[int, int]:
            numbers = torch.tensor([first, 0.999999, last]).double()
            found = verify_chain(ExactRule(), p, q, drafts, numbers)
            return int(found.accepted), int(found.tokens)

        chance = threshold(lambda u, run=run: run(u, 0.5)[0] > 0)
        out[token] += q[0, token] * chance
        if chance < 1 - 1e-9:
            left = law_of(lambda u, run=run: run(1 - 1e-12, u)[1], vocab)
            out += q[0, token] * (1 - chance) * torch.tensor(left)
    assert (out - p[0]).abs().max() < 1e-6


def test_the_chain_kernel_stops_at_the_first_draft_that_does_not_stand():
    random = np.random.default_rng(0)
    rows, count, vocab = 300, 4, 6
    p = torch.from_numpy(random.dirichlet([1.0] * vocab, size=(rows, count + 1)))
    q = torch.from_numpy(random.dirichlet([1.0] * vocab, size=(rows, count)))
    drafts = torch.from_numpy(random.integers(0, vocab, size=(rows, count)))
    numbers = torch.from_numpy(random.random((rows, count + 1)))
    found = verify_chain(ExactRule(), p, q, drafts, numbers)
    lengths = set()
    for row in range(rows):
        accepted = 0
        while accepted < count:
            token = int(drafts[row, accepted])
            ratio = p[row, accepted, token] / q[row, accepted, token]
            if numbers[row, accepted] >= min(1.0, float(ratio)):
                break
            accepted += 1
        law = p[row, accepted]
        if accepted < count:
            law = (law - q[row, accepted]).clamp(min=0)
        sums = (law / law.sum()).cumsum(0)
        assert int(found.accepted[row]) == accepted
        assert int(found.tokens[row]) == int((sums <= numbers[row, -1]).sum())
        lengths.add(accepted)
    assert lengths == set(range(count + 1))


@pytest.mark.parametrize("name", relaxed_rules())
def test_the_chain_kernel_accepts_and_emits_as_often_as_the_enumerated_law_says(name: str):
    rule, count = relaxed_rules()[name], 20_000
    p, q = laws(7)
    random = np.random.default_rng(3)
    drafts = torch.from_numpy(random.choice(VOCAB, p=q.numpy(), size=(count, 1)))
    numbers = torch.from_numpy(random.random((count, 2)))
    target, draft = p.expand(count, 2, -1), q.expand(count, 1, -1)
    found = verify_chain(rule, target, draft, drafts, numbers)
    wanted = output_law(rule, p, q)
    chance = wanted.acceptance
    deviation = math.sqrt(chance * (1 - chance) / count)
    assert float(found.accepted.double().mean()) == pytest.approx(chance, abs=4 * deviation)
    emitted = torch.where(found.accepted > 0, drafts[:, 0], found.tokens)
    counts = torch.bincount(emitted, minlength=VOCAB).double()
    possible = wanted.law > 1e-9
    assert not counts[~possible].any()
    assert chisquare(counts[possible], count * wanted.law[possible]).pvalue > 1e-4
    # At this number of draws the law of another rule is told from it.
    assert chisquare(counts[p > 0], count * p[p > 0]).pvalue < 1e-4


def test_without_drafts_the_kernel_draws_from_the_target():
    p = laws(2, 1)
    found = verify_chain(
        ExactRule(), p, p[:0], torch.zeros(0, dtype=torch.int64), torch.tensor([0.4]).double()
    )
    assert int(found.tokens) == int((p[0].cumsum(0) <= 0.4).sum())
    assert int(found.accepted) == 0


def tree_law(rule: Rule, p: Tensor, tokens: list[int], draft: Tensor | None) -> list[float]:
    """The law of the first token behind the root of a tree with the given children."""
    vocab = p.shape[-1]
    topology = Topology([-1] + [0] * len(tokens))
    target = p.expand(1 + len(tokens), -1)
    laws_of = None if draft is None else draft.expand(1 + len(tokens), -1)

    def run(refused: int, number: float, last: float) -> tuple[int, int]:
        """Refuse some children, give the next one a number."""
        numbers = [0.5] + [1 - 1e-13] * len(tokens) + [last]
        if refused < len(tokens):
            numbers[1 + refused] = number
        found = verify_tree(
            rule, topology, [0, *tokens], target, torch.tensor(numbers).double(), draft=laws_of
        )
        return (found.path[1] - 1 if len(found.path) > 1 else -1), found.token

    out, left = [0.0] * vocab, 1.0
    for child, token in enumerate(tokens):
        chance = threshold(lambda u, child=child: run(child, u, 0.5)[0] == child)
        out[token] += left * chance
        left *= 1 - chance
        if left < 1e-9:
            return out
    rest = law_of(lambda u: run(len(tokens), 0.0, u)[1], vocab)
    return [mass + left * share for mass, share in zip(out, rest, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_trees_of_chosen_children_emit_the_targets_distribution_by_enumeration(seed: int):
    (p,) = laws(seed, 1, 5)
    for rule in (ExactRule(), NeighbourRule(neighbours(0, 4, 5), 0.0)):
        found = tree_law(rule, p, [3, 0, 1], None)
        assert np.abs(np.array(found) - p.numpy()).max() < 1e-6


@pytest.mark.parametrize("seed", range(2))
def test_trees_of_drawn_children_emit_the_targets_distribution_averaged_over_the_draws(seed: int):
    vocab = 4
    (p,) = laws(seed, 1, vocab, sharpness=2.0)
    q = torch.from_numpy(np.random.default_rng(seed + 9).dirichlet([2.0] * vocab))
    out = np.zeros(vocab)
    for first, second in itertools.permutations(range(vocab), 2):
        chance = float(q[first] * q[second] / (1 - q[first]))
        out += chance * np.array(tree_law(ExactRule(), p, [first, second], q))
    assert np.abs(out - p.numpy()).max() < 1e-6


def test_a_borrowed_neighbour_is_gone_for_the_siblings_that_follow():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    near = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]])
    rule = NeighbourRule(near, 0.35)
    found = tree_law(rule, p, [0, 1], None)
    # 0 borrows 1's 0.3 and stands with 0.7; refused, 0 and 1 are gone: 1 stands with nothing of its
    # own but what it borrows of {2: 2/3, 3: 1/3}: 2's share exceeds the budget, so nothing.
    assert found == pytest.approx([0.7, 0.0, 0.3 * 2 / 3, 0.3 / 3], abs=1e-6)


def test_a_child_that_its_law_excludes_is_an_error():
    q = torch.tensor([[0.0, 1.0]]).double().expand(2, -1)
    with pytest.raises(ValueError, match="cannot have been drawn"):
        verify_tree(
            ExactRule(), Topology.chain(1), [0, 0], q, torch.full((3,), 0.5).double(), draft=q
        )


# ------------------------------------------------------------------------------------ bad copies


@dataclass(frozen=True)
class _TargetForResidual(ExactRule):
    """The classic mistake: a refused draft is replaced by a draw from p."""

    def residual(self, target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
        return target


@dataclass(frozen=True)
class _Lenient(ExactRule):
    """Accepts a twentieth more than it may."""

    def acceptance(
        self, target: Tensor, draft: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        return (1.05 * super().acceptance(target, draft, tokens)).clamp(max=1.0)


@pytest.mark.parametrize("wrong", [_TargetForResidual(), _Lenient()], ids=["residual", "lenient"])
def test_bad_copies_of_the_exact_rule_are_rejected(wrong: Rule):
    p, q = laws(4)
    assert (output_law(wrong, p, q).law - p).abs().max() > 1e-3
    found = tree_law(wrong, p[None, :5].squeeze(0) / p[:5].sum(), [3, 0, 1], None)
    wanted = (p[:5] / p[:5].sum()).numpy()
    assert np.abs(np.array(found) - wanted).max() > 1e-3


# ---------------------------------------------------------------------------------- other matters


def test_the_tally_reports_means_and_the_excess_of_what_was_counted():
    tally = Tally()
    assert tally.notes == {}
    p, q = laws(5)
    overlaps = overlap(p, q).expand(1, 2)
    ways = ([[0.9, 0.1]], [[True, False]], [1, 0]), ([[0.5, 0.7]], [[True, True]], [2, 1])
    for chances, counted, ages in ways:
        tally.add(torch.tensor(chances).double(), overlaps, torch.tensor(counted), ages=ages)
    tally.add(torch.zeros(1, 1), overlaps[:, :1], torch.zeros(1, 1).bool(), first_depth=9)
    assert tally.notes["tested_drafts"] == 3
    assert tally.notes["draft_acceptance"] == pytest.approx(0.7)
    exact = 1 - 0.5 * float((p - q).abs().sum())
    assert tally.notes["exact_acceptance"] == pytest.approx(exact)
    assert tally.notes["excess_acceptance"] == pytest.approx(0.7 - exact)
    assert tally.notes["acceptance_by_depth"] == "1:0.700 2:0.700"
    assert tally.notes["acceptance_by_age"] == "1:0.800 2:0.500"
    assert tally.by_age[1].exact_chance == pytest.approx(2 * exact)
    assert "mean_neighbours" not in tally.notes
    tally.add_borrowed(torch.tensor([[True, True, False], [False, False, False]]))
    tally.add_borrowed(torch.tensor([[True, False, False]]))
    assert tally.notes["mean_neighbours"] == 1.0


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_neighbours_are_ordered_by_distance_and_leave_the_vector_itself_out(seed: int):
    vectors = torch.from_numpy(np.random.default_rng(seed).normal(size=(9, 3)))
    for metric in ("l2", "cosine"):
        found = nearest_neighbours(vectors, 8, metric).tolist()
        for own, near in enumerate(found):
            assert sorted([own, *near]) == list(range(9))
            apart = [
                math.dist(vectors[own].tolist(), vectors[each].tolist())
                if metric == "l2"
                else 1 - torch.cosine_similarity(vectors[own], vectors[each], dim=0).item()
                for each in near
            ]
            assert apart == sorted(apart)
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    assert (
        nearest_neighbours(unit, 8, "l2").tolist() == nearest_neighbours(unit, 8, "cosine").tolist()
    )
    assert nearest_neighbours(unit, 8, "random").tolist() != nearest_neighbours(unit, 8).tolist()
    slow = (vectors[:, None] - vectors[None]).square().sum(-1)
    torch.testing.assert_close(squared_distances(vectors, torch.arange(9)), slow)


def test_an_independent_package_accepts_the_same_drafts_and_has_the_same_residual():
    from flashspec.sampling.rejection import (
        rejection_step,
        rejection_step_onehot,
        residual_distribution,
    )

    random = np.random.default_rng(1)
    rows, count, vocab = 500, 3, 12
    p = torch.from_numpy(random.dirichlet([0.5] * vocab, size=(rows, count + 1)))
    q = torch.from_numpy(random.dirichlet([0.5] * vocab, size=(rows, count)))
    drafts = torch.from_numpy(
        np.stack([[random.choice(vocab, p=law) for law in row] for row in q.numpy()])
    )
    # They draw their numbers one for each draft, as here, and behind those a token.
    same = torch.rand(rows, count, generator=torch.Generator().manual_seed(3))
    numbers = torch.cat([same.double(), torch.full((rows, 1), 0.5).double()], dim=1)
    certain = torch.nn.functional.one_hot(drafts, vocab).double()
    logs = p.log().float()
    wanted = {
        "drawn": rejection_step(
            drafts, q.log().float(), logs, generator=torch.Generator().manual_seed(3)
        ),
        "certain": rejection_step_onehot(drafts, logs, generator=torch.Generator().manual_seed(3)),
    }
    for kind, law in (("drawn", q), ("certain", certain)):
        found = verify_chain(ExactRule(), p, law, drafts, numbers).accepted.tolist()
        assert found == wanted[kind][:, 0].tolist()
        assert len(set(found)) > 2
        for rule in (AmplifiedRule(2.0), AddedRule(0.05)):
            lax = verify_chain(rule, p, law, drafts, numbers).accepted.tolist()
            assert lax != wanted[kind][:, 0].tolist()
        ours = replacement(ExactRule(), p[:, 0], law[:, 0], drafts[:, 0]).law
        for row in range(20):
            residual = residual_distribution(p[row, 0].float(), law[row, 0].float())
            torch.testing.assert_close(ours[row].float(), residual, atol=1e-5, rtol=1e-4)
