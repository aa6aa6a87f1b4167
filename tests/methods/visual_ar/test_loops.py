"""Loops over whole images: their distribution, their greedy tokens, their bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from methods.base import Method, Output
from methods.visual_ar import common_jacobi
from methods.visual_ar.common_drafts import (
    FeatureDrafting,
    draft_for,
    drafter_facts,
    feature_drafter_for,
    own_layers,
)
from methods.visual_ar.common_feature_trees import (
    STATIC_TREES,
    TreeShape,
    _Image,
    walk_greedily,
)
from methods.visual_ar.common_geometry import token_neighbours
from methods.visual_ar.common_jacobi import JacobiLoop
from methods.visual_ar.common_verification import (
    ClusterRule,
    EqualityRule,
    ExactRule,
    NeighbourRule,
    Tally,
    VerifiedChain,
)
from methods.visual_ar.gsd import Gsd
from methods.visual_ar.lantern import Lantern
from methods.visual_ar.sjd import Sjd
from methods.visual_ar.speculative_image import SpeculativeImage
from models.base import Forward, GeneratedImages, ImageSampling, Trace, Unsupported
from models.draft_tree import Topology
from models.image_generation import (
    AutoregressiveImages,
    ImageDraws,
    TokenPipeline,
    generate_images,
    read_tokens,
)
from runner.conformance_base import PROFILE
from runner.conformance_image import tiny_images

SAMPLED = ImageSampling(guidance_scale=1.5)
GREEDY = ImageSampling(guidance_scale=1.5, temperature=0.0)
LABEL = 3


@pytest.fixture(scope="module")
def model() -> AutoregressiveImages:
    return tiny_images()


@pytest.fixture(scope="module")
def toy() -> AutoregressiveImages:
    """Images of four tokens out of four: 256 of them, each with a known probability."""
    return tiny_images(grid=2, codes=4)


@pytest.fixture(scope="module")
def exact(toy: AutoregressiveImages) -> np.ndarray:
    images = torch.tensor(list(product(range(4), repeat=4)))
    laws = read_tokens(toy, [LABEL] * len(images), images, SAMPLED)
    chances = laws.gather(-1, images[..., None])[..., 0].double().prod(-1)
    assert float(chances.sum()) == pytest.approx(1, abs=1e-5)
    found: np.ndarray = (chances / chances.sum()).numpy()
    return found


def counts_of(rows: Sequence[Sequence[int]]) -> np.ndarray:
    numbers = [int("".join(map(str, row)), 4) for row in rows]
    return np.bincount(numbers, minlength=256)


def p_value(counts: np.ndarray, exact: np.ndarray) -> float:
    """A chi-square test; images that are expected less than five times count as one."""
    expected = exact * counts.sum()
    rare = expected < 5
    cells = [
        np.append(values[~rare], values[rare].sum()) for values in (counts.astype(float), expected)
    ]
    return float(chisquare(*cells).pvalue)


def draw(model: AutoregressiveImages, loop: Any, first: int, rows: int) -> GeneratedImages:
    return generate_images(model, [LABEL] * rows, range(first, first + rows), SAMPLED, loop)


def sample(
    toy: AutoregressiveImages, make: Any, batches: int, rows: int, seed: int = 0
) -> np.ndarray:
    tokens: list[tuple[int, ...]] = []
    for batch in range(batches):
        tokens += draw(toy, make(), seed + batch * rows, rows).tokens
    return counts_of(tokens)


def jacobi(window: int = 4, **options: Any) -> Any:
    return lambda: JacobiLoop(ExactRule(), window=window, **options)


# -------------------------------------------------------------------------------- distributions

# Batches of 64 rows are cut off in nearly every step, so they test the bookkeeping and give many
# images a second; single rows are tested with fewer.


@pytest.mark.parametrize(
    ("make", "batches", "rows"),
    [
        (jacobi(), 40, 64),
        (jacobi(), 150, 1),
        (jacobi(initialisation="sample-left"), 25, 64),
        (jacobi(window=2, initialisation="repeat-above"), 25, 64),
        (lambda: JacobiLoop(EqualityRule(), window=3), 25, 64),
    ],
    ids=["batch", "single", "sample-left", "two repeat-above", "equality"],
)
def test_windows_of_guesses_draw_images_with_the_models_probabilities(
    toy: AutoregressiveImages, exact: np.ndarray, make: Any, batches: int, rows: int
):
    if p_value(sample(toy, make, batches, rows), exact) < 1e-3:
        assert p_value(sample(toy, make, batches, rows, seed=10**6), exact) > 1e-3


class Mistaken(common_jacobi._Filler):
    """Corrupts what rides on in the window, as known wrong implementations do."""

    kind = ""
    accepted: Tensor

    def fill(
        self, tokens: Tensor, guesses: Tensor, laws: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        guesses, laws = guesses.clone(), laws.clone()
        if tokens.shape[1] > 1:
            old_guesses, old_laws, known = self.before
            commit = tokens.shape[1] - known
            for slot in range(min(guesses.shape[1], old_guesses.shape[1] - commit)):
                was = slot + commit
                cut_off = Mistaken.accepted > was
                redrawn = Mistaken.accepted < was
                if self.kind == "old q of tokens cut off":
                    laws[cut_off, slot] = old_laws[cut_off, was]
                if self.kind == "stale q of redrawn tokens":
                    laws[redrawn, slot] = old_laws[redrawn, was]
                if self.kind == "old guesses with a new q":
                    guesses[redrawn, slot] = old_guesses[redrawn, was]
        filled = super().fill(tokens, guesses, laws, count)
        self.before = (*filled, tokens.shape[1])
        return filled


def surprise(model: AutoregressiveImages, make: Any, batches: int, rows: int) -> float:
    """The z-score of -log p(x) less the entropy of p, summed over each image.

    Its mean is exactly 0 for images drawn from the model, whatever the model.
    """
    tokens: list[tuple[int, ...]] = []
    for batch in range(batches):
        tokens += draw(model, make(), batch * rows, rows).tokens
    ids = torch.tensor(tokens)
    laws = read_tokens(model, [LABEL] * len(ids), ids, SAMPLED).double()
    likelihoods = laws.gather(-1, ids[..., None])[..., 0]
    gaps = -likelihoods.log().sum(1) - torch.special.entr(laws).sum((1, 2))
    return float(gaps.mean() / (gaps.std() / len(gaps) ** 0.5))


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "old q of tokens cut off",
        "stale q of redrawn tokens",
        "old guesses with a new q",
    ],
)
def test_known_mistakes_are_rejected_at_the_number_of_images_at_which_the_loop_passes(
    monkeypatch: pytest.MonkeyPatch, kind: str
):
    original = common_jacobi.verify_chain

    def verify(*arguments: Any, **options: Any) -> VerifiedChain:
        found = original(*arguments, **options)
        Mistaken.accepted = found.accepted
        return found

    monkeypatch.setattr(common_jacobi, "verify_chain", verify)
    monkeypatch.setattr(common_jacobi, "_Filler", Mistaken)
    monkeypatch.setattr(Mistaken, "kind", kind)
    found = surprise(tiny_images(grid=4, codes=6), jacobi(window=6), 14, 32)
    assert abs(found) > 5 if kind else abs(found) < 3.3


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda toy: SpeculativeImage(draft="layers:1", num_draft_tokens=3), 12 * 64),
        (lambda toy: Lantern(drafter="random", delta=0.0, tree_nodes=6, branching=3), 128),
        (lambda toy: Lantern(drafter="random", delta=0.0, tree="static"), 128),
        (lambda toy: Lantern(drafter="random", delta=0.0, tree="chain"), 128),
    ],
    ids=["speculative", "dynamic", "static", "chain"],
)
def test_exact_drafts_draw_images_with_the_models_probabilities(
    toy: AutoregressiveImages, exact: np.ndarray, make: Any, count: int
):
    rows = min(64, count)
    with make(toy).apply(toy, PROFILE) as changed:
        tokens: list[tuple[int, ...]] = []
        for first in range(0, count, rows):
            found = changed.generate([LABEL] * rows, range(first, first + rows), SAMPLED)
            tokens += found.tokens
    assert p_value(counts_of(tokens), exact) > 1e-3


def test_a_budget_is_seen_by_the_same_test(toy: AutoregressiveImages, exact: np.ndarray):
    method = Lantern(drafter="random", delta=0.5, tree="chain")
    with method.apply(toy, PROFILE) as changed:
        tokens = changed.generate([LABEL] * 128, range(128), SAMPLED).tokens
    assert p_value(counts_of(tokens), exact) < 1e-3


# ---------------------------------------------------------------------------------- greedy images


@pytest.mark.parametrize(
    "method",
    [
        Sjd(),
        Sjd(window=5, initialisation="repeat-left"),
        Sjd(initialisation="top-left"),
        Sjd(rule="equality"),
        Gsd(group_size=1),
        SpeculativeImage(draft="layers:1"),
        Lantern(drafter="random", delta=0.0),
        Lantern(drafter="random", delta=0.0, tree="static"),
        Lantern(drafter="random", delta=0.0, tree="static-57"),
        Lantern(drafter="random", neighbours=0),
    ],
    ids=repr,
)
def test_greedy_images_are_those_of_plain_decoding(method: Method[Any]):
    # Of four codes, so that guesses are right now and then.
    model = tiny_images(grid=4, codes=4)
    assert method.declared_output(0.0) is Output.IDENTICAL
    saved = 0
    for sampling in (GREEDY, ImageSampling(temperature=0.0)):
        with method.apply(model, PROFILE) as changed:
            for labels in ([0], [1, 4, 2]):
                seeds = range(len(labels))
                wanted = model.generate(labels, seeds, sampling)
                found = changed.generate(labels, seeds, sampling)
                assert found.tokens == wanted.tokens
                saved += len(wanted.trace.forwards) - len(found.trace.forwards)
    assert saved > 0


def test_a_budget_changes_greedy_images_only_where_it_lets_a_draft_overtake_the_likeliest_token():
    laws = torch.tensor(
        [[0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]
    ).double()
    # Root with children 1 (node 1) and 0 (node 2); node 3 under node 1.
    topology = Topology([-1, 0, 0, 1])
    nodes = torch.tensor([9, 1, 0, 2])
    near = torch.tensor([[1, 2], [2, 0], [0, 1]])
    best = laws.argmax(-1)
    exact = walk_greedily(NeighbourRule(near, 0.0), topology, nodes, laws, best)
    assert exact.path == [0, 2]
    assert exact.token == 0
    # Token 1 borrows 0.25 and ties with 0, which comes first; with all of the rest it wins.
    assert walk_greedily(NeighbourRule(near, 0.3), topology, nodes, laws, best).path == [0, 2]
    wide = walk_greedily(NeighbourRule(near, 0.75), topology, nodes, laws, best)
    assert wide.path == [0, 1, 3]
    assert wide.token == 1


# ---------------------------------------------------------------------------------- bookkeeping


@pytest.mark.parametrize("window", [1, 2, 5, 16, 40])
def test_a_window_commits_between_one_and_all_of_its_tokens_and_counts_them(
    model: AutoregressiveImages, window: int
):
    lengths = []
    session_of = model.session

    class Watched:
        """Passes on, and notes what the cache holds behind each step."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def session(self, *arguments: Any, **options: Any) -> Any:
            session = session_of(*arguments, **options)
            crop = session.crop

            def watched(length: int) -> None:
                crop(length)
                lengths.append(length)

            session.crop = watched
            return session

    loop = JacobiLoop(ExactRule(), window=window)
    found = draw(Watched(), loop, 0, 1)
    trace, total = found.trace, model.facts.image_tokens
    assert 1 + sum(trace.accepted) + len(trace.forwards) == total
    assert all(0 <= accepted < window for accepted in trace.accepted)
    assert loop.notes["most_committed"] == 1 + max(trace.accepted)
    # The last token is never in the cache.
    committed = 1 + np.cumsum([accepted + 1 for accepted in trace.accepted])
    assert lengths == (committed - 1).tolist()
    assert max(forward.width for forward in trace.forwards) == min(window, total - 1)


