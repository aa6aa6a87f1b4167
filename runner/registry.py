"""What there is: methods, tasks, models, hardware profiles and suites, found by looking at files.

Saving a file registers it; no list repeats its name. Listing reads file names, first lines and TOML
and imports nothing; asking for one method or task imports its module. Packages outside the tree
join through the entry point groups `tokenmark.methods` and `tokenmark.tasks`, single files through
`--plugin`. Needs no torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from methods.base import Method
from methods.cards import Card, CardError, load_card, load_paper
from runner.request import UsageError
from runner.settings import name_of, unknown
from tasks.base import Task

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ROOT = Path(__file__).resolve().parent.parent

Kind = Literal["method", "task", "model", "hardware", "suite"]
KINDS: tuple[Kind, ...] = ("method", "task", "model", "hardware", "suite")
ENTRY_POINT_GROUPS: Mapping[str, str] = {"method": "tokenmark.methods", "task": "tokenmark.tasks"}

Thing = TypeVar("Thing", Method[Any], Task[Any])


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that exists, as far as its files say without being imported.

    Attributes:
        kind: What it is.
        name: What it is called everywhere: the file's name with `-` for `_`.
        title: One line for people.
        family: Folder of a method.
        status: `planned` for a method that has a card and no code yet, else `ready`.
        source: File with the code or, for data, the data; None for an entry point.
        card: The `.toml` beside a method; None if it has none.
        origin: `tree`, or the plug-in file or package that it comes from.
    """

    kind: Kind
    name: str
    title: str = ""
    family: str = ""
    status: Literal["ready", "planned"] = "ready"
    source: Path | None = None
    card: Path | None = None
    origin: str = "tree"

    def data(self) -> dict[str, Any]:
        """Return the TOML of a model, hardware profile or suite.

        Raises:
            UsageError: It is no TOML.
        """
        assert self.source is not None  # all of these are files
        return read_toml(self.source)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: It cannot be read or is no TOML; says where.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no valid TOML: {error}.") from error


