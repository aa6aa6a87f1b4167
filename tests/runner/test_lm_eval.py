"""lm-eval runs our models with our methods, and gets what its own `hf` model gets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import run as command_line
from results.verify import verify
from runner import lm_eval_model
from runner.execute import execute
from runner.indexing import update_index
from runner.lm_eval_model import Tokenmark
from runner.lm_eval_run import evaluate, find_tasks, make_model
from runner.plan import make_plan
from runner.registry import Registry
from runner.request import Request, UsageError
from tasks.lm_eval_bridge import lm_eval
from tests.runner.forked import forked_workers
from tests.runner.world import save_model
from tests.tasks.lm_eval_material import DOCUMENTS, write_tasks

KINDS = ("tiny_choice", "tiny_write", "tiny_cloze", "tiny_text")
METHODS = ("token-recycling:tree_nodes=auto", "streaming-llm:budget=1000")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the id of a tiny model with real files, and a folder of tasks."""
    folder = tmp_path_factory.mktemp("lm-eval")
    (folder / "tasks").mkdir()
    return save_model(folder / "model"), write_tasks(folder / "tasks")


@pytest.fixture(scope="module")
def theirs(world: tuple[str, str]) -> Any:
    """Return lm-eval's own model of transformers over the same files."""
    with lm_eval():
        return HFLM(
            pretrained=world[0].removeprefix("path:"), device="cpu", dtype="float32", batch_size=1
        )


@pytest.fixture(scope="module")
def ours(world: tuple[str, str]) -> Tokenmark:
    return make_model(model=world[0], offline=True)


@pytest.fixture(autouse=True, scope="module")
def _short_calibration() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_model, "CALIBRATION_SECONDS", 0.2)
        yield


def evaluated(model: Any, folder: str, *tasks: str, **options: Any) -> dict[str, Any]:
    with lm_eval():
        return evaluate(model, find_tasks(tasks, folder), **options)


def responses(results: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in results["samples"][task]]


