"""A masked-diffusion model runs text tasks: planned, loaded, priced and judged as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.loading import capabilities
from runner.capabilities import taken_as
from runner.certificate import Asked, difference
from runner.plan import make_plan
from runner.request import Request
from runner.worker import calibrate
from tests.models.tiny_diffusion import save_tiny_llada, tiny_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llada")
    save_tiny_llada(path, layers=1)
    return path


@pytest.mark.parametrize(
    ("wanted", "offered", "taken"),
    [
        ("TextGenerator", ["MaskedDiffusionLM"], "MaskedDiffusionLM"),
        ("TextGenerator", ["MaskedDiffusionLM", "TextGenerator"], "TextGenerator"),
        ("TextGenerator", [], "TextGenerator"),
        ("TextEncoder", ["MaskedDiffusionLM"], "TextEncoder"),
        ("TextGenerator", ["TextEncoder", "unknown"], "TextGenerator"),
    ],
)
def test_a_model_is_taken_as_what_the_task_asks_for_or_as_what_answers_for_it(
    wanted: str, offered: list[str], taken: str
) -> None:
    assert taken_as(wanted, offered) == taken


def test_a_folder_says_that_it_holds_a_masked_diffusion_model(folder: Path) -> None:
    assert capabilities(f"path:{folder}") == ("MaskedDiffusionLM",)
    assert capabilities(f"path:{folder / 'nothing'}") == ()


def test_a_text_task_is_planned_with_the_methods_and_the_baseline_of_such_models(
    folder: Path, tmp_path: Path
) -> None:
    request = Request(
        methods=("threshold", "prompt-lookup"),
        tasks=("arithmetic-mini",),
        models=(f"path:{folder}",),
        limit=2,
        offline=True,
        names_methods=True,
        store=tmp_path,
    )
    plan = make_plan(request)
    assert [cell.name for cell in plan.experiments[0].cells] == ["low-confidence", "threshold"]
    (skipped,) = plan.skipped
    assert skipped["method"] == "prompt-lookup"
    assert skipped["reason"] == "it changes a TextGenerator, the task runs a MaskedDiffusionLM"


@pytest.mark.parametrize("is_shifted", [False, True])
def test_the_cost_of_a_forward_is_measured_by_width_and_by_what_stands_beside_it(
    is_shifted: bool,
) -> None:
    curve = calibrate(tiny_diffusion(is_shifted=is_shifted), 0.01, 0)
    assert (curve.widths[0], curve.contexts[0]) == (1, 0)
    assert all(seconds > 0 for row in curve.seconds for seconds in row)


def test_texts_that_differ_are_no_tie_where_no_logits_can_be_asked_for() -> None:
    found = difference(tiny_diffusion(), Asked([3], None), [4, 5], [4, 6])  # type: ignore[arg-type]  # not looked at
    assert found is not None
    assert found["verdict"] == "violation"
