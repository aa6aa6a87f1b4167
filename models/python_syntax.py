r"""Python's syntax as a constraint: a lexer that works byte by byte, and an Earley parser.

The language is a part of Python 3.11, so that every beginning can be judged exactly; `ast.parse`
accepts every text of it. Of the tokens: names of ASCII letters, digits and underscores; decimal
numbers; plain string literals, short and long, with the escapes `\\ \' \" \a \b \f \n \r \t \v \0`;
all operators but `:=`; comments. Of the grammar: everything in `GRAMMAR`. Left out are `match`,
`async` and `await`, f-strings and other prefixed strings, star expressions and star targets,
walruses, positional-only and keyword-only parameters, relative imports, line continuation by a
backslash, and tabs.

What may follow is decided by two questions that together are exact: which tokens can the unfinished
one at the end still become, and which tokens does the parser expect.
"""

from __future__ import annotations

import keyword
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from models.regular import RegularState, regex

# Literals stand in quotes, NAME, NUMBER, STRING, NEWLINE, INDENT and DEDENT are made by the lexer.
# [x] is x or nothing; (x)* any number of x, (x)+ at least one.
GRAMMAR = """
program: (statement)+
statement: line | compound
line: simple [";"] NEWLINE | simple ";" line
block: line | NEWLINE INDENT (statement)+ DEDENT

simple: expressions | yielded | assignment
simple: "pass" | "break" | "continue"
simple: "return" [expressions] | "raise" [expression ["from" expression]]
simple: "assert" expression ["," expression] | "del" targets
simple: "global" names | "nonlocal" names
simple: "import" modules | "from" dotted "import" imported
names: NAME ("," NAME)*
modules: module ("," module)*
module: dotted ["as" NAME]
dotted: NAME ("." NAME)*
imported: "*" | aliases | "(" aliases [","] ")"
aliases: alias ("," alias)*
alias: NAME ["as" NAME]

assignment: targets "=" assigned | place augmented value | place ":" expression ["=" value]
assigned: value | targets "=" assigned
value: expressions | yielded
augmented: "+=" | "-=" | "*=" | "/=" | "//=" | "%=" | "@="
augmented: "&=" | "|=" | "^=" | ">>=" | "<<=" | "**="
yielded: "yield" [expressions] | "yield" "from" expression
targets: target ("," target)* [","]
target: place | "(" targets ")" | "[" targets "]"
place: NAME | primary "." NAME | primary "[" slices "]"

compound: "if" expression ":" block ("elif" expression ":" block)* ["else" ":" block]
compound: "while" expression ":" block ["else" ":" block]
compound: "for" targets "in" expressions ":" block ["else" ":" block]
compound: "try" ":" block (handler)+ ["else" ":" block] ["finally" ":" block]
compound: "try" ":" block (handler)* "except" ":" block ["else" ":" block] ["finally" ":" block]
compound: "try" ":" block "finally" ":" block
compound: "with" context ("," context)* ":" block
compound: ("@" expression NEWLINE)* defined
handler: "except" expression ["as" NAME] ":" block
context: expression ["as" target]
defined: "def" NAME "(" [parameters] ")" ["->" expression] ":" block
defined: "class" NAME ["(" [arguments] ")"] ":" block

parameters: parameter ("," parameter)* ["," optionals] [","] | optionals [","]
optionals: default ("," default)* ["," stars] | stars
stars: "*" parameter | "**" parameter | "*" parameter "," "**" parameter
parameter: NAME [":" expression]
default: parameter "=" expression
lambdas: NAME ("," NAME)* ["," lambda_optionals] [","] | lambda_optionals [","]
lambda_optionals: lambda_default ("," lambda_default)* ["," lambda_stars] | lambda_stars
lambda_stars: "*" NAME | "**" NAME | "*" NAME "," "**" NAME
lambda_default: NAME "=" expression

expressions: expression ("," expression)* [","]
expression: logical | logical "if" logical "else" expression | "lambda" [lambdas] ":" expression
logical: inverted | logical "or" inverted | logical "and" inverted
inverted: "not" inverted | comparison
comparison: arithmetic | comparison compared arithmetic
compared: "<" | ">" | "<=" | ">=" | "==" | "!=" | "in" | "not" "in" | "is" | "is" "not"
arithmetic: unary | arithmetic operator unary
operator: "+" | "-" | "*" | "/" | "//" | "%" | "@" | "&" | "|" | "^" | "<<" | ">>"
unary: "+" unary | "-" unary | "~" unary | primary | primary "**" unary
primary: atom | primary "." NAME | primary "(" [arguments] ")" | primary "[" slices "]"
arguments: positional [","] | positional "," keywords [","] | keywords [","] | expression loops
positional: argument ("," argument)*
argument: expression | "*" expression
keywords: keyword ("," keyword)*
keyword: NAME "=" expression | "**" expression
slices: slice ("," slice)* [","]
slice: expression | [expression] ":" [expression] [":" [expression]]
atom: NAME | NUMBER | (STRING)+ | "True" | "False" | "None" | "..."
atom: "(" [expressions] ")" | "(" expression loops ")" | "(" yielded ")"
atom: "[" [expressions] "]" | "[" expression loops "]"
atom: "{" [pairs] "}" | "{" expressions "}" | "{" expression loops "}" | "{" pair loops "}"
pairs: pair ("," pair)* [","]
pair: expression ":" expression
loops: (loop)+
loop: "for" targets "in" logical ("if" logical)*
"""

