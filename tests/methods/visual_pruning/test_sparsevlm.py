"""SparseVLM: raters, the authors' lists as averages, and what is merged of the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.visual_pruning.common import top_k
from methods.visual_pruning.common_merging import dpc_knn
from methods.visual_pruning.sparsevlm import SparseVLM, raters, schedule
from models.base import Decoding, Unsupported
from models.vision_language_decoder import (
    PATCH,
    TEXT_AFTER,
    TEXT_BEFORE,
    Positions,
    PromptTokens,
    StageView,
)
from tests.methods.visual_pruning.models import ARCHITECTURES, answer_of, model_of, question


def prompt(states: Tensor, kinds: list[int]) -> PromptTokens:
    kind = torch.tensor(kinds)
    empty = torch.full_like(kind, -1)
    return PromptTokens(states, kind, empty, empty, empty, Positions(torch.arange(len(kind))[None]))


def test_raters_are_the_words_that_visual_tokens_resemble() -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(9, 4, generator=draw)
    kinds = [TEXT_BEFORE, PATCH, PATCH, PATCH, *[TEXT_AFTER] * 5]
    shares = torch.zeros(5)
    for patch in (1, 2, 3):
        weights = torch.tensor([float((states[patch] @ states[w]).exp()) for w in range(4, 9)])
        shares += weights / weights.sum() / 3
    expected = [w for w in range(5) if shares[w] > shares.mean()]
    assert raters(prompt(states, kinds)).tolist() == expected
    assert 0 < len(expected) < 5
    alike = torch.ones(9, 4)
    assert raters(prompt(alike, kinds)).tolist() == [0, 1, 2, 3, 4]


LISTS = [(192, (300, 200, 110)), (128, (303, 110, 36)), (64, (66, 30, 17))]


@pytest.mark.parametrize(("budget", "listed"), LISTS)
def test_the_authors_lists_are_met_on_their_model(budget: int, listed: tuple[int, ...]) -> None:
    """With what is merged the lists average to their budgets; ours lie next to them."""
    steps = schedule(budget / 576, 576, (2, 6, 15), 32, 0.3)
    for step, wanted in zip(steps, listed, strict=True):
        assert step.kept == pytest.approx(wanted, abs=max(5, 0.06 * wanted))
    seen = [step.kept + step.merged for step in steps]
    average = (2 * 576 + 4 * seen[0] + 9 * seen[1] + 17 * seen[2]) / 32
    assert budget - 1.5 < average < budget + 1


def test_a_schedule_merges_a_tenth_of_the_better_dropped_tokens() -> None:
    steps = schedule(1 / 3, 576, (2, 6, 15), 32, 0.3)
    present = 576
    for step in steps:
        assert step.candidates == int(0.3 * (present - step.kept))
        assert step.merged == step.candidates // 10 + 1
        present = step.kept + step.merged
    assert [step.merged for step in schedule(1 / 3, 576, (2, 6, 15), 32, 0.0)] == [0, 0, 0]
    assert [step.kept for step in schedule(1.0, 36, (1, 2, 3), 6, 0.3)] == [36, 36, 36]
    with pytest.raises(Unsupported, match="shortest list keeps"):
        schedule(0.05, 576, (2, 6, 15), 32, 0.3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_raters_attention_ranks_and_the_best_of_the_rest_is_merged_behind(
    architecture: Any,
) -> None:
    model = model_of(architecture)
    method = SparseVLM(keep_ratio=0.5)
    plan = method.plan(model)
    assert [stage.after for stage in plan.stages] == [1, 2, 3]
    checked: list[int] = []

    def watched(stage: Any) -> Any:
        def choose(view: StageView) -> Any:
            tokens = view.tokens
            found = stage.choose(view)
            words = (tokens.kind == TEXT_AFTER).nonzero().flatten()[raters(view.embedded)]
            scores = view.attention_from(words)[tokens.patches]
            wanted = schedule(0.5, view.num_patches, (1, 2, 3), 6, 0.3)[len(checked)]
            ranked = top_k(scores, len(scores))
            kept = tokens.patches[ranked[: wanted.kept].sort().values]
            again = ranked[wanted.kept : wanted.kept + wanted.candidates].sort().values
            rest = tokens.states[tokens.patches[again]]
            made = found.states[found.patches]
            assert torch.equal(made[: wanted.kept], tokens.states[kept])
            if wanted.merged:
                means = dpc_knn(rest, wanted.merged, 5).means(rest)
                assert torch.equal(made[wanted.kept :], means)
            # Merged tokens stand behind the others and in front of the words.
            assert found.kind[found.patches[-1] + 1] != PATCH
            text = found.kind == TEXT_AFTER
            assert int(text.sum()) == int((tokens.kind == TEXT_AFTER).sum())
            assert bool((found.patches < text.nonzero().min()).all())
            checked.append(len(made))
            return found

        return replace(stage, choose=choose)

    watching = replace(plan, stages=tuple(watched(stage) for stage in plan.stages))
    work = model.run(question(), Decoding(max_new_tokens=2), watching).work
    assert len(checked) == 3
    assert work.positions == "compact"
    assert work.mean_visual_tokens == pytest.approx(0.5 * work.visual_tokens, abs=1.5)
    assert work.selector_flops > 0


def test_without_recycling_tokens_are_only_dropped() -> None:
    with_merging = answer_of(SparseVLM(keep_ratio=0.6)).work
    without = answer_of(SparseVLM(keep_ratio=0.6, recycled=0.0)).work
    assert without.mean_visual_tokens == pytest.approx(with_merging.mean_visual_tokens, abs=1.5)
    assert answer_of(SparseVLM(keep_ratio=0.6, positions="original")).work.positions == "original"
