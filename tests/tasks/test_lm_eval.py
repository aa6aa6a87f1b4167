"""Any task of lm-eval runs here, and its numbers are those that lm-eval computes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.base import Generation, Unsupported
from models.loading import load
from results.statistics import corpus_draws
from runner.certificate import asked
from tasks import lm_eval_bridge
from tasks.base import Item, Unscored
from tasks.lm_eval import LmEval
from tasks.lm_eval_bridge import find_task, lm_eval
from tasks.lm_eval_model import GeneratorLM
from tests.runner.world import save_model
from tests.tasks.lm_eval_material import DOCUMENTS, write_tasks

KINDS = ("tiny_choice", "tiny_write", "tiny_cloze", "tiny_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def outputs(folder: str, model: Any) -> dict[str, dict[str, Generation]]:
    """Return what the model answers to every item of every task."""
    found: dict[str, dict[str, Generation]] = {}
    for name in KINDS:
        task = LmEval(task=name, folder=folder)
        found[name] = {item.id: task.call(model, item) for item in task.items()}
    return found


@pytest.fixture(scope="module")
def theirs(folder: str, model: Any) -> dict[str, Any]:
    """Return lm-eval's own results with the same model."""
    from runner.lm_eval_run import evaluate, find_tasks

    with lm_eval():
        return evaluate(GeneratorLM(model), find_tasks(KINDS, folder))


@pytest.mark.parametrize("name", KINDS)
def test_scores_and_corpus_numbers_are_lm_evals_own(
    name: str, folder: str, outputs: dict[str, Any], theirs: dict[str, Any]
) -> None:
    task = LmEval(task=name, folder=folder)
    items = {item.id: item for item in task.items()}
    texts = {key: each.text for key, each in outputs[name].items()}
    draws = corpus_draws(DOCUMENTS)
    corpus = task.corpus(texts, draws)
    reported = theirs["results"][name]
    for metric in task.metrics:
        plain, _, filter_name = metric.name.partition(",")
        expected = reported[f"{plain},{filter_name or 'none'}"]
        if metric.kind == "corpus":
            assert corpus[metric.name][0] == pytest.approx(expected, rel=1e-9)
            assert corpus[metric.name].shape == (len(draws),)
            assert np.isfinite(corpus[metric.name]).all()
        else:
            scores = [task.score(items[key], text)[metric.name] for key, text in texts.items()]
            assert np.mean([float(score) for score in scores]) == pytest.approx(expected)
    assert len(task.metrics) == 2


def test_each_kind_is_answered_in_its_own_form(outputs: dict[str, Any]) -> None:
    first = {name: next(iter(outputs[name].values())) for name in KINDS}
    assert first["tiny_write"].text.startswith("t")
    assert len(json.loads(first["tiny_choice"].text)) == 4
    [[nats, is_greedy]] = json.loads(first["tiny_cloze"].text)
    assert nats < 0
    assert is_greedy in (True, False)
    [nats] = json.loads(first["tiny_text"].text)
    assert nats < 0
    # One token each of the choices with one word, two and three of the others.
    assert len(first["tiny_choice"].token_ids) == 1 + 1 + 2 + 3
    # The context is read once, and a choice of one token needs no forward of its own.
    trace = first["tiny_choice"].trace
    assert [each.width for each in trace.prefill] == [3]
    assert [each.width for each in trace.forwards] == [1, 2]
    assert trace.flops > 0


def test_items_and_conditions_name_what_decides_a_score(folder: str) -> None:
    task = LmEval(task="tiny_choice", folder=folder)
    items = list(task.items())
    assert [item.id for item in items] == [f"lm-eval/tiny_choice/{n}" for n in range(DOCUMENTS)]
    assert items[0].fields["target"] == "0"
    assert task.conditions()["scorer"].startswith("lm-eval 0.")
    assert task.conditions()["lm_eval_version"] == "tiny_choice 2.0"
    assert [metric.kind for metric in task.metrics] == ["binary", "binary"]
    assert LmEval(task="tiny_text", folder=folder).metrics[1].higher_is_better is False
    warm = list(task.warmup_items())
    assert len(warm) == 4
    assert not {json.dumps(each.fields["requests"]) for each in warm} & {
        json.dumps(each.fields["requests"]) for each in items
    }


