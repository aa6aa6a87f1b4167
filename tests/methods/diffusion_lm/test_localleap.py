"""LocalLeap: every invariant of its rule, against a double loop and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardware.profile import Profile
from methods.diffusion_lm.common import over_threshold
from methods.diffusion_lm.localleap import LocalLeap, required_confidence
from methods.diffusion_lm.low_confidence import LowConfidence
from methods.diffusion_lm.threshold import Threshold
from models.base import Decoding
from models.masked_diffusion_decode import Cache, Row, Step, View, decode_rows, surest
from tests.models.tiny_diffusion import TableModel, tiny_diffusion

PROFILE = Profile(name="test", kind="cpu", label="No particular device")
ANSWER = Decoding(max_new_tokens=24, ignore_eos=True)
WIDTH = 12
# Coarse, so that many confidences lie on the thresholds themselves.
LEVELS = st.integers(0, 20).map(lambda number: number / 20)


def view_of(confidence: list[float], is_mask: list[bool] | None = None) -> View:
    masks = is_mask or [True] * len(confidence)
    return View(
        torch.zeros(1, len(confidence), dtype=torch.int64),
        torch.tensor([confidence], dtype=torch.float64),
        torch.tensor([masks]),
    )


def select(method: LocalLeap, view: View, *, number: int = 0, offset: int = 0) -> Tensor:
    rule = method.rule(tiny_diffusion(), ANSWER)
    step = Step(block=view, ahead=None, rows=(0,), offset=offset, number=number)
    return rule.select(step)


def places(chosen: Tensor) -> set[int]:
    assert len(chosen) == 1
    return set(chosen[0].nonzero()[:, 0].tolist())


def by_hand(view: View, kappa: float, tau: float, radius: int) -> set[int]:
    """The algorithm of the card, position by position."""
    confidence, masks = view.confidence[0].tolist(), view.is_mask[0].tolist()
    masked = [place for place, is_mask in enumerate(masks) if is_mask]
    anchors = [place for place in masked if confidence[place] >= kappa]
    chosen = {max(masked, key=lambda place: (confidence[place], -place))}
    for place in masked:
        is_near = any(abs(place - anchor) <= radius for anchor in anchors)
        if confidence[place] >= (tau if is_near else kappa):
            chosen.add(place)
    return chosen


states = st.tuples(
    st.lists(LEVELS, min_size=WIDTH, max_size=WIDTH),
    st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH).filter(any),
).map(lambda pair: view_of(*pair))
thresholds = st.tuples(LEVELS, LEVELS).map(lambda pair: (max(pair), min(pair)))


def rows(method: Any, model: Any = None, decoding: Decoding = ANSWER) -> list[Row]:
    model = model or tiny_diffusion()
    return decode_rows(
        model,
        [[5, 9, 13, 7], [3, 4]],
        decoding,
        rule=method.rule(model, decoding),
        ending=method.ending(model),
        procedure=method.procedure(),
    )


# ---- the rule


def test_the_defaults_are_the_papers() -> None:
    method = LocalLeap()
    assert (method.threshold, method.relaxed_threshold, method.radius) == (0.9, 0.75, 4)
    assert (method.block_length, method.early_stop, method.cache) == (32, False, "none")
    assert method.neighbourhood == "flat"


def test_the_example_of_the_card() -> None:
    """.95 is the anchor; .80 at distance 5 is too far, .74 is not sure enough."""
    view = view_of([0.95, 0.80, 0.76, 0.74, 0.60, 0.80])
    assert places(select(LocalLeap(), view)) == {0, 1, 2}


@pytest.mark.parametrize(("kappa", "tau"), [(0.9, 0.75), (0.6, 0.3), (0.5, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("radius", [0, 1, 2, 4, WIDTH + 3])
def test_the_pooled_form_is_the_double_loop(kappa: float, tau: float, radius: int) -> None:
    draw = torch.Generator().manual_seed(radius)
    # Multiples of a twentieth, so that many confidences lie on the thresholds themselves.
    confidence = torch.randint(0, 21, (60, WIDTH), generator=draw).double() / 20
    is_mask = torch.rand(60, WIDTH, generator=draw) < 0.7
    is_mask[:, 0] |= ~is_mask.any(dim=1)
    view = View(torch.zeros(60, WIDTH, dtype=torch.int64), confidence, is_mask)
    method = LocalLeap(threshold=kappa, relaxed_threshold=tau, radius=radius)
    step = Step(block=view, ahead=None, rows=tuple(range(60)), offset=0, number=0)
    chosen = method.rule(tiny_diffusion(), ANSWER).select(step)
    for row in range(60):
        one = View(*(part[row : row + 1] for part in view))
        assert places(chosen[row : row + 1]) == by_hand(one, kappa, tau, radius)


@settings(max_examples=60, deadline=None)
@given(view=states, levels=thresholds, radius=st.integers(0, WIDTH))
def test_it_writes_between_what_its_two_thresholds_would(
    view: View, levels: tuple[float, float], radius: int
) -> None:
    kappa, tau = levels
    chosen = select(LocalLeap(threshold=kappa, relaxed_threshold=tau, radius=radius), view)
    strict, lax = over_threshold(view, kappa), over_threshold(view, tau)
    assert not (strict & ~chosen).any()
    assert not (chosen & ~(lax | surest(view, 1))).any()
    has_anchor = bool((view.is_mask & (view.confidence >= kappa)).any())
    if not has_anchor:
        assert int(chosen.sum()) == 1
    elif radius >= WIDTH:
        assert torch.equal(chosen, lax)


@settings(max_examples=60, deadline=None)
@given(
    view=states,
    levels=st.lists(LEVELS, min_size=3, max_size=3).map(sorted),
    radius=st.integers(0, WIDTH - 1),
)
def test_it_writes_more_with_a_larger_radius_and_less_with_higher_thresholds(
    view: View, levels: list[float], radius: int
) -> None:
    low, middle, high = levels

    def chosen(kappa: float, tau: float, reach: int = radius) -> set[int]:
        method = LocalLeap(threshold=kappa, relaxed_threshold=tau, radius=reach)
        return places(select(method, view))

    assert chosen(high, middle) <= chosen(high, middle, radius + 1)
    assert chosen(high, middle) <= chosen(high, low)
    assert chosen(high, low) <= chosen(middle, low)


def test_only_masks_are_anchors() -> None:
    """A written token is certain, and relaxes nothing."""
    view = view_of([0.99, 0.80, 0.5, 0.5], [False, True, True, True])
    assert places(select(LocalLeap(), view)) == {1}
    assert places(select(LocalLeap(), view_of([0.99, 0.80, 0.76, 0.5]))) == {0, 1, 2}
    view = view_of([0.99, 0.80, 0.76, 0.5], [False, True, True, True])
    assert places(select(LocalLeap(), view)) == {1}


def test_accepted_neighbours_are_no_anchors_in_the_same_step() -> None:
    confidence = [0.95, *[0.8] * 7]
    assert places(select(LocalLeap(radius=2), view_of(confidence))) == {0, 1, 2}
    grown = LocalLeap(radius=2, neighbourhood="transitive")
    assert places(select(grown, view_of(confidence))) == set(range(8))


def test_in_the_next_step_what_was_written_is_no_anchor_either_unless_asked_for() -> None:
    first = view_of([0.95, 0.5, 0.5, 0.5, 0.8, 0.8])
    second = view_of([0.95, 0.8, 0.8, 0.5, 0.8, 0.8], [False, *[True] * 5])
    found = {}
    for neighbourhood in ("flat", "written"):
        method = LocalLeap(radius=2, neighbourhood=neighbourhood)  # type: ignore[arg-type]  # both are
        rule = method.rule(tiny_diffusion(), ANSWER)
        for number, view in enumerate((first, second)):
            chosen = rule.select(Step(block=view, ahead=None, rows=(0,), offset=8, number=number))
        found[neighbourhood] = places(chosen)
    assert found == {"flat": {1}, "written": {1, 2}}


def test_written_anchors_of_the_last_block_reach_into_the_next_by_their_distance() -> None:
    method = LocalLeap(radius=2, neighbourhood="written")
    rule = method.rule(tiny_diffusion(), ANSWER)
    first = view_of([0.5, 0.5, 0.5, 0.95])
    rule.select(Step(block=first, ahead=None, rows=(0,), offset=0, number=0))
    second = view_of([0.76, 0.8, 0.8, 0.8])
    chosen = rule.select(Step(block=second, ahead=None, rows=(0,), offset=4, number=0))
    # Places 4 and 5 are within 2 of place 3, 6 is not.
    assert places(chosen) == {0, 1}


def test_a_decaying_threshold_rises_with_the_distance_to_the_nearest_anchor() -> None:
    anchors = torch.tensor([[True, False, False, False, False, False, True, False]])
    found = required_confidence(anchors, 0.9, 0.7, 4, decays=True)[0].tolist()
    assert found == pytest.approx([0.7, 0.75, 0.8, 0.85, 0.8, 0.75, 0.7, 0.75])
    far = required_confidence(anchors[:, :6], 0.9, 0.7, 2, decays=True)[0].tolist()
    assert far == pytest.approx([0.7, 0.8, 0.9, 0.9, 0.9, 0.9])
    alone = required_confidence(anchors, 0.9, 0.7, 0, decays=True)
    assert torch.equal(alone, torch.full_like(alone, 0.9))
    decaying = LocalLeap(relaxed_threshold=0.7, neighbourhood="decay")
    view = view_of([0.95, 0.76, 0.76, 0.86])
    assert places(select(decaying, view)) == {0, 1, 3}


# ---- whole texts


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    "settings_", [{"radius": 0}, {"relaxed_threshold": 0.4}], ids=["radius 0", "one threshold"]
)
def test_without_a_neighbourhood_it_is_the_threshold_rule(
    cache: Cache, settings_: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"threshold": 0.4, "block_length": 8, "cache": cache}
    leap = LocalLeap(**{"relaxed_threshold": 0.1, **common, **settings_})
    assert rows(leap) == rows(Threshold(**common))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_it_acts_and_never_takes_more_steps_than_tokens(cache: Cache) -> None:
    common: dict[str, Any] = {"threshold": 0.4, "block_length": 8, "cache": cache}
    leap = rows(LocalLeap(relaxed_threshold=0.1, **common))
    plain, strict = rows(LowConfidence(block_length=8, cache=cache)), rows(Threshold(**common))
    for found, one, other in zip(leap, plain, strict, strict=True):
        assert len(found.forwards) < len(other.forwards) <= len(one.forwards) == 24


@pytest.mark.parametrize("neighbourhood", ["flat", "decay", "written", "transitive"])
def test_rows_of_a_batch_are_decoded_as_alone(neighbourhood: Any) -> None:
    model = tiny_diffusion()
    method = LocalLeap(
        threshold=0.4, relaxed_threshold=0.1, block_length=8, neighbourhood=neighbourhood
    )
    for prompt, row in zip(([5, 9, 13, 7], [3, 4]), rows(method), strict=True):
        (alone,) = decode_rows(
            model,
            [prompt],
            ANSWER,
            rule=method.rule(model, ANSWER),
            procedure=method.procedure(),
        )
        assert alone == row


def test_an_anchor_at_the_edge_of_a_block_relaxes_nothing_behind_it() -> None:
    """All of the next block's confidences are over the relaxed threshold, next to an anchor."""
    table = torch.tensor([[0.5, 0.5], [0.95, 0.05], [0.8, 0.2], [0.8, 0.2]])
    method = LocalLeap(block_length=2)
    (row,) = decode_rows(
        TableModel([table]),
        [[0]],
        Decoding(max_new_tokens=4),
        rule=method.rule(tiny_diffusion(), ANSWER),
        procedure=method.procedure(),
    )
    assert [each.places for each in row.written] == [(1,), (0,), (2,), (3,)]


# ---- settings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"relaxed_threshold": 0.95}, "relaxed_threshold must be at most threshold, got 0.95"),
        ({"radius": -1}, "radius must be a whole number of at least 0"),
        ({"threshold": -1.0, "relaxed_threshold": -1.0}, "must be at least 0"),
        ({"neighbourhood": "wide"}, "neighbourhood must be one of flat, decay"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LocalLeap(**wrong)
