"""What the benchmarks share: the table, the models, and processes that run in turn.

ROWS, ROUNDS and BENCH_FOLDER are taken from the environment.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

if TYPE_CHECKING:
    from infra.local.prefect_server import PrefectServer

ROWS = int(os.environ.get("ROWS", "10000000"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
FOLDER = Path(os.environ.get("BENCH_FOLDER", ".bench")).absolute()
FEATURES = tuple(f"f{at:02d}" for at in range(32))
ROWS_PER_FILE = 500_000
ROWS_PER_GROUP = 125_000

console = Console(stderr=True)


def machine() -> str:
    """Name the machine that the figures are of."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def open_registry() -> None:
    """Point MLflow at the registry of the benchmarks."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{FOLDER / 'mlflow.db'}"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    FOLDER.mkdir(parents=True, exist_ok=True)


@contextmanager
def prefect() -> Generator[PrefectServer]:
    """Run a fresh Prefect server, and point flows at it."""
    from infra.local.prefect_server import prefect_server

    shutil.rmtree(FOLDER / "prefect", ignore_errors=True)
    with prefect_server(FOLDER / "prefect") as server:
        os.environ.update(server.environment)
        os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
        yield server


@contextmanager
def on_s3() -> Generator[str]:
    """Run the real S3 server, which keeps what it had, and point storage at it; yield its address."""
    from infra.local.s3 import s3_server

    with s3_server(FOLDER / "s3") as server:
        os.environ.update(server.environment)
        if not (FOLDER / "s3" / "lake.done").exists():
            server.create_bucket("lake")
            (FOLDER / "s3" / "lake.done").touch()
        yield server.endpoint_url


def upload(folder: Path) -> str:
    """Put the files of a dataset on S3, each unless it is there, and return their address."""
    from tasks.storage import open_storage

    address = f"s3://lake/{folder.name}"
    storage = open_storage(address)
    for path in track(sorted(folder.glob("*.parquet")), f"to {address}", console=console):
        if not storage.exists(path.name):
            storage.put_new(path.name, path.read_bytes())
    return address


def clear(destination: str) -> None:
    """Delete whatever lies at a destination."""
    from tasks.storage import open_storage

    if destination.startswith("s3://"):
        storage = open_storage(destination)
        storage.delete([entry.path for entry in storage.entries()])
    else:
        shutil.rmtree(destination, ignore_errors=True)


def use_experiment(name: str) -> None:
    """Log models to an experiment whose files lie in the benchmarks' folder."""
    import mlflow

    client = mlflow.MlflowClient()
    if client.get_experiment_by_name(name) is None:
        client.create_experiment(name, artifact_location=(FOLDER / "mlruns").as_uri())
    mlflow.set_experiment(name)


def make_customers(rows: int, rows_per_group: int = ROWS_PER_GROUP, dtype: str = "float32") -> Path:
    """Write the table once: 500,000 rows a file in row groups of 125,000, seeded by file."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"customers-{rows}" + (f"-{rows_per_group}" if rows_per_group != ROWS_PER_GROUP else "")
    folder = FOLDER / (name if dtype == "float32" else f"{name}-{dtype}")
    if (folder / "_done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for at, start in track(
        list(enumerate(range(0, rows, ROWS_PER_FILE))), f"writing {rows:,} customers", console=console
    ):
        count = min(ROWS_PER_FILE, rows - start)
        random = np.random.default_rng(at)
        columns = {"customer": np.arange(start, start + count)}
        columns |= {name: random.standard_normal(count, dtype=np.dtype(dtype)) for name in FEATURES}
        pq.write_table(pa.table(columns), folder / f"customers-{at:03d}.parquet", row_group_size=rows_per_group)
    (folder / "_done").touch()
    return folder


def make_files(files: int) -> Path:
    """Write a million customers once, into as many files as asked for."""
    import polars as pl
    import pyarrow.parquet as pq

    folder = FOLDER / f"files-{files}"
    if (folder / "_done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    table = pl.read_parquet(make_customers(1_000_000) / "*.parquet").to_arrow()
    for at in track(range(files), f"writing {files:,} files", console=console):
        start, stop = table.num_rows * at // files, table.num_rows * (at + 1) // files
        pq.write_table(table.slice(start, stop - start), folder / f"customers-{at:05d}.parquet")
    (folder / "_done").touch()
    return folder


def make_models() -> dict[str, str]:
    """Register the network, and the model that sleeps 1 s a batch, once."""
    done = FOLDER / "models.json"
    if not done.exists():
        from tests.support import register_mlp, register_sleepy

        # Other benchmarks may have made them before.
        use_experiment("overnight")
        use_experiment("bench")
        done.write_text(json.dumps({"mlp": register_mlp("mlp", FEATURES), "sleepy": register_sleepy("sleepy", 1.0)}))
    return dict(json.loads(done.read_text()))


def in_turn(runs: dict[Any, Callable[[], Any]], title: str, figure: Callable[[Any], float]) -> dict[Any, float]:
    """Run each in turn, as many rounds as asked for, and return the median of each."""
    found: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in track(range(ROUNDS), title, console=console):
        for name, run in runs.items():
            found[name].append(figure(run()))
    return {name: statistics.median(values) for name, values in found.items()}


def child(kind: str, model: str, source: Path, **options: Any) -> dict[str, float]:
    """Run one measurement of batch_child in a process of its own."""
    destination = FOLDER / "out"
    shutil.rmtree(destination, ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.batch_child", kind, model, str(source), str(destination)]
    return measure([*command, json.dumps(options)])


def measure(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a process and return the JSON object that it prints last."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "BEGUN": str(time.time()), **(environment or {})},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    # Some libraries have a last word of their own.
    return dict(json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]))
