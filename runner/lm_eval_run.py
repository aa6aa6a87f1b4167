"""`run.py lm-eval`: lm-eval's own evaluation with one of our models, and its results as a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base import Unsupported
from models.loading import ModelError
from runner.request import UsageError
from runner.settings import nearest
from tasks.lm_eval_bridge import find_task, lm_eval

if TYPE_CHECKING:
    from runner.lm_eval_model import Tokenmark


def make_model(**arguments: Any) -> Tokenmark:
    """Return a model of lm-eval; arguments as `runner.lm_eval_model.Tokenmark` takes them.

    Raises:
        UsageError: lm-eval is not installed, or a name or setting is wrong.
    """
    try:
        with lm_eval():
            from runner.lm_eval_model import Tokenmark
        return Tokenmark(**arguments)
    except (Unsupported, ModelError, LookupError) as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class Asked:
    """Tasks of lm-eval that exist.

    Attributes:
        names: As the user wrote them.
        specs: As lm-eval is to look for them: the file of a task, the name of a group or a tag.
        manager: Of lm-eval; it knows all of these.
        folder: With further tasks; empty for none.
    """

    names: tuple[str, ...]
    specs: tuple[str, ...]
    manager: Any
    folder: str


def find_tasks(names: Sequence[str], folder: str = "") -> Asked:
    """Look tasks of lm-eval up, which needs no model.

    Args:
        names: Of tasks, groups or tags.
        folder: With YAML files of further tasks; paths of data in them are relative to it.

    Raises:
        UsageError: One is unknown, or lm-eval is not installed.
    """
    try:
        with lm_eval():
            from lm_eval.tasks import TaskManager
    except Unsupported as error:
        raise UsageError(str(error)) from error
    specs: list[str] = []
    others: dict[str, str] = {}
    for name in names:
        try:
            specs.append(str(find_task(name, folder)))
        except ValueError as error:
            specs.append(name)
            others[name] = str(error)
    # A group or a tag takes lm-eval's index of all tasks, a quarter of a minute.
    with contextlib.chdir(folder or "."):
        manager = TaskManager(include_path=folder or None, include_defaults=bool(others))
    for name, reason in others.items():
        if not manager.match_tasks([name]) and not Path(name).is_file():
            near = nearest(name, [*manager.all_groups, *manager.all_tags])
            raise UsageError(reason + (f" Or is it the group {near!r}?" if near else ""))
    return Asked(tuple(names), tuple(specs), manager, folder)


def evaluate(
    model: Tokenmark,
    asked: Asked,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval and return its results, the samples included, as plain data.

    Args:
        model: Answers the requests.
        asked: What `find_tasks` found.
        num_fewshot: Solved examples in front of each question; the task's own number if None.
        limit: Documents of each task; all if None.
        chat_template: Write requests as a conversation, by the model's own template.
        cache: Folder for answers to requests; one file for each model with its method.

    Raises:
        UsageError: Data are not to be had, or a task asks for what the model does not do.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    use_cache = None
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        use_cache = str(cache.resolve() / model.key())
    try:
        with contextlib.chdir(asked.folder or "."):
            results = simple_evaluate(
                model=model,
                tasks=[*asked.specs],
                task_manager=asked.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                use_cache=use_cache,
                bootstrap_iters=1000,
            )
    except (Unsupported, KeyError, ValueError, OSError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"lm-eval cannot run {', '.join(asked.names)}: {why}") from error
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return lm-eval's table: one row a task, filter and metric."""
    found = []
    for task, numbers in results["results"].items():
        for name, value in numbers.items():
            metric, comma, filter_name = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{filter_name}")
            found.append(
                {
                    "task": task,
                    "version": str(results["versions"].get(task, "")),
                    "filter": filter_name,
                    "few-shot": str(results["n-shot"].get(task, "")),
                    "metric": metric,
                    "value": f"{value:.4f}" if isinstance(value, float) else str(value),
                    "standard error": f"{error:.4f}" if isinstance(error, float) else "",
                }
            )
    return found
