from __future__ import annotations

import re
from dataclasses import dataclass, field, make_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import settings
from runner.request import UsageError


class Colour(StrEnum):
    RED = "red"
    DARK_BLUE = "dark-blue"


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Settings of every kind.

    Attributes:
        count: How many,
            counted from one.
        share, ratio: Two names, one sentence.
        mode: What happens.
    """

    not_a_setting: ClassVar[int] = 3
    count: int = 8
    share: float = 0.5
    ratio: float = 1 / 3
    is_exact: bool = True
    mode: Literal["cold", "session", "hot"] = "cold"
    nodes: int | Literal["auto"] = "auto"
    path: Path | None = None
    text: str = ""
    sizes: tuple[int, ...] = (8, 4)
    pair: tuple[int, str] = (1, "a")
    names: tuple[str, ...] = ()
    colour: Colour = Colour.RED
    derived: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}.")


@dataclass(frozen=True, kw_only=True)
class Strict:
    seed: int
    items: dict[str, int] = field(default_factory=dict)


def build(text: str) -> Plain:
    return settings.build(Plain, settings.parse_spec(text).params, "method 'plain'")


def test_a_name_alone_is_a_spec():
    assert settings.parse_spec(" token-recycling ") == settings.Spec("token-recycling", {})


def test_parameters_follow_the_first_colon():
    spec = settings.parse_spec("token-recycling:tree_nodes=32, state=session")
    assert spec == settings.Spec("token-recycling", {"tree_nodes": "32", "state": "session"})


@pytest.mark.parametrize(
    ("text", "name", "params"),
    [
        ("hf:org/model", "hf:org/model", {}),
        ("hf:org/model:dtype=bfloat16", "hf:org/model", {"dtype": "bfloat16"}),
        ("path:/data/a:b:dtype=float32,x=1", "path:/data/a:b", {"dtype": "float32", "x": "1"}),
        ("path:C:/models", "path:C:/models", {}),
    ],
)
def test_ids_of_outside_models_keep_their_colon(text, name, params):
    assert settings.parse_spec(text) == settings.Spec(name, params)


def test_commas_inside_brackets_and_quotes_do_not_split():
    spec = settings.parse_spec('a:x=[1,(2,3)],y="p,q]",z=1')
    assert spec.params == {"x": "[1,(2,3)]", "y": '"p,q]"', "z": "1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no spec"),
        (":a=1", "is no spec"),
        ("hf:", "is no spec"),
        ("name:", "is no spec"),
        ("name:a=1,tree_nodes", "'tree_nodes' in 'name:a=1,tree_nodes' sets nothing"),
        ("path:x:a=1,tree_nodes", "sets nothing"),
        ("name:a=1,,b=2", "sets nothing"),
        ("name:=1", "sets nothing"),
        ("one,two", "several are several options, one for each name"),
        ("name:a=1,a=2", "'a' comes twice"),
        ("name:a=[1,2", "a bracket stays open"),
        ("name:a=1]", "closes nothing"),
        ("name:a=(1]", "closes nothing"),
        ('name:a="x', "a double quote stays open"),
    ],
)
def test_text_that_is_no_spec_is_refused_with_the_reason(text, message):
    with pytest.raises(UsageError) as error:
        settings.parse_spec(text)
    assert message in str(error.value)


def test_values_are_read_by_their_annotation():
    made = build(
        "plain:count=3,share=2,is_exact=off,mode=hot,nodes=12,path=/a/b,text=x y,"
        'sizes=[1,2,3],pair=(4,"b,c"),names=[p,none],colour=dark-blue'
    )
    assert made == Plain(
        count=3,
        share=2.0,
        is_exact=False,
        mode="hot",
        nodes=12,
        path=Path("/a/b"),
        text="x y",
        sizes=(1, 2, 3),
        pair=(4, "b,c"),
        names=("p", "none"),
        colour=Colour.DARK_BLUE,
    )
    assert isinstance(made.share, float)
    assert build("plain:nodes=auto").nodes == "auto"
    assert build("plain:path=none").path is None
    assert build('plain:path="none"').path == Path("none")
    assert build("plain:sizes=7").sizes == (7,)
    assert build("plain:sizes=[]").sizes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("counts=3", "has no parameter 'counts'. Did you mean 'count'? It has: colour, count,"),
        ("derived=3", "has no parameter 'derived'"),
        ("not_a_setting=3", "has no parameter 'not_a_setting'"),
        ("count=three", "method 'plain': count must be int, got 'three'."),
        ("count=1.5", "count must be int"),
        ("count=0", "method 'plain': count must be at least 1, got 0."),
        ("share=much", "share must be number, got 'much'"),
        ("share=nan", "share must be number, got 'nan'"),
        ("is_exact=maybe", "is_exact must be true or false, got 'maybe'"),
        (
            "mode=sesion",
            "mode must be cold or session or hot, got 'sesion'. Did you mean 'session'?",
        ),
        ("nodes=atuo", "nodes must be int or auto, got 'atuo'. Did you mean 'auto'?"),
        ("nodes=1.5", "nodes must be int or auto"),
        ("sizes=1,2", "sets nothing"),
        ("sizes=[1,x]", "sizes must be int, got 'x'"),
        ("pair=[1]", "It takes 2 values"),
        ("colour=blue", "colour must be red or dark-blue, got 'blue'. Did you mean 'dark-blue'?"),
        (r'text="\x"', "is no quoted text"),
    ],
)
def test_a_wrong_value_names_parameter_allowed_values_and_nearest(text, message):
    with pytest.raises(UsageError) as error:
        build(f"plain:{text}")
    assert message in str(error.value)


def test_a_missing_value_is_named():
    with pytest.raises(UsageError, match="method 'strict' needs 'seed'"):
        settings.build(Strict, {}, "method 'strict'")


def test_a_type_without_text_form_is_refused():
    with pytest.raises(UsageError, match="items cannot be set as text"):
        settings.build(Strict, {"seed": "1", "items": "x"}, "method 'strict'")


def test_defaults_are_left_out_and_keys_sorted():
    assert settings.format_spec(Plain(), "plain") == "plain"
    assert settings.format_spec(Plain(share=0.5, count=8.0), "plain") == "plain"  # type: ignore[arg-type]  # 8.0 is what a TOML file may hold
    assert settings.format_spec(Plain(mode="hot", count=2), "plain") == "plain:count=2,mode=hot"


def test_text_that_reads_as_something_else_is_quoted():
    assert settings.format_spec(Plain(path=Path("none")), "p") == 'p:path="none"'
    assert settings.format_spec(Plain(names=("a,b", "")), "p") == 'p:names=["a,b",""]'


_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    st.builds(
        Plain,
        count=st.integers(1, 10**9),
        share=st.floats(allow_nan=False),
        ratio=st.floats(allow_nan=False),
        is_exact=st.booleans(),
        mode=st.sampled_from(["cold", "session", "hot"]),
        nodes=st.integers() | st.just("auto"),
        path=st.none()
        | st.builds(
            Path,
            st.sampled_from(["a", "none", "/x y", "a,b=c", '"']),
        ),
        text=_texts | st.sampled_from(["none", "true", "1", " ", "=", ":", "[", "\\", "a+b", '"']),
        sizes=st.lists(st.integers(), max_size=4).map(tuple),
        pair=st.tuples(st.integers(), _texts),
        names=st.lists(_texts, max_size=4).map(tuple),
        colour=st.sampled_from(Colour),
    )
)
def test_every_instance_survives_its_own_spec(made):
    text = settings.format_spec(made, "plain")
    assert build(text) == made
    assert settings.format_spec(build(text), "plain") == text
    assert str(settings.parse_spec(text)) == text
    # Whatever stands in its values, it can be a part of a stack.
    assert settings.parse_method(f"{text}+{text}").parts == (settings.parse_spec(text),) * 2


@pytest.mark.parametrize(
    ("text", "name", "params"),
    [
        ("a", "a", [{}]),
        ("a + b:x=1", "a+b", [{}, {"x": "1"}]),
        ("a:x=1e+3,y=+2+b", "a+b", [{"x": "1e+3", "y": "+2"}, {}]),
        ('a:x="p+q"+b', "a+b", [{"x": '"p+q"'}, {}]),
        ("a:x=[p+q]+b", "a+b", [{"x": "[p+q]"}, {}]),
    ],
)
def test_a_plus_with_a_name_behind_it_joins_methods(text, name, params):
    asked = settings.parse_method(text)
    assert asked.name == name
    assert [part.params for part in asked.parts] == params
    assert asked.is_bare == (not any(params))


@given(_texts | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False))
def test_a_union_with_text_keeps_the_type_of_its_value(value):
    cls = make_dataclass("Loose", [("value", int | bool | float | str | None, "x")], frozen=True)
    made = settings.build(
        cls, settings.parse_spec(settings.format_spec(cls(value), "l")).params, "l"
    )
    assert made.value == value
    assert isinstance(made.value, str) == isinstance(value, str)


@given(st.text(max_size=30))
def test_any_text_is_a_spec_or_a_usage_error(text):
    try:
        spec = settings.parse_spec(text)
    except UsageError:
        return
    assert spec.name
    assert settings.parse_spec(str(spec)) == spec


def test_parameters_carry_type_default_and_doc():
    found = {each.name: each for each in settings.parameters(Plain)}
    assert "derived" not in found
    assert found["count"] == settings.Parameter("count", "int", "8", "How many, counted from one.")
    assert found["share"].doc == found["ratio"].doc == "Two names, one sentence."
    assert found["sizes"].type == "list of int"
    assert found["sizes"].default == "[8,4]"
    assert found["pair"].type == "[int, text]"
    assert found["path"].default == "none"
    assert settings.parameters(Strict)[0].default == "required"


@dataclass(frozen=True, kw_only=True)
class Table:
    name: str
    value: float = 0.0
    choice: Literal["a", "b"] = "a"
    parts: tuple[Strict, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    maybe: int | None = None
    anything: Any = None


def test_a_table_becomes_nested_dataclasses():
    made = settings.from_table(
        Table,
        {"name": "n", "value": 1, "parts": [{"seed": 2}], "limits": {"x": 3}, "maybe": 4},
        "suite 's'",
    )
    assert made == Table(name="n", value=1.0, parts=(Strict(seed=2),), limits={"x": 3}, maybe=4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"nmae": "n"}, "suite 's' has no key 'nmae'. Did you mean 'name'?"),
        ({}, "suite 's' needs 'name'"),
        ({"name": 3}, "suite 's': name must be text, got 3"),
        ({"name": "n", "value": "1"}, "value must be number"),
        ({"name": "n", "value": True}, "value must be number"),
        ({"name": "n", "value": float("nan")}, "value must be number"),
        ({"name": "n", "choice": "c"}, "choice must be a or b, got 'c'"),
        ({"name": "n", "parts": [{"sede": 1}]}, "parts[0] has no key 'sede'. Did you mean 'seed'?"),
        ({"name": "n", "parts": {"seed": 1}}, "parts must be list of Strict"),
        ({"name": "n", "limits": {"x": "3"}}, "limits.x must be int"),
        ({"name": "n", "maybe": "3"}, "maybe must be int or none"),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(table, message):
    with pytest.raises(UsageError) as error:
        settings.from_table(Table, table, "suite 's'")
    assert message in str(error.value)


def test_the_nearest_name_ignores_case_and_separators():
    assert settings.nearest("Token_Recycling", ["token-recycling", "prompt-lookup"]) == (
        "token-recycling"
    )
    assert settings.nearest("zzz", ["token-recycling"]) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Sleeper", "sleeper"), ("MyPruner", "my-pruner"), ("HFGenerate", "hf-generate")],
)
def test_a_class_outside_the_tree_is_named_in_kebab_case(name, expected):
    assert settings.name_of(make_dataclass(name, [])) == expected


def test_a_class_attribute_names_a_class_outside_the_tree_but_a_field_does_not():
    assert settings.name_of(make_dataclass("A", [], namespace={"name": "own-name"})) == "own-name"
    assert settings.name_of(make_dataclass("A", [("name", str, "x")])) == "a"


def test_a_file_of_the_tree_names_its_class():
    made = make_dataclass("Whatever", [])
    made.__module__ = "methods.decoding.token_recycling"
    assert settings.name_of(made) == "token-recycling"


# --- a value without a name ---


@dataclass(frozen=True, kw_only=True)
class Named:
    unnamed: ClassVar[str] = "task"
    task: str = ""
    number: int = 0


def test_a_first_value_without_a_name_sets_what_the_class_says():
    spec = settings.parse_spec("lm-eval:gsm8k,number=3")
    assert str(spec) == "lm-eval:gsm8k,number=3"
    built = settings.build(Named, spec.params, "task 'lm-eval'")
    assert built == Named(task="gsm8k", number=3)
    assert settings.format_spec(built, "lm-eval") == "lm-eval:number=3,task=gsm8k"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("named:gsm8k,task=arc", "'task' comes twice"),
        ("plain:32", "task 'plain': '32' sets nothing: write key=value."),
    ],
)
def test_a_value_without_a_name_is_refused_where_it_sets_nothing_or_twice(text, message):
    spec = settings.parse_spec(text)
    cls = {"named": Named, "plain": Plain}[spec.name]
    with pytest.raises(UsageError, match=re.escape(message)):
        settings.build(cls, spec.params, f"task {spec.name!r}")
