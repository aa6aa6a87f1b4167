"""MMBench's file format: what rows become, and what is said of damaged ones."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.base import Unsupported
from tasks import mmbench_data
from tasks.mmbench_data import (
    COPY_STEP,
    ChoiceQuestion,
    Rotation,
    decode_image,
    find_file,
    read_file,
    read_tsv,
    rotated,
)

COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "source",
    "split", "image", "comment",
)  # fmt: skip


def picture(*pixels: tuple[int, int, int]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.array([pixels], np.uint8)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


RED = picture((255, 0, 0))
BLUE = picture((0, 0, 255), (0, 0, 254))


def row(index: int, question: str, options: str, answer: str, image: str, **more: str) -> dict:
    """Return a row; the options are separated by slashes."""
    texts = dict(zip("ABCD", options.split("/"), strict=False))
    fields = {"index": str(index), "question": question, "answer": answer, "image": image}
    return {**dict.fromkeys(COLUMNS, ""), **fields, **texts, **more}


def fixture() -> list[dict]:
    """Return six rows: questions with 2, 3 and 4 options, the last one without its copies."""
    return [
        row(3, "Is it day?", "yes/no", "A", RED, category="scene", **{"l2-category": "coarse"}),
        row(7, "What sits there?", "a cat/a bird/a fish", "C", "3", hint="It purrs not."),
        row(9, "Which letter?", "p/q/r/s", "B", BLUE, category="ocr"),
        row(1_000_003, "Is it day?", "no/yes", "B", "3"),
        row(1_000_007, "What sits there?", "a bird/a fish/a cat", "B", "3", hint="It purrs not."),
        row(2_000_007, "What sits there?", "a fish/a cat/a bird", "A", RED, hint="It purrs not."),
    ]


def tsv(rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(
        file, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore"
    )
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def options_of(question: ChoiceQuestion) -> list[str]:
    return ["/".join(each.options.values()) + " " + each.answer for each in question.rotations]


def test_rows_become_questions_with_their_rotations() -> None:
    day, cat, letter = read_tsv(tsv(fixture()), "six rows")
    assert day == ChoiceQuestion(
        number=3,
        category="scene",
        l2_category="coarse",
        image=RED,
        rotations=(
            Rotation("Is it day?", "", {"A": "yes", "B": "no"}, "A"),
            Rotation("Is it day?", "", {"A": "no", "B": "yes"}, "B"),
        ),
    )
    assert options_of(cat) == [
        "a cat/a bird/a fish C",
        "a bird/a fish/a cat B",
        "a fish/a cat/a bird A",
    ]
    assert {each.hint for each in cat.rotations} == {"It purrs not."}
    assert cat.image == RED  # by way of the row that has it
    # Made here: option i of the question stands at place i - k of copy k.
    assert options_of(letter) == ["p/q/r/s B", "q/r/s/p A", "r/s/p/q D", "s/p/q/r C"]


def test_images_are_decoded_to_the_pixel() -> None:
    assert decode_image(BLUE).tolist() == [[[0, 0, 255], [0, 0, 254]]]
    assert decode_image(BLUE).dtype == np.uint8


def test_images_may_be_found_by_way_of_several_rows() -> None:
    rows = [
        row(1, "a?", "x/y", "A", "2"),
        row(2, "b?", "x/y", "A", "5"),
        row(5, "c?", "x/y", "A", BLUE),
    ]
    assert [question.image for question in read_tsv(tsv(rows), "three")] == [BLUE] * 3


def test_nan_is_an_absent_field_and_the_coarse_level_has_two_names() -> None:
    rows = [
        row(1, "a?", "x/y/nan/nan", "A", RED, hint="nan", category="ocr") | {"L2-category": "fine"}
    ]
    columns = tuple("L2-category" if name == "l2-category" else name for name in COLUMNS)
    [question] = read_tsv(tsv(rows, columns), "one")
    assert question.l2_category == "fine"
    assert options_of(question) == ["x/y A", "y/x B"]
    assert question.rotations[0].hint == ""


def test_files_without_optional_columns_and_answers_are_read() -> None:
    columns = ("index", "question", "A", "B", "answer", "category", "image")
    [question] = read_tsv(tsv([row(1, "a?", "x/y", "", RED)], columns), "one")
    assert options_of(question) == ["x/y ", "y/x "]


def test_images_may_be_longer_than_the_csv_module_allows_by_itself() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    limit = csv.field_size_limit()
    assert len(image) > limit
    [question] = read_tsv(tsv([row(1, "a?", "x/y", "A", image)]), "one")
    assert (decode_image(question.image) == noise).all()
    assert csv.field_size_limit() == limit


def _damaged(change: Callable[[list[dict]], object]) -> str:
    rows = fixture()
    change(rows)
    return tsv(rows)


NO_IMAGE = base64.b64encode(b"no image at all, but long enough").decode("ascii")
# A header that promises three thousand million pixels.
BOMB = base64.b64encode(b"GIF89a no image at all, but long enough").decode("ascii")
# Whole groups of four letters are missing at the end, so that base64 has nothing to say.
CUT = picture(*[(x, 2 * x % 256, x * x % 256) for x in range(200)])[:-40]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it has no column index.* its columns are none"),
        (tsv(fixture(), COLUMNS[:7]), "no column answer, category, image"),
        (tsv([]), "holds no questions, only 0 copies"),
        (_damaged(lambda rows: rows[2].update(index="9.5")), r"line 4 \(index '9.5'\).*no whole"),
        (_damaged(lambda rows: rows[2].update(index="-9")), r"line 4 \(index '-9'\).*negative"),
        (
            _damaged(lambda rows: rows[2].update(index="3")),
            r"line 4 .*index '3'.*stands in .*line 2",
        ),
        (_damaged(lambda rows: rows[2].update(B="")), r"line 4 .*options are A, C, D"),
        (_damaged(lambda rows: rows[0].update(B="")), r"line 2 .*options are A;"),
        (_damaged(lambda rows: rows[0].update(answer="C")), r"line 2 .*answer 'C' is none of"),
        (_damaged(lambda rows: rows[0].update(answer="a")), r"line 2 .*answer 'a' is none of"),
        (_damaged(lambda rows: rows[0].update(question="")), r"line 2 .*question is empty"),
        (_damaged(lambda rows: rows[0].update(image="")), r"line 2 .*there is no image"),
        (_damaged(lambda rows: rows[1].update(image="8")), r"line 3 .*image '8' is neither"),
        (_damaged(lambda rows: rows[1].update(image="7")), r"line 3 .*refers to itself"),
        (_damaged(lambda rows: rows[2].update(image=BLUE[:-3])), r"line 4 .*cannot be opened"),
        (_damaged(lambda rows: rows[2].update(image=NO_IMAGE)), r"line 4 .*cannot be opened"),
        (_damaged(lambda rows: rows[2].update(image=BOMB)), r"line 4 .*cannot be opened"),
        (_damaged(lambda rows: rows[2].update(image=CUT)), r"line 4 .*cannot be opened"),
        (_damaged(lambda rows: rows[2].update(image="!" + BLUE)), r"line 4 .*cannot be opened"),
        (_damaged(lambda rows: rows.pop(1)), r"line 5 \(index '1000007'\).*question 7 is not in"),
        (_damaged(lambda rows: rows[4].update(C="a dog")), r"line 6 .*not those of its question"),
        (_damaged(lambda rows: rows[4].update(answer="C")), r"line 6 .*not those of its question"),
        (
            _damaged(lambda rows: rows.append(row(2_000_003, "Is it day?", "yes/no", "A", "3"))),
            r"line 8 \(index '2000003'\).*question 3 has 2 options.* and 3 rows",
        ),
        (tsv(fixture()) + "5\tcut off\n", r"line 8 \(index '5'\): 2 fields.* 14 columns"),
        (tsv(fixture()) + '5\t"never closed', "line 8: unexpected end of data"),
    ],
)
def test_a_damaged_file_is_refused_and_the_record_is_named(text: str, says: str) -> None:
    with pytest.raises(Unsupported, match=says):
        read_tsv(text, "the file")


def shown(rotations: tuple[Rotation, ...]) -> set[tuple[str, ...]]:
    """Return rotations as a set of option orders with the right letter."""
    return {(*each.options.values(), each.answer) for each in rotations}


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=9)


@given(
    st.lists(
        TEXTS.filter(lambda text: text not in ("nan", "NaN")), min_size=2, max_size=4, unique=True
    ),
    st.data(),
)
def test_whatever_copies_are_missing_a_question_has_every_rotation_once(
    options: list[str], data: st.DataObject
) -> None:
    count = len(options)
    right = data.draw(st.integers(0, count - 1))
    kept = data.draw(st.sets(st.integers(1, count - 1)))
    backwards = data.draw(st.booleans())

    def turned(copy: int) -> dict:
        # Where each option of the question goes, written out place by place.
        texts, answer = [""] * count, ""
        for place, text in enumerate(options):
            to = (place + copy if backwards else place - copy) % count
            texts[to] = text
            if place == right:
                answer = "ABCD"[to]
        fields = dict(zip("ABCD", texts, strict=False))
        return row(4 + copy * COPY_STEP, 'tab\t"quote"\nline', "", answer, RED, **fields)

    [question] = read_tsv(tsv([turned(0), *map(turned, sorted(kept))]), "generated")
    every = [turned(copy) for copy in range(count)]
    expected = {(*(each[x] for x in "ABCD"[:count]), each["answer"]) for each in every}
    assert shown(question.rotations) == expected
    assert len(question.rotations) == count
    assert {each.question for each in question.rotations} == {'tab\t"quote"\nline'}


def test_rotating_by_the_number_of_options_changes_nothing() -> None:
    base = Rotation("q", "h", {"A": "x", "B": "y", "C": "z"}, "C")
    assert rotated(base, 3) == base
    assert rotated(rotated(base, 1), 2) == base
    assert rotated(base, 1) == Rotation("q", "h", {"A": "y", "B": "z", "C": "x"}, "B")


def test_a_parquet_file_of_the_hub_says_the_same_as_the_tsv(tmp_path: Path) -> None:
    rows = fixture()
    for each in rows:
        if each["image"] == "3":
            each["image"] = RED  # the hub's copy has every image in full
    text = tsv(rows)
    columns = {
        name: [int(each[name]) if name == "index" else each[name] or "nan" for each in rows]
        for name in COLUMNS
    }
    columns["image"] = [
        {"bytes": base64.b64decode(each["image"]), "path": f"{each['index']}.png"} for each in rows
    ]
    columns["comment"] = [None] * len(rows)
    path = tmp_path / "dev-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), path)
    assert read_file(path) == read_tsv(text, "tsv")


def test_what_is_no_parquet_or_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dev.parquet"
    path.write_bytes(b"PAR0")
    with pytest.raises(Unsupported, match="no Parquet file"):
        read_file(path)
    path = tmp_path / "dev.tsv"
    path.write_bytes(b"index\tquestion\n1\t\xff")
    with pytest.raises(Unsupported, match="no UTF-8 text"):
        read_file(path)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("\ufeff" + tsv(fixture()), encoding="utf-8")
    assert len(read_file(path)) == 3


def test_files_are_looked_for_where_the_task_says_then_in_the_cache_then_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMARK_CACHE", str(tmp_path / "cache"))
    asked = []

    def hub(*file: str) -> Path:
        asked.append(file)
        raise OSError("nobody answers")

    monkeypatch.setattr(mmbench_data, "hub_file", hub)
    with pytest.raises(Unsupported, match=r"nobody answers Put .*MMBench_TEST_CN.tsv"):
        find_file("cn", "test", "1.0", file="", revision="abc")
    assert asked == [("lmms-lab/MMBench", "cn/test-00000-of-00001.parquet", "abc")]
    with pytest.raises(Unsupported, match=r"MMBench 1.1 is not .*MMBench_DEV_EN_V11.tsv"):
        find_file("en", "dev", "1.1", file="", revision="main")
    assert len(asked) == 1  # the hub has no 1.1
    path = tmp_path / "cache" / "mmbench" / "MMBench_DEV_EN_V11.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert find_file("en", "dev", "1.1", file="", revision="main") == path
    with pytest.raises(Unsupported, match=r"no MMBench file .*mine.tsv"):
        find_file("en", "dev", "1.1", file=str(tmp_path / "mine.tsv"), revision="main")
    assert find_file("en", "dev", "1.0", file=str(path), revision="main") == path
