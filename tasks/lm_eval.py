"""lm-eval: any text task of EleutherAI's lm-evaluation-harness, scored by it.

lm-eval builds the prompts, few-shot examples included, and its own filters and metrics score what
came back, so a number is its number; the row says which version scored. What is new is that every
method answers the same requests beside the baseline, item by item, with a clock.

`generate_until` requests are decoded. `loglikelihood`, `multiple_choice` and
`loglikelihood_rolling` requests are read: the output of an item is the log-probability of each of
its continuations. Methods that draft leave those as they are; methods that change attention or the
cache are graded on reading the continuation as they would decode it (models/likelihood.py).

The model's chat template is not used, since items know no model; `run.py lm-eval` can use it.

Source: arXiv 2405.14782; lm-eval 0.4.13. Data come from where the task's YAML says: local files,
the cache of the package `datasets`, or the hub when there is a network. One item:
    output_type "multiple_choice"   requests [["Q: … A:", " yes"], ["Q: … A:", " no"]]   target "1"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.base import Generation, TextGenerator
from tasks.base import Dataset, Item, Metric, Result, Scores, Task, Unscored
from tasks.lm_eval_bridge import (
    Loaded,
    aggregate,
    fields_of,
    is_number,
    is_resampled,
    load_lm_eval,
    results_of,
    scorer,
)

WARMUP_ITEMS = 4


@dataclass(frozen=True, kw_only=True)
class LmEval(Task[TextGenerator]):
    """One task of lm-eval.

    Attributes:
        task: Its name there, `gsm8k`, `hellaswag`; `lm-eval:gsm8k` is short for
            `lm-eval:task=gsm8k`.
        folder: With YAML files of tasks of your own, which win over those of the package; paths of
            data in them are relative to it.
        num_fewshot: Solved examples in front of each question; the task's own number if none.
    """

    task: str = ""
    folder: str = ""
    num_fewshot: int | None = None

    version = "1.0"
    data = Dataset(
        source="data sets of lm-eval",
        revision="as in the task's YAML file",
        split="the task's own",
        license="the task's own",
    )
    capability = "TextGenerator"
    needs = ("extra:lm-eval",)
    unnamed = "task"

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must be 0 or more, got {self.num_fewshot}.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of the task; before one is named, that there will be one."""
        if not self.task:
            return (Metric(name="the task's own", unit="score", kind="mean"),)
        return self._loaded().metrics

    def items(self) -> Iterator[Item]:
        """Yield the documents in lm-eval's order."""
        loaded = self._loaded()
        for number in loaded.documents:
            yield Item(f"lm-eval/{self.task}/{number}", fields_of(loaded, number))

    def warmup_items(self) -> Iterator[Item]:
        """Yield requests of the first documents with the words of their contexts turned round.

        Not every task has examples that are not measured; these are as long and say nothing.
        """
        loaded = self._loaded()
        numbers = list(loaded.documents)
        for place in range(WARMUP_ITEMS):
            fields = fields_of(loaded, numbers[place % len(numbers)])
            requests = [
                [" ".join(reversed(str(context).split())), *rest]
                for context, *rest in fields["requests"]
            ]
            yield Item(f"lm-eval/{self.task}/warm-up-{place}", {**fields, "requests": requests})

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Result:
        """Answer the requests of a document."""
        from tasks.lm_eval_model import GeneratorLM

        answering = GeneratorLM(model)
        requests = item.fields["requests"]
        if item.fields["output_type"] == "generate_until":
            ((context, settings),) = requests
            asked = answering.question(context, settings)
            decoding = replace(asked.decoding, ignore_eos=fixed_length)
            return model.generate(asked.prompt_ids, decoding)
        answers = answering.read(item.fields["output_type"], requests)
        return Generation(
            tuple(answering.judged_ids), json.dumps(answers), "length", answering.trace
        )

    def score(self, item: Item, output: str) -> Scores:
        """Return what lm-eval's filters and metrics say, but for numbers of all items together."""
        values = results_of(self._loaded(), item.fields["document"], _responses(item, output))
        names = [metric.name for metric in self.metrics if metric.kind != "corpus"]
        return {name: _number(values.get(name)) for name in names}

    def corpus(
        self, outputs: Mapping[str, str], draws: NDArray[np.int64]
    ) -> Mapping[str, NDArray[np.float64]]:
        """Return lm-eval's aggregations: of all items, and of resampled ones where that is fast."""
        loaded = self._loaded()
        if not loaded.aggregations:
            return {}
        by_id = {f"lm-eval/{self.task}/{number}": number for number in loaded.documents}
        items = {name: Item(name, {"output_type": loaded.output_type}) for name in outputs}
        values = [
            results_of(loaded, by_id[name], _responses(items[name], output))
            for name, output in outputs.items()
        ]
        found = {}
        for name, aggregation in loaded.aggregations.items():
            column = [each[name] for each in values]
            numbers = np.full(len(draws), np.nan)
            rows = draws if is_resampled(aggregation) else draws[:1]
            numbers[: len(rows)] = [
                aggregate(aggregation, [column[place] for place in row]) for row in rows
            ]
            found[name] = numbers
        return found

    def conditions(self) -> dict[str, str]:
        """Return who scores, and what of the task decides about a score."""
        loaded = self._loaded()
        return {
            "scorer": scorer(),
            "lm_eval_version": f"{loaded.name} {loaded.task_version}",
            "lm_eval_output_type": loaded.output_type,
        }

    def content_hash(self) -> str:
        """Return a hash over items, settings and the version of lm-eval, which scores."""
        own = super().content_hash()
        return hashlib.sha256(f"{own} {scorer()}".encode()).hexdigest()

    def _loaded(self) -> Loaded:
        if not self.task:
            raise ValueError("task must be the name of a task of lm-eval, got an empty text.")
        return load_lm_eval(self.task, self.folder, self.num_fewshot)


def _responses(item: Item, output: str) -> list[Any]:
    """Return an item's stored output as lm-eval's responses to its requests."""
    if item.fields["output_type"] == "generate_until":
        return [output]
    return [tuple(each) if isinstance(each, list) else each for each in json.loads(output)]


def _number(value: Any) -> float | Unscored:
    if value is None or not is_number(value):
        return Unscored(f"lm-eval gave no number for this item, but {value!r}")
    return float(value)
