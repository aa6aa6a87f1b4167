"""recall-mini: each item can be answered from its text, and only from there."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from models.embedded.tiny_lm_retrieval.data import BEGIN, decode, encode
from runner.conformance import tiny_text_model
from tasks.recall_mini import RecallMini

TASK = RecallMini(length=256, number=12)
ITEMS = list(TASK.items())


def lookup(prompt: str) -> list[str]:
    """Return what follows the last word of a prompt where it stood before."""
    words = prompt.split()
    first = words.index(words[-1])
    return words[first + 1 : first + 3]


def test_the_content_is_pinned() -> None:
    # Change `version` with it.
    assert RecallMini().content_hash() == (
        "a7e02e727c2908a7e25e273ae3e4871b9d72a7c180533da20efd1e5217f18c77"
    )


@pytest.mark.parametrize("facts", [1, 16, 60])
@pytest.mark.parametrize("length", [256, 1024])
def test_the_answer_stands_once_in_the_text_behind_the_key(length: int, facts: int) -> None:
    for item in RecallMini(length=length, facts=facts, number=5).items():
        words = item.fields["prompt"].split()
        assert len(words) == length  # `<s>` and the question make up for each other
        assert words.count(words[-1]) == 2
        assert words[item.fields["place"] - 1] == words[-1]
        assert lookup(item.fields["prompt"]) == item.fields["values"]
        assert TASK.score(item, " ".join(item.fields["values"])) == {"recall": 1.0}


def test_places_are_spread_over_the_text() -> None:
    places = [item.fields["place"] for item in RecallMini(length=1000, facts=1, number=200).items()]
    thirds = [sum(low <= place < low + 333 for place in places) for low in (1, 334, 667)]
    assert min(thirds) > 45


@pytest.mark.parametrize("output", ["", "kimi", "tulo kimi", "kimi tulo more"])
def test_anything_but_both_values_in_order_is_wrong(output: str) -> None:
    item = ITEMS[0]
    values = dict(zip(("kimi", "tulo"), item.fields["values"], strict=True))
    said = " ".join(values.get(word, word) for word in output.split())
    assert TASK.score(item, said) == {"recall": 0.0}


def test_items_differ_and_warm_up_items_are_never_measured() -> None:
    prompts = {item.fields["prompt"] for item in ITEMS}
    assert len(prompts) == len({item.id for item in ITEMS}) == 12
    warmup = list(TASK.warmup_items())
    assert len(warmup) >= 4
    assert not prompts & {item.fields["prompt"] for item in warmup}
    json.dumps([dict(item.fields) for item in ITEMS])


def test_a_model_is_asked_for_two_tokens_after_the_prompt() -> None:
    class Words:
        def encode(self, text: str) -> list[int]:
            return [word % 40 for word in (BEGIN, *encode(text))]

        def decode(self, token_ids: Sequence[int]) -> str:
            return decode(list(token_ids))

    model = tiny_text_model()
    model.tokenizer = Words()
    item = next(RecallMini(length=32, facts=2).items())
    found = TASK.call(model, item, fixed_length=True)
    assert len(found.token_ids) == 2
    assert found.trace.prefill[0].width == 33


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="number must be at least 1"):
        RecallMini(number=0)
    with pytest.raises(ValueError, match="length must be at least that, got 40"):
        RecallMini(length=40)
    with pytest.raises(ValueError, match=r"facts must lie in \[1, 128\], got 0"):
        RecallMini(facts=0)
