"""humaneval-mini: short Python functions in HumanEval's form, for models too small for HumanEval.

Forty-eight functions of one to five lines, sixteen of each level: `1` one operation, `2` one pass
over a list or text, `3` two steps put together. The texts are fixed, numbers, letters, examples and
tests are drawn with a seeded generator. The standard order takes the levels in turn, so that every
prefix is a fair sample. Prompt form and checker are HumanEval's, and so are the stop strings but
for one more. No example of a docstring is among its test's inputs.

SmolLM2-135M-Instruct (greedy, stripped prompt, 64 tokens, transformers' `generate`, one prompt at a
time) solves 23 of the 48 in float32 and 22 in bfloat16: 14, 7 (6) and 2 of the 16 of each level. Of
the first 24 it solves 10 in both: 6, 3 and 1 of the 8 of each level.

One item:
    prompt "def times_3(x: int) -> int: ..."   test "def check(candidate): ..."   level 1
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from tasks.base import Dataset, Item
from tasks.code_scoring import STOP, CodeTask

GENERATOR_SEED = 20210707
NUM_EXAMPLES, NUM_TESTS = 2, 8

Draw = Callable[[random.Random], tuple[Any, ...]]

WORDS = (
    "apple", "banana", "river", "stone", "cloud", "tiger", "level", "window", "garden", "pepper",
    "coffee", "mirror", "yellow", "summer", "candle", "forest", "letter", "noon", "bottle", "sun",
)  # fmt: skip


class Family(NamedTuple):
    """A kind of function; `{n}` and `{letter}` in its texts are drawn.

    Attributes:
        signature: As after `def`.
        docstring: What the function returns.
        body: Lines of the reference, without indentation.
        draw: Makes one tuple of arguments.
        numbers: Values that `{n}` takes.
    """

    signature: str
    docstring: str
    body: str
    draw: Draw
    numbers: tuple[int, ...] = (0,)


def _integer(low: int, high: int) -> Draw:
    return lambda rng: (rng.randint(low, high),)


def _two_integers(rng: random.Random) -> tuple[int, int]:
    return rng.randint(-20, 20), rng.randint(-20, 20)


def _integers(low: int, high: int, longest: int = 8, shortest: int = 0) -> Draw:
    return lambda rng: ([rng.randint(low, high) for _ in range(rng.randint(shortest, longest))],)


def _word(rng: random.Random) -> tuple[str]:
    return (rng.choice(WORDS) + rng.choice(("", "s", rng.choice(WORDS))),)


def _words(rng: random.Random) -> tuple[list[str]]:
    return (rng.sample(WORDS, rng.randint(2, 6)),)


def _sentence(rng: random.Random) -> tuple[str]:
    return (" ".join(rng.sample(WORDS, rng.randint(2, 5))),)


def _two_sides(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, 30), rng.randint(1, 30)


def _two_lists(rng: random.Random) -> tuple[list[int], list[int]]:
    draw = _integers(0, 9)
    return draw(rng)[0], draw(rng)[0]


def _rows(rng: random.Random) -> tuple[list[list[int]]]:
    draw = _integers(0, 9, longest=3)
    return ([draw(rng)[0] for _ in range(rng.randint(1, 4))],)


def _palindrome_or_word(rng: random.Random) -> tuple[str]:
    (word,) = _word(rng)
    return (word + word[-2::-1] if rng.random() < 0.5 else word,)


# By level, from 1.
FAMILIES: tuple[tuple[Family, ...], ...] = (
    (
        Family(
            "add(a: int, b: int) -> int",
            "Return the sum of a and b.",
            "return a + b",
            _two_integers,
        ),
        Family(
            "is_even(number: int) -> bool",
            "Return True if the number is even, otherwise False.",
            "return number % 2 == 0",
            _integer(-50, 50),
        ),
        Family(
            "times_{n}(x: int) -> int",
            "Return x multiplied by {n}.",
            "return x * {n}",
            _integer(-50, 50),
            (3, 4, 6, 7, 8),
        ),
        Family(
            "reverse_text(text: str) -> str",
            "Return the text reversed.",
            "return text[::-1]",
            _sentence,
        ),
        Family(
            "largest(numbers: list) -> int",
            "Return the largest of the numbers.",
            "return max(numbers)",
            _integers(-20, 40, shortest=1),
        ),
        Family(
            "last_item(items: list) -> int",
            "Return the last item.",
            "return items[-1]",
            _integers(0, 20, shortest=1),
        ),
        Family(
            "rectangle_area(width: int, height: int) -> int",
            "Return the area of a rectangle.",
            "return width * height",
            _two_sides,
        ),
        Family(
            "join_words(words: list) -> str",
            "Return the words joined by a space.",
            "return ' '.join(words)",
            _words,
        ),
        Family(
            "divisible_by_{n}(x: int) -> bool",
            "Return True if x is divisible by {n}, otherwise False.",
            "return x % {n} == 0",
            _integer(1, 60),
            (3, 4, 6),
        ),
        Family(
            "upper_case(text: str) -> str",
            "Return the text in upper case.",
            "return text.upper()",
            _word,
        ),
        Family(
            "absolute_value(x: int) -> int",
            "Return the absolute value of x.",
            "return abs(x)",
            _integer(-50, 50),
        ),
        Family(
            "ascending(numbers: list) -> list",
            "Return the numbers in ascending order.",
            "return sorted(numbers)",
            _integers(-20, 20, shortest=2),
        ),
        Family(
            "add_{n}(x: int) -> int",
            "Return x plus {n}.",
            "return x + {n}",
            _integer(-50, 50),
            (11, 12, 15, 25, 40),
        ),
        Family(
            "square(x: int) -> int", "Return the square of x.", "return x * x", _integer(-20, 20)
        ),
        Family(
            "is_negative(x: int) -> bool",
            "Return True if x is less than zero, otherwise False.",
            "return x < 0",
            _integer(-20, 20),
        ),
        Family(
            "repeat_{n}_times(text: str) -> str",
            "Return the text repeated {n} times.",
            "return text * {n}",
            _word,
            (3, 4, 5, 6),
        ),
    ),
    (
        Family(
            "squares(numbers: list) -> list",
            "Return a list of the squares of the numbers.",
            "return [x * x for x in numbers]",
            _integers(-10, 10),
        ),
        Family(
            "count_vowels(text: str) -> int",
            "Return the number of vowels in the text.",
            "return sum(letter in 'aeiou' for letter in text)",
            _word,
        ),
        Family(
            "even_numbers(numbers: list) -> list",
            "Return a list of the even numbers.",
            "return [x for x in numbers if x % 2 == 0]",
            _integers(-10, 20),
        ),
        Family(
            "is_palindrome(text: str) -> bool",
            "Return True if the text reads the same backwards, otherwise False.",
            "return text == text[::-1]",
            _palindrome_or_word,
        ),
        Family(
            "greater_than_{n}(numbers: list) -> list",
            "Return a list of the numbers that are greater than {n}.",
            "return [x for x in numbers if x > {n}]",
            _integers(-10, 20),
            (4, 5, 6, 8),
        ),
        Family(
            "count_words(text: str) -> int",
            "Return the number of words in the text.",
            "return len(text.split())",
            _sentence,
        ),
        Family(
            "average(numbers: list) -> float",
            "Return the average of the numbers.",
            "return sum(numbers) / len(numbers)",
            _integers(0, 40, shortest=1),
        ),
        Family(
            "smallest_{n}(numbers: list) -> list",
            "Return the {n} smallest numbers in ascending order.",
            "return sorted(numbers)[:{n}]",
            _integers(-20, 20, shortest=4),
            (2, 3),
        ),
        Family(
            "words_with_{letter}(words: list) -> list",
            "Return the words that start with the letter '{letter}'.",
            "return [word for word in words if word.startswith('{letter}')]",
            _words,
        ),
        Family(
            "without_{letter}(text: str) -> str",
            "Return the text without the letter '{letter}'.",
            "return text.replace('{letter}', '')",
            _sentence,
        ),
        Family(
            "multiples_of_{n}(numbers: list) -> int",
            "Return how many of the numbers are divisible by {n}.",
            "return sum(1 for x in numbers if x % {n} == 0)",
            _integers(1, 30),
            (3, 4, 5),
        ),
        Family(
            "first_{n}_items(items: list) -> list",
            "Return the first {n} items.",
            "return items[:{n}]",
            _integers(0, 20, shortest=4),
            (2, 3),
        ),
        Family(
            "longest_of(words: list) -> int",
            "Return the length of the longest word.",
            "return max(len(word) for word in words)",
            _words,
        ),
        Family(
            "count_{letter}(text: str) -> int",
            "Return how often the letter '{letter}' occurs in the text.",
            "return text.count('{letter}')",
            _sentence,
        ),
        Family(
            "factorial(n: int) -> int",
            "Return the factorial of n.",
            "return 1 if n < 2 else n * factorial(n - 1)",
            _integer(0, 15),
        ),
        Family(
            "sum_of_even(numbers: list) -> int",
            "Return the sum of the even numbers.",
            "return sum(x for x in numbers if x % 2 == 0)",
            _integers(0, 20),
        ),
    ),
    (
        Family(
            "digit_sum(number: int) -> int",
            "Return the sum of the digits of the number.",
            "return sum(int(digit) for digit in str(number))",
            _integer(0, 9999),
        ),
        Family(
            "squares_of_multiples(numbers: list) -> int",
            "Return the sum of the squares of the numbers that are divisible by {n}.",
            "return sum(x * x for x in numbers if x % {n} == 0)",
            _integers(0, 20),
            (2, 3, 5),
        ),
        Family(
            "reverse_words(text: str) -> str",
            "Return the text with its words in reverse order.",
            "return ' '.join(text.split()[::-1])",
            _sentence,
        ),
        Family(
            "word_lengths(words: list) -> dict",
            "Return a dictionary from each word to its length.",
            "return {{word: len(word) for word in words}}",
            _words,
        ),
        Family(
            "rotate_left(items: list) -> list",
            "Return the items rotated to the left by {n} places.",
            "return items[{n}:] + items[:{n}]",
            _integers(0, 20, shortest=4),
            (2, 3),
        ),
        Family(
            "second_largest(numbers: list) -> int",
            "Return the second largest number.",
            "return sorted(numbers)[-2]",
            _integers(-20, 40, shortest=2),
        ),
        Family(
            "is_prime(number: int) -> bool",
            "Return True if the number is a prime number, otherwise False.",
            "return number > 1 and all(number % x for x in range(2, number))",
            _integer(0, 60),
        ),
        Family(
            "common_items(first: list, second: list) -> list",
            "Return the items that are in both lists, in ascending order, without duplicates.",
            "return sorted(set(first) & set(second))",
            _two_lists,
        ),
        Family(
            "fibonacci(n: int) -> int",
            "Return the n-th Fibonacci number.",
            "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
            _integer(0, 15),
        ),
        Family(
            "unique_items(items: list) -> list",
            "Return the items without duplicates, in the order of their first appearance.",
            "return list(dict.fromkeys(items))",
            _integers(0, 6),
        ),
        Family(
            "range_or_{n}(numbers: list) -> int",
            "Return the difference between the largest and the smallest number, or {n} if there "
            "are no numbers.",
            "return max(numbers) - min(numbers) if numbers else {n}",
            _integers(-20, 20, longest=4),
            (5, 10, 100),
        ),
        Family(
            "reverse_long_words(text: str) -> str",
            "Return the text with each word of more than {n} letters reversed.",
            "words = text.split()\n"
            "return ' '.join(word[::-1] if len(word) > {n} else word for word in words)",
            _sentence,
            (4, 5),
        ),
        Family(
            "flatten(rows: list) -> list",
            "Return a list of all numbers in the rows.",
            "return [x for row in rows for x in row]",
            _rows,
        ),
        Family(
            "pairs_with_sum_{n}(numbers: list) -> int",
            "Return the number of pairs of positions whose numbers add up to {n}.",
            "count = 0\nfor place, number in enumerate(numbers):\n"
            "    count += numbers[:place].count({n} - number)\nreturn count",
            _integers(0, 12),
            (8, 10, 12),
        ),
        Family(
            "letter_counts(text: str) -> dict",
            "Return a dictionary from each letter of the text to how often it occurs.",
            "return {{letter: text.count(letter) for letter in text}}",
            _word,
        ),
        Family(
            "to_binary(number: int) -> str",
            "Return the number in binary notation, without a prefix.",
            "return format(number, 'b')",
            _integer(0, 200),
        ),
    ),
)


def _problem(family: Family, level: int) -> dict[str, Any]:
    """Return the fields of one function of a family."""
    # A generator for each family, so that none moves when another one changes.
    rng = random.Random(f"{GENERATOR_SEED} {family.signature}")
    drawn = {"n": rng.choice(family.numbers), "letter": rng.choice("aelnorst")}
    signature, docstring, body = (
        text.format(**drawn) for text in (family.signature, family.docstring, family.body)
    )
    entry_point = signature.partition("(")[0]
    reference = "".join(f"    {line}\n" for line in body.splitlines())
    namespace: dict[str, Any] = {}
    exec(f"def {signature}:\n{reference}", namespace)  # our own code, above
    cases = _cases(family.draw, namespace[entry_point], rng)
    examples = "".join(
        f"    >>> {entry_point}({arguments})\n    {value}\n"
        for arguments, value in cases[:NUM_EXAMPLES]
    )
    assertions = "".join(
        f"    assert candidate({arguments}) == {value}\n"
        for arguments, value in cases[NUM_EXAMPLES:]
    )
    return {
        "prompt": f'def {signature}:\n    """ {docstring}\n{examples}    """\n',
        "entry_point": entry_point,
        "test": f"def check(candidate):\n{assertions}",
        "reference": reference,
        "level": level,
    }


def _cases(draw: Draw, function: Callable[..., Any], rng: random.Random) -> list[tuple[str, str]]:
    """Return calls with different arguments as (arguments, value) in Python's notation.

    The first two differ in their value, and so do two of the others: an example that shows only one
    answer of a yes-or-no question explains nothing, and a test of one answer checks nothing.
    """
    by_value: dict[str, dict[str, None]] = {}
    for _ in range(20 * (NUM_EXAMPLES + NUM_TESTS)):
        arguments = draw(rng)
        value = repr(function(*arguments))
        by_value.setdefault(value, {})[", ".join(map(repr, arguments))] = None
    queues = [[(arguments, value) for arguments in calls] for value, calls in by_value.items()]
    # One call of each value in turn, until there are enough.
    cases = [case for turn in zip_longest(*queues) for case in turn if case]
    return cases[: NUM_EXAMPLES + NUM_TESTS]


@dataclass(frozen=True, kw_only=True)
class HumanEvalMini(CodeTask):
    """Complete a function of one to five lines; pass@k over 48 problems of three levels.

    Attributes:
        max_new_tokens: The longest reference has some 40 tokens.
    """

    max_new_tokens: int = 64

    version = "1.0"
    data = Dataset(
        source="generated", revision=str(GENERATOR_SEED), split="test", license="Apache-2.0"
    )
    scale = "embedded"
    # Chat models close the Markdown block that they take the prompt for, and begin to explain.
    stop = (*STOP, "\n```")

    def problems(self) -> Iterator[Item]:
        """Yield the problems, levels 1, 2 and 3 in turn."""
        for number, families in enumerate(zip(*FAMILIES, strict=True)):
            for level, family in enumerate(families, 1):
                yield Item(f"humaneval-mini/{level}-{number:02}", _problem(family, level))