@dataclass(frozen=True)
class Registry:
    """All that can be named on the command line.

    Attributes:
        plugins: Python files that define further methods or tasks; they are executed.
        root: Folder with the rooms.
    """

    plugins: Sequence[Path] = ()
    root: Path = ROOT
    _found: dict[Kind, dict[str, Entry]] = field(default_factory=dict, init=False, repr=False)
    _loaded: dict[tuple[Kind, str], type] = field(default_factory=dict, init=False, repr=False)

    def entries(self, kind: Kind) -> dict[str, Entry]:
        """Return all entries of a kind by name, sorted; the files are looked at once.

        Raises:
            UsageError: Two things have the same name, or a plug-in cannot be loaded.
        """
        if kind in self._found:
            return self._found[kind]
        found: dict[str, Entry] = {}
        for entry in self._scan(kind):
            if entry.name in found:
                first, second = found[entry.name], entry
                raise UsageError(
                    f"two {kind}s are named {entry.name!r}: {first.source or first.origin} and "
                    f"{second.source or second.origin}. Rename one."
                )
            found[entry.name] = entry
        self._found[kind] = dict(sorted(found.items()))
        return self._found[kind]

    def find(self, kind: Kind, name: str) -> Entry:
        """Return the entry of that name.

        Raises:
            UsageError: There is none; names the nearest.
        """
        entries = self.entries(kind)
        if name not in entries:
            listing = "hardware" if kind == "hardware" else f"{kind}s"
            then = f"`python run.py list {listing}` shows all of them."
            if kind in ENTRY_POINT_GROUPS:
                then += self._of_plugins(kind)
            what = "hardware profile" if kind == "hardware" else kind
            raise unknown(what, name, entries, then)
        return entries[name]

    def _of_plugins(self, kind: Kind) -> str:
        """Say what the plug-ins bring, or how one is named."""
        if not self.plugins:
            return f" A {kind} of your own comes with --plugin FILE.py."
        paths = set(map(str, self.plugins))
        names = [name for name, each in self.entries(kind).items() if each.origin in paths]
        return f" The plug-ins bring {', '.join(names) or f'no {kind}'}."

    def load_method(self, name: str) -> type[Method[Any]]:
        """Import one method.

        Raises:
            UsageError: The name is unknown, the method is only planned, or it cannot be imported.
        """
        # Abstract classes are what is looked for, not what is made.
        return self._load("method", name, Method)  # type: ignore[type-abstract]

    def load_task(self, name: str) -> type[Task[Any]]:
        """Import one task.

        Raises:
            UsageError: The name is unknown, or it cannot be imported.
        """
        return self._load("task", name, Task)  # type: ignore[type-abstract]  # as above

    def card(self, name: str) -> Card | None:
        """Return what is written beside a method; None for one without a `.toml`.

        Raises:
            UsageError: There is no such method, or its card is not as it must be.
        """
        path = self.find("method", name).card
        try:
            return None if path is None else load_card(path)
        except CardError as error:
            raise UsageError(str(error)) from error

    def claims(self) -> list[dict[str, Any]]:
        """Return the claims of all cards as rows.

        Each has its `method`, whether that is `ready` or `planned` as `implementation`, and the
        path of its `card`.
        """
        return [
            {
                "method": name,
                "implementation": entry.status,
                "card": self.relative(cast(Path, entry.card)),
                **asdict(claim),
            }
            for name, entry in self.entries("method").items()
            if (card := self.card(name))
            for claim in card.claims
        ]

    def relative(self, path: Path) -> str:
        """Return a path as it is called: from the root where it lies below that."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def _load(self, kind: Kind, name: str, base: type[Thing]) -> type[Thing]:
        if (kind, name) in self._loaded:
            return cast(type[Thing], self._loaded[kind, name])
        entry = self.find(kind, name)
        if entry.status == "planned":
            card = self.relative(cast(Path, entry.card))
            raise UsageError(f"method {name!r} is planned and has no code yet; its card is {card}.")
        if entry.source is None:
            cls = _load_entry_point(self._entry_points[kind][name], base)
        elif entry.origin == "tree":
            parts = entry.source.relative_to(self.root).with_suffix("").parts
            cls = self._class_of_file(".".join(parts), entry, base)
        else:
            cls = dict(self._plugin_classes(entry.source, base))[name]
        self._loaded[kind, name] = cls
        return cls

    def _class_of_file(self, module_name: str, entry: Entry, base: type[Thing]) -> type[Thing]:
        what = f"{entry.kind} {entry.name!r}"
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise _missing_package(what, error, self.root) from error
        classes = list(_classes(module, base))
        if len(classes) != 1:
            names = ", ".join(cls.__name__ for cls in classes) or "none"
            raise UsageError(
                f"{self.relative(cast(Path, entry.source))} must define exactly one "
                f"{base.__name__}, found {names}. Shared code belongs into a common*.py."
            )
        return classes[0]

    # --- scanning ---

    def _scan(self, kind: Kind) -> Iterator[Entry]:
        if kind == "method":
            yield from self._scan_methods()
        elif kind == "task":
            yield from self._scan_tasks()
        elif kind == "model":
            yield from self._scan_toml(kind, self.root / "models" / "embedded", "title")
        elif kind == "hardware":
            yield from self._scan_toml(kind, self.root / "hardware" / "profiles", "label")
        else:
            yield from self._scan_toml(kind, self.root / "suites", "title")
        if kind in ENTRY_POINT_GROUPS:
            for name, point in self._entry_points[kind].items():
                package = point.dist.name if point.dist else point.value
                yield Entry(kind=kind, name=name, title=point.value, origin=package)
            for path in self.plugins:
                classes = (
                    self._plugin_classes(path, Method)  # type: ignore[type-abstract]  # as above
                    if kind == "method"
                    else self._plugin_classes(path, Task)  # type: ignore[type-abstract]  # as above
                )
                for name, cls in classes:
                    card = path.with_suffix(".toml")
                    yield Entry(
                        kind=kind,
                        name=name,
                        title=_first_line(inspect.getdoc(cls) or ""),
                        family=_family(cls),
                        source=path,
                        card=card if kind == "method" and card.is_file() else None,
                        origin=str(path),
                    )

    def _scan_methods(self) -> Iterator[Entry]:
        for folder in sorted((self.root / "methods").glob("*/")):
            stems = {path.stem for path in folder.iterdir() if path.suffix in (".py", ".toml")}
            for stem in sorted(stems):
                if _is_shared(stem):
                    continue
                source, card = folder / f"{stem}.py", folder / f"{stem}.toml"
                is_ready = source.is_file()
                yield Entry(
                    kind="method",
                    name=stem.replace("_", "-"),
                    title=_docstring_line(source) if is_ready else _planned_title(card),
                    family=folder.name,
                    status="ready" if is_ready else "planned",
                    source=source if is_ready else None,
                    card=card if card.is_file() else None,
                )

    def _scan_tasks(self) -> Iterator[Entry]:
        trees = {path: _parse(path) for path in sorted((self.root / "tasks").glob("*.py"))}
        classes = {
            node.name: node
            for tree in trees.values()
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }
        for path, tree in trees.items():
            names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
            if not _is_shared(path.stem) and any(_is_task(name, classes) for name in names):
                title = _first_line(ast.get_docstring(tree) or "")
                yield Entry(kind="task", name=path.stem.replace("_", "-"), title=title, source=path)

    def _scan_toml(self, kind: Kind, folder: Path, title: str) -> Iterator[Entry]:
        for path in sorted(folder.rglob("*.toml")):
            name = path.relative_to(folder).with_suffix("").as_posix().replace("_", "-")
            yield Entry(
                kind=kind, name=name, title=str(read_toml(path).get(title, "")), source=path
            )

    @cached_property
    def _entry_points(self) -> dict[str, dict[str, EntryPoint]]:
        # Reading the metadata of every package costs more than all other listing, and few have
        # anything for us; a look at the plain files tells.
        files = (f for folder in sys.path for f in Path(folder).glob("*-info/entry_points.txt"))
        if not any(b"tokenmark." in file.read_bytes() for file in files):
            return {kind: {} for kind in ENTRY_POINT_GROUPS}
        from importlib.metadata import entry_points

        return {
            kind: {point.name: point for point in entry_points(group=group)}
            for kind, group in ENTRY_POINT_GROUPS.items()
        }

    def _plugin_classes(self, path: Path, base: type[Thing]) -> Iterator[tuple[str, type[Thing]]]:
        for cls in _classes(_load_plugin(path), base):
            yield name_of(cls), cls


def _is_shared(stem: str) -> bool:
    return stem.startswith(("_", "common")) or stem == "base"


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise UsageError(f"{path}, line {error.lineno}: {error.msg}.") from error


def _is_task(name: str, classes: Mapping[str, ast.ClassDef]) -> bool:
    """Return whether a class is a task that can be made, as far as its source says."""
    return "Task" in _lineage(name, classes)[1:] and not _abstract(name, classes)


def _lineage(name: str, classes: Mapping[str, ast.ClassDef]) -> list[str]:
    """Return a class and what it is built on, in the order in which names are looked up."""
    bases = _bases(classes[name]) if name in classes else []
    found = [name, *(each for base in bases for each in _lineage(base, classes))]
    # A base of several comes behind them all.
    return [*dict.fromkeys(reversed(found))][::-1]


def _abstract(name: str, classes: Mapping[str, ast.ClassDef]) -> set[str]:
    """Return the names that a class and its bases declare abstract and nobody defines."""
    missing: set[str] = set()
    # From the furthest base on: what is nearer has the last word.
    for each in reversed(_lineage(name, classes)):
        for node in classes[each].body if each in classes else ():
            if isinstance(node, ast.FunctionDef):
                marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
                (missing.add if "abstractmethod" in marks else missing.discard)(node.name)
            elif isinstance(node, ast.Assign):
                missing -= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                missing.discard(node.target.id)
    return missing


def _bases(node: ast.ClassDef) -> list[str]:
    """Return `["Task"]` for the bases `Task`, `Task[…]` and `tasks.base.Task[…]`."""
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return [ast.unparse(base).rpartition(".")[2] for base in bases]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _docstring_line(path: Path) -> str:
    """Return the first line of a module's docstring, without parsing the module."""
    with path.open(encoding="utf-8") as file:
        head = file.read(1000)
    found = re.match(r'\s*(?:#.*\n\s*)*[rR]?"""(.*?)(?:"""|\n|$)', head)
    return found[1].strip() if found else ""


