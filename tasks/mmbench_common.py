"""What multiple choice about images has in common: circular calls, two ways to read an answer.

An item is a question with all its rotations, so that intervals, tests and `--limit` count
questions. The rotations are asked one after the other, each from the image on: nothing is kept
between them. The stored output is JSON: the answers, and the log-probabilities of the option
letters where each answer begins.

| metric | of what |
|---|---|
| `circular` | questions with every rotation right; open if only unreadable answers are in the way |
| `circular_official` | the same with an unreadable answer as wrong, the published number |
| `vanilla_0` | the unrotated question right, of those whose answer can be read |
| `vanilla_all` | rotations right, of those whose answer can be read |
| `answered` | rotations whose answer can be read |
| `circular_logprob`, `vanilla_0_logprob` | the same questions, judged by the likeliest letter |
| `category/…`, `l2-category/…` | `circular` of a category's questions |

`vanilla_all` and `answered` count rotations, so a question with two options weighs half of one with
four; `vanilla_all` times `answered` is the public number.

Wordings of the prompt: `llava` is that of LLaVA's own evaluation, `lmms-eval` and `vlmevalkit` are
those harnesses'. A hint `nan` is left out, where lmms-eval puts the word into the prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from models.base import (
    Decoding,
    InvalidOutput,
    Trace,
    VisionLanguageModel,
    VisualAnswer,
    VisualPrompt,
)
from tasks import mmbench_scorers as rules
from tasks.base import Item, Metric, Scored, Scores, Task, Unscored
from tasks.checks import check_choice
from tasks.mmbench_data import ChoiceQuestion, Rotation, decode_image
from tasks.mmbench_scorers import EXTRACTIONS, Extraction
from tasks.scorers import Scorer, whole

Wording = Literal["llava", "lmms-eval", "vlmevalkit"]
Language = Literal["en", "cn"]

# Probabilities that agree to so many decimals are a tie; more would not survive another order of
# summation, and outputs are compared by their text.
_LOG_DECIMALS = 4

_LLAVA_CLOSING = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
_LMMS_CLOSING = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接使用所提供的选项字母作为答案回答。",
}


def question_prompt(rotation: Rotation, wording: Wording, language: Language = "en") -> str:
    """Return what a model is asked, its own template and the image's place not included."""
    hint, question = rotation.hint, rotation.question
    lines = "".join(f"{letter}. {text}\n" for letter, text in rotation.options.items())
    if wording == "llava":
        asked = f"{hint}\n{question}" if hint else question
        return f"{asked}\n{lines}{_LLAVA_CLOSING[language]}"
    if wording == "lmms-eval":
        asked = f"{hint} {question}" if hint else question
        return f"{asked} There are several options:\n{lines}{_LMMS_CLOSING[language]}"
    asked = f"Hint: {hint}\nQuestion: {question}" if hint else f"Question: {question}"
    closing = "Please select the correct answer from the options above. \n"
    return f"{asked}\nOptions:\n{lines}{closing}"


@dataclass(frozen=True)
class CircularAnswers:
    """Answers to all rotations of a question as one result.

    Attributes:
        text: JSON: `answers`, and `log_probabilities` of the letters of each.
        token_ids: The tokens of all answers.
        trace: What was done, see `joined_trace`.
    """

    text: str
    token_ids: tuple[int, ...]
    trace: Trace


class _Reading(NamedTuple):
    """What the answers to a question mean, one entry a rotation, None where a letter is missing."""

    letters: list[str | None]
    likeliest: list[str | None]
    right: list[bool | None]
    likeliest_right: list[bool | None]


