"""`make bench-features`: what joining features costs, beside polars' own join of all rows in memory; JSON last.

A spine of 2,000,000 rows of 1,000,000 customers, and features of 10,000,000 rows, in three cases: a narrow table that
workers keep in memory, a wide one in the order of time that is read from its files for each chunk, and the same wide
one with both sides in the order of their key, so that most row groups are left out for each chunk. Measured is what the
slots of a run do before the model, reading and joining, by two threads; beside it polars reads both sides and joins
them by one `join_asof`. Each is a process of its own, and the sums of what both give must be the same.
ROWS=... takes another number of rows of the spine, FEATURE_ROWS=... of the features, ROUNDS=... rounds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.figures import show
from tests.benchmarks.shared import FOLDER, ROUNDS, console, machine, measure

if TYPE_CHECKING:
    import numpy.typing as npt

    from tasks.batch.plan import Plan

ROWS = int(os.environ.get("ROWS", "2000000"))
FEATURE_ROWS = int(os.environ.get("FEATURE_ROWS", "10000000"))
CUSTOMERS = FEATURE_ROWS // 10
SECONDS, SLOTS = 90 * 86_400, 2
ROWS_PER_FILE, ROWS_PER_GROUP = 500_000, 125_000
NARROW, WIDE = ("f0", "f1"), tuple(f"f{at}" for at in range(8))
# The columns of each case, and what both sides are sorted by.
CASES = {"kept": (NARROW, "time"), "files by time": (WIDE, "time"), "files by key": (WIDE, "key")}
WANTED = {"same_sums": "True", "peak_mb_over_idle": "within stated_mb"}


def main() -> None:
    """Measure every case in turn, and print the table, then the figures as JSON."""
    if len(sys.argv) > 1:
        _, kind, case = sys.argv
        print(json.dumps({"overnight": join_chunks, "polars": join_whole}[kind](case)))
        return
    for order in ("time", "key"):
        write_tables(order)
    found: dict[str, list[dict[str, Any]]] = {}
    for at in range(ROUNDS):
        for case in CASES:
            for kind in ("overnight", "polars"):
                console.print(f"round {at + 1}: {case}, {kind}")
                figures = measure([sys.executable, "-m", "tests.benchmarks.features", kind, case])
                found.setdefault(f"{case}, {kind}", []).append(figures)
    figures = {name: summarize(rounds) for name, rounds in found.items()}
    for case in CASES:
        ours, theirs = (found[f"{case}, {kind}"] for kind in ("overnight", "polars"))
        figures[f"{case}, overnight"]["same_sums"] = all(each["sum"] == theirs[0]["sum"] for each in (*ours, *theirs))
    show(f"{ROWS:,} rows, {FEATURE_ROWS:,} of features, medians of {ROUNDS}; {machine()}", figures, WANTED)
    told = {"rows": ROWS, "feature_rows": FEATURE_ROWS, "machine": machine()}
    print(json.dumps({**told, "figures": figures, "rounds": found}))


def summarize(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the rounds of a case."""
    return {
        name: round(statistics.median(each[name] for each in rounds), 2)
        for name in rounds[0]
        if name not in ("sum", "matched")
    }


