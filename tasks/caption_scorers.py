"""Captions against references: CIDEr-D, BLEU and ROUGE-L; pure functions on words.

Source: CIDEr, arXiv 1411.5726, section 4 with the changes of its section 7 (CIDEr-D: clipped counts
and a Gaussian penalty on lengths, sigma 6, times 10); BLEU, Papineni et al. 2002, with the closest
reference length; ROUGE-L, Lin 2004, beta 1.2. Numbers are those of pycocoevalcap 1.2, which
COCO's server uses, on equal words; that package takes Java and 100 MB along, so it stands in the
tests as numbers and not as a library.
Differs from it: words are found by `words_of` and not by the Stanford tokenizer, which is written
in Java. Both take lower case and leave punctuation out; abbreviations, fractions and brackets may
come out otherwise, which moves a score by tenths of a point. CIDEr's weights of words come from all
references of a data set, also where only some of its images are run, so that they do not change
with the number.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Words = Sequence[str]
Gram = tuple[str, ...]

LONGEST_GRAM = 4
_SIGMA = 6.0
_BETA = 1.2
# As in the reference: an n-gram that does not occur makes BLEU all but 0, and not undefined.
_TINY, _SMALL = 1e-15, 1e-9
# Words as the Penn treebank has them: "isn't" is "is n't", "dog's" is "dog 's"; hyphens stay.
_CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_WORDS = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-./]\w+)*")


def words_of(text: str) -> list[str]:
    """Return the words of a caption, lower case, without punctuation."""
    plain = text.lower().replace("\u2019", "'")
    return _WORDS.findall(_CLITICS.sub(r" \1", plain))


def grams(words: Words, longest: int = LONGEST_GRAM) -> Counter[Gram]:
    """Return how often each run of 1 to `longest` words occurs."""
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, longest + 1)
        for start in range(len(words) - length + 1)
    )


@dataclass(frozen=True)
class Rarity:
    """How much an n-gram says, by how few images have it in their references.

    Attributes:
        images: Number of images.
        found_in: Of an n-gram, the images whose references have it.
    """

    images: int
    found_in: Mapping[Gram, int]

    @classmethod
    def of(cls, references: Iterable[Sequence[Words]]) -> Rarity:
        """Count the n-grams of all references, image by image."""
        found: Counter[Gram] = Counter()
        images = 0
        for images, captions in enumerate(references, 1):  # noqa: B007  # the last number is wanted
            found.update({gram for words in captions for gram in grams(words)})
        return cls(images, found)

    def weights(self, words: Words) -> list[dict[Gram, float]]:
        """Return the weights of a caption's n-grams, by their length."""
        weighted: list[dict[Gram, float]] = [{} for _ in range(LONGEST_GRAM)]
        whole = math.log(self.images)
        for gram, count in grams(words).items():
            rarity = whole - math.log(max(1, self.found_in.get(gram, 0)))
            weighted[len(gram) - 1][gram] = count * rarity
        return weighted


def cider(words: Words, references: Sequence[Words], rarity: Rarity) -> float:
    """Return CIDEr-D of a caption, 0 to 10 where it equals its only reference.

    Args:
        words: Of the caption.
        references: At least one.
        rarity: Of the data set's n-grams.
    """
    mine = rarity.weights(words)
    total = 0.0
    for reference in references:
        theirs = rarity.weights(reference)
        # Lengths are those in pairs of words, one less each.
        apart = max(len(words) - 1, 0) - max(len(reference) - 1, 0)
        penalty = math.exp(-(apart**2) / (2 * _SIGMA**2))
        for own, other in zip(mine, theirs, strict=True):
            both = sum(
                min(w, other[gram]) * other[gram] for gram, w in own.items() if gram in other
            )
            length = math.hypot(*own.values()) * math.hypot(*other.values())
            total += penalty * (both / length if length else both)
    return 10 * total / LONGEST_GRAM / len(references)


def bleu_counts(words: Words, references: Sequence[Words]) -> Floats:
    """Return what a caption adds to BLEU, (2 * LONGEST_GRAM + 2,).

    Returns:
        By length the n-grams that occur in a reference, at most as often as there; by length the
        n-grams; the words; the words of the reference nearest in length, the shorter of two.
    """
    own = grams(words)
    most: Counter[Gram] = Counter()
    for reference in references:
        most |= grams(reference)
    right = np.zeros(LONGEST_GRAM)
    for gram, count in own.items():
        right[len(gram) - 1] += min(count, most[gram])
    said = [max(0, len(words) - length) for length in range(LONGEST_GRAM)]
    nearest = min((abs(len(each) - len(words)), len(each)) for each in references)[1]
    return np.array([*right, *said, len(words), nearest], dtype=np.float64)


def bleu(counts: Floats) -> Floats:
    """Return BLEU-4 of sums of `bleu_counts`, (..., 2 * LONGEST_GRAM + 2) to (...)."""
    right, said = counts[..., :LONGEST_GRAM], counts[..., LONGEST_GRAM : 2 * LONGEST_GRAM]
    precision = np.exp(np.log((right + _TINY) / (said + _SMALL)).mean(axis=-1))
    ratio = (counts[..., -2] + _TINY) / (counts[..., -1] + _SMALL)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)), dtype=np.float64)


def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """Return ROUGE-L of a caption, in [0, 1]: the best precision and the best recall joined."""
    common = [_longest_common(words, reference) for reference in references]
    precision = max(common) / len(words) if words else 0.0
    recall = max(
        (each / len(reference) for each, reference in zip(common, references, strict=True) if each),
        default=0.0,
    )
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]
