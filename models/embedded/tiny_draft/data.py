"""Prompts and texts that `tiny-draft` is distilled on: function stubs, chats, library sources.

Stubs have HumanEval's form, signature and docstring, and come from two places: templates, whose
examples are computed, and the functions of the Python standard library. Neither holds a function of
HumanEval or of `humaneval-mini`: those names are left out, their tasks have no template, and a test
compares the texts. What the teacher writes behind the prompts is the training text.

Each prompt has a key (a template's task, a library function's name, a chat's topic); a checksum of
the key alone decides whether it is held out, so that no task is on both sides.
"""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["code", "chat"]

HELD_OUT_ONE_IN = 10
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# Functions of HumanEval and humaneval-mini, which no stub may be named after.
EXCLUDED_NAMES = frozenset(
    (
        "Strongest_Extension", "absolute_value", "add", "add_12", "add_elements", "all_prefixes",
        "anti_shuffle", "any_int", "ascending", "average", "below_threshold", "below_zero", "bf",
        "by_length", "can_arrange", "car_race_collision", "change_base", "check_dict_case",
        "check_if_last_char_is_a_letter", "choose_num", "circular_shift", "closest_integer",
        "common", "common_items", "compare", "compare_one", "concatenate", "correct_bracketing",
        "count_distinct_characters", "count_nums", "count_o", "count_up_to", "count_upper",
        "count_vowels", "count_words", "cycpattern_check", "decimal_to_binary", "decode_cyclic",
        "decode_shift", "derivative", "digitSum", "digit_sum", "digits", "divisible_by_4",
        "do_algebra", "double_the_difference", "eat", "encode", "encrypt", "even_numbers",
        "even_odd_count", "even_odd_palindrome", "exchange", "f", "factorial", "factorize", "fib",
        "fib4", "fibfib", "fibonacci", "file_name_check", "filter_by_prefix",
        "filter_by_substring", "filter_integers", "find_closest_elements", "find_max",
        "find_zero", "first_2_items", "fix_spaces", "fizz_buzz", "flatten", "flip_case",
        "fruit_distribution", "generate_integers", "get_closest_vowel", "get_max_triples",
        "get_odd_collatz", "get_positive", "get_row", "greater_than_6", "greatest_common_divisor",
        "has_close_elements", "hex_key", "histogram", "how_many_times", "incr_list",
        "int_to_mini_roman", "intersection", "intersperse", "is_bored", "is_equal_to_sum_even",
        "is_even", "is_happy", "is_multiply_prime", "is_negative", "is_nested", "is_palindrome",
        "is_prime", "is_simple_power", "is_sorted", "iscube", "join_words", "largest",
        "largest_divisor", "largest_prime_factor", "largest_smallest_integers", "last_item",
        "letter_counts", "longest", "longest_of", "make_a_pile", "make_palindrome",
        "match_parens", "max_element", "max_fill", "maximum", "mean_absolute_deviation", "median",
        "minPath", "minSubArraySum", "modp", "monotonic", "move_one_ball", "multiples_of_4",
        "multiply", "next_smallest", "numerical_letter_grade", "odd_count", "order_by_points",
        "pairs_sum_to_zero", "pairs_with_sum_12", "parse_music", "parse_nested_parens", "pluck",
        "prime_fib", "prime_length", "prod_signs", "range_or_10", "rectangle_area",
        "remove_duplicates", "remove_vowels", "repeat_6_times", "rescale_to_unit",
        "reverse_delete", "reverse_long_words", "reverse_text", "reverse_words",
        "right_angle_triangle", "rolling_max", "rotate_left", "rounded_avg", "same_chars",
        "search", "second_largest", "select_words", "separate_paren_groups", "simplify",
        "skjkasdkd", "smallest_3", "smallest_change", "solution", "solve", "sort_array",
        "sort_even", "sort_numbers", "sort_third", "sorted_list_sum", "specialFilter",
        "special_factorial", "split_words", "square", "squares", "squares_of_multiples",
        "starts_one_ends", "strange_sort_list", "string_sequence", "string_to_md5", "string_xor",
        "strlen", "sum_of_even", "sum_product", "sum_squares", "sum_to_n", "times_3", "to_binary",
        "total_match", "tri", "triangle_area", "triples_sum_to_zero", "truncate_number", "unique",
        "unique_digits", "unique_items", "upper_case", "valid_date", "vowels_count",
        "will_it_fly", "without_t", "word_lengths", "words_in_sentence", "words_string",
        "words_with_l", "x_or_y",
    )
)  # fmt: skip


