"""One measurement of `make bench-models` in a process of its own; what it prints last is one JSON object.

    loops    the seconds a row of the loop by hand over a small table, by way and batch size
    loop     the loop by hand over a table, in one way and batch size
    limit    rows a second of `predict` alone on rows in memory, by way and batch size
    score    Overnight's scoring alone: planned, tuned and loaded before
    call     a whole call of batch_inference, in a process that has made calls of such models before
    first    a whole call of batch_inference, the first of its process

Imports are not counted, except by `first` those of the process that Overnight makes for models.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import sys
import time
import uuid
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from serving.machine import count_cores
from tests.benchmarks.model_flavours import FLAVOURS, Way, open_pyfunc
from tests.benchmarks.shared import FEATURES

BATCHES = (10_000, 100_000)
PYFUNC = "pyfunc"
_ROWS_IN_MEMORY = 200_000
_WINDOW_SECONDS = 1.0


def main() -> None:
    kind, job = sys.argv[1], json.loads(sys.argv[2])
    # The libraries have advice on names of features, which the arrays of some ways do not have.
    warnings.simplefilter("ignore")
    # The processes of a limit import for themselves.
    for module in () if kind == "limit" else ("mlflow.pyfunc", *FLAVOURS[job["flavour"]].modules):
        importlib.import_module(module)
    print(json.dumps({"loops": time_loops, "loop": time_loop, "limit": time_limit, **OVERNIGHT}[kind](**job)))


def open_ways(flavour: str, address: str, threads: int) -> dict[str, Way]:
    return FLAVOURS[flavour].open_ways(address, threads)


def time_loops(flavour: str, address: str, source: str, destination: str) -> dict[str, float]:
    ways = {PYFUNC: open_pyfunc(flavour, address), **open_ways(flavour, address, count_cores())}
    seconds = {}
    for (name, way), batch_size in itertools.product(ways.items(), BATCHES):
        # The first call of a library starts its threads.
        run_loop(way, source, destination, batch_size, batches=1)
        start = time.perf_counter()
        rows = run_loop(way, source, destination, batch_size)
        seconds[f"{name} {batch_size}"] = (time.perf_counter() - start) / rows
    return seconds


def time_loop(flavour: str, address: str, source: str, destination: str, way: str, batch_size: int) -> dict[str, float]:
    start = time.perf_counter()
    loaded = open_ways(flavour, address, count_cores())[way] if way != PYFUNC else open_pyfunc(flavour, address)
    begun = time.perf_counter()
    rows = run_loop(loaded, source, destination, batch_size)
    return {"rows": rows, "load": begun - start, "seconds": time.perf_counter() - begun}


def run_loop(way: Way, source: str, destination: str, batch_size: int, batches: int | None = None) -> int:
    """Score a table as one would by hand: batches of Arrow to pandas, predicted, written into one file."""
    rows = 0
    Path(destination).mkdir(parents=True, exist_ok=True)
    with_key = ("customer", *FEATURES)
    tables = (
        batch
        for path in sorted(Path(source).glob("*.parquet"))
        for batch in pq.ParquetFile(path).iter_batches(batch_size, columns=list(with_key))
    )
    writer: pq.ParquetWriter | None = None
    for batch in itertools.islice(tables, batches):
        frame = batch.to_pandas()
        found = way.predict(way.prepare(frame[list(FEATURES)]))
        out = pa.table({"customer": batch["customer"], "prediction": found})
        writer = writer or pq.ParquetWriter(Path(destination) / "predictions.parquet", out.schema)
        writer.write_table(out)
        rows += batch.num_rows
    if writer:
        writer.close()
    return rows


def time_limit(flavour: str, address: str, source: str, processes: int) -> dict[str, float]:
    """Add up the rows a second of several processes, which share the cores."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, initializer=_keep_barrier, initargs=(barrier,)) as pool:
        jobs = [
            pool.submit(time_predictions, flavour, address, source, max(1, count_cores() // processes))
            for _ in range(processes)
        ]
        found = [job.result() for job in jobs]
    return {name: sum(rates[name] for rates in found) for name in found[0]}


_barriers: list[Any] = []


def _keep_barrier(barrier: Any) -> None:
    warnings.simplefilter("ignore")
    _barriers.append(barrier)


def time_predictions(flavour: str, address: str, source: str, threads: int) -> dict[str, float]:
    """Return rows a second of each way and batch size, over rows that lie in memory as the library takes them."""
    first = min(Path(source).glob("*.parquet"))
    frame = pd.read_parquet(first, columns=list(FEATURES))[:_ROWS_IN_MEMORY]
    rates = {}
    for (name, way), batch_size in itertools.product(open_ways(flavour, address, threads).items(), BATCHES):
        edges = range(0, max(1, len(frame) - batch_size + 1), batch_size)
        batches = [way.prepare(frame[start : start + batch_size]) for start in edges]
        way.predict(batches[0])
        _barriers[0].wait()
        start, rows = time.perf_counter(), 0
        for batch in itertools.cycle(batches):
            way.predict(batch)
            rows += len(batch)
            if (taken := time.perf_counter() - start) > _WINDOW_SECONDS:
                break
        rates[f"{name} {batch_size}"] = rows / taken
    return rates


def time_scoring(flavour: str, address: str, source: str, destination: str) -> dict[str, float]:
    from tasks.batch.options import BatchOptions
    from tasks.batch.planned_models import choose_slots, load_planned_model
    from tasks.batch.resolve import find_run
    from tasks.batch.run_request import resolve_request
    from tasks.batch.score import Scorer
    from tasks.storage import open_storage

    options = BatchOptions(key_columns=("customer",), **FLAVOURS[flavour].options)
    storage = open_storage(destination)
    request = resolve_request(address, source, storage.url, options)
    plan = find_run(request, storage, str(uuid.uuid4())).plan
    model = load_planned_model(plan, request.resolved, options)
    slots = choose_slots(options, model)
    scorer = Scorer(plan=plan, destination=storage, model=model, max_reject_fraction=0.1)
    start = time.perf_counter()
    with ThreadPoolExecutor(slots) as pool:
        rows = sum(result.rows for result in pool.map(scorer.score_shard, scorer.scheduler.begin()))
    seconds = time.perf_counter() - start
    return {"rows": rows, "seconds": seconds, "slots": slots, "batch_size": plan.batch_size}


def time_call(flavour: str, address: str, source: str, destination: str) -> dict[str, Any]:
    from serving.model.process_handle import FIRST_PROCESSES
    from serving.model.registry import resolve_model
    from serving.model.requirements import list_libraries

    # As an earlier call leaves it: with MLflow and the model's libraries imported, and no model.
    FIRST_PROCESSES.start(sys.executable, list_libraries(resolve_model(address).folder)).close()
    return time_first_call(flavour, address, source, destination)


def time_first_call(flavour: str, address: str, source: str, destination: str) -> dict[str, Any]:
    from flows import batch_inference
    from tasks.batch.options import BatchOptions

    options = BatchOptions(key_columns=("customer",), **FLAVOURS[flavour].options)
    start = time.perf_counter()
    report = batch_inference(address, source, destination, options)
    seconds = time.perf_counter() - start
    return {"rows": report.rows_scored, "seconds": seconds, "steps": report.seconds}


OVERNIGHT = {"score": time_scoring, "call": time_call, "first": time_first_call}


if __name__ == "__main__":
    main()
