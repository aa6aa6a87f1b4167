"""Settings as text: `token-recycling:tree_nodes=32,state=session` to a typed dataclass and back.

A spec is a name and, after a colon, `key=value` pairs. Values are read by the annotations of the
dataclass that they set, so a method or task declares its parameters once, as fields. The same
checks serve TOML tables. Needs no torch.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from runner.request import UsageError

T = TypeVar("T")

_PARAMETER = re.compile(r"[A-Za-z_]\w*=")
JOINT = "+"
_JOINED = re.compile(r"\+(?=\s*[A-Za-z])")
_TRUE = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_BRACKETS = {"[": "]", "(": ")"}


def nearest(word: str, words: Iterable[str]) -> str:
    """Return the word most like `word`, or `` if none is; case, `-` and `_` do not matter."""
    plain = {_plain(candidate): candidate for candidate in words}
    found = get_close_matches(_plain(word), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else ""


def unknown(what: str, name: str, allowed: Iterable[str], then: str = "") -> UsageError:
    """Return the error for a name that does not exist, with the nearest one that does.

    Args:
        what: Kind of thing, `method`.
        name: As the user wrote it.
        allowed: All valid names.
        then: What to do next; without it the valid names are listed.
    """
    names = sorted(allowed)
    near = nearest(name, names)
    listed = then or (f"Allowed: {', '.join(names)}." if names else "There is none.")
    return UsageError(
        f"no {what} named {name!r}. {f'Did you mean {near!r}? ' if near else ''}{listed}"
    )


def choose(what: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is allowed.

    Raises:
        UsageError: It is not; names the allowed values and the nearest.
    """
    names = tuple(allowed)
    if value in names:
        return value
    near = nearest(value, names)
    hint = f" Did you mean {near!r}?" if near else ""
    raise UsageError(f"{what} must be one of {', '.join(names)}, got {value!r}.{hint}")


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


# --- specs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A name with parameters, as written: values are text until `build` reads them."""

    name: str
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_bare(self) -> bool:
        """Whether nothing is set."""
        return not self.params

    def __str__(self) -> str:
        """Return the spec as text, parameters in their order."""
        pairs = ",".join(f"{key}={value}" if key else value for key, value in self.params.items())
        return f"{self.name}:{pairs}" if pairs else self.name


def parse_spec(text: str) -> Spec:
    """Split `name[:key=value,…]`.

    The ids `hf:<hub id>` and `path:<folder>` keep their own colon. A value may hold commas inside
    brackets or double quotes. The first one may come without a key, which is then "": `build` knows
    what it sets, if anything (`lm-eval:gsm8k`).

    Raises:
        UsageError: The name is missing, a pair has no `=`, a key comes twice, a bracket stays open.
    """
    text = text.strip()
    prefix = re.match(r"(hf|path):", text)
    if prefix:
        # A folder may hold colons too; parameters start at the first colon that a key follows.
        cut = next(
            (
                m.start()
                for m in re.finditer(r":", text)
                if m.start() >= prefix.end() and _PARAMETER.match(text, m.end())
            ),
            len(text),
        )
        name, listed = text[:cut], text[cut + 1 :]
        missing = len(name) == prefix.end()
    else:
        name, colon, listed = text.partition(":")
        missing = not name.strip() or (bool(colon) and not listed.strip())
    if missing:
        raise UsageError(f"{text!r} is no spec: write name or name:key=value,key=value.")
    if "," in name and not prefix:
        raise UsageError(f"{text!r} is no spec: several are several options, one for each name.")
    params: dict[str, str] = {}
    for place, pair in enumerate(_split(listed, text)):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals and key and place == 0 and not prefix:
            key, value = "", key
        elif not equals or not key.isidentifier():
            raise UsageError(f"{pair.strip()!r} in {text!r} sets nothing: write key=value.")
        if key in params:
            raise UsageError(f"{key!r} comes twice in {text!r}.")
        params[key] = value
    return Spec(name.strip(), params)


