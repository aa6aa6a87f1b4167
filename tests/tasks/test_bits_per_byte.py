"""The passages are text that stands together, and bits are counted over the item's own bytes."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base import TokenizedLM
from runner.certificate import output_digest
from tasks.base import Unscored
from tasks.bits_per_byte import BitsPerByte, _passages, _topics, formed
from tests.models.tokenizers_zoo import tiny_lm


def test_items_are_the_topics_in_turn_and_the_same_each_time() -> None:
    task = BitsPerByte(passages=60)
    items = list(task.items())
    assert len({item.id for item in items}) == len(items) == 60
    assert [item.id for item in BitsPerByte(passages=10).items()] == [i.id for i in items[:10]]
    first = [item.id for item in items if item.id.endswith("/0")]
    assert first == [item.id for item in items[: len(first)]]
    assert task.content_hash() == BitsPerByte(passages=60).content_hash()
    assert task.content_hash() != BitsPerByte(passages=59).content_hash()
    assert task.content_hash() != BitsPerByte(passages=60, form="lower").content_hash()


def test_warmup_passages_are_of_topics_that_are_never_measured() -> None:
    task = BitsPerByte(passages=10_000)
    warmup = list(task.warmup_items())
    assert len(warmup) >= 4
    topics = {item.id.split("/")[0] for item in task.items()}
    assert not topics & {item.id.split("/")[1] for item in warmup}
    texts = {item.fields["text"] for item in task.items()}
    assert not texts & {item.fields["text"] for item in warmup}
    assert len(texts) == len(list(task.items()))


@pytest.mark.parametrize("least", [100, 400])
def test_passages_are_whole_paragraphs_of_about_the_length_asked_for(least: int) -> None:
    for item in BitsPerByte(passages=80, passage_bytes=least).items():
        text = item.fields["text"]
        assert text.isascii()
        assert least <= len(text) <= 2 * least


def test_passages_skip_what_is_too_long_and_never_join_over_it() -> None:
    text = "\n\n".join(["a" * 60, "b" * 2000, "c" * 60, "d" * 60, "\u00e9" * 60, "e" * 120])
    assert list(_passages(text, 100, "t")) == [
        ("t/0", "c" * 60 + "\n\n" + "d" * 60),
        ("t/1", "e" * 120),
    ]


@given(text=st.text(st.characters(codec="ascii"), max_size=60))
def test_forms_are_idempotent_and_words_are_what_bert_splits(text: str) -> None:
    for form in ("plain", "lower", "words"):
        assert formed(formed(text, form), form) == formed(text, form)  # type: ignore[arg-type]
    lower = formed(text, "lower")
    assert lower == " ".join(text.lower().split())
    words = formed(text, "words").split(" ")
    assert "".join(words) == "".join(lower.split())
    assert all(len(word) == 1 or word.isalnum() for word in words if word)


def test_the_score_is_bits_over_bytes_whatever_the_tokenizer_kept() -> None:
    task = BitsPerByte(passages=2)
    item = next(task.items())
    size = len(item.fields["text"].encode())
    output = {"bits": 2.0 * size, "tokens": 10, "decoded": " " + item.fields["text"]}
    assert task.score(item, json.dumps(output)) == {
        "bits_per_byte": 2.0,
        "round_trip": 1.0,
        "bytes_per_token": size / 10,
    }
    output["decoded"] = item.fields["text"].lower()
    assert task.score(item, json.dumps(output))["round_trip"] == 0.0
    output["tokens"] = 0
    assert isinstance(task.score(item, json.dumps(output))["bits_per_byte"], Unscored)


def test_a_model_is_scored_through_its_capability() -> None:
    task, model = BitsPerByte(passages=1), tiny_lm()
    (item,) = task.items()
    result = task.call(model, item)
    scored = model.score(item.fields["text"])
    found = task.score(item, result.text)
    assert found["bits_per_byte"] == pytest.approx(scored.bits_per_byte, abs=1e-6)
    assert found["round_trip"] == 1.0
    assert isinstance(model, TokenizedLM)
    # A uniform guess over all tokens costs their logarithm each; a random model is not far off.
    guess = math.log2(model.facts.vocab_size) * len(scored.bits) / scored.num_bytes
    assert 0.5 * guess < scored.bits_per_byte < 2 * guess


def test_outputs_differ_where_the_same_tokens_cost_something_else() -> None:
    (item,) = BitsPerByte(passages=1).items()
    one, other = (BitsPerByte().call(tiny_lm(seed=seed), item) for seed in (0, 1))
    digests = [output_digest(each.token_ids, each.text) for each in (one, other)]
    assert digests[0] != digests[1]
    again = BitsPerByte().call(tiny_lm(), item)
    assert output_digest(again.token_ids, again.text) == digests[0]


def test_topics_and_passages_that_repeat_others_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def paragraph(word: str) -> str:
        return " ".join([word] * 20)

    warmup = "\n\n".join(map(paragraph, ("one", "two", "three", "four")))
    topics = {name: f"{warmup}{'.' * place}" for place, name in enumerate("abcd")}
    topics["e"] = warmup  # the same as `a`
    topics["f"] = "\n\n".join(map(paragraph, ("one", "new", "new")))
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    _topics.cache_clear()
    try:
        task = BitsPerByte(passage_bytes=50)
        measured = [(item.id, item.fields["text"]) for item in task.items()]
    finally:
        _topics.cache_clear()
    assert measured == [("f/1", paragraph("new"))]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"passages": 0}, "passages must be at least 1"),
        ({"passage_bytes": 10}, "passage_bytes must be at least 50"),
        ({"form": "upper"}, "form must be one of plain, lower, words"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BitsPerByte(**settings)  # type: ignore[arg-type]
