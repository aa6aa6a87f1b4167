"""Shards into a store, and a store into its index."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from results.ingest import ingest, rebuild
from results.store import Store, StoreError
from results.summary import summarize
from runner.corpus import recompute
from runner.registry import Registry
from runner.request import UsageError

# Of reasons not to take results in.
_MOST_LINES = 20


def update_index(store_path: Path, registry: Registry, *, anew: bool = False) -> Path:
    """Bring the DuckDB index of a store up to date, the claims of all cards included.

    Args:
        store_path: Folder of the results.
        registry: Where cards come from.
        anew: Make it from nothing.

    Returns:
        The path of the index.

    Raises:
        StoreError: The index is locked or cannot be written, or shards are damaged; those are named
            and left out.
    """
    update = rebuild if anew else ingest
    return update(store_path, registry.claims())


def take_in(path: Path, store_path: Path, registry: Registry | None = None) -> list[str]:
    """Take results that were made elsewhere into a store: all of them, or none.

    Everything is looked at first: sums of all files, schemas, whether every published number can be
    computed from the samples, and whether the numbers of whole corpora follow from the outputs.

    Args:
        path: A store, one shard, or a file of lm-eval's or pytest-benchmark's.
        store_path: Where they go; shards that are there already are left alone.
        registry: Where tasks come from, for numbers of whole corpora; None trusts those.

    Returns:
        Ids of the experiments that came in.

    Raises:
        UsageError: There are no results, or a shard is still growing.
        StoreError: Something is damaged, of another version, not what it says it is, or differs
            from what the store holds under the same id; names each.
    """
    store = Store(store_path)
    if path.is_file():
        return _take_in_file(path, store)
    is_shard = (path / "experiment.json").is_file()
    if is_shard:
        source, experiment_ids = Store(path.resolve().parent.parent), [path.resolve().name]
    else:
        source = Store(path)
        experiment_ids = source.experiment_ids()
    if not experiment_ids:
        raise UsageError(
            f"{path} holds no shards: name a store, with `shards` in it, or one shard's folder; or "
            "a JSON file of lm-eval or pytest-benchmark."
        )
    for experiment_id in experiment_ids:
        if not source.is_sealed(experiment_id):
            raise UsageError(
                f"{source.shard(experiment_id)} is not sealed: its run has not ended. "
                "Finish the run there first."
            )
    run_ids = [] if is_shard or source.path == store.path else source.run_ids()
    refused = [
        *(line for each in experiment_ids for line in _shard_problems(source, store, each)),
        *(line for each in run_ids for line in _run_problems(source, store, each)),
    ]
    if registry is not None and not refused:
        refused = recompute(source.path, registry, experiment_ids).problems
    if refused:
        shown = refused[:_MOST_LINES]
        rest = [f"and {len(refused) - len(shown)} more."] if len(refused) > len(shown) else []
        raise StoreError("\n".join([*shown, *rest, f"Nothing of {path} was taken in."]))
    came = []
    for experiment_id in experiment_ids:
        if store.shard(experiment_id).exists():
            continue
        try:
            copy_shard(source, store, experiment_id)
        except (OSError, shutil.Error) as error:
            raise StoreError(
                f"{store.path}: shard {experiment_id} cannot be copied to it: {error}. Make room "
                "or fix the permissions, and ingest again."
            ) from error
        came.append(experiment_id)
    for run_id in run_ids:
        if run_id not in store.run_ids():
            store.write_run(source.run(run_id))
    return came


def _take_in_file(path: Path, store: Store) -> list[str]:
    """Import a file of another program; return the ids of what came in."""
    from results import import_benchmarks, import_lm_eval
    from results.imported import ForeignError, read_json

    try:
        data = read_json(path)
    except ForeignError as error:
        raise UsageError(f"{path} holds no shards, and no results of others: {error}") from error
    try:
        if import_lm_eval.is_lm_eval(data):
            return import_lm_eval.take_in(data, path, store)
        if import_benchmarks.is_benchmarks(data):
            return import_benchmarks.take_in(data, path, store)
    except ForeignError as error:
        raise StoreError(f"{error} Nothing of it was taken in.") from error
    raise UsageError(
        f"{path} holds no shards, no results of lm-eval and no benchmarks of pytest-benchmark."
    )


def _shard_problems(source: Store, store: Store, experiment_id: str) -> list[str]:
    """Return a sentence for each reason not to take a shard in."""
    shard = source.shard(experiment_id)
    if links := [path for path in shard.rglob("*") if path.is_symlink()]:
        return [f"{links[0]}: is a link; a shard holds plain files only."]
    try:
        if damage := source.damage(experiment_id):
            return damage
        if store.shard(experiment_id).exists():
            if store.is_sealed(experiment_id) and (
                store.manifest(experiment_id) == source.manifest(experiment_id)
            ):
                return []
            return [
                f"{store.shard(experiment_id)} differs from {shard}: one experiment measured "
                "twice. Discard one of them."
            ]
        experiment, cells = source.experiment(experiment_id), list(source.cells(experiment_id))
        if strangers := {cell.cell_id for cell in cells} - set(experiment.cells):
            return [f"{shard}: cell {min(strangers)!r} is none of the experiment's cells."]
        summarize(
            experiment,
            cells,
            source.sample_table(experiment_id),
            source.score_table(experiment_id),
            source.corpus_table(experiment_id),
        )
    except StoreError as error:
        return [str(error)]
    return []


def _run_problems(source: Store, store: Store, run_id: str) -> list[str]:
    """Return why a run is not taken in, if it is not."""
    try:
        run = source.run(run_id)
        if run_id in store.run_ids() and store.run(run_id) != run:
            return [f"run {run_id!r} of {source.path} differs from the one that is there."]
    except StoreError as error:
        return [str(error)]
    return []


def copy_shard(source: Store, store: Store, experiment_id: str) -> None:
    """Copy a shard beside its place, check the copy, and put it there in one step.

    Raises:
        StoreError: It is sealed and damaged.
        OSError, shutil.Error: It cannot be copied.
    """
    shards = store.path / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=store.path) as incoming:
        copy = Store(Path(incoming))
        shutil.copytree(source.shard(experiment_id), copy.shard(experiment_id))
        if copy.is_sealed(experiment_id) and (damage := copy.damage(experiment_id)):
            raise StoreError(
                f"shard {experiment_id} of {source.path} is damaged and was not taken in: "
                + damage[0].replace(incoming, str(source.path))
            )
        copy.shard(experiment_id).rename(store.shard(experiment_id))
