"""`make bench-statistics`: what statistics of columns cost in a run, how near their quantiles are, and their bytes.

A table of customers x 32 float32 features is scored by the network 32-256-256-1, a thread a core, without a Prefect
server, in the chunks of 250,000 rows that a run over 10,000,000 of them has. Statistics are collected in the pass, from
the blocks that are scored, and put into text as a part would hold them. Their seconds are those of the processor in
their threads, held against those of the whole process. ROWS=10000000 for more than 2,000,000. The last line is one JSON
object.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.model.loading import load_model
from serving.model.registry import Resolved, resolve_model
from tasks.batch import score
from tasks.batch.chunk_layout import Chunk, Sizes
from tasks.batch.chunk_reader import Reader, open_reader
from tasks.batch.chunk_statistics import StatisticsCollector, collect_statistics
from tasks.batch.column_statistics import (
    TableStatistics,
    add_columns,
    add_tables,
    pack_statistics,
    unpack_statistics,
    write_statistics,
)
from tasks.batch.dataset import open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan, make_plan, run_key
from tasks.batch.score import Scorer
from tasks.batch.source import pin_source
from tasks.storage import open_storage
from tests.benchmarks.figures import show
from tests.benchmarks.shared import FEATURES, FOLDER, console, machine, make_customers, make_models, open_registry

CHUNK_ROWS, SMALL_CHUNK_ROWS = 250_000, 40_000
ROWS = int(os.environ.get("ROWS", "2000000"))
CORES = os.cpu_count() or 1
WANTED = {
    "ns_per_value": "3 or less",
    "statistics_share": "0.03 or less",
    "quantile_error_max": "0.01 or less",
    "bytes_share": "0.1 or less",
    "same_bytes_in_any_order": "True",
}


@dataclass
class Collected:
    """What was collected in the pass: texts of chunks, and seconds of the processor, over all threads."""

    texts: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("add", "finish", "pack"), 0.0))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, step: str, since: float) -> float:
        """Add the seconds of this thread since then, and return its clock."""
        now = time.thread_time()
        with self.lock:
            self.seconds[step] += now - since
        return now


class CollectingReader(Reader):
    """Reads as the product does, and collects the statistics of each chunk."""

    def __init__(self, reader: Reader, collected: Collected) -> None:
        vars(self).update(vars(reader))
        self._collected = collected

    def blocks(self, chunk: Chunk, rows: int | None = None) -> Generator[pa.Table]:
        """Yield blocks that were counted."""
        collector = StatisticsCollector(chunk.rows)
        for table in super().blocks(chunk, rows):
            start = time.thread_time()
            collector.add(table)
            self._collected.count("add", start)
            yield table
        start = time.thread_time()
        columns = collector.finish()
        start = self._collected.count("finish", start)
        text = pack_statistics(TableStatistics(rows=chunk.rows, inputs=columns))
        self._collected.count("pack", start)
        self._collected.texts.append(text)


def main() -> None:
    """Score with statistics, then measure errors, and print."""
    open_registry()
    source, model = make_customers(ROWS), make_models()["mlp"]
    resolved = resolve_model(model)
    figures: dict[str, object] = {"machine": machine(), "rows": ROWS}
    with tempfile.TemporaryDirectory(dir=FOLDER) as destination:
        plan = plan_run(resolved, source, destination)
        with console.status(f"scoring {ROWS:,} rows"):
            figures |= score_with_statistics(plan, resolved, destination)
        shutil.rmtree(destination, ignore_errors=True)
        Path(destination).mkdir()
    with console.status("quantiles"):
        figures |= {"quantile_error": measure_shapes()}
    figures["quantile_error_max"] = max(figures["quantile_error"].values())  # type: ignore[attr-defined]
    one_chunk = np.random.default_rng(3).standard_normal(CHUNK_ROWS)
    figures["quantile_error_of_one_chunk"] = round(measure_error(one_chunk, CHUNK_ROWS), 5)
    figures["ns_per_value_alone"] = measure_kinds()
    show("Statistics", {"here": figures}, WANTED)
    print(json.dumps(figures))


def plan_run(resolved: Resolved, source: Path, destination: str) -> Plan:
    """Plan the run as batch_inference does, but for the tuning."""
    contract, options = resolved.contract({}, {}), BatchOptions(key_columns=("customer",), rows_per_chunk=CHUNK_ROWS)
    snapshot = pin_source(str(source), destination)
    return make_plan(
        key=run_key(resolved.pin, snapshot, contract, options),
        model=resolved.pin,
        contract=contract,
        options=options,
        source=snapshot,
        dataset=open_dataset(snapshot, [column.name for column in contract.columns], options.key_columns),
        sizes=Sizes(batch_size=2048, slots=CORES, row_bytes=136.0, rows_per_second=250_000),
    )


def score_with_statistics(plan: Plan, resolved: Resolved, destination: str) -> dict[str, object]:
    """Score every shard in a thread a core; return the cost of statistics, and their bytes beside the parts'."""
    collected, contract = Collected(), resolved.contract({}, {})
    loaded = load_model(resolved, contract).with_engine(plan.engine)
    scorer = Scorer(plan=plan, destination=open_storage(destination), model=loaded, max_reject_fraction=1.0)
    score.open_reader = lambda plan: CollectingReader(open_reader(plan), collected)  # type: ignore[assignment]
    shards = scorer.scheduler.begin()
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(CORES) as pool:
        rows = sum(result.rows for result in pool.map(scorer.score_shard, shards))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    values = ROWS * (len(FEATURES) + 1)
    part_bytes = sum(path.stat().st_size for path in Path(destination).glob("run=*/*.parquet"))
    own = sum(collected.seconds.values())
    return {
        "rows_per_second": round(rows / seconds),
        "rows_per_chunk": rows // len(collected.texts),
        "ns_per_value": round(own / values * 1e9, 2),
        "ns_per_value_by_step": {name: round(took / values * 1e9, 2) for name, took in collected.seconds.items()},
        "statistics_share": round(own / cpu, 4),
        "bytes_per_column": round(sum(map(len, collected.texts)) / len(collected.texts) / (len(FEATURES) + 1)),
        "bytes_share": round(sum(map(len, collected.texts)) / part_bytes, 4),
        **measure_sums(collected.texts, plan),
    }