@dataclass(frozen=True)
class MethodSpec:
    """A method as written: one spec, or those of the parts of a stack, in their order."""

    parts: tuple[Spec, ...]

    @property
    def name(self) -> str:
        """The name, that of a stack made of its parts' names: `snapkv+prompt-lookup`."""
        return JOINT.join(part.name for part in self.parts)

    @property
    def is_bare(self) -> bool:
        """Whether nothing is set."""
        return all(part.is_bare for part in self.parts)


def parse_method(text: str) -> MethodSpec:
    """Split `name[:key=value,…][+name[:key=value,…]]`.

    A `+` with a letter behind it joins two methods, unless it stands inside brackets or double
    quotes; `1e+3` is a number.

    Raises:
        UsageError: A part is no spec.
    """
    return MethodSpec(tuple(map(parse_spec, _split(text, text, _JOINED) or [text])))


def _split(text: str, whole: str, at: re.Pattern[str] = re.compile(",")) -> list[str]:
    """Split at the separators, commas if not told, outside brackets and double quotes."""
    if not text.strip():
        return []
    parts, start, closers, quoted, escaped = [], 0, [], False, False
    for place, character in enumerate(text):
        if quoted:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        elif character in _BRACKETS:
            closers.append(_BRACKETS[character])
        elif character in _BRACKETS.values():
            if not closers or closers.pop() != character:
                raise UsageError(f"{character!r} closes nothing in {whole!r}.")
        elif not closers and at.match(text, place):
            parts.append(text[start:place])
            start = place + 1
    if quoted or closers:
        raise UsageError(f"{'a double quote' if quoted else 'a bracket'} stays open in {whole!r}.")
    return [*parts, text[start:]]