def test_a_window_of_one_draws_the_tokens_of_plain_decoding(model: AutoregressiveImages):
    for rows in (1, 3):
        loop = JacobiLoop(ExactRule(), window=1)
        plain = model.generate([LABEL] * rows, range(rows), SAMPLED).tokens
        assert draw(model, loop, 0, rows).tokens == plain


def test_clusters_of_one_token_decide_as_exact_windows_do(model: AutoregressiveImages):
    found = []
    for method in (
        Sjd(window=6),
        Gsd(window=6, group_size=1),
        Gsd(window=6, group_size=9, acceptance="by-p"),
    ):
        with method.apply(model, PROFILE) as changed:
            made = changed.generate([LABEL] * 2, [0, 1], SAMPLED)
        found.append((made.tokens, made.trace.accepted))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_guesses_are_told_apart_by_their_place_in_the_window_and_by_how_often_they_were_redrawn(
    monkeypatch: pytest.MonkeyPatch,
):
    model = tiny_images(codes=6)
    read: dict[int, int] = {}  # forwards so far that had something to say of a place
    depths: dict[int, list[float]] = {}
    ages: dict[int, list[float]] = {}
    known = 1
    original = common_jacobi.verify_chain

    def verify(*arguments: Any, **options: Any) -> VerifiedChain:
        nonlocal known
        found = original(*arguments, **options)
        accepted, chances = int(found.accepted), found.chances[0].tolist()
        for slot, chance in enumerate(chances[: accepted + 1]):
            depths.setdefault(slot + 1, []).append(chance)
            ages.setdefault(read.get(known + slot, 0), []).append(chance)
        for place in range(known, known + len(chances) + 1):
            read[place] = read.get(place, 0) + 1
        known += accepted + 1
        return found

    monkeypatch.setattr(common_jacobi, "verify_chain", verify)
    loop = JacobiLoop(ExactRule(), window=6)
    draw(model, loop, 0, 1)
    for found, wanted in ((loop.tally.by_depth, depths), (loop.tally.by_age, ages)):
        assert len(wanted) > 2
        assert found.keys() == wanted.keys()
        for key, chances in wanted.items():
            assert found[key].tests == len(chances)
            assert found[key].chance == pytest.approx(sum(chances))
    # A token by lot stands as seldom as chance has it, one that was redrawn more often.
    fresh, redrawn = (loop.tally.by_age[age] for age in (0, 1))
    assert fresh.chance / fresh.tests < redrawn.chance / redrawn.tests


