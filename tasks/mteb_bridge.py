"""The way to the `mteb` package and back: its tasks as our data, our data as its tasks.

`mteb` takes seconds to import and seeds the global random generators as it goes, so it is imported
only inside these functions, and they put the generators back.

Source: mteb 2.26, `mteb.evaluate`; encoders are subclasses of its `AbsEncoder`.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from models.base import Unsupported
from tasks.mteb_data import (
    EmbeddingData,
    LabelledClusters,
    LabelledTexts,
    PairList,
    PairMatrix,
    PlainTexts,
    Retrieval,
    distinct,
)
from tasks.mteb_scorers import EXPERIMENTS, clustering_bags, training_draws
from tasks.packages import quietly

# Of the vectors that stand in for an encoder's while a task's texts are collected.
_STAND_IN_DIMENSION = 4


class MainScore(NamedTuple):
    """Name and value of what mteb puts into its tables for a task."""

    name: str
    value: float


class Loaded(NamedTuple):
    """A task of mteb with its data.

    Attributes:
        name: In mteb.
        dataset: As the task loaded it.
        data: The same in our form; `PlainTexts` where we have no scorer of our own.
        main_score: Name of the headline.
        source: Path and revision of the data set; of a folder, a digest of its files.
        license: As its metadata has it.
    """

    name: str
    dataset: Any
    data: EmbeddingData
    main_score: str
    source: str
    license: str


@functools.cache
def load_mteb(name: str, folder: str = "") -> Loaded:
    """Return a task of mteb with its data, read once.

    Args:
        name: Of the task.
        folder: Where its data set lies as the hub's repository has it; empty for the cache of the
            package `datasets`, then the hub.

    Raises:
        ValueError: mteb has no such task, or there is no such folder.
        models.base.Unsupported: mteb is not installed, the task is not about text, or its data are
            not to be had.
    """
    with _mteb() as mteb:
        try:
            task = mteb.get_task(name)
        except KeyError as error:
            raise ValueError(f"task: {str(error.args[0]).strip()}") from error
        if set(task.metadata.modalities) != {"text"}:
            raise Unsupported(
                f"mteb's '{name}' is about {', '.join(task.metadata.modalities)}, and texts are "
                f"all that is embedded here. {_nearest_text_tasks(mteb, name)}"
            )
        source = f"{task.metadata.dataset['path']} at {task.metadata.dataset['revision']}"
        if folder:
            source = f"{task.metadata.dataset['path']} from a folder, {_folder_digest(folder)}"
            dataset = {**task.metadata.dataset, "path": folder}
            task.metadata = task.metadata.model_copy(update={"dataset": dataset})
        try:
            task.load_data()
        except Exception as error:  # whatever a download, or somebody's files, may raise
            way_out = (
                "the folder must be laid out like the hub's repository, its README.md with the "
                "names of the parts included"
                if folder
                else "run once with a network, put them into the cache of the package 'datasets', "
                "or name the folder that they lie in: folder=…"
            )
            raise Unsupported(
                f"the data of mteb's '{name}' are not to be had ({error}): {way_out}."
            ) from error
        texts = _texts(mteb, name, task.dataset)
        return Loaded(
            name,
            task.dataset,
            _our_data(task, texts) or PlainTexts(texts, source),
            task.metadata.main_score,
            source,
            str(task.metadata.license or "not specified"),
        )


def _nearest_text_tasks(mteb: Any, name: str) -> str:
    tasks = mteb.get_tasks(modalities=["text"], exclusive_modality_filter=True)
    nearest = get_close_matches(name, [task.metadata.name for task in tasks], n=3, cutoff=0)
    return f"Tasks about text with the nearest names: {', '.join(nearest)}."


def _folder_digest(folder: str) -> str:
    """Return what the files of a data set are known by, wherever they lie.

    Raises:
        ValueError: There is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder: there is no folder {folder}. It must hold the task's data set.")
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root)
        # What a clone or a download keeps for itself: .git, .cache.
        if path.is_file() and not any(part.startswith(".") for part in place.parts):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{place.as_posix()} {content}\n".encode())
    return f"SHA-256 {digest.hexdigest()[:16]}"


def mteb_score(loaded: Loaded, vectors: Mapping[str, NDArray[np.float64]]) -> MainScore:
    """Return mteb's own headline for the vectors of a task's texts.

    Raises:
        KeyError: A text has no vector.
    """
    with _mteb() as mteb:
        return _evaluate(mteb, _fresh(mteb, loaded.name, loaded.dataset), _looking_up(vectors))


def score_in_mteb(
    name: str, data: EmbeddingData, vectors: Mapping[str, NDArray[np.float64]]
) -> MainScore:
    """Return mteb's own headline for data of ours, as a task of mteb's."""
    with _mteb() as mteb:
        return _evaluate(mteb, mteb_task(name, data), _looking_up(vectors))


