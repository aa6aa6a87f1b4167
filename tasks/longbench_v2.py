"""LongBench v2: four-way multiple choice over 8 thousand to 2 million words.

Source: arXiv 2412.15204; prompt, cut and reading of the answer as THUDM/LongBench at 2e00731 has
them. Chance is 0.25; an answer without a letter is wrong, as in the official scores, and `answered`
is the share with one. Differs from the official runs: decoded greedily unless `temperature` says
otherwise (they sample at 0.1); no chain of thought; the tokenizer's own chat template is applied
here and not by a server. One item:
    prompt "Please read the following text ..."   answer "C"   difficulty "hard"   length "short"
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from models.base import Decoding, Generation, TextGenerator, Unsupported
from tasks.base import Dataset, Item, Metric, Scored, Scores, Task
from tasks.checks import check_choice
from tasks.longbench_generator import make_item
from tasks.longbench_protocol import (
    Chat,
    Truncation,
    check_prompting,
    choice_prompt,
    prompt_ids,
    read_records,
    usual_max_length,
)
from tasks.longbench_scorers import choice_letter

DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")


@dataclass(frozen=True, kw_only=True)
class LongBenchV2(Task[TextGenerator]):
    """503 questions with four choices over long texts; accuracy, by difficulty and by length.

    Attributes:
        part: `all`, a difficulty (`easy`, `hard`) or a length (`short`, `medium`, `long`).
        max_length: Most tokens of a prompt, chat template not counted; 0 for the model's window
            less 500.
        truncation: What is kept of a longer prompt, see `longbench`.
        chat: `auto` uses the tokenizer's chat template where it has one; `always`; `never`.
        folder: Folder with data.json; empty for tokenmark's cache, then the hub.
        revision: Of the data set on the hub; a commit is what reproduces.
        max_new_tokens: Longest answer; the official runs have 128.
        temperature: 0 takes the most likely token; the official runs have 0.1.
        seed: Of the sampling, together with the item's id.
    """

    part: str = "all"
    max_length: int = 0
    truncation: Truncation = "middle"
    chat: Chat = "auto"
    folder: str = ""
    revision: str = "main"
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    version = "1.0"
    data = Dataset(
        source="THUDM/LongBench-v2", revision="main", split="train", license="Apache-2.0"
    )
    capability = "TextGenerator"
    speed_of = "decode"
    bound_by = "bytes"

    def __post_init__(self) -> None:
        check_choice("part", self.part, ("all", *DIFFICULTIES, *LENGTHS))
        check_prompting(self.max_length, self.truncation, self.chat)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy, its parts, and the share of answers that name a letter."""
        parts = (*DIFFICULTIES, *LENGTHS) if self.part == "all" else ()
        names = ("accuracy", *parts, "answered")
        return tuple(Metric(name=name, unit="fraction", kind="binary") for name in names)

    def items(self) -> Iterator[Item]:
        """Yield the questions in their official order.

        Raises:
            Unsupported: The records are not to be had; says what to put where.
        """
        records = read_records("", 2, folder=self.folder, revision=self.revision)
        for number, record in enumerate(records):
            try:
                fields = {
                    "prompt": choice_prompt(record),
                    "answer": record["answer"],
                    "difficulty": record["difficulty"],
                    "length": record["length"],
                    "domain": record.get("domain", ""),
                }
                name = str(record["_id"])
            except (KeyError, AttributeError) as error:
                raise Unsupported(
                    f"record {number} of LongBench v2 is none of its: {error!r}."
                ) from error
            if self.part in ("all", fields["difficulty"], fields["length"]):
                yield Item(f"longbench-v2/{name}", fields)

    def warmup_items(self) -> Iterator[Item]:
        """Yield generated questions of the same form, which are in no task."""
        for number in range(4):
            found = make_item("docqa", number, length=512, seed="warm-up").fields
            answer = found["answers"][0]
            record = {
                "context": found["context"],
                "question": found["input"],
                "choice_A": answer,
                "choice_B": "Nobody knows",
                "choice_C": "It is not said",
                "choice_D": "All of them",
            }
            fields = {"prompt": choice_prompt(record), "answer": "A", "difficulty": "easy"}
            yield Item(f"warmup/{number}", fields | {"length": "short", "domain": "generated"})

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        """Cut the prompt, wrap it as a message, and continue it."""
        ids = prompt_ids(
            model,
            item.fields["prompt"],
            max_length=self.max_length or usual_max_length(model, self.max_new_tokens),
            truncation=self.truncation,
            chat=self.chat,
            joined=True,
        )
        drawn = hashlib.sha256(f"{self.seed} {item.id}".encode()).digest()
        decoding = Decoding(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=int.from_bytes(drawn[:4]),
            ignore_eos=fixed_length,
        )
        return model.generate(ids, decoding)

    def score(self, item: Item, output: str) -> Scores:
        """Return 1 if the answer settles on the right letter, else 0."""
        return self.score_with_detail(item, output).scores

    def score_with_detail(self, item: Item, output: str) -> Scored:
        """Score, and say which letter was read."""
        letter = choice_letter(output)
        is_right = float(letter == item.fields["answer"])
        scores = {"accuracy": is_right, "answered": float(bool(letter))}
        if self.part == "all":
            scores |= {item.fields["difficulty"]: is_right, item.fields["length"]: is_right}
        return Scored(scores, letter or "no letter")