class RowEnds:
    """The last place of each row of three holds token 0, and no other place does."""

    def forbidden(self, places: Tensor) -> Tensor:
        ends = places % 3 == 2
        table = torch.zeros(len(places), 48, dtype=torch.bool)
        table[ends] = True
        table[ends, 0] = False
        table[~ends, 0] = True
        return table


@pytest.mark.parametrize("initialisation", ["random", "repeat-left", "sample-above", "top-left"])
def test_windows_hold_row_ends_at_their_places(initialisation: Any):
    model = tiny_images()
    model.constraints = RowEnds()
    loop = JacobiLoop(ExactRule(), window=9, initialisation=initialisation)
    found = draw(model, loop, 0, 2)
    for row in found.tokens:
        assert [token == 0 for token in row] == [place % 3 == 2 for place in range(len(row))]
    # A row end has one possible token, which every scheme knows: it never costs a forward.
    assert loop.notes["draft_acceptance"] > 1 / 3


def test_copies_of_the_left_token_repeat_it(model: AutoregressiveImages):
    seen: list[Tensor] = []
    original = common_jacobi._Filler.fill

    class Watched(common_jacobi._Filler):
        def fill(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            filled = original(self, *arguments)
            tokens, guesses = arguments[0], arguments[1]
            left = torch.cat([tokens, guesses], dim=1)[:, -1:]
            fresh = filled[0][:, guesses.shape[1] :]
            seen.append((fresh == left).all())
            certain = filled[1][:, guesses.shape[1] :]
            assert bool((certain.gather(-1, fresh[..., None]) == 1).all())
            return filled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common_jacobi, "_Filler", Watched)
        draw(model, JacobiLoop(ExactRule(), window=6, initialisation="repeat-left"), 0, 2)
    assert seen
    assert all(seen)


