from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import run
from results.ingest import ingest
from results.query import run_sql
from results.report import site as writing
from results.report.content import Sources, slug
from results.report.site import MANIFEST, ReportError, write
from results.store import Store
from results.tables import comparison_tables
from tests.results.factory import make_cell, make_experiment, make_run, make_samples, make_store
from tests.results.report_world import EVIL, make_site, make_sources, make_world, numbers_of

VOID = {"meta", "link", "input", "br", "img", "hr"}
LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
STYLES = Path(writing.__file__).parent / "static" / "report.css"


@dataclass
class Page(HTMLParser):
    """A page taken apart, strictly: a tag that is not closed is an error."""

    path: Path
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text = self.path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert not self.open, f"{self.path}: not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{self.path}: {tag} has an attribute twice"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{self.path}: </{tag}> closes nothing"
        assert self.open.pop() == tag, f"{self.path}: </{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif data.strip():
            self.words.append(data.strip())

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"{self.path}: a comment: {data[:80]}")

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    @property
    def grids(self) -> list[dict]:
        return [
            content
            for script in self.scripts
            if script and isinstance(content := json.loads(script), dict)
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def index(site: Path) -> Path:
    return site.parent / "store" / "tokenmark.duckdb"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in sorted(site.rglob("*.html"))}


# --- every page ---


def test_there_is_a_page_for_each_method_task_run_and_experiment(pages: dict[str, Page]) -> None:
    assert {
        "index.html",
        "methods.html",
        "runs.html",
        "tasks/toy.html",
        f"tasks/{slug(EVIL)}.html",
        "methods/fast.html",
        "methods/planned.html",
        f"methods/{slug(EVIL)}.html",
        "runs/run-1.html",
        "runs/run-2.html",
        "experiments/experiment-1.html",
    } <= pages.keys()


def test_pages_are_whole_and_accessible(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert page.text.startswith("<!DOCTYPE html>\n<html lang="), name
        assert len(page.ids) == len(set(page.ids)), name
        assert sum(tag == "h1" for tag, _ in page.tags) == 1, name
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), name
        tables = sum(tag == "table" for tag, _ in page.tags)
        assert sum(tag == "caption" for tag, _ in page.tags) == tables, name
        for tag, attributes in page.tags:
            if tag == "th":
                assert attributes["scope"] in ("col", "row"), name
            if attributes.get("role") in ("region", "search", "img"):
                assert attributes["aria-label"], name


