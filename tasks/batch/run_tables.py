"""The table that a run went into: whether it has the run, and which files its log names now."""

from __future__ import annotations

from serving.errors import DestinationUnusable
from serving.extras import import_extra
from tasks.batch.delta import TableFiles, TableState, check_takes_run, list_table_files, read_table
from tasks.batch.plan import Plan, manifest_path, plan_path
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
            f"{storage.address(plan_path(run))} must be there, since it names the Iceberg table that run "
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


def read_table_state(storage: Storage, plan: Plan) -> TableState | None:
    """Return the current version of the Delta or Iceberg table that a plan names, None where there is none.

    Raises DestinationUnusable where its log does not read, BadInput and StorageFault as read_table_files does.
    """
    if plan.options.output == "delta":
        return read_table(storage, plan)
    state: TableState | None = import_extra("tasks.batch.iceberg_table", "iceberg").read_table(storage, plan)
    return state


def explain_missing_run(plan: Plan, table: TableState | None) -> str:
    """Return what is wrong where a table does not have a published run, or is not there, and what to do."""
    kind = "Delta" if plan.options.output == "delta" else "Iceberg"
    got = "there is no table" if table is None else "its log has no commit of it"
    return (
        f"The {kind} table must hold run {plan.run}, but {got}. Delete {manifest_path(plan.run)} below the "
        "destination and make the call again that scored the run: it commits the parts that are there."
    )


def check_table_has_run(storage: Storage, plan: Plan) -> None:
    """Raise DestinationUnusable where a published run is not in the table that it went into; a folder is no table."""
    if plan.options.output == "parquet":
        return
    table = read_table_state(storage, plan)
    if table is None or not table.holds_run:
        raise DestinationUnusable(explain_missing_run(plan, table))


def check_table_takes_run(storage: Storage, plan: Plan) -> None:
    """Raise PublishRefused where a table will not take a run once it is scored, as one that has a newer run.

    A folder takes every run.
    """
    if plan.options.output == "delta":
        check_takes_run(storage, plan)
    elif plan.options.output == "iceberg":
        import_extra("tasks.batch.iceberg_table", "iceberg").check_takes_run(plan)
