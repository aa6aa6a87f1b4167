"""Which option an answer means, by two public rules, and what circular evaluation makes of it.

No rule here guesses: an answer that means no option is None, an outcome of its own.

Source: the exact-matching rule of VLMEvalKit at e8e78f0, and the rule of lmms-eval at 75571cf,
which differ on the same answers (VLMEvalKit issue 1529), written from a description of each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

Extraction = Literal["vlmevalkit", "lmms-eval"]
EXTRACTIONS: tuple[Extraction, ...] = get_args(Extraction)

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# A letter counts only among the last pieces: earlier ones are rather words ("A man ...").
_LAST_PIECES = 5
_REFUSAL = "Z"
_MOST_LMMS_LETTERS = "ABCDE"
# Sentences of more words may begin with "A" as an article.
_ARTICLE_WORDS = 3
# How a letter may be written. The bare one comes first, then each of these for all letters.
_LMMS_FORMS = tuple(
    (prefix, suffix)
    for prefix in ("(", "", ":")
    for suffix in (")", ").", ".", ",", ":", "")
    if prefix or suffix
)


def extract(rule: Extraction, answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that an answer means; None if it means none.

    Args:
        rule: Whose reading.
        answer: As the model wrote it.
        options: Text of each option by its letter.
    """
    return _vlmevalkit(answer, options) if rule == "vlmevalkit" else _lmms_eval(answer, options)


def _vlmevalkit(answer: str, options: Mapping[str, str]) -> str | None:
    """Read an answer as VLMEvalKit's exact matching does.

    1. Marks of punctuation are spaces. If exactly one option letter is among the pieces, and stands
       among the last five, it is meant (where it stands several times, anywhere among those).
    2. If none is there but "Z", the answer declines.
    3. `answer is X`.
    4. If exactly one option's text is part of the answer in lower case, and the answer is at most
       twice as long as all options together, that one is meant.
    """
    pieces = answer.translate(_PUNCTUATION).split()
    present = [letter for letter in options if letter in pieces]
    if len(present) == 1 and present[0] in pieces[-_LAST_PIECES:]:
        return present[0]
    if not present and _REFUSAL in pieces:
        return None
    # "answer is Apple" names no option.
    found = re.search(rf"(?i:\banswer is) ([{''.join(options)}])(?!\S)", " ".join(pieces))
    if found:
        return found[1]
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    return _by_text(answer, options)


def _lmms_eval(answer: str, options: Mapping[str, str]) -> str | None:
    """Read an answer as lmms-eval does before it asks a judge, whose random guess is left out.

    Nothing is stripped. A letter up to E, whether or not there is such an option, is meant if no
    other is there: as a word of its own, but for an "A" in an answer of more than three words, or
    with brackets or marks around it, one form after the other. Then the one option whose text is
    part of the answer. Which forms there are is not described; these are brackets, full stop,
    comma and colon behind the letter, and an opening bracket or a colon before it.
    """
    words = answer.split()
    bare = [letter for letter in _MOST_LMMS_LETTERS if letter in words]
    is_article = "A" in words and len(words) > _ARTICLE_WORDS
    if len(bare) == 1 and not is_article:
        return bare[0]
    for prefix, suffix in _LMMS_FORMS:
        found = [letter for letter in _MOST_LMMS_LETTERS if f"{prefix}{letter}{suffix}" in words]
        if len(found) == 1:
            return found[0]
    return _by_text(answer, options)


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    lowered = answer.lower()
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else None


def likeliest(letters: Sequence[str], log_probabilities: Sequence[float]) -> str | None:
    """Return the letter with the largest probability; None if two share it."""
    best = max(log_probabilities)
    found = [
        letter for letter, value in zip(letters, log_probabilities, strict=True) if value == best
    ]
    return found[0] if len(found) == 1 else None


def outcomes(chosen: Sequence[str | None], answers: Sequence[str]) -> list[bool | None]:
    """Return for each rotation whether the letter is right, None where there is none."""
    return [
        None if letter is None else letter == answer
        for letter, answer in zip(chosen, answers, strict=True)
    ]


def circular(found: Sequence[bool | None]) -> bool | None:
    """Return whether all rotations are right; None if only unreadable answers leave it open.

    One wrong rotation settles it, whatever the others are.
    """
    if any(outcome is False for outcome in found):
        return False
    return None if None in found else True
