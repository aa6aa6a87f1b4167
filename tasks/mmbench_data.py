"""MMBench's files: rows of a TSV or Parquet file become questions with all their rotations.

A row is a question with its options in one order. Rows with an index below one million are the
questions; a row with index `question + k * 1,000,000` is its copy k, with the options moved on in a
circle. Columns: index, question, hint, A, B, C, D, answer, category, l2-category (or L2-category),
source, split, image, comment; hint, source, split and comment may be missing, and so may the
answers, which the test split keeps to itself. An empty field, or `nan`, is an absent one. The image
is a file in base64, or the index of the row that has it.

Files differ in their copies: some spell the image out in every row, some (and data sets on the hub)
lack copies. A rotation that is not in the file is made from the question, so that a question
with n options always has n, whatever was cut off.

Source: arXiv 2307.06281; files as VLMEvalKit at e8e78f0 and lmms-eval at 75571cf read them.
"""

from __future__ import annotations

import base64
import csv
import io
import string
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from models.base import Unsupported
from models.cache import cache_dir
from tasks.hub import hub_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

COPY_STEP = 1_000_000
_REQUIRED = ("index", "question", "A", "B", "answer", "category", "image")
# The column of the coarser level has two spellings.
_L2_NAMES = ("l2-category", "L2-category")
_ABSENT = frozenset({"", "nan", "NaN"})
# Nothing shorter is an image file; indices have at most eight digits.
_LONGEST_REFERENCE = 32


class Rotation(NamedTuple):
    """A question with its options in one order.

    Attributes:
        question, hint: As the row has them; the hint is "" where there is none.
        options: By letter, A first.
        answer: The right letter; "" where the file keeps it to itself.
    """

    question: str
    hint: str
    options: dict[str, str]
    answer: str


class ChoiceQuestion(NamedTuple):
    """A question about an image, in every rotation of its options.

    Attributes:
        number: Index of its first row.
        category, l2_category: The finer and the coarser level; "" where the file has none.
        image: Image file in base64.
        rotations: As many as options, the unrotated one first.
    """

    number: int
    category: str
    l2_category: str
    image: str
    rotations: tuple[Rotation, ...]


class _Row(NamedTuple):
    place: str
    number: int
    rotation: Rotation
    category: str
    l2_category: str
    image: str


def read_tsv(text: str, source: str) -> tuple[ChoiceQuestion, ...]:
    """Return the questions of a TSV file, in the order of their first rows.

    Args:
        text: The file.
        source: What messages call it.

    Raises:
        Unsupported: The file is none of MMBench's, or a record of it is damaged; names the record.
    """
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
        try:
            header = next(reader, [])
            records = [
                (f"line {reader.line_num}", _fields(header, cells, source, reader.line_num))
                for cells in reader
                if cells
            ]
        except csv.Error as error:
            raise Unsupported(f"{source}, line {reader.line_num}: {error}.") from error
    return _questions(header, records, source)


def read_parquet(path: Path) -> tuple[ChoiceQuestion, ...]:
    """Return the questions of a Parquet file as the hub has them; see `read_tsv`.

    Its images are the files' bytes instead of base64.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise Unsupported(f"{path} is no Parquet file: {error}") from error
    records = []
    for number, row in enumerate(table.to_pylist()):
        if isinstance(row.get("image"), dict):
            row["image"] = base64.b64encode(row["image"].get("bytes") or b"").decode("ascii")
        fields = {name: "" if cell is None else str(cell) for name, cell in row.items()}
        records.append((f"record {number}", fields))
    return _questions(table.column_names, records, str(path))


def read_file(path: Path) -> tuple[ChoiceQuestion, ...]:
    """Return the questions of a file, by its name a Parquet or a TSV file; see `read_tsv`."""
    if path.suffix == ".parquet":
        return read_parquet(path)
    try:
        return read_tsv(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise Unsupported(f"{path} is no UTF-8 text: {error.reason}.") from error


HUB_ID = "lmms-lab/MMBench"


def find_file(language: str, split: str, release: str, *, file: str, revision: str) -> Path:
    """Return where a part of MMBench lies: the file named, tokenmark's cache, or the hub's copy.

    Args:
        language: `en` or `cn`.
        split: `dev` or `test`.
        release: `1.0` or `1.1`.
        file: A TSV or Parquet file; empty to look for it.
        revision: Of the hub's data set.

    Raises:
        Unsupported: There is none; says what to put where.
    """
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise Unsupported(f"there is no MMBench file {path}.")
        return path
    suffix = "_V11" if release == "1.1" else ""
    name = f"MMBench_{split.upper()}_{language.upper()}{suffix}.tsv"
    path = cache_dir() / "mmbench" / name
    if path.is_file():
        return path
    advice = (
        f"Put MMBench's file {name} there as {path}, or name a file: mmbench:file=PATH. "
        "OpenCompass publishes it."
    )
    if release == "1.1":
        raise Unsupported(f"MMBench 1.1 is not on this machine. {advice}")
    try:
        return hub_file(HUB_ID, f"{language}/{split}-00000-of-00001.parquet", revision)
    except OSError as error:
        raise Unsupported(
            f"MMBench is not on this machine and not to be had from the hub: {error} {advice}"
        ) from error


def decode_image(image: str) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image file in base64, (height, width, 3), uint8.

    Raises:
        OSError, SyntaxError, ValueError: As Pillow and base64 say what is wrong with it.
    """
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(image, validate=True))) as opened:
        return np.asarray(opened.convert("RGB"))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields hold whole images: the csv module stops at 131,072 characters by itself."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _fields(header: list[str], cells: list[str], source: str, line: int) -> dict[str, str]:
    if len(cells) != len(header):
        raise Unsupported(
            f"{source}, line {line} (index {cells[0]!r}): {len(cells)} fields, but the first line "
            f"names {len(header)} columns. The file is cut off, or a field holds a bare tab."
        )
    return dict(zip(header, cells, strict=True))


