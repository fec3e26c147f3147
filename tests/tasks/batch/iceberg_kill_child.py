"""Publishes a run into an Iceberg table in a process of its own, and kills it with SIGKILL at a named point.

usage: iceberg_kill_child.py POINT FOLDER
The folder has the catalog, and the destination `out` with the plan and the parts of one run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from pyiceberg.catalog import MetastoreCatalog
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Transaction

import tasks.batch.iceberg_table
from tasks.batch import iceberg_catalog
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, publish
from tasks.storage import LocalStorage, open_storage
from tests.tasks.batch.iceberg_tables import configure


class _Environment:
    def setenv(self, name: str, value: str) -> None:
        os.environ[name] = value


def _wrap(owner: Any, name: str, *, before: bool, when: str = "") -> None:
    """Have the process die before or after a call, where `when` is in its arguments."""
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hit = when in f"{args} {kwargs}"
        if before and hit:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def _wrap_metadata() -> None:
    """Have the process die when the metadata of the new snapshot is written, and the catalog does not have it yet."""
    inner = MetastoreCatalog._write_metadata

    def wrapped(metadata: Any, *args: Any, **kwargs: Any) -> None:
        inner(metadata, *args, **kwargs)
        if any("overnight.run" in (each.summary or {}) for each in metadata.snapshots[-1:]):
            os.kill(os.getpid(), signal.SIGKILL)

    MetastoreCatalog._write_metadata = staticmethod(wrapped)  # type: ignore[assignment]


POINTS = {
    "before the table": lambda: _wrap(tasks.batch.iceberg_table, "_create_table", before=True),
    "after the table": lambda: _wrap(tasks.batch.iceberg_table, "_create_table", before=False),
    "before the snapshot": lambda: _wrap(tasks.batch.iceberg_table, "_commit", before=True),
    "after a manifest": lambda: _wrap(iceberg_catalog._NewObject, "close", before=False),
    "before the commit": lambda: _wrap(Transaction, "commit_transaction", before=True),
    "after the metadata": _wrap_metadata,
    "after the commit": lambda: _wrap(SqlCatalog, "commit_table", before=False),
    "before the manifest": lambda: _wrap(LocalStorage, "put_new", before=True, when="manifest.json"),
    "after the manifest": lambda: _wrap(LocalStorage, "put_new", before=False, when="manifest.json"),
}


def main(point: str, folder: str) -> None:
    """Publish the one run of the folder's destination."""
    configure(_Environment(), folder)
    destination = open_storage(f"{folder}/out")
    (path,) = [entry.path for entry in destination.entries("_overnight") if entry.path.endswith("/plan.json")]
    plan = Plan.model_validate_json(destination.read(path) or b"")
    audit = audit_parts(destination, plan)
    POINTS[point]()
    publish(destination, plan, audit)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
