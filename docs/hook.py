"""What MkDocs is told while it builds the manual: the pages that the code writes.

It runs as `python -m mkdocs` from the root of the checkout, where `run` is found.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import typer
from mkdocs.structure.files import File

import run
from runner import manual

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent


def on_config(config: Any) -> None:
    """Fill in the parts of the navigation that follow from files and code."""
    commands = {name: f"commands/{name}.md" for name in _command_pages()}
    titles = manual.decision_titles(DOCS / "decisions")
    for part in config.nav:
        if "Commands" in part:
            part["Commands"] = [{name: path} for name, path in commands.items()]
        if "Decisions" in part:
            part["Decisions"] = [
                {"Index": "decisions/index.md"},
                *({title: f"decisions/{name}"} for name, title in titles.items()),
            ]


def on_files(files: Any, config: Any) -> None:
    """Add the pages of commands, the index of decisions, and the sources that pages link to."""
    generated = {f"commands/{name}.md": text for name, text in _command_pages().items()}
    generated["decisions/index.md"] = manual.decisions_page(DOCS / "decisions")
    for file in files.documentation_pages():
        place = PurePosixPath(file.src_uri)
        for path in manual.linked_sources(file.content_string, place, ROOT, DOCS):
            shown = str(manual.source_page(path.relative_to(ROOT)))
            generated[shown] = manual.source_text(path, ROOT, DOCS)
    for place, text in generated.items():
        files.append(File.generated(config, place, content=text))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of the manual to the pages of what they name."""
    return manual.with_source_links(markdown, PurePosixPath(page.file.src_uri), ROOT, DOCS)


def _command_pages() -> dict[str, str]:
    command = typer.main.get_command(run.app)
    return manual.command_pages(command.commands, "python run.py")