def write_tables(order: str) -> None:
    """Write spine and features once, in the order of time or of their key."""
    folder = FOLDER / f"features-{ROWS}-{FEATURE_ROWS}-{order}"
    if (folder / "_done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    random = np.random.default_rng(11)
    for name, rows, columns in (("spine", ROWS, ()), ("features", FEATURE_ROWS, WIDE)):
        (folder / name).mkdir(parents=True)
        key = random.integers(0, CUSTOMERS, rows)
        # Of one customer hardly two in a microsecond: polars may order ties otherwise.
        moment = random.integers(0, SECONDS * 1_000_000, rows)
        order_N = np.argsort(moment if order == "time" else key, kind="stable")
        key, moment = key[order_N], moment[order_N]
        for at, start in enumerate(range(0, rows, ROWS_PER_FILE)):
            part = slice(start, start + ROWS_PER_FILE)
            table = {"customer": key[part], "at": pa.array(moment[part], pa.timestamp("us"))}
            table |= {} if columns else {"id": np.arange(rows)[part]}
            for column in columns:
                table[column] = random.integers(0, 1000, len(key[part])).astype(np.float32)
            pq.write_table(pa.table(table), folder / name / f"{at:03d}.parquet", row_group_size=ROWS_PER_GROUP)
    (folder / "_done").touch()


def sum_up(ids: npt.NDArray[np.int64], columns: list[npt.NDArray[np.float32]]) -> list[int]:
    """Return for each column the sum of its values times the rows' numbers: all are whole, and nulls count as none."""
    return [int((ids * np.nan_to_num(column).astype(np.int64)).sum()) for column in columns]


def join_chunks(case: str) -> dict[str, Any]:
    """Read and join all chunks of a plan by two threads, as two slots do."""
    from tasks.batch.feature_lookup import FeatureLookup, open_joined_reader
    from tasks.batch.memory import feature_bytes, memory_bytes

    columns, order = CASES[case]
    begun = time.perf_counter()
    plan = make_plan(columns, FOLDER / f"features-{ROWS}-{FEATURE_ROWS}-{order}")
    planned, spent = time.perf_counter(), time.process_time()
    idle = forget_peak()
    lookup, chunks = FeatureLookup(plan.features), list(plan.chunks.values())

    def read(slot: int) -> list[list[int]]:
        reader, sums = open_joined_reader(plan, lookup), []
        for chunk in chunks[len(chunks) * slot // SLOTS : len(chunks) * (slot + 1) // SLOTS]:
            for block in reader.blocks(chunk, plan.block_rows(chunk)):
                values = [block[name].to_numpy() for name in columns]
                sums.append(sum_up(block["id"].to_numpy(), values))
        return sums

    with ThreadPoolExecutor(SLOTS) as pool:
        sums = [each for found in pool.map(read, range(SLOTS)) for each in found]
    return {
        "seconds": time.perf_counter() - planned,
        "cpu_seconds": time.process_time() - spent,
        "planning_seconds": planned - begun,
        "chunks": len(chunks),
        "kept": sum(pin.is_kept for pin in plan.features),
        "peak_mb_over_idle": read_peak_mb() - idle,
        "stated_mb": (memory_bytes(plan, SLOTS) + feature_bytes(plan, SLOTS)) / (1 << 20),
        "sum": np.array(sums).sum(axis=0).tolist(),
    }


def make_plan(columns: tuple[str, ...], folder: Path) -> Plan:
    """Plan a run over the tables, by a model that is a formula."""
    from serving.model.contract import Column, Contract, Input, Output
    from tasks.batch.options import BatchOptions
    from tasks.batch.resolve import CompleteRun, find_run
    from tasks.batch.run_request import make_request
    from tasks.storage import open_storage
    from tests.simulation.data import ToyResolved, load_toy

    inputs = tuple(Column(name=name, dtype="float32") for name in columns)
    contract = Contract(
        inputs=(Input(name="x", dtype="float32", shape=(len(columns),), columns=inputs),),
        outputs=(Output(name="y", dtype="float32"),),
    )
    table = {"source": str(folder / "features"), "join_keys": "customer", "time": "at"}
    options = BatchOptions.model_validate(
        {"key_columns": "id", "spine_time": "at", "features": [table], "batch_size": 1024, "slots": SLOTS}
    )
    out, model = FOLDER / "features-out", ToyResolved(1)
    shutil.rmtree(out, ignore_errors=True)
    request = make_request(model, contract, str(folder / "spine"), str(out), options)  # type: ignore[arg-type]
    run = find_run(request, open_storage(str(out)), "bench", load=load_toy)  # type: ignore[arg-type]
    assert not isinstance(run, CompleteRun)
    return run.plan


def join_whole(case: str) -> dict[str, Any]:
    """Read both sides with polars, and join them in memory."""
    import polars as pl

    columns, order = CASES[case]
    folder = FOLDER / f"features-{ROWS}-{FEATURE_ROWS}-{order}"
    idle, begun, spent = forget_peak(), time.perf_counter(), time.process_time()
    spine = pl.read_parquet(folder / "spine" / "*.parquet").sort("at")
    features = pl.read_parquet(folder / "features" / "*.parquet", columns=["customer", "at", *columns]).sort("at")
    joined = spine.join_asof(features, on="at", by="customer", strategy="backward", check_sortedness=False)
    seconds, spent = time.perf_counter() - begun, time.process_time() - spent
    peak = read_peak_mb() - idle
    sums = sum_up(joined["id"].to_numpy(), [joined[name].to_numpy() for name in columns])
    return {"seconds": seconds, "cpu_seconds": spent, "peak_mb_over_idle": peak, "sum": sums}


def forget_peak() -> float:
    """Have the system count the peak from now on; return what this process has now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_peak_mb()


def read_peak_mb() -> float:
    """Return the most memory that this process has had since then, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