class Prompt(NamedTuple):
    """A text for the teacher to continue.

    Attributes:
        kind: Code stub or chat.
        key: What is asked for; equal keys are on the same side of the split.
        text: As the model sees it, template included.
    """

    kind: Kind
    key: str
    text: str


def is_held_out(key: str) -> bool:
    """Return whether prompts of a key are for measuring only."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def prompts(kind: Kind, count: int, *, held_out: bool, seed: int) -> list[Prompt]:
    """Return distinct prompts of one side of the split, in a seeded order.

    Args:
        kind: `code` takes about two thirds from templates and one third from the library.
        count: At most as many come back: the library and the topics end somewhere.
        held_out: The side.
        seed: Of the draws.
    """
    rng = random.Random(f"{seed} {kind} {held_out}")
    found: dict[str, Prompt] = {}
    if kind == "code":
        library = [stub for stub in library_stubs() if is_held_out(stub.key) == held_out]
        rng.shuffle(library)
        for stub in library[: count // 3]:
            text = _with_preamble(stub.text, rng)
            found[text] = Prompt("code", stub.key, text)
    for _ in range(60 * count):
        if len(found) >= count:
            break
        prompt = _templated_stub(rng) if kind == "code" else _chat(rng)
        if is_held_out(prompt.key) == held_out:
            found.setdefault(prompt.text, prompt)
    chosen = list(found.values())
    rng.shuffle(chosen)
    return chosen


def library_files() -> list[Path]:
    """Return the standard library's sources on this machine, without tests and what pip put in."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
    return sorted(
        path
        for path in root.rglob("*.py")
        if not left_out & set(path.relative_to(root).parts)
        # Tables of characters, not code.
        and "encodings" not in path.parts
    )


def read_source(path: Path) -> str:
    """Return a source file's text; what is not UTF-8 becomes a replacement character."""
    return path.read_text(encoding="utf-8", errors="replace")


@functools.cache
def library_stubs() -> tuple[Prompt, ...]:
    """Return signature and docstring of the library's documented functions, by file and line."""
    found: dict[str, Prompt] = {}
    for path in library_files():
        source = read_source(path)
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name in EXCLUDED_NAMES:
                continue
            docstring = ast.get_docstring(node)
            if docstring is None or not 30 <= len(docstring) <= 500 or node.name[:2] == "__":
                continue
            end = node.body[0].end_lineno or 0
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).rstrip()
            if text.endswith(('"""', "'''")):
                found.setdefault(node.name, Prompt("code", f"library {node.name}", text + "\n"))
    return tuple(found.values())


