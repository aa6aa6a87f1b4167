"""Two methods on one model: which pairs there are, what they write, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hardware import detect
from methods.base import Method, Output
from models.attention import AttentionLM, PromptMarks, Rule, takes_marks
from models.base import Decoding, Generation, Trace, Unsupported
from models.decode import accounts_itself
from results import tables
from results.store import Store
from results.tables import connect, rows_of
from results.verify import verify
from runner.conformance import conformance
from runner.describe import describe, describe_cell
from runner.execute import execute
from runner.indexing import update_index
from runner.keys import digest, method_source
from runner.plan import make_plan
from runner.registry import Registry
from runner.request import Request, UsageError
from runner.stacking import ImpossibleStack, Stack, make_method, source_of
from tests.models.tiny import tiny_model
from tests.runner.forked import forked_workers
from tests.runner.world import PLUGIN, save_model

PROMPT = [5, 17, 3, 88, 41, 2, 9, 63, 12, 30, 77, 51, 8, 33, 90, 24, 5, 17, 3, 88, 41, 2, 9]
LONG = Decoding(max_new_tokens=48)
SNAPKV, LOOKUP = "snapkv:budget=12,window=4", "prompt-lookup"
BOTH = f"{SNAPKV}+{LOOKUP}"
TASK = "parity:num_items=6,max_new_tokens=24"


def written(text: str, decoding: Decoding = LONG) -> Generation:
    """Return what a tiny model writes with a method."""
    method = make_method(text, Registry()).method
    with method.apply(tiny_model(), detect.select("auto")) as changed:
        return changed.generate(PROMPT, decoding)


# --- what a stack writes, and what it costs ------------------------------------------------------


def test_speculation_on_a_compressed_cache_writes_its_text_in_fewer_forwards():
    for first in (SNAPKV, "tidaldecode:budget=12"):
        alone, both = written(first), written(f"{first}+{LOOKUP}")
        assert both.token_ids == alone.token_ids
        assert len(both.trace.forwards) < len(alone.trace.forwards)
        assert both.trace.accepted_drafts > 0
    assert written(SNAPKV).token_ids != written(LOOKUP).token_ids  # the rule is at work in both


@pytest.mark.parametrize("drafting", [LOOKUP, "speculative:draft=layers:1,num_draft_tokens=3"])
def test_where_nothing_is_dropped_a_rule_under_a_loop_counts_what_the_loop_counts(drafting: str):
    alone = written(drafting).trace
    both = written(f"snapkv:budget=200+{drafting}").trace
    assert both.notes["kept_ratio"] == 1  # a rule ran, and read every row
    assert [forward.width for forward in both.forwards] == [f.width for f in alone.forwards]
    assert both.flops == pytest.approx(alone.flops, rel=1e-12)
    assert both.kv_bytes == alone.kv_bytes
    assert both.draft_forwards == alone.draft_forwards


def test_a_rule_under_a_loop_is_charged_for_the_rows_that_it_reads_and_no_others():
    trace = written(BOTH).trace
    layers, sides, width, item_bytes = 3, 2, 2 * 16, 4
    kept, committed, rows = 12, 0, 0  # the prompt is cut down to the budget
    for forward, accepted in zip(trace.forwards, trace.accepted, strict=True):
        rows += kept + committed + forward.width
        committed += 1 + accepted
    assert trace.notes["decode_kv_bytes"] == rows * layers * sides * width * item_bytes
    assert trace.kv_bytes < written(LOOKUP).trace.kv_bytes


def test_a_wrapper_passes_on_marks_and_accounts_of_what_it_wraps():
    marks = PromptMarks(evidence=(0, 1, 2))
    method = make_method(BOTH, Registry()).method
    with method.apply(tiny_model(), detect.select("auto")) as changed:
        assert takes_marks(changed)
        assert accounts_itself(changed)
        changed.mark(marks)
        notes = changed.generate(PROMPT, LONG).trace.notes
    assert 0 < float(notes["evidence_kept"]) < 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("h2o:budget=12+prompt-lookup", "takes one token a step: a rejected draft could not"),
        ("snapkv:budget=12,window=4+token-recycling", "verifies chains of drafts; a tree of"),
    ],
)
def test_what_only_shows_when_it_runs_is_refused_by_the_capability(text: str, reason: str):
    with pytest.raises(Unsupported, match=reason):
        written(text)


@dataclass(frozen=True, kw_only=True)
class Named(Method[Any]):
    """Tells when it is applied and taken off, and what it was given."""

    label: str
    events: list[str]
    promise: Output = Output.IDENTICAL
    output = Output.IDENTICAL
    capability = "TextGenerator"

    @contextmanager
    def apply(self, model: Any, hardware: Any) -> Iterator[Any]:
        self.events.append(f"+{self.label} on {model}")
        try:
            yield f"{self.label}({model})"
        finally:
            self.events.append(f"-{self.label}")

    def reset_state(self) -> None:
        self.events.append(f"reset {self.label}")

    def declared_output(self, temperature: float) -> Output:
        return self.promise


def test_parts_are_applied_in_order_and_taken_off_in_the_other_one_whatever_happens():
    events: list[str] = []
    parts = tuple(Named(label=label, events=events) for label in ("a", "b"))
    stack = Stack(names=("a", "b"), parts=parts)

    def breaks() -> None:
        with stack.apply("model", detect.select("auto")) as changed:
            assert changed == "b(a(model))"
            raise KeyError

    with pytest.raises(KeyError):
        breaks()
    assert events == ["+a on model", "+b on a(model)", "-b", "-a"]
    stack.reset_state()
    assert events[4:] == ["reset a", "reset b"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_stack_promises_what_the_weakest_part_promises(order: tuple[int, int]):
    promises = [Output.SAME_DISTRIBUTION, Output.IDENTICAL]
    parts = [Named(label="x", events=[], promise=promises[place]) for place in order]
    stack = Stack(names=("a", "b"), parts=tuple(parts))
    assert stack.declared_output(0.5) is Output.SAME_DISTRIBUTION
    made = make_method(BOTH, Registry()).method
    assert made.output is made.declared_output(0) is Output.APPROXIMATE


# --- names and pairs -----------------------------------------------------------------------------


def test_a_stack_is_named_and_keyed_by_all_of_its_parts():
    registry = Registry()
    made = make_method(" snapkv:window=4,budget=12 + prompt-lookup:num_tokens=10", registry)
    assert (made.spec, made.name) == (
        "snapkv:budget=12,window=4+prompt-lookup",
        "snapkv+prompt-lookup",
    )
    assert made.parts == ("snapkv:budget=12,window=4", "prompt-lookup")
    assert make_method(made.spec, registry) == made
    assert made.method.parameters()["snapkv"]["budget"] == 12
    assert made.method.parameters()["prompt-lookup"]["num_tokens"] == 10
    own = [method_source(registry.find("method", name).source) for name in made.name.split("+")]
    assert source_of(made.name, registry) == digest(own)
    assert source_of("snapkv", registry) == own[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("snapkv+h2o", "both are of the family 'sparse_attention'"),
        ("autoregressive+prompt-lookup", "'autoregressive' is a baseline"),
        ("snapkv+hf-prompt-lookup", "'hf-prompt-lookup' is a peer"),
        (
            "hiprune+prompt-lookup",
            "'hiprune' changes a VisionLanguageModel, 'prompt-lookup' a Text",
        ),
        ("wedlm+prompt-lookup", "both have a loop of their own"),
        ("prompt-lookup+snapkv:budget=64", r"write 'snapkv:budget=64\+prompt-lookup'"),
        ("snapkv+token-recycling:state=session", "'token-recycling' keeps state .* set state=cold"),
        ("snapkv+prompt-lookup+wedlm", "a stack has two parts, got 3"),
    ],
)
def test_an_impossible_pair_is_refused_with_the_reason(text: str, reason: str):
    with pytest.raises(ImpossibleStack, match=reason):
        make_method(text, Registry())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("snapkv+prompt-lookp", "Did you mean 'prompt-lookup'"),
        ("snapkv:budget=0+prompt-lookup", "method 'snapkv': budget must be a whole number of at"),
        ("+snapkv", "'' is no spec"),
        ("snapkv:pooling=max+b", "no method named 'b'.* in a value it stands in double quotes"),
    ],
)
def test_a_slip_in_a_stack_is_told_as_one(text: str, reason: str):
    with pytest.raises(UsageError, match=reason) as caught:
        make_method(text, Registry())
    assert not isinstance(caught.value, ImpossibleStack)


def test_every_method_says_truly_whether_it_owns_the_loop():
    # Whoever writes the text with sessions of what it was given loses its loop below another
    # wrapper, silently: only sessions are asked of it there.
    registry, model, seen = Registry(), tiny_model(), set()
    for name, entry in registry.entries("method").items():
        if entry.status != "ready" or entry.family not in ("decoding", "sparse_attention"):
            continue
        cls = registry.load_method(name)
        if cls.role == "peer":
            continue
        method = cls(**cls.trial)
        with method.apply(model, detect.select("auto")) as changed:
            has_own_sessions = type(changed.session(8)) is not type(model.session(8))
            assert method.owns_loop is not has_own_sessions, name
        seen.add(method.owns_loop)
    assert seen == {True, False}


# --- planning and measuring ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A suite's request of a factorial design with an impossible pair; it was measured once."""
    folder = tmp_path_factory.mktemp("stacking")
    request = Request(
        methods=(
            "autoregressive",
            SNAPKV,
            LOOKUP,
            BOTH,
            "snapkv+h2o",
            "h2o:budget=4+prompt-lookup",
        ),
        tasks=(TASK,),
        models=(save_model(folder / "model"),),
        store=folder / "store",
        plugins=(PLUGIN,),
        repeats=2,
    )
    with forked_workers():
        execute(make_plan(request), lambda event: None)
    update_index(request.store, Registry(request.plugins))
    return request


