"""The table that a run went into: which files its log names now, and which of them it has as they were written."""

from __future__ import annotations

from serving.errors import DestinationUnusable
from serving.extras import import_extra
from tasks.batch.delta import TableFiles, list_table_files
from tasks.batch.plan import ROOT
from tasks.batch.run_records import load_plan
from tasks.storage import Storage

_DELTA = "delta"


def find_table_name(storage: Storage, run: str, output: str) -> str | None:
    """Return the name of the table that a run went into: one word for Delta, where the destination is the table.

    None for a run whose output is a folder. Raises DestinationUnusable where the plan, which names an Iceberg table, is
    gone or does not read.
    """
    if output != "iceberg":
        return _DELTA if output == "delta" else None
    plan = load_plan(storage, run)
    if plan is None or plan.options.iceberg_table is None:
        message = (
            f"{storage.address(f'{ROOT}/{run}/plan.json')} must be there, since it names the Iceberg table that run "
            f"{run} went into, but is gone. Put it back, or read the table itself."
        )
        raise DestinationUnusable(message)
    return plan.options.iceberg_table


def read_table_files(storage: Storage, table: str) -> TableFiles:
    """Return the files that the log of a table names now; none where there is no table.

    Args:
        storage: The destination of the runs that went into it.
        table: Its name, as find_table_name gives it.

    Raises:
        DestinationUnusable: Its log does not read.
        BadInput: The catalog is not configured.
        StorageFault: The store or the catalog does not answer.
    """
    if table == _DELTA:
        return list_table_files(storage)
    files: TableFiles = import_extra("tasks.batch.iceberg_table", "iceberg").list_table_files(storage, table)
    return files
