"""constrained-mini: its items can be solved, its constraints and its scorer agree."""

from __future__ import annotations

import json

import pytest

from hardware.profile import Profile
from methods.decoding.autoregressive import Autoregressive
from methods.decoding.awrs import Awrs
from models.constraints import ConstrainedDecoding, accepts
from runner.conformance import tiny_text_model
from tasks.constrained_mini import ConstrainedMini, constraint_of, fault_of, schema_fault

TASK = ConstrainedMini()
ITEMS = list(TASK.items())


def test_the_content_is_pinned() -> None:
    # Change `version` with it.
    assert TASK.content_hash() == (
        "9ad152aaf32cee836c5af372393fb7971683894e7dafa6b47ba133878063a38f"
    )


def test_items_are_eight_of_each_kind_in_turn_and_differ() -> None:
    kinds = [item.fields["kind"] for item in ITEMS]
    assert kinds == ["json", "regex", "python"] * 8
    assert len({item.id for item in ITEMS}) == 24
    assert len({item.fields["prompt"] for item in ITEMS}) == 24
    json.dumps([dict(item.fields) for item in ITEMS])


def test_warm_up_items_are_of_every_kind_and_never_measured() -> None:
    warmup = list(TASK.warmup_items())
    assert {item.fields["kind"] for item in warmup} == {"json", "regex", "python"}
    assert len(warmup) == 6
    assert not {i.fields["prompt"] for i in warmup} & {i.fields["prompt"] for i in ITEMS}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id.partition("/")[2])
def test_references_satisfy_constraint_and_scorer_and_damaged_ones_neither(item) -> None:
    reference = item.fields["reference"]
    assert accepts(constraint_of(item.fields), reference)
    assert TASK.score(item, reference) == {"satisfied": 1.0}
    for damaged in (reference[:-1] + "(", "", reference + "\n}"):
        assert not accepts(constraint_of(item.fields), damaged)
        scored = TASK.score_with_detail(item, damaged)
        assert scored.scores == {"satisfied": 0.0}
        assert scored.detail


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"name": "Ada", "age": 8, "city": "Oslo"}, ""),
        ({"city": "Oslo", "name": "Ada", "age": 8}, ""),  # any order satisfies the schema
        ({"name": "Ada", "age": True, "city": "Oslo"}, "value.age is no integer"),
        ({"name": "Ada", "age": 121, "city": "Oslo"}, "value.age is 121"),
        ({"name": "", "age": 8, "city": "Oslo"}, "value.name has 0 characters"),
        ({"name": "Ada", "age": 8}, "value lacks ['city'] or has [] too much"),
        ([], "value is no object"),
    ],
)
def test_the_validator_names_what_is_wrong(value, fault: str) -> None:
    assert schema_fault(ITEMS[0].fields["schema"], value) == fault


def test_the_scorer_is_not_the_constraint() -> None:
    spaced = '{ "name" : "Ada","age":8, "city":"Oslo"}'
    assert not accepts(constraint_of(ITEMS[0].fields), spaced)
    assert fault_of(ITEMS[0].fields, spaced) == ""
    formatted = "\n    return f'{x}' if (y := x) else 1"
    assert not accepts(constraint_of(ITEMS[2].fields), formatted)
    assert fault_of(ITEMS[2].fields, formatted) == ""


class Recorder:
    """A model that hands out the request."""

    class tokenizer:  # noqa: N801  # stands for an attribute
        @staticmethod
        def encode(text: str) -> list[int]:
            return [len(text)]

    def generate(self, prompt_ids, decoding):
        return prompt_ids, decoding


def test_a_call_hands_over_prompt_constraint_and_a_seed_of_its_own() -> None:
    seeds = set()
    for item in ITEMS:
        prompt, decoding = TASK.call(Recorder(), item)
        assert prompt == [len(item.fields["prompt"])]
        assert isinstance(decoding, ConstrainedDecoding)
        assert (decoding.temperature, decoding.max_new_tokens) == (1.0, 48)
        assert decoding.stop == tuple(item.fields["stop"])
        assert accepts(decoding.constraint, item.fields["reference"])
        assert not decoding.ignore_eos
        seeds.add(decoding.seed)
    assert len(seeds) == 24
    _, other = ConstrainedMini(seed=1).call(Recorder(), ITEMS[0])
    assert other.seed not in seeds
    _, fixed = TASK.call(Recorder(), ITEMS[0], fixed_length=True)
    assert fixed.ignore_eos


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1.0}])
def test_settings_out_of_range_are_refused(settings) -> None:
    with pytest.raises(ValueError, match="must be"):
        ConstrainedMini(**settings)


def test_plain_and_constrained_methods_run_on_the_same_request() -> None:
    model = tiny_text_model()
    profile = Profile(name="test", kind="cpu", label="test")
    decoding = TASK.call(Recorder(), ITEMS[1])[1]
    for method in (Autoregressive(), Awrs()):
        with method.apply(model, profile) as changed:
            found = changed.generate([3, 4], decoding)
        assert TASK.score(ITEMS[1], found.text)["satisfied"] == 0.0
        assert ("checks" in found.trace.notes) == isinstance(method, Awrs)
