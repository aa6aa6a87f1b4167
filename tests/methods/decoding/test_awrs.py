"""AWRS estimates the constraint's probability without bias and nears the true conditional."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from methods.decoding.awrs import Awrs
from methods.decoding.token_masking import TokenMasking
from models.base import Decoding, InvalidOutput
from models.constraints import ConstrainedDecoding
from models.regular import json_schema, regex
from models.stopping import Stopper
from runner.conformance import check_method, tiny_text_model
from tests.methods.decoding.languages import (
    CPU,
    LIMIT,
    PROMPT,
    LanguageModel,
    local,
    normaliser,
    request,
    target,
    texts,
    write,
)
from tests.models.tiny import tiny_model
from tests.models.toy import total_variation


@pytest.mark.parametrize(
    "method",
    [Awrs(**Awrs.trial), Awrs(**Awrs.trial, estimator="two-round", particles=1)],
    ids=["default", "two-round"],
)
def test_it_keeps_the_contract(method: Awrs) -> None:
    checks = check_method(method, tiny_text_model())
    assert [check for check in checks if not check.ok] == []


def test_without_a_constraint_it_decodes_plainly() -> None:
    checks = check_method(Awrs(), tiny_text_model())
    assert [check.name for check in checks if not check.ok] == ["it acts at these settings"]


@pytest.mark.parametrize(
    "method",
    [
        Awrs(particles=4),
        Awrs(particles=4, estimator="two-round", resampling="residual", ess_threshold=1.0),
        Awrs(particles=4, estimator="geometric", max_accepts=4, max_rejects=9),
        Awrs(particles=4, proposal_temperature=2.0, branch_nodes=3),
    ],
    ids=["default", "two-round", "geometric", "proposal"],
)
def test_the_mean_normaliser_is_the_probability_of_the_constraint(method: Awrs) -> None:
    model = LanguageModel()
    heat = 0.8
    found = []
    for seed in range(500):
        notes = write(method, model, request(seed, temperature=heat)).trace.notes
        log = notes.get("log_normaliser", -math.inf)
        assert ("log_normaliser" in notes) == (notes["living_particles"] != 0)
        found.append(math.exp(float(log)))
    error = np.std(found) / math.sqrt(len(found))
    expected = normaliser(model, heat)
    assert abs(np.mean(found) - expected) <= 4 * error
    assert error < 0.05 * expected
    assert abs(expected - normaliser(model, 1.0)) > 4 * error  # the temperature counts


def test_texts_near_the_true_conditional_with_more_particles() -> None:
    model = LanguageModel()
    exact = target(model)
    distances = []
    for method in (Awrs(particles=1), Awrs(particles=16)):
        counts: dict[tuple[int, ...], float] = {}
        for seed in range(700):
            found = write(method, model, request(seed))
            if found.trace.notes["is_satisfied"]:
                counts[found.token_ids] = counts.get(found.token_ids, 0) + 1
        total = sum(counts.values())
        assert counts.keys() <= set(texts())
        distances.append(total_variation({t: n / total for t, n in counts.items()}, exact))
    assert distances[1] < 0.08
    assert distances[0] > distances[1] + 0.05


def test_particles_that_all_die_leave_an_unsatisfied_text_and_no_estimate() -> None:
    impossible = request(constraint=regex("aaaaaaaa"))
    found = write(Awrs(), LanguageModel(), impossible)
    assert found.trace.notes["is_satisfied"] == 0
    assert found.trace.notes["living_particles"] == 0
    assert "log_normaliser" not in found.trace.notes
    assert set(found.token_ids) == {0}


def test_at_temperature_0_one_particle_takes_the_likeliest_allowed_tokens() -> None:
    model = tiny_model()
    decoding = ConstrainedDecoding(max_new_tokens=8, constraint=regex("(?:[1-7]{1,2} )*"))
    ours = write(Awrs(), model, decoding)
    masked = write(TokenMasking(), model, decoding)
    assert ours.token_ids == masked.token_ids
    assert ours.trace.forwards == masked.trace.forwards
    assert "log_normaliser" not in ours.trace.notes
    assert int(ours.trace.notes["checks"]) < int(masked.trace.notes["checks"]) / 4


def test_it_asks_far_less_often_than_masking_and_counts_every_question() -> None:
    class Counting:
        def __init__(self, inner, calls):
            self.inner, self.calls = inner, calls

        @property
        def is_complete(self):
            self.calls.append("end")
            return self.inner.is_complete

        def after(self, data):
            self.calls.append(data)
            inner = self.inner.after(data)
            return inner and Counting(inner, self.calls)

    model = tiny_model()
    calls: list[object] = []
    decoding = ConstrainedDecoding(
        max_new_tokens=10, temperature=1.0, constraint=Counting(regex("(?:[0-8]{1,2} )*"), calls)
    )
    found = write(Awrs(particles=1), model, decoding)
    assert found.trace.notes["checks"] in (len(calls), len(calls) - 1)  # the end asks once more
    per_token = float(found.trace.notes["checks_per_token"])
    assert per_token == int(found.trace.notes["checks"]) / len(found.token_ids)
    masked = write(TokenMasking(), model, decoding)
    assert float(masked.trace.notes["checks_per_token"]) > 10 * per_token


def test_the_tokens_say_the_text_and_end_where_the_loop_would_end_them() -> None:
    model = tiny_model()
    for seed in range(8):
        decoding = ConstrainedDecoding(
            max_new_tokens=9,
            temperature=1.0,
            seed=seed,
            stop=("8 ",),
            constraint=regex("(?:[1-7][0-9]? )*"),
        )
        found = write(Awrs(), model, decoding)
        assert found.trace.notes["is_satisfied"] == 1
        stopper = Stopper(model.tokenizer, decoding, model.facts.eos_ids)
        assert (len(found.token_ids), found.finish) == stopper.find(found.token_ids)
        assert found.finish in ("eos", "stop")
        assert regex("(?:[1-7][0-9]? )*").after(found.text.encode()).is_complete


def test_equal_seeds_give_equal_texts_and_others_others() -> None:
    model = LanguageModel()
    assert write(Awrs(), model, request(3)).token_ids == write(Awrs(), model, request(3)).token_ids
    assert len({write(Awrs(), model, request(seed)).token_ids for seed in range(12)}) > 2


def test_work_counts_every_forward_of_every_particle() -> None:
    model = tiny_model()
    decoding = ConstrainedDecoding(
        max_new_tokens=10, temperature=1.0, constraint=regex("(?:[0-9]{1,2} )*")
    )
    one, five = (write(Awrs(particles=n), model, decoding).trace for n in (1, 5))
    assert all(forward.width == 1 for forward in one.forwards)
    assert sum(f.width for f in five.forwards) > 2 * len(five.forwards)
    facts = model.facts
    expected = sum(facts.flops(forward, 1) for forward in five.prefill)
    expected += sum(facts.flops(forward) for forward in five.forwards)
    assert five.flops == expected
    assert len(five.accepted) == len(five.forwards)


def test_improper_weights_choose_locally() -> None:
    model = LanguageModel()
    counts: dict[tuple[int, ...], float] = {}
    for seed in range(600):
        found = write(Awrs(proper_weights=False, particles=1), model, request(seed))
        assert "log_normaliser" not in found.trace.notes
        counts[found.token_ids] = counts.get(found.token_ids, 0) + 1 / 600
    # Where a text died the tokens are those before the one that could not be had.
    assert total_variation(counts, local(model)) < 0.08
    assert total_variation(local(model), target(model)) > 0.2


def test_nan_logits_are_an_invalid_output() -> None:
    model = LanguageModel()
    model.table[:] = math.nan
    with pytest.raises(InvalidOutput, match="NaN"):
        write(Awrs(), model, request())


def test_a_request_that_exceeds_the_context_is_declined() -> None:
    from models.base import Unsupported

    model = LanguageModel()
    model.facts = replace(model.facts, max_positions=len(PROMPT) + LIMIT - 1)
    with pytest.raises(Unsupported, match="exceed the context"):
        write(Awrs(), model, request())


def test_a_pattern_stands_in_for_a_missing_constraint_only() -> None:
    model = LanguageModel()
    method = Awrs(pattern="c*")
    with method.apply(model, CPU) as changed:
        plain = Decoding(max_new_tokens=4, temperature=1.0)
        assert set(changed.generate(PROMPT, plain).token_ids) <= {2, 4}
        own = changed.generate(PROMPT, request(constraint=json_schema({"const": None})))
        assert own.trace.notes["is_satisfied"] == 0  # nothing here can spell null


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"estimator": "three"}, "estimator must be one of"),
        ({"max_accepts": 1}, "max_accepts must be a whole number from 2"),
        ({"max_rejects": 1}, "max_rejects must be 0"),
        ({"estimator": "recursive", "max_rejects": 5}, "belong to the geometric"),
        ({"estimator": "two-round", "max_accepts": 3}, "belong to the geometric"),
        ({"particles": 0}, "particles must be"),
        ({"ess_threshold": 1.5}, r"ess_threshold must lie in \[0, 1\]"),
        ({"resampling": "none"}, "resampling must be one of"),
        ({"proposal_temperature": 0.0}, "proposal_temperature must be above 0"),
        ({"least_mass": 1.0}, "least_mass must lie in"),
        ({"pattern": "("}, "regular expression"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Awrs(**settings)  # type: ignore[arg-type]  # on purpose
