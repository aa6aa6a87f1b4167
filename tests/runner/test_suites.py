from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from runner.registry import Registry
from runner.request import Request, UsageError
from runner.settings import build, parse_spec
from runner.stacking import make_method
from runner.suites import Suite, load_suite, make_request

GOOD = """
title = "A suite"
methods = ["autoregressive", "token-recycling:tree_nodes=8", "token-recycling:tree_nodes=32"]
models = ["smollm2-135m"]
repeats = 3
timeout = 60
scenario = "fixed-length"

[[task]]
spec = "humaneval:max_new_tokens=64"
limit = 5

[[task]]
spec = "humaneval-mini"
"""


@pytest.fixture
def suite(tmp_path: Path) -> str:
    path = tmp_path / "suite.toml"
    path.write_text(GOOD, encoding="utf-8")
    return str(path)


def test_a_suite_file_becomes_a_request(suite):
    assert make_request(Registry(), suite=suite) == Request(
        methods=(
            "autoregressive",
            "token-recycling:tree_nodes=8",
            "token-recycling:tree_nodes=32",
        ),
        tasks=("humaneval:max_new_tokens=64", "humaneval-mini"),
        models=("smollm2-135m",),
        limits={"humaneval:max_new_tokens=64": 5},
        repeats=3,
        timeout=60.0,
        scenario="fixed-length",
        label=suite,
    )


def test_every_field_of_a_request_that_a_suite_can_set_has_the_same_default():
    shared = {f.name: f for f in dataclasses.fields(Request)} | {}
    for each in dataclasses.fields(Suite):
        if each.name in shared and each.default is not dataclasses.MISSING:
            assert each.default == shared[each.name].default


def test_flags_win_over_the_suite(suite):
    request = make_request(
        Registry(),
        suite=suite,
        models=["path:/m"],
        hardware="l4",
        limit=2,
        seed=7,
        repeats=1,
        scenario="latency",
        timeout=9.0,
        store=Path("s"),
        fresh=True,
        offline=True,
    )
    assert request.models == ("path:/m",)
    assert (request.hardware, request.limit, request.seed, request.repeats) == ("l4", 2, 7, 1)
    assert (request.scenario, request.timeout, request.store) == ("latency", 9.0, Path("s"))
    assert request.fresh
    assert request.offline


def test_a_bare_name_stands_for_the_entries_of_a_named_suite(suite):
    request = make_request(
        Registry(), suite=suite, methods=["token-recycling"], tasks=["humaneval"]
    )
    assert request.methods == ("token-recycling:tree_nodes=8", "token-recycling:tree_nodes=32")
    assert request.tasks == ("humaneval:max_new_tokens=64",)
    assert request.limits == {"humaneval:max_new_tokens=64": 5}


def test_a_name_with_parameters_is_taken_as_it_is(suite):
    request = make_request(Registry(), suite=suite, methods=["token-recycling:tree_nodes=3"])
    assert request.methods == ("token-recycling:tree_nodes=3",)


def test_a_suite_needs_the_models_of_its_tasks_too(suite):
    Path(suite).write_text(GOOD + 'models = ["minilm-l6", "smollm2-135m"]\n', encoding="utf-8")
    needs = load_suite(suite, Registry()).needs()
    assert needs == ("smollm2-135m", "minilm-l6", "humaneval:max_new_tokens=64", "humaneval-mini")


def test_a_task_may_limit_a_method(suite):
    slow = "token-recycling:tree_nodes=32"
    Path(suite).write_text(
        GOOD.replace("limit = 5", f'limit = 5\nlimits = {{ "{slow}" = 2 }}'), encoding="utf-8"
    )
    limits = {"humaneval:max_new_tokens=64": {slow: 2}}
    assert make_request(Registry(), suite=suite).method_limits == limits
    assert make_request(Registry(), suite=suite, methods=[slow]).method_limits == limits
    assert make_request(Registry(), suite=suite, limit=4).method_limits == {}


def test_a_task_may_have_methods_and_a_limit_of_its_own(suite):
    path = Path(suite)
    path.write_text(
        GOOD + '\n[[task]]\nspec = "humaneval:temperature=0.8"\nlimit = 3\n'
        'methods = ["prompt-lookup"]\n'
    )
    request = make_request(Registry(), suite=suite)
    sampled = "humaneval:temperature=0.8"
    assert request.tasks == ("humaneval:max_new_tokens=64", "humaneval-mini", sampled)
    assert request.limits == {"humaneval:max_new_tokens=64": 5, sampled: 3}
    assert request.task_methods == {sampled: ("prompt-lookup",)}
    named = make_request(Registry(), suite=suite, methods=["token-recycling"])
    assert named.task_methods == {}
    path.write_text(path.read_text().replace('["prompt-lookup"]', '["prompt-lokup"]'))
    with pytest.raises(UsageError, match="Did you mean 'prompt-lookup'"):
        make_request(Registry(), suite=suite)