def mteb_task(name: str, data: EmbeddingData) -> Any:
    """Return data of ours as a task of mteb's, an `AbsTaskSTS`, `AbsTaskRetrieval` and so on.

    Raises:
        TypeError: Data of a form that has no type there.
    """
    import mteb.abstasks
    from datasets import Dataset, DatasetDict

    abstasks: Any = mteb.abstasks  # the base class below is one of several
    if isinstance(data, PairList | PairMatrix):
        if isinstance(data, PairMatrix):
            first, second = data.pairs()
            columns = {
                "sentence1": [data.texts[place] for place in first],
                "sentence2": [data.texts[place] for place in second],
                "score": data.gold[first, second].tolist(),
            }
        else:
            columns = {
                "sentence1": [pair[0] for pair in data.pairs],
                "sentence2": [pair[1] for pair in data.pairs],
                "score": list(data.gold),
            }
        dataset: Any = DatasetDict({"test": Dataset.from_dict(columns)})
        base, kind, main, settings = abstasks.AbsTaskSTS, "STS", "cosine_spearman", {}
        settings = {"min_score": min(columns["score"]), "max_score": max(columns["score"])}
    elif isinstance(data, LabelledTexts):
        # Two labels have to be numbers there.
        codes = {label: code for code, label in enumerate(sorted(set(data.train_labels)))}
        dataset = DatasetDict(
            {
                split: Dataset.from_dict(
                    {"text": texts, "label": [codes[label] for label in labels]}
                )
                for split, texts, labels in (
                    ("train", data.train, data.train_labels),
                    ("test", data.test, data.test_labels),
                )
            }
        )
        base, kind, main = abstasks.AbsTaskClassification, "Classification", "accuracy"
        settings = {}
    elif isinstance(data, LabelledClusters):
        dataset = DatasetDict(
            {"test": Dataset.from_dict({"sentences": data.texts, "labels": data.labels})}
        )
        base, kind, main = abstasks.AbsTaskClustering, "Clustering", "v_measure"
        settings = {
            "max_fraction_of_documents_to_embed": None,
            "max_documents_per_cluster": data.bags.shape[1],
        }
    elif isinstance(data, Retrieval):
        queries = [{"id": f"q{place:06}", "text": text} for place, text in enumerate(data.queries)]
        documents = [
            {"id": f"d{place:06}", "text": text} for place, text in enumerate(data.documents)
        ]
        relevant = {
            f"q{place:06}": {f"d{document:06}": grade for document, grade in grades.items()}
            for place, grades in enumerate(data.relevant)
        }
        split = {
            "corpus": Dataset.from_list(documents),
            "queries": Dataset.from_list(queries),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        dataset = {"default": {"test": split}}
        base, kind, main = abstasks.AbsTaskRetrieval, "Retrieval", "ndcg_at_10"
        settings = {}
    else:
        raise TypeError(f"mteb has no type of task for {type(data).__name__}.")
    category = {"Retrieval": "t2t", "STS": "t2t"}.get(kind, "t2c")
    return _registered(base, name, kind, category, main, settings, dataset)


def _registered(
    base: Any,
    name: str,
    kind: str,
    category: str,
    main: str,
    settings: dict[str, Any],
    dataset: Any,
) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata(
        name=name,
        description="A small task of tokenmark, on data that ship in packages.",
        reference=None,
        dataset={"path": "local/none", "revision": "1"},
        type=cast(Any, kind),
        category=cast(Any, category),
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation="",
    )

    def load_data(self: Any, *args: Any, **kwargs: Any) -> None:
        self.dataset, self.data_loaded = dataset, True

    members = {"metadata": metadata, "load_data": load_data, "__module__": __name__, **settings}
    return type(name, (base,), members)()


def _texts(mteb: Any, name: str, dataset: Any) -> tuple[str, ...]:
    """Return the distinct texts that a task asks an encoder for, in the order it does."""
    seen: dict[str, NDArray[np.float64]] = {}

    def stand_in(text: str) -> NDArray[np.float64]:
        if text not in seen:
            seen[text] = np.random.default_rng(len(seen)).standard_normal(_STAND_IN_DIMENSION)
        return seen[text]

    _evaluate(mteb, _fresh(mteb, name, dataset), stand_in)
    return distinct(list(seen))


def _fresh(mteb: Any, name: str, dataset: Any) -> Any:
    """Return a task whose random generator has drawn nothing yet, over data that are loaded."""
    task = mteb.get_task(name)
    task.dataset, task.data_loaded = dataset, True
    return task


def _looking_up(vectors: Mapping[str, NDArray[np.float64]]) -> Any:
    return vectors.__getitem__


def _evaluate(mteb: Any, task: Any, vector_of: Any) -> MainScore:
    model = _encoder_class()(vector_of)
    result = mteb.evaluate(
        model,
        tasks=[task],
        cache=None,
        co2_tracker=False,
        encode_kwargs={"batch_size": 256, "show_progress_bar": False},
        overwrite_strategy="always",
        show_progress_bar=False,
    )
    return MainScore(task.metadata.main_score, float(result.task_results[0].get_score()))


@functools.cache
def _encoder_class() -> Any:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    class Memory(AbsEncoder):
        """An encoder that knows the vector of every text."""

        mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "tokenmark/memory", "revision": "1"}
        )

        def __init__(self, vector_of: Any) -> None:
            self._vector_of = vector_of

        def encode(self, inputs: Any, **kwargs: Any) -> NDArray[np.float64]:
            texts = [text for batch in inputs for text in batch["text"]]
            return np.stack([self._vector_of(text) for text in texts])

    return Memory