def test_a_stack_is_measured_beside_its_parts_and_has_an_interaction(asked: Request):
    index = Store(asked.store).index_path
    with connect(index) as connection:
        [row] = rows_of(
            connection.execute(
                "SELECT i.*, f.spec AS first, s.spec AS second, b.spec AS stack, "
                "b.tokens_per_forward AS both_rate, s.tokens_per_forward AS second_rate "
                "FROM interactions i JOIN comparison b USING (experiment_id, cell_id) "
                "JOIN comparison f ON f.cell_id = i.first_cell "
                "JOIN comparison s ON s.cell_id = i.second_cell"
            )
        )
    assert (row["first"], row["second"], row["stack"]) == (SNAPKV, LOOKUP, BOTH)
    assert row["items"] == row["as_first"] == 6
    # Neither a baseline nor a rule drafts, so the rates are those of the two that do.
    assert row["tokens_per_forward"] == pytest.approx(row["both_rate"] / row["second_rate"])
    assert row["speed_low"] < row["speed"] < row["speed_high"]
    assert row["speed_verdict"]
    # Texts are those of the first part, and of the baseline without it: nothing was sampled.
    assert (row["quality"], row["quality_verdict"]) == (0, "SAME")
    assert verify(asked.store) == []


def test_an_impossible_pair_of_a_suite_is_skipped_and_that_of_a_user_an_error(asked: Request):
    plan = make_plan(replace(asked, fresh=True))
    [skipped] = plan.skipped
    assert skipped["method"] == "snapkv+h2o"
    assert "both are of the family" in skipped["reason"]
    assert len(plan.experiments[0].cells) == 5
    with pytest.raises(ImpossibleStack, match="both are of the family"):
        make_plan(replace(asked, names_methods=True))


