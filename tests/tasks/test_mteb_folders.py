"""mteb's own loaders over data sets in folders, laid out like the hub's repositories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.base import Unsupported
from tasks.mteb import MAIN_SCORE, Mteb
from tasks.mteb_bridge import load_mteb
from tasks.mteb_common import vectors_text
from tasks.mteb_data import (
    EmbeddingData,
    LabelledClusters,
    LabelledTexts,
    PairList,
    PlainTexts,
    Retrieval,
)
from tests.tasks.mteb_texts import texts, vector


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_card(folder: Path, **parts: tuple[str, str]) -> None:
    """Write what the hub's README.md says of the parts: name, split and file."""
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {file}"
        for name, (split, file) in parts.items()
    ]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))


def pairs_folder(folder: Path) -> None:
    rows = zip(texts(30, 1), texts(30, 2), strict=True)
    write(
        folder / "test.jsonl",
        (
            {"sentence1": a, "sentence2": b, "score": float(len(set(a.split()) & set(b.split())))}
            for a, b in rows
        ),
    )


def labels_folder(folder: Path) -> None:
    for split, count, seed in (("train", 120, 3), ("test", 40, 4)):
        write(
            folder / f"{split}.jsonl",
            ({"text": text, "label": ord(text[0]) % 3} for text in texts(count, seed)),
        )


def clusters_folder(folder: Path) -> None:
    # The form on the hub: sets of sentences, which the task itself flattens and draws from.
    found = texts(1200, 5)
    rows = [
        {"sentences": part, "labels": [ord(text[0]) % 3 for text in part]}
        for part in (found[:600], found[600:])
    ]
    write(folder / "test.jsonl", rows)


def search_folder(folder: Path) -> None:
    write(
        folder / "corpus.jsonl",
        ({"_id": f"d{n:02}", "title": "A", "text": text} for n, text in enumerate(texts(40, 6))),
    )
    write(
        folder / "queries.jsonl",
        ({"_id": f"q{n}", "text": text} for n, text in enumerate(texts(15, 7))),
    )
    write(
        folder / "qrels" / "test.jsonl",
        (
            {"query-id": f"q{n}", "corpus-id": f"d{n + step:02}", "score": step // 20 + 1}
            for n in range(15)
            for step in (0, 20)
        ),
    )
    write_card(
        folder,
        default=("test", "qrels/test.jsonl"),
        corpus=("corpus", "corpus.jsonl"),
        queries=("queries", "queries.jsonl"),
    )


def ranks_folder(folder: Path) -> None:
    search_folder(folder)
    write(
        folder / "top_ranked.jsonl",
        (
            {"query-id": f"q{n}", "corpus-ids": [f"d{m:02}" for m in range(n, n + 25)]}
            for n in range(15)
        ),
    )
    write_card(
        folder,
        default=("test", "qrels/test.jsonl"),
        corpus=("test", "corpus.jsonl"),
        queries=("test", "queries.jsonl"),
        top_ranked=("test", "top_ranked.jsonl"),
    )


def duplicates_folder(folder: Path) -> None:
    # The form on the hub: one row of columns.
    first, second = texts(30, 8), texts(30, 9)
    row = {"sent1": first, "sent2": second, "labels": [place % 3 == 0 for place in range(30)]}
    write(folder / "test.jsonl", [row])


FOLDERS: Sequence[tuple[str, Any, type[EmbeddingData], str]] = (
    ("STSBenchmark", pairs_folder, PairList, "cosine_spearman"),
    ("Banking77Classification", labels_folder, LabelledTexts, "accuracy"),
    ("TwentyNewsgroupsClustering.v2", clusters_folder, LabelledClusters, "v_measure"),
    ("SciFact", search_folder, Retrieval, "ndcg_at_10"),
    ("AskUbuntuDupQuestions", ranks_folder, PlainTexts, "map_at_1000"),
    ("SprintDuplicateQuestions", duplicates_folder, PlainTexts, "max_ap"),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the package `datasets` prepares of a folder out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    load_mteb.cache_clear()


def corpus(task: Mteb) -> Any:
    outputs = {
        item.id: vectors_text(np.stack([vector(text) for text in item.fields["texts"]]))
        for item in task.items()
    }
    draws = np.random.default_rng(0).integers(len(outputs), size=(5, len(outputs)))
    draws[0] = np.arange(len(outputs))
    return task.corpus(outputs, draws)[MAIN_SCORE]


@pytest.mark.parametrize(("name", "make", "form", "main_score"), FOLDERS)
def test_a_data_set_in_a_folder_is_read_by_mteb_and_scored_in_our_form(
    name: str, make: Any, form: type[EmbeddingData], main_score: str, tmp_path: Path
) -> None:
    make(tmp_path / "data")
    task = Mteb(task=name, folder=str(tmp_path / "data"))
    assert type(task.embedding_data()) is form
    conditions = task.conditions()
    assert conditions[MAIN_SCORE] == main_score
    assert " from a folder, SHA-256 " in conditions["data"]
    found = corpus(task)
    assert np.isfinite(found[0])
    # Where we have no scorer mteb's number has no interval.
    assert np.isfinite(found[1:]).all() == (form is not PlainTexts)


def duplicates_of(folder: Path) -> Mteb:
    return Mteb(task="SprintDuplicateQuestions", folder=str(folder))


def test_a_judgement_in_a_folder_is_part_of_the_content_wherever_the_folder_lies(
    tmp_path: Path,
) -> None:
    known = []
    for place in ("one", "two"):
        duplicates_folder(tmp_path / place)
        known.append(
            list(Mteb(task="SprintDuplicateQuestions", folder=str(tmp_path / place)).items())
        )
    assert known[0] == known[1]
    path = tmp_path / "one" / "test.jsonl"
    path.write_text(path.read_text().replace("true", "false", 1))
    load_mteb.cache_clear()
    changed = list(duplicates_of(tmp_path / "one").items())
    assert [item.fields["texts"] for item in changed] == [i.fields["texts"] for i in known[0]]
    assert changed != known[0]


def test_what_git_keeps_for_itself_is_no_data(tmp_path: Path) -> None:
    pairs_folder(tmp_path / "data")
    task = Mteb(task="STSBenchmark", folder=str(tmp_path / "data"))
    before = task.conditions()["data"]
    write(tmp_path / "data" / ".git" / "config", [{}])
    load_mteb.cache_clear()
    assert task.conditions()["data"] == before


def test_a_folder_that_is_not_there_or_holds_something_else_is_said_to(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=f"there is no folder {missing}"):
        list(Mteb(task="STSBenchmark", folder=str(missing)).items())
    pairs_folder(tmp_path / "data")
    shutil.move(tmp_path / "data", tmp_path / "other")
    with pytest.raises(Unsupported, match=r"'SciFact' are not to be had .*laid out like the hub's"):
        list(Mteb(task="SciFact", folder=str(tmp_path / "other")).items())


def test_a_task_about_pictures_is_declined_with_tasks_about_text() -> None:
    import mteb

    with pytest.raises(Unsupported, match=r"about image, and texts") as declined:
        list(Mteb(task="Caltech101").items())
    named = str(declined.value).rpartition(": ")[2].removesuffix(".").split(", ")
    assert len(named) == 3
    for name in named:
        assert mteb.get_task(name).metadata.modalities == ["text"]
