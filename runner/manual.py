"""Pages of the manual that the code writes: one a command, one of the decisions, linked sources."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
_TEXT_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_LANGUAGES = {".toml": "toml", ".py": "python", ".yml": "yaml", ".c": "c", ".json": "json"}


def command_pages(commands: Mapping[str, Any], program: str) -> dict[str, str]:
    """Return a Markdown page for each command that is not hidden, by name.

    Args:
        commands: Of the command line, as Typer makes them.
        program: What stands in front of a command, `python run.py`.
    """
    return {
        name: _command_page(command, f"{program} {name}")
        for name, command in commands.items()
        if not command.hidden
    }


def _command_page(command: Any, call: str) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join([call, *map(_argument, arguments), *(["[OPTION]…"] if options else [])])
    lines = [f"# {command.name}", "", command.help or "", "", "```text", usage, "```", ""]
    if arguments:
        lines += ["| argument | |", "|---|---|"]
        lines += [f"| `{_argument(each)}` | {_cell(each.help)} |" for each in arguments]
        lines.append("")
    if options:
        lines += ["| option | default | |", "|---|---|---|"]
        lines += [
            f"| `{_option(each)}` | {_default(each)} | {_cell(each.help)} |" for each in options
        ]
        lines.append("")
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return str(name if parameter.required or name.startswith("[") else f"[{name}]")


def _option(parameter: Any) -> str:
    name = "/".join((*parameter.opts, *parameter.secondary_opts))
    # An upper-case name says what a value is where Python's type would say less.
    return name if parameter.is_flag else f"{name} {parameter.name.upper()}"


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or value is False else f"`{value}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def decision_titles(folder: Path) -> dict[str, str]:
    """Return the title of each decision by its file's name, in their order.

    Raises:
        ValueError: A file has no title, or another number than its name.
    """
    found = {}
    for path in sorted(folder.glob("[0-9]*.md")):
        heading = re.match(r"# (\d+)\. (.+)\n", path.read_text(encoding="utf-8"))
        if heading is None or int(heading[1]) != int(path.name[:4]):
            raise ValueError(f"{path} must begin with `# {int(path.name[:4])}. Title`.")
        found[path.name] = heading[2]
    return found


def decisions_page(folder: Path) -> str:
    """Return the index of the decisions."""
    lines = [
        "# Decisions",
        "",
        "What was decided, why, what it makes harder, and what would change our mind.",
        "",
    ]
    # Numbered by the files: a list of Markdown would count anew after a gap.
    lines += ["| | |", "|---|---|"]
    for name, title in decision_titles(folder).items():
        lines.append(f"| {int(name[:4])} | [{title}]({name}) |")
    return "\n".join(lines) + "\n"


def linked_sources(text: str, page: PurePosixPath, root: Path, docs: Path) -> Iterator[Path]:
    """Yield the files outside the manual's folder that a page links to.

    Args:
        text: Markdown of the page.
        page: Its place below `docs`.
        root: Of the checkout; links that leave it are left alone.
        docs: The manual's folder.
    """
    for found in _LINK.finditer(text):
        path = _target(found[1], page, docs)
        if path is not None and path.is_relative_to(root) and not path.is_relative_to(docs):
            yield path


def with_source_links(text: str, page: PurePosixPath, root: Path, docs: Path) -> str:
    """Return a page whose links out of the manual lead to `source_page` of what they name."""
    sources = set(linked_sources(text, page, root, docs))

    def replaced(found: re.Match[str]) -> str:
        path = _target(found[1], page, docs)
        if path is None or path not in sources:
            return found[0]
        place = os.path.relpath(source_page(path.relative_to(root)), page.parent)
        return f"]({PurePosixPath(place)}{found[2] or ''})"

    return _LINK.sub(replaced, text)


def source_page(path: Path) -> PurePosixPath:
    """Return where the manual shows a file or folder of the checkout, named from its root."""
    shown = path if path.suffix == ".md" else path.with_name(path.name + ".md")
    return PurePosixPath("source") / shown.as_posix()


def source_text(path: Path, root: Path, docs: Path) -> str:
    """Return a file or folder of the checkout as a page; of its links those into the manual stay.

    Args:
        path: What is shown.
        root, docs: As of `linked_sources`.
    """
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if not each.name.startswith(("_", ".")))
        return "\n".join([f"# {path.name}", "", *(f"- `{name}`" for name in names), ""])
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        language = _LANGUAGES.get(path.suffix, "text")
        # Longer than any fence inside.
        return f"# {path.name}\n\n`````{language}\n{text}\n`````\n"
    place = source_page(path.relative_to(root))

    def replaced(found: re.Match[str]) -> str:
        link = found[2]
        if "://" in link:
            return found[0]
        target = Path(os.path.normpath(path.parent / link))
        if not target.is_relative_to(docs):
            return found[1]
        shown = os.path.relpath(target.relative_to(docs), place.parent)
        return f"[{found[1]}]({PurePosixPath(shown)}{found[3] or ''})"

    return _TEXT_LINK.sub(replaced, text)


def _target(link: str, page: PurePosixPath, docs: Path) -> Path | None:
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = Path(os.path.normpath(docs / page.parent / link))
    return path if path.exists() else None