OPERATORS = frozenset(
    [
        "+",
        "-",
        "*",
        "/",
        "//",
        "%",
        "@",
        "&",
        "|",
        "^",
        "<<",
        ">>",
        "~",
        "**",
        "<",
        ">",
        "<=",
        ">=",
        "==",
        "!=",
        "=",
        "->",
        "+=",
        "-=",
        "*=",
        "/=",
        "//=",
        "%=",
        "@=",
        "&=",
        "|=",
        "^=",
        ">>=",
        "<<=",
        "**=",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        ".",
        ";",
        "...",
    ]
)
_OPENING, _CLOSING = "([{", ")]}"
_NAME_START = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_NAME_BYTES = _NAME_START | frozenset(b"0123456789")
_SPACE, _NEWLINE, _HASH, _DOT = b" \n#."


# --- the parser -----------------------------------------------------------------------------------


class _Rule(NamedTuple):
    name: str
    body: tuple[str, ...]


class _Item(NamedTuple):
    """A rule of which `dot` symbols have been seen since `origin`."""

    rule: _Rule
    dot: int
    origin: Column


class Column:
    """What the parser knows after some tokens: an Earley set, with links to earlier ones.

    Attributes:
        is_program: Whether the tokens so far are a program.
    """

    def __init__(self, items: Iterable[_Item], rules: dict[str, list[_Rule]]) -> None:
        self._rules = rules
        self._waiting: dict[str, list[_Item]] = defaultdict(list)
        self._next: dict[str, Column | None] = {}
        self.is_program = False
        self._close(items)

    @property
    def expected(self) -> Iterator[str]:
        """The tokens that may come next."""
        return (symbol for symbol in self._waiting if symbol not in self._rules)

    def expects(self, terminal: str) -> bool:
        """Return whether a token may come next."""
        return terminal in self._waiting

    def after(self, terminal: str) -> Column | None:
        """Return the column after one more token; None if it cannot stand here."""
        if terminal not in self._next:
            seen = [
                _Item(item.rule, item.dot + 1, item.origin)
                for item in self._waiting.get(terminal, ())
            ]
            self._next[terminal] = Column(seen, self._rules) if seen else None
        return self._next[terminal]

    def _close(self, items: Iterable[_Item]) -> None:
        waiting, seen, predicted = list(items), set(), set()
        if not waiting:  # the first column: no token at all is a program too
            self.is_program = True
            waiting = [_Item(rule, 0, self) for rule in self._rules["program"]]
            predicted.add("program")
        while waiting:
            item = waiting.pop()
            if item in seen:
                continue
            seen.add(item)
            rule, dot, origin = item
            if dot == len(rule.body):
                self.is_program |= rule.name == "program"
                waiting += [
                    _Item(parent.rule, parent.dot + 1, parent.origin)
                    for parent in origin._waiting[rule.name]
                ]
                continue
            symbol = rule.body[dot]
            self._waiting[symbol].append(item)
            if symbol in self._rules and symbol not in predicted:
                predicted.add(symbol)
                waiting += [_Item(each, 0, self) for each in self._rules[symbol]]


@cache
def _rules() -> dict[str, list[_Rule]]:
    return _read_grammar(GRAMMAR)


