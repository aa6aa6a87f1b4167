"""mteb-mini: MTEB's task types on data that are at hand everywhere, scored as mteb scores.

Real human judgements and labels that ship in gensim's test data, and the documentation of Python's
own standard library. Nothing is copied: the texts are read from the installed packages. Each is a
real mteb task too (`tasks.mteb_bridge.mteb_task`), whose evaluator gives the same number.

| task | type, headline | data | licence |
|---|---|---|---|
| `lee` | STS, cosine_spearman | 50 news texts, all 1,225 pairs rated (Lee 2005) | research data |
| `wordsim` | STS, cosine_spearman | WordSim-353: how related two words are | CC BY 4.0 |
| `simlex` | STS, cosine_spearman | SimLex-999: how similar two words are | research data |
| `polarity` | Classification, accuracy | 200 review sentences (Pang and Lee) | research data |
| `docstrings` | Retrieval, ndcg_at_10 | find the function that a docstring begins for | PSF-2.0 |
| `topics` | Classification, accuracy | documentation by the package it belongs to | PSF-2.0 |
| `topic-clusters` | Clustering, v_measure | the same texts, without training | PSF-2.0 |

The last three change with the version of Python, and so does their content hash. All-MiniLM-L6-v2
(128 tokens) reaches 0.5045 on `lee`.

One item:
    texts ["tiger", "cat"]   known [7.35]
"""

from __future__ import annotations

import ast
import functools
import platform
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple, get_args

import numpy as np

from models.base import Unsupported
from tasks.base import Dataset, Metric
from tasks.checks import check_choice
from tasks.mteb_common import EmbeddingTask
from tasks.mteb_data import (
    EmbeddingData,
    LabelledClusters,
    LabelledTexts,
    PairList,
    PairMatrix,
    Retrieval,
    distinct,
)
from tasks.mteb_scorers import EXPERIMENTS, SEED, SHOTS, clustering_bags, training_draws

MiniTask = Literal["lee", "wordsim", "simlex", "polarity", "docstrings", "topics", "topic-clusters"]
_OF_GENSIM = ("lee", "wordsim", "simlex", "polarity")
_FORMS: Mapping[MiniTask, type[EmbeddingData]] = {
    "lee": PairMatrix,
    "wordsim": PairList,
    "simlex": PairList,
    "polarity": LabelledTexts,
    "docstrings": Retrieval,
    "topics": LabelledTexts,
    "topic-clusters": LabelledClusters,
}

# Packages whose documentation the topics are, and modules whose functions are looked for. Written
# in Python in every version that tokenmark runs on, and of one subject each.
TOPICS = (
    "asyncio", "email", "http", "ipaddress.py", "logging", "mailbox.py", "multiprocessing",
    "tarfile.py", "turtle.py", "unittest",
)  # fmt: skip
FUNCTIONS_OF = (
    "ast.py", "base64.py", "calendar.py", "colorsys.py", "difflib.py", "fnmatch.py", "fractions.py",
    "functools.py", "gettext.py", "glob.py", "heapq.py", "inspect.py", "ipaddress.py",
    "linecache.py", "locale.py", "mimetypes.py", "platform.py", "posixpath.py", "pprint.py",
    "quopri.py", "random.py", "shlex.py", "shutil.py", "statistics.py", "subprocess.py",
    "tempfile.py", "textwrap.py", "tokenize.py", "webbrowser.py", "zipfile.py",
)  # fmt: skip
TEXTS_OF_A_TOPIC = 24  # the first half to train on, the other to try
FUNCTIONS_OF_A_MODULE = 3


@dataclass(frozen=True, kw_only=True)
class MtebMini(EmbeddingTask):
    """One small embedding task, scored over all its texts.

    Attributes:
        task: Which one; see the module's docstring.
    """

    task: MiniTask = "lee"

    version = "1.0"
    data = Dataset(
        source="gensim's test data; documentation of Python's standard library",
        revision=f"gensim as installed; Python {platform.python_version()}",
        split="test",
        license="LicenseRef-research-data AND CC-BY-4.0 AND PSF-2.0",
    )
    scale = "embedded"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task", self.task, get_args(MiniTask))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics of mteb's type of task."""
        return _FORMS[self.task].metrics

    def embedding_data(self) -> EmbeddingData:
        """Return the data.

        Raises:
            models.base.Unsupported: The package or the source files that hold them are missing.
        """
        return load_mini(self.task)

    def conditions(self) -> dict[str, str]:
        """Return the version of what the texts and the scorers come from."""
        found = {"scikit-learn": _version("scikit-learn")}
        if self.task in _OF_GENSIM:
            return {**found, "gensim": _version("gensim")}
        return {**found, "python": platform.python_version()}


@functools.cache
def load_mini(name: MiniTask) -> EmbeddingData:
    """Return the data of a task, read once."""
    match name:
        case "lee":
            return _lee()
        case "wordsim":
            return _word_pairs("wordsim353.tsv")
        case "simlex":
            return _word_pairs("simlex999.txt")
        case "polarity":
            return _polarity()
        case "docstrings":
            return _docstrings()
        case "topics":
            train, test = _topics()
            return labelled(
                [each.text for each in train],
                [each.label for each in train],
                [each.text for each in test],
                [each.label for each in test],
            )
        case "topic-clusters":
            texts = [each for half in _topics() for each in half]
            return LabelledClusters(
                texts=tuple(each.text for each in texts),
                labels=tuple(each.label for each in texts),
                bags=clustering_bags(len(texts), len(texts), Random(SEED)),
            )


