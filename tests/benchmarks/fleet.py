"""`make simulate-fleet`: ten billion rows on a thousand spot workers, as a table and one JSON object on the last line.

Plans the run for real, over 10,000 Parquet files of this disk; publishes it for real, from the footers of all parts,
out of a store in memory that takes 30 ms for each read; and has the workers score it in simulated time, by the real
chunk scheduler (tests/simulation/fleet.py). FLEET_PLOT names a PNG for the plot of the parts over time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from serving.model.encoding import Flags
from tasks.batch.chunk_layout import Chunk
from tasks.batch.dataset import SOURCE_FILE, SOURCE_ROW
from tasks.batch.options import BatchOptions
from tasks.batch.parts import encode_part, part_path
from tasks.batch.plan import Plan, digest_chunk
from tasks.batch.publish import audit_parts, publish
from tasks.batch.run_records import load_plan, save_plan
from tasks.storage import Entry, LocalStorage
from tasks.storage.objects import READS_AT_ONCE
from tests.benchmarks.figures import show
from tests.benchmarks.shared import FEATURES, FOLDER, console, machine
from tests.simulation.fleet import GROUPS, ROWS_PER_GROUP, SIZES, Fleet, FleetResult, simulate_fleet
from tests.tasks.batch.small import a_contract, a_plan, parquet

WORKERS = int(os.environ.get("WORKERS", "1000"))
FILES = int(os.environ.get("FILES", "10000"))
SEED = int(os.environ.get("SEED", "1"))
FLEET = Fleet(workers=WORKERS)
BOUNDS = {"doubled_work": 0.02, "planning_seconds": 60, "planning_peak_mib": 1024, "publish_seconds": 120}
# Of S3 Standard in us-east-1, in dollars for 1,000 calls: https://aws.amazon.com/s3/pricing/
PRICES = {"LIST": 0.005, "PUT": 0.005, "HEAD": 0.0004, "GET": 0.0004}


def write_source(folder: Path) -> Path:
    """Write one file of a million rows and link it under ten thousand names; return their folder."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    table = pa.table({name: np.zeros(GROUPS * ROWS_PER_GROUP, np.float64) for name in FEATURES})
    (source / "part-00000.parquet").write_bytes(parquet(table, row_group_size=ROWS_PER_GROUP))
    for at in range(1, FILES):
        os.link(source / "part-00000.parquet", source / f"part-{at:05d}.parquet")
    return source


def plan_run(source: Path, destination: LocalStorage) -> Plan:
    """Plan the run as a call does, and read the plan back as each worker does."""
    options = BatchOptions(workers=WORKERS)
    plan = a_plan(str(source), destination.url, options, contract=a_contract(*FEATURES), sizes=SIZES)
    save_plan(destination, plan)
    loaded = load_plan(destination, plan.run)
    assert loaded is not None
    return loaded


class PartsInMemory:
    """A destination that has every part of a plan, as its footer alone; a read takes 30 ms."""

    url = "memory://fleet"
    reads_at_once = READS_AT_ONCE

    def __init__(self, plan: Plan) -> None:
        alike: dict[int, _Part] = {}
        self._parts: dict[str, _Part] = {}
        for at, chunk in plan.chunks.items():
            part = alike.get(chunk.rows) or alike.setdefault(chunk.rows, _make_part(plan, chunk))
            self._parts[part_path(plan, at)] = replace(part, digest=digest_chunk(plan, chunk).encode())
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        """Return the parts, page by page, or nothing of another folder."""
        found = [path for path in self._parts if path.startswith(f"{prefix}/")]
        pages = len(found) // 1000 + 1
        self._wait("LIST", pages * FLEET.list_seconds, pages)
        return [Entry(path=path, size=self._parts[path].size, tag="") for path in found]

    def open_pinned(self, entry: Entry) -> pa.NativeFile:
        """Open a part, whose footer bears the digest of its chunk."""
        return pa.PythonFile(_PartStream(self, self._parts[entry.path]), mode="r")

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        """Create an object."""
        self._wait("PUT", FLEET.put_seconds)
        is_new = path not in self._objects
        self._objects.setdefault(path, bytes(data))
        return is_new

    def read(self, path: str) -> bytes | None:
        """Return an object that was put."""
        self.wait_for_read()
        return self._objects.get(path)

    def delete(self, paths: list[str]) -> None:
        """Delete nothing: there is nothing to delete."""
        assert not paths

    def torn_writes(self, prefix: str) -> list[Entry]:
        """Return none: an object store has no torn writes."""
        return []

    def delete_torn_writes(self, prefix: str) -> None:
        """Delete nothing: an object store has no torn writes."""

    def address(self, path: str) -> str:
        """Return the address of an object."""
        return f"{self.url}/{path}"

    @property
    def bytes_put(self) -> int:
        """The bytes of all objects that were put."""
        return sum(map(len, self._objects.values()))

    def wait_for_read(self) -> None:
        """Take as long as a read takes."""
        self._wait("GET", FLEET.head_seconds)

    def _wait(self, kind: str, seconds: float, count: int = 1) -> None:
        with self._lock:
            self.calls[kind] += count
        time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class _Part:
    """The size of a part, and its end, which bears the digest of its chunk in the place of that of another."""

    size: int
    end: bytes
    digest_there: bytes
    digest: bytes

    def read_end(self) -> bytes:
        return self.end.replace(self.digest_there, self.digest)


