"""sums-mini: sums are right and asked for once, and what is written is read line by line."""

from __future__ import annotations

import json
import math

import pytest

from models.base import Decoding
from tasks.base import Unscored
from tasks.sums_mini import SumsMini
from tests.models.tokenizers_zoo import tiny_lm

TASK = SumsMini(number=30)


def test_the_content_is_pinned() -> None:
    # Change `version` with it.
    assert SumsMini().content_hash() == (
        "66fd6a3d39aefc264957e9869184ce42ddb27a0c75b1e776950beacb12117236"
    )


@pytest.mark.parametrize(("digits", "shots"), [(1, 4), (1, 99), (2, 4), (3, 0)])
def test_every_line_is_right_and_none_gives_the_last_ones_answer(digits: int, shots: int) -> None:
    for item in SumsMini(digits=digits, shots=shots, number=20).items():
        lines = f"{item.fields['prompt']} {item.fields['answer']}".split("\n")
        assert len(lines) == len({line.split(" = ")[0] for line in lines}) == shots + 1
        for line in lines:
            left, right = line.split(" = ")
            terms = left.split(" + ")
            assert sum(map(int, terms)) == int(right)
            assert {len(term) for term in terms} == {digits}


def test_items_differ_and_warm_up_items_are_never_measured() -> None:
    prompts = [item.fields["prompt"] for item in TASK.items()]
    assert len(set(prompts)) == 30
    assert prompts[:5] == [item.fields["prompt"] for item in SumsMini(number=5).items()]
    warmup = [item.fields["prompt"] for item in TASK.warmup_items()]
    assert len(warmup) >= 4
    assert not set(warmup) & set(prompts)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" {}\n12 + 3", 1.0), ("{}", 1.0), ("\n {} \nno", 1.0),
        (" {}0", 0.0), (" 1{}", 0.0), ("", 0.0), (" \n", 0.0), (" = {}", 0.0),
    ],
)  # fmt: skip
def test_the_first_line_that_is_written_must_be_the_sum(written: str, right: float) -> None:
    item = next(TASK.items())
    output = json.dumps({"answer": written.format(item.fields["answer"]), "bits": 3.5})
    assert TASK.score(item, output) == {"exact_match": right, "answer_bits": 3.5}


def test_an_answer_without_finite_cost_is_no_number() -> None:
    item = next(TASK.items())
    output = json.dumps({"answer": "1", "bits": math.inf})
    assert isinstance(TASK.score(item, output)["answer_bits"], Unscored)


def test_the_model_is_asked_for_a_line_and_for_the_cost_of_the_right_one() -> None:
    model = tiny_lm()
    item = next(TASK.items())
    found = TASK.call(model, item, fixed_length=True)
    prompt, answer = item.fields["prompt"], item.fields["answer"]
    expected = model.generate(prompt, Decoding(max_new_tokens=6, ignore_eos=True))
    output = json.loads(found.text)
    assert output["answer"] == expected.text
    assert found.token_ids == expected.token_ids
    assert len(found.token_ids) == 6
    # Bytes of this tokenizer never join over the border: the last tokens' bits.
    whole = model.score(f"{prompt} {answer}\n")
    behind = len(whole.bits) - len(model.tokenizer.encode(prompt))
    assert output["bits"] == pytest.approx(sum(whole.bits[-behind:]), abs=1e-4)
    assert output["bits"] > 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"digits": 0}, r"digits must lie in \[1, 3\], got 0"),
        ({"digits": 4}, r"digits must lie in \[1, 3\], got 4"),
        ({"shots": -1}, r"shots must lie in \[0, 99\], got -1"),
        # More different additions of one digit there are not.
        ({"digits": 1, "shots": 100}, r"shots must lie in \[0, 99\], got 100"),
        ({"number": 0}, "number must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SumsMini(**settings)
