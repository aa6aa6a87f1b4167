"""Constraints judge every beginning of a text exactly, whatever the tokens that bring it."""

from __future__ import annotations

import ast
import json
import random
import re
import warnings
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.base import Decoding
from models.constraints import (
    Anything,
    ConstrainedDecoding,
    Constraint,
    Stoppable,
    TokenChecker,
    accepts,
    token_bytes,
)
from models.python_syntax import expected_words, python_program
from models.regular import complement, json_schema, regex, union
from models.tokenization import HubTokenizer
from tests.models.toy import LetterTokenizer


def viable(constraint: Constraint, text: str) -> bool:
    return constraint.after(text.encode()) is not None


# --- regular expressions --------------------------------------------------------------------------

PIECES = st.sampled_from(["a", "b", "[ab]", "[^a]", ".", r"\d", r"\W", "é", "[à-ü]", "(?:ab)", "€"])


@st.composite
def patterns(draw: st.DrawFn) -> str:
    parts = draw(st.lists(PIECES, min_size=1, max_size=4))
    signs = draw(st.lists(st.sampled_from(["", "*", "+", "?", "{1,2}", "|"]), min_size=4))
    return "".join(part + sign for part, sign in zip(parts, signs, strict=False)).removesuffix("|")


@given(patterns(), st.text("ab1é€-ü\n", max_size=5))
@settings(max_examples=300, deadline=None)
def test_a_pattern_accepts_what_pythons_own_engine_matches(pattern: str, text: str) -> None:
    assert accepts(regex(pattern), text) == bool(re.fullmatch(pattern, text, re.ASCII))


@given(patterns(), st.text("ab1é", max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_beginning_is_viable_if_and_only_if_some_text_completes_it(
    pattern: str, beginning: str
) -> None:
    # Patterns have four pieces, and one of these is enough for each, or for what is left of it.
    enough = ("a", "b", "1", "é", "€", "-", "ab")
    ends = ("".join(end) for count in range(5) for end in product(enough, repeat=count))
    found = any(re.fullmatch(pattern, beginning + end, re.ASCII) for end in ends)
    assert viable(regex(pattern), beginning) == found


def test_characters_are_followed_byte_by_byte() -> None:
    state = regex("[é-ñ]x")
    first, second = "é".encode()
    half = state.after(bytes([first]))
    assert half is not None
    assert not half.is_complete
    assert half.after(bytes([second])) is not None
    assert half.after("à".encode()[1:]) is None  # the same first byte, another character
    assert state.after(b"z") is None


@pytest.mark.parametrize(("low", "high"), [(0x7E, 0x801), (0xFFFE, 0x10001), (0x3FF, 0x1234)])
def test_ranges_of_code_points_become_their_utf8(low: int, high: int) -> None:
    letters = complement(complement(((low, high),)))
    assert letters == ((low, high),)
    state = regex(f"[{chr(low)}-{chr(high)}]")
    for code in [*range(low - 2, low + 300), *range(high - 300, high + 3)]:
        if not 0xD800 <= code <= 0xDFFF:
            assert accepts(state, chr(code)) == (low <= code <= high), hex(code)


def test_classes_unite_and_complement() -> None:
    assert union(((1, 3),), ((4, 5),), ((9, 9),)) == ((1, 5), (9, 9))
    assert complement(((0, 9), (12, 0x10FFFF))) == ((10, 11),)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a(b", "not closed"),
        ("a)", "never opened"),
        ("^a$", "the whole text is matched"),
        (r"(a)\1", r"\\1 is not supported"),
        ("(?=a)", r"only \(\?:…\)"),
        ("a*?", "lazy or possessive"),
        ("*a", "nothing to repeat"),
        ("[z-a]", "must ascend"),
        ("a{3,2}", "must ascend"),
        ("a{,2}", "a bound must be"),
        ("[a", "too early"),
    ],
)
def test_what_is_no_regular_expression_is_refused_with_the_place(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        regex(pattern)


# --- JSON schemas ---------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer", "minimum": 7, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["age"],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"age": 7}', True),
        ('{"age":120,"ok":true}', True),
        ('{"name": "Ada", "age": 12, "tags": ["a", 3], "ok": false}', True),
        ('{"name": "é\\n\\"", "age": 99}', True),
        ('{"age": 6}', False),
        ('{"age": 121}', False),
        ('{"age": 07}', False),
        ('{"name": "", "age": 9}', False),
        ('{"name": "Clara", "age": 9}', False),
        ('{"age": 9, "name": "Ada"}', False),  # another order is left out
        ('{"name": "Ada"}', False),
        ('{"age": 9, "tags": ["a", "b", "a"]}', False),
        ('{"age":  9}', False),  # two spaces are left out
        ('{"age": 9,}', False),
        ('{"age": 9} ', False),
    ],
)
def test_a_schema_accepts_its_objects(text: str, expected: bool) -> None:
    assert accepts(json_schema(PERSON), text) == expected


