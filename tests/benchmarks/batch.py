"""`make bench-batch`: what the batch path costs and gains, as a table and one JSON object on the last line.

A synthetic table of 10,000,000 customers x 32 float32 features in 20 Parquet files, the network
32-256-256-1, a real Prefect server, checkpoints and publishing on. Every figure comes from a process of
its own; what is compared runs in turn, A B A B, and the median is printed. ROWS=... takes fewer rows, MOST=... fewer
than the 50,000,000 of the scaling figure.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.benchmarks.shared import (
    FEATURES,
    FOLDER,
    ROUNDS,
    ROWS,
    child,
    console,
    in_turn,
    machine,
    make_customers,
    make_files,
    make_models,
    measure,
    open_registry,
    prefect,
)

LOOP_BATCHES = (512, 2048, 8192, 65536)
MOST = int(os.environ.get("MOST", str(5 * ROWS)))


def main() -> None:
    """Run every comparison and print the table, then the figures as JSON."""
    open_registry()
    few = min(ROWS, 1_000_000)
    many, less = make_customers(ROWS), make_customers(few)
    models = make_models()
    with prefect():
        loop_batch = best_loop_batch(less, models)
        figures = {"loop_batch": loop_batch}
        figures |= against_the_loop(many, less, models, loop_batch)
        figures |= memory(less, many, models)
        figures |= checkpoints(many, models)
        figures |= overhead(models)
        figures |= pipeline()
        figures |= many_files(models)
        figures |= scaling(few, models)
    show(figures)
    print(json.dumps({"rows": ROWS, "machine": machine(), **figures}))


def best_loop_batch(source: Path, models: dict[str, str]) -> int:
    """Find the batch size at which the hand-written loop is fastest, on the smaller table."""
    runs = {size: lambda size=size: child("loop", models["mlp"], source, batch_size=size) for size in LOOP_BATCHES}
    seconds = in_turn(runs, "the loop's best batch", lambda result: result["seconds"])
    return min(seconds, key=lambda size: seconds[size])


def against_the_loop(source: Path, less: Path, models: dict[str, str], batch: int) -> dict[str, float]:
    """Compare whole calls with the loop's, and with the four kernels that no run can do without."""
    found: dict[str, list[dict[str, float]]] = {"overnight": [], "unchecked": [], "loop": [], "limit": []}
    kernels = [sys.executable, "-m", "tests.benchmarks.limit", models["mlp"], str(less)]
    for _ in track(range(ROUNDS), "overnight, the loop and the limit", console=console):
        found["overnight"].append(child("overnight", models["mlp"], source))
        found["unchecked"].append(child("overnight", models["mlp"], source, check_keys=False))
        found["loop"].append(child("loop", models["mlp"], source, batch_size=batch))
        found["limit"].append(measure(kernels))
    names = ("overnight", "unchecked", "loop")
    overnight, unchecked, loop = (statistics.median(run["seconds"] for run in found[name]) for name in names)
    limit = {name: statistics.median(run[name] for run in found["limit"]) for name in found["limit"][0]}
    return {
        "rows_per_second": round(ROWS / overnight),
        "loop_rows_per_second": round(ROWS / loop),
        "vs_loop": round(loop / overnight, 3),
        "without_key_check_rows_per_second": round(ROWS / unchecked),
        "without_key_check_vs_loop": round(loop / unchecked, 3),
        **{f"limit_{name}_rows_per_second": round(1 / seconds) for name, seconds in limit.items()},
        "mlp_of_limit": round(ROWS / overnight * sum(limit.values()), 3),
    }


def memory(less: Path, many: Path, models: dict[str, str]) -> dict[str, float]:
    """Compare the peak memory at 1M rows and at all of them."""
    runs = {name: lambda at=at: child("overnight", models["mlp"], at) for name, at in (("1m", less), ("10m", many))}
    peaks = in_turn(runs, "peak memory", lambda result: result["peak_rss_mb"])
    return {
        "peak_rss_mb_1m": round(peaks["1m"]),
        "peak_rss_mb_10m": round(peaks["10m"]),
        "peak_rss_ratio": round(peaks["10m"] / peaks["1m"], 3),
    }