# What a template's function looks at. {n} and {m} are numbers, {c} a letter, {s} a short text.
_INTEGER_TESTS: tuple[tuple[str, str, Callable[..., bool]], ...] = (
    ("between_{n}_and_{m}", "lie between {n} and {m}", lambda x, n, m, c, s: n <= x <= m),
    ("at_most_{n}", "are not larger than {n}", lambda x, n, m, c, s: x <= n),
    ("ending_in_{n}", "end with the digit {n}", lambda x, n, m, c, s: abs(x) % 10 == n % 10),
    ("with_{n}_digits", "have exactly {n} digits", lambda x, n, m, c, s: len(str(abs(x))) == n),
    ("with_remainder_{n}", "leave the remainder {n} when divided by {m}",
     lambda x, n, m, c, s: x % m == n),
    ("powers_of_two", "are powers of two",
     lambda x, n, m, c, s: x > 0 and x & (x - 1) == 0),
    ("with_digit_{n}", "contain the digit {n}", lambda x, n, m, c, s: str(n % 10) in str(x)),
    ("perfect_cubes_or_{n}", "are perfect cubes or equal to {n}",
     lambda x, n, m, c, s: x == n or round(abs(x) ** (1 / 3)) ** 3 == abs(x)),
    ("far_from_{n}", "differ from {n} by more than {m}", lambda x, n, m, c, s: abs(x - n) > m),
    ("near_{n}", "differ from {n} by at most {m}", lambda x, n, m, c, s: abs(x - n) <= m),
    ("different_from_{n}", "are different from {n}", lambda x, n, m, c, s: x != n),
    ("dividing_{n}0", "divide {n}0 without a remainder",
     lambda x, n, m, c, s: x != 0 and 10 * n % x == 0),
    ("nonzero", "are not zero", lambda x, n, m, c, s: x != 0),
    ("with_bit_{m}", "have bit {m} set in their binary form", lambda x, n, m, c, s: x >> m & 1 > 0),
)  # fmt: skip
_WORD_TESTS: tuple[tuple[str, str, Callable[..., bool]], ...] = (
    ("ending_in_{c}", "end with the letter '{c}'", lambda w, n, m, c, s: w.endswith(c)),
    ("longer_than_{n}", "are longer than {n} characters", lambda w, n, m, c, s: len(w) > n),
    ("shorter_than_{m}", "are shorter than {m} characters", lambda w, n, m, c, s: len(w) < m),
    ("of_length_{n}", "have exactly {n} characters", lambda w, n, m, c, s: len(w) == n),
    ("with_two_{c}", "contain the letter '{c}' at least twice",
     lambda w, n, m, c, s: w.count(c) > 1),
    ("lacking_{c}", "do not contain the letter '{c}'", lambda w, n, m, c, s: c not in w),
    ("in_order", "have their letters in alphabetical order",
     lambda w, n, m, c, s: list(w) == sorted(w)),
    ("after_{s}", "come after '{s}' in the dictionary", lambda w, n, m, c, s: w > s),
    ("before_{s}", "come before '{s}' in the dictionary", lambda w, n, m, c, s: w < s),
    ("framed", "begin and end with the same letter", lambda w, n, m, c, s: w[0] == w[-1]),
    ("other_than_{s}", "are not equal to '{s}'", lambda w, n, m, c, s: w != s),
    ("with_double_letters", "have two equal letters in a row",
     lambda w, n, m, c, s: any(a == b for a, b in zip(w, w[1:]))),  # noqa: B905, RUF007
)  # fmt: skip
_ACTIONS: tuple[tuple[str, str, str, Callable[[list[Any], list[Any]], Any]], ...] = (
    ("keep", "Given a list of {items}, select those that {test}.", "list", lambda kept, all_: kept),
    ("drop", "Return the {items} without those that {test}.", "list",
     lambda kept, all_: [x for x in all_ if x not in kept]),
    ("number_of", "Count those {items} that {test}.", "int", lambda kept, all_: len(kept)),
    ("any", "Check if any of the given {items} {test}.", "bool",
     lambda kept, all_: bool(kept)),
    ("all", "Check whether all {items} in the list {test}.", "bool",
     lambda kept, all_: len(kept) == len(all_)),
    ("first", "Find the first of the {items} that {test}. Return None if there are none.",
     "object", lambda kept, all_: kept[0] if kept else None),
    ("last", "Find the last of the {items} that {test}. If there is none, return None.",
     "object", lambda kept, all_: kept[-1] if kept else None),
    ("positions", "Given a list of {items}, return the indices of those that {test}.", "list",
     lambda kept, all_: [i for i, x in enumerate(all_) if x in kept]),
    ("biggest", "Return the maximum of the {items} that {test}, or None.", "object",
     lambda kept, all_: max(kept, default=None)),
    ("least", "From the given list, return the minimum of those {items} that {test}, or None.",
     "object", lambda kept, all_: min(kept, default=None)),
    ("split", "Divide the list into the {items} that {test} and the others, and return a tuple "
     "of the two lists.", "tuple",
     lambda kept, all_: (kept, [x for x in all_ if x not in kept])),
    ("share", "Return the fraction of the {items} that {test}. The list is never empty.", "float",
     lambda kept, all_: round(len(kept) / len(all_), 2)),
    ("sorted", "Return those {items} that {test}, sorted in descending order.", "list",
     lambda kept, all_: sorted(kept, reverse=True)),
    ("backwards", "Return the {items} that {test}, in reverse order of their appearance.", "list",
     lambda kept, all_: kept[::-1]),
    ("distinct", "Return the set of all {items} that {test}.", "set",
     lambda kept, all_: set(kept)),
)  # fmt: skip
# Stubs without computed examples: name, arguments, docstring.
_SINGLE: tuple[tuple[str, str, str], ...] = (
    ("kilometers_to_miles", "kilometers: float) -> float", "Convert kilometers to miles."),
    ("kilograms_to_pounds", "weight: float) -> float", "Convert a weight in kilograms to pounds."),
    ("hours_to_minutes", "hours: int) -> int", "Return the number of minutes in the given hours."),
    ("celsius_to_kelvin", "temperature: float) -> float", "Convert Celsius to Kelvin."),
    ("circle_circumference", "radius: float) -> float", "Return the circumference of a circle."),
    ("cube_volume", "side: float) -> float", "Calculate the volume of a cube with the given side."),
    ("sphere_surface", "radius: float) -> float", "Calculate the surface area of a sphere."),
    ("cylinder_volume", "radius: float, height: float) -> float", "Return a cylinder's volume."),
    ("simple_interest", "principal: float, rate: float, years: int) -> float",
     "Calculate the simple interest for a principal, a yearly rate in percent and some years."),
    ("compound_interest", "principal: float, rate: float, years: int) -> float",
     "Calculate the amount after compound interest with a yearly rate in percent."),
    ("body_mass_index", "weight_kg: float, height_m: float) -> float",
     "Compute the body mass index from weight and height."),
    ("discounted_price", "price: float, percent: float) -> float",
     "Return the price after a discount of the given percent."),
    ("invert_dictionary", "mapping: dict) -> dict",
     "Return a dictionary whose keys are the values of the mapping and the other way round."),
    ("merge_dictionaries", "first: dict, second: dict) -> dict",
     "Merge two dictionaries. If a key is in both, add the two values."),
    ("keys_with_largest_value", "scores: dict) -> list",
     "Return all keys whose value is the largest, in sorted order."),
    ("group_by_first_letter", "words: list) -> dict",
     "Group the words by their first letter into a dictionary of lists."),
    ("transpose", "matrix: List[List[int]]) -> List[List[int]]", "Transpose a matrix."),
    ("matrix_trace", "matrix: List[List[int]]) -> int",
     "Return the sum of the elements on the main diagonal of a square matrix."),
    ("column_sums", "matrix: List[List[int]]) -> List[int]", "Return the sum of each column."),
    ("identity_matrix", "size: int) -> List[List[int]]", "Create an identity matrix."),
    ("chunks", "items: list, size: int) -> list",
     "Split the list into consecutive pieces of the given size; the last one may be shorter."),
    ("interleave", "first: list, second: list) -> list",
     "Take items from both lists in turns until both are used up."),
    ("title_case", "text: str) -> str", "Make the first letter of every word upper case."),
    ("snake_to_camel", "name: str) -> str", "Convert a name from snake_case to camelCase."),
    ("camel_to_snake", "name: str) -> str", "Convert a camelCase name into snake_case."),
    ("strip_punctuation", "text: str) -> str", "Remove all punctuation marks from the text."),
    ("swap_ends", "text: str) -> str", "Swap the first and the last character of a string."),
    ("middle_character", "text: str) -> str",
     "Return the middle character of a string, or the two middle ones if its length is even."),
    ("run_length_encode", "text: str) -> list",
     "Return a list of (character, count) tuples of the runs of equal characters."),
    ("is_pangram", "sentence: str) -> bool", "Check if a sentence uses every letter from a to z."),
    ("most_common_word", "text: str) -> str", "Return the word that occurs most often."),
    ("are_anagrams", "first: str, second: str) -> bool",
     "Check whether two strings are anagrams of each other, ignoring case and spaces."),
    ("hamming_distance", "first: str, second: str) -> int",
     "Return the number of positions at which two strings of equal length differ."),
    ("longest_common_prefix", "words: List[str]) -> str", "Return the longest common prefix."),
    ("least_common_multiple", "a: int, b: int) -> int", "Return the least common multiple."),
    ("perfect_number", "n: int) -> bool",
     "Check if n equals the sum of its divisors other than itself."),
    ("collatz_length", "n: int) -> int",
     "Count the steps of the Collatz sequence from n until it reaches 1."),
    ("triangular_number", "n: int) -> int", "Return the n-th triangular number."),
    ("digital_root", "n: int) -> int",
     "Add up the digits of n again and again until a single digit is left, and return it."),
    ("binary_search", "items: List[int], target: int) -> int",
     "Return the index of target in a sorted list, or -1 if it is not there."),
    ("bubble_sort", "items: List[int]) -> List[int]", "Sort a list with bubble sort."),
    ("insertion_sort", "items: List[int]) -> List[int]", "Sort the list by insertion sort."),
    ("merge_sorted", "first: List[int], second: List[int]) -> List[int]",
     "Merge two sorted lists into one sorted list."),
    ("running_maximum_gap", "numbers: List[int]) -> int",
     "Return the largest difference between two neighbours in the list."),
    ("dot_product", "first: List[float], second: List[float]) -> float",
     "Compute the dot product of two vectors."),
    ("euclidean_distance", "p: tuple, q: tuple) -> float",
     "Return the Euclidean distance between two points."),
    ("standard_deviation", "values: List[float]) -> float",
     "Calculate the population standard deviation of the values."),
    ("most_frequent", "values: list) -> object", "Return the value that occurs most often."),
    ("weighted_mean", "values: List[float], weights: List[float]) -> float",
     "Return the mean of the values, weighted by the weights."),
    ("moving_average", "values: List[float], window: int) -> List[float]",
     "Return the averages of each window of consecutive values."),
    ("flatten_once", "nested: List[list]) -> list", "Join the inner lists into a single list."),
    ("is_valid_password", "password: str) -> bool",
     "A password is valid if it has at least eight characters, a digit and a capital letter."),
    ("mask_email", "address: str) -> str",
     "Hide the part of an e-mail address before the @ sign with stars, but its first letter."),
    ("parse_key_values", "text: str) -> dict",
     "Parse a text like 'a=1;b=2' into a dictionary from keys to integers."),
    ("seconds_to_clock", "seconds: int) -> str", "Format seconds as a string HH:MM:SS."),
    ("days_in_month", "year: int, month: int) -> int", "Return the number of days of a month."),
    ("roman_to_integer", "numeral: str) -> int", "Convert a Roman numeral to an integer."),
    ("caesar_shift", "text: str, shift: int) -> str",
     "Shift every lower case letter by the given number of places, from z back to a."),
    ("count_islands", "grid: List[List[int]]) -> int",
     "Count the groups of ones that are connected horizontally or vertically."),
    ("balanced", "expression: str) -> bool",
     "Check if the square and curly brackets of an expression are balanced."),
    ("evaluate_postfix", "tokens: List[str]) -> int", "Evaluate a postfix expression."),
    ("power_set", "items: list) -> list", "Return all subsets of the items as a list of lists."),
    ("all_permutations", "text: str) -> List[str]", "Return all permutations of the characters."),
    ("coin_change", "coins: List[int], amount: int) -> int",
     "Return the smallest number of coins that make up the amount, or -1 if there is no way."),
    ("knapsack", "weights: List[int], values: List[int], capacity: int) -> int",
     "Return the largest total value of items whose total weight fits into the capacity."),
    ("edit_distance", "first: str, second: str) -> int",
     "Compute the Levenshtein distance between two strings."),
    ("tree_depth", "tree: dict) -> int",
     "Return the depth of a tree given as nested dictionaries; an empty one has depth 0."),
    ("topological_order", "graph: dict) -> list",
     "Return the nodes of a directed acyclic graph so that edges point forward."),
    ("shortest_path_length", "graph: dict, start: str, goal: str) -> int",
     "Return the number of edges of a shortest path in an unweighted graph, or -1."),
    ("read_csv_line", "line: str) -> List[str]", "Split a line of a CSV file into its fields."),
)  # fmt: skip
_WORDS = (
    "maple", "otter", "noon", "violet", "kayak", "ladder", "almost", "zebra", "quilt", "ember",
    "tent", "balloon", "ivory", "street", "abbey", "dog", "sky", "effort", "orbit", "lamp",
)  # fmt: skip
_TYPING = "from typing import List\n\n\n"
_IMPORTS = (
    "", "", "", "", _TYPING, _TYPING, "import math\n\n\n", "import re\n\n",
    "from typing import List, Optional\n\n\n", "from typing import List, Tuple\n\n\n",
    "from collections import Counter\n\n\n",
)  # fmt: skip