def labelled(
    train: list[str], train_labels: list[str], test: list[str], test_labels: list[str]
) -> LabelledTexts:
    """Return labelled texts with mteb's draws of those to train on."""
    draws = training_draws(train_labels, shots=SHOTS, experiments=EXPERIMENTS)
    return LabelledTexts(
        train=tuple(train),
        train_labels=tuple(train_labels),
        experiments=tuple(map(tuple, draws)),
        test=tuple(test),
        test_labels=tuple(test_labels),
    )


class _Text(NamedTuple):
    text: str
    label: str


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError as error:
        raise Unsupported(
            f"this task needs {package}, which is not installed: pip install {package}"
        ) from error


def _gensim_lines(name: str) -> list[str]:
    """Return the lines of a file of gensim's test data, without empty ones."""
    import importlib.util

    # gensim itself takes seconds to import, and its files are all that is needed.
    found = importlib.util.find_spec("gensim")
    if found is None or found.origin is None:
        raise Unsupported(
            "this task needs gensim's test data, and gensim is not installed: pip install gensim"
        )
    path = Path(found.origin).parent / "test" / "test_data" / name
    try:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise Unsupported(f"this gensim has no test data: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


def _lee() -> PairMatrix:
    texts = [line.strip() for line in _gensim_lines("lee.cor")]
    rows = [
        [float(value) for value in line.split()] for line in _gensim_lines("similarities0-1.txt")
    ]
    return PairMatrix(texts=tuple(texts), gold=np.array(rows))


def _word_pairs(name: str) -> PairList:
    rows = [line.split("\t") for line in _gensim_lines(name) if not line.startswith("#")]
    return PairList(
        pairs=tuple((first, second) for first, second, _ in rows),
        gold=tuple(float(score) for *_, score in rows),
    )


def _polarity() -> LabelledTexts:
    rows = [line.split(maxsplit=1) for line in _gensim_lines("pang_lee_polarity.cor")]
    texts = [text.strip() for _, text in rows]
    labels = [label.removeprefix("__label__") for label, _ in rows]
    # Every second one, since the labels come in blocks.
    return labelled(texts[::2], labels[::2], texts[1::2], labels[1::2])


def _docstrings() -> Retrieval:
    """Return functions without their documentation, and the first line of each documentation."""
    documents, queries = [], []
    for module in FUNCTIONS_OF:
        functions = [
            ((ast.get_docstring(node) or "").splitlines()[0].strip(), _without_docstring(node))
            for _, node in _documented(module)
            if isinstance(node, ast.FunctionDef)
            and not node.name.startswith("_")
            and 3 <= (node.end_lineno or 0) - node.lineno <= 40
        ]
        fitting = [
            (query, document)
            for query, document in functions
            if 4 <= len(query.split()) <= 30 and 3 <= len(document.splitlines()) <= 25
        ]
        Random(f"{SEED} {module}").shuffle(fitting)
        for query, document in fitting[:FUNCTIONS_OF_A_MODULE]:
            if query not in queries and document not in documents:
                queries.append(query)
                documents.append(document)
    return Retrieval(
        documents=tuple(documents),
        queries=tuple(queries),
        relevant=tuple({place: 1} for place in range(len(queries))),
    )


def _topics() -> tuple[list[_Text], list[_Text]]:
    """Return labelled paragraphs of documentation to train on, and others; labels in turn."""
    train, test = [], []
    seen: set[str] = set()
    for topic in TOPICS:
        label = topic.removesuffix(".py")
        texts = [
            text
            for text in distinct([_first_paragraph(node) for _, node in _documented(topic)])
            # A text that names its package would be no question.
            if 8 <= len(text.split()) <= 60 and label not in text.lower() and text not in seen
        ]
        seen.update(texts)
        Random(f"{SEED} {topic}").shuffle(texts)
        half = TEXTS_OF_A_TOPIC // 2
        train += [_Text(text, label) for text in texts[:half]]
        test += [_Text(text, label) for text in texts[half : 2 * half]]
    for part in (train, test):
        Random(SEED).shuffle(part)
    return train, test


Definition = ast.FunctionDef | ast.ClassDef


def _documented(place: str) -> Iterator[tuple[Path, Definition]]:
    """Yield functions and classes with documentation of a module or package of the library."""
    path = Path(sysconfig.get_path("stdlib")) / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for file in files:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise Unsupported(f"the standard library's sources are not here: {error}") from error
        for node in ast.walk(tree):
            if isinstance(node, Definition) and ast.get_docstring(node):
                yield file, node


def _first_paragraph(node: Definition) -> str:
    documentation = ast.get_docstring(node) or ""
    return " ".join(documentation.split("\n\n")[0].split())


def _without_docstring(node: Definition) -> str:
    """Return the source of a definition as Python writes it, without its documentation."""
    bare = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(bare, Definition)
    bare.body = bare.body[1:] or [ast.Pass()]
    return ast.unparse(bare)