def instances(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


def test_the_numbers_are_those_of_lm_evals_own_model(
    world: tuple[str, str], ours: Tokenmark, theirs: Any
) -> None:
    got, expected = (evaluated(model, world[1], *KINDS) for model in (ours, theirs))
    assert responses(got, "tiny_write") == responses(expected, "tiny_write")
    assert len({text for ((text,),) in responses(got, "tiny_write")}) > 1
    for task in ("tiny_choice", "tiny_cloze"):
        for mine, other in zip(responses(got, task), responses(expected, task), strict=True):
            for ((nats, is_greedy),), ((their_nats, their_greedy),) in zip(
                mine, other, strict=True
            ):
                assert float(nats) == pytest.approx(float(their_nats), abs=1e-4)
                assert is_greedy == their_greedy
    for (mine,), (other,) in zip(
        responses(got, "tiny_text"), responses(expected, "tiny_text"), strict=True
    ):
        assert float(mine[0]) == pytest.approx(float(other[0]), rel=1e-6)
    for task in KINDS:
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                assert got["results"][task][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_a_lossless_method_gives_the_baselines_answers(
    world: tuple[str, str], ours: Tokenmark, method: str
) -> None:
    plain = evaluated(ours, world[1], "tiny_write", "tiny_choice", limit=3)
    model = make_model(model=world[0], method=method, offline=True)
    changed = evaluated(model, world[1], "tiny_write", "tiny_choice", limit=3)
    assert responses(changed, "tiny_write") == responses(plain, "tiny_write")
    for mine, other in zip(
        responses(changed, "tiny_choice"), responses(plain, "tiny_choice"), strict=True
    ):
        for ((nats, _),), ((expected, _),) in zip(mine, other, strict=True):
            assert float(nats) == pytest.approx(float(expected), abs=1e-3)


def test_a_method_that_forgets_changes_loglikelihoods_and_is_read_as_it_decodes(
    world: tuple[str, str], ours: Tokenmark
) -> None:
    forgetful = make_model(model=world[0], method="streaming-llm:budget=8,sinks=2", offline=True)
    asked = instances("loglikelihood", ("t3 t4 t5 t6 t7 t8 t9 t11 t12 t13", " t20 t21 t22 t23"))
    ((nats, _),) = forgetful.loglikelihood(asked, disable_tqdm=True)
    ((plain, _),) = ours.loglikelihood(asked, disable_tqdm=True)
    assert abs(nats - plain) > 1e-2
    steps = forgetful.trace.forwards
    assert [forward.width for forward in steps] == [1, 1, 1]


def test_settings_of_a_method_may_follow_as_arguments_of_their_own(world: tuple[str, str]) -> None:
    # As lm-eval reads `method=token-recycling:tree_nodes=16,candidates=4,skip_unknown=true`.
    text = f"model={world[0]},method=token-recycling:tree_nodes=16,candidates=4,skip_unknown=true"
    with lm_eval():
        model = Tokenmark.create_from_arg_string(text, {"batch_size": 8, "device": "cpu"})
    assert model.facts["spec"] == "token-recycling:candidates=4,skip_unknown=true,tree_nodes=16"
    assert model.profile.step_cost is not None
    assert model.key() != make_model(model=world[0], offline=True).key()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "prompt-lookop"}, "Did you mean 'prompt-lookup'"),
        ({"method": "localleap"}, "changes a MaskedDiffusionLM"),
        ({"model": "path:/nowhere"}, "no model in /nowhere"),
        ({"method": "prompt-lookup", "num_token": 3}, "Did you mean 'num_tokens'"),
    ],
)
def test_arguments_that_are_wrong_are_refused_with_the_reason(
    world: tuple[str, str], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_model(**{"model": world[0], "offline": True, **arguments})


def test_answers_are_kept_by_model_and_method(
    world: tuple[str, str], ours: Tokenmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(ours, world[1], "tiny_write", limit=2, cache=tmp_path)
    monkeypatch.setattr(type(ours.generator), "generate", None)  # nobody is asked again
    assert responses(
        evaluated(ours, world[1], "tiny_write", limit=2, cache=tmp_path), "tiny_write"
    ) == (responses(first, "tiny_write"))
    assert [path.name[:16] for path in tmp_path.iterdir()] == [ours.key()]


def test_the_command_stores_lm_evals_scores_with_the_scorer(
    world: tuple[str, str], ours: Tokenmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = tmp_path / "store", tmp_path / "out.json"
    arguments = ["lm-eval", "--model", world[0], "--folder", world[1], "--offline"]
    arguments += ["--task", "tiny_choice", "--task", "tiny_text", "--method", "prompt-lookup"]
    assert command_line.main([*arguments, "--out", str(out), "--store", str(store)]) == 0
    printed = capsys.readouterr().out
    assert "acc_norm" in printed
    results = json.loads(out.read_text())
    with duckdb.connect(str(store / "tokenmark.duckdb"), read_only=True) as index:
        rows = index.execute(
            "SELECT task, method, metric, quality, scorer, items, speedup, seconds_per_item "
            "FROM comparison ORDER BY task_params ->> 'task'"
        ).fetchall()
    scorer = f"lm-eval {results['lm_eval_version']}"
    accuracy = results["results"]["tiny_choice"]["acc,none"]
    perplexity = results["results"]["tiny_text"]["word_perplexity,none"]
    about = ("lm-eval", "prompt-lookup")
    assert rows == [
        (*about, "acc", pytest.approx(accuracy), scorer, DOCUMENTS, None, None),
        (*about, "word_perplexity", pytest.approx(perplexity), scorer, DOCUMENTS, None, None),
    ]
    assert verify(store) == []
    # The same file again brings nothing new, in this store or in another one.
    assert command_line.main(["ingest", str(out), "--store", str(store)]) == 0
    assert "0 new experiments" in capsys.readouterr().out
    assert command_line.main(["ingest", str(out), "--store", str(tmp_path / "other")]) == 0
    assert "2 new experiments" in capsys.readouterr().out


def test_a_task_of_lm_eval_is_measured_like_any_other(
    world: tuple[str, str], tmp_path: Path
) -> None:
    request = Request(
        methods=("autoregressive", "prompt-lookup"),
        tasks=(f"lm-eval:tiny_write,folder={world[1]}",),
        models=(world[0],),
        limit=2,
        store=tmp_path,
        offline=True,
    )
    plan = make_plan(request)
    plan.experiments[:] = [
        dataclasses.replace(spec, calibration_seconds=0.2) for spec in plan.experiments
    ]
    with forked_workers():
        assert execute(plan, lambda event: None).failed == 0
    with duckdb.connect(str(update_index(tmp_path, Registry())), read_only=True) as index:
        rows = index.execute(
            "SELECT method, output_check, scorer LIKE 'lm-eval 0%', speedup > 0, metric "
            "FROM comparison ORDER BY method"
        ).fetchall()
    assert rows == [
        (name, "identical", True, True, "exact_match,first")
        for name in ("autoregressive", "prompt-lookup")
    ]


def test_an_unknown_task_is_refused_with_the_nearest_names(world: tuple[str, str]):
    # The task and the group beside it are known.
    with pytest.raises(UsageError, match=r"has no task 'mmlo'.*the group 'mmlu'"):
        find_tasks(["tiny_choice", "mmlu", "mmlo"], world[1])
    assert find_tasks(["tiny_choice"], world[1]).specs[0].endswith(".yaml")