def _read_grammar(text: str) -> dict[str, list[_Rule]]:
    """Return plain rules: optional parts are written out, repetitions get a rule of their own."""
    bodies: dict[str, list[tuple[str, ...]]] = defaultdict(list)

    def sequence(words: list[str]) -> list[tuple[str, ...]]:
        """Return the ways to write words up to the end of the alternative."""
        ways: list[tuple[str, ...]] = [()]
        while words and words[0] not in ("|", "]", ")*", ")+"):
            word = words.pop(0)
            options: list[tuple[str, ...]] = [(word.strip('"'),)]
            if word in ("[", "("):
                inner = sequence(words)
                closing = words.pop(0)
                if closing != "]":
                    name = f"some {' '.join(map(str, inner))}"
                    if name not in bodies:
                        bodies[name] = [*inner, *((name, *way) for way in inner)]
                    inner = [(name,)]
                options = inner if closing == ")+" else [(), *inner]
            ways = [(*way, *option) for way in ways for option in options]
        return ways

    for rule in filter(None, text.splitlines()):
        name, _, body = rule.partition(":")
        words = re.findall(r'"[^"]+"|\w+|\)[*+]|[\[\]|(]', body)
        while words:
            bodies[name] += sequence(words)
            if words:
                words.pop(0)  # the bar
    return {name: [_Rule(name, body) for body in dict.fromkeys(b)] for name, b in bodies.items()}


# --- the lexer ------------------------------------------------------------------------------------


@cache
def _number() -> RegularState:
    return regex(r"(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?")


@cache
def _string() -> RegularState:
    escape = r"\\[\\'" + '"' + "abfnrtv0]"
    forms = []
    for quote in "'\"":
        letter = rf"(?:[^\\{quote}\x00-\x08\x0a-\x1f\x7f]|{escape})"
        long_letter = rf"(?:[^\\{quote}\x00-\x08\x0b-\x1f\x7f]|{escape})"
        forms.append(f"{quote}{letter}*{quote}")
        forms.append(f"{quote * 3}(?:{quote}?{quote}?{long_letter})*{quote * 3}")
    return regex("|".join(forms))


@cache
def _comment() -> RegularState:
    return regex(r"#[^\x00-\x08\x0a-\x1f\x7f]*")


