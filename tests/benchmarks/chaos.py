"""`make chaos`: two workers on one run under SIGKILL at random times, as a table and one JSON object on the last line.

The flights of the demo, or with ROWS=... the synthetic customers of `make bench-batch`, scored on the local disk
and on a real S3 server by two processes that make the same call, through a model that is slow enough for the run
to last ten times the mean time between two kills of a worker. Some kills wait for a part to be written, some for a
worker to publish or to start. What comes out is held against an undisturbed run byte by byte, and against the
source row by row; a difference ends this with 1. SEED=... draws other kills, WORK_SECONDS=... makes it longer.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import show
from tests.benchmarks.kills.board import PHASES
from tests.benchmarks.kills.command import report_in, worker_command
from tests.benchmarks.kills.crew import Attempt, run_workers
from tests.benchmarks.kills.killer import Killer, Usual
from tests.benchmarks.kills.schedule import Pace, chunk_rows, chunk_seconds, make_schedule, slow_pace
from tests.benchmarks.shared import (
    FEATURES,
    FOLDER,
    clear,
    console,
    machine,
    make_customers,
    on_s3,
    open_registry,
    prefect,
    upload,
    use_experiment,
)

SEED = int(os.environ.get("SEED", "0"))
WORK_SECONDS = float(os.environ.get("WORK_SECONDS", "60"))  # of each worker, undisturbed
WORKERS, SLOTS = 2, 2
BATCH_SECONDS = 0.1
# Of both workers: ten for each, a quarter of them aimed at writes. A run lasts ten times the mean time between.
TIMED, AIMED, STARTUPS, PUBLISHES = 20, 5, 4, 2
KILLS_MIN = 20
SECONDS_MAX = 1800.0
WANTED = {
    "rows_missing": "0",
    "rows_doubled": "0",
    "bytes_equal": "True",
    "kills": f"at least {KILLS_MIN}",
    "work_over_undisturbed": "at most 1.15",
    "run_over_mean_time_between_kills": "about 10",
}
_BATCHES_PER_CHUNK_GUESSED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A dataset to score: its rows, its files, the column that names a row, and the model and its pace."""

    rows: int
    folder: Path
    key: str
    model: str
    pace: Pace

    @property
    def names(self) -> list[str]:
        """The names of its files."""
        return sorted(path.name for path in self.folder.glob("*.parquet"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a dataset lies, and where its runs go."""

    name: str
    source: str
    out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run from its first attempt to its last: its name, where it went, and writes that kills have torn."""

    name: str
    destination: str
    attempts: tuple[Attempt, ...]
    torn_writes: int

    @property
    def rows(self) -> int:
        """The rows that all attempts gave to the model."""
        return sum(attempt.rows for attempt in self.attempts)

    @property
    def working_seconds(self) -> float:
        """The seconds that all attempts have worked."""
        return sum(attempt.working_seconds for attempt in self.attempts)


def main() -> None:
    """Kill and compare in each place, and print the table, then the figures as JSON."""
    open_registry()
    use_experiment("chaos")
    work = make_work()
    with prefect(), on_s3():
        places = [
            Place(name="local", source=str(work.folder), out=str(FOLDER / "chaos" / "out")),
            Place(name="s3", source=upload(work.folder), out="s3://lake/chaos"),
        ]
        found = {place.name: chaos(work, place) for place in places}
    figures = summed_up(found)
    title = f"{work.rows:,} rows, {WORKERS} workers of {SLOTS} slots, seed {SEED}; {machine()}"
    show(title, found, WANTED)
    print(json.dumps({"rows": work.rows, "seed": SEED, "machine": machine(), **figures, **found}))
    if figures["rows_missing"] or figures["rows_doubled"] or not figures["bytes_equal"]:
        sys.exit("What was killed must come out as what was not, but it did not: see the table.")
    if figures["kills"] < KILLS_MIN:
        sys.exit(f"At least {KILLS_MIN} kills must strike in each place, got {figures['kills']}: run it again.")


def make_work() -> Work:
    """Make the dataset that the environment asks for, and a model for it that is slow enough."""
    if "ROWS" in os.environ:
        rows = int(os.environ["ROWS"])
        folder, key, features = make_customers(rows), "customer", FEATURES
    else:
        from deployments.demo.flights import FEATURES as OF_FLIGHTS
        from deployments.demo.flights import KEY, write_flights
        from deployments.demo.prepare import FLIGHTS

        rows, folder, key, features = FLIGHTS, FOLDER / "flights", KEY, OF_FLIGHTS
        write_flights(folder)
    from tests.support import register_slow

    pace = slow_pace(rows, slots=WORKERS * SLOTS, seconds=WORK_SECONDS, batch_seconds=BATCH_SECONDS)
    model = register_slow("slow", features, pace.batch_seconds)
    return Work(rows=rows, folder=folder, key=key, model=model, pace=pace)


def chaos(work: Work, place: Place) -> dict[str, Any]:
    """Score undisturbed, then under the killer, and return how the two compare."""
    from tasks.storage import open_storage
    from tests.benchmarks.kills.compare import compare, read_keys, read_output

    between_kills = WORKERS * WORK_SECONDS / TIMED
    console.print(f"{place.name}: measuring the seconds of a checkpoint on one file")
    checkpoint = checkpoint_seconds(work, place)
    rows_per_chunk = chunk_rows(chunk_seconds(checkpoint, between_kills), work.pace)
    console.print(f"{place.name}: undisturbed, in chunks of {rows_per_chunk:,} rows")
    calm = score(work, place, "undisturbed", rows_per_chunk)
    console.print(f"{place.name}: under the killer")
    usual = Usual(
        startup=statistics.mean(attempt.startup_seconds for attempt in calm.attempts),
        write=checkpoint,
        publish=statistics.mean(attempt.published_seconds for attempt in calm.attempts),
    )
    schedule = make_schedule(
        SEED,
        workers=WORKERS,
        seconds=WORKERS * WORK_SECONDS,
        timed=TIMED,
        aimed=AIMED,
        startups=STARTUPS,
        publishes=PUBLISHES,
    )
    wild = score(work, place, "killed", rows_per_chunk, Killer(schedule, usual))
    outputs = [read_output(open_storage(run.destination), run.name, work.key) for run in (calm, wild)]
    difference = compare(read_keys(open_storage(place.source), work.names, work.key), *outputs)
    return {
        "parts": len(outputs[0].published),
        "rows_missing": difference.rows_missing,
        "rows_doubled": difference.rows_doubled,
        "bytes_equal": difference.bytes_equal,
        "parts_differing": len(difference.parts_differing),
        "leftovers": len(difference.leftovers),
        **kills_of(wild.attempts),
        "torn_writes": wild.torn_writes,
        "rows_recomputed": wild.rows - work.rows,
        "recomputed_over_rows": round(wild.rows / work.rows - 1, 4),
        "undisturbed_recomputed_over_rows": round(calm.rows / work.rows - 1, 4),
        "working_seconds": round(wild.working_seconds, 2),
        "undisturbed_working_seconds": round(calm.working_seconds, 2),
        "work_over_undisturbed": round(wild.working_seconds / calm.working_seconds, 4),
        "run_over_mean_time_between_kills": round(calm.working_seconds / WORKERS / between_kills, 2),
        "startup_seconds": round(sum(attempt.startup_seconds for attempt in wild.attempts), 1),
        "startup_seconds_each": round(usual.startup, 2),
        "checkpoint_seconds": round(checkpoint, 4),
        "rows_per_chunk": rows_per_chunk,
        "chunk_seconds": round(rows_per_chunk / work.pace.batch_size * work.pace.batch_seconds, 3),
    }


def checkpoint_seconds(work: Work, place: Place) -> float:
    """Measure the mean seconds that a part takes to be durable, over one file of the dataset."""
    options = {"rows_per_chunk": _BATCHES_PER_CHUNK_GUESSED * work.pace.batch_size}
    destination = f"{place.out}/measured"
    clear(destination)
    log = FOLDER / "chaos" / place.name / "measured"
    run_workers(
        command(work, f"{place.source}/{work.names[0]}", destination, options), log, workers=1, seconds_max=SECONDS_MAX
    )
    report = report_in((log / "000.log").read_text())
    return float(report["thread_seconds"]["write"] / report["parts"])


def score(work: Work, place: Place, name: str, rows_per_chunk: int, killer: Killer | None = None) -> Run:
    """Score the dataset with all workers, and return the run."""
    destination = f"{place.out}/{name}"
    clear(destination)
    log = FOLDER / "chaos" / place.name / name
    torn: set[Path] = set()
    attempts = run_workers(
        command(work, place.source, destination, {"rows_per_chunk": rows_per_chunk}),
        log,
        workers=WORKERS,
        killer=killer,
        seconds_max=SECONDS_MAX,
        after_kill=lambda: torn.update(Path(destination).glob("run=*/.*.tmp")),
    )
    (log / "attempts.json").write_text(json.dumps([asdict(attempt) for attempt in attempts], indent=1))
    ended = next(number for number, attempt in enumerate(sorted(attempts, key=_started)) if not attempt.killed)
    run = str(report_in((log / f"{ended:03d}.log").read_text())["run"])
    return Run(name=run, destination=destination, attempts=tuple(attempts), torn_writes=len(torn))


def _started(attempt: Attempt) -> float:
    return attempt.started


def command(work: Work, source: str, destination: str, options: dict[str, int]) -> list[str]:
    """Return the command line of a worker, without its board."""
    chosen = {
        "key_columns": [work.key],
        "batch_size": work.pace.batch_size,
        "slots": SLOTS,
        "experiment": None,
        **options,
    }
    return worker_command(work.model, source, destination, chosen)


def kills_of(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Count the kills, what they were aimed at, and what the threads of the struck worker were at, often several."""
    killed = [attempt for attempt in attempts if attempt.killed]
    phases = Counter(phase for attempt in killed for phase in attempt.phases)
    aims = Counter(attempt.aim for attempt in killed)
    return {
        "kills": len(killed),
        "kills_at_random_times": aims["time"],
        "kills_aimed": {aim: aims[aim] for aim in ("write", "publish", "startup")},
        "kills_in": {phase: phases[phase] for phase in ("startup", *PHASES, "between", "ending")},
    }


def summed_up(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all places: sums of what must be none, the least and the worst of the rest."""
    places = found.values()
    return {
        "rows_missing": sum(place["rows_missing"] for place in places),
        "rows_doubled": sum(place["rows_doubled"] for place in places),
        "bytes_equal": all(place["bytes_equal"] for place in places),
        "kills": min(place["kills"] for place in places),
        "recomputed_over_rows": max(place["recomputed_over_rows"] for place in places),
        "work_over_undisturbed": max(place["work_over_undisturbed"] for place in places),
    }


if __name__ == "__main__":
    main()