def test_pages_ask_nobody_for_anything(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        [policy] = [
            attributes["content"]
            for tag, attributes in page.tags
            if attributes.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy.startswith("default-src 'none'; script-src 'self';"), name
        assert "http" not in policy, name
        for tag, attributes in page.tags:
            source = attributes.get(LOADING.get(tag, ""), "")
            if tag == "script" and not source:
                assert attributes["type"] == "application/json", name
            elif tag in LOADING:
                assert source == "data:," or (page.path.parent / source).is_file(), name
            if tag == "a" and "//" in attributes["href"]:
                assert attributes["href"].startswith("https://arxiv.org/abs/"), name
    assert "url(" not in STYLES.read_text()
    assert (site / "assets" / "plotly.min.js").stat().st_size > 1_000_000
    assert "MIT" in (site / "assets" / "plotly.LICENSE.txt").read_text()


def targets(page: Page) -> Iterator[str]:
    """Yield where a page leads: its links, and those that its scripts make of its data."""
    for tag, attributes in page.tags:
        if tag == "a" and "//" not in attributes["href"]:
            yield attributes["href"]
    root = "../" if page.path.parent.name in ("tasks", "methods", "runs", "experiments") else ""
    for content in page.grids:
        yield from (root + group["taskPage"] for group in content["groups"])
        for row in content["rows"]:
            yield root + row["evidence"]
            if row["page"]:
                yield root + row["page"]
            for column, cell in zip(content["columns"], row["cells"], strict=True):
                if column["kind"] == "number" and cell:
                    yield f"{root}{row['evidence']}-{column['key']}"


def test_every_link_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    followed = 0
    for name, page in pages.items():
        for target in targets(page):
            path, _, fragment = target.partition("#")
            found = (page.path.parent / unquote(path)).resolve() if path else page.path.resolve()
            assert found.is_file(), f"{name}: {target}"
            if fragment:
                ids = pages[str(found.relative_to(site.resolve()))].ids
                assert fragment in ids, f"{name}: {target}"
            followed += 1
    assert followed > 300


def test_hostile_text_stays_text(pages: dict[str, Page]) -> None:
    seen = 0
    for name, page in pages.items():
        assert "\u202e" not in page.text, name
        assert "\x1b" not in page.text, name
        assert "\u2028" not in page.text, name
        assert ">49 " not in page.text, name
        for tag, attributes in page.tags:
            assert tag != "img", name
            assert not any(attribute.startswith("on") for attribute in attributes), name
        assert all("<" not in script for script in page.scripts), name
        seen += sum("<script>window.owned=1</script>" in words for words in page.words)
    assert seen > 20
    # Also where a model's output is shown.
    experiment = pages["experiments/experiment-1.html"]
    assert any(words.startswith('=1+1 "><img') for words in experiment.words)


# --- numbers ---


def test_leaderboards_have_the_numbers_of_the_comparison_tables(
    index: Path, pages: dict[str, Page]
) -> None:
    tables = comparison_tables(index, None)
    checked = 0
    for name in ("toy", EVIL):
        [content] = pages[f"tasks/{slug(name)}.html"].grids
        rows = {
            (table.data[place]["experiment_id"], table.data[place]["cell_id"]): (
                dict(zip(table.columns, table.rows[place], strict=True)),
                table.data[place],
            )
            for table in tables
            for place in range(len(table.data))
            if table.data[place]["task"] == name
        }
        assert len(content["rows"]) == len(rows)
        for row in content["rows"]:
            found = re.fullmatch(r"experiments/(.*)\.html#c-(.*)", row["evidence"])
            assert found is not None
            texts, data = rows[found[1], found[2]]
            verdict = ""
            for column, cell in reversed(list(zip(content["columns"], row["cells"], strict=True))):
                if column["key"].endswith("_verdict"):
                    verdict = cell
                elif column["kind"] == "number" and column["label"] in texts:
                    shown = " ".join(filter(None, [*(cell or ["", "", ""])[1:], verdict]))
                    assert shown == texts[column["label"]]
                    if cell:
                        assert cell[0] == pytest.approx(data[column["key"]], rel=1e-5)
                    verdict = ""
                    checked += 1
            assert row["method"].startswith(data["method"][:8])
    assert checked > 80


def test_the_first_page_of_a_leaderboard_is_there_without_scripts(pages: dict[str, Page]) -> None:
    page = pages["tasks/toy.html"]
    [content] = page.grids
    speed = next(
        place for place, column in enumerate(content["columns"]) if column["key"] == "speedup"
    )
    values = [row["cells"][speed][0] for row in content["rows"] if row["cells"][speed]]
    assert values == sorted(values, reverse=True)
    for row in content["rows"]:
        for cell in row["cells"]:
            if isinstance(cell, list):
                assert cell[1] in page.words


def test_the_sql_beside_a_number_gives_the_number(site: Path, index: Path) -> None:
    """Each statement is read off the page, as a reader would."""
    checked: dict[str, int] = {}
    with duckdb.connect(str(index), read_only=True) as connection:
        for path in sorted((site / "experiments").glob("*.html")):
            numbers = list(numbers_of(path))
            assert numbers
            for column, exact, statements in numbers:
                for place, statement in enumerate(statements):
                    [answer] = connection.execute(statement).fetchall()
                    assert float(answer[0]) == pytest.approx(exact, rel=1e-9), statement
                    checked[column] = checked.get(column, 0) + place
    for column in ("speedup", "quality", "quality_delta", "work_ratio", "memory_ratio"):
        assert checked[column] >= 3, column
    [answer] = json.loads(run_sql(index, statement, "json"))  # as the page says
    assert answer


def test_raw_rows_are_all_there_and_run_no_formula(site: Path, index: Path) -> None:
    for experiment_id in ("experiment-1", "experiment-2"):
        text = (site / "data" / experiment_id / "samples.csv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text)))
        with duckdb.connect(str(index), read_only=True) as connection:
            samples = connection.execute(
                "SELECT cell_id, item_id, repeat, seconds, output FROM samples "
                "WHERE experiment_id = ? ORDER BY ALL",
                [experiment_id],
            ).fetchall()
        found = [
            (
                row["cell_id"],
                row["item_id"],
                int(row["repeat"]),
                float(row["seconds"]),
                json.loads(row["output_json"]),
            )
            for row in rows
        ]
        assert sorted(found) == samples
        assert not any(row["output_json"].startswith("=") for row in rows)
    everything = (site / "data" / "comparison.csv").read_text(encoding="utf-8")
    assert len(list(csv.DictReader(io.StringIO(everything)))) == 9


def test_charts_say_what_is_dominated_and_what_is_undecided(pages: dict[str, Page]) -> None:
    [drawn] = [
        content
        for script in pages["tasks/toy.html"].scripts
        if script and isinstance(content := json.loads(script), list)
    ]
    chart = next(each for each in drawn if "tiny" in each["title"])
    assert [axis["name"] for axis in chart["axes"]] == ["speed", "memory"]
    standings = {point["label"]: point["standing"] for point in chart["axes"][0]["points"]}
    assert standings["fast:size=8"] == "front"
    assert standings["slow"] == standings["plain"] == "undecided"  # 24 items decide no quality
    [hostile] = [
        content
        for script in pages[f"tasks/{slug(EVIL)}.html"].scripts
        if script and isinstance(content := json.loads(script), list)
    ]
    assert hostile[0]["higherIsBetter"] is False
    assert [axis["name"] for axis in hostile[0]["axes"]] == ["speed", "decode", "memory"]


def test_a_method_page_has_paper_claims_parameters_and_reasons(pages: dict[str, Page]) -> None:
    page = pages["methods/fast.html"]
    for words in ("reproduced", "not-reproduced (mechanism)", "arXiv 2401.00001", "Parameters"):
        assert words in page.words
    assert "Why" in page.words
    assert any("SELECT * FROM claim_verdicts" in words for words in page.words)
    assert ("a", "../experiments/experiment-1.html#c-cell-fast") in [
        (tag, attributes.get("href")) for tag, attributes in page.tags
    ]
    assert "Nothing was measured yet." in pages["methods/planned.html"].words


def test_a_task_page_has_protocol_version_hash_and_scorer(pages: dict[str, Page]) -> None:
    words = pages["tasks/toy.html"].words
    for expected in ("task-hash", "1.0", "pass@1", "headline", "Protocol", "Scorer"):
        assert expected in words, expected


def test_a_run_page_has_environment_audit_and_what_is_missing(pages: dict[str, Page]) -> None:
    words = pages["runs/run-1.html"].words
    for expected in ("Test CPU", "Machine", "Software", "Audit", "untimed outputs", "Skipped"):
        assert expected in words, expected
    assert any(each.startswith("1 of its cells have not ended") for each in words)
    assert any(each.startswith("Not audited") for each in pages["runs/run-2.html"].words)


# --- stores that are empty, partial or old ---


def test_an_empty_store_gets_a_page_that_says_what_to_do(tmp_path: Path) -> None:
    written = write(tmp_path / "out", None, make_sources())
    page = Page(written.page)
    assert written.num_cells == 0
    assert any("python run.py run --suite embedded" in words for words in page.words)
    assert "Nothing was measured in this store yet." in page.words
    assert "reproduced" in Page(tmp_path / "out" / "methods" / "fast.html").words
    for path in (tmp_path / "out").rglob("*.html"):
        for target in targets(Page(path)):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_a_run_that_has_only_begun_has_pages(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    experiment = make_experiment()
    store.write_experiment(experiment)
    store.write_run(make_run([experiment], status="running"))
    index = ingest(store.path)
    write(tmp_path / "out", index, Sources())
    assert "2 of its cells have not ended." in Page(tmp_path / "out" / "runs" / "run-1.html").words
    # One cell ended, its baseline did not.
    store.write_cell(make_cell(experiment, "fast"))
    with store.samples_journal(experiment.experiment_id) as journal:
        for sample in make_samples(experiment, {"fast": 2.0}):
            journal.append(sample)
    written = write(tmp_path / "out", ingest(store.path), Sources())
    assert written.num_cells == 1
    [content] = Page(tmp_path / "out" / "tasks" / "toy.html").grids
    assert "speedup" not in [column["key"] for column in content["columns"]]


# --- the folder ---


def test_equal_results_give_equal_files_and_what_is_old_goes(tmp_path: Path, site: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    (copy / "CNAME").write_text("mine")
    write(copy, make_world(tmp_path / "store"), make_sources())
    for path in site.rglob("*"):
        if path.is_file():
            assert (copy / path.relative_to(site)).read_bytes() == path.read_bytes(), path
    write(copy, None, Sources())
    assert not (copy / "tasks" / "toy.html").exists()
    assert not (copy / "methods" / "fast.html").exists()
    assert (copy / "CNAME").read_text() == "mine"


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ReportError, match=r"index\.html exists and is not of an earlier report"):
        write(tmp_path, None, Sources())
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    (tmp_path / "index.html").unlink()
    (tmp_path / MANIFEST).write_text('{"made_by": "somebody"}')
    with pytest.raises(ReportError, match=r"report\.json is not of an earlier report"):
        write(tmp_path, None, Sources())
    (tmp_path / MANIFEST).write_text('{"made_by": "tokenmark report", "files": ["../keep"]}')
    with pytest.raises(ReportError, match="names files outside its folder"):
        write(tmp_path, None, Sources())


def test_an_interrupted_report_can_be_written_again(tmp_path: Path, monkeypatch) -> None:
    def stop(site: writing.Site) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writing.Site, "_run_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, None, Sources())
    assert (tmp_path / "assets" / "report.css").exists()
    assert not (tmp_path / "index.html").exists()
    assert write(tmp_path, None, Sources()).page.exists()


def test_names_that_no_file_may_have_get_another() -> None:
    assert slug("token-recycling") == "token-recycling"
    for name in ("", ".", "..", "con", "nul.txt", "a/b", "A", "ä", "x" * 200, "a--b", "end."):
        found = slug(name)
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*--[0-9a-f]{10}", found), name
        assert len(found) < 60


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), unique=True, max_size=6))
def test_different_names_have_different_files_also_where_case_does_not_count(names) -> None:
    assert len({slug(name).lower() for name in names}) == len(names)


# --- the command ---


def report(*arguments: str | Path) -> int:
    return run.main(["report", *map(str, arguments)])


def test_the_command_follows_the_contract_of_exit_codes(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    out = tmp_path / "out"
    make_store(tmp_path / "store")
    assert report("--store", tmp_path / "store", "--out", out) == 2
    assert "has shards and no index" in capsys.readouterr().err
    assert run.main(["rebuild", "--store", str(tmp_path / "store")]) == 0
    assert report("--store", tmp_path / "store", "--out", out) == 0
    assert "2 results on" in capsys.readouterr().out
    assert "FASTER" in (out / "tasks" / "toy.html").read_text()
    assert "Token Recycling" in (out / "methods" / "token-recycling.html").read_text()
    # What follows never gets as far as the papers.
    monkeypatch.setattr("runner.report.settle_claims", lambda registry, index_path: [])
    (tmp_path / "none").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "methods.html").write_text("mine")
    assert report("--store", tmp_path / "none", "--out", tmp_path / "full") == 2
    assert report("--store", tmp_path / "none", "--out", tmp_path / "full" / "methods.html") == 2
    assert capsys.readouterr().err.count("UsageError") == 2
    assert report("--store", tmp_path / "none") == 2
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: None)
    assert report("--store", tmp_path / "none", "--out", tmp_path / "new") == 2
    assert "pip install -e '.[report]'" in capsys.readouterr().err
    (tmp_path / "store" / "tokenmark.duckdb").write_bytes(b"no index")
    assert report("--store", tmp_path / "store", "--out", out) == 1


# --- colours ---


def schemes() -> dict[str, dict[str, str]]:
    """Return the colours of each scheme by name."""
    pair = r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);"
    found = re.findall(pair, STYLES.read_text())
    return {
        "light": {name: light for name, light, _ in found},
        "dark": {name: dark for name, _, dark in found},
    }


def contrast(first: str, second: str) -> float:
    """Return the contrast of WCAG 2 between two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_in_both_schemes() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name, colours in schemes().items():
        pairs = [
            *itertools.product(("ink", "muted", "link", "bad"), ("ground", "raised")),
            *((kind, f"{kind}-ground") for kind in ("good", "bad", "even", "open")),
            *((word, "mark") for word in ("ink", "muted")),
        ]
        for word, ground in pairs:
            assert contrast(colours[word], colours[ground]) >= 4.5, (name, word, ground)
        for mark in ("front", "undecided", "dominated"):
            assert contrast(colours[mark], colours["ground"]) >= 3, (name, mark)
