"""Writes questions in MMBench's file format: one TSV row for each question and circular copy.

Columns: index, question, hint, A, B, C, D, answer, category, l2-category, source, split, image,
comment. Copy k of a question has the index of the original plus k million. The image is a PNG in
base64; a copy carries the original's index in its place, as MMBench's own files do. MMBench
compresses its images as JPEG; PNG keeps the scenes' pixels exact, and readers do not mind.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from models.embedded.scenes.generator import Scene
from models.embedded.scenes.questions import (
    GROUPS,
    LETTERS,
    Question,
    circular,
)
from models.embedded.scenes.raster import render

COLUMNS = (
    "index",
    "question",
    "hint",
    *LETTERS,
    "answer",
    "category",
    "l2-category",
    "source",
    "split",
    "image",
    "comment",
)
# The index of copy k is the original's plus k times this.
COPY_STEP = 1_000_000


def png(scene: Scene) -> bytes:
    """Return a scene's picture as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(render(scene).image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def rows(items: Iterable[tuple[Scene, Question]], first_index: int = 0) -> Iterator[dict[str, str]]:
    """Yield the rows of questions and their circular copies, each question's copies together.

    Raises:
        ValueError: An index would reach `COPY_STEP`, where the copies' indices begin.
    """
    for number, (scene, question) in enumerate(items):
        index = first_index + number
        if index >= COPY_STEP:
            raise ValueError(f"question {number} has index {index}; the limit is {COPY_STEP - 1}.")
        for shift, copy in enumerate(circular(question)):
            image = str(index) if shift else base64.b64encode(png(scene)).decode("ascii")
            yield {
                "index": str(index + shift * COPY_STEP),
                "question": copy.text,
                "hint": "",
                **dict(zip(LETTERS, copy.options, strict=True)),
                "answer": LETTERS[copy.answer],
                "category": copy.category,
                "l2-category": GROUPS[copy.category],
                "source": scene.key,
                "split": scene.split,
                "image": image,
                "comment": "",
            }


def tsv(items: Iterable[tuple[Scene, Question]]) -> str:
    """Return questions and their circular copies as the text of a TSV file."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(items))
    return file.getvalue()


def write(path: Path, items: Iterable[tuple[Scene, Question]]) -> int:
    """Write a TSV file of questions and their circular copies; return the number of rows."""
    text = tsv(items)
    path.write_text(text, encoding="utf-8", newline="")
    # No field of ours holds a line break.
    return text.count("\n") - 1
