"""The cards of the catalogue are complete, and a wrong card is refused with the reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Bound, Claim, Paper
from methods.cards import Card, CardError, arithmetic, load_card, load_paper

ROOT = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """A row of docs/catalogue.md."""

    number: int
    slug: str
    link: str
    headline: str
    family: str
    task: str


def catalogue() -> list[Row]:
    rows = []
    for line in (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8").splitlines():
        if re.match(r"\| \d+ \|", line):
            number, name, _, family, headline, task = (
                cell.strip() for cell in line.strip().strip("|").split("|")
            )
            found = re.fullmatch(r"\[(.+)\]\((.+)\)", name)
            assert found is not None, line
            rows.append(Row(int(number), found[1], found[2], headline, family, task))
    return rows


CATALOGUE = catalogue()
SLUGS = [row.slug for row in CATALOGUE]
CARDS = sorted((ROOT / "methods").glob("*/*.toml"))

# The rows of the claims table of each paper, `TR-5*2` for one that has become two claims. The ids
# were listed by other code than wrote the cards, straight from the tables.
CLAIM_ROWS = {
    "token-recycling": "TR-1 TR-2 TR-3 TR-4 TR-5*2 TR-6*4 TR-7*4",
    "ppd": "PPD-1 PPD-2 PPD-3 PPD-4 PPD-5 PPD-6 PPD-7 X-1*5 X-2*5 X-3*5 X-4*5",
    "lud": "LUD-1*2 LUD-2*2 LUD-3 LUD-4",
    "dyspec": "DS-1 DS-2 DS-3 DS-4*8 DS-5*2 DS-6*4 DS-7*4 DS-8",
    "aded": "AD-1 AD-2 AD-3 AD-4 AD-5",
    "flash-sd": "FL-1 FL-2 FL-3 FL-4 X-1",
    "awrs": "C1 C2 C3 C4 C5",
    "adadec": "C1 C1b C2 C3 C4 C5*8 C6*3",
    "cyclicreflex": "C1 C2*4 C3*2 C4*2 C5 C6 C7",
    "cdpo": "C1 C2 C3",
    "tidaldecode": "TD-1*2 TD-2*3 TD-3*2 TD-4*5 TD-5 TD-6 TD-7*2 TD-8*4",
    "tokenselect": "TS-1 TS-2 TS-3 TS-4 TS-5",
    "lemo": "C1 C2 C3*2 C4*5 C5*2 C6*2 C7*2 C8",
    "arc-encoder": "A1 A2 A3*2 A4*3 A5*3 A6*4 A7*3 A8*4 A9*4",
    "c3": "C1 C2 C3 C4*14",
    "meta-tokens": "C1*2 C2 C3*15 C4 C5*3 C6 C7*2 C8",
    "lexinvariant": "C1 C2 C3 C4 C5",
    "learn-your-tokens": "L1 L2 L3",
    "omp-transplant": "O1 O2*2 O3 O4*6 O5*2 O6",
    "token-prepending": "T1 T2 T3 T4",
    "causal2vec": "V1*2 V2 V3 V4",
    "code-token-merging": "M1*2 M2 M3 M4",
    "localleap": "C1 C2 C3 C4 X-1*2",
    "learn2pd": "C1 C2 C3 C4 C5*2",
    "wedlm": "C1 C2*4 C3*3 C4*4 C5*2 C6*2 C7 C8*3",
    "hiprune": "C1 C2 C3*2 C4*6 C5 C6*4 C7",
    "todre": "C1 C2 C3*2 C4*2 C5*6 C6*6 C7*4 C8",
    "zoo-prune": "C1 C2*2 C3*3 C4*2 C5*2 C6*7 C7*2 C8",
    "corematching": "C1 C2 C3 C4*2 C5 C6",
    "token-correlation-compression": "C1 C2 C3 C4 C5",
    "adatoken-3d": "C1 C2 C3 C4 C5",
    "ppe": "C1*2 C2*7 C3*6 C4*4 C5*2 C6 C7",
    "tokenpacker": "C1*2 C2*2 C3*6 C4*6 C5*10 C6*2 C7*18",
    "tokenflex": "C1*3 C2*3 C3*3 C4*6 C5*2 C6*7 X-1*9 X-2*9 X-3*9 X-4*9 X-5*9 X-6*9 X-7*9",
    "langdc": "C1 C2 C3",
    "croc": "C1 C2*3 C3*9 C4",
    "spacedrive": "C1*3 C2*2 C3*3 C4*12 C5*6 C6 C7",
    "sparkui-parser": "C1 C2 C3*2 C4 C5",
    "rex-omni": "C1*2 C2*2 C3*4 C4 C5*6 C6*4 C7*4 C8 C9 C10*2",
    "read-seg": "C1*4 C2*8 C3*8 C4*6 C5*6 C6*3 C7*6 C8",
    "x-decoder": "C1 C2 C3*12 C4*6 C5*7 C6 C7",
    "postometro": "C1*6 C2*6 C3*6 C4*4 C5 C6",
    "compass": "C1*2 C2*2 C3*2 C4*5 C5*8 C6*2 C7 C8*4 C9*3 C10*2",
    "sjd": "SJD-1 SJD-2*5 SJD-3*3 SJD-4*2 SJD-5 SJD-6",
    "gsd": "GSD-1 GSD-2*4 GSD-3*4 GSD-4*6 GSD-5*8 GSD-6 GSD-7",
    "lantern": "LAN-1*2 LAN-1b*2 LAN-2*2 LAN-3*2 LAN-4*2 LAN-5 LAN-6 LAN-7",
    "cspd": "CS-1 CS-2*2 CS-3*3 CS-4 CS-5*4 CS-6*6 CS-7*2",
    "nar": "NAR-1*3 NAR-2*3 NAR-3*2 NAR-4*4 NAR-5*15 NAR-6*2 NAR-7*3 NAR-8*3 NAR-9*3",
    "xar": "XAR-1*3 XAR-2*3 XAR-3*13 XAR-4*2 XAR-5*5 XAR-6*5 XAR-7*4",
    "enat": "EN-1 EN-2 EN-3*2 EN-4 EN-5 EN-6",
    "controlar": "C1 C2 C3*6 C4*6 C5*6 C6 C7",
    "gpstoken": "C1 C2 C3*12 C4*9 C5*3 C6*8 C7*3 C8*3 C9*4",
    "flextok": "C1 C2*2 C3*3 C4 C5 C6 X-1*4",
    "seed-tokenizer": "C1*3 C2*8 C3*2 C4*5 C5*2 C6",
    "ett": "C1*2 C2*5 C3*4 C4*25 C5*8 C6*4",
    "mingtok": "C1*8 C2*9 C3*5 C4*2 C5*2 C6*8 C7*6",
    "survey-token-compression": "C1 C2 C3 C4 C5",
}


def card_of(slug: str) -> Path:
    (path,) = (ROOT / "methods").glob(f"*/{slug.replace('-', '_')}.toml")
    return path


@cache
def card(slug: str) -> Card:
    return load_card(card_of(slug))


def numbers_in(text: str) -> set[float]:
    return {float(each) for each in re.findall(r"\d*\.?\d+(?:e-?\d+)?", text)}


# --- the catalogue -------------------------------------------------------------------------------


def test_the_catalogue_numbers_57_papers_without_gap_or_double():
    assert [row.number for row in CATALOGUE] == list(range(1, 58))
    assert len(set(SLUGS)) == 57
    assert set(SLUGS) == set(CLAIM_ROWS)


@pytest.mark.parametrize("row", CATALOGUE, ids=SLUGS)
def test_every_paper_has_exactly_one_card_and_the_catalogue_links_to_it(row: Row):
    assert (ROOT / "docs" / row.link).resolve() == card_of(row.slug)


def test_every_family_folder_is_a_package():
    assert {path.parent for path in CARDS} == {
        path.parent for path in (ROOT / "methods").glob("*/__init__.py")
    }


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_card_in_the_tree_can_be_read(path: Path):
    assert load_card(path).paper == load_paper(path)


@pytest.mark.parametrize("row", CATALOGUE, ids=SLUGS)
def test_the_paper_is_complete_and_agrees_with_the_catalogue(row: Row):
    paper = card(row.slug).paper
    assert (paper.family, paper.task) == (row.family, row.task)
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert paper.year == 2000 + int(paper.arxiv[:2])
    assert paper.kind == ("survey" if row.slug == "survey-token-compression" else "method")
    assert len(paper.title) > 15
    assert not paper.code or re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", paper.code)
    # The venue is that of the first posting or later.
    assert all(paper.year <= int(year) for year in re.findall(r"\b20\d\d\b", paper.venue))


def test_no_two_cards_are_of_the_same_paper():
    papers = [card(slug).paper for slug in SLUGS]
    assert len({paper.arxiv for paper in papers}) == len({paper.title for paper in papers}) == 57


@pytest.mark.parametrize("slug", SLUGS)
def test_every_row_of_the_claims_table_has_become_its_claims(slug: str):
    expected = {
        row: int(times or 1)
        for row, _, times in (each.partition("*") for each in CLAIM_ROWS[slug].split())
    }
    found = dict.fromkeys(expected, 0)
    for claim in card(slug).claims:
        # `LAN-1b` is a row of its own and no part of `LAN-1`, so the longest match counts.
        row = max(
            (row for row in expected if re.fullmatch(re.escape(row) + "[a-z]?", claim.id)),
            key=len,
            default=None,
        )
        assert row is not None, f"{claim.id} belongs to no row of {slug}"
        # Only a row that is one claim leaves its bare id to it.
        assert (claim.id == row) == (expected[row] == 1), claim.id
        found[row] += 1
    assert found == expected


def test_every_number_stands_in_the_words_of_its_claim():
    wrong = [
        (slug, claim.id)
        for slug in SLUGS
        for claim in card(slug).claims
        if claim.number is not None and abs(claim.number) not in numbers_in(claim.value)
    ]
    assert wrong == []


def test_a_factor_is_positive_and_a_share_lies_between_0_and_1():
    limits = {"x": (1e-9, float("inf")), "fraction": (0.0, 1.0)}
    wrong = [
        (slug, claim.id)
        for slug in SLUGS
        for claim in card(slug).claims
        if claim.unit in limits
        and not limits[claim.unit][0] <= (claim.number or 0) <= limits[claim.unit][1]
    ]
    assert wrong == []


def test_the_numbers_of_the_headlines_are_among_the_claims():
    for row in CATALOGUE:
        texts = [str(text) for claim in card(row.slug).claims for text in asdict(claim).values()]
        assert numbers_in(row.headline) - numbers_in(" ".join(texts)) == set(), row.slug


# --- the loader ----------------------------------------------------------------------------------

GOOD = """\
[paper]
title = "A method"
arxiv = "2408.08696"
year = 2024
venue = "ACL 2025"
code = "https://github.com/owner/name"
family = "decoding"
task = "HumanEval"

