"""genlm-control's AWRS: our side of the conversation, and both samplers on one small vocabulary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods.decoding import common_genlm, genlm_awrs
from methods.decoding.awrs import Awrs
from methods.decoding.common_genlm import GENLM, Genlm
from methods.decoding.genlm_awrs import GenlmAwrs
from models import peers
from models.base import Generation, InvalidOutput, Unsupported
from models.regular import regex
from runner.conformance import check_method, tiny_text_model
from tests.methods.decoding.languages import (
    EOS,
    LIMIT,
    LanguageModel,
    normaliser,
    request,
    target,
    texts,
    write,
)
from tests.models.toy import total_variation

A, B, C, D = range(4)


@pytest.fixture
def absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the environment away, if it is there."""
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    common_genlm.genlm.cache_clear()
    yield
    common_genlm.genlm.cache_clear()


def test_without_its_environment_only_constrained_texts_are_refused(absent: None) -> None:
    assert [check for check in check_method(GenlmAwrs(), tiny_text_model()) if not check.ok] == []
    with pytest.raises(Unsupported, match=r"python -m methods\.decoding\.common_genlm"):
        write(GenlmAwrs(), LanguageModel(), request())


def test_greedy_texts_are_refused() -> None:
    with pytest.raises(Unsupported, match="at temperature 0"):
        write(GenlmAwrs(), LanguageModel(), request(temperature=0.0))


# --- our side, with a script in the place of the program ------------------------------------------


