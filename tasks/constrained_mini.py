r"""constrained-mini: short texts that must satisfy a constraint, and how often they do.

Twenty-four items, eight of each kind in turn: JSON objects by a schema, one-line texts by a regular
expression, and bodies of Python functions. Prompts are few-shot, so that a small base model has a
chance. Names and numbers are drawn with a seeded generator.

A request carries its constraint (`models.constraints.ConstrainedDecoding`); a method that knows
none writes what it would have written anyway, so plain decoding runs on the same items. What it
costs to ask is in the trace's notes (`checks`, `checks_per_token`), as is the estimated log
probability of the constraint (`log_normaliser`).

Satisfaction is judged by other code than the constraints': `json.loads` with a validator of its
own, `re.fullmatch`, `ast.parse`. That is kinder to plain decoding than the constraints are, which
fix also the spaces of JSON, for instance, and know a part of Python only.

One item:
    prompt "Text: … JSON:\n"   kind "json"   schema {…}   stop ["\n"]
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from models.base import Generation, TextGenerator
from models.constraints import ConstrainedDecoding, Constraint
from models.python_syntax import python_program
from models.regular import json_schema, regex
from tasks.base import Dataset, Item, Metric, Scored, Scores, Task

GENERATOR_SEED = 20250405
ITEMS_OF_A_KIND = 8

_NAMES = ("Ada", "Bela", "Chen", "Dina", "Emil", "Fay", "Goran", "Hana", "Ivo", "Jun")
_CITIES = ("Oslo", "Lima", "Cairo", "Kyoto", "Porto", "Quito", "Riga", "Tunis")
_FRUITS = ("apple", "pear", "plum", "cherry", "grape", "lemon")

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "minLength": 1, "maxLength": 20},
    },
    "required": ["name", "age", "city"],
}
_ORDER = {
    "type": "object",
    "properties": {
        "item": {"enum": list(_FRUITS)},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "paid": {"type": "boolean"},
    },
    "required": ["item", "count", "paid"],
}
_LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 6}
_TAGGED = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "pattern": "[A-Z][a-z ]{1,30}"},
        "tags": {
            "type": "array",
            "items": {"type": "string", "pattern": "[a-z]{2,12}"},
            "minItems": 1,
            "maxItems": 3,
        },
        "note": {"type": "null"},
    },
    "required": ["title", "tags"],
}


def _json_item(number: int, rng: random.Random) -> dict[str, Any]:
    names, cities = rng.sample(_NAMES, 3), rng.sample(_CITIES, 3)
    ages = [rng.randint(18, 80) for _ in range(3)]
    form = number % 4
    if form == 0:
        texts = [
            f"{name} is {age} and lives in {city}."
            for name, age, city in zip(names, ages, cities, strict=True)
        ]
        answers: list[Any] = [
            {"name": name, "age": age, "city": city}
            for name, age, city in zip(names, ages, cities, strict=True)
        ]
        schema: dict[str, Any] = _PERSON
    elif form == 1:
        fruits = rng.sample(_FRUITS, 3)
        paid = [True, False, rng.random() < 0.5]
        texts = [
            f"{age} of {fruit}, {'paid' if done else 'not paid yet'}."
            for age, fruit, done in zip(ages, fruits, paid, strict=True)
        ]
        answers = [
            {"item": fruit, "count": age, "paid": done}
            for age, fruit, done in zip(ages, fruits, paid, strict=True)
        ]
        schema = _ORDER
    elif form == 2:
        rows = [[rng.randint(1, 99) for _ in range(rng.randint(2, 4))] for _ in range(3)]
        texts = [" and ".join(map(str, row)) for row in rows]
        answers = rows
        schema = _LIST
    else:
        texts = [
            f"A letter from {city} about {fruit}s."
            for city, fruit in zip(cities, rng.sample(_FRUITS, 3), strict=True)
        ]
        answers = [
            {"title": f"Letter from {city.lower()}", "tags": ["letter", city.lower()]}
            for city in cities
        ]
        schema = _TAGGED
    shown = [
        f"Text: {text}\nJSON:\n{json.dumps(answer)}\n"
        for text, answer in zip(texts[:2], answers[:2], strict=True)
    ]
    return {
        "kind": "json",
        "prompt": "".join(shown) + f"Text: {texts[2]}\nJSON:\n",
        "schema": schema,
        "stop": ["\n"],
        "reference": json.dumps(answers[2]),
    }


_PATTERNS = (
    (
        "A date in the form YYYY-MM-DD",
        r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
        ("1999-12-31", "2004-02-29", "2011-07-05"),
    ),
    (
        "A time of day, with seconds",
        r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d",
        ("08:30:00", "23:59:01", "12:15:45"),
    ),
    ("A licence plate", r"[A-Z]{2}-\d{3}-[A-Z]{2}", ("KB-204-XA", "OT-881-LM", "FE-310-GH")),
    (
        "An e-mail address",
        r"[a-z]{2,10}\.[a-z]{2,10}@[a-z]{3,12}\.(com|org|net)",
        ("ada.king@letters.org", "emil.berg@postal.net", "dina.moss@garden.com"),
    ),
    ("A colour for a web page", r"#[0-9a-f]{6}", ("#1fa0c3", "#ffffff", "#20b2aa")),
    ("A price in euros", r"€ ?[1-9]\d{0,3}\.\d\d", ("€ 12.50", "€ 980.00", "€ 3.99")),
    (
        "A telephone number",
        r"\+\d{2} \d{3} \d{4}",
        ("+47 555 0134", "+51 555 0177", "+20 555 0102"),
    ),
    (
        "A word with its plural",
        r"[a-z]{3,9}, [a-z]{3,9}s",
        ("apple, apples", "river, rivers", "stone, stones"),
    ),
)


def _regex_item(number: int, rng: random.Random) -> dict[str, Any]:
    what, pattern, examples = _PATTERNS[number]
    drawn = rng.sample(examples, 3)
    return {
        "kind": "regex",
        "prompt": f"{what}:\n{drawn[0]}\n{what}:\n{drawn[1]}\n{what}:\n",
        "pattern": pattern,
        "stop": ["\n"],
        "reference": drawn[2],
    }


_FUNCTIONS = (
    ("double(x)", "Return x multiplied by two.", "return x * 2"),
    ("is_even(number)", "Tell whether the number is even.", "return number % 2 == 0"),
    (
        "last(items)",
        "Return the last item, or None if there is none.",
        "return items[-1] if items else None",
    ),
    (
        "count_{letter}(text)",
        "Count the letter {letter} in the text.",
        "return text.count('{letter}')",
    ),
    (
        "total(numbers)",
        "Return the sum of the numbers.",
        "total = 0\n    for number in numbers:\n        total += number\n    return total",
    ),
    (
        "more_than_{n}(numbers)",
        "Return the numbers above {n}.",
        "return [x for x in numbers if x > {n}]",
    ),
    (
        "join_words(words)",
        "Return the words with a space between them.",
        "return ' '.join(words)",
    ),
    ("largest(a, b, c)", "Return the largest of the three.", "return max(a, b, c)"),
)


def _python_item(number: int, rng: random.Random) -> dict[str, Any]:
    drawn = {"letter": rng.choice("aeiou"), "n": rng.randint(2, 20)}
    signature, docstring, body = (text.format(**drawn) for text in _FUNCTIONS[number])
    return {
        "kind": "python",
        # Without a newline at the end: models write it and the indentation as one token.
        "prompt": "# Return the sum of a and b.\ndef add(a, b):\n    return a + b\n\n\n"
        f"# {docstring}\ndef {signature}:",
        "stop": ["\n\n", "\ndef", "\nclass", "\n#", "\nif", "\nprint"],
        "reference": f"\n    {body}",
    }


_MAKERS = {"json": _json_item, "regex": _regex_item, "python": _python_item}


@dataclass(frozen=True, kw_only=True)
class ConstrainedMini(Task[TextGenerator]):
    """Texts under constraints: the share that satisfies them, over 24 items of three kinds.

    Attributes:
        max_new_tokens: The longest reference has some 30 tokens.
        temperature: Of the sampling, 0 for greedy; the target distribution is the model's at this
            temperature, given the constraint.
        seed: Of the sampling.
    """

    max_new_tokens: int = 48
    temperature: float = 1.0
    seed: int = 0

    version = "1.0"
    data = Dataset(
        source="generated", revision=str(GENERATOR_SEED), split="test", license="Apache-2.0"
    )
    capability = "TextGenerator"
    scale = "embedded"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Constraint satisfaction."""
        return (Metric(name="satisfied", unit="fraction", kind="binary"),)

    def items(self) -> Iterator[Item]:
        """Yield the items, JSON, regular expressions and Python in turn."""
        for number in range(ITEMS_OF_A_KIND):
            for kind, make in _MAKERS.items():
                # A generator for each item, so that none moves when another one changes.
                rng = random.Random(f"{GENERATOR_SEED} {kind} {number}")
                yield Item(f"constrained-mini/{kind}-{number}", make(number, rng))

    def warmup_items(self) -> Iterator[Item]:
        """Yield items of the same forms with other contents."""
        for number, kind in enumerate(chain(_MAKERS, _MAKERS)):
            rng = random.Random(f"warm-up {GENERATOR_SEED} {kind} {number}")
            fields = _MAKERS[kind](number, rng)
            fields["prompt"] = f"# Some examples.\n{fields['prompt']}"
            yield Item(f"constrained-mini/warm-up-{number}", fields)

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        """Continue the prompt under the item's constraint."""
        fields = item.fields
        decoding = ConstrainedDecoding(
            max_new_tokens=self.max_new_tokens,
            stop=tuple(fields["stop"]),
            temperature=self.temperature,
            # Items with like prompts would otherwise be sampled with the same numbers.
            seed=random.Random(f"{self.seed} {item.id}").randrange(2**31),
            ignore_eos=fixed_length,
            constraint=constraint_of(fields),
        )
        return model.generate(model.tokenizer.encode(fields["prompt"]), decoding)

    def score(self, item: Item, output: str) -> Scores:
        """Return 1 if the output satisfies the item's constraint, else 0."""
        return self.score_with_detail(item, output).scores

    def score_with_detail(self, item: Item, output: str) -> Scored:
        """Score, and say what is wrong."""
        fault = fault_of(item.fields, output)
        return Scored({"satisfied": float(not fault)}, fault)