def _our_data(task: Any, texts: tuple[str, ...]) -> EmbeddingData | None:
    """Return a task's data in a form that we have a scorer for; None if there is none.

    Only for plain tasks of one split and one subset, whose headline is the one we compute and whose
    texts are those that mteb encodes.
    """
    main = task.metadata.main_score
    splits, dataset = task.eval_splits, task.dataset
    if len(splits) != 1 or task.metadata.is_multilingual:
        return None
    [split] = splits
    try:
        found: EmbeddingData | None = None
        if task.metadata.type == "STS" and main == "cosine_spearman":
            found = _pairs(task, dataset[split])
        elif task.metadata.type == "Classification" and main == "accuracy":
            found = _labelled(task, dataset, split)
        elif task.metadata.type == "Clustering" and main == "v_measure":
            found = _clusters(task, dataset[split])
        elif task.metadata.type == "Retrieval" and main == "ndcg_at_10":
            found = _retrieval(task, dataset, split)
    except (KeyError, TypeError, AttributeError):
        # A task with a layout of its own: mteb's number stands alone.
        return None
    if found is None:
        return None
    ours = {text for unit in found.units() for text in unit}
    return found if ours == set(texts) else None


def _pairs(task: Any, rows: Any) -> PairList:
    first, second = task.column_names
    return PairList(
        pairs=tuple(zip(rows[first], rows[second], strict=True)),
        gold=tuple(map(float, rows["score"])),
    )


def _labelled(task: Any, dataset: Any, split: str) -> LabelledTexts | None:
    if task.is_cross_validation or type(task.evaluator_model).__name__ != "LogisticRegression":
        return None
    column, label = task.input_column_name, task.label_column_name
    train, test = dataset[task.train_split], dataset[split]
    labels = list(train[label])
    if task.n_experiments != EXPERIMENTS:
        return None
    draws = training_draws(labels, shots=task.samples_per_label, experiments=EXPERIMENTS)
    # Of what may be hundreds of thousands, those that an experiment trains on.
    kept = sorted({place for places in draws for place in places})
    position = {place: number for number, place in enumerate(kept)}
    texts = train.select(kept)[column]
    return LabelledTexts(
        train=tuple(texts),
        train_labels=tuple(str(labels[place]) for place in kept),
        experiments=tuple(tuple(position[place] for place in places) for places in draws),
        test=tuple(test[column]),
        test_labels=tuple(map(str, test[label])),
    )


def _clusters(task: Any, rows: Any) -> LabelledClusters | None:
    if not hasattr(task, "max_documents_per_cluster"):
        return None  # the older kind of clustering, over given sets
    generator = random.Random(task.seed)
    count = len(rows)
    if task.max_fraction_of_documents_to_embed is not None:
        limit: int | None = int(task.max_fraction_of_documents_to_embed * count)
    else:
        limit = task.max_document_to_embed
    if limit is not None:
        rows = rows.select(generator.sample(range(count), k=min(count, limit)))
    labels = [
        label if isinstance(label, list) else [label] for label in rows[task.label_column_name]
    ]
    if any(len(label) != 1 for label in labels):
        return None  # labels of several levels
    return LabelledClusters(
        texts=tuple(rows[task.input_column_name]),
        labels=tuple(str(label) for [label] in labels),
        bags=clustering_bags(len(rows), task.max_documents_per_cluster, generator),
    )


def _retrieval(task: Any, dataset: Any, split: str) -> Retrieval | None:
    if task.ignore_identical_ids or task.skip_first_result:
        return None
    found = dataset["default"][split]
    if found["top_ranked"] is not None:
        return None
    # trec_eval puts the larger id first among equals; `ndcg_at_10` the later place.
    documents = sorted(found["corpus"], key=lambda row: row["id"])
    place_of = {row["id"]: place for place, row in enumerate(documents)}
    judged = found["relevant_docs"]
    queries = [row for row in found["queries"] if any(judged.get(row["id"], {}).values())]
    return Retrieval(
        documents=tuple(f"{row.get('title') or ''} {row['text']}".strip() for row in documents),
        queries=tuple(row["text"] for row in queries),
        relevant=tuple(
            {
                place_of[document]: int(grade)
                for document, grade in judged[row["id"]].items()
                if document in place_of
            }
            for row in queries
        ),
    )


def _mteb() -> AbstractContextManager[Any]:
    """Return the block in which the package is at hand."""
    return quietly("mteb", "mteb")