class Script:
    """A program that asks what it is told to ask, and keeps the answers."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.versions = {"genlm-control": "0", "python": "3"}
        self.messages = list(messages)
        self.received: list[dict[str, Any]] = []
        self.rows: list[np.ndarray] = []
        self.is_closed = False

    def receive(self) -> dict[str, Any]:
        return self.messages.pop(0)

    def send(self, message: dict[str, Any], *data: bytes) -> None:
        self.received.append(message)
        self.rows += [np.frombuffer(each, dtype=np.float32) for each in data]

    def close(self) -> None:
        self.is_closed = True

    @property
    def answers(self) -> list[list[int]]:
        return [message["answers"] for message in self.received if "answers" in message]


def ask(what: str, *asked: tuple[int, ...]) -> dict[str, Any]:
    return {"ask": what, "texts": [list(text) for text in asked]}


def done(*found: tuple[int, ...], weights: list[float | None]) -> dict[str, Any]:
    return {"texts": [list(text) for text in found], "log_weights": weights}


def play(
    script: Script, monkeypatch: pytest.MonkeyPatch, model: LanguageModel | None = None, **how: Any
) -> Generation:
    """Write a text with a script in the place of the program."""
    peer = Genlm.__new__(Genlm)
    peer._process, peer._vocabulary = script, None  # type: ignore[assignment]  # it acts as one
    monkeypatch.setattr(genlm_awrs, "genlm", lambda who: peer)
    return write(GenlmAwrs(particles=2), model or LanguageModel(), request(**how))


def test_the_program_gets_the_logits_of_each_text_behind_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LanguageModel()
    script = Script(
        ask("logits", ()),
        ask("prefix", (), (A,), (C,)),
        ask("logits", (A,), (C,)),
        done((A,), (C, A), weights=[None, None]),
    )
    found = play(script, monkeypatch, model)
    expected = [model.logits_after([0, 1]), model.logits_after([A]), model.logits_after([C])]
    rows = np.concatenate(script.rows).reshape(3, 5)
    np.testing.assert_allclose(rows, np.stack([each.numpy() for each in expected]))
    assert script.received[0]["pieces"] == [letter.encode().hex() for letter in "abcde"]
    assert script.received[0]["ends"] == (EOS,)
    assert [forward.width for forward in found.trace.forwards] == [3]


def test_every_question_about_a_token_is_a_check_and_the_empty_text_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script(
        ask("logits", ()),
        ask("prefix", (), ()),
        ask("prefix", (D,), (A,)),
        ask("prefix", (D,)),
        ask("prefix", (D, C)),
        ask("complete", (D,)),
        ask("complete", (A,)),
        ask("complete", ()),
        done((D,), (A,), weights=[0.0, None]),
    )
    found = play(script, monkeypatch)
    # d*: d may follow and end; a*b: a may follow and not end.
    assert script.answers == [[1, 1], [1, 1], [1], [0], [1], [0], [1]]
    assert found.trace.notes["checks"] == 7
    assert found.token_ids == (D, EOS)


def test_a_text_that_a_stop_string_ends_is_over_and_gets_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script(
        ask("logits", ()),
        ask("prefix", (D,)),
        ask("prefix", (D, A)),
        done((D, A), (D, A), weights=[-1.0, -1.0]),
    )
    found = play(script, monkeypatch, stop=("a",), constraint=regex("d*"))
    assert script.answers == [[1], [2]]
    assert (found.token_ids, found.text, found.finish) == ((D, A), "d", "stop")
    assert found.trace.notes["is_satisfied"] == 1


def test_where_all_die_the_text_stands_before_what_was_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script(
        ask("logits", ()),
        ask("prefix", (C,)),
        ask("prefix", (C, D)),
        done((C, D), (C, D), weights=[None, None]),
    )
    found = play(script, monkeypatch)
    assert found.token_ids == (C,)
    assert found.trace.notes["is_satisfied"] == found.trace.notes["living_particles"] == 0
    assert "log_normaliser" not in found.trace.notes


def test_the_estimate_is_the_mean_weight_and_rows_name_the_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = [math.log(0.3), math.log(0.1)]
    script = Script(
        ask("logits", ()), ask("prefix", (D,)), done((D,), (), weights=[weights[0], weights[1]])
    )
    found = play(script, monkeypatch)
    assert found.trace.notes["log_normaliser"] == pytest.approx(math.log(0.2))
    assert found.trace.notes["peer"] == "genlm-control 0, python 3"
    sent = script.received[1]
    assert (sent["max_tokens"], sent["temperature"], sent["closes"]) == (LIMIT, 1.0, True)
    assert sent["particles"] == 2


def test_nan_logits_are_an_invalid_output_and_the_next_text_gets_another_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, script = LanguageModel(), Script(ask("logits", ()))
    started: list[str] = []
    monkeypatch.setattr(common_genlm, "Genlm", lambda who: started.append(who))
    common_genlm.genlm.cache_clear()
    common_genlm.genlm("one")
    model.table[:] = math.nan
    with pytest.raises(InvalidOutput, match="NaN"):
        play(script, monkeypatch, model)
    assert script.is_closed
    common_genlm.genlm("one")
    assert started == ["one", "one"]
    common_genlm.genlm.cache_clear()


# --- the library itself, where its environment is there -------------------------------------------

needs_environment = pytest.mark.skipif(
    bool(GENLM.missing()), reason=f"the peer's environment {GENLM.missing()}: {GENLM.command}"
)


@pytest.mark.slow
@needs_environment
def test_texts_of_a_fixed_length_have_it_and_repeat_with_their_seed() -> None:
    model = LanguageModel()
    for seed in range(8):
        found = write(GenlmAwrs(), model, request(seed, constraint=regex("[ab]*"), ignore_eos=True))
        assert (len(found.token_ids), found.finish) == (LIMIT, "length")
        assert set(found.token_ids) <= {A, B}
        again = write(GenlmAwrs(), model, request(seed, constraint=regex("[ab]*"), ignore_eos=True))
        assert again.token_ids == found.token_ids


@pytest.mark.slow
@needs_environment
@pytest.mark.timeout(600)
def test_both_samplers_agree_on_normaliser_checks_and_distribution() -> None:
    model, heat, runs = LanguageModel(), 0.8, 300
    estimates, checks, distances = [], [], []
    for method in (Awrs(particles=16), GenlmAwrs(particles=16)):
        weights, asked, counts = [], [], Counter[tuple[int, ...]]()
        for seed in range(runs):
            found = write(method, model, request(seed, temperature=heat))
            notes = found.trace.notes
            weights.append(math.exp(float(notes.get("log_normaliser", -math.inf))))
            asked.append(int(notes["checks"]))
            if notes["is_satisfied"]:
                counts[found.token_ids] += 1
        assert counts.keys() <= set(texts())
        estimates.append((np.mean(weights), np.std(weights) / math.sqrt(runs)))
        checks.append((np.mean(asked), np.std(asked) / math.sqrt(runs)))
        shares = {text: count / counts.total() for text, count in counts.items()}
        distances.append(total_variation(shares, target(model, heat)))
    for mean, error in estimates:
        assert abs(mean - normaliser(model, heat)) <= 4 * error
    assert abs(checks[0][0] - checks[1][0]) <= 4 * math.hypot(checks[0][1], checks[1][1])
    assert max(distances) < 0.12
