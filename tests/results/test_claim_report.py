"""Papers with their verdicts, in every format, whatever stands in a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from results.claim_report import (
    FORMATS,
    HEADINGS,
    PaperReport,
    badge_json,
    badge_svg,
    render,
    summary,
    write_badges,
)
from results.claims import VERDICTS, Settled, Verdict

HOSTILE = '<script>"a" & b|c\x1b[31m'


def make_report(*verdicts: Verdict, **changes: Any) -> PaperReport:
    claims = [
        {"method": "fast", "id": f"F-{at}", "metric": HOSTILE, "value": "2x", "baseline": "plain"}
        for at, _ in enumerate(verdicts)
    ]
    settled = [
        Settled(
            method="fast",
            claim_id=f"F-{at}",
            verdict=verdict,
            detail=f"because of {HOSTILE}",
            missing=["weights: a model"],
            command="python run.py reproduce fast",
            measured=float("nan") if at else 1.5,
        )
        for at, verdict in enumerate(verdicts)
    ]
    return PaperReport(
        **{
            "method": "fast",
            "title": f"Fast {HOSTILE}",
            "arxiv": "2401.00001",
            "status": "ready",
            "claims": claims,
            "settled": settled,
            **changes,
        }
    )


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_holds_every_claim_with_its_verdict_and_command(format: str):
    written = render([make_report(*VERDICTS)], format)
    for at, verdict in enumerate(VERDICTS):
        assert f"F-{at}" in written
        assert verdict in written
    assert written.count("python run.py reproduce fast") == len(VERDICTS)
    assert "\x1b" not in written.replace("\\u001b", "")


def test_a_page_shows_hostile_text_and_runs_none_of_it():
    page = render([make_report("direction")], "html")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<tr>") == 2
    assert "https://arxiv.org/abs/2401.00001" in page


def test_a_table_row_of_markdown_keeps_its_cells():
    lines = render([make_report("direction", "reproduced")], "md").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    bars = {line.replace("\\|", "").count("|") for line in table}
    assert bars == {len(HEADINGS) + 1}


def test_json_is_strict_and_keeps_claim_and_verdict_together():
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (paper,) = json.loads(
        render([make_report("direction", "reproduced")], "json"), parse_constant=refuse
    )
    assert paper["verdicts"] == {"reproduced": 1, "direction": 1}
    assert [claim["verdict"] for claim in paper["claims"]] == ["direction", "reproduced"]
    assert [claim["measured"] for claim in paper["claims"]] == [1.5, "nan"]
    assert paper["claims"][0]["metric"] == HOSTILE


def test_a_format_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'pdf'"):
        render([], "pdf")


@pytest.mark.parametrize(
    ("verdicts", "louder"),
    [
        (("reproduced", "not-reproduced"), "not-reproduced"),
        (("not-testable-here", "direction", "exceeds-bound"), "exceeds-bound"),
        (("not-testable-here", "direction", "reproduced"), "reproduced"),
        (("not-testable-here",), "not-testable-here"),
    ],
)
def test_a_badge_has_the_colour_of_its_loudest_verdict(
    verdicts: tuple[Verdict, ...], louder: Verdict
):
    assert make_report(*verdicts).colour == make_report(louder).colour


def test_trouble_and_success_do_not_look_alike():
    colours = {make_report(each).colour for each in ("reproduced", "not-reproduced", "direction")}
    assert len(colours) == 3


def test_a_badge_is_an_image_that_can_be_read_aloud():
    image = ElementTree.fromstring(badge_svg(make_report("direction", "direction", "reproduced")))
    names = "{http://www.w3.org/2000/svg}"
    title = image.find(f"{names}title")
    assert title is not None
    assert title.text == image.get("aria-label") == "claims: 1 reproduced, 2 direction"
    widths = [float(each.get("width", 0)) for each in image.findall(f"{names}rect")]
    assert sum(widths) == float(image.get("width", 0))
    # No letter of the message stands outside its box, as wide as letters get on the average.
    assert widths[1] > 6 * len("1 reproduced, 2 direction")


def test_badges_are_files_in_both_forms(tmp_path: Path):
    report = make_report("direction")
    paths = write_badges([report], tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["fast.svg", "fast.json"]
    assert paths[0].read_text(encoding="utf-8") == badge_svg(report)
    content = json.loads(badge_json(report))
    assert (content["schemaVersion"], content["message"]) == (1, "1 direction")


def test_the_summary_counts_papers_claims_and_verdicts():
    found = summary([make_report("direction", "reproduced"), make_report("direction")])
    assert found == "2 papers, 3 claims: 1 reproduced, 2 direction"
    assert summary([]) == "0 papers, 0 claims: none"


def test_long_claims_are_cut_for_a_terminal_and_reasons_are_not():
    report = make_report("direction")
    long = [{**dict(report.claims[0]), "value": "x" * 100}]
    (row,) = make_report("direction", claims=long).short_rows()
    assert row["claimed"] == "x" * 43 + "…"
    assert row["why"].endswith("Run: python run.py reproduce fast")