def test_a_relaxed_rule_accepts_more_and_says_by_how_much(model: AutoregressiveImages):
    exact, relaxed = (
        JacobiLoop(ClusterRule(size, "by-p"), window=8, ranks_logits=True) for size in (1, 8)
    )
    forwards = [len(draw(model, loop, 0, 6).trace.forwards) for loop in (exact, relaxed)]
    assert forwards[1] < forwards[0]
    assert relaxed.notes["excess_acceptance"] > 0.05
    assert abs(float(exact.notes["excess_acceptance"])) < 0.03


# ---------------------------------------------------------------------------- feature drafting


def test_nodes_of_a_draft_tree_see_their_ancestors_only(model: AutoregressiveImages):
    drafter = feature_drafter_for("random", model)

    def drafting() -> FeatureDrafting:
        return FeatureDrafting(drafter, model, guidance_scale=1.5, guided_session=True, headroom=20)

    torch.manual_seed(0)
    width = model.facts.hidden_size
    features = torch.randn(2, 3, width, dtype=drafter.fc.weight.dtype)
    tokens = torch.tensor([4, 7, 9])
    tree = drafting()
    root = tree.begin_step(tokens, features)
    guess, first = tree.expand(torch.tensor([1, 2]), root.features[:, [0, 0]], [-1, -1], 1)
    deeper, _ = tree.expand(torch.tensor([5]), guess.features[:, 1:], [first[1]], 2)
    # The same chain alone.
    chain = drafting()
    again = chain.begin_step(tokens, features)
    torch.testing.assert_close(again.logits, root.logits)
    only, number = chain.expand(torch.tensor([2]), again.features, [-1], 1)
    torch.testing.assert_close(only.logits[0], guess.logits[1])
    last, _ = chain.expand(torch.tensor([5]), only.features, number, 2)
    torch.testing.assert_close(last.logits, deeper.logits)
    # And the same through the plain network, as one sequence.
    embedded = model.embed(torch.tensor([4, 7, 9, 2, 5]))[None].expand(2, -1, -1)
    given = torch.cat([features, again.features, only.features], dim=1)
    whole = drafter(embedded, given)
    torch.testing.assert_close(whole[:, -1:], last.features)
    # What was grown is forgotten, what was read is kept.
    new = torch.randn(2, 1, width, dtype=features.dtype)
    after = tree.begin_step(torch.tensor([3]), new)
    fresh = drafting().begin_step(torch.tensor([4, 7, 9, 3]), torch.cat([features, new], dim=1))
    torch.testing.assert_close(after.logits, fresh.logits)


