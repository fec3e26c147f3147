"""Rows that end the model's process, in one run: segfaults, passes that take too much memory, and passes that hang.

The same dataset is scored with such rows and without any. What is asserted: the run is published, exactly those rows
are rejected, each with its reason, and all other predictions are the same. ROWS from the environment. The last line is
one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console

from flows import BatchOptions, batch_inference, open_predictions, open_rejects
from tests.benchmarks.shared import FOLDER, machine, open_registry, prefect, use_experiment
from tests.support import register_script

ROWS = int(os.environ.get("ROWS", "1000000"))
SEGFAULT, EAT, HANG = -1.0, -2.0, -3.0
COUNTS = {SEGFAULT: 20, EAT: 5, HANG: 5}
REASONS = {
    SEGFAULT: "the model's process died (SIGSEGV)",
    EAT: "MemoryError: ",
    HANG: "the model took longer than 5 s",
}
LINE = f"""
        import ctypes
        values = model_input["a"].to_numpy()
        if (values == {SEGFAULT}).any(): ctypes.string_at(0)
        if (values == {EAT}).any(): self.eaten = bytearray(8 << 30)
        if (values == {HANG}).any(): time.sleep(3600)
"""
OPTIONS = BatchOptions(key_columns=("key",), pass_seconds_max=5, pass_memory_mb=1024, experiment=None)


def main() -> None:
    """Score both datasets, compare, and print."""
    open_registry()
    use_experiment("isolation")
    model = register_script("dangerous", LINE.strip())
    drawn = np.random.default_rng(0)
    places = drawn.choice(ROWS, sum(COUNTS.values()), replace=False)
    actions = np.repeat(list(COUNTS), list(COUNTS.values())).astype(np.float32)
    values = drawn.random(ROWS, dtype=np.float32)
    dangerous = values.copy()
    dangerous[places] = actions
    seconds = {}
    with prefect():
        # The first call imports and tunes for both.
        for name, column in (("first", values), ("undisturbed", values), ("dangerous", dangerous)):
            source, destination = FOLDER / f"isolation-{name}", FOLDER / f"isolation-{name}-scores"
            shutil.rmtree(destination, ignore_errors=True)
            write_source(source, column)
            start = time.perf_counter()
            batch_inference(model, str(source), str(destination), OPTIONS)
            seconds[name] = round(time.perf_counter() - start, 2)
    rejects = check_rejects(FOLDER / "isolation-dangerous-scores", places, actions)
    check_predictions(places)
    found = {
        "machine": machine(),
        "rows": ROWS,
        "rejects": rejects,
        "seconds": seconds,
        "seconds_lost_per_row": round((seconds["dangerous"] - seconds["undisturbed"]) / len(places), 2),
    }
    Console().print(found)
    print(json.dumps(found))


def write_source(folder: Path, values: np.ndarray) -> None:
    """Write the dataset in four files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = pl.DataFrame({"key": np.arange(ROWS), "a": values})
    for at, part in enumerate(table.iter_slices(-(-ROWS // 4))):
        part.write_parquet(folder / f"{at}.parquet", row_group_size=65_536)


def check_rejects(destination: Path, places: np.ndarray, actions: np.ndarray) -> dict[str, int]:
    """Hold the rejects against the rows that were made so; return how many there are of each reason."""
    frame = open_rejects(str(destination)).collect()
    found = dict(zip(frame["key"].to_list(), frame["reject_reason"].to_list(), strict=True))
    expected = {int(row): REASONS[float(action)] for row, action in zip(places, actions, strict=True)}
    assert expected == found, (expected, found)
    return dict(Counter(found.values()))


def check_predictions(places: np.ndarray) -> None:
    """Hold the predictions of all other rows against those of the undisturbed run."""
    frames = []
    for name in ("undisturbed", "dangerous"):
        frame = open_predictions(str(FOLDER / f"isolation-{name}-scores")).collect()
        frames.append(frame.filter(~pl.col("key").is_in(places)).sort("key").select("key", "prediction"))
    assert len(frames[0]) == ROWS - len(places)
    assert frames[0].equals(frames[1])


if __name__ == "__main__":
    main()