[[claim]]
id = "A-1"
metric = "speed-up"
value = "up to 2x"
number = 2
bound = "up-to"
unit = "x"
baseline = "autoregressive"
where = "abstract"
confidence = "uncertain"
note = "from memory"

[[claim]]
id = "A-2"
metric = "quality"
value = "unchanged"
where = "abstract"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "some_method.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_a_card_becomes_its_paper_and_its_claims_in_order(write):
    assert load_card(write(GOOD)) == Card(
        paper=Paper(
            title="A method",
            arxiv="2408.08696",
            year=2024,
            venue="ACL 2025",
            code="https://github.com/owner/name",
            family="decoding",
            task="HumanEval",
        ),
        claims=(
            Claim(
                id="A-1",
                metric="speed-up",
                value="up to 2x",
                number=2.0,
                bound="up-to",
                unit="x",
                baseline="autoregressive",
                where="abstract",
                confidence="uncertain",
                note="from memory",
            ),
            Claim(id="A-2", metric="quality", value="unchanged", where="abstract"),
        ),
    )


def test_a_whole_number_is_read_as_a_float(write):
    assert isinstance(load_card(write(GOOD)).claims[0].number, float)


def test_a_baseline_needs_no_more_than_a_title_and_may_leave_fields_empty(write):
    assert load_card(write('[paper]\ntitle = "Plain decoding"\n')).claims == ()
    text = '[paper]\ntitle = "Plain decoding"\narxiv = ""\nyear = 0\ncode = ""\n'
    assert load_card(write(text)).paper == Paper(title="Plain decoding")


