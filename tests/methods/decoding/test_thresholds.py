"""The entropy threshold: what is learned from data whose truth is known, and what is on file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from methods.decoding import common_thresholds
from methods.decoding.common_thresholds import (
    THRESHOLDS,
    Observation,
    entropy,
    fallback_threshold,
    fit_logistic,
    functions_of,
    learn_threshold,
    learned_threshold,
    observe,
    observe_solutions,
    solutions,
)
from tests.models.tiny import tiny_model
from tests.models.toy import TableModel, random_table


def synthetic(count: int, slope: float = -3.0, intercept: float = 2.0) -> Observation:
    random = np.random.default_rng(1)
    entropies = random.exponential(0.4, count)
    probability = 1 / (1 + np.exp(-(slope * entropies + intercept)))
    return Observation(entropies, random.random(count) < probability)


def test_entropy_is_in_nats_over_the_whole_vocabulary() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 50)) * 3)
    expected = stats.entropy(torch.softmax(logits, -1).numpy(), axis=1)
    np.testing.assert_allclose(entropy(logits).numpy(), expected)
    assert float(entropy(torch.zeros(64))) == pytest.approx(math.log(64))
    certain = torch.full((8,), -math.inf)
    certain[3] = 0
    assert float(entropy(certain)) == 0


def test_the_regression_finds_what_the_data_were_drawn_from() -> None:
    observed = synthetic(100_000)
    slope, intercept = fit_logistic(observed.entropies, observed.is_first)
    assert slope == pytest.approx(-3, abs=0.1)
    assert intercept == pytest.approx(2, abs=0.05)


def test_the_threshold_is_where_right_and_wrong_are_equally_likely() -> None:
    observed = synthetic(400_000)
    found = learn_threshold(observed)
    # The most accurate cut is where P(first | H) is a half, in the natural mix of classes.
    assert found.tau == pytest.approx((0 - 2) / -3, abs=0.05)
    # Balancing the classes shifts the intercept by the log-odds of the mix, and the cut with it.
    share = float(observed.is_first.mean())
    assert 0.6 < share < 0.75
    shift = math.log(share / (1 - share))
    assert found.slope == pytest.approx(-3, abs=0.1)
    assert found.intercept == pytest.approx(2 - shift, abs=0.05)
    assert math.log(found.cut / (1 - found.cut)) == pytest.approx(-shift, abs=0.1)
    assert found.tau == (math.log(found.cut / (1 - found.cut)) - found.intercept) / found.slope
    assert found.num_tokens == 400_000
    assert found.share_first == pytest.approx(share, abs=0.01)
    best = np.mean((observed.entropies <= 2 / 3) == observed.is_first)
    assert found.accuracy == pytest.approx(best, abs=0.01)


def test_what_cannot_be_learned_is_said() -> None:
    with pytest.raises(ValueError, match="a higher entropy should mean more errors, but the slope"):
        learn_threshold(synthetic(5000, slope=1.5, intercept=-1.0))
    entropies = np.linspace(0, 4, 100)
    with pytest.raises(ValueError, match="needs tokens of both kinds"):
        learn_threshold(Observation(entropies, np.ones(100, dtype=np.bool_)))
    with pytest.raises(ValueError, match="the classes do not overlap"):
        learn_threshold(Observation(entropies, entropies < 2))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_teacher_forcing_sees_each_token_of_the_body_after_its_own_prefix(
    architecture: str,
) -> None:
    model = tiny_model(architecture)
    prompt, body = [5, 17, 3], [88, 41, 2, 9]
    observed = observe(model, prompt, body)
    for at, token in enumerate(body):
        with torch.inference_mode():
            logits = model.module(torch.tensor([[*prompt, *body[:at]]])).logits[0, -1]
        assert observed.entropies[at] == pytest.approx(float(entropy(logits)), abs=1e-4)
        assert observed.is_first[at] == (int(logits.argmax()) == token)
    plain = [int(model.module(torch.tensor([prompt])).logits[0, -1].argmax())]
    assert observe(model, prompt, plain).is_first.tolist() == [True]


def test_all_solutions_that_fit_are_observed_and_hashed() -> None:
    model = TableModel(random_table(26))

    class Short(type(model.tokenizer)):
        def encode(self, text: str) -> list[int]:
            return [ord(letter) % 26 for letter in text]

    model.tokenizer = Short()
    chosen = [
        common_thresholds.Solution("abc", "de"),
        common_thresholds.Solution("abc", "d" * 50),
        common_thresholds.Solution("b", "fgh"),
    ]
    observed, digest = observe_solutions(model, chosen, most_tokens=20)
    assert len(observed.entropies) == len(observed.is_first) == 5
    assert digest != observe_solutions(model, chosen[:1], most_tokens=20)[1]


def test_functions_are_cut_after_their_docstring() -> None:
    source = '''
import os

def short(x):
    """Too short."""
    return x


def good(x: int,
         y: int = 2) -> int:
    """Add.

    More.
    """
    total = x + y

    return total  # the end


def undocumented(x):
    y = x
    return y


class Kept:
    def method(self):
        """Not at the top."""
        x = 1
        return x
'''
    found = list(functions_of(source))
    assert [each.prompt for each in found] == [
        'def good(x: int,\n         y: int = 2) -> int:\n    """Add.\n\n    More.\n    """'
    ]
    assert found[0].body == "\n    total = x + y\n\n    return total  # the end\n"
    assert list(functions_of("def f(:")) == []


def test_the_standard_library_has_solutions_enough() -> None:
    assert len(solutions()) > common_thresholds.NUM_FUNCTIONS


def test_what_is_on_file_is_consistent() -> None:
    entries = json.loads(THRESHOLDS.read_text(encoding="utf-8"))
    published = [entry["tau"] for entry in entries.values() if entry["source"] == "published"]
    assert sorted(published) == [0.615, 0.706, 0.713, 0.985, 1.1, 1.134, 1.321]
    assert fallback_threshold() == 0.985
    assert learned_threshold("nobody") is None
    learned = entries["smollm2-135m"]
    assert learned_threshold("smollm2-135m") == learned["tau"]
    cut = math.log(learned["cut"] / (1 - learned["cut"]))
    assert learned["tau"] == pytest.approx(
        (cut - learned["intercept"]) / learned["slope"], abs=1e-3
    )
    assert learned["slope"] < 0
    assert learned["num_tokens"] > 5000