def test_few_shot_examples_stand_in_front_and_change_the_content(folder: str) -> None:
    task = LmEval(task="tiny_choice", folder=folder)
    shots = LmEval(task="tiny_choice", folder=folder, num_fewshot=2)
    plain, shown = (next(iter(each.items())).fields["requests"][0][0] for each in (task, shots))
    assert shown.endswith(plain)
    assert shown.count("\n\n") == 2
    assert task.content_hash() != shots.content_hash()


def test_the_certificate_sees_what_is_asked(folder: str, model: Any) -> None:
    write, choice = (LmEval(task=name, folder=folder) for name in ("tiny_write", "tiny_choice"))
    items = list(write.items())
    question = asked(write, model, items[0])
    assert question is not None
    assert question.decoding.stop == ("t5",)
    assert question.decoding.max_new_tokens == 12
    # 256 positions less 12 new tokens; the context is cut at its left.
    long = asked(write, model, items[-1])
    assert long is not None
    assert len(long.prompt_ids) == 244
    assert long.prompt_ids == model.tokenizer.encode(items[-1].fields["requests"][0][0])[-244:]
    assert asked(choice, model, next(iter(choice.items()))) is None


def test_an_answer_without_a_number_is_unscored(folder: str) -> None:
    task = LmEval(task="tiny_cloze", folder=folder)
    item = next(iter(task.items()))
    assert task.score(item, "[[-2.5, true]]") == {"acc": 1.0}
    assert task.score(item, "[[-2.5, false]]") == {"acc": 0.0}
    other = Item(item.id, {**item.fields, "document": 1})
    assert not isinstance(task.score(other, "[[-1.0, true]]")["acc"], Unscored)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tiny_choise", ValueError, "no task 'tiny_choise'. The nearest names: tiny_choice"),
        ("tiny", ValueError, "'tiny' is a group of several tasks"),
        ("tiny_code", Unsupported, "runs generated code without a sandbox"),
        ("tiny_votes", Unsupported, "scores 3 answers to each question together"),
        ("", ValueError, "must be the name of a task of lm-eval"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(
    name: str,
    error: type[Exception],
    message: str,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only the folder: lm-eval's own thousands of files take seconds to look through.
    monkeypatch.setattr(lm_eval_bridge, "find_spec", lambda name: None)
    with pytest.raises(error, match=message):
        list(LmEval(task=name, folder=folder).items())


def test_data_that_are_neither_local_nor_cached_are_asked_of_no_network(tmp_path: Path) -> None:
    text = "task: far\ndataset_path: nobody/nothing\noutput_type: generate_until\ntest_split: t\n"
    (tmp_path / "far.yaml").write_text(text)
    with pytest.raises(Unsupported, match="lm-eval's 'far' cannot be loaded"):
        list(LmEval(task="far", folder=str(tmp_path)).items())


def test_lm_evals_own_tasks_are_found_by_the_text_of_their_files() -> None:
    assert find_task("gsm8k", "").name == "gsm8k.yaml"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, "top_p=0.9"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"max_gen_toks": 256}, "asks for 256 new tokens, and a text may have 256"),
    ],
)
def test_generation_that_is_not_ours_is_refused(settings: Any, message: str, model: Any) -> None:
    with pytest.raises(Unsupported, match=message):
        GeneratorLM(model).question("t3", settings)


def test_sampling_is_asked_with_its_temperature_and_another_seed_each_time(model: Any) -> None:
    asking = GeneratorLM(model, seed=5)
    settings = {"do_sample": True, "temperature": 0.7, "until": "t9", "max_gen_toks": 8}
    first, second = (asking.question("t3 t4", settings).decoding for _ in range(2))
    assert (first.temperature, first.seed, second.seed, first.stop) == (0.7, 5, 6, ("t9",))
    idle = {"do_sample": False, "top_p": 0.9, "max_gen_toks": 8}
    assert asking.question("t3", idle).decoding.temperature == 0
