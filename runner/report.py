"""What the registry says of methods and tasks, for the static site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from results.report.content import Described, Part, Sources
from results.report.site import Written, write
from results.store import Store
from results.tables import connect
from runner import why
from runner.describe import Section, describe
from runner.registry import Entry, Registry
from runner.reproduce import settle_claims
from runner.request import UsageError

# Claims stand on a method's page with their verdicts.
_LEFT_OUT = ("Claims",)


def write_report(registry: Registry, store: Store, folder: Path) -> Written:
    """Write the site of a store.

    Args:
        registry: Where methods, tasks and cards are.
        store: What was measured; may be empty.
        folder: Where to.

    Raises:
        UsageError: There are shards and no index.
        ReportError: The folder cannot be written, or the library that draws is missing.
        StoreError: The index cannot be read.
    """
    index_path = store.index_path if store.index_path.exists() else None
    if index_path is None and store.experiment_ids():
        raise UsageError(
            f"{store.path} has shards and no index: `python run.py rebuild --store {store.path}` "
            "makes it."
        )

    def explained(experiment_id: str, cell_id: str) -> Sequence[Part]:
        assert index_path is not None  # there are no cells without it
        return why.sections(index_path, experiment_id, cell_id)

    # To import every method takes long; those without results have their papers to show.
    measured = _measured(index_path) if index_path else set()
    sources = Sources(
        methods={
            name: _described(registry, entry, imports=name in measured)
            for name, entry in registry.entries("method").items()
        },
        tasks={
            name: _described(registry, entry)
            for name, entry in registry.entries("task").items()
            if name in measured
        },
        papers={report.method: report for report in settle_claims(registry, index_path=index_path)},
        why=explained,
    )
    return write(folder, index_path, sources)


def _measured(index_path: Path) -> set[str]:
    """Return the names of all methods and tasks with results."""
    with connect(index_path) as connection:
        rows = connection.execute(
            "SELECT DISTINCT method FROM cells UNION SELECT DISTINCT task FROM experiments"
        ).fetchall()
    return {name for (name,) in rows}


def _described(registry: Registry, entry: Entry, *, imports: bool = True) -> Described:
    try:
        sections = describe(registry, entry.kind, entry.name, imports=imports)
    except UsageError as error:
        # An extra is missing here; the results were measured where it is not.
        sections = [Section("", [{"key": "not described here", "value": str(error)}])]
    return Described(
        what=entry.title,
        family=entry.family,
        status=entry.status,
        parts=[section for section in sections if section.title not in _LEFT_OUT],
    )
