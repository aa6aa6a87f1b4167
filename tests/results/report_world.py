"""A store for pages to be made of, where everybody who may choose a text chose a hostile one."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from results.claim_report import PaperReport
from results.claims import Settled
from results.ingest import ingest
from results.records import MetricRecord
from results.report.content import Described, Sources
from results.report.site import Facts, write
from results.store import Store
from tests.results.factory import (
    make_cell,
    make_experiment,
    make_run,
    make_samples,
    make_scores,
    write_shard,
)

EVIL = (
    '"><img src=x onerror=alert(1)></script><script>window.owned=1</script>'
    "<!--{{ 7*7 }} & 'a' \u202e\x1b[2J\u2028 ../../.."
)
LOSS = MetricRecord(name="bits", unit="bits", kind="mean", higher_is_better=False)
ITEMS = 24


def make_world(path: Path) -> Path:
    """Write three experiments and two runs; return the index."""
    store = Store(path)
    speeds = {"plain": 1.0, "fast": 2.0, "slow": 0.5, "evil": 1.5, "broken": 1.0}
    first = make_experiment(tuple(speeds), ITEMS, repeats=3)
    other = make_experiment(
        ("large-plain", "large-fast"),
        ITEMS,
        experiment_id="experiment-2",
        model="large",
        hardware="gpu-test",
        scale="paper",
        task_params={"prompt": "chat", "words": EVIL},
        created="2025-02-01T00:00:00+00:00",
    )
    hostile = make_experiment(
        ("text-plain", "text-fast"),
        ITEMS,
        experiment_id="experiment-3",
        task=EVIL,
        metrics=[LOSS],
        facts={"output_unit": "text", "speed_of": "decode", "note": EVIL},
    )
    checks = [{"check": "untimed outputs", "ok": True, "detail": EVIL}]
    cells = {
        "plain": make_cell(first, "plain"),
        "fast": make_cell(
            first,
            "fast",
            family="drafting",
            spec="fast:size=8",
            params={"size": 8},
            audit={"result": "passed", "checks": checks},
            divergences=[{"item_id": "item-0", "position": 3, "verdict": "tie"}],
        ),
        "slow": make_cell(first, "slow", role="control"),
        "evil": make_cell(first, "evil", method=EVIL, family=EVIL, notes={EVIL: EVIL}),
        "broken": make_cell(first, "broken", status="failed", error=EVIL, log_tail=f"one\n{EVIL}"),
    }
    samples = [
        replace(sample, output=f"=1+1 {EVIL}") if sample.cell_id == "cell-evil" else sample
        for sample in make_samples(first, speeds)
        # One item less, so that pairing matters.
        if sample.cell_id not in ("cell-slow", "cell-broken")
        or (sample.cell_id == "cell-slow" and sample.item_id != "item-3")
    ]
    right = {"plain": 12, "fast": 14, "slow": 12, "evil": 3}
    write_shard(
        store,
        first,
        list(cells.values()),
        samples,
        [
            score
            for method, count in right.items()
            for score in make_scores(first, method, [1.0] * count + [0.0] * (ITEMS - count))
            if (method, score.item_id) != ("slow", "item-3")
        ],
    )
    for experiment, prefix in ((other, "large"), (hostile, "text")):
        plain, fast = f"{prefix}-plain", f"{prefix}-fast"
        write_shard(
            store,
            experiment,
            [
                make_cell(experiment, plain, method="plain"),
                make_cell(experiment, fast, method="fast", family="drafting"),
            ],
            make_samples(experiment, {plain: 1.0, fast: 3.0}),
            [
                score
                for shift, method in enumerate((plain, fast))
                for score in make_scores(
                    experiment, method, [(item + shift) % 2 for item in range(ITEMS)]
                )
            ],
        )
    skipped = [{"method": EVIL, "task": "toy", "model": "tiny", "reason": EVIL}]
    run = make_run([first, other, hostile], skipped=skipped, git_commit="0123456789abcdef")
    store.write_run(replace(run, cells=[*run.cells, ["experiment-9", "cell-missing"]]))
    store.write_run(
        make_run([], run_id="run-2", started="2025-03-01", status="interrupted", command=EVIL)
    )
    return ingest(path)


def make_sources() -> Sources:
    """Return descriptions and a paper, as hostile."""
    claims = [
        {"id": "C1", "metric": EVIL, "value": "2x", "baseline": "plain", "where": "Table 1"},
        {"id": "C2", "metric": "speed-up", "value": "9x", "baseline": "", "where": ""},
    ]
    settled = [
        Settled(
            method="fast",
            claim_id="C1",
            verdict="reproduced",
            detail=EVIL,
            scale="embedded",
            evidence_experiment="experiment-1",
            evidence_cell="cell-fast",
        ),
        Settled(method="fast", claim_id="C2", verdict="not-reproduced (mechanism)", detail="no"),
    ]
    paper = PaperReport(
        method="fast",
        title=EVIL,
        arxiv="2401.00001",
        status="ready",
        claims=claims,
        settled=settled,
    )
    facts = Facts("", [{"key": "file", "value": EVIL}])
    rows = Facts("Parameters", [{"name": "size", "doc": EVIL}])
    return Sources(
        methods={
            "fast": Described(what=EVIL, family="drafting", status="ready", parts=[facts, rows]),
            "planned": Described(what="Not yet.", family="drafting", status="planned"),
        },
        tasks={"toy": Described(what="A toy.", parts=[facts])},
        papers={"fast": paper},
        why=lambda experiment_id, cell_id: (
            [Facts("Why", [{"part": "speed-up", "value": "2.00", "meaning": EVIL}]), rows]
            if cell_id == "cell-fast"
            else []
        ),
    )


def make_site(folder: Path) -> Path:
    """Write a store and its site below a folder; return the site's."""
    write(folder / "site", make_world(folder / "store"), make_sources())
    return folder / "site"


def numbers_of(page: Path) -> Iterator[tuple[str, float, list[str]]]:
    """Yield each number of an experiment's page: its column, its value, and the SQL beside it."""
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r'<tr id="c-[a-z0-9-]+?-([a-z_]+)">(.*?)</tr>', text, re.DOTALL)
    for column, body in rows:
        [exact] = re.findall(r'<small class="exact">(.*?)</small>', body)
        yield (
            column,
            float(exact),
            list(map(html.unescape, re.findall(r"<code>(.*?)</code>", body))),
        )