def test_what_is_refused_when_applied_is_the_cells_own_status(asked: Request):
    [table] = tables.comparison_tables(Store(asked.store).index_path)
    status = {row["spec"]: row["status"] for row in table.data}
    assert status.pop("h2o:budget=4+prompt-lookup") == "unsupported"
    assert set(status.values()) == {"ok"}
    [below] = table.below
    assert [row[0] for row in below.rows] == [BOTH]
    assert below.rows[0][-1] == "6 of 6"


def test_a_finished_stack_is_not_measured_again(asked: Request):
    plan = make_plan(asked)
    assert not plan.experiments
    assert BOTH in {cell["method"] for cell in plan.cached}


def test_a_stack_is_measured_with_its_parts_though_they_are_there_already(asked: Request):
    # Ratios are taken within one process, and an interaction is a ratio of four.
    other = replace(
        asked, methods=("autoregressive", SNAPKV, LOOKUP, f"snapkv:budget=6,window=4+{LOOKUP}")
    )
    [spec] = make_plan(other).experiments
    assert [cell.method for cell in spec.cells] == [
        "autoregressive",
        LOOKUP,
        f"snapkv:budget=6,window=4+{LOOKUP}",
    ]
    assert {cell["method"] for cell in make_plan(other).cached} == {SNAPKV}