@dataclass(frozen=True, kw_only=True)
class CircularChoice(Task[VisionLanguageModel]):
    """Multiple choice about images, each question asked in every rotation of its options.

    Attributes:
        prompt: Whose wording.
        extraction: Whose rule reads a letter from an answer; `score` shows the other one beside it.
        max_new_tokens: Longest answer.
    """

    prompt: Wording = "llava"
    extraction: Extraction = "vlmevalkit"
    max_new_tokens: int = 32

    capability = "VisionLanguageModel"
    # Answers are a letter or two behind an image's hundreds of tokens.
    bound_by = "operations"

    def __post_init__(self) -> None:
        check_choice("prompt", self.prompt, get_args(Wording))
        check_choice("extraction", self.extraction, EXTRACTIONS)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")

    @abstractmethod
    def questions(self) -> Sequence[ChoiceQuestion]:
        """Return the questions in the order in which they are asked."""

    @property
    @abstractmethod
    def categories(self) -> Mapping[str, Sequence[str]]:
        """The categories with a metric of their own, by the column that holds them."""

    @property
    def asked_in(self) -> Language:
        """The language of the prompt's own words."""
        return "en"

    @property
    def crops(self) -> int:
        """How images are cut, see `models.base.VisualPrompt`."""
        return 1

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Circular accuracy, what else is reported, and circular accuracy by category."""
        parts = [f"{level}/{name}" for level, names in self.categories.items() for name in names]
        return (
            _binary("circular"),
            _binary("circular_official"),
            _binary("vanilla_0"),
            Metric(name="vanilla_all", unit="fraction", kind="corpus"),
            Metric(name="answered", unit="fraction", kind="corpus"),
            _binary("circular_logprob"),
            _binary("vanilla_0_logprob"),
            *map(_binary, parts),
        )

    def items(self) -> Iterator[Item]:
        """Yield the questions, each with all its rotations."""
        name = type(self).__module__.rpartition(".")[2].replace("_", "-")
        for question in self.questions():
            yield self.item(f"{name}/{question.number:04}", question)

    def item(self, item_id: str, question: ChoiceQuestion) -> Item:
        """Return a question as an item."""
        return Item(
            item_id,
            {
                "image": question.image,
                "category": question.category,
                "l2-category": question.l2_category,
                "rotations": [
                    {
                        "prompt": question_prompt(rotation, self.prompt, self.asked_in),
                        "options": rotation.options,
                        "answer": rotation.answer,
                    }
                    for rotation in question.rotations
                ],
            },
        )

    def call(
        self, model: VisionLanguageModel, item: Item, *, fixed_length: bool = False
    ) -> CircularAnswers:
        """Ask every rotation; the image file is decoded once, by whoever is measured.

        Raises:
            models.base.InvalidOutput: Log-probabilities are missing or are no numbers.
        """
        started = time.perf_counter()
        image = decode_image(item.fields["image"])
        decoding = Decoding(max_new_tokens=self.max_new_tokens, ignore_eos=fixed_length)
        begun = [started]
        answers: list[VisualAnswer] = []
        for rotation in item.fields["rotations"]:
            if answers:
                begun.append(time.perf_counter())
            letters = tuple(rotation["options"])
            prompt = VisualPrompt(
                image=image, text=rotation["prompt"], options=letters, crops=self.crops
            )
            answer = model.answer(prompt, decoding)
            found = answer.option_log_probabilities
            if len(found) != len(letters) or any(map(math.isnan, found)):
                raise InvalidOutput(
                    f"letters {', '.join(letters)} were given the log-probabilities {found}."
                )
            answers.append(answer)
        return CircularAnswers(
            stored_text(answers),
            tuple(token for answer in answers for token in answer.token_ids),
            joined_trace(begun, [answer.trace for answer in answers]),
        )

    def score(self, item: Item, output: str) -> Scores:
        """Return the scores of a question; see the module's table."""
        return self.score_with_detail(item, output).scores

    def score_with_detail(self, item: Item, output: str) -> Scored:
        """Return the scores of a question and the letters that were read, `-` for none.

        Equal details are equal answers, whatever was written around the letters.
        """
        read = self._read(item, output)
        detail = " ".join(letter or "-" for letter in read.letters)
        if not item.fields["rotations"][0]["answer"]:
            unknown = Unscored("the file has no answers; this split is scored by its authors alone")
            scores: dict[str, float | Unscored] = {
                metric.name: unknown for metric in self.metrics if "/" not in metric.name
            }
            scores["answered"] = _answered(read)
            return Scored(scores, detail)
        every = rules.circular(read.right)
        scores = {
            "circular": _scored(every, read.letters),
            "circular_official": float(every is True),
            "vanilla_0": _scored(read.right[0], read.letters[:1]),
            "vanilla_all": (
                _unread(read.letters)
                if None in read.right
                else sum(map(bool, read.right)) / len(read.right)
            ),
            "answered": _answered(read),
            "circular_logprob": _scored(rules.circular(read.likeliest_right), read.likeliest),
            "vanilla_0_logprob": _scored(read.likeliest_right[0], read.likeliest[:1]),
        }
        for level, names in self.categories.items():
            if item.fields[level] in names:
                scores[f"{level}/{item.fields[level]}"] = scores["circular"]
        return Scored(scores, detail)

    def corpus(
        self, outputs: Mapping[str, str], draws: NDArray[np.int64]
    ) -> Mapping[str, NDArray[np.float64]]:
        """Return `vanilla_all` and `answered` on resampled questions: ratios of rotations."""
        items = {item.id: item for item in self.items()}
        counts = []
        for name, output in outputs.items():
            read = self._read(items[name], output)
            has_answer = bool(items[name].fields["rotations"][0]["answer"])
            readable = len(read.letters) - read.letters.count(None)
            right = read.right.count(True) if has_answer else math.nan
            counts.append((right, readable, len(read.letters)))
        right, readable, total = np.array(counts, dtype=np.float64)[draws].sum(axis=1).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"vanilla_all": right / readable, "answered": readable / total}

    def conditions(self) -> dict[str, str]:
        """Return the hash of the prompt's wording, which moves scores by several points."""
        sample = Rotation("question", "hint", {"A": "first", "B": "second"}, "A")
        wording = question_prompt(sample, self.prompt, self.asked_in)
        return {"prompt_hash": hashlib.sha256(wording.encode()).hexdigest()[:16]}

    def other_scorers(self) -> tuple[Scorer, ...]:
        """Return the public rule that this run did not use, for a second opinion."""
        others = [replace(self, extraction=rule) for rule in EXTRACTIONS if rule != self.extraction]
        return tuple(
            Scorer(other.extraction, whole, other.score_with_detail, other.extraction, other)
            for other in others
        )

    def _read(self, item: Item, output: str) -> _Reading:
        answers, log_probabilities = _stored(output, len(item.fields["rotations"]))
        rotations = item.fields["rotations"]
        letters = [
            rules.extract(self.extraction, answer, rotation["options"])
            for answer, rotation in zip(answers, rotations, strict=True)
        ]
        likeliest = [
            rules.likeliest(list(rotation["options"]), values)
            for values, rotation in zip(log_probabilities, rotations, strict=True)
        ]
        right = [rotation["answer"] for rotation in rotations]
        return _Reading(
            letters, likeliest, rules.outcomes(letters, right), rules.outcomes(likeliest, right)
        )


