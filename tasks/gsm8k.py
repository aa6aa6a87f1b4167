"""GSM8K: 1,319 grade-school word problems, judged by the number behind `####`.

Source: arXiv 2110.14168; openai/grade-school-math at 2909d34, whose extraction decides: the number
behind the first `####`, commas left out, equal to the reference's as a string; an answer without
one is wrong. Prompts are those of lm-eval's `gsm8k` (`Question: …`, `Answer:`), which diffusion
language models are measured with. Differs from lm-eval: the examples in front are the first of the
training set, for every problem the same, where lm-eval draws them.

`flexible` is lm-eval's second reading, the last number of the answer, wherever it stands. One item:
    prompt "Question: Janet's ducks lay 16 eggs ... Answer:"   target "18"
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import Decoding, Generation, TextGenerator, Unsupported
from models.cache import cache_dir
from tasks.base import Dataset, Item, Metric, Scores, Task
from tasks.hub import hub_file

HUB_ID = "openai/gsm8k"
WARMUP_ITEMS = 4
STOP = ("Question:",)
_OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")
_LAST_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Task[TextGenerator]):
    """Solve a word problem in sentences and say the result.

    Attributes:
        shots: Solved problems in front of each.
        max_new_tokens: Longest answer; for a masked-diffusion model the number of masks.
        folder: With `train` and `test` as `.jsonl` (the authors' archive) or `.parquet` (the
            hub's); empty for tokenmark's cache, then the hub.
        revision: Of the data set on the hub; a commit is what reproduces.
    """

    shots: int = 5
    max_new_tokens: int = 256
    folder: str = ""
    revision: str = "main"

    version = "1.0"
    data = Dataset(source=HUB_ID, revision="main", split="test", license="MIT")
    capability = "TextGenerator"

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"shots must be 0 or more, got {self.shots}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Share of right results by the official extraction, and by the last number."""
        return tuple(
            Metric(name=name, unit="fraction", kind="binary")
            for name in ("exact-match", "flexible-match")
        )

    def items(self) -> Iterator[Item]:
        """Yield the problems in their official order.

        Raises:
            Unsupported: They are not to be had; says what to put where.
        """
        front = self._examples()
        for place, record in enumerate(self._records("test")):
            yield _item(f"gsm8k/{place}", front, record)

    def warmup_items(self) -> Iterator[Item]:
        """Yield training problems behind the examples."""
        front = self._examples()
        rest = self._records("train")[self.shots :]
        for place, record in enumerate(rest[:WARMUP_ITEMS]):
            yield _item(f"gsm8k/warm-up-{place}", front, record)

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        """Continue the prompt by an answer."""
        decoding = Decoding(max_new_tokens=self.max_new_tokens, stop=STOP, ignore_eos=fixed_length)
        return model.generate(model.tokenizer.encode(item.fields["prompt"]), decoding)

    def score(self, item: Item, output: str) -> Scores:
        """Return 1 for the right number; an answer without any is wrong, as officially."""
        target = item.fields["target"]
        return {
            "exact-match": float(official_number(output) == target),
            "flexible-match": float(last_number(output) == target),
        }

    def _records(self, split: str) -> list[dict[str, str]]:
        return read_records(split, self.folder, self.revision)

    def _examples(self) -> str:
        records = self._records("train")[: self.shots] if self.shots else []
        if len(records) < self.shots:
            raise ValueError(
                f"shots must be at most {len(records)}, the number of training problems, got "
                f"{self.shots}."
            )
        return "".join(f"{_question(record)} {record['answer']}\n\n" for record in records)


def official_number(text: str) -> str | None:
    """Return the number behind the first `####` as the authors' code reads it; None without one."""
    found = _OFFICIAL.search(text)
    return found[1].strip().replace(",", "") if found else None


def last_number(text: str) -> str | None:
    """Return the last number of a text as lm-eval's `flexible-extract` reads it; None without."""
    found = list(_LAST_NUMBER.finditer(text))
    if not found:
        return None
    return found[-1][0].replace(",", "").replace("$", "").removesuffix(".")


def _question(record: dict[str, str]) -> str:
    return f"Question: {record['question']}\nAnswer:"


def _item(name: str, front: str, record: dict[str, str]) -> Item:
    target = official_number(record["answer"])
    if target is None:
        raise Unsupported(f"problem {name} of GSM8K has no result behind '####' in its solution.")
    return Item(name, {"prompt": front + _question(record), "target": target})


@functools.lru_cache(maxsize=8)
def read_records(split: str, folder: str, revision: str) -> list[dict[str, str]]:
    """Return the problems of a split in their order: `question` and `answer`.

    Args:
        split: `train` or `test`.
        folder: Where to look; empty for the cache folder, and then the hub.
        revision: Of the hub's data set.

    Raises:
        Unsupported: They are not to be had, or are no such problems; says what to put where.
    """
    root = Path(folder).expanduser() if folder else cache_dir() / "gsm8k"
    for place in _places(root, split):
        return _read(place)
    if folder:
        raise Unsupported(
            f"GSM8K's problems are not in {root}: it needs {split}.jsonl, as in the authors' "
            f"archive, or {_hub_file(split)}, as in {HUB_ID} on the hub."
        )
    try:
        return _read(hub_file(HUB_ID, _hub_file(split), revision))
    except OSError as error:
        raise Unsupported(
            f"GSM8K's problems are not on this machine and not to be had from the hub: {error} Put "
            f"{root / split}.jsonl there, or name a folder that holds it: gsm8k:folder=FOLDER."
        ) from error


def _hub_file(split: str) -> str:
    return f"main/{split}-00000-of-00001.parquet"


def _places(root: Path, split: str) -> Iterator[Path]:
    for pattern in (f"{split}.jsonl", f"data/{split}.jsonl", f"main/{split}-*.parquet"):
        yield from sorted(root.glob(pattern))


def _read(path: Path) -> list[dict[str, str]]:
    """Return the records of a file.

    Raises:
        Unsupported: It holds something else.
    """
    records: list[Any]
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            records = pyarrow.parquet.read_table(path, columns=["question", "answer"]).to_pylist()
        else:
            # Not splitlines: texts may hold other line separators unescaped.
            text = path.read_text(encoding="utf-8")
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (KeyError, ValueError, OSError) as error:
        raise Unsupported(f"{path} holds no problems of GSM8K: {error}") from error
    for record in records:
        if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
            raise Unsupported(f"{path} holds no problems of GSM8K: a record lacks its question.")
    return records
