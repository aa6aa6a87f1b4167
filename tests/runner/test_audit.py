"""Token counts and ends, weights and processes: the audit's parts on inputs made by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from models.base import Decoding, Forward, Generation, Trace
from models.constraints import ConstrainedDecoding
from models.regular import regex
from models.text import CausalLM
from runner.audit import Again, _remembers, chosen, miscount, overcount, shuffled
from runner.guards import Damage, Ledger, ProcessGuard, WeightGuard
from tests.models.tiny import tiny_module


class Letters:
    """A tokenizer whose token n is the n-th letter, and whose token 0 ends a text."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(96 + token) for token in token_ids if token)


MODEL = SimpleNamespace(tokenizer=Letters(), facts=SimpleNamespace(eos_ids=frozenset({0})))


def said(ids: list[int], text: str, **decoding: object) -> str:
    generation = Generation(tuple(ids), text, "", Trace())
    wanted = Decoding(**{"max_new_tokens": 5, **decoding})  # type: ignore[arg-type]  # fields
    return miscount(generation, wanted, MODEL)  # type: ignore[arg-type]  # what it looks at


@pytest.mark.parametrize(
    ("ids", "text", "decoding"),
    [
        ([1, 2, 3, 4, 5], "abcde", {}),
        ([1, 2, 0], "ab", {}),
        ([1, 2, 3], "a", {"stop": ("bc",)}),
        ([1, 0, 2, 0, 3], "abc", {"ignore_eos": True}),
    ],
)
def test_honest_texts_have_no_complaint(ids, text, decoding) -> None:
    assert said(ids, text, **decoding) == ""


def test_a_text_that_died_under_a_constraint_says_so_and_is_no_miscount() -> None:
    decoding = ConstrainedDecoding(max_new_tokens=5, constraint=regex("abz"))
    died = Generation((1, 2), "ab", "", Trace())
    assert miscount(died, decoding, MODEL) == ""  # type: ignore[arg-type]  # as above
    pretends = Generation((1, 2), "ab", "length", Trace())
    assert "ends after 2 of 5" in miscount(pretends, decoding, MODEL)  # type: ignore[arg-type]
    assert "ends after 2 of 5" in miscount(died, Decoding(max_new_tokens=5), MODEL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "text", "decoding", "message"),
    [
        ([1, 2, 3, 4, 5, 6], "abcdef", {}, "6 tokens are reported, but the text ended after 5"),
        ([1, 0, 2], "a", {}, "3 tokens are reported, but the text ended after 2"),
        ([1, 2, 3, 4], "a", {"stop": ("bc",)}, "4 tokens are reported, but the text ended after 3"),
        ([1, 2], "ab", {}, "ends after 2 of 5 tokens without"),
        ([], "", {}, "ends after 0 of 5 tokens without"),
        ([1, 2, 0], "abc", {}, "the text is not what its 3 tokens say"),
        ([1, 2, 3], "abc", {"stop": ("bc",)}, "the text is not what its 3 tokens say"),
    ],
)
def test_wrong_counts_and_ends_are_named(ids, text, decoding, message) -> None:
    assert message in said(ids, text, **decoding)


def traced(tokens: int, accepted: list[int], widths: list[int]) -> Generation:
    forwards = [Forward(width, 10) for width in widths]
    return Generation(
        tuple(range(tokens)), "", "length", Trace(forwards=forwards, accepted=accepted)
    )


def test_a_forward_emits_its_drafts_and_one_token() -> None:
    assert overcount(traced(6, [2, 1], [4, 4])) == ""
    assert overcount(traced(5, [2, 1], [4, 4])) == ""  # the last one ran past the end
    assert "could emit only 6" in overcount(traced(7, [2, 1], [4, 4]))
    assert "2 accepted of 2 fed" in overcount(traced(4, [2], [2]))
    assert overcount(traced(9, [], [4, 4])) == ""  # it does not tell what was accepted


def test_the_audited_order_and_sample_depend_on_the_seed_alone() -> None:
    items = list(range(30))
    assert shuffled(items, 1) == shuffled(items, 1) != shuffled(items, 2)
    assert sorted(shuffled(items, 1)) == items
    assert chosen(items, 1) == chosen(items, 1)
    assert len(set(chosen(items, 1))) == 8
    assert sorted(chosen([1, 2], 0)) == [1, 2]


