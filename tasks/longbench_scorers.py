"""The scores of LongBench, as its official scripts compute them; pure functions of two texts.

Source: arXiv 2308.14508 and the evaluation scripts of THUDM/LongBench at 2e00731. Every oddity of
those scripts that moves a number is kept, and said where it stands. ROUGE-L is that of the package
`rouge` 1.0.1, which is no textbook ROUGE-L; code similarity is that of `fuzzywuzzy` on difflib
alone, since python-Levenshtein, where it is installed, matches other characters. Neither package is
needed. Chinese texts need `jieba`.

All scores lie between 0 and 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache

from models.base import Unsupported

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗"
    "〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_DROP = str.maketrans("", "", string.punctuation)
_DROP_CHINESE = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def normalize_answer(text: str) -> str:
    """Return a text in lower case without ASCII punctuation, articles and extra white space."""
    bare = text.lower().translate(_DROP)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def normalize_chinese_answer(text: str) -> str:
    """Return a text in lower case without ASCII and Chinese punctuation and without white space."""
    return "".join(text.lower().translate(_DROP_CHINESE).split())


def token_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of two bags of tokens; 0 where they share none."""
    shared = sum((Counter(prediction) & Counter(reference)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, reference: str) -> float:
    """Return the token F1 of two answers; `yes` and `no` are words like others."""
    return token_f1(normalize_answer(prediction).split(), normalize_answer(reference).split())


def qa_f1_chinese(prediction: str, reference: str) -> float:
    """Return the F1 of the words of two Chinese answers.

    Raises:
        Unsupported: The package jieba is missing.
    """
    words = (map(normalize_chinese_answer, segment(text)) for text in (prediction, reference))
    ours, theirs = ([word for word in each if word] for each in words)
    return token_f1(ours, theirs)


def rouge_l(prediction: str, reference: str) -> float:
    """Return ROUGE-L as the package `rouge` 1.0.1 has it, 0 where it would raise.

    Both texts are cut at every full stop, also those of decimals and of `e.g.`; nothing is lowered
    or stemmed. For each pair of sentences the words of one longest common subsequence go into one
    set; precision and recall divide its size by the number of *distinct* words. So `a a a` for `a`
    is perfect. Where the package would run into Python's recursion limit (sentences of a thousand
    words), which the official script scores as 0, this goes on.
    """
    ours, theirs = _sentences(prediction), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    found: set[str] = set()
    for their_words in theirs:
        for our_words in ours:
            found.update(_common_subsequence(their_words, our_words))
    precision = len(found) / len({word for words in ours for word in words})
    recall = len(found) / len({word for words in theirs for word in words})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def rouge_l_chinese(prediction: str, reference: str) -> float:
    """Return `rouge_l` of two Chinese texts whose words are set apart.

    Raises:
        Unsupported: The package jieba is missing.
    """
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(reference)))


def classification(
    prediction: str, reference: str, classes: Sequence[str], *, corrected: bool = False
) -> float:
    """Return 1 over the number of classes that the prediction names, if it names the right one.

    A class that is part of the right one's name (`Human` in `Human group`) does not count. The
    reference drops those from the list that it is walking through, and so steps over the class
    behind each of them.

    Args:
        prediction: Text that may name classes.
        reference: Name of the right class.
        classes: Names of all of them.
        corrected: Drop all parts of the right name, which the official scores do not.
    """
    named = [name for name in classes if name in prediction]

    def is_part(name: str) -> bool:
        return name in reference and name != reference

    if corrected:
        named = [name for name in named if not is_part(name)]
    else:
        place = 0
        while place < len(named):
            if is_part(named[place]):
                del named[place]
            place += 1
    return 1.0 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """Return the share of the prediction's integers that are the right one; 0 without any."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, label: str = "Paragraph ") -> float:
    """Return the share of the prediction's integers that are the right paragraph's number.

    Args:
        prediction: Any text.
        reference: `Paragraph 7`.
        label: What stands before the number in the reference; `段落` in Chinese.

    Raises:
        ValueError: The reference names no paragraph.
    """
    found = re.search(rf"{label}(\d+)", reference)
    if not found:
        raise ValueError(f"the reference {reference!r} names no {label.strip()!r} with a number.")
    return count(prediction, found[1])


def retrieval_chinese(prediction: str, reference: str) -> float:
    """Return `retrieval` for references like `段落7`."""
    return retrieval(prediction, reference, "段落")


def code_line(prediction: str) -> str:
    """Return the first line without a backtick, `#` or `//`, leading line breaks left out."""
    lines = prediction.lstrip("\n").split("\n")
    return next((each for each in lines if not any(m in each for m in ("`", "#", "//"))), "")


def code_similarity(prediction: str, reference: str) -> float:
    """Return how alike the predicted line and the right one are, in whole hundredths.

    `round(100 * 2 M / T) / 100`, with M the characters that difflib's SequenceMatcher matches and
    T those of both lines. It ignores characters that are frequent in a reference of 200 or more.
    """
    line = code_line(prediction)
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def first_line(prediction: str) -> str:
    """Return the first line that is not empty: what is scored of a few-shot answer."""
    return prediction.lstrip("\n").split("\n")[0]


def best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """Return the best score over all answers; 0 if there is none."""
    return max((score(prediction, answer) for answer in answers), default=0.0)


def choice_letter(response: str) -> str:
    """Return the letter that an answer to LongBench v2 settles on; empty if it names none.

    First `The correct answer is (A)`, then `The correct answer is A`; asterisks are left out.
    """
    text = response.strip().replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(
        r"The correct answer is ([A-D])", text
    )
    return found[1] if found else ""


def segment(text: str) -> list[str]:
    """Return the words of a Chinese text.

    Raises:
        Unsupported: The package jieba is missing.
    """
    return list(_segmenter()(text))


@cache
def _segmenter() -> Callable[[str], Sequence[str]]:
    try:
        import jieba
    except ModuleNotFoundError:
        raise Unsupported(
            "Chinese answers are scored word by word with the package 'jieba', which is not "
            "installed: pip install jieba"
        ) from None
    jieba.setLogLevel("WARNING")  # it says where it caches its dictionary

    def cut(text: str) -> Sequence[str]:
        words: Sequence[str] = jieba.lcut(text, cut_all=False)
        return words

    return cut


def _sentences(text: str) -> list[list[str]]:
    """Return the words of what stands between full stops.

    A stretch of white space is a sentence of one empty word, as in the package; an empty one none.
    """
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return one longest common subsequence, read from the ends; ties go on in `second`.

    Which of several is returned matters, since their words end in one set.
    """
    rows = [[0] * (len(second) + 1)]
    for word in first:
        above, row = rows[-1], [0]
        for place, other in enumerate(second):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        rows.append(row)
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
