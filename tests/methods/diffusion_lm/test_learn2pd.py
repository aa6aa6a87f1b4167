"""Learn2PD: the filter, the predicted end, the oracle, on tables and on small random models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from methods.diffusion_lm.common import FixedNumber, OverThreshold, StopBehindEos
from methods.diffusion_lm.common_learn2pd import (
    ConfidenceFilter,
    FilterRule,
    LearnedFilter,
    OracleRule,
    PredictedEnd,
    Records,
    filter_path,
    first_true,
    likeliest_end,
    load_filter,
    new_filter,
    save_filter,
)
from methods.diffusion_lm.learn2pd import Learn2PD
from models.base import Decoding, Generation, MaskedDiffusionLM, Unsupported
from models.masked_diffusion import MaskedDiffusionModel
from models.masked_diffusion_decode import (
    NeverOver,
    OneAtATime,
    Procedure,
    Row,
    Step,
    View,
    decode_rows,
)
from runner.conformance_base import PROFILE
from tests.models import toy
from tests.models.tiny_diffusion import TableModel, tiny_diffusion

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [3], [20, 3, 20, 3]]
BLOCK, LENGTH = 8, 24
DECODING = Decoding(max_new_tokens=LENGTH)
PROCEDURE = Procedure(block_length=BLOCK)


def constant_filter(log_odds: float, width: int = BLOCK) -> LearnedFilter:
    return LearnedFilter(
        torch.zeros(4, width), torch.zeros(4), torch.zeros(width, 4), torch.full((width,), log_odds)
    )


def threshold_filter(slope: float, threshold: float, width: int = BLOCK) -> LearnedFilter:
    """A filter whose log-odds are slope * (c - threshold): confidences are never negative."""
    return LearnedFilter(
        torch.eye(width),
        torch.zeros(width),
        slope * torch.eye(width),
        torch.full((width,), -slope * threshold),
    )


def rows_of(
    model: MaskedDiffusionLM, rule: Any, prompts: Sequence[Sequence[int]] = PROMPTS, **more: Any
) -> list[Row]:
    return decode_rows(model, prompts, DECODING, rule=rule, **{"procedure": PROCEDURE, **more})


def generate(
    model: MaskedDiffusionLM, prompt: Sequence[int], decoding: Decoding, **parameters: Any
) -> Generation:
    method = Learn2PD(**{"filter": "confidence", "block_length": BLOCK, **parameters})
    with method.apply(model, PROFILE) as changed:
        return changed.generate(prompt, decoding)


def table(rows: Sequence[tuple[int, float]], vocabulary: int = 6) -> Tensor:
    """Marginals that give each place its token with a probability, the rest shared evenly."""
    found = torch.empty(len(rows), vocabulary)
    for place, (token, probability) in enumerate(rows):
        found[place] = (1 - probability) / (vocabulary - 1)
        found[place, token] = probability
    return found


def written(row: Row) -> list[dict[int, int]]:
    return [dict(zip(each.places, each.tokens, strict=True)) for each in row.written]


@functools.cache
def ending_model() -> MaskedDiffusionModel:
    """A random model, with a few of the tokens that it writes declared to be ends of text."""
    plain = tiny_diffusion()
    answers = [row.answer for row in rows_of(plain, OneAtATime())]
    ends = frozenset(answer[place] for answer, place in zip(answers, (12, 9, 20, 4), strict=True))
    return MaskedDiffusionModel(plain.module, plain.tokenizer, "tiny-diffusion", more_eos_ids=ends)


# ---- the filter


@pytest.mark.parametrize("shifted", [False, True])
def test_a_filter_that_accepts_nothing_is_the_plain_decoder(shifted: bool) -> None:
    model = tiny_diffusion(is_shifted=shifted)
    plain = rows_of(model, OneAtATime())
    for judge, threshold in ((constant_filter(-9.0), 0.5), (ConfidenceFilter(), 1.0)):
        assert rows_of(model, FilterRule(judge, threshold)) == plain


def test_a_filter_that_accepts_everything_writes_a_block_a_forward() -> None:
    rule = FilterRule(constant_filter(9.0), 0.9)
    for row in rows_of(tiny_diffusion(), rule):
        assert [len(step.places) for step in row.written] == [BLOCK] * (LENGTH // BLOCK)
    assert rule.notes == {"filter_accepted": LENGTH * len(PROMPTS), "forced": 0}


@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.5, 0.9])
def test_a_steep_filter_is_the_threshold_that_it_stands_for(threshold: float) -> None:
    model = tiny_diffusion()
    expected = rows_of(model, OverThreshold(threshold))
    assert rows_of(model, FilterRule(threshold_filter(1e5, threshold), 0.5)) == expected
    assert rows_of(model, FilterRule(ConfidenceFilter(), threshold)) == expected
    if threshold < 0.5:
        assert any(len(step.places) > 1 for row in expected for step in row.written)


def test_the_filter_sees_written_positions_as_the_model_sees_them_now() -> None:
    seen: list[View] = []

    class Watching(ConfidenceFilter):
        def probabilities(self, confidence: Tensor) -> Tensor:
            seen_confidence.append(confidence.clone())
            return confidence

    class Rule(FilterRule):
        def select(self, step: Step) -> Tensor:
            seen.append(step.block)
            return super().select(step)

    seen_confidence: list[Tensor] = []
    rows_of(tiny_diffusion(), Rule(Watching(), 0.9), PROMPTS[:1])
    some_written = False
    for view, confidence in zip(seen, seen_confidence, strict=True):
        assert torch.equal(view.confidence, confidence)
        at_written = confidence[~view.is_mask]
        assert ((at_written > 0) & (at_written <= 1)).all()
        some_written |= bool((at_written < 0.999).any())
    assert some_written  # neither 0, nor -inf, nor 1 stands for them


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_only_masks_are_chosen_and_always_one(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, BLOCK))
    seed = data.draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    is_mask = torch.rand(rows, width, generator=generator) < 0.5
    is_mask[:, int(torch.randint(width, (1,), generator=generator))] = True
    view = View(
        torch.randint(5, (rows, width), generator=generator),
        torch.rand(rows, width, generator=generator, dtype=torch.float64),
        is_mask,
    )
    kind = data.draw(st.sampled_from(["block", "shared"]))
    judge = new_filter(kind, BLOCK, 16, seed)
    chosen = FilterRule(judge, 0.5).select(Step(view, None, tuple(range(rows)), 0, 0))
    assert not (chosen & ~is_mask).any()
    assert chosen.any(dim=1).all()
    accepted = (judge.probabilities(view.confidence) > 0.5) & is_mask
    assert (chosen & accepted).equal(accepted)
    for row in range(rows):
        surest = max(
            (place for place in range(width) if is_mask[row, place]),
            key=lambda place: (float(view.confidence[row, place]), -place),
        )
        assert int((chosen & ~accepted)[row].sum()) == (0 if accepted[row, surest] else 1)


def test_a_probability_at_the_threshold_is_not_enough() -> None:
    confidence = torch.tensor([[0.5, 0.75, 0.5]], dtype=torch.float64)
    view = View(torch.zeros(1, 3, dtype=torch.int64), confidence, torch.ones(1, 3).bool())
    for threshold, expected in ((0.5, [False, True, False]), (0.49, [True, True, True])):
        rule = FilterRule(ConfidenceFilter(), threshold)
        assert rule.accepted(view)[0].tolist() == expected


def test_two_layers_are_computed_as_written_down() -> None:
    judge = new_filter("block", 3, 5, seed=1)
    confidence = torch.tensor([[0.2, 0.9, 0.4]])
    first, first_bias, second, second_bias = (part.tolist() for part in judge)
    hidden = [
        max(0.0, first_bias[unit] + sum(first[unit][n] * float(confidence[0, n]) for n in range(3)))
        for unit in range(5)
    ]
    for place in range(3):
        log_odds = second_bias[place] + sum(second[place][unit] * hidden[unit] for unit in range(5))
        assert float(judge.logits(confidence)[0, place]) == pytest.approx(log_odds, abs=1e-6)
    # 32 positions and 32 units are the paper's 2,112 weights.
    assert sum(part.numel() for part in new_filter("block", 32, 32, 0)) == 2112


def test_a_shorter_block_is_read_as_one_that_is_settled_behind_its_end() -> None:
    judge = new_filter("block", 6, 16, seed=3)
    short = torch.tensor([[0.3, 0.8]])
    whole = torch.tensor([[0.3, 0.8, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(judge.logits(short), judge.logits(whole)[:, :2])
    with pytest.raises(ValueError, match="blocks of 6 positions, got 7"):
        judge.logits(torch.zeros(1, 7))


def test_a_shared_filter_reads_each_position_by_itself() -> None:
    judge = new_filter("shared", 6, 16, seed=3)
    assert judge.width is None
    confidence = torch.tensor([[0.1, 0.7, 0.4, 0.7]])
    logits = judge.logits(confidence)
    assert logits[0, 1] == logits[0, 3]
    torch.testing.assert_close(judge.logits(confidence[:, 2:3]), logits[:, 2:3])


def test_a_filter_survives_its_file_and_other_files_are_refused(tmp_path: Path) -> None:
    for kind in ("block", "shared"):
        judge = new_filter(kind, BLOCK, 16, seed=3)
        path = filter_path("hf:GSAI-ML/LLaDA-8B", kind, tmp_path)
        assert path.name == f"learn2pd_hf_gsai_ml_llada_8b_{kind}.safetensors"
        save_filter(judge, path, {"kind": kind})
        again = load_filter(path)
        assert again.kind == kind
        assert all(map(torch.equal, again, judge))
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, other)
    with pytest.raises(ValueError, match="holds no filter"):
        load_filter(other)
    tensors = new_filter("block", 8, 4, 0)._asdict() | {"hidden_bias": torch.zeros(3)}
    save_file(tensors, other)
    with pytest.raises(ValueError, match="no filter of two layers"):
        load_filter(other)


def test_a_filter_is_read_again_when_its_file_has_changed(tmp_path: Path) -> None:
    import os

    path = tmp_path / "filter.safetensors"
    for number, log_odds in enumerate((1.0, 2.0)):
        save_filter(constant_filter(log_odds), path, {})
        os.utime(path, ns=(number, number))
        assert float(load_filter(path).output_bias[0]) == log_odds


# ---- the end of the text


def test_without_an_end_in_sight_nothing_is_cut() -> None:
    sure = table([(3, 0.9), (4, 0.5), (1, 0.95), (3, 0.4), (5, 0.8), (4, 0.99)])
    for mode in ("filter", "shrink"):
        plain, changed = (
            generate(
                TableModel([sure], eos_id=2),
                [0],
                Decoding(max_new_tokens=6),
                accept_threshold=0.7,
                end_prediction=prediction,
            )
            for prediction in ("none", mode)
        )
        assert changed.token_ids == plain.token_ids == (3, 4, 1, 3, 5, 4)
        assert changed.trace.forwards == plain.trace.forwards


@pytest.mark.parametrize("mode", ["filter", "shrink"])
def test_an_end_at_a_known_place_leaves_what_is_before_it(mode: Any) -> None:
    # End of text at place 3 and, as padding, behind it; block 3 wide, so it lies in the second.
    sure = table([(3, 0.9), (4, 0.5), (1, 0.3), (2, 0.9), (2, 0.8), (2, 0.85), *[(2, 0.7)] * 6])
    model = TableModel([sure], eos_id=2)
    parameters = {"block_length": 3, "accept_threshold": 0.75}
    decoding = Decoding(max_new_tokens=12)
    plain = generate(model, [0], decoding, end_prediction="none", **parameters)
    found = generate(model, [0], decoding, end_prediction=mode, **parameters)
    assert found.token_ids == plain.token_ids == (3, 4, 1, 2)
    assert sum(forward.width for forward in found.trace.forwards) < sum(
        forward.width for forward in plain.trace.forwards
    )
    widths = [forward.width for forward in found.trace.forwards]
    if mode == "filter":
        # Two steps... the end is accepted in the fourth forward, which is the last one.
        assert widths == [13, 13, 13, 13]
    else:
        # The surest end ahead is the true one from the start.
        assert widths == [13, 5, 5, 5]


def test_the_surest_predicted_end_counts_not_the_first() -> None:
    ahead = View(
        torch.tensor([[2, 3, 2, 2, 2], [3, 3, 3, 3, 2], [3, 3, 3, 3, 3]]),
        torch.tensor([[0.5, 0.9, 0.8, 0.8, 0.99], [0.1] * 5, [0.1] * 5]),
        torch.tensor([[True, True, True, True, False]] * 2 + [[True] * 5]),
    )
    # Among equals the first; written places and other tokens do not count.
    assert likeliest_end(ahead, torch.tensor([2])).tolist() == [2, -1, -1]
    assert first_true(torch.tensor([[False, True, True], [False] * 3])).tolist() == [1, -1]


def test_an_end_that_the_filter_accepts_comes_before_a_surer_one_ahead() -> None:
    candidates = torch.tensor([[3, 2, 2, 4, 2], [3, 4, 5, 4, 2]])
    confidence = torch.tensor([[0.5, 0.9, 0.85, 0.5, 0.95], [0.5, 0.5, 0.5, 0.5, 0.95]])
    ahead = View(candidates, confidence.double(), torch.ones(2, 5).bool())
    block = View(*(part[:, :3] for part in ahead))
    step = Step(block, ahead, (0, 1), 10, 0)
    rule = FilterRule(ConfidenceFilter(), 0.8)
    ending = PredictedEnd(rule, frozenset({2}), shrinks=True, otherwise=NeverOver())
    # The first accepted one in the first row; the one ahead in the second, which has none.
    assert ending.cut(step, rule.select(step)).tolist() == [12, 15]  # type: ignore[union-attr]  # it is cut


def test_the_canvas_shrinks_step_by_step_towards_the_end() -> None:
    # At first the surest end is far behind; when two tokens are written, it has come nearer.
    far = table([(3, 0.95), (4, 0.5), (1, 0.3), (5, 0.3), (5, 0.3), (2, 0.4), (2, 0.6), (2, 0.5)])
    near = table([(3, 0.9), (4, 0.9), (1, 0.6), (2, 0.4), (2, 0.3), (2, 0.3), (2, 0.3), (2, 0.3)])
    model = TableModel([far, far, near], eos_id=2)
    found = generate(
        model,
        [0],
        Decoding(max_new_tokens=8),
        block_length=4,
        accept_threshold=1.0,
        end_prediction="shrink",
    )
    assert found.token_ids == (3, 4, 1, 2)
    # 9 positions, then 8 (cut at place 6), 8, and 5 once it is cut at place 3.
    assert [forward.width for forward in found.trace.forwards] == [9, 8, 8, 5]


def test_a_cut_keeps_tokens_that_are_written_behind_the_predicted_end() -> None:
    # Place 4 is written first; then an end is accepted at place 1.
    before = table([(3, 0.5), (2, 0.3), (1, 0.4), (5, 0.3), (4, 0.9), (5, 0.2)])
    after = table([(3, 0.5), (2, 0.9), (1, 0.4), (5, 0.3), (3, 0.9), (5, 0.2)])
    for mode in ("filter", "shrink"):
        rows = decode_rows(
            TableModel([before, after], eos_id=2),
            [[0]],
            Decoding(max_new_tokens=6),
            rule=FilterRule(ConfidenceFilter(), 0.8),
            ending=PredictedEnd(
                FilterRule(ConfidenceFilter(), 0.8),
                frozenset({2}),
                shrinks=mode == "shrink",
                otherwise=NeverOver(),
            ),
            procedure=Procedure(block_length=6),
        )
        places = [place for step in rows[0].written for place in step.places]
        assert places[0] == 4
        assert sorted(places) == [0, 1, 2, 3, 4]  # up to the written one, not behind it
        assert rows[0].answer == (3, 2, 1, 5, 4, 2)


def test_rows_of_a_batch_end_where_they_end_alone() -> None:
    model = ending_model()
    shortened = 0
    for mode, cache in itertools.product((False, True), ("none", "prefix", "dual")):

        def parts(shrinks: bool = mode, cache: Any = cache) -> dict[str, Any]:
            judge = ConfidenceFilter()
            return {
                "rule": FilterRule(judge, 0.25),
                "ending": PredictedEnd(
                    FilterRule(judge, 0.25),
                    model.facts.eos_ids,
                    shrinks=shrinks,
                    otherwise=StopBehindEos(model.facts.eos_ids),
                ),
                "procedure": Procedure(block_length=BLOCK, cache=cache),
            }

        together = decode_rows(model, PROMPTS, DECODING, **parts())
        for prompt, row in zip(PROMPTS, together, strict=True):
            assert decode_rows(model, [prompt], DECODING, **parts()) == [row]
        whole = decode_rows(model, PROMPTS, DECODING, **{**parts(), "ending": None})
        shortened += sum(
            sum(forward.width for forward in row.forwards)
            < sum(forward.width for forward in other.forwards)
            for row, other in zip(together, whole, strict=True)
        )
    assert shortened > 6


def test_ends_are_predicted_at_the_default_settings_of_the_method() -> None:
    model = ending_model()
    found = [generate(model, prompt, DECODING, accept_threshold=0.25) for prompt in PROMPTS]
    whole = [
        generate(model, prompt, DECODING, accept_threshold=0.25, end_prediction="none")
        for prompt in PROMPTS
    ]
    positions = [
        sum(forward.width for each in texts for forward in each.trace.forwards)
        for texts in (found, whole)
    ]
    assert positions[0] < positions[1]
    free = generate(
        model, PROMPTS[0], Decoding(max_new_tokens=LENGTH, ignore_eos=True), accept_threshold=0.25
    )
    assert len(free.token_ids) == LENGTH


def test_early_stop_alone_is_a_setting() -> None:
    """No filter, ends predicted: the control that says what not decoding padding explains."""
    model, forwards = ending_model(), 0
    for prompt in PROMPTS:
        found = generate(model, prompt, DECODING, accept_threshold=1.0, end_prediction="shrink")
        assert found.trace.notes["filter_accepted"] == 0
        assert set(found.trace.accepted) == {0}
        forwards += len(found.trace.forwards)
    assert forwards < LENGTH * len(PROMPTS)


# ---- the oracle


@pytest.mark.parametrize("shifted", [False, True])
def test_the_oracle_writes_the_plain_decoders_text_in_no_more_forwards(shifted: bool) -> None:
    model = tiny_diffusion(is_shifted=shifted)
    plain = rows_of(model, OneAtATime())
    found = rows_of(model, OracleRule([row.answer for row in plain]))
    for one, other in zip(plain, found, strict=True):
        assert other.answer == one.answer
        assert len(other.forwards) <= len(one.forwards)
    assert sum(len(row.forwards) for row in found) < sum(len(row.forwards) for row in plain)


def test_the_oracle_writes_what_is_right_and_gives_a_block_up_when_nothing_is() -> None:
    finals = [3, 4, 1, 5, 0]
    start = table([(3, 0.5), (5, 0.9), (1, 0.4), (4, 0.9), (3, 0.8)])
    later = table([(3, 0.5), (4, 0.3), (1, 0.4), (4, 0.9), (3, 0.8)])  # once two are written
    model = TableModel([start, start, later])
    rule = OracleRule([finals], records := Records())
    (row,) = decode_rows(
        model,
        [[0]],
        Decoding(max_new_tokens=5),
        rule=rule,
        procedure=Procedure(block_length=5),
    )
    assert written(row) == [{0: 3, 2: 1}, {1: 4}, {3: 5, 4: 0}]
    assert rule.notes == {"deadlocks": 1}
    assert [label.tolist() for label in records.label] == [
        [True, False, True, False, False],
        [True, True, True, False, False],  # written ones are judged too
        [True, True, True, False, False],
    ]
    assert records.text == [0, 0, 0]
    torch.testing.assert_close(records.confidence[0], torch.tensor([0.5, 0.9, 0.4, 0.9, 0.8]))


def test_no_fixed_schedule_is_faster_than_the_oracle_at_its_text() -> None:
    model = tiny_diffusion()
    plain = rows_of(model, OneAtATime())
    oracle = rows_of(model, OracleRule([row.answer for row in plain]))
    for tokens in (2, 4):
        for one, fixed, least in zip(
            plain, rows_of(model, FixedNumber(tokens)), oracle, strict=True
        ):
            if fixed.answer == one.answer:
                assert len(fixed.forwards) >= len(least.forwards)


def test_the_oracle_counts_its_first_decoding_apart() -> None:
    model = tiny_diffusion()
    oracle = {"filter": "oracle", "end_prediction": "none"}
    found = generate(model, PROMPTS[0], DECODING, **oracle)
    plain = rows_of(model, OneAtATime(), PROMPTS[:1])[0]
    assert list(found.token_ids) == list(plain.answer)[: len(found.token_ids)]
    assert found.trace.draft_forwards == LENGTH
    assert len(found.trace.forwards) < LENGTH
    # What is drawn is drawn from another state the second time, and yet the text is the same.
    for seed in range(3):
        heated = Decoding(max_new_tokens=LENGTH, temperature=1.0, seed=seed)
        plainly = generate(model, PROMPTS[1], heated, accept_threshold=1.0, end_prediction="none")
        assert generate(model, PROMPTS[1], heated, **oracle).token_ids == plainly.token_ids


# ---- settings and models


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"filter": "blocks"},
            r"one of block, shared, confidence, oracle, \*\.safetensors, got",
        ),
        ({"filter": "oracle"}, "end_prediction must be 'none'"),
        ({"accept_threshold": 1.5}, "accept_threshold must lie in"),
        ({"end_prediction": "always"}, "end_prediction must be one of none, filter, shrink"),
        ({"confidence": "margin"}, "reads probabilities"),
        ({"defer_eos": True}, "reads probabilities"),
        ({"block_length": 0}, "block_length must be"),
    ],
)
def test_impossible_settings_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Learn2PD(**parameters)


def test_a_model_without_a_filter_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    model = tiny_diffusion()
    with (
        pytest.raises(
            Unsupported, match=r"no filter that was trained for 'tiny-diffusion'.*python"
        ),
        Learn2PD().apply(model, PROFILE),
    ):
        pass
    path = tmp_path / "filter.safetensors"
    save_filter(constant_filter(9.0), path, {})
    with (
        pytest.raises(Unsupported, match="trained for blocks of 8 tokens, block_length is 16"),
        Learn2PD(filter=str(path), block_length=16).apply(model, PROFILE),
    ):
        pass
    found = generate(model, PROMPTS[0], DECODING, filter=str(path), end_prediction="none")
    assert len(found.trace.forwards) == LENGTH // BLOCK
    # A shared filter serves blocks of any length.
    save_filter(new_filter("shared", BLOCK, 8, 0), path, {})
    with Learn2PD(filter=str(path), block_length=16).apply(model, PROFILE):
        pass


def test_causal_models_are_refused() -> None:
    model: Any = toy.TableModel([[1.0, 2.0], [2.0, 1.0]])
    for method in (
        Learn2PD(filter="confidence"),
        Learn2PD(filter="oracle", end_prediction="none"),
    ):
        with (
            pytest.raises(Unsupported, match="needs a masked-diffusion language model"),
            method.apply(model, PROFILE),
        ):
            pass