def test_it_is_told_how_many_neighbours_lend(model: AutoregressiveImages):
    # Most tokens have no probability, and lend none.
    sampling = ImageSampling(guidance_scale=1.5, top_k=12)

    def mean_of(**settings: Any) -> float:
        with Lantern(drafter="random", neighbours=8, **settings).apply(model, PROFILE) as changed:
            notes = changed.generate([LABEL], [0], sampling).trace.notes
        return float(notes["mean_neighbours"])

    for tree in ("chain", "static", "dynamic"):
        found = [mean_of(delta=delta, tree=tree) for delta in (0.0, 0.1, 1.0)]
        assert 0 == found[0] < found[1] < found[2] <= 8


def test_a_drafters_work_is_counted_as_that_of_a_model_of_its_sizes(model: AutoregressiveImages):
    drafter = feature_drafter_for("random", model)
    facts = drafter_facts(drafter, model.facts)
    # fc of 64 x 32, one layer of four 32 x 32 and three 32 x 48, the target's head of 32 x 48.
    assert facts.matrix_parameters == 64 * 32 + 4 * 32 * 32 + 3 * 32 * 48 + 32 * 48
    drafting = FeatureDrafting(drafter, model, guidance_scale=1.5, guided_session=True, headroom=20)
    features = torch.zeros(2, 3, 32, dtype=drafter.fc.weight.dtype)
    root = drafting.begin_step(torch.tensor([4, 7, 9]), features)
    drafting.expand(torch.tensor([1, 2]), root.features[:, [0, 0]], [-1, -1], 1)
    assert drafting.work.forwards == [Forward(3, 0), Forward(2, 3)]
    attended = (1 + 2 + 3) + (4 + 5)
    assert drafting.work.flops == 2 * (5 * 2 * facts.matrix_parameters + 4 * 32 * attended)
    assert drafting.work.kv_bytes == 2 * (3 + 5) * 2 * 32 * 8
    # Drafts come at a cost that the speed-up's bound knows of.
    for tree in ("chain", "dynamic"):
        loop = Lantern(drafter="random", tree=tree).loop(model, PROFILE)
        trace = draw(model, loop, 0, 1).trace
        assert trace.notes["draft_share"] == facts.weight_bytes / model.facts.weight_bytes
        assert trace.draft_forwards > len(trace.forwards) / 2
        assert trace.notes["acceptance_by_depth"].startswith("1:")  # type: ignore[union-attr]
        assert loop.tally.by_depth[1].tests <= len(trace.forwards)


