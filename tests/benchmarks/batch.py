"""`make bench-batch`: what the batch path costs and gains, as a table and one JSON object on the last line.

A synthetic table of 10,000,000 customers x 32 float32 features in 20 Parquet files, the network
32-256-256-1, a real Prefect server, checkpoints and publishing on. Every figure comes from a process of
its own; what is compared runs in turn, A B A B, and the median is printed. ROWS=... takes fewer rows.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.shared import (
    FEATURES,
    FOLDER,
    ROUNDS,
    ROWS,
    child,
    in_turn,
    machine,
    make_customers,
    make_models,
    open_registry,
    prefect,
)

LOOP_BATCHES = (512, 2048, 8192)


def main() -> None:
    """Run every comparison and print the table, then the figures as JSON."""
    open_registry()
    few = min(ROWS, 1_000_000)
    many, less = make_customers(ROWS), make_customers(few)
    models = make_models()
    with prefect():
        loop_batch = best_loop_batch(less, models)
        figures = {"loop_batch": loop_batch}
        figures |= against_the_loop(many, models, loop_batch)
        figures |= memory(less, many, models)
        figures |= checkpoints(many, models)
        figures |= overhead(models)
    show(figures)
    print(json.dumps({"rows": ROWS, "machine": machine(), **figures}))


def best_loop_batch(source: Path, models: dict[str, str]) -> int:
    """Find the batch size at which the hand-written loop is fastest, on the smaller table."""
    runs = {size: lambda size=size: child("loop", models["mlp"], source, batch_size=size) for size in LOOP_BATCHES}
    seconds = in_turn(runs, "loop at 512, 2048, 8192", lambda result: result["seconds"])
    return min(seconds, key=lambda size: seconds[size])


def against_the_loop(source: Path, models: dict[str, str], batch: int) -> dict[str, float]:
    """Compare whole calls with the loop's."""
    runs = {
        "overnight": lambda: child("overnight", models["mlp"], source),
        "loop": lambda: child("loop", models["mlp"], source, batch_size=batch),
    }
    seconds = in_turn(runs, "overnight and the loop", lambda result: result["seconds"])
    return {
        "rows_per_second": round(ROWS / seconds["overnight"]),
        "loop_rows_per_second": round(ROWS / seconds["loop"]),
        "vs_loop": round(seconds["loop"] / seconds["overnight"], 3),
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


def show(figures: dict[str, float]) -> None:
    """Print the figures beside what they must reach."""
    limits = {
        "vs_loop": "at least 1.0",
        "peak_rss_ratio": "0.9 to 1.1",
        "overhead": "at most 1.10",
        "checkpoint_cost": "at most 1.03",
    }
    table = Table(
        title=f"{ROWS:,} rows x {len(FEATURES)} float32, medians of {ROUNDS}; {machine()}", title_justify="left"
    )
    for name in ("figure", "measured", "wanted"):
        table.add_column(name)
    for name, value in figures.items():
        table.add_row(name, f"{value:,}", limits.get(name, ""))
    Console().print(table)


if __name__ == "__main__":
    main()
