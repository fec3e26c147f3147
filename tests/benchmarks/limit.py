"""What the machine allows: four kernels alone, each at its best on all cores; nothing here is the product's.

Reads the table to Arrow, copies columns to [F, N], passes the network forward, writes keys and scores as
Parquet. Prints the seconds a row of each as JSON. Shapes: N rows, F features.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlflow.pytorch
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

FEATURES = [f"f{at:02d}" for at in range(32)]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ROUNDS = 3
SECONDS = 0.3
Job = Callable[[], int]


def main() -> None:
    model, source = sys.argv[1:]
    files = sorted(str(path) for path in Path(source).glob("*.parquet"))[: 2 * CORES]
    tables = [pq.ParquetFile(path).read_row_group(0, columns=["customer", *FEATURES]) for path in files[:CORES]]
    network = mlflow.pytorch.load_model(model)
    kernels = {
        "read": [readers(files, use_threads=False), readers(files, use_threads=True), [partial(read_polars, files)]],
        "copy": [[partial(copy, table, rows) for table in tables] for rows in (8192, 16384, 125_000)],
        "forward": [[partial(call, batch)] * slots for call in forwards(network) for batch, slots in settings()],
        "write": [[partial(write, table, way) for table in tables] for way in ("snappy", "zstd", "none")],
    }
    print(json.dumps({name: min(seconds_a_row(way) for way in ways) for name, ways in kernels.items()}))


def seconds_a_row(jobs: Sequence[Job]) -> float:
    """Run jobs side by side, each over and over for a while, and return the best round's seconds a row."""
    threads = max(1, CORES // len(jobs))

    def keep_on(job: Job) -> float:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            job()
            start, rows = time.perf_counter(), 0
            while (taken := time.perf_counter() - start) < SECONDS or not rows:
                rows += job()
        return rows / taken

    with ThreadPoolExecutor(len(jobs)) as pool:
        return min(1 / sum(pool.map(keep_on, jobs)) for _ in range(ROUNDS))


def readers(files: Sequence[str], *, use_threads: bool) -> list[Job]:
    """Read by pyarrow: a file a core with one thread each, or one after the other with all threads."""
    shares = [files] if use_threads else [files[at::CORES] for at in range(CORES)]
    return [partial(read_arrow, share, use_threads) for share in shares]


def read_arrow(files: Sequence[str], use_threads: bool) -> int:  # noqa: FBT001 - bound by partial
    rows = 0
    for path in files:
        file = pq.ParquetFile(path, memory_map=True)
        for group in range(file.num_row_groups):
            rows += file.read_row_group(group, columns=["customer", *FEATURES], use_threads=use_threads).num_rows
    return rows


def read_polars(files: Sequence[str]) -> int:
    return sum(pl.read_parquet(path, columns=["customer", *FEATURES]).height for path in files)


def copy(table: pa.Table, rows: int) -> int:
    for start in range(0, table.num_rows, rows):
        some = table.slice(start, rows)
        buffer_FN = np.empty((len(FEATURES), some.num_rows), dtype=np.float32)
        for out_N, name in zip(buffer_FN, FEATURES, strict=True):
            out_N[:] = some.column(name).chunk(0).to_numpy()
    return table.num_rows


def settings() -> list[tuple[int, int]]:
    """Batch sizes and slots: a thread a core, or one with all threads."""
    return [(batch, slots) for slots in dict.fromkeys((CORES, 1)) for batch in (512, 1024, 2048, 4096, 8192)]


def forwards(network: Any) -> list[Callable[[int], int]]:
    """The network as MLflow loads it, and its layers by hand through oneDNN where torch has that."""
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [network]
    values = list(network.parameters())
    layers = list(zip(values[::2], values[1::2], strict=True))
    if torch.backends.mkldnn.is_available():

        def by_hand(x: torch.Tensor) -> torch.Tensor:
            for weight, bias in layers[:-1]:
                x = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, *layers[-1], "none", [], "")

        ways.append(by_hand)
    return [partial(forward, way) for way in ways]


def forward(way: Callable[[torch.Tensor], torch.Tensor], batch: int) -> int:
    x_NF = inputs(batch)
    way(x_NF)
    return batch


_inputs: dict[int, torch.Tensor] = {}


def inputs(batch: int) -> torch.Tensor:
    return _inputs.setdefault(batch, torch.randn(batch, len(FEATURES), generator=torch.Generator().manual_seed(0)))


def write(table: pa.Table, compression: str) -> int:
    scores = pa.table({"customer": table["customer"], "score": table["f00"]})
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(scores, Path(folder) / "part.parquet", compression=compression, use_dictionary=False)
    return table.num_rows


if __name__ == "__main__":
    main()