def _questions(
    header: Iterable[str], records: list[tuple[str, dict[str, str]]], source: str
) -> tuple[ChoiceQuestion, ...]:
    """Put rows together: copies to their questions, images to those that refer to them."""
    names = set(header)
    if missing := [name for name in _REQUIRED if name not in names]:
        raise Unsupported(
            f"{source} is no file of MMBench: it has no column {', '.join(missing)}; its columns "
            f"are {', '.join(map(str, header)) or 'none'}."
        )
    letters = ""
    for letter in string.ascii_uppercase:
        if letter not in names:
            break
        letters += letter
    rows: dict[int, _Row] = {}
    for place, fields in records:
        row = _row(fields, letters, f"{source}, {place}")
        if row.number in rows:
            raise Unsupported(f"{row.place}: the index stands in {rows[row.number].place}, too.")
        rows[row.number] = row
    copies: dict[int, list[_Row]] = {}
    for index in sorted(rows):
        if index >= COPY_STEP:
            copies.setdefault(index % COPY_STEP, []).append(rows[index])
    firsts = [row for row in rows.values() if row.number < COPY_STEP]
    if not firsts:
        raise Unsupported(f"{source} holds no questions, only {len(rows)} copies.")
    if orphans := sorted(set(copies) - {row.number for row in firsts}):
        raise Unsupported(
            f"{copies[orphans[0]][0].place}: the copy's question {orphans[0]} is not in the file."
        )
    return tuple(
        ChoiceQuestion(
            number=row.number,
            category=row.category,
            l2_category=row.l2_category,
            image=_image(row, rows),
            rotations=_rotations(row, copies.get(row.number, [])),
        )
        for row in firsts
    )


def _row(fields: Mapping[str, str], letters: str, place: str) -> _Row:
    """Read one row.

    Raises:
        Unsupported: With what is wrong with it.
    """

    def text(name: str) -> str:
        found = fields.get(name, "")
        return "" if found in _ABSENT else found

    place += f" (index {fields['index']!r})"
    try:
        index = int(fields["index"])
    except ValueError:
        raise Unsupported(f"{place}: the index is no whole number.") from None
    if index < 0:
        raise Unsupported(f"{place}: the index is negative.")
    given = [letter for letter in letters if text(letter)]
    if len(given) < 2 or "".join(given) != letters[: len(given)]:
        raise Unsupported(
            f"{place}: its options are {', '.join(given) or 'none'}; there must be at least A and "
            "B, and none left out between two."
        )
    answer = text("answer")
    if answer and answer not in given:
        raise Unsupported(f"{place}: the answer {answer!r} is none of its options {given}.")
    rotation = Rotation(
        question=text("question"),
        hint=text("hint"),
        options={letter: text(letter) for letter in given},
        answer=answer,
    )
    if not rotation.question:
        raise Unsupported(f"{place}: the question is empty.")
    coarse = next((text(name) for name in _L2_NAMES if name in fields), "")
    return _Row(place, index, rotation, text("category"), coarse, text("image"))


def _rotations(first: _Row, copies: list[_Row]) -> tuple[Rotation, ...]:
    """Return all rotations of a question: those of the file, then those that it lacks.

    Raises:
        Unsupported: A copy is none of this question.
    """
    base = first.rotation
    for copy in copies:
        same_options = sorted(copy.rotation.options.values()) == sorted(base.options.values())
        if not same_options or _answer_text(copy.rotation) != _answer_text(base):
            raise Unsupported(
                f"{copy.place}: its options or its answer are not those of its question, index "
                f"{first.number}, in another order."
            )
    found = [base, *(copy.rotation for copy in copies)]
    count = len(base.options)
    if len(found) > count:
        raise Unsupported(
            f"{copies[-1].place}: question {first.number} has {count} options, which is as many "
            f"rotations as there can be, and {len(found)} rows."
        )
    for shift in range(1, count):
        if len(found) == count:
            break
        turned = rotated(base, shift)
        if not any(turned[2:] == each[2:] for each in found):
            found.append(turned)
    return tuple(found)


def rotated(rotation: Rotation, shift: int) -> Rotation:
    """Return a question with option i of n at place (i - shift) mod n, as MMBench's copies have."""
    letters, texts = list(rotation.options), list(rotation.options.values())
    answer = rotation.answer
    if answer:
        answer = letters[(letters.index(answer) - shift) % len(letters)]
    turned = texts[shift:] + texts[:shift]
    return rotation._replace(options=dict(zip(letters, turned, strict=True)), answer=answer)


def _answer_text(rotation: Rotation) -> str:
    return rotation.options.get(rotation.answer, "")


def _image(row: _Row, rows: Mapping[int, _Row]) -> str:
    """Return a row's image in base64, following references to other rows.

    Raises:
        Unsupported: There is none, or it is no image.
    """
    from PIL import Image

    image, seen = row.image, [row.number]
    while len(image) <= _LONGEST_REFERENCE:
        if not image:
            raise Unsupported(f"{row.place}: there is no image.")
        if not image.isdecimal() or int(image) not in rows:
            raise Unsupported(
                f"{row.place}: the image {image!r} is neither a file in base64 nor the index of "
                "another row."
            )
        if int(image) in seen:
            raise Unsupported(f"{row.place}: the image refers to itself by way of {seen}.")
        seen.append(int(image))
        image = rows[int(image)].image
    try:
        # Now and whole: a damaged image is the data's fault, not that of the method that would be
        # the first to see it.
        decode_image(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unsupported(f"{row.place}: the image cannot be opened: {error}") from error
    return image
