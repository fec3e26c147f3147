"""`make bench-nightly`: whole nights on two local work pools, as a table and one JSON object on the last line.

nightly_inference on a real Prefect server, with real process workers: those on-demand stay, those of spot are started
and killed as traces of real spot availability say (those of TRACES, else generated ones), ten
minutes of them in TICK_SECONDS. One night on one machine at a time, one on two. What comes out is held against an
undisturbed run byte by byte; a difference or a missed deadline ends this with 1. Draws .bench/nightly-*.png, and leaves
the changeover that it has measured in .bench/changeover.json for `make bench-spot`. SEED=... draws other traces.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.deployed import deployed, machines, replayed
from tests.benchmarks.figures import show
from tests.benchmarks.shared import FOLDER, clear, console, machine, open_registry, use_experiment
from tests.benchmarks.spot import CHANGEOVER_FILE
from tests.benchmarks.traces import read_traces

if TYPE_CHECKING:
    from infra.local.prefect_server import PrefectServer
    from tasks.spot.purchase import NightlyReport

SEED = int(os.environ.get("SEED", "0"))
TICK_SECONDS = float(os.environ.get("TICK_SECONDS", "8"))
# A batch takes a tenth of a second in each of two slots: a machine scores a thousand rows a second.
ROWS, BATCH, CHUNK, SLOTS, BATCH_SECONDS = 150_000, 50, 500, 2, 0.1
RATE = SLOTS * BATCH / BATCH_SECONDS
PRICE_RATIO = 3.0
INTERVAL_SECONDS = 1.0
CHANGEOVER_STATED = 20.0
# Spot is up for so much of a night, and taken so often in its first half.
UP_SHARE, TAKES_MIN = (0.4, 0.75), 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """A night to go through: how many machines at a time, and how long after its begin the deadline is."""

    name: str
    workers: int
    due_seconds: float

    @property
    def work_seconds(self) -> float:
        """The work of each machine."""
        return ROWS / RATE / self.workers


NIGHTS = (Night(name="one machine", workers=1, due_seconds=320), Night(name="two machines", workers=2, due_seconds=190))


def main() -> None:
    """Go through every night, and print the table, then the figures as JSON."""
    open_registry()
    use_experiment("nightly")
    from tests.support import register_slow, write_customers

    source = write_customers(FOLDER / "night", rows=ROWS, files=4, rows_per_group=25_000)
    model = register_slow("night", ("a", "b", "c"), BATCH_SECONDS)
    traces = read_traces()
    with deployed() as server, machines(server, "overnight", ["undisturbed"]):
        undisturbed = start_undisturbed(model, source)
        reports = {night.name: go_through(server, night, model, source, traces.spot_NT) for night in NIGHTS}
        parts = undisturbed()
    found = {night.name: figures_of(night, *reports[night.name], parts) for night in NIGHTS}
    changeovers = [seconds for figures in found.values() for seconds in figures["changeovers"]]
    longest = max(changeovers)
    CHANGEOVER_FILE.write_text(json.dumps({"seconds": longest, "all": changeovers, "machine": machine()}))
    figures = {
        "missed": sum(night["missed"] for night in found.values()),
        "bytes_equal": all(night["bytes_equal"] for night in found.values()),
        "changeover_seconds": longest,
        "changeover_seconds_median": round(statistics.median(changeovers), 1),
    }
    title = f"{ROWS:,} rows, ten minutes of a trace in {TICK_SECONDS:g} s; {machine()}"
    show(title, found, {"missed": "0", "bytes_equal": "True", "slack_seconds": "not negative"})
    print(json.dumps({"rows": ROWS, "seed": SEED, "traces": traces.source, "machine": machine(), **figures, **found}))
    if figures["missed"] or not figures["bytes_equal"]:
        sys.exit("Every night must be done in time, to the bytes of an undisturbed run: see the table.")


def start_undisturbed(model: str, source: Path) -> Callable[[], dict[str, str]]:
    """Start the same run where nothing disturbs it; return what waits for it, and gives its parts by digest."""
    from tests.deployments.flow_runs import start, wait_for
    from tests.support import digests

    destination = folder_of("undisturbed")
    run = start("adhoc", model, source, destination, options())

    def wait() -> dict[str, str]:
        wait_for(run.id, "Completed", "Failed")
        return digests(destination)

    return wait


def folder_of(name: str) -> Path:
    """Return the destination of a run, cleared."""
    destination = FOLDER / "nightly" / name.replace(" ", "-")
    clear(str(destination))
    return destination


def options(workers: int = 1) -> Any:
    """Return the options of every run: chunks of a second."""
    from tasks.batch.options import BatchOptions

    return BatchOptions(
        key_columns=("customer",),
        batch_size=BATCH,
        rows_per_chunk=CHUNK,
        slots=SLOTS,
        max_reject_fraction=1,
        experiment=None,
        workers=workers,
    )


def go_through(
    server: PrefectServer, night: Night, model: str, source: Path, spot_NT: NDArray[np.bool_]
) -> tuple[NightlyReport, list[list[bool]], dict[str, str]]:
    """Go through one night; return its report, the traces of its spot machines, and its parts by digest."""
    from flows.nightly import nightly_inference
    from tasks.spot.purchase import PurchaseOptions
    from tests.support import digests

    destination = folder_of(night.name)
    spot = windows(spot_NT, math.ceil(night.due_seconds / TICK_SECONDS), night.workers)
    buying = PurchaseOptions(
        spot_price=1,
        on_demand_price=PRICE_RATIO,
        # Of the night on several machines it is stated, since it says how many are needed.
        rows_per_second=RATE if night.workers > 1 else None,
        changeover_seconds=CHANGEOVER_STATED,
        interval_seconds=INTERVAL_SECONDS,
    )
    console.print(f"{night.name}: spot is up as {', '.join(''.join('01'[up] for up in trace) for trace in spot)}")
    with ExitStack() as stack:
        stack.enter_context(
            machines(server, "overnight-on-demand", [f"kept-{at}" for at in range(1, night.workers + 1)])
        )
        told = stack.enter_context(replayed(server, "overnight-spot", spot, TICK_SECONDS))
        # The first machines are there: the night is not to begin by waiting for a benchmark.
        while sum("is there" in words for _, words in told) < night.workers:
            time.sleep(0.1)
        due = datetime.now(UTC) + timedelta(seconds=night.due_seconds)
        report = nightly_inference(
            model, str(source), str(destination), due.isoformat(), buying, options(night.workers)
        )
    for seconds, words in told:
        console.print(f"  {seconds:>6} s  {words}")
    for row in report.table():
        console.print(f"  {row['after']:>6}  machine {row['machine']} to {row['to']}: {row['why']}")
    save_plot(plot_of(night))
    return report, spot, digests(destination)


def windows(spot_NT: NDArray[np.bool_], ticks: int, count: int) -> list[list[bool]]:
    """Return as many stretches of traces as there are machines: spot is there at first, and taken again and again."""
    random = np.random.default_rng(SEED)
    found: list[list[bool]] = []
    while len(found) < count:
        trace_T = spot_NT[random.integers(len(spot_NT))]
        start = int(random.integers(max(len(trace_T) - ticks, 1)))
        window_T = trace_T[start : start + ticks]
        half_T = window_T[: ticks // 2].astype(int)
        takes = int((np.diff(half_T) < 0).sum())
        if window_T[:3].all() and takes >= TAKES_MIN and UP_SHARE[0] <= window_T.mean() <= UP_SHARE[1]:
            found.append([bool(up) for up in window_T])
    return found


def figures_of(
    night: Night,
    report: NightlyReport,
    spot: Sequence[Sequence[bool]],
    parts: dict[str, str],
    undisturbed: dict[str, str],
) -> dict[str, Any]:
    """Return what a night came to, and what the same would have cost by other policies, replayed."""
    rate = report.rows_per_second or RATE
    on_demand = ROWS / rate * PRICE_RATIO / 3600
    return {
        "workers": report.workers,
        "missed": int(report.slack_seconds < 0),
        "bytes_equal": parts == undisturbed,
        "due_seconds": night.due_seconds,
        "seconds": round(report.seconds, 1),
        "slack_seconds": round(report.slack_seconds, 1),
        "rows_per_second_of_one": round(rate),
        "cost_over_on_demand": round(report.cost / on_demand, 3),
        "cost_over_on_demand_with_changeover": round(report.cost_fraction, 3),
        "replayed": replays(night, report, spot, ROWS / rate / report.workers),
        "spot_seconds": round(report.spot_seconds, 1),
        "on_demand_seconds": round(report.on_demand_seconds, 1),
        "rows_recomputed_max": report.rows_recomputed_max,
        "moves": [f"{move.seconds:.0f} s: {move.machine} to {move.to}" for move in report.moves],
        "changeovers": [round(seconds, 1) for seconds in report.changeovers],
        "plot": str(plot_of(night)),
    }


def replays(
    night: Night, report: NightlyReport, spot: Sequence[Sequence[bool]], work_seconds: float
) -> dict[str, float]:
    """Return the cost over on-demand of policies on the night's traces, at the rate and changeover it has measured."""
    from tasks.spot.policy import decide_placements
    from tasks.spot.replay import Job, replay
    from tests.benchmarks.spot_baselines import UniformProgress, greedy, optimum

    job = Job(
        work_seconds=work_seconds,
        deadline_seconds=night.due_seconds,
        changeover_seconds=report.changeover_seconds,
        price_ratio=PRICE_RATIO,
        tick_seconds=TICK_SECONDS,
    )
    spot_NT = np.array(spot)
    policies = {
        "greedy": greedy,
        "uniform_progress": UniformProgress(work_seconds, night.due_seconds),
        "ours": decide_placements,
    }
    found = {name: float(replay(policy, spot_NT, job).cost_N.mean()) for name, policy in policies.items()}
    found["optimum"] = statistics.mean(optimum(np.array(trace), job, unit_seconds=1) for trace in spot)
    return {name: round(value, 3) for name, value in found.items()}


def plot_of(night: Night) -> Path:
    """Return where the plot of a night is kept."""
    return FOLDER / f"nightly-{night.name.replace(' ', '-')}.png"


def save_plot(path: Path) -> None:
    """Keep the plot that the last night has put among its flow run's artifacts."""
    import base64

    from prefect.artifacts import Artifact

    shown = Artifact.get("night-plot")
    assert shown is not None, path
    path.write_bytes(base64.b64decode(str(shown.data).split(",", 1)[1]))


if __name__ == "__main__":
    main()
