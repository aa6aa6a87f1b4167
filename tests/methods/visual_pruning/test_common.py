"""What visual-token methods share: budgets, grids, greedy choices, neutral settings."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.visual_pruning.common import (
    greedy_by,
    greedy_maxmin,
    greedy_maxsum,
    kept_count,
    neighbours,
    normalised,
    share_out,
    spread_evenly,
    tile_budgets,
    top_k,
)
from methods.visual_pruning.divprune import DivPrune, most_isolated, select
from methods.visual_pruning.fastv import FastV
from methods.visual_pruning.full_tokens import FullTokens
from methods.visual_pruning.hiprune import HiPrune
from methods.visual_pruning.pooling import Pooling, cells
from methods.visual_pruning.ppe import Ppe
from methods.visual_pruning.pyramiddrop import PyramidDrop, stage_share
from methods.visual_pruning.random_patches import RandomPatches, draw
from methods.visual_pruning.sparsevlm import SparseVLM
from methods.visual_pruning.todre import ToDRE
from methods.visual_pruning.uniform_grid import UniformGrid, evenly_spaced
from methods.visual_pruning.visionzip import VisionZip
from methods.visual_pruning.zoo_prune import ZooPrune
from models.base import Unsupported, VisualWork
from models.vision_language_towers import Grid
from runner.conformance_base import PROFILE
from tests.methods.visual_pruning.models import (
    ARCHITECTURES,
    answer_of,
    first_logits,
    model_of,
    reduced,
)

METHODS: tuple[Any, ...] = (
    DivPrune,
    FastV,
    HiPrune,
    Pooling,
    Ppe,
    PyramidDrop,
    RandomPatches,
    SparseVLM,
    ToDRE,
    UniformGrid,
    VisionZip,
    ZooPrune,
)


@functools.cache
def plain_work(architecture: Any, shape: str) -> VisualWork:
    """Return the work of all tokens."""
    return answer_of(FullTokens(), architecture, shape, tokens=1).work


@functools.cache
def plain_logits(architecture: Any) -> torch.Tensor:
    """Return the logits with all tokens."""
    return first_logits(FullTokens(), architecture)


def made(method: Any, **settings: Any) -> Any:
    """Return a method with settings that fit a tiny model."""
    return method(**{**method.trial, **settings})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_tokens_is_the_model_itself_to_the_bit(method: Any, architecture: Any) -> None:
    plain = plain_logits(architecture)
    neutral = made(method, **method.neutral)
    assert torch.equal(first_logits(neutral, architecture), plain)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("llava", "square"),
        ("llava-next", "padded"),
        ("llava-next", "square"),
        ("qwen2.5-vl", "padded"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_exactly_whatever_the_image(
    method: Any, architecture: Any, shape: str
) -> None:
    settings = {"stage2": False} if method is ToDRE else {}
    plain = plain_work(architecture, shape)
    for keep_ratio in (1 / 9, 0.5):
        if method in (PyramidDrop, SparseVLM) and keep_ratio < 1 / 4:
            continue  # their first layers alone see more
        configured = made(method, keep_ratio=keep_ratio, **settings)
        work = answer_of(configured, architecture, shape, tokens=1).work
        budget = configured.budget(plain.visual_tokens)
        if method is FastV:
            # Two of six layers see all tokens.
            expected = (2 * plain.visual_tokens + 4 * budget) / 6
            assert work.mean_visual_tokens == pytest.approx(expected)
        elif method is PyramidDrop:
            # Each of three steps rounds down.
            assert 0 <= 0.5 * plain.visual_tokens - work.mean_visual_tokens < 1
        elif method is SparseVLM:
            assert abs(0.5 * plain.visual_tokens - work.mean_visual_tokens) < 1.5
        else:
            assert work.kept_tokens == work.mean_visual_tokens == budget
        assert work.prefill_flops < plain.prefill_flops


@pytest.mark.parametrize("method", METHODS)
def test_a_keep_ratio_outside_its_range_is_refused(method: Any) -> None:
    for wrong in (0.0, 1.5, -0.2):
        with pytest.raises(ValueError, match=r"keep_ratio must lie in \(0, 1\].*pass 0\.2"):
            made(method, keep_ratio=wrong)
    with pytest.raises(ValueError, match="positions must be one of"):
        made(method, positions="multi")


def test_a_model_that_is_run_elsewhere_is_refused() -> None:
    with pytest.raises(Unsupported, match="'hiprune' needs a vision-language model"):
        HiPrune().apply(model_of("llava").planned(None), PROFILE).__enter__()  # type: ignore[arg-type]  # a wrapper is no model


# --- primitives ---


def test_equal_scores_go_to_the_lowest_numbers() -> None:
    assert top_k(torch.ones(7), 3).tolist() == [0, 1, 2]
    assert top_k(torch.tensor([0.0, 2.0, 1.0, 2.0]), 3).tolist() == [1, 3, 2]


def test_a_share_is_rounded_and_never_nothing() -> None:
    assert [kept_count(ratio, 144) for ratio in (1, 1 / 2, 1 / 3, 2 / 9, 1 / 9)] == [
        144,
        72,
        48,
        32,
        16,
    ]
    assert kept_count(0.01, 10) == 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_a_budget_is_shared_equally_as_far_as_there_is_room(room: list[int], data: Any) -> None:
    budget = data.draw(st.integers(0, sum(room)))
    shares = share_out(room, budget)
    assert sum(shares) == budget
    assert all(0 <= share <= free for share, free in zip(shares, room, strict=True))
    # Nobody who had room for more has two less than another, nor one less than a later one.
    for (i, one), (j, other) in itertools.permutations(enumerate(shares), 2):
        if one < room[i]:
            assert other <= one + (j < i)


def test_tiles_of_equal_size_get_equal_budgets() -> None:
    seen, _ = reduced(HiPrune(), "llava-next", "wide")
    assert tile_budgets(seen.layout, 36) == [12, 12, 12]
    seen, _ = reduced(HiPrune(), "llava-next", "padded")
    assert tile_budgets(seen.layout, 132) == torch.bincount(seen.layout.patch_tile).tolist()


def test_neighbours_stop_at_the_grid_edge() -> None:
    grid = Grid(4, 4)
    corner, side = torch.tensor([0]), torch.tensor([7])
    stops = {"square": False, "stops_at_edge": True}
    assert neighbours(corner, grid, **stops).tolist() == [1, 4]
    assert neighbours(side, grid, **stops).tolist() == [3, 6, 11]
    assert neighbours(torch.tensor([5]), grid, **stops).tolist() == [1, 4, 6, 9]
    flat = {"square": False, "stops_at_edge": False}
    # -1 and -4 become place 0; the end of row 1 is beside the start of row 2.
    assert neighbours(corner, grid, **flat).tolist() == [0, 1, 4]
    assert neighbours(side, grid, **flat).tolist() == [3, 6, 8, 11]
    around = neighbours(torch.tensor([5]), grid, square=True, stops_at_edge=True)
    assert around.tolist() == [0, 1, 2, 4, 6, 8, 9, 10]


@given(st.integers(0, 40), st.integers(0, 40))
def test_numbers_spread_evenly_differ_and_fit(count: int, more: int) -> None:
    among = count + more
    found = spread_evenly(count, among).tolist()
    assert len(set(found)) == count
    assert all(0 <= each < among for each in found)
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_an_even_grid_has_the_budget(rows: int, columns: int, data: Any) -> None:
    budget = data.draw(st.integers(0, rows * columns))
    found = evenly_spaced(Grid(rows, columns), budget).tolist()
    assert found == sorted(set(found))
    assert len(found) == budget
    assert all(0 <= place < rows * columns for place in found)


def test_an_even_grid_is_the_one_that_one_would_draw() -> None:
    assert evenly_spaced(Grid(6, 6), 9).tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    assert evenly_spaced(Grid(12, 12), 36).tolist() == [
        12 * y + x for y in range(1, 12, 2) for x in range(1, 12, 2)
    ]
    # Three rows of four, less one from their middle.
    assert evenly_spaced(Grid(6, 6), 11).tolist() == [6, 8, 9, 11, 18, 21, 23, 30, 32, 33, 35]
    wide = evenly_spaced(Grid(2, 8), 4)
    assert (wide // 8).tolist() in ([1] * 4, [0] * 4, [0, 0, 1, 1])


def test_a_random_choice_is_even_and_goes_by_its_seed() -> None:
    counts = torch.zeros(12)
    for seed in range(600):
        counts[draw(12, 4, seed)] += 1
    # 200 expected; the standard deviation is 11.5.
    assert counts.min() > 150
    assert counts.max() < 250
    assert draw(50, 9, 3).tolist() == draw(50, 9, 3).tolist() != draw(50, 9, 4).tolist()
    one, other = (answer_of(RandomPatches(seed=seed)).token_ids for seed in (0, 1))
    again = answer_of(RandomPatches(seed=0)).token_ids
    assert one == again
    assert not torch.equal(first_logits(RandomPatches(seed=0)), first_logits(RandomPatches(seed=1)))
    assert other


# --- greedy choices ---


def vectors(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return normalised(torch.randn(count, width, generator=draw))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_choices_equal_ones_that_recompute_everything_at_every_step(seed: int) -> None:
    given_vectors = vectors(15, seed=seed)
    cosine = given_vectors @ given_vectors.T
    weights = torch.rand(15, generator=torch.Generator().manual_seed(seed))
    for name in ("maxmin", "maxsum", "weighted"):
        chosen = [3]
        while len(chosen) < 7:

            def worth(candidate: int, name: str = name, chosen: list[int] = chosen) -> float:
                near = cosine[candidate, chosen]
                if name == "maxsum":
                    return -float(near.sum())
                away = 1 - float(near.max())
                return away * float(weights[candidate]) if name == "weighted" else away

            chosen.append(max((c for c in range(15) if c not in chosen), key=worth))
        found = {
            "maxmin": lambda: greedy_maxmin(given_vectors, torch.tensor(3), 7),
            "maxsum": lambda: greedy_maxsum(given_vectors, torch.tensor(3), 7),
            "weighted": lambda: greedy_by(given_vectors, torch.tensor(3), 7, lambda d: d * weights),
        }[name]()
        assert found.tolist() == chosen


@pytest.mark.parametrize("seed", range(6))
def test_k_center_covers_within_twice_the_optimum(seed: int) -> None:
    """By angles, which are a metric and order pairs as 1 - cosine does."""
    given_vectors = vectors(9, width=3, seed=seed)
    angle = (given_vectors @ given_vectors.T).clamp(-1, 1).acos()
    found = greedy_maxmin(given_vectors, torch.tensor(0), 3)

    def radius(centres: Any) -> float:
        return float(angle[:, list(centres)].min(1).values.max())

    best = min(radius(centres) for centres in itertools.combinations(range(9), 3))
    assert radius(found.tolist()) <= 2 * best + 1e-5


def test_of_pairs_of_equal_tokens_k_center_keeps_one_each_and_maxsum_need_not() -> None:
    single = vectors(6, width=3, seed=2)
    pairs = single.repeat_interleave(2, 0)
    centred = greedy_maxmin(pairs, torch.tensor(0), 6)
    assert sorted((centred // 2).tolist()) == list(range(6))
    summed = greedy_maxsum(pairs, torch.tensor(0), 6)
    assert len(set((summed // 2).tolist())) < 6


@pytest.mark.parametrize("seed", range(5))
def test_divprune_begins_with_the_most_isolated_token_and_goes_on_by_max_min(seed: int) -> None:
    given_vectors = vectors(10, seed=seed)
    distance = 1 - given_vectors @ given_vectors.T
    nearest = [min(float(distance[i, j]) for j in range(10) if j != i) for i in range(10)]
    chosen = [max(range(10), key=nearest.__getitem__)]
    assert int(most_isolated(given_vectors)) == chosen[0]
    while len(chosen) < 4:
        rest = [i for i in range(10) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    scaled = given_vectors * torch.rand(10, 1).add(0.5)
    assert select(scaled, 4).tolist() == sorted(chosen)


def test_divprune_counts_the_similarities_that_it_computes() -> None:
    work = answer_of(DivPrune(keep_ratio=0.5), shape="square").work
    # 36 tokens of 48 numbers: all pairs, then 17 steps.
    assert work.selector_flops == 2 * 36 * 36 * 48 + 17 * 2 * 36 * 48


# --- pooling and the pyramid ---


@pytest.mark.parametrize("side", [1, 3, 4, 6])
def test_pooling_is_torchs_adaptive_average_where_the_budget_is_a_square(side: int) -> None:
    values = torch.randn(36, 5, generator=torch.Generator().manual_seed(0))
    weights, middles = cells(Grid(6, 6), side**2)
    picture = values.T.reshape(1, 5, 6, 6)
    expected = torch.nn.functional.adaptive_avg_pool2d(picture, side)[0].flatten(1).T
    assert torch.allclose(weights @ values, expected, atol=1e-5)
    assert middles.tolist() == sorted(set(middles.tolist()))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_pooling_has_the_budgets_cells_which_cover_everything(
    rows: int, columns: int, data: Any
) -> None:
    budget = data.draw(st.integers(1, rows * columns))
    weights, middles = cells(Grid(rows, columns), budget)
    assert weights.shape == (budget, rows * columns)
    assert torch.allclose(weights.sum(1), torch.ones(budget))
    assert bool((weights > 0).any(0).all())
    assert middles.tolist() == sorted(set(middles.tolist()))
    assert all(weights[cell, place] > 0 for cell, place in enumerate(middles.tolist()))


def test_the_pyramids_default_is_half_of_the_tokens_at_each_step() -> None:
    assert stage_share(15 / 32, [8, 16, 24], 32) == pytest.approx(0.5)
    assert stage_share(1.0, [8, 16, 24], 32) == 1.0
    with pytest.raises(Unsupported, match=r"must be above 0\.25"):
        stage_share(2 / 9, [8, 16, 24], 32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pyramid_keeps_what_the_last_word_attends_to_in_the_next_layer(
    architecture: Any,
) -> None:
    from dataclasses import replace

    from models.base import Decoding
    from models.vision_language_decoder import StageView
    from tests.methods.visual_pruning.models import question

    model = model_of(architecture)
    plan = PyramidDrop(keep_ratio=0.6).plan(model)
    assert [stage.after for stage in plan.stages] == [1, 3, 4]
    seen: list[list[int]] = []

    def watched(stage: Any) -> Any:
        def choose(view: StageView) -> Any:
            found = stage.choose(view)
            last = torch.tensor([len(view.tokens) - 1])
            scores = view.attention_from(last, layer="next")[view.tokens.patches]
            assert found.tolist() == sorted(top_k(scores, len(found)).tolist())
            seen.append([len(view.tokens.patches), len(found)])
            return found

        return replace(stage, choose=choose)

    watching = replace(plan, stages=tuple(watched(stage) for stage in plan.stages))
    work = model.run(question(), Decoding(max_new_tokens=2), watching).work
    share = stage_share(0.6, [1, 3, 4], 6)
    first = seen[0][0]
    expected = [int(first * share**step + 1e-6) for step in range(4)]
    assert seen == [list(pair) for pair in itertools.pairwise(expected)]
    assert work.positions == "compact"
    assert len(set(model.decoder._next)) == 4