PAPER = "[paper]: "
FIRST = "[[claim]] 1 (id 'A-1'): "
SECOND = "[[claim]] 2 (id 'A-2'): "


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # keys
        (
            'title = "A',
            'titel = "A',
            PAPER + "no key named 'titel'. Did you mean 'title'? Allowed:",
        ),
        ('venue = "', 'zzz = "', PAPER + "no key named 'zzz'. Allowed: title, arxiv, year, venue,"),
        (
            "number = 2",
            "numbers = 2",
            FIRST + "no key named 'numbers'. Did you mean 'number'? Allowed:",
        ),
        ("[[claim]]", "[[claims]]", "no key named 'claims'. Did you mean 'claim'? Allowed: paper,"),
        (
            "[paper]",
            "[papers]",
            "no key named 'papers'. Did you mean 'paper'? Allowed: paper, claim",
        ),
        ("[paper]", "", "no key named 'title'. Allowed: paper, claim."),
        (GOOD.partition("\n\n")[0], "", "the table [paper] is missing."),
        ('title = "A method"', "", PAPER + "the key 'title' is missing. Required: title."),
        ('id = "A-1"', "", "[[claim]] 1 (id ''): the key 'id' is missing. Required: id, metric,"),
        ('metric = "quality"', "", SECOND + "the key 'metric' is missing."),
        ('value = "unchanged"', "", SECOND + "the key 'value' is missing."),
        ('where = "abstract"\nconf', "conf", FIRST + "the key 'where' is missing."),
        # types and empty values
        ("year = 2024", 'year = "2024"', PAPER + "year must be a whole number, got '2024'."),
        ("year = 2024", "year = 2024.0", PAPER + "year must be a whole number, got 2024.0."),
        ("year = 2024", "year = true", PAPER + "year must be a whole number, got True."),
        (
            'arxiv = "2408.08696"',
            "arxiv = 2408.08696",
            PAPER + "arxiv must be text, got 2408.08696.",
        ),
        ('id = "A-2"', "id = 2", "[[claim]] 2 (id 2): id must be text, got 2."),
        ("number = 2", 'number = "2"', FIRST + "number must be a number, got '2'."),
        ("number = 2", "number = true", FIRST + "number must be a number, got True."),
        ("number = 2", "number = [2]", FIRST + "number must be a number, got [2]."),
        ('title = "A method"', 'title = " "', PAPER + "title must not be empty."),
        ('value = "unchanged"', 'value = ""', SECOND + "value must not be empty."),
        # values
        ("number = 2", "number = inf", FIRST + "number must be finite, got inf."),
        ("number = 2", "number = nan", FIRST + "number must be finite, got nan."),
        (
            '"up-to"',
            '"upto"',
            FIRST + "bound must be one of exact, about, up-to, at-least, at-most, "
            "got 'upto'. Did you mean 'up-to'?",
        ),
        (
            '"uncertain"',
            '"maybe"',
            FIRST + "confidence must be one of certain, uncertain, got 'maybe'.",
        ),
        (
            'task = "HumanEval"',
            'kind = "serve"',
            PAPER + "kind must be one of method, survey, unpublished, got 'serve'. "
            "Did you mean 'survey'?",
        ),
        (
            'bound = "up-to"\n',
            "",
            FIRST + "a number needs its bound. Allowed bounds: exact, about,",
        ),
        ('unit = "x"\n', "", FIRST + "a number needs its unit."),
        ("number = 2\n", "", FIRST + "bound says how a number is meant, but there is none."),
        ('"unchanged"', '"unchanged"\nunit = "x"', SECOND + "unit says how a number is meant, but"),
        ('note = "from memory"\n', "", FIRST + "an uncertain claim needs a note that says what is"),
        ('id = "A-1"', 'id = "A 1"', "(id 'A 1'): id must consist of letters, digits, '-' and '.'"),
        ('"A-2"', '"A-1"', "the id 'A-1' belongs to 2 claims. Each claim needs its own"),
        ("2408.08696", "2408.08696v2", PAPER + "arxiv must be an id without version such as"),
        ("2408.08696", "2413.08696", PAPER + "arxiv must be an id without version such as"),
        (
            "year = 2024",
            "year = 2023",
            PAPER + "year must lie in [2024, 2027], since 2408.08696 was",
        ),
        (
            "year = 2024",
            "year = 2028",
            PAPER + "year must lie in [2024, 2027], since 2408.08696 was",
        ),
        (
            "https://github.com/",
            "",
            PAPER + "code must be a web address or empty, got 'owner/name'.",
        ),
        # shape
        ('[[claim]]\nid = "A-1"', '[claim]\nid = "A-1"', "is no valid TOML: "),
        ("year = 2024", "year = ", "is no valid TOML: "),
        ("year = 2024", "year = 2024\nyear = 2024", "is no valid TOML: "),
    ],
)
def test_a_wrong_card_is_refused_with_file_place_and_reason(write, old, new, message):
    assert old in GOOD
    path = write(GOOD.replace(old, new))
    with pytest.raises(CardError) as refused:
        load_card(path)
    assert message in str(refused.value)
    assert str(refused.value).startswith(str(path))


