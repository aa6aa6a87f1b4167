"""ZOO-Prune: estimators against differentiation and on paper, the choice by its rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from methods.visual_pruning.common import greedy_maxmin, normalised, top_k
from methods.visual_pruning.zoo_prune import ZooPrune, select
from models.base import Unsupported
from models.vision_language_towers import ProjectorParts
from tests.methods.visual_pruning.models import ARCHITECTURES, answer_of, model_of, reduced

WIDTH, HIDDEN, OUT = 12, 18, 16


def parts(*, norm: bool = False, activation: Any = None, seed: int = 0) -> ProjectorParts:
    draw = torch.Generator().manual_seed(seed)
    first, second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)
    with torch.no_grad():
        for weight in (*first.parameters(), *second.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=draw) / 3)
    weights = torch.rand(3, generator=draw) + 0.5 if norm else None
    return ProjectorParts(first, second, activation or nn.GELU(), 4 if norm else 1, weights, 1e-6)


def tokens(count: int = 20, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=draw, dtype=torch.float64)


def sensitivity(projector: ProjectorParts, features: Tensor, **settings: Any) -> Tensor:
    with torch.no_grad():
        return ZooPrune(**settings).sensitivity(projector, features)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_differences_approach_the_derivative_as_the_square_of_the_step(
    norm: bool, shared: bool
) -> None:
    projector, features = parts(norm=norm), tokens()
    exact = sensitivity(projector, features, estimator="jvp", shared_directions=shared)
    errors = []
    for step in (1e-1, 1e-2, 1e-3):
        found = sensitivity(projector, features, step=step, shared_directions=shared)
        errors.append(float(((found - exact) / exact).abs().max()))
    assert errors[2] < 1e-6
    assert 50 < errors[0] / errors[1] < 200


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_the_closed_form_and_its_full_rank_are_the_derivative(norm: bool, shared: bool) -> None:
    projector, features = parts(norm=norm), tokens()
    settings = {"shared_directions": shared, "directions": 11}
    exact = sensitivity(projector, features, estimator="jvp", **settings)
    for estimator in ("mlp", "gram"):
        found = sensitivity(projector, features, estimator=estimator, **settings)
        assert torch.allclose(found, exact, rtol=1e-9, atol=0)
    low = sensitivity(projector, features, estimator="gram", rank=4, **settings)
    assert (low < exact).all()
    assert not torch.allclose(low, exact, rtol=1e-2)


def test_the_derivative_is_the_jacobian_times_the_directions() -> None:
    projector, features = parts(), tokens(4)
    method = ZooPrune(estimator="jvp", directions=5)
    along = method.draw(1, WIDTH)[0]
    assert torch.allclose(along.norm(dim=-1), torch.ones(5, dtype=torch.float64))
    expected = []
    for row in features:
        jacobian = torch.func.jacrev(projector)(row)
        expected.append((jacobian @ along.T).norm(dim=0).mean())
    assert torch.allclose(
        sensitivity(projector, features, estimator="jvp", directions=5), torch.stack(expected)
    )
    squares = [torch.func.jacrev(projector)(row).square().sum() / WIDTH for row in features]
    frob = sensitivity(projector, features, estimator="frob")
    assert torch.allclose(frob, torch.stack(squares).sqrt())


@pytest.mark.parametrize("norm", [False, True])
def test_a_projector_in_parts_is_the_projector(norm: bool) -> None:
    architecture: Any = "qwen2.5-vl" if norm else "llava"
    model = model_of(architecture)
    seen, _ = reduced(ZooPrune(keep_ratio=0.5), architecture)
    with torch.inference_mode():
        taken_apart = model.tower.projector_parts()(seen.encoded.features)
    assert torch.allclose(taken_apart, seen.projected, atol=1e-5)
    along = torch.randn(seen.encoded.features.shape, dtype=torch.float64)
    features = seen.encoded.features.double().clone()
    taken = model.tower.projector_parts()
    # Times 1, for the identity gives the very tensor back, which autograd refuses.
    _, change = torch.autograd.functional.jvp(lambda x: taken.inner(x) * 1, features, along)
    assert torch.allclose(taken.inner_change(features, along), change)


def test_a_linear_projector_is_equally_sensitive_everywhere() -> None:
    projector, features = parts(activation=nn.Identity()), tokens()
    found = sensitivity(projector, features)
    along = ZooPrune().draw(1, WIDTH)[0]
    product = projector.second.weight.double() @ projector.first.weight.double()
    expected = (along @ product.T).norm(dim=1).mean()
    assert torch.allclose(found, expected.expand(20), rtol=1e-9)
    # Rounding is no sensitivity: with equal scores it is max-min diversity from the first token.
    with torch.no_grad():
        likeness = projector(features)
    chosen = select(torch.ones(20), likeness, 7, "product")
    by_distance = greedy_maxmin(normalised(likeness), torch.tensor(0), 7)
    assert chosen.tolist() == sorted(by_distance.tolist())


def test_more_directions_scatter_less_in_proportion() -> None:
    projector, features = parts(), tokens(6)
    spread = []
    for directions in (8, 128):
        found = torch.stack(
            [
                sensitivity(projector, features, estimator="mlp", directions=directions, seed=seed)
                for seed in range(60)
            ]
        )
        spread.append(float(found.var(0).mean()))
    assert 8 < spread[0] / spread[1] < 32  # 16 expected


def test_a_step_of_a_hundredth_survives_float32_and_not_bfloat16() -> None:
    along = ZooPrune().draw(1, 1024)[0]
    features = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = features.to(dtype)
        cast = (base.double() + 0.01 * along).to(dtype).double() - base.double()
        moved[dtype] = float(cast.norm(dim=1).mean() / 0.01)
    assert moved[torch.float32] == pytest.approx(1, abs=0.01)
    assert abs(moved[torch.bfloat16] - 1) > 0.1


def test_the_estimator_runs_in_float32_for_a_model_in_bfloat16() -> None:
    seen: list[torch.dtype] = []

    class Watching(ZooPrune):
        def sensitivity(self, projector: ProjectorParts, features: Tensor) -> Tensor:
            seen.append(features.dtype)
            return super().sensitivity(projector, features)

    projector, features = parts(), tokens().bfloat16()
    projector.first.bfloat16()
    projector.second.bfloat16()

    class Shown:
        class encoded:  # noqa: N801  # stands for an attribute
            pass

        projector_parts = projector
        projected = projector(features)

        def count(self, flops: float) -> None:
            assert flops > 0

    Shown.encoded.features = features  # type: ignore[attr-defined]  # a stand-in
    with torch.no_grad():
        found = Watching(keep_ratio=0.5)._reduce(Shown())  # type: ignore[arg-type]  # a stand-in
    assert seen == [torch.float32]
    assert len(found) == 10


def test_the_first_choice_is_the_most_sensitive_token_and_fusions_are_what_they_say() -> None:
    draw = torch.Generator().manual_seed(3)
    # Neither from 0 nor to 1.
    scores, likeness = 5 * torch.rand(15, generator=draw) + 2, torch.randn(15, 6, generator=draw)
    weights = (scores - scores.min()) / (scores.max() - scores.min())
    cosine = normalised(likeness) @ normalised(likeness).T
    first = int(scores.argmax())
    for fusion in ("product", "sum", "diversity"):
        assert select(scores, likeness, 1, fusion).tolist() == [first]
        chosen = [first]
        while len(chosen) < 6:
            away = {i: 1 - float(cosine[i, chosen].max()) for i in range(15) if i not in chosen}
            worth = {
                "product": lambda i, away=away: away[i] * float(weights[i]),
                "sum": lambda i, away=away: away[i] + float(weights[i]),
                "diversity": lambda i, away=away: away[i],
            }[fusion]
            chosen.append(max(away, key=worth))
        assert select(scores, likeness, 6, fusion).tolist() == sorted(chosen)
    best = select(scores, likeness, 6, "sensitivity").tolist()
    assert best == sorted(top_k(scores, 6).tolist())
    # Scores that tell nothing apart leave the choice to the distances.
    for fusion in ("product", "sum"):
        even = select(torch.full((15,), 0.3), likeness, 6, fusion).tolist()
        assert even == select(torch.full((15,), 0.3), likeness, 6, "diversity").tolist()


def test_a_scale_changes_neither_and_the_least_sensitive_token_comes_last() -> None:
    draw = torch.Generator().manual_seed(4)
    scores, likeness = torch.rand(12, generator=draw), torch.randn(12, 6, generator=draw)
    plain = select(scores, likeness, 5, "product")
    assert select(scores * 7 + 2, likeness, 5, "product").tolist() == plain.tolist()
    assert int(scores.argmin()) not in select(scores, likeness, 11, "product").tolist()
    assert select(scores, likeness, 12, "product").tolist() == list(range(12))
    # Several tokens without sensitivity: the one that is farthest away goes first.
    flat = torch.tensor([1.0, 0.0, 0.0])
    around = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]])
    assert select(flat, around, 2, "product").tolist() == [0, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("estimator", ["fd", "jvp", "mlp", "gram", "frob"])
def test_estimators_run_on_every_architecture(architecture: Any, estimator: Any) -> None:
    method = ZooPrune(keep_ratio=0.25, estimator=estimator, directions=9)
    if estimator == "frob" and architecture == "qwen2.5-vl":
        with pytest.raises(Unsupported, match="without a norm in front"):
            answer_of(method, architecture)
        return
    answer = answer_of(method, architecture)
    assert answer.work.kept_tokens == method.budget(answer.work.visual_tokens)
    reference, _ = reduced(ZooPrune(estimator="jvp", directions=9), architecture)
    features = reference.encoded.features.float()
    with torch.inference_mode():
        projector = model_of(architecture).tower.projector_parts()
        exact = ZooPrune(estimator="jvp", directions=9).sensitivity(projector, features)
        found = method.sensitivity(projector, features)
    if estimator != "frob":
        assert torch.allclose(found, exact, rtol=2e-3)
    assert exact.std() > 0


def test_operations_are_those_of_the_products() -> None:
    first, second, count, directions = 32 * 48, 48 * 48, 36, 64
    steps = 17 * 2 * 36 * 48
    expected = {
        "fd": 2 * 2 * count * directions * (first + second),
        "jvp": 2 * 3 * count * directions * (first + second),
        "mlp": 2 * (count * first + directions * first + count * directions * second),
        "gram": 2 * (count * first + directions * first + count * directions * 48 * 8),
        "frob": 2 * count * (first + 48 * 48),
    }
    for estimator, flops in expected.items():
        method = ZooPrune(keep_ratio=0.5, estimator=estimator, rank=8)  # type: ignore[arg-type]
        assert answer_of(method, shape="square").work.selector_flops == flops + steps
    lone = answer_of(ZooPrune(keep_ratio=0.5, fusion="norm"), shape="square").work
    assert lone.selector_flops == steps
    assert (
        answer_of(
            ZooPrune(keep_ratio=0.5, fusion="sensitivity"), shape="square"
        ).work.selector_flops
        == expected["fd"]
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("estimator", ["fd", "mlp", "gram"])
def test_the_estimators_products_are_those_that_torch_counts(
    estimator: Any, shared: bool, norm: bool
) -> None:
    # As a function: the counter cannot follow gradients through a module.
    projector, features = parts(norm=norm, activation=nn.functional.gelu), tokens()
    method = ZooPrune(estimator=estimator, shared_directions=shared, rank=5)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        method.sensitivity(projector, features)
    assert counter.get_total_flops() == method.estimator_flops(projector, len(features))


def test_the_norm_control_takes_lengths_and_pre_compares_in_front_of_the_projector() -> None:
    seen, found = reduced(ZooPrune(keep_ratio=0.25, fusion="norm"), "llava", "square")
    assert isinstance(found, Tensor)
    lengths = seen.projected.norm(dim=-1)
    assert found.tolist() == select(lengths, seen.projected, 9, "norm").tolist()
    assert int(lengths.argmax()) in found.tolist()
    post, pre = (
        reduced(ZooPrune(keep_ratio=0.25, similarity=kind), "llava", "square")[1]
        for kind in ("post", "pre")
    )
    assert isinstance(post, Tensor)
    assert isinstance(pre, Tensor)
    assert post.tolist() != pre.tolist()


def test_seeds_agree_on_the_ranking_of_a_tiny_projector() -> None:
    projector, features = parts(), tokens(60)
    one, two = (sensitivity(projector, features, seed=seed) for seed in (0, 1))
    ranks = torch.stack([each.argsort().argsort().double() for each in (one, two)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
