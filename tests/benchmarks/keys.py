"""The check of a run's keys, and upserts of 1 % of them: time and peak memory, beside DuckDB, polars and deltalake.

Each is measured in a process of its own, whose peak is counted over what it took before. Keys are synthetic: integers
in a scattered order, and texts of 32 characters. The upserts are into a table of ROWS rows in files of 500,000: once
with keys that are spread over all files, once with keys of one file, and once with every key. Files of 100,000,000 keys
take 1 GB of disk; KEYS=10000000 leaves them out. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from tasks.batch.delta import commit_delta
from tasks.batch.key_check import check_keys
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts
from tasks.storage import open_storage
from tests.benchmarks.figures import show
from tests.benchmarks.shared import FOLDER, ROWS, ROWS_PER_FILE, console, machine, measure
from tests.tasks.batch.small import a_contract, a_plan, put_parts

KEYS = [int(rows) for rows in os.environ.get("KEYS", "10000000,100000000").split(",")]
MEMORY_BYTES = 256 << 20
OPTIONS = BatchOptions(rows_per_chunk=ROWS_PER_FILE, output="delta", delta_mode="upsert", key_columns=("id",))
SPREADS = {"1 %, scattered": slice(None, None, 100), "1 %, together": slice(ROWS // 100), "every key": slice(None)}
WANTED = {"seconds": "<= 2 for 10,000,000 integers", "peak_mb": "the same for 10 and 100 million"}


def main() -> None:
    """Measure all, and print."""
    found: dict[str, dict[str, Any]] = {}
    for kind, rows in [("integers", rows) for rows in KEYS] + [("texts", KEYS[0])]:
        folder = make_keys(kind, rows)
        for way in ("overnight", "duckdb", "polars"):
            # polars keeps every group in memory.
            if way != "polars" or rows <= 10_000_000:
                found[f"{way}, {rows:,} {kind}"] = measure_child(way, folder)
    show(f"check of keys, {machine()}", found, WANTED)
    upserts: dict[str, dict[str, Any]] = {}
    for spread in SPREADS:
        for way in ("upsert", "merge"):
            folder = make_table(spread)
            upserts[f"{way}, {spread}"] = measure_child(way, folder)
    show(f"upsert into {ROWS:,} rows, {machine()}", upserts, {})
    print(json.dumps({"machine": machine(), "check": found, "upsert": upserts}))


def measure_child(way: str, folder: Path) -> dict[str, Any]:
    return measure([sys.executable, "-m", "tests.benchmarks.keys", way, str(folder)])


def make_keys(kind: str, rows: int) -> Path:
    """Write keys once, 500,000 a file, each different from all others."""
    folder = FOLDER / f"keys-{kind}-{rows}"
    if (folder / "_done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for start in track(range(0, rows, ROWS_PER_FILE), f"writing {rows:,} {kind}", console=console):
        numbers = np.arange(start, min(rows, start + ROWS_PER_FILE), dtype=np.uint64)
        # An odd factor maps no two numbers to one.
        scattered = pl.Series("key", numbers * np.uint64(0x9E3779B97F4A7C15))
        if kind == "texts":
            scattered = pl.DataFrame(scattered).select(pl.format("customer-{}", pl.col("key").cast(str).str.zfill(23)))
            scattered = scattered.to_series().rename("key")
        table = pa.table({"key": scattered.to_arrow() if kind == "texts" else scattered.to_numpy().view(np.int64)})
        pq.write_table(table, folder / f"{start:010d}.parquet", compression="zstd", use_dictionary=False)
    (folder / "_done").touch()
    return folder


def make_table(spread: str) -> Path:
    """Make a Delta table of ROWS rows by a run, and the parts of a second run with a hundredth of its keys."""
    made, folder = FOLDER / f"upsert-{ROWS}", FOLDER / "upsert"
    if not (made / "_done").exists():
        shutil.rmtree(made, ignore_errors=True)
        ids = np.arange(ROWS)
        for name, keys in (("all", ids), *((spread, ids[cut]) for spread, cut in SPREADS.items())):
            plan = plan_run(made, name, keys)
            (made / f"{name}.json").write_text(plan.model_dump_json())
            put_parts(plan, open_storage(f"{made}/out"))
            if name == "all":
                commit_delta(open_storage(f"{made}/out"), plan, audit_parts(open_storage(f"{made}/out"), plan).footers)
        (made / "_done").touch()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder, copy_function=os.link)
    (folder / "second").write_text(spread)
    return folder


def plan_run(folder: Path, name: str, keys: np.ndarray) -> Plan:
    """Plan a run over these keys, in rows of two features."""
    source = folder / f"in-{name}"
    source.mkdir(parents=True)
    values = keys.astype(np.float32)
    table = pa.table({"id": keys, "a": values, "b": values})
    pq.write_table(table, source / "a.parquet", row_group_size=ROWS_PER_FILE)
    plan = a_plan(str(source), f"{folder}/out", OPTIONS, contract=a_contract("a", "b"), batch_size=1000)
    return plan.model_copy(update={"order": 1 if name == "all" else 2})


def check_by_overnight(folder: Path) -> int:
    storage = open_storage(str(folder))
    paths = [entry.path for entry in storage.entries() if entry.path.endswith(".parquet")]
    return check_keys(storage, paths, ["key"]).doubled


def check_by_duckdb(folder: Path) -> int:
    import duckdb

    with tempfile.TemporaryDirectory() as scratch:
        settings = {"memory_limit": f"{MEMORY_BYTES}B", "temp_directory": scratch, "preserve_insertion_order": False}
        query = "SELECT key, count(*) AS rows FROM read_parquet(?) GROUP BY key HAVING rows > 1 LIMIT 10"
        return len(duckdb.connect(config=settings).execute(query, [f"{folder}/*.parquet"]).fetchall())


def check_by_polars(folder: Path) -> int:
    frame = pl.scan_parquet(folder / "*.parquet").group_by("key").len().filter(pl.col("len") > 1).head(10)
    return frame.collect(engine="streaming").height


def upsert(folder: Path) -> int:
    """Put the second run's rows into the table; return the rows that it has then."""
    storage = open_storage(f"{folder}/out")
    plan = Plan.model_validate_json((folder / f"{(folder / 'second').read_text()}.json").read_text())
    commit_delta(storage, plan, audit_parts(storage, plan).footers)
    return count_rows(storage.url)