def constraint_of(fields: Mapping[str, Any]) -> Constraint:
    """Return the constraint of an item's fields."""
    if fields["kind"] == "json":
        return json_schema(fields["schema"])
    if fields["kind"] == "regex":
        return regex(fields["pattern"])
    return python_program(fields["prompt"])


def fault_of(fields: Mapping[str, Any], output: str) -> str:
    """Return why an output does not satisfy an item's constraint; empty if it does."""
    if fields["kind"] == "json":
        try:
            value = json.loads(output)
        except ValueError as error:
            return f"no JSON: {error}"
        return schema_fault(fields["schema"], value)
    if fields["kind"] == "regex":
        found = re.fullmatch(fields["pattern"], output, re.ASCII)
        return "" if found else "the pattern does not match"
    try:
        tree = ast.parse(fields["prompt"] + output)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"no Python: {error}"
    return "" if output.strip() and tree.body else "the function has no body"


def schema_fault(schema: Mapping[str, Any], value: object, place: str = "value") -> str:
    """Return where a value leaves a JSON schema, for the keywords of `models.regular.json_schema`.

    Written for the values, not for texts, so that it shares nothing with the constraint.
    """
    if "enum" in schema or "const" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        same = any(value == each and type(value) is type(each) for each in allowed)
        return "" if same else f"{place} is not one of {allowed}"
    kind = schema["type"]
    types: dict[str, tuple[type, ...]] = {
        "object": (dict,),
        "array": (list,),
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "null": (type(None),),
    }
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return f"{place} is no {kind}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        missing = [name for name in schema.get("required", ()) if name not in value]
        unknown = [name for name in value if name not in properties]
        if missing or unknown:
            return f"{place} lacks {missing} or has {unknown} too much"
        faults = (schema_fault(properties[n], each, f"{place}.{n}") for n, each in value.items())
        return next(filter(None, faults), "")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{place} has {len(value)} items"
        faults = (
            schema_fault(schema["items"], each, f"{place}[{at}]") for at, each in enumerate(value)
        )
        return next(filter(None, faults), "")
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            return f"{place} has {len(value)} characters"
        if "pattern" in schema and not re.fullmatch(schema["pattern"], value, re.ASCII):
            return f"{place} does not match {schema['pattern']}"
    if isinstance(value, (int, float)):
        is_within = schema.get("minimum", value) <= value <= schema.get("maximum", value)
        return "" if is_within else f"{place} is {value}"
    return ""