def test_a_single_claim_table_and_text_for_claims_are_refused(write):
    head = GOOD.partition("[[claim]]")[0]
    for wrong in ('[claim]\nid = "A"\n', ""):
        text = head + wrong if wrong else "claim = [1]\n" + head
        with pytest.raises(CardError, match=r"write \[\[claim\]\], not \[claim\]"):
            load_card(write(text))


def test_bytes_that_are_no_utf8_are_no_toml(write):
    with pytest.raises(CardError, match="is no valid TOML"):
        load_card(write(GOOD.encode() + b"# \xff\n"))


def test_a_missing_card_is_a_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_card(tmp_path / "none.toml")


def test_the_paper_alone_is_read_without_looking_at_the_claims(write):
    path = write(GOOD.replace("number = 2", "number = "))
    assert load_paper(path).title == "A method"
    assert load_paper(write(GOOD.replace("A method", "On [[claim]]"))).title == "On [[claim]]"
    with pytest.raises(CardError, match="year must lie in"):
        load_paper(write(GOOD.replace("year = 2024", "year = 1")))
    with pytest.raises(CardError, match="no valid TOML"):
        load_paper(write(GOOD.replace("year = 2024", "year = ")))


def test_reading_cards_needs_no_torch():
    code = "import methods.cards, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- round trip ----------------------------------------------------------------------------------