def _templated_stub(rng: random.Random) -> Prompt:
    if rng.random() < 0.12:
        name, arguments, sentence = rng.choice(_SINGLE)
        key, examples = name, ""
        if rng.random() < 0.3:
            sentence += rng.choice((" Do not use any library.", " Write it in one line.", ""))
    else:
        key, name, arguments, sentence, examples = _drawn_task(rng)
    quote = rng.choice(('"""', '"""', '""" ', "'''"))
    style = rng.random()
    if style < 0.5 or not examples:
        text = f"def {name}({arguments}:\n    {quote}{sentence}\n{examples}    {quote.strip()}\n"
    elif style < 0.8:
        body = textwrap.fill(
            sentence, 72, initial_indent="    ", subsequent_indent="    ", break_long_words=False
        )
        text = f"def {name}({arguments}:\n    {quote.strip()}\n{body}\n\n{examples}"
        text += f"    {quote.strip()}\n"
    else:
        text = f"def {name}({arguments}:\n    {quote}{sentence} {quote.strip()}\n"
    return Prompt("code", key, _with_preamble(text, rng))


def _drawn_task(rng: random.Random) -> tuple[str, str, str, str, str]:
    """Return key, name, arguments, sentence and examples of a test and an action on a list."""
    of_words = rng.random() < 0.4
    stem, test, holds = rng.choice(_WORD_TESTS if of_words else _INTEGER_TESTS)
    action, sentence, returned, act = rng.choice(_ACTIONS)
    n = rng.randint(2, 6)
    drawn = {
        "n": n,
        "m": n + rng.randint(1, 6),
        "c": rng.choice("abdegmrty"),
        "s": rng.choice(_WORDS),
    }
    parameter = rng.choice(
        ("words", "strings", "texts") if of_words else ("numbers", "values", "xs")
    )
    items = {"words": "words", "strings": "strings", "texts": "texts", "numbers": "numbers"}.get(
        parameter, rng.choice(("integers", "numbers"))
    )
    name = f"{action}_{stem.format(**drawn)}"
    inner = "str" if of_words else "int"
    hint = rng.choice((f": List[{inner}]", ": list", f": list[{inner}]", ""))
    arrow = f" -> {returned}" if hint and returned != "object" else ""
    examples = ""
    for _ in range(rng.randint(1, 3)):
        if of_words:
            given: list[Any] = rng.sample(_WORDS, rng.randint(2, 5))
        else:
            given = [rng.randint(-5, 40) for _ in range(rng.randint(2, 6))]
        value = act([x for x in given if holds(x, **drawn)], given)
        examples += f"    >>> {name}({given})\n    {value}\n"
    filled = sentence.format(items=items, test=test.format(**drawn))
    return f"{action} {stem}", name, f"{parameter}{hint}){arrow}", filled, examples