def checkpoints(source: Path, models: dict[str, str]) -> dict[str, float]:
    """Compare at least 40 chunks a slot with one chunk a shard."""
    runs = {
        "many": lambda: child("overnight", models["mlp"], source, rows_per_chunk=ROWS // 80),
        "one": lambda: child("overnight", models["mlp"], source, rows_per_chunk=ROWS // 4),
    }
    seconds = in_turn(runs, "checkpoints", lambda result: result["seconds"])
    return {"checkpoint_cost": round(seconds["many"] / seconds["one"], 3)}


def overhead(models: dict[str, str]) -> dict[str, float]:
    """Measure 10 batches of 1 s on one slot, from the call to its return, over 10 s."""
    source = FOLDER / "sleepers"
    if not source.exists():
        from tests.support import write_customers

        write_customers(source, rows=10_000, files=1, rows_per_group=10_000)
    runs = {
        "call": lambda: child("overnight", models["sleepy"], source, batch_size=1_000, rows_per_chunk=1_000, slots=1)
    }
    return {"overhead": round(in_turn(runs, "overhead", lambda result: result["seconds"])["call"] / 10, 3)}


def pipeline() -> dict[str, float]:
    """Compare two equal stages one after the other with the pipeline: twice as fast is the ceiling."""
    source = FOLDER / "sleepers-400k"
    if not source.exists():
        from tests.support import write_customers

        write_customers(source, rows=400_000, files=1, rows_per_group=100_000)
    command = [sys.executable, "-m", "tests.benchmarks.pipeline", str(source), str(FOLDER / "out")]

    def run() -> float:
        shutil.rmtree(FOLDER / "out", ignore_errors=True)
        seconds = measure(command)
        return seconds["after_each_other"] / seconds["overlapped"] / 2

    return {"pipeline_of_ceiling": round(in_turn({"": run}, "two equal stages", lambda ratio: ratio)[""], 3)}


def many_files(models: dict[str, str]) -> dict[str, Any]:
    """Compare the seconds to the first part over 10,000 files with those over the same rows in 10.

    Cold is from the start of a process, warm from a call where all is imported and loaded.
    """
    sources = {files: make_files(files) for files in (10, 10_000)}
    runs = {
        (kind, files): lambda kind=kind, at=at: child(kind, models["mlp"], at)
        for kind in ("cold", "first")
        for files, at in sources.items()
    }
    seconds = in_turn(runs, "10 and 10,000 files", lambda result: result["first"])
    return {
        "files_10000": round(seconds["cold", 10_000] / seconds["cold", 10], 2),
        "files_10000_seconds": [round(seconds["cold", files], 2) for files in sources],
        "files_10000_warm": round(seconds["first", 10_000] / seconds["first", 10], 2),
        "files_10000_warm_seconds": [round(seconds["first", files], 2) for files in sources],
    }


def scaling(few: int, models: dict[str, str]) -> dict[str, float]:
    """Compare the seconds a row of scoring, and of whole calls, from the smaller table to five times the larger."""
    sources = {rows: make_customers(rows) for rows in dict.fromkeys((few, ROWS, MOST))}
    results: dict[int, list[dict[str, float]]] = {rows: [] for rows in sources}
    for _ in track(range(ROUNDS), "scaling", console=console):
        for rows, source in sources.items():
            results[rows].append(child("overnight", models["mlp"], source))
    calls, scoring = (
        {rows: statistics.median(run[kind] for run in found) / rows for rows, found in results.items()}
        for kind in ("seconds", "score")
    )
    return {
        **{f"microseconds_a_row_{rows}": round(seconds * 1e6, 3) for rows, seconds in scoring.items()},
        "scaling": round(max(scoring.values()) / min(scoring.values()), 3),
        "scaling_of_whole_calls": round(max(calls.values()) / min(calls.values()), 3),
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures beside what they must reach."""
    limits = {
        "vs_loop": "at least 1.35",
        "peak_rss_ratio": "0.9 to 1.1",
        "overhead": "at most 1.10",
        "checkpoint_cost": "at most 1.03",
        "mlp_of_limit": "at least 0.9",
        "pipeline_of_ceiling": "at least 0.9",
        "files_10000": "at most 3",
        "scaling": "at most 1.1",
    }
    table = Table(
        title=f"{ROWS:,} rows x {len(FEATURES)} float32, medians of {ROUNDS}; {machine()}", title_justify="left"
    )
    for name in ("figure", "measured", "wanted"):
        table.add_column(name)
    for name, value in figures.items():
        told = f"{value:,}" if isinstance(value, int | float) else ", ".join(map(str, value))
        table.add_row(name, told, limits.get(name, ""))
    Console().print(table)


if __name__ == "__main__":
    main()
