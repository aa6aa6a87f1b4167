"""The small embedding tasks: their numbers are mteb's, their data real, their intervals honest."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.base import EncoderFacts, Encoding, InvalidOutput, Trace
from results.statistics import corpus_draws, corpus_metric
from tasks.mteb_bridge import score_in_mteb
from tasks.mteb_common import vectors_of, vectors_text
from tasks.mteb_data import LabelledTexts, PairList, Retrieval
from tasks.mteb_mini import TOPICS, MiniTask, MtebMini, load_mini

NAMES = get_args(MiniTask)
DIMENSION = 48
FACTS = EncoderFacts(
    dimension=DIMENSION,
    num_layers=0,
    max_tokens=512,
    matrix_parameters=0,
    weight_bytes=0,
    dtype="float32",
)


@functools.cache
def word_vector(word: str) -> Any:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)


def words_vector(text: str) -> Any:
    """Return the sum of a random vector for each word: crude, but it knows shared words."""
    words = [word.strip(".,:;()'\"") for word in text.lower().split()]
    return np.sum([word_vector(word) for word in words], axis=0)


class WordVectors:
    """A text encoder without weights."""

    name = "word-vectors"
    facts = FACTS

    def encode(self, texts: Sequence[str]) -> Encoding:
        return Encoding(
            vectors=np.stack([words_vector(text) for text in texts]),
            token_counts=tuple(len(text.split()) for text in texts),
            trace=Trace(),
        )

    def synchronize(self) -> None:
        """Nothing is running."""


def outputs_of(task: MtebMini, *, limit: int | None = None) -> dict[str, str]:
    items = list(task.items())[:limit]
    return {item.id: task.call(WordVectors(), item).text for item in items}


def value(task: MtebMini, outputs: dict[str, str]) -> float:
    found = task.corpus(outputs, np.arange(len(outputs))[None])
    return float(found[task.metrics[0].name][0])


@pytest.mark.parametrize("name", NAMES)
def test_the_headline_is_that_of_mtebs_evaluator(name: MiniTask) -> None:
    task = MtebMini(task=name)
    data = load_mini(name)
    vectors = {
        text: words_vector(text).astype(np.float64) for unit in data.units() for text in unit
    }
    theirs = score_in_mteb(f"Mini{name.title().replace('-', '')}", data, vectors)
    assert theirs.name == task.metrics[0].name
    assert value(task, outputs_of(task)) == pytest.approx(theirs.value, abs=1e-5)


def test_the_data_are_those_that_people_judged() -> None:
    lee: Any = load_mini("lee")
    assert len(lee.texts) == 50
    assert lee.gold.shape == (50, 50)
    assert len(lee.pairs()[0]) == 1225
    assert (lee.gold[lee.pairs()] >= 0.2).all()
    assert (lee.gold[lee.pairs()] <= 1).all()
    words, similar = load_mini("wordsim"), load_mini("simlex")
    assert isinstance(words, PairList)
    assert isinstance(similar, PairList)
    assert (len(words.pairs), len(similar.pairs)) == (353, 999)
    assert min(words.gold) >= 0
    assert max(words.gold) <= 10
    reviews = load_mini("polarity")
    assert isinstance(reviews, LabelledTexts)
    assert Counter(reviews.train_labels) == Counter(reviews.test_labels)
    assert set(reviews.test_labels) == {"neg", "pos"}
    assert not any(text.startswith("__label__") for text in reviews.test)


def test_documentation_is_balanced_and_no_text_gives_its_answer_away() -> None:
    topics = load_mini("topics")
    assert isinstance(topics, LabelledTexts)
    assert set(Counter(topics.test_labels).values()) == {12}
    assert len(set(topics.test_labels)) == len(TOPICS)
    assert not set(topics.train) & set(topics.test)
    for text, label in zip(topics.test, topics.test_labels, strict=True):
        assert label not in text.lower()
    search = load_mini("docstrings")
    assert isinstance(search, Retrieval)
    assert len(search.queries) == len(search.documents) > 40
    for query, document in zip(search.queries, search.documents, strict=True):
        assert query not in document
        assert document.startswith(("def ", "@"))


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_the_data(name: MiniTask) -> None:
    assert MtebMini(task=name).metrics == load_mini(name).metrics


@pytest.mark.parametrize("name", NAMES)
def test_every_text_of_a_task_is_in_an_item_with_what_is_known_of_it(name: MiniTask) -> None:
    task = MtebMini(task=name)
    units = load_mini(name).units()
    items = list(task.items())
    assert [text for item in items for text in item.fields["texts"]] == [
        text for unit in units for text in unit
    ]
    assert len({item.id for item in items}) == len(items) == len(units)
    assert len(list(task.warmup_items())) >= 4
    assert not {text for unit in units for text in unit} & {
        text for item in task.warmup_items() for text in item.fields["texts"]
    }


def test_a_judgement_is_part_of_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    data: Any = load_mini("wordsim")
    before = MtebMini(task="wordsim").content_hash()
    changed = PairList(pairs=data.pairs, gold=(data.gold[0] + 1, *data.gold[1:]))
    monkeypatch.setattr("tasks.mteb_mini.load_mini", lambda name: changed)
    assert MtebMini(task="wordsim").content_hash() != before


def test_items_in_batches_know_and_count_each_of_their_units() -> None:
    task = MtebMini(task="wordsim", units_per_item=3)
    gold: Any = load_mini("wordsim").gold  # type: ignore[attr-defined]  # a PairList
    first, second, *_ = task.items()
    assert [*first.fields["known"], *second.fields["known"]] == list(gold[:6])
    # In the order of the outputs, whatever that is.
    counts = task.unit_counts({second.id: "", first.id: ""}, np.array([[0, 1], [0, 0]]))
    assert counts[:, :6].tolist() == [[1] * 6, [0, 0, 0, 2, 2, 2]]
    assert not counts[:, 6:].any()


@pytest.mark.parametrize("name", ["wordsim", "lee"])
def test_units_in_batches_have_the_same_number(name: MiniTask) -> None:
    single, batched = MtebMini(task=name), MtebMini(task=name, units_per_item=7)
    found = outputs_of(batched)
    assert len(found) == math.ceil(len(load_mini(name).units()) / 7)
    assert value(batched, found) == pytest.approx(value(single, outputs_of(single)))


@pytest.mark.parametrize(("name", "limit"), [("wordsim", 40), ("lee", 12)])
def test_fewer_items_are_fewer_pairs(name: MiniTask, limit: int) -> None:
    task = MtebMini(task=name)
    outputs = outputs_of(task, limit=limit)
    assert value(task, outputs) != pytest.approx(value(task, outputs_of(task)))
    assert math.isfinite(value(task, outputs))


@pytest.mark.parametrize("name", ["polarity", "docstrings", "topic-clusters"])
def test_a_probe_without_all_that_it_is_trained_on_has_no_number(name: MiniTask) -> None:
    task = MtebMini(task=name)
    assert math.isnan(value(task, outputs_of(task, limit=20)))


@pytest.mark.parametrize("name", ["lee", "polarity", "docstrings", "topics", "topic-clusters"])
def test_an_interval_holds_the_number_and_a_control_has_none(name: MiniTask) -> None:
    task = MtebMini(task=name)
    outputs = outputs_of(task)
    generator = np.random.default_rng(0)
    names = list(outputs)
    shuffled = dict(
        zip(
            names,
            [outputs[names[place]] for place in generator.permutation(len(names))],
            strict=True,
        )
    )
    chance = {"lee": 0.0, "polarity": 0.5, "docstrings": 0.06, "topics": 0.1, "topic-clusters": 0.2}
    draws = corpus_draws(len(outputs))[:200]
    found = task.corpus(outputs, draws)[task.metrics[0].name]
    estimate = corpus_metric(found, len(outputs))
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < found[0]
    assert np.isfinite(found).all()
    control = value(task, shuffled)
    assert abs(control - chance[name]) < 0.15
    assert found[0] > control - 0.05


def test_only_what_is_judged_is_resampled() -> None:
    task = MtebMini(task="docstrings")
    outputs = outputs_of(task)
    size = len(load_mini("docstrings").documents)  # type: ignore[attr-defined]  # a Retrieval
    everything = np.arange(len(outputs))
    # Documents drawn otherwise, queries once each.
    other = np.r_[np.zeros(size, dtype=np.int64), everything[size:]]
    found = task.corpus(outputs, np.stack([everything, other]))["ndcg_at_10"]
    assert found[1] == pytest.approx(found[0])


@given(
    vectors=arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 9)),
        elements=st.floats(width=32, allow_nan=False),
    )
)
@settings(max_examples=100, deadline=None)
def test_vectors_come_back_to_the_bit(vectors: Any) -> None:
    found = vectors_of(vectors_text(vectors))
    assert found.dtype == np.float32
    assert found.tobytes() == vectors.tobytes()
    assert found.shape == vectors.shape


@pytest.mark.parametrize("broken", ["", "2x3", "2x3:AAAA", "1x1:????", "axb:AAAA"])
def test_what_is_no_vector_is_refused(broken: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # base64's and numpy's own words
        vectors_of(broken)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_vector_that_is_no_number_is_no_output(wrong: float) -> None:
    class Broken(WordVectors):
        def encode(self, texts: Sequence[str]) -> Encoding:
            found = super().encode(texts)
            found.vectors[0, 0] = wrong
            return found

    task = MtebMini(task="wordsim")
    with pytest.raises(InvalidOutput, match="NaN or infinity"):
        task.call(Broken(), next(task.items()))


@pytest.mark.parametrize("rows", [1, 3])
def test_each_text_has_one_vector(rows: int) -> None:
    class Miscounting(WordVectors):
        def encode(self, texts: Sequence[str]) -> Encoding:
            return super().encode([texts[0]] * rows)

    task = MtebMini(task="wordsim")
    with pytest.raises(InvalidOutput, match=rf"2 texts became vectors of shape \({rows}, 48\)"):
        task.call(Miscounting(), next(task.items()))


def test_a_call_says_how_many_texts_and_tokens_it_had() -> None:
    task = MtebMini(task="wordsim")
    found = task.call(WordVectors(), next(task.items()))
    assert found.trace.notes == {"texts": 2, "tokens": 2}
    assert found.token_ids == ()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="task must be one of lee, wordsim"):
        MtebMini(task="li")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="units_per_item must be at least 1"):
        MtebMini(units_per_item=0)