def merge(folder: Path) -> int:
    """Do the same by deltalake's own merge. Its hash join does not spill: limited to 256 MiB it fails."""
    from deltalake import DeltaTable

    storage = open_storage(f"{folder}/out")
    plan = Plan.model_validate_json((folder / f"{(folder / 'second').read_text()}.json").read_text())
    rows = pa.concat_tables(pq.read_table(f"{storage.url}/{f.path}") for f in audit_parts(storage, plan).footers)
    merger = DeltaTable(storage.url).merge(rows, "t.id = s.id", source_alias="s", target_alias="t")
    merger.when_matched_update_all().when_not_matched_insert_all().execute()
    return count_rows(storage.url)


def count_rows(address: str) -> int:
    from deltalake import DeltaTable

    return sum(pa.table(DeltaTable(address).get_add_actions(flatten=True))["num_records"].to_pylist())


WAYS: dict[str, Callable[[Path], int]] = {
    "overnight": check_by_overnight,
    "duckdb": check_by_duckdb,
    "polars": check_by_polars,
    "upsert": upsert,
    "merge": merge,
}


def read_peak_mb() -> int:
    """Return what this process has taken at its peak, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


def run_child(way: str, folder: Path) -> None:
    """Do one of them, and print what it took."""
    before, started, worked = read_peak_mb(), time.perf_counter(), time.process_time()
    found = WAYS[way](folder)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    if found != (ROWS if way in ("upsert", "merge") else 0):
        message = f"{way} must find no doubled keys, or leave {ROWS:,} rows, got {found:,}."
        raise RuntimeError(message)
    print(
        json.dumps(
            {
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu_seconds, 2),
                "peak_mb": read_peak_mb() - before,
            }
        )
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_child(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
