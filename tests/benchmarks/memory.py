"""The memory that a run states before it starts, beside what its process takes: rows small and large, even and uneven.

Each shape is scored in a process of its own, whose peak is counted over what it took idle: several times by a model
that takes no time, so that writers are busy and the allocator keeps what it ever does, and then by one that takes
SECONDS in all, so that what is read ahead waits for it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.model.contract import Column, Contract, Input, Output
from serving.model.encoding import Encoded
from serving.model.pin import ModelPin
from tasks.batch.chunk_layout import Sizes
from tasks.batch.dataset import open_dataset
from tasks.batch.memory import memory_bytes
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan, make_plan
from tasks.batch.score import Scorer
from tasks.batch.source import pin_source
from tasks.batch.tuning import measure_row_bytes, read_first_rows
from tasks.storage import open_storage
from tests.benchmarks.figures import show

SCALE = float(os.environ.get("SCALE", "1"))
SECONDS = float(os.environ.get("SECONDS", "8"))
# Slots seldom peak together, and what threads have left behind counts. More runs find a little more: twenty took up to
# 115 % of what is stated, where six took 80 to 115 %.
FAST_RUNS = 6
BATCH, SLOTS = 1024, 2
PIN = ModelPin(name="sum", version="1", model_id="m", source="models:/m", digest="d" * 64)

Groups = Generator[pa.Table]


def floats(rows: int, columns: int = 2, **more: object) -> pa.Table:
    """Return columns a0, a1, ... of random float32, and a key."""
    random = np.random.default_rng(rows)
    values = {f"a{at}": random.random(rows, dtype=np.float32) for at in range(columns)}
    return pa.table({"k": np.arange(rows), **values, **more})


def long_texts(rows: int, distinct: int) -> pa.Array:
    """Return texts of 100 kB that do not compress, so many of them different."""
    random = np.random.default_rng(0)
    texts = [random.bytes(50_000).hex() for _ in range(distinct)]
    return pa.array([texts[at % distinct] for at in range(rows)])


def scaled(rows: int) -> int:
    return max(BATCH, int(rows * SCALE))


def tiny() -> Groups:
    for _ in range(4):
        yield floats(scaled(1_000_000))


def wide() -> Groups:
    for _ in range(2):
        yield floats(scaled(100_000), 200)


def uuids() -> Groups:
    for _ in range(4):
        rows = scaled(250_000)
        noise = np.random.default_rng(1).bytes(16 * rows).hex()
        yield floats(rows).set_column(0, "k", pa.array([noise[32 * at : 32 * at + 32] for at in range(rows)]))


def large_at_the_end() -> Groups:
    small = floats(scaled(100_000))
    yield small.set_column(0, "k", small["k"].cast(pa.string()))
    rows = scaled(6144)
    yield floats(rows).set_column(0, "k", long_texts(rows, rows))


def repeated() -> Groups:
    rows = scaled(6144)
    yield floats(rows).set_column(0, "k", long_texts(rows, 7))


def between_short_ends() -> Groups:
    texts = pa.array(["a", *("m" * size for size in (300, 500, 700)), "z"])
    for _ in range(4):
        rows = scaled(100_000)
        yield floats(rows).set_column(0, "k", texts.take(pa.array(np.arange(rows) % len(texts))))


def repeated_then_not() -> Groups:
    """A column of more than 64 MiB in the file: texts of a dictionary, then so many others that it is given up."""
    rows = scaled(8192)
    texts = pa.concat_arrays([long_texts(rows, 7), long_texts(rows // 8, rows // 8)])
    yield floats(len(texts)).set_column(0, "k", texts)


def lists() -> Groups:
    for _ in range(2):
        rows = scaled(50_000)
        values = np.random.default_rng(2).random(rows * 784, dtype=np.float32)
        yield pa.table({"k": np.arange(rows), "v": pa.ListArray.from_arrays(np.arange(rows + 1) * 784, values)})


def nested() -> Groups:
    rows = scaled(200_000)
    names = pa.array([f"customer {at} of a city far away" for at in range(rows)])
    key = pa.StructArray.from_arrays([pa.array(np.arange(rows)), names], ["id", "name"])
    yield floats(rows).set_column(0, "k", key)


SHAPES: dict[str, Callable[[], Groups]] = {
    each.__name__: each
    for each in (tiny, wide, uuids, large_at_the_end, repeated, between_short_ends, repeated_then_not, lists, nested)
}


class Summing:
    """A model that adds up what it is given."""

    slots = SLOTS

    def __init__(self, seconds_per_pass: float = 0.0) -> None:
        self._seconds_per_pass = seconds_per_pass

    def prepare(self, encoded: Encoded) -> Encoded:
        return encoded

    @contextmanager
    def slot(self) -> Generator[None]:
        yield

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._seconds_per_pass:
            time.sleep(self._seconds_per_pass)
        (x,) = inputs.values()
        return {"score": x.reshape(len(x), -1).sum(axis=1, dtype=np.float32)}


def contract_of(schema: pa.Schema) -> Contract:
    if "v" in schema.names:
        columns: tuple[Column, ...] = (Column(name="v", dtype="float32", shape=(784,)),)
        given = Input(name="v", dtype="float32", shape=(784,), columns=columns)
    else:
        columns = tuple(Column(name=name, dtype="float32") for name in schema.names if name != "k")
        given = Input(name="x", dtype="float32", shape=(len(columns),), columns=columns)
    return Contract(inputs=(given,), outputs=(Output(name="score", dtype="float32"),))


def plan_of(source: Path, destination: Path) -> Plan:
    """Plan a run as a call does, with a batch size of its own."""
    snapshot = pin_source(str(source), str(destination))
    contract = contract_of(pq.read_schema(next(source.glob("*.parquet"))))
    options = BatchOptions(key_columns=("k",))
    dataset = open_dataset(snapshot, [column.name for column in contract.columns], ("k",))
    sizes = Sizes(
        batch_size=BATCH,
        slots=SLOTS,
        row_bytes=measure_row_bytes(read_first_rows(contract, options, dataset), dataset),
        rows_per_second=None,
    )
    return make_plan(
        key="k", model=PIN, contract=contract, options=options, source=snapshot, dataset=dataset, sizes=sizes
    )


def score(plan: Plan, destination: Path, seconds: float = 0.0) -> None:
    model = Summing(seconds * SLOTS * BATCH / plan.rows)
    scorer = Scorer(plan=plan, destination=open_storage(str(destination)), model=model, max_reject_fraction=1.0)
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(scorer.score_shard, scorer.scheduler.begin()))


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def measure(folder: Path) -> dict[str, int]:
    """Score a small table first, so that what a process loads once is not counted; then the dataset."""
    score(plan_of(folder / "warm", folder / "warm-out"), folder / "warm-out")
    plan = plan_of(folder / "in", folder / "out")
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    idle = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for at, seconds in enumerate([0.0] * FAST_RUNS + [SECONDS]):
        score(plan, folder / f"out-{at}", seconds)
    stated, used = memory_bytes(plan, SLOTS), status("VmHWM") - idle
    return {
        "stated_mb": stated >> 20,
        "used_mb": used >> 20,
        "used_percent": round(100 * used / stated),
        "chunks": len(plan.chunks),
        "rows": plan.rows,
    }


def measure_shape(name: str) -> dict[str, int]:
    """Write the dataset of a shape, and measure it in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for place in ("in", "warm"):
            (folder / place).mkdir()
        writer = None
        for group in SHAPES[name]():
            writer = writer or pq.ParquetWriter(folder / "in" / "a.parquet", group.schema)
            writer.write_table(group)
            pq.write_table(group.slice(0, 10), folder / "warm" / "a.parquet")
        if writer is not None:
            writer.close()
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.memory", scratch], stdout=subprocess.PIPE, text=True, check=True
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]))))
        return
    chosen = os.environ.get("SHAPES", " ".join(SHAPES)).split()
    found = {name: measure_shape(name) for name in chosen}
    show("Memory over an idle process, two slots", found, {"used_percent": "80 to 120, or within 32 MiB a slot"})
    print(json.dumps({"benchmark": "memory", **found}))


if __name__ == "__main__":
    main()