def test_a_stack_alone_is_measured_and_its_missing_interaction_said(tmp_path: Path, asked: Request):
    request = replace(asked, methods=("autoregressive", BOTH), store=tmp_path / "store", repeats=1)
    with forked_workers():
        execute(make_plan(request), lambda event: None)
    [table] = tables.comparison_tables(update_index(request.store, Registry(request.plugins)))
    assert not table.below
    assert f"{BOTH}: no interaction: not both of its parts were measured beside it." in table.notes


def test_sessions_opened_for_another_text_are_not_counted_as_this_ones():
    model = AttentionLM(tiny_model(), Rule)
    first = model.generate(PROMPT, LONG).trace
    again = model.generate(PROMPT, LONG).trace
    assert again.flops == first.flops
    assert isinstance(first, Trace)


def test_a_stack_keeps_the_contract_of_a_method():
    checks = conformance("snapkv+prompt-lookup", Registry())
    assert len(checks) == 13
    assert [check for check in checks if not check.ok] == []
    settings = next(check.detail for check in checks if check.name == "settings survive JSON")
    assert json.loads(settings)["snapkv"]["budget"] == 5  # its trial: the model's prompts are short


def test_a_stack_is_described_by_its_parts():
    facts, parts = describe(Registry(), "method", BOTH)
    assert {"key": "output", "value": "approximate"} in facts.rows
    assert [row["part"] for row in parts.rows] == [SNAPKV, LOOKUP]
    with pytest.raises(ImpossibleStack, match="both are of the family"):
        describe(Registry(), "method", "snapkv+h2o")


def test_a_measured_stack_is_shown_like_any_cell(asked: Request):
    index = Store(asked.store).index_path
    facts, *others = describe_cell(index, "snapkv+prompt-lookup@parity")
    shown = {row["key"]: row["value"] for row in facts.rows}
    assert shown["spec"] == BOTH
    assert shown["output check"] == "approximate"
    [beside] = [each for each in others if each.title == "Beside its parts alone"]
    found = {row["number"]: row for row in beside.rows}
    assert next(iter(found)) == "interaction of speed-up"
    assert found["interaction of quality"]["verdict"] == "SAME"
    assert {row["items"] for row in beside.rows} == {"6"}
    by_spec = describe_cell(index, f"{BOTH}@parity")
    assert [each.title for each in by_spec] == [facts.title, *(each.title for each in others)]
    sections = describe_cell(index, f"{LOOKUP}@parity")
    assert "Beside its parts alone" not in [each.title for each in sections]