def _with_preamble(stub: str, rng: random.Random) -> str:
    text = rng.choice(_IMPORTS) + stub
    # The harness's own form has no line break at the end, the official one has.
    return text if rng.random() < 0.25 else text.rstrip("\n")


_TOPICS = (
    "the water cycle", "photosynthesis", "gravity", "the moon", "volcanoes", "earthquakes",
    "black holes", "the solar system", "dinosaurs", "whales", "bees", "coffee", "chocolate",
    "bread", "cheese", "rice", "tea", "the human heart", "sleep", "memory", "vaccines", "exercise",
    "stress", "healthy eating", "recycling", "solar energy", "wind power", "electric cars",
    "bicycles", "trains", "airplanes", "bridges", "robots", "computers", "the internet",
    "programming", "Python", "databases", "encryption", "machine learning", "chess", "football",
    "swimming", "music", "painting", "photography", "poetry", "the printing press",
    "the Roman Empire", "ancient Egypt", "the Renaissance", "the French Revolution", "democracy",
    "money", "inflation", "taxes", "small businesses", "job interviews", "time management",
    "friendship", "gardens", "trees", "rivers", "deserts", "the ocean", "rainbows", "clouds",
    "snow", "magnets", "electricity", "atoms", "water", "salt", "glass", "plastic", "gold",
    "prime numbers", "triangles", "fractions", "probability", "statistics", "maps", "languages",
    "libraries", "schools", "teachers", "museums", "cities", "farms", "markets", "cats", "dogs",
    "horses", "birds", "butterflies", "spiders", "elephants", "penguins", "mountains", "islands",
)  # fmt: skip
_QUESTIONS = (
    "What is the most important thing to know about {topic}?", "Explain {topic} to a child.",
    "Write a short story about {topic}.", "Write a poem about {topic}.",
    "List five facts about {topic}.", "Give me three tips about {topic}.",
    "What are the advantages and disadvantages of {topic}?", "Why is {topic} interesting?",
    "Summarize what you know about {topic} in two sentences.",
    "Write an email to a friend about {topic}.", "Tell me a joke about {topic}.",
    "How has our view of {topic} changed over time?", "Write a short essay on {topic}.",
    "Make a plan for a lesson about {topic}.", "What should a beginner read about {topic}?",
    "Describe {topic} in simple words.", "Write a dialogue between two people about {topic}.",
    "Write a quiz with three questions about {topic}.",
)  # fmt: skip