def stored_text(answers: Sequence[VisualAnswer]) -> str:
    """Return answers as the text that is stored and scored."""
    return json.dumps(
        {
            "answers": [answer.text for answer in answers],
            "log_probabilities": [
                [round(value, _LOG_DECIMALS) for value in answer.option_log_probabilities]
                for answer in answers
            ],
        },
        ensure_ascii=False,
    )


def _stored(output: str, count: int) -> tuple[list[str], list[list[float]]]:
    """Return answers and log-probabilities from the text of `stored_text`.

    Raises:
        ValueError: It is no such text, or has another number of answers.
    """
    found: Any = json.loads(output)
    answers, log_probabilities = found["answers"], found["log_probabilities"]
    if not len(answers) == len(log_probabilities) == count:
        raise ValueError(f"{count} rotations were asked, {len(answers)} answers are stored.")
    return answers, log_probabilities


def joined_trace(begun: Sequence[float], traces: Sequence[Trace]) -> Trace:
    """Return calls that followed one another as one trace.

    Forwards stand one after the other and operations are added up. Each phase's mark lies where it
    would if all calls had gone through it together: the time until the mark of the prefill is that
    of all prefills. Notes are the calls' common value, or the mean of numbers that differ; the
    prefills emitted as many tokens as there were calls.

    Args:
        begun: When each call began, seconds of `time.perf_counter`; ascending.
        traces: What each did, with the same phases.
    """
    joined = Trace(
        prefill=[forward for trace in traces for forward in trace.prefill],
        forwards=[forward for trace in traces for forward in trace.forwards],
        accepted=[count for trace in traces for count in trace.accepted],
        draft_forwards=sum(trace.draft_forwards for trace in traces),
        flops=sum(trace.flops for trace in traces),
        kv_bytes=sum(trace.kv_bytes for trace in traces),
    )
    seconds: dict[str, float] = {}
    for start, trace in zip(begun, traces, strict=True):
        before = start
        for phase, end in sorted(trace.marks.items(), key=lambda mark: mark[1]):
            seconds[phase] = seconds.get(phase, 0.0) + end - before
            before = end
    end = begun[0]
    for phase, taken in seconds.items():
        end += taken
        joined.marks[phase] = end
    for name in dict.fromkeys(name for trace in traces for name in trace.notes):
        values = [trace.notes[name] for trace in traces if name in trace.notes]
        numbers = [value for value in values if isinstance(value, (int, float))]
        is_mean = len(set(values)) > 1 and len(numbers) == len(values)
        joined.notes[name] = sum(numbers) / len(numbers) if is_mean else values[-1]
    joined.notes["prefill_tokens"] = sum(
        int(trace.notes.get("prefill_tokens", 1)) for trace in traces
    )
    return joined


def _binary(name: str) -> Metric:
    return Metric(name=name, unit="fraction", kind="binary")


def _answered(read: _Reading) -> float:
    return 1 - read.letters.count(None) / len(read.letters)


def _scored(outcome: bool | None, letters: Sequence[str | None]) -> float | Unscored:
    return _unread(letters) if outcome is None else float(outcome)


def _unread(letters: Sequence[str | None]) -> Unscored:
    """Say in which rotations, counted from 0, no option could be told."""
    places = ", ".join(str(place) for place, letter in enumerate(letters) if letter is None)
    return Unscored(f"no option can be told from the answer to rotation {places}")
