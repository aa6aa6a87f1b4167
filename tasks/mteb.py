"""mteb: any text task of the MTEB benchmarks, by the `mteb` package itself.

Texts are embedded by our encoder, one unit (a pair, a text) an item; afterwards mteb runs its task
over the stored vectors, so the headline is its evaluator's. For plain STS, classification,
clustering and retrieval tasks our own scorers compute the same number again, and where they agree
they resample it; for other types the number stands without an interval.

Each text of a task is embedded as it stands: mteb's instructions for queries and documents are not
put in front, and neither are the prompts of a model of sentence-transformers.

Source: arXiv 2210.07316 and 2502.13595; mteb 2.26. Data come from a folder that the user names, or
from the cache of the package `datasets`, or from the hub when there is a network, the latter two at
the revision that mteb names. Texts are embedded once for each unit that they stand in (their time
is measured); mteb's evaluator gets each distinct text's vector from memory.

One item:
    texts ["A man plays a flute.", "A man is playing."]   known [3.2]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tasks.base import Dataset, Metric
from tasks.mteb_bridge import Loaded, load_mteb, mteb_score
from tasks.mteb_common import EmbeddingTask
from tasks.mteb_data import EmbeddingData
from tasks.mteb_scorers import Floats, Integers

MAIN_SCORE = "main_score"
# Further apart, and what we resample is not what mteb computes.
AGREEMENT = 1e-3


@dataclass(frozen=True, kw_only=True)
class Mteb(EmbeddingTask):
    """One task of mteb.

    Attributes:
        task: Its name there, `STSBenchmark`, `Banking77Classification`, `SciFact`.
        folder: Where its data set lies, laid out like the hub's repository (a clone of it, say);
            empty for the cache of `datasets`, then the hub. What counts is what is in it: its
            digest is part of the conditions.
    """

    task: str = "STSBenchmark"
    folder: str = ""

    version = "1.0"
    unnamed = "task"
    data = Dataset(
        source="data sets of mteb",
        revision="as in the task's metadata",
        split="the task's own",
        license="the task's own",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.task.strip():
            raise ValueError("task must be the name of a task of mteb, got an empty text.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What mteb calls the main score; `conditions` say which one it is for this task."""
        return (Metric(name=MAIN_SCORE, unit="score", kind="corpus"),)

    def embedding_data(self) -> EmbeddingData:
        """Return the data in our form.

        Raises:
            models.base.Unsupported: mteb or the data are missing.
        """
        return self._loaded().data

    def conditions(self) -> dict[str, str]:
        """Return the versions of package and data, and which score is the main one."""
        from importlib.metadata import version

        loaded = self._loaded()
        return {
            "mteb": version("mteb"),
            "data": loaded.source,
            "license": loaded.license,
            MAIN_SCORE: loaded.main_score,
        }

    def corpus(self, outputs: Mapping[str, str], draws: Integers) -> Mapping[str, Floats]:
        """Return mteb's headline, and ours on resampled items where both are the same."""
        loaded = self._loaded()
        vectors = self.unit_vectors(outputs)
        units = loaded.data.units()
        found = np.full(len(draws), np.nan)
        if len(vectors) < len(units):
            return {MAIN_SCORE: found}
        # A text that was embedded twice has the same vector twice, but for rounding.
        by_text = {
            text: vector
            for place, unit in enumerate(units)
            for text, vector in zip(unit, vectors[place], strict=True)
        }
        theirs = mteb_score(loaded, by_text).value
        counts = self.unit_counts(outputs, draws)
        ours = loaded.data.numbers(vectors, counts).get(loaded.main_score)
        if ours is not None and abs(ours[0] - theirs) <= AGREEMENT:
            found[1:] = ours[1:]
        found[0] = theirs
        return {MAIN_SCORE: found}

    def _loaded(self) -> Loaded:
        return load_mteb(self.task, self.folder)