def _make_part(plan: Plan, chunk: Chunk) -> _Part:
    keys = pa.table({SOURCE_FILE: ["part-00000.parquet"] * chunk.rows, SOURCE_ROW: np.arange(chunk.rows)})
    scores = {"score": np.zeros((chunk.rows, 1), np.float32)}
    part = bytes(encode_part(plan, chunk, keys, scores, Flags.all_good(chunk.rows), plan.batch_size))
    digest = digest_chunk(plan, chunk).encode()
    return _Part(len(part), part[-(64 << 10) :], digest, digest)


class _PartStream:
    """A part of which only the end is there."""

    closed = False

    def __init__(self, storage: PartsInMemory, part: _Part) -> None:
        self._storage, self._part, self._end, self._at = storage, part, part.read_end(), 0

    def size(self) -> int:
        return self._part.size

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.size())[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = None) -> bytes:
        self._storage.wait_for_read()
        start = self._at - (self.size() - len(self._end))
        assert start >= 0, "only the footer is read"
        data = self._end[start:] if size is None or size < 0 else self._end[start : start + size]
        self._at += len(data)
        return data

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


def draw(result: FleetResult, plan: Plan, path: Path) -> None:
    """Draw the parts over time, beside what machines without any loss would have made."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    chunks = len(plan.chunks)
    minutes = range(1, len(result.parts_by_minute) + 1)
    ideal = FLEET.rows_per_second * WORKERS * 60 / (plan.rows / chunks)
    axis.plot(minutes, result.parts_by_minute, color="#2f6f9f", label=f"{WORKERS:,} spot workers")
    axis.plot(minutes, [min(chunks, ideal * at) for at in minutes], color="grey", linestyle=":", label="no loss at all")
    axis.set(xlabel="minutes since the first worker was asked for", ylabel="parts", xlim=0, ylim=0)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> int:
    """Run the three steps; return 1 where a bound is broken."""
    folder = FOLDER / "fleet"
    destination = LocalStorage(folder / "out")
    shutil.rmtree(destination.root, ignore_errors=True)
    console.print("Linking the files of the source ...")
    source = write_source(folder)

    console.print("Planning ...")
    began, processor = time.perf_counter(), time.process_time()
    plan = plan_run(source, destination)
    planning, planning_cpu = time.perf_counter() - began, time.process_time() - processor
    planning_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    plan_bytes = len(destination.read(f"{plan.folder}/plan.json") or b"")

    console.print("Publishing ...")
    parts = PartsInMemory(plan)
    began = time.perf_counter()
    audit = audit_parts(parts, plan)  # type: ignore[arg-type]  # what publishing does not call is left out
    publish(parts, plan, audit)  # type: ignore[arg-type]
    publishing = time.perf_counter() - began

    console.print("Scoring in simulated time ...")
    began = time.perf_counter()
    result = simulate_fleet(plan, FLEET, seed=SEED)
    calls = result.calls + parts.calls
    figures = {
        "workers": WORKERS,
        "rows": plan.rows,
        "shards": len(plan.shards),
        "chunks": len(plan.chunks),
        "planning_seconds": round(planning, 1),
        "planning_cpu_seconds": round(planning_cpu, 1),
        "planning_peak_mib": planning_peak,
        "plan_mb": round(plan_bytes / 1e6, 1),
        "manifest_mb": round(parts.bytes_put / 1e6, 1),
        "publish_seconds": round(publishing, 1),
        "doubled_work": round(result.doubled_work, 5),
        "lost_to_kills": round(result.lost_work, 5),
        "kills": result.kills,
        "hours_to_finish": round(result.seconds / 3600, 3),
        "hours_without_loss": round(plan.rows / FLEET.rows_per_second / WORKERS / 3600, 3),
        "worker_hours_over_least": round(result.worker_seconds / (plan.rows / FLEET.rows_per_second), 3),
        "tasks_in_prefect": result.shard_tasks,
        **{f"{kind.lower()}_calls": count for kind, count in sorted(calls.items())},
        "calls_usd": round(sum(PRICES[kind] * count / 1000 for kind, count in calls.items()), 2),
        "simulation_seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
    }
    if "FLEET_PLOT" in os.environ:
        draw(result, plan, Path(os.environ["FLEET_PLOT"]))
    broken = [name for name, most in BOUNDS.items() if figures[name] > most]
    show("A fleet of spot workers", {"": figures}, {name: f"at most {most:g}" for name, most in BOUNDS.items()})
    print(json.dumps(figures))
    if broken:
        console.print(f"Beyond its bound: {', '.join(broken)}.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