# --- dataclasses ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A field of a settings dataclass, for people.

    Attributes:
        name: As on the command line.
        type: As in the source, spelled for people.
        default: As text; `required` if there is none.
        doc: From the class's `Attributes` section.
    """

    name: str
    type: str
    default: str
    doc: str


def parameters(cls: type) -> list[Parameter]:
    """Return what can be set on a dataclass, in the order of its fields."""
    docs = _attribute_docs(cls)
    result = []
    for each in _settable(cls):
        hint = _hint(cls, each.name)
        try:
            default = "required" if _is_required(each) else format_value(_default(each), hint)
        except TypeError:
            default = repr(_default(each))
        result.append(Parameter(each.name, describe(hint), default, docs.get(each.name, "")))
    return result


def build(cls: type[T], params: Mapping[str, str], what: str) -> T:
    """Make a dataclass from text values.

    Args:
        cls: A dataclass whose fields are the settings.
        params: Values as `parse_spec` gives them.
        what: Whose settings they are, for messages: `method 'token-recycling'`.

    Raises:
        UsageError: A key is unknown or comes twice; a value has the wrong type, is not allowed,
            sets nothing, or is missing.
    """
    names = {each.name: each for each in _settable(cls)}
    values: dict[str, Any] = {}
    for given, text in params.items():
        key = given or getattr(cls, "unnamed", "")
        if not key:
            raise UsageError(f"{what}: {text!r} sets nothing: write key=value.")
        if key not in names:
            raise _unknown_key(what, "parameter", key, names)
        if key in values:
            raise UsageError(f"{what}: {key!r} comes twice.")
        values[key] = _convert(text, _hint(cls, key), f"{what}: {key}")
    return _construct(cls, values, what)


def from_table(cls: type[T], table: Mapping[str, Any], what: str) -> T:
    """Make a dataclass from a TOML table, whose values have types already.

    Raises:
        UsageError: As `build`.
    """
    names = {each.name: each for each in _settable(cls)}
    values = {}
    for key, value in table.items():
        if key not in names:
            raise _unknown_key(what, "key", key, names)
        values[key] = _check(value, _hint(cls, key), f"{what}: {key}")
    return _construct(cls, values, what)


def format_spec(instance: Any, name: str = "") -> str:
    """Return the spec that makes `instance`: defaults left out, keys sorted.

    Args:
        instance: A settings dataclass.
        name: Its name; from its class if not given.
    """
    cls = type(instance)
    params = {}
    for each in sorted(_settable(cls), key=lambda each: each.name):
        value = getattr(instance, each.name)
        if _is_required(each) or not _same(value, _default(each)):
            params[each.name] = format_value(value, _hint(cls, each.name))
    return str(Spec(name or name_of(cls), params))


def name_of(cls: type) -> str:
    """Return the name of a method or task class.

    A file of the tree is its name (`token_recycling.py` is `token-recycling`). Elsewhere it is the
    class attribute `name`, else the class's own name in kebab case.
    """
    if cls.__module__.partition(".")[0] in ("methods", "tasks"):
        return cls.__module__.rpartition(".")[2].replace("_", "-")
    named = inspect.getattr_static(cls, "name", None)
    if isinstance(named, str) and named and "name" not in {each.name for each in fields(cls)}:
        return named
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()


def describe(annotation: Any) -> str:
    """Return a type as people write it: `int or auto`, `list of int`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {describe(arguments[0])}"
        return f"[{', '.join(describe(member) for member in arguments)}]"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(str(member.value) for member in annotation)
    words = {str: "text", bool: "true or false", float: "number", Path: "path", type(None): "none"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def format_value(value: Any, annotation: Any) -> str:
    """Return the text that `build` reads back as `value`.

    Raises:
        TypeError: The value has no form as text.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{','.join(map(format_value, value, _members(annotation, len(value))))}]"
    if isinstance(value, (str, Path)):
        text = str(value)
        # Quotes are for texts that would split a spec or read as something else.
        if re.fullmatch(r"[\w./@-]+( [\w./@-]+)*", text):
            try:
                if _same(_convert(text, annotation, ""), value):
                    return text
            except UsageError:
                pass
        return json.dumps(text, ensure_ascii=False)
    raise TypeError(f"{value!r} has no form as text.")


def _members(annotation: Any, length: int) -> tuple[Any, ...]:
    """Return the types of a tuple's members."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        tuples = [a for a in typing.get_args(annotation) if typing.get_origin(a) is tuple]
        annotation = tuples[0] if tuples else annotation
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is not tuple:
        return (str,) * length
    return (arguments[0],) * length if arguments[-1] is Ellipsis else arguments


def _settable(cls: type) -> list[Field[Any]]:
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is no dataclass, so it has no settings.")
    return [each for each in fields(cls) if each.init]


def _is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _same(one: Any, other: Any) -> bool:
    # 1 and 1.0 are one setting, 1 and true are not.
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _hint(cls: type, name: str) -> Any:
    """Return a field's type."""
    return _evaluated(cast(Hashable, cls), name)


@cache
def _evaluated(cls: Any, name: str) -> Any:
    """Evaluate one annotation and no other, in the module that wrote it."""
    owner = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
    bearer = types.SimpleNamespace(__annotations__={name: vars(owner)["__annotations__"][name]})
    return typing.get_type_hints(bearer, vars(sys.modules[owner.__module__]))[name]


def _construct(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    missing = [e.name for e in _settable(cls) if _is_required(e) and e.name not in values]
    if missing:
        raise UsageError(f"{what} needs {', '.join(repr(name) for name in missing)}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from error


def _unknown_key(what: str, kind: str, key: str, names: Iterable[str]) -> UsageError:
    listed = sorted(names)
    near = nearest(key, listed)
    hint = f"Did you mean {near!r}? " if near else ""
    has = f"It has: {', '.join(listed)}." if listed else f"It has no {kind}."
    return UsageError(f"{what} has no {kind} {key!r}. {hint}{has}")


def _wrong(where: str, annotation: Any, text: object, hint: str = "") -> UsageError:
    return UsageError(f"{where} must be {describe(annotation)}, got {text!r}.{hint}")


def _unquote(text: str, where: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: {text} is no quoted text ({error.msg}).") from error


def _convert(text: str, annotation: Any, where: str) -> Any:
    """Read text as a value of a type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        # Text fits everything, so it is tried last; `none` and fixed values come first.
        order = sorted(arguments, key=lambda a: (a in (str, Path), a is float))
        for member in order:
            try:
                return _convert(text, member, where)
            except UsageError:
                continue
        allowed = [
            str(v) for a in arguments if typing.get_origin(a) is Literal for v in typing.get_args(a)
        ]
        raise _wrong(where, annotation, text, _near_hint(text, allowed))
    if origin is Literal:
        return _pick(text, {format_literal(value): value for value in arguments}, annotation, where)
    if origin is tuple:
        return _convert_tuple(text, arguments, annotation, where)
    if annotation is type(None):
        if text == "none":
            return None
        raise _wrong(where, annotation, text)
    if annotation is bool:
        if text.lower() not in _TRUE:
            raise _wrong(where, annotation, text)
        return _TRUE[text.lower()]
    if annotation in (int, float):
        try:
            number = annotation(text)
        except ValueError:
            raise _wrong(where, annotation, text) from None
        if math.isnan(number):
            raise _wrong(where, annotation, text)
        return number
    if annotation in (str, Path):
        return annotation(_unquote(text, where))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _pick(text, {str(m.value): m for m in annotation}, annotation, where)
    raise UsageError(f"{where} cannot be set as text; it is a {describe(annotation)}.")


def format_literal(value: Any) -> str:
    """Return a member of a `Literal` as it is written on the command line."""
    return "true" if value is True else "false" if value is False else str(value)


def _pick(text: str, values: Mapping[str, Any], annotation: Any, where: str) -> Any:
    wanted = _unquote(text, where)
    if wanted not in values:
        raise _wrong(where, annotation, text, _near_hint(wanted, values))
    return values[wanted]


def _near_hint(text: str, allowed: Iterable[str]) -> str:
    near = nearest(text, allowed)
    return f" Did you mean {near!r}?" if near else ""


def _convert_tuple(text: str, arguments: tuple[Any, ...], annotation: Any, where: str) -> Any:
    inside = text[1:-1] if text[:1] in _BRACKETS and text[-1:] == _BRACKETS[text[0]] else text
    if inside is text and "," in text:
        raise _wrong(where, annotation, text, " Write a list in brackets: [1,2].")
    parts = [part.strip() for part in _split(inside, text)]
    if arguments[-1] is not Ellipsis and len(parts) != len(arguments):
        raise _wrong(where, annotation, text, f" It takes {len(arguments)} values.")
    members = (arguments[0],) * len(parts) if arguments[-1] is Ellipsis else arguments
    return tuple(_convert(part, member, where) for part, member in zip(parts, members, strict=True))


def _check(value: Any, annotation: Any, where: str) -> Any:
    """Read a TOML value as a value of a type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        for member in arguments:
            try:
                return _check(value, member, where)
            except UsageError:
                continue
        raise _wrong(where, annotation, value)
    if annotation is Any:
        return value
    if origin is Literal:
        if not any(_same(value, allowed) for allowed in arguments):
            hint = _near_hint(value, map(str, arguments)) if isinstance(value, str) else ""
            raise _wrong(where, annotation, value, hint)
        return value
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise _wrong(where, annotation, value, f" It takes {len(arguments)} values.")
        members = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(
            _check(each, member, f"{where}[{at}]")
            for at, (each, member) in enumerate(zip(value, members, strict=True))
        )
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _check(each, arguments[1], f"{where}.{key}") for key, each in value.items()}
    if isinstance(annotation, type) and is_dataclass(annotation) and isinstance(value, dict):
        return from_table(annotation, value, where)
    if annotation is float and type(value) is int:
        return float(value)
    if isinstance(annotation, type) and not origin and type(value) is annotation:
        if isinstance(value, float) and math.isnan(value):
            raise _wrong(where, annotation, "nan")
        return value
    if annotation is Path and isinstance(value, str):
        return Path(value)
    raise _wrong(where, annotation, value)


def _attribute_docs(cls: type) -> dict[str, str]:
    """Return what the `Attributes` sections of a class and its bases say about each name."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE)
        if not section:
            continue
        names: list[str] = []
        for line in inspect.cleandoc("\n" + section[1]).splitlines():
            start = re.match(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (.*)", line)
            if start:
                names = start[1].split(", ")
                docs.update(dict.fromkeys(names, start[2].strip()))
            elif line.startswith(" "):
                docs.update({name: f"{docs[name]} {line.strip()}" for name in names})
    return docs
