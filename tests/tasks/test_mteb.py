"""Tasks of mteb through our encoder: its number, our intervals, and nothing touched on the way.

No data set can be downloaded here, so `get_task` hands out tasks that are built in code.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.base import Unsupported
from tasks import mteb_bridge
from tasks.mteb import Mteb
from tasks.mteb_bridge import load_mteb, mteb_task, score_in_mteb
from tasks.mteb_common import vectors_text
from tasks.mteb_data import (
    EmbeddingData,
    LabelledClusters,
    LabelledTexts,
    PairList,
    PlainTexts,
    Retrieval,
)
from tasks.mteb_mini import labelled
from tasks.mteb_scorers import (
    CLUSTERINGS,
    EXPERIMENTS,
    KMEANS_BATCH,
    PROBE_STEPS,
    SHOTS,
    clustering_bags,
)
from tests.tasks.mteb_texts import texts, vector

Install = Callable[[Callable[[], Any]], None]


def pair_list() -> PairList:
    first, second = texts(30, 1), texts(30, 2)
    gold = [float(len(set(a.split()) & set(b.split()))) for a, b in zip(first, second, strict=True)]
    return PairList(pairs=tuple(zip(first, second, strict=True)), gold=tuple(gold))


def labels_of(found: list[str]) -> list[str]:
    return ["abc"[ord(text[0]) % 3] for text in found]


def labelled_texts() -> LabelledTexts:
    train, test = texts(120, 3), texts(40, 4)
    return labelled(train, labels_of(train), test, labels_of(test))


def clusters() -> LabelledClusters:
    documents = texts(50, 5)
    return LabelledClusters(
        texts=tuple(documents),
        labels=tuple(labels_of(documents)),
        bags=clustering_bags(50, 50, random.Random(42)),
    )


def retrieval() -> Retrieval:
    documents, queries = texts(40, 6), texts(15, 7)
    relevant = tuple({place: 1, place + 20: 2} for place in range(15))
    return Retrieval(documents=tuple(documents), queries=tuple(queries), relevant=relevant)


FORMS: dict[str, Callable[[], EmbeddingData]] = {
    "Pairs": pair_list,
    "Labels": labelled_texts,
    "Clusters": clusters,
    "Search": retrieval,
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    import mteb

    load_mteb.cache_clear()

    def put(make: Callable[[], Any]) -> None:
        monkeypatch.setattr(mteb, "get_task", lambda name: make())

    return put


def run(task: Mteb, rows: int = 40) -> Any:
    outputs = {
        item.id: vectors_text(np.stack([vector(text) for text in item.fields["texts"]]))
        for item in task.items()
    }
    draws = np.random.default_rng(0).integers(len(outputs), size=(rows, len(outputs)))
    draws[0] = np.arange(len(outputs))
    return task.corpus(outputs, draws)[task.metrics[0].name]


@pytest.mark.parametrize("form", FORMS)
def test_the_headline_is_mtebs_and_is_resampled(form: str, install: Install) -> None:
    data = FORMS[form]()
    install(lambda: mteb_task(f"Code{form}", data))
    task = Mteb(task=f"Code{form}")
    found = run(task)
    vectors = {text: vector(text).astype(np.float64) for unit in data.units() for text in unit}
    expected = score_in_mteb(f"Again{form}", data, vectors)
    assert task.conditions()["main_score"] == expected.name
    assert found[0] == pytest.approx(expected.value)
    assert type(task.embedding_data()) is type(data)
    assert np.isfinite(found).all()
    assert found[1:].std() > 0
    # Resamples vary around the number, not elsewhere.
    assert abs(found[1:].mean() - found[0]) < 4 * found[1:].std()


def test_of_many_texts_only_those_that_are_trained_on_are_embedded(install: Install) -> None:
    train, test = texts(600, 8), texts(20, 9)
    data = labelled(train, labels_of(train), test, labels_of(test))
    install(lambda: mteb_task("CodeMany", data))
    task = Mteb(task="CodeMany")
    assert len(list(task.items())) < 620
    found = run(task)
    vectors = {text: vector(text).astype(np.float64) for text in (*train, *test)}
    assert found[0] == pytest.approx(score_in_mteb("AgainMany", data, vectors).value)
    assert np.isfinite(found).all()


def test_a_share_of_the_documents_is_clustered_as_mteb_draws_it(install: Install) -> None:
    data = clusters()

    def make() -> Any:
        task = mteb_task("CodeShare", data)
        task.max_fraction_of_documents_to_embed = 0.6
        return task

    install(make)
    found = run(Mteb(task="CodeShare"))
    assert len(load_mteb("CodeShare").data.units()) == 30
    # Ours is put in only where it equals mteb's.
    assert np.isfinite(found).all()


def test_a_type_that_we_have_no_scorer_for_has_mtebs_number_alone(install: Install) -> None:
    data = pair_list()

    def make() -> Any:
        task = mteb_task("CodeOther", data)
        task.metadata = task.metadata.model_copy(update={"main_score": "manhattan_spearman"})
        return task

    install(make)
    task = Mteb(task="CodeOther")
    found = run(task)
    assert isinstance(task.embedding_data(), PlainTexts)
    assert task.conditions()["main_score"] == "manhattan_spearman"
    assert np.isfinite(found[0])
    assert np.isnan(found[1:]).all()


def test_without_all_texts_there_is_no_number(install: Install) -> None:
    data = pair_list()
    install(lambda: mteb_task("CodeLess", data))
    task = Mteb(task="CodeLess")
    item = next(task.items())
    outputs = {item.id: vectors_text(np.stack([vector(text) for text in item.fields["texts"]]))}
    found = task.corpus(outputs, np.zeros((1, 1), dtype=np.int64))
    assert np.isnan(found["main_score"]).all()


def test_what_we_resample_must_be_what_mteb_computes(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pair_list()
    install(lambda: mteb_task("CodeApart", data))
    wrong = mteb_bridge.MainScore("cosine_spearman", 0.123)
    monkeypatch.setattr("tasks.mteb.mteb_score", lambda loaded, vectors: wrong)
    found = run(Mteb(task="CodeApart"))
    assert found[0] == 0.123
    assert np.isnan(found[1:]).all()


def test_random_states_are_as_they_were(install: Install) -> None:
    data = clusters()
    install(lambda: mteb_task("CodeState", data))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    run(Mteb(task="CodeState"))
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected


def test_data_that_are_not_at_hand_are_no_crash(install: Install) -> None:
    def make() -> Any:
        task = mteb_task("CodeGone", pair_list())

        def load_data(*args: Any, **kwargs: Any) -> None:
            raise ConnectionError("no route")

        task.load_data = load_data
        return task

    install(make)
    with pytest.raises(Unsupported, match=r"the data of mteb's 'CodeGone' are not to be had \(no"):
        list(Mteb(task="CodeGone").items())


def test_a_task_that_mteb_does_not_have_is_named() -> None:
    load_mteb.cache_clear()
    with pytest.raises(ValueError, match="STSBenchmrak"):
        list(Mteb(task="STSBenchmrak").items())


def test_the_record_names_package_and_data(install: Install) -> None:
    data = pair_list()
    install(lambda: mteb_task("CodeRecord", data))
    found = Mteb(task="CodeRecord").conditions()
    assert found["mteb"].count(".") == 2
    assert found["data"] == "local/none at 1"
    assert found["main_score"] == "cosine_spearman"


def test_the_protocol_is_that_of_the_installed_mteb() -> None:
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering

    probe: Any = AbsTaskClassification.evaluator_model
    assert (AbsTaskClassification.samples_per_label, AbsTaskClassification.n_experiments) == (
        SHOTS,
        EXPERIMENTS,
    )
    assert probe.max_iter == PROBE_STEPS
    assert (AbsTaskClustering.n_clusters, AbsTaskClustering.k_mean_batch_size) == (
        CLUSTERINGS,
        KMEANS_BATCH,
    )


def test_what_a_task_reports_is_known_without_its_data() -> None:
    assert [metric.name for metric in Mteb(task="Nowhere").metrics] == ["main_score"]