def test_the_cache_behind_a_tree_is_that_of_the_committed_tokens(model: AutoregressiveImages):
    method = Lantern(drafter="random", delta=0.3, neighbours=8)
    kept: list[Any] = []
    session_of = model.session

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def session(self, *arguments: Any, **options: Any) -> Any:
            kept.append(session_of(*arguments, **options))
            return kept[-1]

    loop = method.loop(model, PROFILE)
    found = draw(Watched(), loop, 5, 1)
    total = model.facts.image_tokens
    assert kept[0].length == total - 1
    last = kept[0].forward(torch.tensor([found.tokens[0][-1:]]))
    plain = session_of([LABEL], guided=True, capacity=total, trace=found.trace)
    plain.prefill()
    wanted = plain.forward(torch.tensor([found.tokens[0]]))
    torch.testing.assert_close(last.logits, wanted.logits[:, -1:], atol=1e-5, rtol=1e-5)


def test_the_dynamic_tree_holds_the_likeliest_paths_of_the_drafter(model: AutoregressiveImages):
    session = model.session([LABEL], guided=True, capacity=60, trace=Trace())
    numbers = ImageDraws([0])
    image = _Image(
        rule=NeighbourRule(token_neighbours(model, 4), 0.0),
        drafter=feature_drafter_for("random", model),
        shape=TreeShape("dynamic", 12, 3, 48),
        tally=Tally(),
        model=model,
        session=session,
        pipeline=TokenPipeline(sampling=SAMPLED, constraints=model.constraints),
        emitting=lambda count: numbers.uniform(0, count),
        testing=lambda count: numbers.uniform(0, count),
        drawing=lambda count: numbers.uniform(0, count),
    )
    features = session.prefill().hidden
    found = image.propose([5], features, 1, 10)
    assert len(found.tokens) == 12
    # By brute force over the first two levels: no path left out is likelier than one kept.
    drafting = FeatureDrafting(
        image.drafter, model, guidance_scale=1.5, guided_session=True, headroom=4000
    )
    guess = drafting.begin_step(torch.tensor([5]), features)
    first = guess.logits[0].double().softmax(-1)
    level, _ = drafting.expand(torch.arange(48), guess.features.expand(-1, 48, -1), [-1] * 48, 1)
    second = first[:, None] * level.logits.double().softmax(-1)
    tokens = [-1, *found.tokens]
    parents, depths = found.topology.parents, found.topology.depths
    kept = {}
    for node in range(1, 13):
        if depths[node] == 1:
            kept[tokens[node],] = float(first[tokens[node]])
        elif depths[node] == 2:
            kept[tokens[parents[node]], tokens[node]] = float(
                second[tokens[parents[node]], tokens[node]]
            )
    scores = {(a,): float(first[a]) for a in range(48)}
    scores |= {(a, b): float(second[a, b]) for a in range(48) for b in range(48)}
    left_out = [score for path, score in scores.items() if path not in kept]
    assert max(left_out) <= min(kept.values()) + 1e-9