@given(st.integers(-300, 300), st.integers(0, 300), st.integers(-700, 700))
@settings(max_examples=200, deadline=None)
def test_integers_keep_their_bounds(low: int, width: int, number: int) -> None:
    schema = {"type": "integer", "minimum": low, "maximum": low + width}
    assert accepts(json_schema(schema), str(number)) == (low <= number <= low + width)


SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"type": "number"}, "minItems": 1},
    {"type": "object", "properties": {n: {"type": "null"} for n in "abc"}, "required": ["b"]},
    {"type": "string", "pattern": "^[^a-z].x?$"},
    {"const": "€"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_every_text_that_a_random_walk_completes_is_json_of_the_schema(
    schema: dict[str, Any],
) -> None:
    from tasks.constrained_mini import schema_fault

    rng = random.Random(1)
    letters = [*'{}[]":, abcz019.-+eEnul\\n€', *"".join(schema.get("properties", {}))]
    completed = 0
    for _ in range(150):
        state: Constraint = json_schema(schema)
        text = ""
        for _ in range(60):
            options = [x for x in letters if viable(state, x)]
            words = [x for x in (' "age": 8', '"tags": [', "true") if viable(state, x)]
            if not options or (state.is_complete and rng.random() < 0.3):
                break
            letter = rng.choice(words + options)
            after = state.after(letter.encode())
            assert after is not None
            state, text = after, text + letter
        if state.is_complete:
            completed += 1
            bare = {k: v for k, v in schema.items() if k != "pattern"}
            assert schema_fault(bare, json.loads(text)) == "", text
    assert completed > 20


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#"}, "type must be one of"),
        ({"type": "object", "patternProperties": {}}, "'patternProperties' is not supported"),
        ({"type": "integer", "minimum": 3}, "come together"),
        ({"type": "object", "required": ["x"]}, "'x' is not among"),
        ({"type": "array", "items": {"type": "thing"}}, r"schema\.items: type must be"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 2}, "minItems"),
        ({"enum": [[1]]}, "single values"),
        ({"type": "string", "pattern": '"'}, "no character is left"),
    ],
)
def test_unsupported_schemas_are_refused_with_the_place(
    schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        json_schema(schema)


# --- Python ---------------------------------------------------------------------------------------

SOURCE = '''import os.path as path, sys
from a.b import (c, d as e,)
x: int = .5
@property
def f(x, y: int = 3, *args, **kw) -> int:
    """A "quoted" word and a ""pair""."""

    # A comment.
    for i, (j, k) in enumerate(range(10)):
        if i == 3 and not j is not k:
            continue
        elif x not in y: pass
        else:
            y += [a for a in b if a > 1.5e3 if a][0::2, ...]
            x **= y if z else {1: 2, 'b': (1,)}
    while True: x = y = yield 1; del a, b[1]
    return lambda q, r=2: q ** -r
class A(B, metaclass=C):
    def g(self):
        try:
            with open("f") as h, k:
                assert h, "no"
        except (E, F) as e:
            raise X from e
        except:
            global q
        finally: print(*a, 'x' 'y', b=3, **c)
        return self.x.y(t for t in u)[1:](
            1
        )
'''
WORDS = [
    *(f"{w} " for w in ("if", "for", "def", "lambda", "return", "yield", "not", "class", "import")),
    *("in ", "is ", "from ", " as ", "with ", "while ", "del ", "global ", "assert ", "raise "),
    *("else", "elif ", "try:", "except", "finally:", "pass", "None", "f(", "==", "**", ":\n  "),
    *("\n", "\n  ", "\n    ", "é", "..."),
    *"ab1.0e \n()[]{}:,=+-*/<>!'\"#@;\\nrx",
]


def walk(seed: int, length: int) -> list[tuple[str, Any]]:
    """Return a random beginning, as texts with their states, each viable."""
    rng = random.Random(seed)
    state, text = python_program(), ""
    path = []
    for _ in range(length):
        for word in rng.sample(WORDS, 12):
            after = state.after(word.encode())
            if after is not None:
                state, text = after, text + word
                path.append((text, state))
                break
    return path


def test_real_code_is_viable_at_every_byte_and_complete_at_the_end() -> None:
    ast.parse(SOURCE)
    state = python_program()
    for at, byte in enumerate(SOURCE.encode()):
        after = state.after(bytes([byte]))
        assert after is not None, (SOURCE[max(0, at - 30) : at + 1], expected_words(state))
        state = after
    assert state.is_complete
    assert accepts(python_program(), SOURCE)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_complete_pythons_own_parser_accepts(seed: int) -> None:
    complete = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start in range(50):
            for text, state in walk(1000 * seed + start, 40):
                if state.is_complete:
                    complete += 1
                    ast.parse(text)  # raises if it is none
    assert complete > 200


def test_what_is_viable_can_be_completed() -> None:
    """Close each random beginning by the shortest tokens that the parser asks for."""
    closers = [
        *("pass", "x", "1", "'", '"', '"""', "'''", ")", "]", "}", ":", "\n", "\n ", "(", "="),
        *(" in x", " x", "x\n", "except:", "e", "0", "class x:0", "import x", " else 0", ".", ","),
        *("\n" + " " * n for n in range(2, 9)),
        *(
            "nd x",
            "ot in x",
            "f x else x",
            "d x",
            "r x",
            "n x",
            "t x",
            "f x",
            "s x",
            "x)",
            "x:0",
            "0\nexcept:0",
        ),
    ]
    for seed in range(80):
        path = walk(seed, 8)
        if not path:
            continue
        following = frontier = {path[-1][1]: path[-1][0]}
        for _ in range(12):
            if any(state.is_complete for state in following):
                break
            following = {}
            for state, text in frontier.items():
                for closer in closers:
                    after = state.after(closer.encode())
                    if after is not None:
                        following.setdefault(after, text + closer)
            ranked = sorted(
                following, key=lambda s: (s.brackets, len(s.indents), len(following[s]))
            )
            frontier = {state: following[state] for state in ranked[:100]}
        assert any(state.is_complete for state in following), path[-1][0]


@pytest.mark.parametrize(
    "text",
    [
        *("x = = 1", "def f(:", "if x\n  y", "  x", "1x", "01", "x y", "f(a=1, b)", "(]", "1 = 2"),
        *("'abc\n", "x = 1 +\n", "if x:\ny", "x..y", "print 'x'", "if x:\n    y\n  z", "\tx"),
        *(
            "def f(a=1, b)",
            "try:\n  x\ny",
            "else ",
            "f'",
            "a b",
            "x = 1 not x",
            "x: #",
            "class 1",
            '"\\d',
        ),
    ],
)
def test_what_nothing_can_save_is_refused(text: str) -> None:
    assert not viable(python_program(), text)


@pytest.mark.parametrize(
    "text", ["return return", "x.", '"""a', "if x:\n      ", "x !", "x i", "."]
)
def test_unfinished_tokens_are_judged_by_what_they_can_become(text: str) -> None:
    assert viable(python_program(), text)
    assert not accepts(python_program(), text)


@pytest.mark.parametrize("text", ["", "retur", "1.", "# x", "x # y", "\n  \n", "if x:\n y", "''"])
def test_texts_may_end_within_a_token_that_is_one(text: str) -> None:
    assert accepts(python_program(), text)


def test_a_prefix_stands_before_the_text() -> None:
    state = python_program("def f(x):")
    assert accepts(state, "\n    return x\n")
    assert accepts(state, " return x")
    assert not accepts(state, "\nreturn x")
    assert not accepts(state, "")
    with pytest.raises(ValueError, match="begins with '1x'"):
        python_program("1x")


# --- stop strings, tokens -------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["ab", "b", "\n\n", "aab"]), min_size=1, max_size=2, unique=True),
    st.text("ab\n", max_size=7),
    st.sampled_from(["a*", "(?:ab)*", "[ab\n]*", "a{2}b?", "[^b]*"]),
)
@settings(max_examples=400, deadline=None)
def test_stopped_texts_are_complete_before_the_first_stop_string(
    stops: list[str], text: str, pattern: str
) -> None:
    start = Stoppable(regex(pattern), tuple(stop.encode() for stop in stops))
    state: Stoppable | None = start
    written = ""
    for letter in text:
        if state is None or state.is_stopped:
            break
        state = state.after(letter.encode())
        written += letter
    cuts = [at for at in (written.find(stop) for stop in stops) if at >= 0]
    if cuts:
        before = written[: min(cuts)]
        assert bool(state and state.is_stopped) == bool(re.fullmatch(pattern, before)), written
    elif state is not None:
        assert not state.is_stopped
        assert state.is_complete == bool(re.fullmatch(pattern, written))
    if not cuts:
        assert start.after(text.encode()) == state