@pytest.mark.parametrize(
    ("shares", "is_ok"),
    [
        ([0.1] * 8, False),  # remembered
        ([0.1] * 7 + [0.9], False),  # and one accident of the clock
        ([0.1] * 6 + [0.9] * 2, True),
        ([0.6] * 8, True),
        ([0.1, 0.1, 0.9], True),  # too few for an accident
        ([], True),
    ],
)
def test_a_prompt_is_remembered_if_nearly_all_are_quick(shares: list[float], is_ok: bool) -> None:
    first = {
        str(number): SimpleNamespace(output_digest="d", target_forwards=3, seconds=2.0)
        for number in range(len(shares))
    }

    def again(factor: float) -> list[Again]:
        return [
            Again(str(number), (), "d", 3, factor * share * 2.0)
            for number, share in enumerate(shares)
        ]

    slower = [each._replace(seconds=3.0) for each in again(1.0)]  # the machine, for the baseline
    verdict = _remembers(again(1.5), slower, first, first)  # type: ignore[arg-type]  # what it reads
    assert verdict.is_ok is is_ok


@pytest.fixture
def model() -> CausalLM:
    module = copy.deepcopy(tiny_module("llama"))  # these tests change its weights
    return CausalLM(module, Letters(), "tiny", kernels="transformers")


def test_weights_that_stay_are_no_damage(model: CausalLM) -> None:
    guard = WeightGuard(model)
    weight = next(model.module.parameters())
    before = weight.data.clone()
    weight.data.zero_()
    weight.data.copy_(before)  # a method may change them and put them back
    guard.check()
    guard.check_all()
    WeightGuard(object()).check()  # nothing to guard


def test_changed_weights_are_named(model: CausalLM) -> None:
    guard = WeightGuard(model)
    model.module.model.norm.weight.data[0] += 1e-3
    with pytest.raises(Damage, match=r"changed: model\.norm\.weight$"):
        guard.check()


def test_one_changed_number_is_found_at_the_end(model: CausalLM) -> None:
    guard = WeightGuard(model)
    # Between the numbers that are probed.
    down = model.module.model.layers[0].mlp.down_proj.weight
    down.data[1, 1] = torch.nextafter(down.data[1, 1], torch.tensor(1.0))
    with pytest.raises(Damage, match="down_proj"):
        guard.check_all()


def test_a_replaced_or_added_weight_is_damage(model: CausalLM) -> None:
    guard = WeightGuard(model)
    model.module.register_buffer("extra", torch.ones(3))
    with pytest.raises(Damage, match="extra"):
        guard.check()


def test_a_process_that_was_left_is_named_and_ended() -> None:
    guard = ProcessGuard()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(Damage, match="left 1 processes running"):
            guard.check()
        assert process.wait(timeout=10) == -9
    finally:
        process.kill()
        process.wait()
    guard.check()


def test_memory_that_stays_is_a_leak_and_what_the_first_samples_take_is_not(monkeypatch) -> None:
    held = [0]
    monkeypatch.setattr("runner.guards.held_bytes", lambda: held[0])
    ledger = Ledger()

    def sample(growth: int) -> None:
        before = held[0]
        held[0] += growth
        ledger.check_memory(before, 2**30)

    for growth in (2**31, 2**31, 2**28, -(2**28), 2**28):
        sample(growth)
    with pytest.raises(Damage, match="leaks memory") as caught:
        sample(2**29)
    assert caught.value.status == "oom-host"


def test_time_in_apply_is_judged_by_the_usual_sample() -> None:
    assert (
        Ledger(apply_seconds=[9.0, 0.1, 0.1], measured_seconds=[1.0, 1.0, 1.0]).hidden_time() == ""
    )
    assert Ledger(apply_seconds=[0.01] * 3, measured_seconds=[0.001] * 3).hidden_time() == ""
    hidden = Ledger(apply_seconds=[0.4] * 3, measured_seconds=[1.0] * 3).hidden_time()
    assert "spends 0.400 s of each sample in apply" in hidden
    assert Ledger().hidden_time() == ""