def _chat(rng: random.Random) -> Prompt:
    if rng.random() < 0.3:
        key, name, _, sentence, _ = _drawn_task(rng)
        task = sentence[0].lower() + sentence[1:].rstrip(".")
        question = rng.choice(
            (
                f"Write a Python function that does the following: {task}.",
                f"How would I write `{name}` in Python? It should do this: {task}.",
                f"Can you show me Python code for this task? {sentence}",
            )
        )
    else:
        key = rng.choice(_TOPICS)
        question = rng.choice(_QUESTIONS).format(topic=key)
    text = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    return Prompt("chat", key, text)


def library_windows(
    encode: Callable[[list[str]], list[list[int]]], length: int, count: int, seed: int
) -> Iterator[list[int]]:
    """Yield windows of the library's sources, each inside one file, in a seeded order of files.

    Args:
        encode: Texts to ids.
        length: Tokens of a window; a file's last one may be shorter, down to a quarter.
        count: At most as many windows.
        seed: Of the order.
    """
    files = library_files()
    random.Random(seed).shuffle(files)
    left = count
    for start in range(0, len(files), 64):
        for ids in encode([read_source(path) for path in files[start : start + 64]]):
            for begin in range(0, len(ids), length):
                window = ids[begin : begin + length]
                if len(window) < length // 4:
                    continue
                if not left:
                    return
                left -= 1
                yield window
