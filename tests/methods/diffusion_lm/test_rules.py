"""The baselines of masked diffusion: which tokens each rule writes, and how methods carry them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardware.profile import Profile
from methods.diffusion_lm.common import (
    DiffusionMethod,
    FixedNumber,
    OverThreshold,
    StopBehindEos,
    over_threshold,
)
from methods.diffusion_lm.fixed_k import FixedK
from methods.diffusion_lm.low_confidence import LowConfidence
from methods.diffusion_lm.random_masks import RandomMasks
from methods.diffusion_lm.threshold import Threshold
from models.base import Decoding, Generation, Unsupported
from models.masked_diffusion_decode import Cache, Row, Step, View, decode_rows
from tests.models.tiny_diffusion import EOS, TableModel, tiny_diffusion

PROFILE = Profile(name="test", kind="cpu", label="No particular device")
PROMPT = [5, 9, 13, 7]
ANSWER = Decoding(max_new_tokens=16, ignore_eos=True)
# Confidences .6 .9 .7 .9 of the tokens 0 1 2 0.
TABLE = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.9, 0.05], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05]])


def run(method: DiffusionMethod, decoding: Decoding = ANSWER, **model: Any) -> Generation:
    with method.apply(tiny_diffusion(**model), PROFILE) as changed:
        return changed.generate(PROMPT, decoding)


def row_of(method: DiffusionMethod, model: Any, decoding: Decoding, prompt: list[int]) -> Row:
    (row,) = decode_rows(
        model,
        [prompt],
        decoding,
        rule=method.rule(model, decoding),
        ending=method.ending(model),
        procedure=method.procedure(),
    )
    return row


def schedule(method: DiffusionMethod, table: Tensor = TABLE) -> list[tuple[int, ...]]:
    decoding = Decoding(max_new_tokens=len(table))
    row = row_of(method, TableModel([table]), decoding, [0])
    return [each.places for each in row.written]


# ---- schedules written out by hand


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LowConfidence(), [(1,), (3,), (2,), (0,)]),
        (LowConfidence(block_length=2), [(1,), (0,), (3,), (2,)]),
        (FixedK(tokens_per_step=2), [(1, 3), (0, 2)]),
        (FixedK(tokens_per_step=3), [(1, 3), (0, 2)]),  # two steps; 4 // 2 each
        (FixedK(tokens_per_step=4), [(0, 1, 2, 3)]),
        (FixedK(tokens_per_step=2, block_length=2), [(0, 1), (2, 3)]),
        (Threshold(threshold=0.65), [(1, 2, 3), (0,)]),
        (Threshold(threshold=0.95), [(1,), (3,), (2,), (0,)]),
        (Threshold(threshold=0.0), [(0, 1, 2, 3)]),
        (Threshold(threshold=0.65, block_length=2), [(1,), (0,), (2, 3)]),
    ],
)
def test_each_rule_writes_what_was_worked_out_by_hand(
    method: DiffusionMethod, expected: list[tuple[int, ...]]
) -> None:
    assert schedule(method) == expected


def test_a_confidence_that_equals_the_threshold_reaches_it() -> None:
    confidence = torch.tensor([[0.9, 0.8999999, 0.95]]).double()
    confidence[0, 0] = 0.9
    view = View(torch.zeros(1, 3).long(), confidence, torch.ones(1, 3, dtype=torch.bool))
    assert over_threshold(view, 0.9).tolist() == [[True, False, True]]
    assert over_threshold(view, 0.96).tolist() == [[False, False, True]]


@given(block=st.integers(1, 40), share=st.integers(1, 45))
def test_a_schedule_spreads_a_block_evenly_with_the_rest_on_its_first_steps(
    block: int, share: int
) -> None:
    rule, left, counts = FixedNumber(share), block, []
    while left:
        (count,) = rule.count(torch.tensor([left]), block, len(counts)).tolist()
        counts.append(count)
        left -= count
    assert len(counts) == -(-block // share)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1
    assert counts[0] <= share


# ---- what rules have in common


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_fewest_steps_and_highest_thresholds_are_the_plain_decoder(
    is_shifted: bool, cache: Cache
) -> None:
    common: dict[str, Any] = {"block_length": 4, "cache": cache}
    plain = run(LowConfidence(**common), is_shifted=is_shifted)
    for method in (FixedK(tokens_per_step=1, **common), Threshold(threshold=1.1, **common)):
        found = run(method, is_shifted=is_shifted)
        assert found.token_ids == plain.token_ids
        assert found.trace.forwards == plain.trace.forwards


def test_a_threshold_of_zero_finishes_each_block_in_one_step() -> None:
    found = run(Threshold(threshold=0.0, block_length=4))
    assert len(found.trace.forwards) == 4
    assert found.trace.accepted == [3] * 4


@pytest.mark.parametrize(
    "method",
    [FixedK(tokens_per_step=3), Threshold(threshold=0.4), RandomMasks(tokens_per_step=2, seed=5)],
    ids=lambda method: type(method).__name__,
)
def test_rows_of_a_batch_are_decoded_as_alone(method: DiffusionMethod) -> None:
    model, prompts = tiny_diffusion(), [[5, 9], [3], [8, 4, 6, 7]]
    together = decode_rows(
        model,
        prompts,
        ANSWER,
        rule=method.rule(model, ANSWER),
        ending=method.ending(model),
        procedure=method.procedure(),
    )
    for prompt, row in zip(prompts, together, strict=True):
        assert row_of(method, model, ANSWER, prompt) == row


@settings(max_examples=50)
@given(data=st.data())
def test_any_rule_chooses_at_least_one_mask_and_nothing_else(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8))
    is_mask = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))]
    )
    confidence = torch.tensor(
        [data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))]
    ).double()
    step = Step(
        block=View(torch.zeros(1, size).long(), confidence, is_mask),
        ahead=None,
        rows=(0,),
        offset=0,
        number=data.draw(st.integers(0, size - 1)),
    )
    level = data.draw(st.floats(0, 1.2))
    number = data.draw(st.integers(1, 9))
    model = tiny_diffusion()
    for rule in (
        FixedNumber(number),
        OverThreshold(level),
        RandomMasks(tokens_per_step=number).rule(model, ANSWER),
    ):
        chosen = rule.select(step)
        assert chosen.any()
        assert not (chosen & ~is_mask).any()


# ---- the control


def test_random_masks_are_those_of_their_seed_and_not_the_surest() -> None:
    table = TABLE.repeat(4, 1)
    orders = [schedule(RandomMasks(seed=seed), table) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != schedule(LowConfidence(), table)
    assert {len(places) for places in schedule(RandomMasks(tokens_per_step=4), table)} == {4}


def test_random_masks_are_spread_over_the_block() -> None:
    first = [schedule(RandomMasks(seed=seed))[0][0] for seed in range(200)]
    counts = [first.count(place) for place in range(4)]
    assert min(counts) > 25


# ---- early stop


def test_an_early_stop_ends_behind_the_block_that_holds_an_end() -> None:
    table = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    model = TableModel([table], eos_id=1)
    decoding = Decoding(max_new_tokens=6)
    texts = {}
    for stops in (False, True):
        method = LowConfidence(block_length=2, early_stop=stops)
        with method.apply(model, PROFILE) as changed:
            texts[stops] = changed.generate([0], decoding)
    assert texts[False].token_ids == texts[True].token_ids == (0, 1)
    assert [len(text.trace.forwards) for text in texts.values()] == [6, 2]


def test_an_early_stop_looks_for_every_end_of_the_text() -> None:
    ending = StopBehindEos(frozenset({7, 9}))
    blocks = torch.tensor([[1, 7], [9, 1], [1, 2]])
    assert ending.is_over(blocks).tolist() == [True, True, False]


@pytest.mark.parametrize("method_class", [LowConfidence, FixedK, Threshold, RandomMasks])
def test_every_method_passes_its_shared_settings_on(method_class: type[DiffusionMethod]) -> None:
    method = method_class(
        block_length=8, cache="dual", early_stop=True, confidence="margin", defer_eos=True
    )
    procedure = method.procedure()
    assert (procedure.block_length, procedure.cache, procedure.confidence) == (8, "dual", "margin")
    assert procedure.defers_eos
    model = tiny_diffusion()
    assert isinstance(method.ending(model), StopBehindEos)
    assert method.ending(model).is_over(torch.tensor([[EOS]])).tolist() == [True]
    decoding = Decoding(max_new_tokens=16, ignore_eos=True)
    found = run(method, decoding)
    assert {forward.width for forward in found.trace.forwards} == {20, 8}


# ---- settings and refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LowConfidence(block_length=0), "block_length must be a whole number"),
        (lambda: LowConfidence(cache="double"), "cache must be one of none, prefix, dual"),  # type: ignore[arg-type]  # on purpose
        (lambda: LowConfidence(confidence="belief"), "confidence must be one of"),  # type: ignore[arg-type]  # on purpose
        (lambda: FixedK(tokens_per_step=0), "tokens_per_step must be"),
        (lambda: Threshold(threshold=-0.1), "threshold must be at least 0, got -0.1"),
        (lambda: Threshold(threshold=float("nan")), "threshold must be at least 0, got nan"),
        (lambda: RandomMasks(seed=-1), "seed must be"),
    ],
)
def test_wrong_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_an_entropy_has_thresholds_below_zero() -> None:
    table = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.9999, 0.0001]])
    assert schedule(Threshold(threshold=-0.4, confidence="entropy"), table) == [(1, 2), (0,)]


def test_a_model_that_fills_in_no_masks_is_refused_and_nothing_is_left_behind() -> None:
    class Other:
        name = "other"

    refused: Any = Other()
    with (
        pytest.raises(Unsupported, match="'threshold' needs a masked-diffusion language model"),
        Threshold().apply(refused, PROFILE),
    ):
        pass
    model = tiny_diffusion()
    before = dict(vars(model))
    run(Threshold(threshold=0.3, cache="dual"))
    assert dict(vars(model)) == before
