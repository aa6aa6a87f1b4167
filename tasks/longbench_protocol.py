"""LongBench's protocol: its tasks, prompts, lengths and cuts, and where its records come from.

Source: arXiv 2308.14508 (v1), 2412.15204 (v2); configuration and scripts of THUDM/LongBench at
2e00731. The prompts are the benchmark's own strings, compared with the official configuration, and
kept to the letter, misspellings and stray spaces included.

Where the data are looked for, in this order: the folder that the task is given; `longbench` in
tokenmark's cache folder; the hub. A folder is laid out like the hub's archive:

    data/hotpotqa.jsonl     records of v1, one a line; data/hotpotqa_e.jsonl those of LongBench-E
    data.json               v2: one list of records
    config/dataset2prompt.json     other prompts, used with `template=folder`
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from models.base import TextGenerator, Tokenizer, Unsupported
from models.cache import cache_dir
from tasks import longbench_scorers as scorers
from tasks.checks import check_choice
from tasks.hub import hub_file

Truncation = Literal["middle", "left", "right"]
Chat = Literal["auto", "never", "always"]

HUB_IDS = {1: "THUDM/LongBench", 2: "THUDM/LongBench-v2"}


class Prompting(TypedDict):
    """How ids are made of a prompt; see `prompt_ids`."""

    max_length: int
    truncation: Truncation
    chat: Chat


Scorer = Literal[
    "qa_f1",
    "qa_f1_chinese",
    "rouge_l",
    "rouge_l_chinese",
    "classification",
    "retrieval",
    "retrieval_chinese",
    "count",
    "code_similarity",
]


@dataclass(frozen=True)
class Protocol:
    """How one task of v1 is run.

    Attributes:
        category: One of six kinds of task.
        language: `en`, `zh` or `code`.
        scorer: How one prediction is compared with one answer.
        max_new_tokens: Longest answer.
        template: The prompt, with `{context}` and `{input}`.
    """

    category: str
    language: str
    scorer: Scorer
    max_new_tokens: int
    template: str


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based "
    "on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_UNANSWERABLE = (
    "nswer the question {place}as concisely as you can, using a single phrase or sentence if "
    "possible. If the question cannot be answered based on the information in the article, write "
    '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
    "Do not provide any explanation.\n\n"
)

PROTOCOLS: Mapping[str, Protocol] = {
    "narrativeqa": Protocol(
        "single-doc-qa",
        "en",
        "qa_f1",
        128,
        "You are given a story, which can be either a novel or a movie script, and a question. "
        "Answer the question asconcisely as you can, using a single phrase if possible. Do not "
        "provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on the "
        "story asconcisely as you can, using a single phrase if possible. Do not provide any "
        "explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    "qasper": Protocol(
        "single-doc-qa",
        "en",
        "qa_f1",
        128,
        "You are given a scientific article and a question. A"
        + _UNANSWERABLE.replace("{place}", "")
        + "Article: {context}\n\n A"
        + _UNANSWERABLE.replace("{place}", "based on the above article ")
        + "Question: {input}\n\nAnswer:",
    ),
    "multifieldqa_en": Protocol(
        "single-doc-qa",
        "en",
        "qa_f1",
        64,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: {input}\nAnswer:",
    ),
    "multifieldqa_zh": Protocol(
        "single-doc-qa",
        "zh",
        "qa_f1_chinese",
        64,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，"
        "不要输出任何其他字词。\n\n问题：{input}\n回答：",
    ),
    "hotpotqa": Protocol("multi-doc-qa", "en", "qa_f1", 32, _PASSAGES),
    "2wikimqa": Protocol("multi-doc-qa", "en", "qa_f1", 32, _PASSAGES),
    "musique": Protocol("multi-doc-qa", "en", "qa_f1", 32, _PASSAGES),
    "dureader": Protocol(
        "multi-doc-qa",
        "zh",
        "rouge_l_chinese",
        128,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n"
        "问题：{input}\n回答：",
    ),
    "gov_report": Protocol(
        "summarization",
        "en",
        "rouge_l",
        512,
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    "qmsum": Protocol(
        "summarization",
        "en",
        "rouge_l",
        512,
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the "
        "query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:",
    ),
    "multi_news": Protocol(
        "summarization",
        "en",
        "rouge_l",
        512,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    ),
    "vcsum": Protocol(
        "summarization",
        "zh",
        "rouge_l_chinese",
        512,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    "trec": Protocol(
        "few-shot",
        "en",
        "classification",
        64,
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        "{context}\n{input}",
    ),
    "triviaqa": Protocol(
        "few-shot",
        "en",
        "qa_f1",
        32,
        "Answer the question based on the given passage. Only give me the answer and do not output "
        "any other words. The following are some examples.\n\n{context}\n\n{input}",
    ),
    "samsum": Protocol(
        "few-shot",
        "en",
        "rouge_l",
        128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "{context}\n\n{input}",
    ),
    "lsht": Protocol(
        "few-shot",
        "zh",
        "classification",
        64,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    ),
    "passage_count": Protocol(
        "synthetic",
        "en",
        "count",
        32,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
        "Please carefully read these paragraphs and determine how many unique paragraphs there are "
        "after removing duplicates. In other words, how many non-repeating paragraphs are there in "
        "total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing "
        "duplicates. The output format should only contain the number, such as 1, 2, 3, and so on."
        "\n\nThe final answer is: ",
    ),
    "passage_retrieval_en": Protocol(
        "synthetic",
        "en",
        "retrieval",
        32,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
        "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}"
        "\n\nPlease enter the number of the paragraph that the abstract is from. The answer format "
        'must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    ),
    "passage_retrieval_zh": Protocol(
        "synthetic",
        "zh",
        "retrieval_chinese",
        32,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
        '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，'
        '"段落2"等格式\n\n答案是：',
    ),
    "lcc": Protocol(
        "code",
        "code",
        "code_similarity",
        64,
        "Please complete the code given below. \n{context}Next line of code:\n",
    ),
    "repobench-p": Protocol(
        "code",
        "code",
        "code_similarity",
        64,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
    ),
}

CATEGORIES = tuple(dict.fromkeys(each.category for each in PROTOCOLS.values()))

# The 13 tasks of LongBench-E, re-sampled to be even over length.
EVEN_TASKS = (
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
BUCKETS = ("0-4k", "4-8k", "8k+")

# Few-shot and code prompts show how to go on; chat models do better without their template there.
PLAIN_TASKS = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
FIRST_LINE_TASKS = frozenset({"trec", "triviaqa", "samsum", "lsht"})

CHOICE_TEMPLATE = (
    "Please read the following text and answer the question below.\n\n<text>\n$DOC$\n</text>\n\n"
    "What is the correct answer to this question: $Q$\nChoices:\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n"
    '(D) $C_D$\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
)
_CHOICE_FIELDS = {
    "$DOC$": "context",
    "$Q$": "question",
    "$C_A$": "choice_A",
    "$C_B$": "choice_B",
    "$C_C$": "choice_C",
    "$C_D$": "choice_D",
}


def length_bucket(length: int) -> str:
    """Return the bucket of LongBench-E for a length in words (Chinese: characters)."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def score_prediction(
    scorer: Scorer,
    prediction: str,
    answers: Sequence[str],
    classes: Sequence[str] = (),
    *,
    only_first_line: bool = False,
    corrected: bool = False,
) -> float:
    """Return the best score of a prediction over all answers.

    Args:
        scorer: Which score.
        prediction: As the model wrote it.
        answers: Any of them is right.
        classes: All classes, for `classification`.
        only_first_line: Score the first line that is not empty, as for the few-shot tasks.
        corrected: See `longbench_scorers.classification`.
    """
    if only_first_line:
        prediction = scorers.first_line(prediction)
    if scorer == "classification":
        compare = partial(scorers.classification, classes=classes, corrected=corrected)
        return scorers.best(compare, prediction, answers)
    return scorers.best(getattr(scorers, scorer), prediction, answers)


