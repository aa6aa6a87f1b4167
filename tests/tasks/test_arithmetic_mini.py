"""arithmetic-mini: held-out problems, each number of steps in turn, judged by the final number."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from models.embedded.tiny_dllm import data
from models.embedded.tiny_dllm.data import TOKEN_ID, encode, held_out_pairs, pair_key
from models.masked_diffusion_decode import BLOCK_LENGTH
from tasks.arithmetic_mini import ArithmeticMini, final_number
from tests.models.tiny_diffusion import tiny_diffusion

TASK = ArithmeticMini(number=40)
ITEMS = list(TASK.items())


def test_the_content_is_pinned() -> None:
    # Change `version` with it.
    assert ArithmeticMini().content_hash() == (
        "c44204cee38e2c99bf1b9da46294cd73ac45284ba1415bb815e037a07b0f2871"
    )


def test_every_prefix_holds_as_many_problems_of_each_number_of_steps() -> None:
    steps = [item.fields["steps"] for item in ITEMS]
    assert steps == [1, 2, 3, 4] * 10
    assert {item.fields["steps"] for item in ArithmeticMini(steps=3, number=9).items()} == {3}
    assert len(list(ArithmeticMini(number=7).items())) == 7


def test_the_items_of_a_shorter_run_are_the_first_of_a_longer_one_of_equal_levels() -> None:
    one, two = (list(ArithmeticMini(steps=2, number=number).items()) for number in (5, 9))
    assert [item.id for item in one] == [item.id for item in two[:5]]


def test_the_result_is_what_the_prompt_says_and_all_operands_are_held_out() -> None:
    for item in ITEMS:
        sentences = item.fields["prompt"].split(" . ")
        words = sentences[0].split()
        total = int("".join(word for word in words if word.isdigit()))
        for sentence in sentences[1:-1]:
            number = int("".join(word for word in sentence.split() if word.isdigit()))
            operation = "*" if "times as many" in sentence else "+" if "more" in sentence else "-"
            code = data.OPERATIONS.index(operation)
            assert pair_key(code, total, number) in held_out_pairs()
            total = data.apply_operation(code, total, number)
        assert total == item.fields["result"]
        assert len(sentences) - 2 == item.fields["steps"]


def test_items_differ_and_warm_up_items_are_never_measured() -> None:
    items = list(ArithmeticMini().items())
    prompts = {item.fields["prompt"] for item in items}
    assert len({item.id for item in items}) == 500
    assert len(prompts) > 490
    warmup = list(TASK.warmup_items())
    assert len(warmup) >= 4
    assert not prompts & {item.fields["prompt"] for item in warmup}
    json.dumps([dict(item.fields) for item in items])


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("2 3 + 1 8 = 4 1 ; #### 4 1", 41),
        ("#### 0", 0),
        ("#### 1 0 3", 103),
        ("#### 4 1 + 2", None),
        ("#### 4 1 #### 4 1", None),
        ("####", None),
        ("4 1", None),
        ("", None),
        ("#### 41", None),
    ],
)
def test_the_number_behind_the_marker_is_read(answer: str, number: int | None) -> None:
    assert final_number(answer) == number


def test_texts_and_ids_are_read_alike() -> None:
    words = ("####", "4", "1", "+", ";")
    for length in range(5):
        for answer in itertools.product(words, repeat=length):
            text = " ".join(answer)
            assert final_number(text) == data.final_number(encode(text)), text


def test_a_wrong_and_a_missing_number_are_wrong_for_the_whole_and_for_their_steps() -> None:
    item = ITEMS[2]
    digits = " ".join(str(item.fields["result"]))
    assert TASK.score(item, f"#### {digits}") == {"exact-match": 1.0, "exact-match-3": 1.0}
    for wrong in (f"#### {digits} 1", "", "4 1"):
        assert TASK.score(item, wrong) == {"exact-match": 0.0, "exact-match-3": 0.0}
    assert ArithmeticMini(steps=3).score(item, "") == {"exact-match": 0.0}


def test_its_metrics_are_those_of_its_scores() -> None:
    assert [metric.name for metric in TASK.metrics] == [
        "exact-match",
        *(f"exact-match-{steps}" for steps in (1, 2, 3, 4)),
    ]
    assert [metric.name for metric in ArithmeticMini(steps=2).metrics] == ["exact-match"]


def test_a_masked_diffusion_model_fills_in_so_many_masks() -> None:
    class Words:
        def encode(self, text: str) -> list[int]:
            return [3 + TOKEN_ID[word] % 20 for word in text.split()]

        def decode(self, token_ids: object) -> str:
            return re.sub(r"[^\d ]", "", str(token_ids))

    model = tiny_diffusion()
    model = type(model)(model.module, Words(), "words")  # type: ignore[arg-type]  # it does both
    task = ArithmeticMini(max_new_tokens=BLOCK_LENGTH, number=4)
    item = next(task.items())
    found = task.call(model, item, fixed_length=True)  # type: ignore[arg-type]  # it has `generate`
    assert len(found.token_ids) == len(found.trace.forwards) == BLOCK_LENGTH
    assert found.trace.forwards[0].width == len(item.fields["prompt"].split()) + BLOCK_LENGTH


@pytest.mark.parametrize("wrong", [{"steps": 5}, {"number": 0}, {"max_new_tokens": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ArithmeticMini(**wrong)