def test_a_task_in_another_form_has_the_methods_and_models_of_its_name(suite):
    Path(suite).write_text(
        GOOD
        + '\n[[task]]\nspec = "constrained-mini"\nmethods = ["awrs"]\nmodels = ["tiny-draft"]\n'
        '\n[[task]]\nspec = "humaneval:temperature=0.8"\nmethods = ["prompt-lookup"]\n'
    )
    other = "constrained-mini:max_new_tokens=9"
    request = make_request(Registry(), suite=suite, tasks=[other, "humaneval:prompt=raw"])
    assert request.methods_of(other) == ("awrs",)
    assert request.models_of(other) == ("tiny-draft",)
    # Two forms of humaneval disagree, so a third has what the suite says for all.
    assert request.methods_of("humaneval:prompt=raw") == request.methods
    assert request.models_of("humaneval:prompt=raw") == request.models


def test_without_a_named_suite_a_task_is_run_whole_and_as_it_is():
    request = make_request(Registry(), tasks=["humaneval"])
    assert request.tasks == ("humaneval",)
    assert request.limits == {}
    assert request.models == ("smollm2-135m",)
    assert request.label == ""


def test_no_flag_at_all_is_the_embedded_suite():
    assert make_request(Registry()) == make_request(Registry(), suite="embedded")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("methods =", "method =", "has no key 'method'. Did you mean 'methods'?"),
        ("repeats =", "repeat =", "has no key 'repeat'. Did you mean 'repeats'?"),
        ("spec =", "name =", "task[0] has no key 'name'"),
        ('models = ["smollm2-135m"]', "", "needs 'models'"),
        ('models = ["smollm2-135m"]', "models = []", "models is empty"),
        ('models = ["smollm2-135m"]', 'models = "smollm2-135m"', "models must be list of text"),
        ("repeats = 3", "repeats = 0", "repeats must be at least 1, got 0"),
        ("repeats = 3", "repeats = 1.5", "repeats must be int, got 1.5"),
        ("timeout = 60", "timeout = -1", "timeout must be a number of seconds above 0, got -1"),
        ("timeout = 60", "timeout = inf", "timeout must be a number of seconds above 0, got inf"),
        ("fixed-length", "fixed", "scenario must be latency or throughput or fixed-length"),
        ("limit = 5", "limit = 0", "limit must be at least 1, got 0"),
        (
            "limit = 5",
            "limit = 5\nlimits = { autoregressiv = 2 }",
            "tree_nodes=32, got 'autoregressiv'. Did you mean 'autoregressive'?",
        ),
        (
            "limit = 5",
            "limit = 5\nlimits = { autoregressive = 6 }",
            "limits.autoregressive must lie in [1, 5], got 6",
        ),
        ("limit = 5", 'limit = "5"', "limit must be int or none, got '5'"),
        (
            "humaneval-mini",
            "humaneval:max_new_tokens=64",
            "task 'humaneval:max_new_tokens=64' stands there twice",
        ),
        ('"humaneval-mini"', '"humaneval-mini"\nmethods = "prompt-lookup"', "methods must be list"),
        ("[[task]]", "[[task", "is no valid TOML"),
    ],
)
def test_a_wrong_suite_is_refused_with_the_reason(suite, old, new, message):
    path = Path(suite)
    assert old in GOOD
    path.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError) as error:
        make_request(Registry(), suite=suite)
    assert message in str(error.value)


def test_a_suite_that_does_not_exist_brings_the_nearest():
    with pytest.raises(UsageError, match=r"no suite named 'embeded'\. Did you mean 'embedded'\?"):
        make_request(Registry(), suite="embeded")
    with pytest.raises(UsageError, match=r"cannot read nowhere\.toml"):
        make_request(Registry(), suite="nowhere.toml")


def test_a_flag_out_of_range_is_refused():
    with pytest.raises(UsageError, match="timeout must be a number of seconds above 0, got 0"):
        make_request(Registry(), timeout=0.0)
    with pytest.raises(UsageError, match=r"scenario must be one of .* Did you mean 'throughput'\?"):
        make_request(Registry(), scenario="troughput")


def test_a_bare_stack_stands_for_the_suites_entry_and_each_part_is_looked_up():
    def methods(name: str) -> tuple[str, ...]:
        return make_request(Registry(), suite="stacking", methods=[name]).methods

    assert methods("snapkv+prompt-lookup") == ("snapkv:budget=72+prompt-lookup",)
    assert methods("snapkv") == ("snapkv:budget=72",)  # and not the stack that begins with it
    assert methods("snapkv+prompt-lookup:num_tokens=3") == ("snapkv+prompt-lookup:num_tokens=3",)
    with pytest.raises(UsageError, match="no method named 'prompt-lookp'"):
        methods("snapkv+prompt-lookp")


@pytest.mark.parametrize("name", Registry().entries("suite"))
def test_every_suite_of_the_tree_names_things_that_exist(name):
    registry = Registry()
    suite = load_suite(name, registry)
    for text in suite.methods:
        make_method(text, registry)
    for task in suite.task:
        spec = parse_spec(task.spec)
        build(registry.load_task(spec.name), spec.params, f"task {spec.name!r}")
    for model in suite.models:
        registry.find("model", parse_spec(model).name)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("45", 45), (" 1.5 H ", 5400)]
)
def test_a_budget_is_a_duration(text, seconds):
    assert make_request(Registry(), budget=text).budget == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3m", "0", "3d", "5 m 3 s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError, match="such as 90s, 30m or 2h"):
        make_request(Registry(), budget=text)


def test_without_a_budget_there_is_no_limit():
    assert make_request(Registry()).budget is None
