"""The small embedding tasks: their numbers are mteb's, their data real, their intervals honest."""

from __future__ import annotations

import functools
import hashlib
import math
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.base import EncoderFacts, Encoding, InvalidOutput, Trace, Unsupported
from results.statistics import corpus_draws, corpus_metric
from tasks.mteb_bridge import score_in_mteb
from tasks.mteb_common import vectors_of, vectors_text
from tasks.mteb_data import LabelledTexts, PairList, Retrieval
from tasks.mteb_mini import (
    TOPICS,
    MiniTask,
    MtebMini,
    _docstrings,
    _gensim_lines,
    _lee,
    _polarity,
    _topics,
    _version,
    _word_pairs,
    load_mini,
)

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


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of two modules and a package."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("tasks.mteb_mini.FUNCTIONS_OF", ("one.py", "two.py"))
    monkeypatch.setattr("tasks.mteb_mini.TOPICS", ("pack", "solo.py"))
    return tmp_path


def function(name: str, documentation: str, lines: int = 4) -> str:
    body = "\n".join(f"    x{number}  = {name!r}" for number in range(lines))
    return f'def {name}(a):\n    """{documentation}"""\n{body}\n\n'


def test_functions_to_be_found_are_public_of_middle_length_and_asked_for_once(
    library: Path,
) -> None:
    good = "Return what nobody asked for."
    (library / "one.py").write_text(
        function("kept", f"{good}\n\n    More of it.\n    ")
        + function("_private", "Return what nobody may see.")
        + function("terse", "Three words only.")
        + function("tiny", "Return nothing of any length.", lines=1)
        + function("long", "Return very much of it all.", lines=60)
        + "class Box:\n"
        + '    """Hold many things at a time."""\n'
        + "async def later(a):\n"
        + '    """Return something at a later time."""\n    x = 1\n    y = 2\n    z = 3\n'
    )
    # The same question again, and the same function with another question.
    again = function("kept", "Return the same function once more.")
    (library / "two.py").write_text(
        function("other", good) + again + function("last", "Return the last of all of them.")
    )
    found = _docstrings()
    assert found.queries == (good, "Return the last of all of them.")
    assert [document.split("(")[0] for document in found.documents] == ["def kept", "def last"]
    assert found.documents[0] == "def kept(a):\n" + "\n".join(
        f"    x{number} = 'kept'" for number in range(4)
    )
    assert found.relevant == ({0: 1}, {1: 1})


def test_no_more_functions_of_a_module_are_taken_than_said_and_they_are_drawn(
    library: Path,
) -> None:
    names = [f"number{place}" for place in range(12)]
    text = "".join(function(name, f"Return what {name} has to say.") for name in names)
    for module in ("one.py", "two.py"):
        (library / module).write_text(text.replace("number", module[:3]))
    found = [document.split("(")[0].removeprefix("def ") for document in _docstrings().documents]
    assert len(found) == 6
    assert found[:3] != [f"one{place}" for place in range(3)]
    assert [name[3:] for name in found[:3]] != [name[3:] for name in found[3:]]


def documented(texts: Sequence[str]) -> str:
    return "".join(function(f"f{place}", text) for place, text in enumerate(texts))


def test_texts_of_a_topic_are_first_paragraphs_that_do_not_name_it(library: Path) -> None:
    def sentences(word: str) -> list[str]:
        return [
            f"Return the {word} of number {place} as it stood\n    before.\n\n    And more.\n    "
            for place in range(24)
        ]

    naming = [f"Return the Pack that number {place} is a part of." for place in range(24)]
    short = [f"Number {place} alone." for place in range(24)]
    (library / "pack").mkdir()
    (library / "pack" / "inner.py").write_text(documented([*naming, *sentences("colour")]))
    (library / "solo.py").write_text(documented([*short, *sentences("weight")]))
    train, test = _topics()
    words = {"pack": "colour", "solo": "weight"}
    for part in (train, test):
        assert Counter(each.label for each in part) == {"pack": 12, "solo": 12}
        # In no order of topics, so that a limit leaves some of each.
        assert len({each.label for each in part[:8]}) == 2
        for each in part:
            assert each.text.startswith(f"Return the {words[each.label]} of number ")
            assert each.text.endswith(" as it stood before.")
    assert len({each.text for each in (*train, *test)}) == 48


def test_a_text_that_two_topics_have_belongs_to_the_first(library: Path) -> None:
    shared = [f"Return what both of the places say about {place}." for place in range(24)]
    own = [f"Return what one of the places says about {place}." for place in range(24)]
    (library / "pack").mkdir()
    (library / "pack" / "inner.py").write_text(documented(shared))
    (library / "solo.py").write_text(documented([*shared, *own]))
    train, test = _topics()
    for each in (*train, *test):
        assert each.text in (shared if each.label == "pack" else own)


def test_judgements_and_reviews_are_read_as_their_files_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "wordsim353.tsv": ["# a\tremark\tfirst", "tiger\tcat\t7.35", "a\tb\t0"],
        "pang_lee_polarity.cor": [
            f"__label__{'neg' if n < 60 else 'pos'} it is {n}" for n in range(120)
        ],
        "lee.cor": ["one text ", "another text", "a third"],
        "similarities0-1.txt": ["1 0.5 0.2", "0 1 0.7", "0 0 1"],
    }
    monkeypatch.setattr("tasks.mteb_mini._gensim_lines", files.__getitem__)
    pairs = _word_pairs("wordsim353.tsv")
    assert pairs.pairs == (("tiger", "cat"), ("a", "b"))
    assert pairs.gold == (7.35, 0.0)
    reviews = _polarity()
    # The labels come in blocks, so every second one is to train on.
    assert reviews.train == tuple(f"it is {n}" for n in range(0, 120, 2))
    assert reviews.test == tuple(f"it is {n}" for n in range(1, 120, 2))
    assert reviews.train_labels == reviews.test_labels == ("neg",) * 30 + ("pos",) * 30
    news = _lee()
    assert news.texts == ("one text", "another text", "a third")
    assert news.gold[news.pairs()].tolist() == [0.5, 0.2, 0.7]


def test_news_texts_are_whole() -> None:
    lee: Any = load_mini("lee")
    assert max(len(text.split()) for text in lee.texts) > 100


def test_the_record_names_what_texts_and_scorers_come_from() -> None:
    assert set(MtebMini(task="lee").conditions()) == {"scikit-learn", "gensim"}
    found = MtebMini(task="topics").conditions()
    assert found == {"scikit-learn": sklearn.__version__, "python": platform.python_version()}


def test_what_is_not_installed_is_an_answer(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    with pytest.raises(Unsupported, match="standard library's sources are not here"):
        _docstrings()
    with pytest.raises(Unsupported, match="needs nowhere-to-be-found, which is not installed"):
        _version("nowhere-to-be-found")
    with pytest.raises(Unsupported, match="this gensim has no test data"):
        _gensim_lines("no such file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="gensim is not installed: pip install gensim"):
        _gensim_lines("lee.cor")


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