def choice_prompt(record: Mapping[str, str]) -> str:
    """Return the prompt of a record of v2, without chain of thought."""
    prompt = CHOICE_TEMPLATE
    for mark, name in _CHOICE_FIELDS.items():
        prompt = prompt.replace(mark, record[name].strip())
    return prompt


# --- prompts to tokens ---------------------------------------------------------------------------


def fit_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    max_length: int,
    truncation: Truncation = "middle",
    *,
    joined: bool = False,
) -> str:
    """Return a prompt cut to `max_length` tokens, as text.

    The text that is left is encoded again by whoever reads it, so the number of tokens may come out
    a few off, and special tokens are gone. An odd `max_length` loses one token in the middle.

    Args:
        tokenizer: Of the model.
        prompt: Whole prompt, before any chat template.
        max_length: Most tokens, at least 2.
        truncation: `middle` keeps both halves, `right` the beginning, `left` the end.
        joined: Decode both halves at once, as v2 does; v1 decodes each by itself, which differs
            where a character's bytes are cut apart or a tokenizer drops a leading space. v2 also
            keeps the token that an odd `max_length` has left over, in the second half.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}.")
    ids = tokenizer.encode(prompt)
    if len(ids) <= max_length:
        return prompt
    if truncation == "right":
        return tokenizer.decode(ids[:max_length])
    if truncation == "left":
        return tokenizer.decode(ids[-max_length:])
    half = max_length // 2
    if joined:
        return tokenizer.decode([*ids[:half], *ids[half - max_length :]])
    return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int] | None:
    """Return the ids of a prompt as a user's message; None if the tokenizer has no chat template.

    The template holds the special tokens itself, so none are added.
    """
    hub: Any = getattr(tokenizer, "hub", None)
    if not getattr(hub, "chat_template", None):
        return None
    text = hub.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(hub(text, add_special_tokens=False).input_ids)


def prompt_ids(
    model: TextGenerator,
    prompt: str,
    *,
    max_length: int,
    truncation: Truncation,
    chat: Chat,
    joined: bool = False,
) -> list[int]:
    """Return the ids that a model is given for a prompt: cut first, then wrapped as a message.

    Args:
        model: Whose tokenizer and chat template are used.
        prompt: Whole prompt.
        max_length: Most tokens, see `fit_prompt`.
        truncation: See `fit_prompt`.
        chat: `auto` uses the chat template if there is one, `always` needs one.
        joined: See `fit_prompt`.

    Raises:
        Unsupported: `chat` is `always` and the tokenizer has no template.
    """
    return _ids(
        model, fit_prompt(model.tokenizer, prompt, max_length, truncation, joined=joined), chat
    )


def _ids(model: TextGenerator, text: str, chat: Chat) -> list[int]:
    ids = None if chat == "never" else chat_ids(model.tokenizer, text)
    if ids is None and chat == "always":
        raise Unsupported(
            f"'{model.name}' has no chat template; chat=auto does without where there is none."
        )
    return model.tokenizer.encode(text) if ids is None else ids


def mark_prompt(
    model: TextGenerator,
    prompt: str,
    behind: int,
    *,
    query_aware: bool,
    max_length: int,
    truncation: Truncation,
    chat: Chat,
    evidence: Sequence[Sequence[int]] = (),
) -> None:
    """Tell a model whose attention is restricted what the parts of its next prompt are.

    The question begins where the ids part from those of the same prompt without its end, so a
    token that reaches over the border, and what a chat template puts behind the prompt, are of the
    question. Evidence is told of bare prompts that were not cut.

    Args:
        model: Any; others are told nothing.
        behind: Last characters of the prompt that are not of its context.
        query_aware: Whether a method sees the question before it compresses the context.
        evidence: Spans of the prompt that the answer rests on, in characters.
        prompt, max_length, truncation, chat: See `prompt_ids`.
    """
    # It needs torch, which listing and planning tasks do without.
    from models.attention import PromptMarks, takes_marks

    told: object = model
    if not takes_marks(told):
        return
    text = fit_prompt(model.tokenizer, prompt, max_length, truncation)
    places: set[int] = set()
    if text == prompt and chat == "never":
        spans = tuple((start, end) for start, end in evidence)
        found = tokens_of(model.tokenizer, prompt, spans)  # type: ignore[arg-type]  # hashed as an object
        places = places.union(*found)
    question = None
    # Cut on the right, a prompt has lost its question.
    if not query_aware and text.endswith(prompt[len(prompt) - behind :]):
        parts = (text[: len(text) - behind], text)
        question = _shared(*(_ids(model, part, chat) for part in parts))
    told.mark(PromptMarks(tuple(sorted(places)), question))


@lru_cache(maxsize=8)  # all methods of an item ask in turn
def tokens_of(
    tokenizer: Tokenizer, prompt: str, spans: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the tokens of each span of a prompt, those over its edges included.

    A token may hold the space before a span; where two tokenizations part (a prefix by itself and
    the same prefix in the prompt), the tokens from there on count.

    Args:
        tokenizer: Of the model.
        prompt: Text.
        spans: In characters, from and to.
    """
    whole = tokenizer.encode(prompt)
    found = []
    for start, end in spans:
        first, last = (tokenizer.encode(prompt[:place]) for place in (start, end))
        same = _shared(last, whole)
        # The last tokens of a part may be pieces of one that reaches over its end.
        found.append(tuple(range(_shared(first, whole), same + (same < len(last)))))
    return tuple(found)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from their beginning."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_prompting(max_length: int, truncation: str, chat: str) -> None:
    """Raise ValueError unless these say how a prompt is made; see `fit_prompt`."""
    check_choice("truncation", truncation, TRUNCATIONS)
    check_choice("chat", chat, CHATS)
    if max_length < 0 or max_length == 1:
        raise ValueError(f"max_length must be 0 or at least 2, got {max_length}.")


