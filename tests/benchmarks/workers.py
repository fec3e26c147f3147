"""`make bench-workers`: several flow runs on one run, as a table and one JSON object on the last line.

Flow runs of a deployment on real process workers of a real Prefect server: two, of which one has started the other
(`workers=2`), in as many trials as TRIALS says, in chunks of one batch and in those that the plan chooses itself; the
same with one killed in the middle, which the other completes; and one that a second joins in the middle (`joins`).
Counts the rows that were scored twice, without those that were in hand when one was killed: a chunk for each slot, at
most. Holds every run against an undisturbed one byte by byte; a difference ends this with 1.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tests.benchmarks.deployed import deployed, start_machine
from tests.benchmarks.figures import show
from tests.benchmarks.shared import FOLDER, clear, console, machine, open_registry, use_experiment

if TYPE_CHECKING:
    from infra.local.prefect_server import PrefectServer, PrefectWorker
    from tasks.batch.options import BatchOptions

TRIALS = int(os.environ.get("TRIALS", "3"))
# Two slots at a tenth of a second for a batch: one worker takes 48 s, two half of that.
ROWS, BATCH, SLOTS, BATCH_SECONDS = 48_000, 50, 2, 0.1
CHUNKS = {"one batch": BATCH, "as planned": None}
DOUBLED_MAX = 0.05
POOL = "overnight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one run by several flow runs came to; rows of one that was killed are not among the scored."""

    seconds: float
    chunks: int
    rows_of_each: tuple[int, ...]
    rows_twice: int
    bytes_equal: bool

    @property
    def doubled(self) -> float:
        """The share of rows that were scored twice."""
        return self.rows_twice / ROWS


class Bench:
    """A server, its workers, a model and a dataset, and what comes of the dataset undisturbed."""

    def __init__(self, server: PrefectServer, model: str, source: Path) -> None:
        self._server, self._model, self._source = server, model, source
        self._workers: dict[str, PrefectWorker] = {}
        self._started = 0
        self._undisturbed: dict[tuple[int | None, int], dict[str, str]] = {}

    def together(self, chunk: int | None) -> Trial:
        """Two flow runs, the second started by the first."""
        return self._measure(chunk, workers=2)

    def one_killed(self, chunk: int | None) -> Trial:
        """Two flow runs, one of which is killed with its machine when a third of the rows are done."""
        return self._measure(chunk, workers=2, meanwhile=self._kill)

    def one_added(self, chunk: int | None) -> Trial:
        """One flow run, which another joins when a third of the rows are done."""
        return self._measure(chunk, workers=1, meanwhile=self._add)

    def stop(self) -> None:
        """Tell every worker to go."""
        for worker in self._workers.values():
            worker.stop()

    def _measure(
        self,
        chunk: int | None,
        *,
        workers: int,
        meanwhile: Callable[[Sequence[UUID], str, BatchOptions], Sequence[UUID]] | None = None,
    ) -> Trial:
        from tasks.batch.run_records import load_plan
        from tasks.storage import open_storage
        from tests.deployments.flow_runs import start, table, wait_for, workers_of
        from tests.support import digests

        self._have_two()
        destination = FOLDER / "workers" / "out"
        clear(str(destination))
        options = self._options(chunk)
        began = time.monotonic()
        first = start("adhoc", self._model, self._source, destination, options.model_copy(update={"workers": workers}))
        while not (plans := list(destination.glob("_overnight/*/plan.json"))):
            time.sleep(0.02)
        plan = load_plan(open_storage(str(destination)), plans[0].parent.name)
        assert plan is not None
        while len(list(destination.glob("run=*/part-*"))) < len(plan.chunks) / 3:
            time.sleep(0.02)
        runs: Sequence[UUID] = [first.id, *(run.id for run in workers_of(first.id))]
        runs = meanwhile(runs, str(destination), options) if meanwhile else runs
        for run in runs:
            wait_for(run, "Completed", "Failed")
        seconds = time.monotonic() - began
        reports = [table(self._server, run) for run in runs]
        return Trial(
            seconds=seconds,
            chunks=len(plan.chunks),
            rows_of_each=tuple(_number(report, "rows scored by this call") for report in reports),
            rows_twice=sum(_number(report, "rows scored twice") for report in reports),
            bytes_equal=digests(destination) == self._calm(chunk, workers, plans[0]),
        )

    def _kill(self, runs: Sequence[UUID], destination: str, options: BatchOptions) -> Sequence[UUID]:
        """Kill the machine of the one that started the other: what it had in hand is lost, what is put out stays."""
        from tests.deployments.flow_runs import machine_of, wait_for

        lost, *others = runs
        self._workers.pop(machine_of(lost)).kill()
        # A minute and a half later it is run again, and finds that all is done.
        wait_for(lost, "Completed", "Failed")
        return others

    def _add(self, runs: Sequence[UUID], destination: str, options: BatchOptions) -> Sequence[UUID]:
        from tests.deployments.flow_runs import start

        joins = options.model_copy(update={"joins": runs[0]})
        return [*runs, start("adhoc", self._model, self._source, destination, joins).id]

    def _have_two(self) -> None:
        while len(self._workers) < 2:
            self._started += 1
            name = f"worker-{self._started}"
            self._workers[name] = start_machine(self._server, POOL, name)

    def _calm(self, chunk: int | None, workers: int, plan: Path) -> dict[str, str]:
        """Return the parts by digest that one call makes of the same plan; a plan has chunks enough for its workers."""
        from flows.batch import batch_inference
        from tests.support import digests

        if (chunk, workers) not in self._undisturbed:
            destination = FOLDER / "workers" / "undisturbed"
            clear(str(destination))
            copy = destination / plan.relative_to(plan.parents[2])
            copy.parent.mkdir(parents=True)
            shutil.copy(plan, copy)
            batch_inference(self._model, str(self._source), str(destination), self._options(chunk))
            self._undisturbed[chunk, workers] = digests(destination)
        return self._undisturbed[chunk, workers]

    def _options(self, chunk: int | None) -> BatchOptions:
        from tasks.batch.options import BatchOptions

        return BatchOptions(
            key_columns=("customer",),
            batch_size=BATCH,
            rows_per_chunk=chunk,
            slots=SLOTS,
            max_reject_fraction=1,
            experiment=None,
        )