def measure_sums(texts: list[str], plan: Plan) -> dict[str, object]:
    """Add the statistics of all chunks in several orders, and hold a column against its rows."""
    parts = [unpack_statistics(text, "a chunk") for text in texts]
    start = time.thread_time()
    whole = add_tables(parts)
    seconds = time.thread_time() - start
    random = np.random.default_rng(0)
    orders = [[parts[place] for place in random.permutation(len(parts))] for _ in range(3)]
    halves = add_tables([add_tables(parts[::2]), add_tables(parts[1::2])])
    expected = write_statistics(whole)
    rows = pq.read_table(plan.snapshot.root, columns=["f00"])["f00"].to_numpy().astype(np.float64)
    found = whole.inputs["f00"]
    return {
        "same_bytes_in_any_order": all(
            expected == write_statistics(each) for each in [*map(add_tables, orders), halves]
        ),
        "seconds_to_add_chunks": round(seconds, 3),
        "bytes_of_run": len(expected),
        "mean_error_in_deviations": round(abs(found.mean - rows.mean()) / rows.std(), 5),
        "deviation_error": round(abs(found.deviation / rows.std() - 1), 5),
    }


def measure_shapes(rows: int = 2_000_000) -> dict[str, float]:
    """Return the greatest error of any quantile from 1 to 99 %, in shares of rows, for columns of several shapes."""
    random = np.random.default_rng(1)
    shapes = {
        "normal": random.standard_normal(rows, dtype=np.float32),
        "far from zero": 1e6 + random.standard_normal(rows),
        "lognormal": np.exp(8 * random.standard_normal(rows)),
        "years": random.integers(1990, 2027, rows),
        "mostly zero": random.exponential(size=rows) * (random.random(rows) < 0.1),
        "repeats every 32 rows": np.arange(rows) % 32 + random.random(rows),
        "rises": np.arange(rows),
    }
    return {name: round(measure_error(values, CHUNK_ROWS), 5) for name, values in shapes.items()}


def measure_error(values: np.ndarray, chunk_rows: int) -> float:
    """Return how far the share of rows at a quantile's value is from the share that was asked for, at most."""
    chunks = [values[start : start + chunk_rows] for start in range(0, len(values), chunk_rows)]
    sketch = add_columns([collect_statistics(pa.table({"a": chunk}))["a"] for chunk in chunks]).quantiles
    shares = np.arange(1, 100) / 100
    found, ordered = np.array([sketch.quantile(share) for share in shares]), np.sort(values)
    below, up_to = (np.searchsorted(ordered, found, side) / len(values) for side in ("left", "right"))
    return float(np.maximum(np.maximum(below - shares, shares - up_to), 0).max())


def measure_kinds(rows: int = CHUNK_ROWS) -> dict[str, float]:
    """Return nanoseconds a value of a chunk of one column, by what is in it, with nothing else going on."""
    random = np.random.default_rng(2)
    number = random.standard_normal(rows, dtype=np.float32)
    columns = {
        "float32": pa.array(number),
        "float32 in a small chunk": pa.array(number[:SMALL_CHUNK_ROWS]),
        "float64": pa.array(number.astype(np.float64)),
        "int64": pa.array(random.integers(0, 1 << 40, rows)),
        "10 % null": pa.array(number, mask=random.random(rows) < 0.1),
        "time": pa.array(np.arange(rows) * 1_000_000, pa.timestamp("us")),
        "category": pa.array(random.choice(["basic", "plus", "pro", "max"], rows)),
        "unique text": pa.array([f"customer {at:08d}" for at in range(rows)]),
    }
    found = {name: measure_column(pa.table({"a": column}), sums_all=False) for name, column in columns.items()}
    return {**found, "float32 with sums of every row": measure_column(pa.table({"a": number}), sums_all=True)}


def measure_column(table: pa.Table, *, sums_all: bool) -> float:
    """Return the least nanoseconds a value of ten times."""
    found = []
    for _ in range(10):
        start = time.thread_time()
        collect_statistics(table, sums_all=sums_all)
        found.append(time.thread_time() - start)
    return round(min(found) / table.num_rows * 1e9, 1)


if __name__ == "__main__":
    main()