# TOML's basic strings are JSON's, except that the control character DEL must be escaped.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x7f"), max_size=20)
FILLED = TEXT.filter(str.strip)
PAPERS = st.builds(
    lambda arxiv, late, **rest: Paper(
        arxiv=arxiv, year=2000 + int(arxiv[:2]) + late if arxiv else 0, **rest
    ),
    arxiv=st.just("") | st.from_regex(r"[0-9]{2}(0[1-9]|1[0-2])\.[0-9]{4,5}", fullmatch=True),
    late=st.integers(0, 3),
    title=FILLED,
    venue=TEXT,
    code=st.just("") | TEXT.map("https://".__add__),
    family=TEXT,
    task=TEXT,
    kind=st.sampled_from(["method", "survey", "unpublished"]),
)


@st.composite
def claim_lists(draw: st.DrawFn) -> tuple[Claim, ...]:
    names = draw(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.-]*", fullmatch=True), unique=True))
    claims = []
    for name in names:
        number = draw(st.none() | st.floats(allow_nan=False, allow_infinity=False))
        certain = draw(st.booleans())
        texts = ("baseline", "model", "task", "hardware", "conditions")
        claims.append(
            Claim(
                id=name,
                metric=draw(FILLED),
                value=draw(FILLED),
                number=number,
                bound=None if number is None else draw(st.sampled_from(get_args(Bound))),
                unit="" if number is None else draw(TEXT),
                where=draw(FILLED),
                confidence="certain" if certain else "uncertain",
                note=draw(TEXT if certain else FILLED),
                **{text: draw(TEXT) for text in texts},
            )
        )
    return tuple(claims)