def test_the_static_trees_are_the_released_ones():
    small, large = STATIC_TREES["static"], STATIC_TREES["static-57"]
    assert [len(small.children[node]) for node in range(5)] == [4, 3, 2, 2, 1]
    assert np.bincount(small.depths).tolist() == [1, 4, 8, 8, 3, 2]
    assert [len(large.children[node]) for node in range(6)] == [5, 4, 3, 3, 2, 1]
    assert np.bincount(large.depths).tolist() == [1, 5, 13, 16, 14, 9]
    # The last levels by their rank paths: those that reach furthest from the likeliest branch.
    assert {path for path in large.rank_paths if len(path) == 5 and path[2]} == {
        (0, 0, 1, 0, 0),
        (0, 0, 1, 0, 1),
        (0, 0, 1, 1, 0),
        (0, 0, 2, 0, 0),
    }
    assert {*small.rank_paths} < {*large.rank_paths}
    for name, tree in STATIC_TREES.items():
        assert TreeShape(name, 0, 5, 0).most_nodes == len(tree) - 1


def test_models_without_what_a_draft_needs_are_refused(model: AutoregressiveImages):
    with pytest.raises(Unsupported, match="1 of the 2 layers"):
        own_layers(model, "2")
    with pytest.raises(Unsupported, match="cannot be loaded"):
        draft_for("no-such-model", model)
    with pytest.raises(Unsupported, match="has no drafter"):
        feature_drafter_for("own", model)
    assert draft_for("layers:1", model) is draft_for("layers:1", model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sjd(window=0), "window must be a whole number from 1"),
        (lambda: Sjd(initialisation="left"), "initialisation must be one of"),  # type: ignore[arg-type]  # on purpose
        (lambda: Gsd(group_size=0), "group_size must be"),
        (lambda: Gsd(margin=-1), "margin must lie in"),
        (lambda: Lantern(delta=1.5), "delta must lie in"),
        (lambda: Lantern(relative_budget=0.5), "relative_budget must be above 1"),
        (lambda: SpeculativeImage(draft=""), "draft must name a model"),
    ],
)
def test_settings_outside_their_range_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_promises_depend_on_the_settings():
    assert Gsd(group_size=1).declared_output(1.0) is Output.SAME_DISTRIBUTION
    assert Gsd().declared_output(1.0) is Output.APPROXIMATE
    assert Gsd(group_size=1, acceptance="amplify").declared_output(0.0) is Output.APPROXIMATE
    assert Lantern(delta=0.0).declared_output(0.0) is Output.IDENTICAL
    assert Lantern(delta=0.0, relative_budget=2.0).declared_output(0.0) is Output.APPROXIMATE
    assert Lantern().declared_output(1.0) is Output.APPROXIMATE
