"""Open what runs have published: readers go by the manifest, so they see nothing or everything."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from serving.errors import NoCompleteRun
from tasks.batch.parts import REJECT_REASON, list_parts
from tasks.batch.plan import load_plan
from tasks.batch.publish import find_manifest, find_newest_run
from tasks.storage import LocalStorage, Storage, open_storage, s3_options


def open_predictions(destination: str, run: str | None = None) -> pl.LazyFrame:
    """Open the newest complete run of a destination, or a named one, as a LazyFrame.

    Every row of the dataset is in it: key columns, predictions (null for rejects), reject_column and
    reject_reason. The newest run is the one that was planned last. Raises NoCompleteRun.
    """
    storage = open_storage(destination)
    manifest = find_manifest(storage, run) if run else find_newest_run(storage)
    if manifest is None:
        wanted = f"run {run}" if run else "a run"
        message = f"{storage.url} must hold {wanted} that is complete, got none. Call batch_inference first."
        raise NoCompleteRun(message)
    return _scan(storage, [part.path for part in manifest.parts])


def open_rejects(destination: str, run: str | None = None) -> pl.LazyFrame:
    """Open the rejects of the newest complete run, or of a named run that need not be complete.

    Each is a row of the dataset with its key columns, reject_column and reject_reason.
    Raises NoCompleteRun where there is no such run.
    """
    storage = open_storage(destination)
    if run is None or find_manifest(storage, run) is not None:
        return open_predictions(destination, run).filter(pl.col(REJECT_REASON).is_not_null())
    plan = load_plan(storage, run)
    parts = {} if plan is None else list_parts(storage, plan)
    if not parts:
        message = f"{storage.url} must hold parts of run {run}, got none. Check the run's name."
        raise NoCompleteRun(message)
    return _scan(storage, sorted(entry.path for entry in parts.values())).filter(pl.col(REJECT_REASON).is_not_null())


def _scan(storage: Storage, paths: Sequence[str]) -> pl.LazyFrame:
    options = None if isinstance(storage, LocalStorage) else s3_options()
    # Addresses are meant as they stand, brackets and stars too.
    addresses = [storage.address(path) for path in paths]
    return pl.scan_parquet(addresses, storage_options=options, hive_partitioning=False, glob=False)
