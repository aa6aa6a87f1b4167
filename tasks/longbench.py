"""LongBench: long contexts in 21 tasks of six categories, and its variant of even lengths.

Source: arXiv 2308.14508; prompts, cuts and scores as THUDM/LongBench at 2e00731 has them
(`tasks/longbench_protocol.py`, `tasks/longbench_scorers.py`). Scores are fractions here, which
papers multiply by 100. Differs from the official scripts in this:

- The chat template is the tokenizer's own, where the scripts have one written out for each model of
  2023. What is cut, and which six tasks go without a template, is the same.
- Nothing forbids a line break as the first token of `samsum`, and nothing stops at the next one:
  leading line breaks are left out and the first line is scored, which for all other answers is
  the same.

A method that compresses the prompt sees the question in it (query-aware, as in most papers on
that) unless `query_aware` is false. `max_length` 0 follows the window that the model was made for,
also under a method that reads longer texts, so that all get the same prompt.

With several tasks, `score` is the mean over tasks of their means, and `by-category` the mean over
categories of those; the authors' tables show the latter, most papers the former. One item:
    prompt "Answer the question based on ..."   answers ["Miller v. California"]   task "hotpotqa"
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.base import Decoding, Generation, TextGenerator, Unsupported
from tasks.base import Dataset, Item, Metric, Scores, Task
from tasks.checks import check_choice
from tasks.longbench_generator import make_item
from tasks.longbench_protocol import (
    BUCKETS,
    CATEGORIES,
    EVEN_TASKS,
    FIRST_LINE_TASKS,
    PLAIN_TASKS,
    PROTOCOLS,
    Chat,
    Prompting,
    Truncation,
    check_prompting,
    in_turn,
    length_bucket,
    mark_prompt,
    prompt_ids,
    read_records,
    read_templates,
    score_prediction,
    usual_max_length,
)

_LANGUAGES = {"en": ("en", "code"), "zh": ("zh",)}


@dataclass(frozen=True, kw_only=True)
class LongBench(Task[TextGenerator]):
    """Questions, summaries, few-shot examples, retrieval and code over long contexts.

    Attributes:
        task: Name of a task (`hotpotqa`), of a category (`single-doc-qa`), `en` (with code), `zh`
            or `all`.
        e: The 13 tasks of LongBench-E, with scores by length.
        max_length: Most tokens of a prompt, chat template not counted; 0 for the model's window
            less 500, as in the official settings (3500 for 4k, 31500 for 32k).
        truncation: What is kept of a longer prompt: `middle` cuts there and is the official way,
            `left` cuts the beginning off, `right` the end.
        chat: `auto` uses the tokenizer's chat template where it has one, but for the few-shot and
            code tasks; `always` uses it for all tasks; `never`.
        template: `official`, or `folder` for the folder's own config/dataset2prompt.json.
        folder: Folder laid out like the hub's archive; empty for tokenmark's cache, then the hub.
        revision: Of the data set on the hub; a commit is what reproduces.
        max_new_tokens: Longest answer; 0 for the official length of each task.
        query_aware: Whether a method sees the question before it compresses the context. If not,
            models whose attention is restricted read the prompt up to the end of the context, and
            then the rest, as NVIDIA/kvpress does by default.
        corrected: Drop every class whose name is part of the right one's, where the official
            scores of trec and lsht miss some.
    """

    task: str = "all"
    e: bool = False
    max_length: int = 0
    truncation: Truncation = "middle"
    chat: Chat = "auto"
    template: Literal["official", "folder"] = "official"
    folder: str = ""
    revision: str = "main"
    max_new_tokens: int = 0
    query_aware: bool = True
    corrected: bool = False

    version = "1.1"
    data = Dataset(source="THUDM/LongBench", revision="main", split="test", license="MIT")
    capability = "TextGenerator"
    speed_of = "decode"
    bound_by = "bytes"

    def __post_init__(self) -> None:
        names = EVEN_TASKS if self.e else tuple(PROTOCOLS)
        check_choice("task", self.task, ("all", *_LANGUAGES, *CATEGORIES, *names))
        check_prompting(self.max_length, self.truncation, self.chat)
        check_choice("template", self.template, ("official", "folder"))
        if self.e and not self.tasks:
            raise ValueError(f"LongBench-E is English and code; it has no task of {self.task!r}.")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}.")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are run, in their official order."""
        return tuple(
            name
            for name in (EVEN_TASKS if self.e else PROTOCOLS)
            if self.task in ("all", name, PROTOCOLS[name].category)
            or PROTOCOLS[name].language in _LANGUAGES.get(self.task, ())
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The score, and its parts by category, task and length, where there are several."""
        names = self.tasks
        buckets = BUCKETS if self.e else ()
        if len(names) == 1:
            return (_mean("score"), *map(_mean, buckets))
        categories = tuple(dict.fromkeys(PROTOCOLS[name].category for name in names))
        return (
            _corpus("score"),
            *((_corpus("by-category"), *map(_corpus, categories)) if len(categories) > 1 else ()),
            *map(_mean, names),
            *map(_corpus, buckets),
        )

    def items(self) -> Iterator[Item]:
        """Yield the records, one task after the other in turn, so that every prefix is balanced.

        Raises:
            Unsupported: The records are not to be had; says what to put where.
        """
        templates = read_templates(self.folder) if self.template == "folder" else {}
        yield from in_turn([self._items_of(name, templates) for name in self.tasks])

    def _items_of(self, name: str, templates: Mapping[str, str]) -> list[Item]:
        suffix = "_e" if self.e else ""
        records = read_records(name + suffix, 1, folder=self.folder, revision=self.revision)
        template = PROTOCOLS[name].template
        if self.template == "folder":
            if name not in templates:
                raise Unsupported(f"dataset2prompt.json has no prompt for {name!r}.")
            template = templates[name]
        items = []
        for number, record in enumerate(records):
            try:
                fields = {
                    "task": name,
                    "prompt": template.format_map(record),
                    "behind": len(template.partition("{context}")[2].format_map(record)),
                    "answers": list(record["answers"]),
                    "classes": list(record["all_classes"] or ()),
                    "length": int(record["length"]),
                }
            except (KeyError, TypeError, ValueError) as error:
                raise Unsupported(
                    f"record {number} of {name + suffix} is none of LongBench's: {error!r}."
                ) from error
            items.append(Item(f"{name}{suffix}/{record.get('_id') or number}", fields))
        if len({item.id for item in items}) < len(items):
            raise Unsupported(f"two records of {name + suffix} have the same _id.")
        return items

    def warmup_items(self) -> Iterator[Item]:
        """Yield generated questions of the same form, which are in no task."""
        for number in range(4):
            fields = make_item("docqa", number, length=512, seed="warm-up").fields
            yield Item(
                f"warmup/{number}",
                {
                    "task": "multifieldqa_en",
                    "prompt": fields["prompt"],
                    "behind": 0,
                    "answers": fields["answers"],
                    "classes": [],
                    "length": fields["length"],
                },
            )

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        """Cut the prompt, wrap it as a message where that is the rule, and continue it."""
        name = item.fields["task"]
        max_new_tokens = self.max_new_tokens or PROTOCOLS[name].max_new_tokens
        is_plain = self.chat == "auto" and name in PLAIN_TASKS
        how = Prompting(
            max_length=self.max_length or usual_max_length(model, max_new_tokens),
            truncation=self.truncation,
            chat="never" if is_plain else self.chat,
        )
        prompt = item.fields["prompt"]
        mark_prompt(model, prompt, item.fields["behind"], query_aware=self.query_aware, **how)
        ids = prompt_ids(model, prompt, **how)
        return model.generate(ids, Decoding(max_new_tokens=max_new_tokens, ignore_eos=fixed_length))

    def score(self, item: Item, output: str) -> Scores:
        """Return the score of an answer, under the names that it counts for."""
        fields, value = item.fields, self._value(item, output)
        counted = {"score", fields["task"], length_bucket(fields["length"])}
        return {
            each.name: value
            for each in self.metrics
            if each.kind == "mean" and each.name in counted
        }

    def _value(self, item: Item, output: str) -> float:
        name = item.fields["task"]
        return score_prediction(
            PROTOCOLS[name].scorer,
            output,
            item.fields["answers"],
            item.fields["classes"],
            only_first_line=name in FIRST_LINE_TASKS,
            corrected=self.corrected,
        )

    def corpus(
        self, outputs: Mapping[str, str], draws: NDArray[np.int64]
    ) -> Mapping[str, NDArray[np.float64]]:
        """Return means over tasks: of all, of each category and length, and over categories.

        A task that no item is left of (few items, a resample) is left out; a length or category
        without items is NaN, as the official scripts have it.
        """
        tasks, items = self.tasks, {item.id: item for item in self.items()}
        cells, values = [], []
        for name, output in outputs.items():
            fields = items[name].fields
            bucket = BUCKETS.index(length_bucket(fields["length"]))
            cells.append(tasks.index(fields["task"]) * len(BUCKETS) + bucket)
            values.append(self._value(items[name], output))
        shape = (len(tasks), len(BUCKETS))
        cell, value = np.array(cells), np.array(values)

        def summed(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            """Return (resamples, tasks, lengths)."""
            rows = [np.bincount(cell[row], weights[row], math.prod(shape)) for row in draws]
            return np.stack(rows).astype(np.float64).reshape(-1, *shape)

        counts, sums = summed(np.ones(len(value))), summed(value)
        means = _ratio(sums.sum(axis=2), counts.sum(axis=2))
        categories = {
            category: _mean_of(means[:, [PROTOCOLS[name].category == category for name in tasks]])
            for category in dict.fromkeys(PROTOCOLS[name].category for name in tasks)
        }
        lengths = _mean_of(_ratio(sums, counts))
        found = {
            "score": _mean_of(means),
            "by-category": _mean_of(np.stack(list(categories.values()), axis=1)),
            **categories,
            **{bucket: lengths[:, place] for place, bucket in enumerate(BUCKETS)},
        }
        return {each.name: found[each.name] for each in self.metrics if each.kind == "corpus"}


def _mean(name: str) -> Metric:
    return Metric(name=name, unit="fraction", kind="mean")


def _corpus(name: str) -> Metric:
    return Metric(name=name, unit="fraction", kind="corpus")


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return means of groups, NaN of those without items."""
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _mean_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return means over axis 1 of what is no NaN, NaN where nothing is."""
    return _ratio(np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1).astype(np.float64))