def test_a_token_may_go_on_behind_the_stop_string_that_it_completes() -> None:
    state = Stoppable(regex("a+"), (b"\n",)).after(b"aa\nzzz")
    assert state is not None
    assert state.is_stopped
    assert Stoppable(regex("a+b"), (b"\n",)).after(b"aa\n") is None


def byte_level_tokenizer() -> HubTokenizer:
    """Return a tokenizer with all bytes, two merges and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "Ġa", "ab"])}
    core = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return HubTokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>"))


@given(st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_token_bytes_spell_the_text_that_was_encoded(text: str) -> None:
    tokenizer = byte_level_tokenizer()
    pieces = token_bytes(tokenizer, 262)
    assert pieces[258] is None  # the special one
    assert pieces[259:] == (None, None, None)  # ids that the tokenizer does not know
    spelled = b"".join(pieces[token] or b"" for token in tokenizer.encode(text))
    assert spelled == text.encode()


def test_tokenizers_with_byte_fallback_are_read_too() -> None:
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁a": 3, "b": 4}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    hub = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert token_bytes(HubTokenizer(hub), 5) == (None, b"\xc3", b"\xa9", b" a", b"b")


def test_a_checker_counts_and_ends_texts_by_eos_alone_when_they_are_complete() -> None:
    pieces = token_bytes(LetterTokenizer(), 5)
    decoding = Decoding(max_new_tokens=4)
    checker = TokenChecker(regex("ab"), pieces, frozenset({4, 3}), decoding)
    assert (checker.eos, checker.merged) == (3, (4,))
    assert checker.usable == [True, True, True, True, False]
    assert checker.after(checker.start, 3) is None
    state = checker.after(checker.start, 0)
    assert state is not None
    assert checker.after(state, 2) is None
    state = checker.after(state, 1)
    assert state is not None
    assert not state.has_ended
    end = checker.after(state, 3)
    assert end is not None
    assert end.has_ended
    assert checker.checks == 5
    endless = TokenChecker(
        regex("ab"), pieces, frozenset({3}), Decoding(max_new_tokens=4, ignore_eos=True)
    )
    assert endless.eos is None


def test_a_constrained_request_is_an_ordinary_one_to_those_who_know_no_constraint() -> None:
    request = ConstrainedDecoding(max_new_tokens=3, constraint=Anything())
    assert isinstance(request, Decoding)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        ConstrainedDecoding(max_new_tokens=0, constraint=Anything())