def to_toml(card: Card) -> str:
    def value(each: object) -> str:
        if isinstance(each, dict):
            return "{" + ", ".join(f"{k} = {value(v)}" for k, v in each.items()) + "}"
        return json.dumps(each, ensure_ascii=False)

    def table(head: str, values: dict[str, object]) -> list[str]:
        if values.get("number", 0) is None:
            values = {k: v for k, v in values.items() if k != "unit"}
        return [head, *(f"{k} = {value(v)}" for k, v in values.items() if v is not None)]

    lines = table("[paper]", asdict(card.paper))
    for claim in card.claims:
        values = asdict(claim)
        check = values.pop("check")
        lines += table("[[claim]]", values)
        lines += table("[claim.check]", check) if check else []
    return "\n".join(lines) + "\n"


@settings(max_examples=50)
@given(paper=PAPERS, claims=claim_lists())
def test_a_card_survives_being_written_and_read(tmp_path_factory, paper, claims):
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    card = Card(paper=paper, claims=claims)
    path.write_text(to_toml(card), encoding="utf-8", newline="")
    assert load_card(path) == card
    assert load_paper(path) == paper


def test_the_cards_of_the_catalogue_survive_being_written_and_read(write):
    for slug in SLUGS:
        assert load_card(write(to_toml(card(slug)))) == card(slug)


# --- ceilings and checks -------------------------------------------------------------------------

CHECKED = GOOD.replace(
    'note = "from memory"\n',
    """\
note = "from memory"
ceiling = "2392 / 637"
ceiling_from = "forwards over forwards"

[claim.check]
measure = "speedup"
params = { state = "cold", nodes = 8, share = 0.5, prompt = true }
rival = "other"
rival_params = { nodes = "auto" }
task = "humaneval"
task_params = { temperature = 0.6, shape = "raw" }
model = "smollm2-135m"
expected = "1 + 0.3"
paper_model = "hf:a/b"
paper_hardware = ["a100-40gb"]
""",
)