def usual_max_length(model: TextGenerator, max_new_tokens: int) -> int:
    """Return how many tokens a prompt may have: the window less 500, as the official settings.

    Less where the answer, and what a chat template adds, would not fit into those 500.
    """
    return model.facts.max_positions - max(500, max_new_tokens + 100)


# --- records -------------------------------------------------------------------------------------


def read_records(name: str, version: int, *, folder: str, revision: str) -> list[dict[str, Any]]:
    """Return the records of one file of the benchmark, in their order.

    Args:
        name: `hotpotqa`, `hotpotqa_e`; not used for v2, which is one file.
        version: 1 or 2.
        folder: Where to look; empty for the cache folder, and then the hub.
        revision: Of the hub's data set.

    Raises:
        Unsupported: They are not to be had, or are no records; says what to put where.
    """
    file = f"data/{name}.jsonl" if version == 1 else "data.json"
    roots = [Path(folder).expanduser()] if folder else [cache_dir() / "longbench"]
    for root in roots:
        for place in (root / file, root / Path(file).name):
            if place.is_file():
                return _records(place.read_text(encoding="utf-8"), str(place))
        archive = root / "data.zip"
        if version == 1 and archive.is_file():
            return _from_archive(archive, file)
    wanted = " or ".join(str(root / file) for root in roots)
    if folder:
        raise Unsupported(
            f"LongBench's records are not where they were said to be: {wanted}. The folder is laid "
            f"out like the archive of {HUB_IDS[version]} on the hub."
        )
    try:
        return _from_hub(file, version, revision)
    except OSError as error:
        raise Unsupported(
            f"LongBench's records are not on this machine and not to be had from the hub: {error} "
            f"Put {wanted} there, taken from {HUB_IDS[version]}, or name a folder laid out like "
            f"it: {'longbench' if version == 1 else 'longbench-v2'}:folder=FOLDER."
        ) from error