@dataclass(frozen=True)
class PythonState:
    """A beginning of a Python program: a `models.constraints.Constraint`.

    Attributes:
        column: The parser behind the last finished token.
        indents: Widths of the open blocks, the outermost first.
        brackets: Open brackets.
        width: Spaces at the start of a line on which nothing else stands yet; None past that.
        has_tokens: Whether the line holds a token, so that its end counts.
        kind: What the unfinished token is: `name`, `operator`, `number`, `string`, `comment`, or
            empty if there is none.
        token: Its bytes, for names, operators and numbers.
        automaton: Its state, for the others.
    """

    column: Column
    indents: tuple[int, ...] = (0,)
    brackets: int = 0
    width: int | None = 0
    has_tokens: bool = False
    kind: str = ""
    token: bytes = b""
    automaton: RegularState | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here: a program, or nothing at all."""
        state = self._finished()
        if state is None or state.brackets:
            return False
        column: Column | None = state.column
        closing = ["NEWLINE"] * state.has_tokens + ["DEDENT"] * (len(state.indents) - 1)
        for terminal in closing:
            column = column.after(terminal) if column else None
        return column is not None and column.is_program

    def after(self, data: bytes) -> PythonState | None:
        """Return the state after more bytes; None if no program begins so."""
        state = self
        for byte in data:
            following = state._after_byte(byte)
            if following is None:
                return None
            state = following
        return state if state._is_viable() else None

    def _after_byte(self, byte: int) -> PythonState | None:
        if self.kind:
            longer = self._continued(byte)
            if longer is not None:
                return longer
            if self.kind == "number" and self.token != b"." and byte in _NAME_BYTES:
                return None  # Python refuses 1x, and takes 1if only with a warning
            finished = self._finished()
            return finished._between(byte) if finished else None
        return self._between(byte)

    def _continued(self, byte: int) -> PythonState | None:
        """Return the state in which the byte belongs to the unfinished token."""
        if self.automaton is not None:
            automaton = self.automaton.after(bytes([byte]))
            if automaton is not None:
                token = self.token + bytes([byte]) if self.kind == "number" else b""
                return replace(self, automaton=automaton, token=token)
            # The point of a number is not known as one before a digit follows.
            if self.token != b".":
                return None
        longer = self.token + bytes([byte])
        if self.kind == "name":
            return replace(self, token=longer) if byte in _NAME_BYTES else None
        if self.kind in ("operator", "number") and _begins_operator(longer):
            return replace(self, kind="operator", token=longer, automaton=None)
        return None

    def _between(self, byte: int) -> PythonState | None:
        """Return the state after a byte that belongs to no token yet."""
        if byte == _SPACE:
            return self if self.width is None else replace(self, width=self.width + 1)
        if byte == _NEWLINE:
            return self._line_ended()
        if byte == _HASH:
            return replace(self, kind="comment", automaton=_comment().after(b"#"))
        state = self._indented()
        if state is None:
            return None
        data = bytes([byte])
        if byte in _NAME_START:
            return replace(state, kind="name", token=data)
        if data in (b"'", b'"'):
            return replace(state, kind="string", automaton=_string().after(data))
        if data.isdigit() or byte == _DOT:
            return replace(state, kind="number", token=data, automaton=_number().after(data))
        return replace(state, kind="operator", token=data) if _begins_operator(data) else None

    def _line_ended(self) -> PythonState | None:
        if self.brackets:
            return self
        if not self.has_tokens:
            return replace(self, width=0)
        column = self.column.after("NEWLINE")
        return replace(self, column=column, width=0, has_tokens=False) if column else None

    def _indented(self) -> PythonState | None:
        """Return the state with the indentation of its line settled: a token follows."""
        if self.width is None or self.brackets:
            return replace(self, width=None)
        column: Column | None = self.column
        indents = self.indents
        if self.width > indents[-1]:
            column = self.column.after("INDENT")
            indents = (*indents, self.width)
        while column is not None and self.width < indents[-1]:
            column = column.after("DEDENT")
            indents = indents[:-1]
        if column is None or self.width != indents[-1]:
            return None
        return replace(self, column=column, indents=indents, width=None)

    def _finished(self) -> PythonState | None:
        """Return the state with its unfinished token handed to the parser."""
        if not self.kind:
            return self
        if self.kind == "comment":
            return replace(self, kind="", automaton=None)
        text = self.token.decode(errors="replace")
        if self.token == b"." or self.kind == "operator":
            terminal = text if text in OPERATORS else ""
        elif self.kind == "name":
            terminal = text if keyword.iskeyword(text) else "NAME"
        else:
            is_whole = self.automaton is not None and self.automaton.is_complete
            terminal = self.kind.upper() if is_whole else ""
        column = self.column.after(terminal)
        if column is None:
            return None
        brackets = self.brackets + (terminal in _OPENING) - (terminal in _CLOSING)
        return PythonState(column, self.indents, brackets, width=None, has_tokens=True)

    def _is_viable(self) -> bool:
        """Return whether the unfinished token can become one that the parser expects."""
        expects = self.column.expects
        if self.kind == "name":
            text = self.token.decode()
            return expects("NAME") or any(
                word.startswith(text) for word in self.column.expected if word.isalpha()
            )
        if self.kind == "string":
            return expects("STRING")
        if self.kind == "number" and (expects("NUMBER") or self.token != b"."):
            return expects("NUMBER")
        if self.kind in ("operator", "number"):
            text = self.token.decode()
            return any(sign.startswith(text) for sign in self.column.expected)
        if self.kind == "comment":  # behind it the line is over
            return bool(self.brackets) or not self.has_tokens or expects("NEWLINE")
        return True


@cache
def _begins_operator(data: bytes) -> bool:
    return any(sign.startswith(data.decode("latin-1")) for sign in OPERATORS)


def python_program(prefix: str = "") -> PythonState:
    """Return the language of the texts that complete `prefix` to a Python program.

    Args:
        prefix: What stands before the text: a signature, imports. It may end anywhere, also within
            a token.

    Raises:
        ValueError: No program of the language begins so.
    """
    # Columns remember what follows them, so each program begins with one of its own.
    state = PythonState(Column((), _rules())).after(prefix.encode())
    if state is None:
        raise ValueError(
            f"no Python program of the supported part of the language begins with {prefix!r}."
        )
    return state


def expected_words(state: PythonState) -> Sequence[str]:
    """Return the tokens that the parser would take after the last finished one, sorted."""
    return sorted(state.column.expected)
