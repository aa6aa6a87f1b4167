from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from methods.base import Method
from runner import registry as module
from runner.describe import describe
from runner.registry import KINDS, ROOT, Registry
from runner.request import UsageError
from runner.settings import name_of
from tasks.base import Task

CARD = """
[paper]
title = "A paper"
arxiv = "2408.08696"
year = 2024

[[claim]]
id = "A-1"
metric = "speed-up"
value = "2x"
number = 2
bound = "exact"
unit = "x"
where = "abstract"
"""

TASK_BASE = """
class Task(ABC, Generic[T]):
    @property
    @abc.abstractmethod
    def metrics(self): ...
    @abstractmethod
    def items(self): ...
    def aggregate(self): ...
"""

PLUGIN = '''
"""A plug-in."""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from methods.base import Method, Output


@dataclass(frozen=True, kw_only=True)
class Slow(Method):
    """Does nothing."""

    size: int = 3
    output = Output.IDENTICAL
    capability = "TextGenerator"

    @contextmanager
    def apply(self, model, hardware):
        yield model


class HFLike(Slow):
    """Named by its class."""


class Named(Slow):
    """Named by itself."""

    name: ClassVar[str] = "my-own-name"


class _Helper(Slow):
    """Private."""
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a tree with two families, planned methods, shared modules, and tasks."""
    files = {
        "methods/base.py": '"""Not a method."""',
        "methods/decoding/__init__.py": "",
        "methods/decoding/common.py": '"""Shared."""',
        "methods/decoding/common_trees.py": '"""Shared."""',
        "methods/decoding/_private.py": '"""Shared."""',
        "methods/decoding/fast_one.py": '# A comment.\n"""Fast: one line.\n\nMore."""\n',
        "methods/decoding/fast_one.toml": CARD,
        "methods/decoding/no_card.py": "x = 1\n",
        "methods/pruning/later.toml": '[paper]\ntitle = "To come"\n',
        "tasks/base.py": TASK_BASE,
        "tasks/common_code.py": "class Shared(Task): items = metrics = 1\n",
        "tasks/code_scoring.py": "class Code(Task[int]):\n  def items(self): ...\n",
        "tasks/direct.py": '"""Direct."""\nclass A(tasks.base.Task[int]): items = metrics = 1\n',
        "tasks/built_on_it.py": "from tasks.direct import A\nclass B(A): ...\n",
        "tasks/code_task.py": "class C(Code):\n  metrics: int = 3\n",
        "tasks/mixed.py": "class Files: metrics = 1\nclass D(Files, Code): ...\n",
        "tasks/hidden.py": "class E(Code, Files): ...\n",
        "tasks/scorer.py": "class Scorer(dict): ...\n",
        "tasks/sandbox/sandbox.py": "class Inner(Task): items = metrics = 1\n",
        "models/embedded/tiny_lm.toml": 'title = "Tiny"\n',
        "hardware/profiles/h100-sxm.toml": 'label = "H100"\n',
        "suites/paper/fast_one.toml": 'title = "Claims of Fast"\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def write_plugin(folder: Path, text: str = PLUGIN, name: str = "plugin.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_method_is_a_file_that_is_neither_shared_nor_private(tree):
    entries = Registry(root=tree).entries("method")
    assert list(entries) == ["fast-one", "later", "no-card"]
    assert entries["fast-one"].title == "Fast: one line."
    assert entries["fast-one"].family == "decoding"
    assert entries["fast-one"].status == "ready"
    assert entries["no-card"].card is None


def test_a_card_without_code_is_planned(tree):
    registry = Registry(root=tree)
    entry = registry.find("method", "later")
    assert (entry.status, entry.title, entry.source) == ("planned", "To come", None)
    with pytest.raises(UsageError, match=r"'later' is planned .* methods/pruning/later\.toml"):
        registry.load_method("later")


def test_a_task_is_a_module_with_a_complete_task_built_on_task_directly_or_not(tree):
    entries = Registry(root=tree).entries("task")
    # What a class has beside Task counts if names are looked up there first, as in `mixed`; what
    # `hidden` has is looked up only behind Task, where it is still abstract.
    assert list(entries) == ["built-on-it", "code-task", "direct", "mixed"]
    assert entries["direct"].title == "Direct."


def test_data_files_are_named_by_their_place(tree):
    registry = Registry(root=tree)
    assert registry.find("model", "tiny-lm").title == "Tiny"
    assert registry.find("hardware", "h100-sxm").title == "H100"
    assert registry.find("suite", "paper/fast-one").title == "Claims of Fast"


def test_two_files_with_one_name_are_refused(tree):
    (tree / "methods/pruning/fast_one.py").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"two methods are named 'fast-one': .*Rename one"):
        Registry(root=tree).entries("method")


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_name_points_to_the_list(kind, tree):
    what = "hardware profile" if kind == "hardware" else kind
    with pytest.raises(UsageError, match=rf"no {what} named 'qqqq'\. `python run\.py list"):
        Registry(root=tree).find(kind, "qqqq")


def test_an_unknown_name_brings_the_nearest(tree):
    with pytest.raises(UsageError, match=r"named 'fastone'\. Did you mean 'fast-one'\?"):
        Registry(root=tree).find("method", "fastone")


def test_broken_files_are_usage_errors_with_their_place(tree):
    (tree / "tasks/broken.py").write_text("def f(:\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"broken\.py, line 1: invalid syntax"):
        Registry(root=tree).entries("task")
    (tree / "suites/broken.toml").write_text("title = \n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"broken\.toml is no valid TOML: .*line 1"):
        Registry(root=tree).entries("suite")


def test_a_card_is_read_into_paper_and_claims(tree):
    registry = Registry(root=tree)
    card = registry.card("fast-one")
    assert card is not None
    assert card.paper.arxiv == "2408.08696"
    assert card.claims[0].number == 2.0
    assert registry.card("no-card") is None
    assert [(row["method"], row["id"]) for row in registry.claims()] == [("fast-one", "A-1")]


def test_a_wrong_card_is_a_usage_error(tree):
    path = tree / "methods/decoding/fast_one.toml"
    path.write_text(CARD.replace("where", "wher"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"fast_one\.toml.*no key named 'wher'.*'where'"):
        Registry(root=tree).card("fast-one")
    (tree / "methods/pruning/later.toml").write_text("[paper]\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"later\.toml.*'title' is missing"):
        Registry(root=tree).entries("method")


def test_a_plugin_may_define_several_methods(tmp_path):
    registry = Registry(plugins=(write_plugin(tmp_path),))
    added = [e for e in registry.entries("method").values() if e.origin != "tree"]
    assert [each.name for each in added] == ["hf-like", "my-own-name", "slow"]
    assert added[0].title == "Named by its class."
    for each in added:
        cls = registry.load_method(each.name)
        assert issubclass(cls, Method)
        assert name_of(cls) == each.name
        assert cls is registry.load_method(each.name)


def test_a_name_that_is_not_there_says_what_plugins_bring_or_that_they_exist(tmp_path):
    with pytest.raises(UsageError, match=r"your own comes with --plugin FILE\.py\.$") as error:
        Registry().find("method", "my-idea-of-it")
    assert "Did you mean" not in str(error.value)  # nothing is near
    with pytest.raises(UsageError, match="The plug-ins bring hf-like, my-own-name, slow"):
        Registry(plugins=(write_plugin(tmp_path),)).find("method", "quick")
    with pytest.raises(UsageError, match="The plug-ins bring no task"):
        Registry(plugins=(write_plugin(tmp_path),)).find("task", "quick")
    with pytest.raises(UsageError) as error:
        Registry().find("model", "quick")
    assert "plug" not in str(error.value)


def test_a_card_beside_a_plugin_is_its_methods_and_its_class_tells_the_family(tmp_path):
    path = write_plugin(tmp_path)
    drafting = (
        "from methods.decoding.prompt_lookup import PromptLookup\nclass Mine(PromptLookup): ..."
    )
    other = write_plugin(tmp_path, drafting, "mine.py")
    other.with_suffix(".toml").write_text('[paper]\ntitle = "Mine"\nkind = "unpublished"\n')
    registry = Registry(plugins=(path, other))
    assert registry.card("mine").paper.title == "Mine"
    assert registry.find("method", "mine").family == "decoding"
    facts = {row["key"]: row["value"] for row in describe(registry, "method", "mine")[0].rows}
    assert facts["card"] == str(other.with_suffix(".toml"))
    assert registry.card("slow") is None
    assert registry.find("method", "slow").family == ""


def test_two_plugins_may_share_a_file_name(tmp_path):
    (tmp_path / "other").mkdir()
    one = write_plugin(tmp_path)
    other = write_plugin(tmp_path / "other", PLUGIN.replace("my-own-name", "other-name"))
    with pytest.raises(UsageError, match="two methods are named 'slow'"):
        Registry(plugins=(one, other)).entries("method")
    assert "other-name" in Registry(plugins=(other,)).entries("method")
    assert "other-name" not in Registry(plugins=(one,)).entries("method")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise OSError('no luck')", "OSError: no luck"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_plugin_that_fails_is_named_with_its_error(tmp_path, text, message):
    registry = Registry(plugins=(write_plugin(tmp_path, text),))
    with pytest.raises(UsageError) as error:
        registry.entries("method")
    assert "plugin.py cannot be loaded" in str(error.value)
    assert message in str(error.value)


def test_a_plugin_must_be_a_python_file_that_exists(tmp_path):
    with pytest.raises(UsageError, match="there is no such file"):
        Registry(plugins=(tmp_path / "none.py",)).entries("method")
    with pytest.raises(UsageError, match=r"a plug-in is a \.py file"):
        Registry(plugins=(write_plugin(tmp_path, name="plugin.txt"),)).entries("task")


def test_other_packages_join_through_entry_points(tmp_path, monkeypatch):
    write_plugin(tmp_path, name="a_package_of_methods.py")
    info = tmp_path / "a_package_of_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tokenmark.methods]\n"
        "from-package = a_package_of_methods:Slow\n"
        "broken = a_package_of_methods:NotThere\n"
        "no-method = json:dumps\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    assert registry.find("method", "from-package").origin == "a-package"
    assert registry.load_method("from-package").__name__ == "Slow"
    assert "from-package" not in registry.entries("task")
    with pytest.raises(UsageError, match="'broken' of package a-package cannot be loaded"):
        registry.load_method("broken")
    with pytest.raises(UsageError, match="'no-method' of package a-package is no Method"):
        registry.load_method("no-method")


def test_a_missing_package_names_the_extra_to_install():
    error = ModuleNotFoundError("No module named 'ray'", name="ray.data")
    found = module._missing_package("task 'sts'", error, ROOT)
    assert str(found) == (
        "task 'sts' needs the extra 'cluster', which is not installed: "
        "pip install -e '.[cluster]' -c constraints.txt"
    )
    ours = ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    assert module._missing_package("task 'sts'", ours, ROOT) is ours


# --- the tree itself ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_has_every_kind_and_each_says_what_it_is(kind):
    entries = Registry().entries(kind)
    assert entries
    assert all(entry.title for entry in entries.values())


@pytest.mark.parametrize("name", [n for n, e in Registry().entries("method").items() if e.source])
def test_every_method_loads_and_keeps_its_name(name):
    cls = Registry().load_method(name)
    assert issubclass(cls, Method)
    assert name_of(cls) == name


@pytest.mark.parametrize("name", Registry().entries("task"))
def test_every_task_loads_and_keeps_its_name(name):
    cls = Registry().load_task(name)
    assert issubclass(cls, Task)
    assert name_of(cls) == name


@pytest.mark.parametrize("name", Registry().entries("method"))
def test_every_card_can_be_read(name):
    card = Registry().card(name)
    assert card is not None
    assert card.paper.title


def test_listing_imports_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from runner.registry import KINDS, Registry\n"
        "for kind in KINDS: Registry().entries(kind)\n"
        "heavy = {'torch', 'transformers', 'duckdb', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
