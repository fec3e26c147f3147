"""`make bench-models`: models other than torch, as tables and one JSON object on the last line.

A synthetic table of 2,000,000 customers x 32 float64 features in Parquet files. For each model, in interleaved rounds
of processes of their own: the loop that one would write by hand, at its best way and batch size; the limit, which is
`predict` alone on rows in memory, by the better of one process with two threads and two with one; Overnight's scoring
alone; and whole calls beside a real Prefect server, of all rows and of 200,000, with no tuning kept from before. The
imports of the process that Overnight makes for models are counted in the figures of first calls alone, as those of the
loop are in none.
ROWS=... takes fewer rows, ROUNDS=... rounds and MODELS=xgboost,onnx some of the models.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import polars as pl

from serving.machine import count_cores
from tests.benchmarks.figures import show
from tests.benchmarks.model_flavours import FLAVOURS, register_flavours
from tests.benchmarks.shared import (
    FOLDER,
    ROUNDS,
    clear,
    console,
    machine,
    make_customers,
    measure,
    open_registry,
    prefect,
    use_experiment,
)

ROWS = int(os.environ.get("ROWS", "2000000"))
ROWS_OF_SHORT_CALL = min(ROWS, 200_000)
LOOP, SCORES = FOLDER / "models-loop", FOLDER / "models-out"
WANTED = {
    "vs_loop": "linear, ONNX 1.2; XGBoost 1.15; others 1",
    "of_limit": "at least 0.8, linear 0.6",
    "call_vs_loop": "at least 0.7",
    "short_call_vs_loop": "at least 0.8",
}
Found = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Measure every model, and print the table, then the figures as JSON."""
    chosen = choose_models()
    open_registry()
    use_experiment("bench")
    use_experiment("overnight")
    sources = {
        "long": make_customers(ROWS, dtype="float64"),
        "short": make_customers(ROWS_OF_SHORT_CALL, dtype="float64"),
    }
    addresses = register_flavours(chosen)
    loops: dict[str, dict[str, Any]] = {}
    found: dict[str, Found] = {name: defaultdict(list) for name in chosen}
    with prefect():
        for at in range(ROUNDS):
            for name in chosen:
                if at == 0:
                    loops[name] = choose_loop(name, addresses[name], sources["short"])
                measure_round(name, addresses[name], sources, loops[name], found[name])
                if at == 0:
                    check_predictions()
    figures = {name: compare(loops[name], found[name]) for name in chosen}
    show(f"{ROWS:,} rows x 32 float64, medians of {ROUNDS}; {machine()}", figures, WANTED)
    ratios = {f"{name}_{figure}": figures[name][figure] for name in chosen for figure in WANTED}
    print(json.dumps({"rows": ROWS, "machine": machine(), **ratios, "figures": figures, "rounds": found}))


def choose_models() -> tuple[str, ...]:
    """Return the models that the environment asks for, by default all."""
    chosen = os.environ.get("MODELS", ",".join(FLAVOURS)).replace(" ", "").split(",")
    if unknown := sorted(set(chosen) - set(FLAVOURS)):
        sys.exit(f"MODELS must name some of {sorted(FLAVOURS)}, got {unknown}")
    return tuple(chosen)


def choose_loop(name: str, address: str, source: Path) -> dict[str, Any]:
    """Find the way to predict and the batch size at which the loop by hand is fastest, on the small table."""
    seconds = run_child("loops", name, address, source, LOOP)
    way, batch_size = min(seconds, key=lambda loop: seconds[loop]).split()
    return {"way": way, "batch_size": int(batch_size)}


def measure_round(name: str, address: str, sources: Mapping[str, Path], loop: dict[str, Any], found: Found) -> None:
    """Measure everything about one model once; what Overnight tunes is forgotten each time."""
    for length, source in sources.items():
        found[f"{length} loop"].append(run_child("loop", name, address, source, LOOP, **loop))
        for kind in ("call", "first"):
            forget_tuning(address)
            found[f"{length} {kind}"].append(run_child(kind, name, address, source, SCORES))
    for processes in dict.fromkeys((1, count_cores())):
        job = {"flavour": name, "address": address, "source": str(sources["long"]), "processes": processes}
        found[f"limit of {processes}"].append(measure_child("limit", job))
    forget_tuning(address)
    found["loop"].append(run_child("loop", name, address, sources["long"], LOOP, **loop))
    found["score"].append(run_child("score", name, address, sources["long"], SCORES))