def read_templates(folder: str) -> dict[str, str]:
    """Return the prompts of a folder's `dataset2prompt.json`, by task.

    Raises:
        Unsupported: There is no such file, or it holds something else.
    """
    root = Path(folder).expanduser() if folder else cache_dir() / "longbench"
    for place in (root / "config" / "dataset2prompt.json", root / "dataset2prompt.json"):
        if place.is_file():
            try:
                found = json.loads(place.read_text(encoding="utf-8"))
            except ValueError as error:
                raise Unsupported(f"{place} is no JSON: {error}.") from error
            if not isinstance(found, dict) or not all(isinstance(t, str) for t in found.values()):
                raise Unsupported(f"{place} must hold one prompt for each name of a task.")
            return found
    raise Unsupported(
        f"template=folder reads {root / 'config' / 'dataset2prompt.json'}, which is not there; "
        f"leave it out to use the official prompts."
    )


def _from_hub(file: str, version: int, revision: str) -> list[dict[str, Any]]:
    """Download the archive of v1 or the file of v2, once.

    Raises:
        OSError: The hub cannot be reached or has no such file.
    """
    path = hub_file(HUB_IDS[version], "data.zip" if version == 1 else file, revision)
    if version == 1:
        return _from_archive(path, file)
    return _records(path.read_text(encoding="utf-8"), file)


def _from_archive(archive: Path, file: str) -> list[dict[str, Any]]:
    try:
        with zipfile.ZipFile(archive) as opened:
            return _records(opened.read(file).decode(), f"{archive}: {file}")
    except (KeyError, zipfile.BadZipFile) as error:
        raise Unsupported(f"{archive} holds no {file}; LongBench's data.zip does.") from error


def _records(text: str, source: str) -> list[dict[str, Any]]:
    try:
        if text.lstrip().startswith("["):
            found = json.loads(text)
        else:
            # Not splitlines: texts may hold other line separators unescaped.
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise Unsupported(f"{source} holds no JSON records: {error}.") from error
    if not found or not all(isinstance(each, dict) for each in found):
        raise Unsupported(f"{source} holds no records.")
    return found


def in_turn(lists: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Yield the first of each list, then the second of each, until all are used up."""
    for place in range(max(map(len, lists), default=0)):
        for each in lists:
            if place < len(each):
                yield each[place]


TRUNCATIONS: tuple[str, ...] = get_args(Truncation)
CHATS: tuple[str, ...] = get_args(Chat)
