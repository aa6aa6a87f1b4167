"""Shards into a store, and a store into its index."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from results.ingest import ingest, rebuild
from results.store import Store, StoreError
from runner.registry import Registry
from runner.request import UsageError


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


def take_in(folder: Path, store_path: Path) -> list[str]:
    """Copy sealed shards and runs that were made elsewhere into a store.

    Args:
        folder: A store, or one shard.
        store_path: Where they go; shards that are there already are left alone.

    Returns:
        Ids of the experiments that came in.

    Raises:
        UsageError: The folder holds no shards, or one that is still growing.
        StoreError: A shard is damaged, or differs from the one of the same id.
    """
    if (folder / "experiment.json").is_file():
        source, experiment_ids = Store(folder.resolve().parent.parent), [folder.resolve().name]
    else:
        source = Store(folder)
        experiment_ids = source.experiment_ids()
    if not experiment_ids:
        raise UsageError(
            f"{folder} holds no shards: name a store, with `shards` in it, or one shard's folder."
        )
    store, came = Store(store_path), []
    for experiment_id in experiment_ids:
        if not source.is_sealed(experiment_id):
            raise UsageError(
                f"{source.shard(experiment_id)} is not sealed: its run has not ended. "
                "Finish the run there first."
            )
        if store.shard(experiment_id).exists():
            if not store.is_sealed(experiment_id) or (
                store.manifest(experiment_id) != source.manifest(experiment_id)
            ):
                raise StoreError(
                    f"{store.shard(experiment_id)} differs from {source.shard(experiment_id)}: "
                    "one experiment measured twice. Discard one of them."
                )
            continue
        try:
            _copy(source, store, experiment_id)
        except (OSError, shutil.Error) as error:
            raise StoreError(
                f"{store.path}: shard {experiment_id} cannot be copied to it: {error}. Make room "
                "or fix the permissions, and ingest again."
            ) from error
        came.append(experiment_id)
    if source.path != store.path and not (folder / "experiment.json").is_file():
        for run_id in source.run_ids():
            if run_id not in store.run_ids():
                store.write_run(source.run(run_id))
    return came


def _copy(source: Store, store: Store, experiment_id: str) -> None:
    """Copy a shard beside its place, check the copy, and put it there in one step."""
    shards = store.path / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=store.path) as incoming:
        copy = Store(Path(incoming))
        shutil.copytree(source.shard(experiment_id), copy.shard(experiment_id))
        if damage := copy.damage(experiment_id):
            raise StoreError(
                f"shard {experiment_id} of {source.path} is damaged and was not taken in: "
                + damage[0].replace(incoming, str(source.path))
            )
        copy.shard(experiment_id).rename(store.shard(experiment_id))