def run_child(kind: str, name: str, address: str, source: Path, destination: Path, **options: Any) -> dict[str, Any]:
    clear(str(destination))
    job = {"flavour": name, "address": address, "source": str(source), "destination": str(destination)}
    return measure_child(kind, {**job, **options})


def measure_child(kind: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run one measurement in a process of its own, and print it, since the whole takes a while."""
    result = measure([sys.executable, "-m", "tests.benchmarks.model_child", kind, json.dumps(job)])
    console.print(f"{job['flavour']}: {kind}", {name: value for name, value in result.items() if name != "steps"})
    return result


def forget_tuning(address: str) -> None:
    """Delete what earlier runs have kept with the model version."""
    _, name, version = address.split("/")
    client = mlflow.MlflowClient()
    for tag in client.get_model_version(name, version).tags:
        if tag.startswith("overnight.tuning."):
            client.delete_model_version_tag(name, version, tag)


def check_predictions() -> None:
    """Exit where Overnight's predictions are not those of the loop."""
    loop = pl.read_parquet(LOOP / "*.parquet").sort("customer")
    scores = pl.read_parquet(SCORES / "run=*" / "*.parquet", hive_partitioning=False).sort("customer")
    values = scores.drop("customer").to_series()
    if not loop["customer"].equals(scores["customer"]):
        sys.exit(f"The same {loop.height} customers must be in the output, got {scores.height}")
    if not np.allclose(loop["prediction"].to_numpy(), values.to_numpy(), rtol=1e-5, atol=1e-5):
        sys.exit("Overnight's predictions must be those of the loop, got others")


def compare(loop: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """Return the ratios of one model, then the rows a second behind them.

    A ratio is the median of those of the rounds, since a machine that others use differs more between two rounds than
    between two processes that run one after the other.
    """
    limits = [
        max(
            (rate, f"{name}, {way}")
            for name in found
            if name.startswith("limit")
            for way, rate in found[name][at].items()
        )
        for at in range(len(found["score"]))
    ]
    rates = [run["rows"] / run["seconds"] for run in found["score"]]
    return {
        "vs_loop": divide([run["seconds"] for run in found["loop"]], [run["seconds"] for run in found["score"]]),
        "of_limit": divide(rates, [rate for rate, _ in limits]),
        "call_vs_loop": compare_call("long", found),
        "short_call_vs_loop": compare_call("short", found),
        "loop_rows_per_second": round(statistics.median(run["rows"] / run["seconds"] for run in found["loop"])),
        "score_rows_per_second": round(statistics.median(rates)),
        "limit_rows_per_second": round(statistics.median(rate for rate, _ in limits)),
        "call_seconds": round(statistics.median(run["seconds"] for run in found["long call"]), 2),
        "first_call_seconds": round(statistics.median(run["seconds"] for run in found["long first"]), 2),
        "short_call_seconds": round(statistics.median(run["seconds"] for run in found["short call"]), 2),
        "first_short_call_seconds": round(statistics.median(run["seconds"] for run in found["short first"]), 2),
        "loop": f"{loop['way']}, batches of {loop['batch_size']:,}",
        "limit": sorted({way for _, way in limits}),
        "overnight": sorted({f"{run['slots']} slots, batches of {run['batch_size']:,}" for run in found["score"]}),
    }


def compare_call(length: str, found: Found) -> float:
    """Return how many times faster whole calls were than the loop; both load the model."""
    loops = [run["seconds"] + run["load"] for run in found[f"{length} loop"]]
    return divide(loops, [run["seconds"] for run in found[f"{length} call"]])


def divide(these: Sequence[float], those: Sequence[float]) -> float:
    """Return the median of the ratios of each round."""
    return round(statistics.median(one / other for one, other in zip(these, those, strict=True)), 3)


if __name__ == "__main__":
    main()
