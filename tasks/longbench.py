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
that); no setting hides it. `max_length` 0 follows the window that the model was made for, also
under a method that reads longer texts, so that all get the same prompt.

With several tasks, `score` is the mean over tasks of their means, and `by-category` the mean over
categories of those; the authors' tables show the latter, most papers the former. One item:
    prompt "Answer the question based on ..."   answers ["Miller v. California"]   task "hotpotqa"
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.base import Decoding, Generation, TextGenerator, Unsupported
from tasks.base import Dataset, Item, Metric, Scores, Task
from tasks.longbench_generator import make_item
from tasks.longbench_protocol import (
    BUCKETS,
    CATEGORIES,
    EVEN_TASKS,
    FIRST_LINE_TASKS,
    PLAIN_TASKS,
    PROTOCOLS,
    Chat,
    Truncation,
    check_choice,
    check_prompting,
    in_turn,
    length_bucket,
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
    corrected: bool = False

    version = "1.0"
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
        ids = prompt_ids(
            model,
            item.fields["prompt"],
            max_length=self.max_length or usual_max_length(model, max_new_tokens),
            truncation=self.truncation,
            chat="never" if is_plain else self.chat,
        )
        return model.generate(ids, Decoding(max_new_tokens=max_new_tokens, ignore_eos=fixed_length))

    def score(self, item: Item, output: str) -> Scores:
        """Return the score of an answer, under the names that it counts for."""
        name = item.fields["task"]
        value = score_prediction(
            PROTOCOLS[name].scorer,
            output,
            item.fields["answers"],
            item.fields["classes"],
            only_first_line=name in FIRST_LINE_TASKS,
            corrected=self.corrected,
        )
        counted = {"score", name, PROTOCOLS[name].category, length_bucket(item.fields["length"])}
        wanted = {metric.name for metric in self.metrics}
        scores = {each: value for each in counted if each in wanted}
        return scores | ({"by-category": value} if "by-category" in wanted else {})

    def aggregate(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return means over tasks: of all, of each category and length, and over categories.

        A task that no item is left of (few items, a resample) is left out; a length or category
        without items is NaN, as the official scripts have it.
        """
        tasks = self.tasks
        values: dict[str, list[float]] = defaultdict(list)
        by_bucket: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in scores.values():
            name = next(each for each in tasks if not np.isnan(row.get(each, np.nan)))
            values[name].append(row[name])
            for bucket in BUCKETS:
                if not np.isnan(row.get(bucket, np.nan)):
                    by_bucket[bucket, name].append(row[name])
        means = {name: float(np.mean(found)) for name, found in values.items()}
        result = {"score": _mean_of(list(means.values()))}
        categories: dict[str, list[float]] = defaultdict(list)
        for name, mean in means.items():
            categories[PROTOCOLS[name].category].append(mean)
        for category in CATEGORIES:
            result[category] = _mean_of(categories.get(category, []))
        result["by-category"] = _mean_of([result[category] for category in categories])
        for bucket in BUCKETS:
            result[bucket] = _mean_of(
                [float(np.mean(found)) for (b, _), found in by_bucket.items() if b == bucket]
            )
        return result


def _mean(name: str) -> Metric:
    return Metric(name=name, unit="fraction", kind="mean")


def _corpus(name: str) -> Metric:
    return Metric(name=name, unit="fraction", kind="corpus")


def _mean_of(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
