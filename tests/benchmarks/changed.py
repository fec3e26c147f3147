"""`make bench-changed`: what a run costs of which only some files changed, as a table and one JSON object last.

A synthetic table of 10,000,000 customers x 32 float32 features in 100 Parquet files, the network 32-256-256-1, a real
Prefect server. Each round scores all of it, then 1 of 100 files is written anew, then none, then 10 of 100; each call
is a process of its own. The table of each is held against that of a run of all rows at a destination of its own, byte
for byte: the sizes of batches and chunks are given, since a tuning in between would choose others for the latter.
ROWS=... takes fewer rows, ROUNDS=... rounds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from tests.benchmarks.figures import show
from tests.benchmarks.shared import (
    FEATURES,
    FOLDER,
    ROUNDS,
    ROWS,
    console,
    machine,
    measure,
    open_registry,
    prefect,
    use_experiment,
)
from tests.support import register_mlp

FILES, BATCH_SIZE = 100, 1024
SOURCE, SCORES, FULL = FOLDER / "changing", FOLDER / "changing-out", FOLDER / "changing-full"
CASES = {"one_percent": 1, "nothing": 0, "ten_percent": 10}
WANTED = {
    "scoring_of_full": "1 of 100 files: at most 0.03; 10: at most 0.12",
    "seconds_beyond_scoring": "at most 5",
    "seconds": "nothing changed: under 5",
    "bytes_equal": "1",
    "key_check_share": "at most 0.1",
}


def main() -> None:
    """Measure every case, and print the table, then the figures as JSON."""
    open_registry()
    use_experiment("bench")
    model = register_mlp("changing", FEATURES)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with prefect():
        for at in track(range(ROUNDS), "changed files", console=console):
            for folder in (SOURCE, SCORES):
                shutil.rmtree(folder, ignore_errors=True)
            write_files(range(FILES), seed=0)
            found["all"].append(call(model, SCORES))
            for name, files in CASES.items():
                write_files(range(files), seed=1 + files + 100 * at)
                found[name].append(call(model, SCORES))
                shutil.rmtree(FULL, ignore_errors=True)
                full = call(model, FULL) if files else None
                found[name][-1]["bytes_equal"] = int(digest_table(SCORES) == digest_table(FULL)) if full else 1
                if full:
                    found["full"].append(full)
    figures = {name: summarize(found[name], found["full"]) for name in ("full", *CASES)}
    show(f"{ROWS:,} rows in {FILES} files, medians of {ROUNDS}; {machine()}", figures, WANTED)
    told = {
        "one_percent_changed_of_full": figures["one_percent"]["scoring_of_full"],
        "ten_percent_changed_of_full": figures["ten_percent"]["scoring_of_full"],
        "nothing_changed_seconds": figures["nothing"]["seconds"],
        "bytes_equal": min(figures[name]["bytes_equal"] for name in CASES),
        "key_check_share": figures["full"]["key_check_share"],
    }
    print(json.dumps({"rows": ROWS, "machine": machine(), **told, "figures": figures, "rounds": found}))


def write_files(files: range, seed: int) -> None:
    """Write some of the files, with other numbers for another seed and the same keys."""
    SOURCE.mkdir(parents=True, exist_ok=True)
    count = ROWS // FILES
    for at in files:
        random = np.random.default_rng((seed, at))
        columns: dict[str, Any] = {"customer": np.arange(at * count, (at + 1) * count)}
        columns |= {name: random.standard_normal(count, dtype=np.float32) for name in FEATURES}
        pq.write_table(pa.table(columns), SOURCE / f"customers-{at:03d}.parquet")


def call(model: str, destination: Path) -> dict[str, Any]:
    """Make one call in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.batch_child", "overnight", model, str(SOURCE), str(destination)]
    options = {"experiment": None, "batch_size": BATCH_SIZE, "rows_per_chunk": 256 * BATCH_SIZE}
    return measure([*command, json.dumps(options)])


def digest_table(destination: Path) -> str:
    """Return the digest of the parts of the newest run of a destination, in the order of its table."""
    from tasks.batch.manifest import find_newest_run
    from tasks.storage import open_storage

    manifest = find_newest_run(open_storage(str(destination)))
    digest = hashlib.sha256()
    for part in manifest.parts if manifest else ():
        digest.update((destination / part.path).read_bytes())
    return digest.hexdigest()


def summarize(calls: list[dict[str, Any]], full: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of calls, and their scoring beside that of full runs."""
    seconds, score = (statistics.median(each.get(name, 0.0) for each in calls) for name in ("seconds", "score"))
    of_full = score / statistics.median(each["score"] for each in full)
    return {
        "rows_scored": calls[-1]["rows"],
        "seconds": round(seconds, 2),
        "scoring_seconds": round(score, 2),
        "scoring_of_full": round(of_full, 4),
        "seconds_beyond_scoring": round(seconds - score, 2),
        "bytes_equal": min(each.get("bytes_equal", 1) for each in calls),
        "key_check_share": round(statistics.median(each.get("check keys", 0.0) / each["seconds"] for each in calls), 4),
    }


if __name__ == "__main__":
    main()