def test_arithmetic_and_settings_are_read_with_their_types(write):
    claim = load_card(write(CHECKED)).claims[0]
    assert claim.ceiling == 2392 / 637
    check = claim.check
    assert check is not None
    assert check.expected == 1.3
    assert check.params == {"state": "cold", "nodes": 8, "share": 0.5, "prompt": True}
    assert [type(each) for each in check.params.values()] == [str, int, float, bool]
    assert check.task_params == {"temperature": 0.6, "shape": "raw"}
    assert check.paper_task_params == {}
    assert (check.direction, check.tolerance, check.paper_hardware) == (
        "above",
        0.1,
        ("a100-40gb",),
    )
    assert load_card(write(CHECKED)).claims[1].check is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'ceiling_from = "forwards over forwards"\n',
            "",
            "ceiling and ceiling_from belong together",
        ),
        ('ceiling = "2392 / 637"\n', "", "ceiling and ceiling_from belong together"),
        ('"2392 / 637"', "0", "ceiling must be above 0, got 0.0."),
        ('"2392 / 637"', '"2392 / 0"', "must be a number or arithmetic, got '2392 / 0'"),
        ('"2392 / 637"', '"max(1, 2)"', "only numbers, + - * / ** and parentheses are allowed"),
        ('"2392 / 637"', '"9.0 ** 999.0"', "must be a number or arithmetic"),
        ('"2392 / 637"', '"True + 1"', "only numbers"),
        ('"2392 / 637"', "true", "ceiling must be a number, got True."),
        ('bound = "up-to"', 'bound = "at-most"', "which must be there and no at-most."),
        ("number = 2", 'number = "2"', "number must be a number, got '2'."),
        ('"speedup"', '"speed"', "measure must be one of speedup, decode_speedup,"),
        ('measure = "speedup"\n', "", "the key 'measure' is missing. Required: measure, task,"),
        ("rival = ", "rivals = ", "no key named 'rivals'. Did you mean 'rival'?"),
        ('rival = "other"\n', "", "rival_params need a rival."),
        ('{ nodes = "auto" }', "3", "rival_params must be a table of settings, got 3."),
        ('{ nodes = "auto" }', "{ nodes = [1] }", "nodes must be text, a number or a boolean"),
        ("task_params =", "task_param =", "no key named 'task_param'. Did you mean 'task_params'?"),
        ('shape = "raw"', "shape = [1]", "task_params: shape must be text, a number or a boolean"),
        (
            'paper_model = "hf:a/b"\npaper_hardware = ["a100-40gb"]',
            'paper_task_params = { subset = "large" }',
            "paper_task_params without paper_model says nothing.",
        ),
        ('["a100-40gb"]', '"a100-40gb"', "paper_hardware must be a list of texts"),
        ('paper_model = "hf:a/b"\n', "", "paper_hardware without paper_model says nothing."),
        ('"hf:a/b"', '"a/b"', "paper_model must be hf:OWNER/NAME or path:FOLDER, got 'a/b'."),
        ("expected", "tolerance = 1\nexpected", "tolerance must lie in [0, 1), got 1.0."),
        ("expected", "times = 2\nexpected", "per and times belong to measure = 'computed'."),
        ("expected", 'quantity = "x"\nexpected', "quantity names what is counted"),
        ("expected", 'metric = "f1"\nexpected', "metric names what quality is; it belongs to"),
        ('"speedup"', '"computed"', "quantity names what is counted"),
        (
            '"speedup"',
            '"computed"\nquantity = "state_bytes"',
            "so it has neither rival nor direction.",
        ),
        (
            '"speedup"\nparams = { state = "cold", nodes = 8, share = 0.5, prompt = true }\n'
            'rival = "other"\nrival_params = { nodes = "auto" }',
            '"acceptance_rate"',
            "measure = 'acceptance_rate' needs a rival",
        ),
    ],
)
def test_a_check_that_cannot_be_meant_is_refused(write, old: str, new: str, message: str):
    assert CHECKED.count(old) == 1, old
    with pytest.raises(CardError, match=re.escape(message)):
        load_card(write(CHECKED.replace(old, new)))


@given(a=st.floats(-1e6, 1e6), b=st.floats(1, 1e6), c=st.integers(0, 9), d=st.floats(-1e3, 1e3))
def test_arithmetic_is_that_of_python(a: float, b: float, c: int, d: float):
    text = f"({a!r} + {b!r}) * {c} / {b!r} - ({d!r}) ** 2"
    assert arithmetic(text) == (a + b) * c / b - d**2