def main() -> None:
    """Run every trial, and print the table, then the figures as JSON."""
    open_registry()
    use_experiment("workers")
    from tests.support import register_slow, write_customers

    source = write_customers(FOLDER / "shared-work", rows=ROWS, files=2, rows_per_group=ROWS // 2)
    model = register_slow("shared-work", ("a", "b", "c"), BATCH_SECONDS)
    found: dict[str, list[Trial]] = {}
    with deployed() as server:
        bench = Bench(server, model, source)
        try:
            for words, chunk in CHUNKS.items():
                for kind, run in (("two", bench.together), ("killed", bench.one_killed), ("added", bench.one_added)):
                    trials = found.setdefault(f"{kind}, chunks {words}", [])
                    for _ in range(TRIALS if kind == "two" else 1):
                        trials.append(run(chunk))
                        console.print(f"{kind}, chunks {words}: {trials[-1]}")
        finally:
            bench.stop()
    cases = {name: figures_of(trials) for name, trials in found.items()}
    figures = {
        "doubled": max(case["doubled_mean"] for case in cases.values()),
        "doubled_worst": max(case["doubled_worst"] for case in cases.values()),
        "bytes_equal": all(case["bytes_equal"] for case in cases.values()),
    }
    title = f"{ROWS:,} rows, two workers of {SLOTS} slots; {machine()}"
    show(title, cases, {"doubled_mean": "at most 0.05", "bytes_equal": "True"})
    print(json.dumps({"rows": ROWS, "trials": TRIALS, "machine": machine(), **figures, "cases": cases}))
    if not figures["bytes_equal"]:
        sys.exit("Every run must have the bytes of an undisturbed one, but one has not: see the table.")


def figures_of(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the figures of several trials of one kind."""
    return {
        "trials": len(trials),
        "chunks": trials[0].chunks,
        "seconds": round(statistics.mean(trial.seconds for trial in trials), 1),
        "rows_of_each": [list(trial.rows_of_each) for trial in trials],
        "rows_twice": [trial.rows_twice for trial in trials],
        "doubled_mean": round(statistics.mean(trial.doubled for trial in trials), 4),
        "doubled_worst": round(max(trial.doubled for trial in trials), 4),
        "bytes_equal": all(trial.bytes_equal for trial in trials),
    }


def _number(report: dict[str, str], name: str) -> int:
    return int(report.get(name, "0").replace(",", ""))


if __name__ == "__main__":
    main()