def _planned_title(card: Path) -> str:
    try:
        return load_paper(card).title
    except CardError as error:
        raise UsageError(str(error)) from error


def _classes(module: ModuleType, base: type[Thing]) -> Iterator[type[Thing]]:
    """Yield the concrete, public subclasses of `base` that a module itself defines."""
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, base)
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
            and not inspect.isabstract(value)
        ):
            yield value


def _load_plugin(path: Path) -> ModuleType:
    """Execute a plug-in file, once.

    Raises:
        UsageError: It is missing, no Python file, or fails.
    """
    path = path.resolve()
    if path.suffix != ".py" or not path.is_file():
        reason = "there is no such file" if not path.is_file() else "a plug-in is a .py file"
        raise UsageError(f"plug-in {path} cannot be loaded: {reason}.")
    # Two plug-ins may share a file name, hence the path's digest; a dataclass needs its module.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"tokenmark_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None  # a .py file always has one
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # Whatever a stranger's file raises is the file's fault, and the user must see which.
        del sys.modules[name]
        raise UsageError(
            f"plug-in {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return module


def _family(cls: type) -> str:
    """Return the family of the class that a stranger's method derives from; "" for none."""
    modules = (base.__module__.split(".") for base in cls.__mro__)
    return next((parts[1] for parts in modules if parts[0] == "methods" and parts[2:]), "")


def _load_entry_point(point: EntryPoint, base: type[Thing]) -> type[Thing]:
    package = point.dist.name if point.dist else point.value
    try:
        cls = point.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{point.name!r} of package {package} cannot be loaded: {error}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UsageError(f"{point.name!r} of package {package} is no {base.__name__}.")
    return cls


def _missing_package(what: str, error: ModuleNotFoundError, root: Path) -> Exception:
    """Return the error that names the extra to install, or the import's own if it is our fault."""
    missing = (error.name or "").partition(".")[0].replace("_", "-").lower()
    extras = read_toml(root / "pyproject.toml")["project"]["optional-dependencies"]
    for extra, requirements in extras.items():
        names = {
            re.split(r"[^\w.-]", each, maxsplit=1)[0].replace("_", "-") for each in requirements
        }
        if missing in names:
            return UsageError(
                f"{what} needs the extra {extra!r}, which is not installed: "
                f"pip install -e '.[{extra}]' -c constraints.txt"
            )
    return error
