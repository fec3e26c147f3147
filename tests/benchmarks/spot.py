"""The cost of a job under a deadline on traces of spot: greedy, Uniform Progress, ours, and the optimum.

Jobs of 48 h due in 52, 60 and 92 h and of 6 h due in 7, 8 and 12 h, each with changeovers of 0.02, 0.2 and 0.4 h, start
at the beginning of every trace. Prints tables, then one JSON object as the last line; draws .bench/spot.png.

Read from the environment: TRACES, a folder with spot_availability.jsonl or such a file (without it traces are
generated); PRICE_RATIO, on-demand over spot (3, as p3.2xlarge in "Can't Be Late"); D_SECONDS, the changeover that a
live run measured (without it the longest that `make bench-nightly` has measured here; before that, the seconds in which
this machine starts a process that imports the batch flow, the least that a changeover can take here).

The policy's constants were chosen on 240 real traces of six zones and these jobs, at a ratio of 3. Other jobs, and
generated traces, are reported separately, since nothing was chosen on them. tasks/spot/policy.py states the result of a
search that chose on five zones and was judged on the sixth.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tasks.spot.policy import decide_placements
from tasks.spot.replay import Job, replay
from tests.benchmarks.shared import FOLDER, console, machine
from tests.benchmarks.spot_baselines import UniformProgress, greedy, optimum
from tests.benchmarks.spot_plot import draw
from tests.benchmarks.traces import ROOT, TICK_SECONDS, Traces, generated_traces, read_traces

HOUR = 3600.0
FINER = 10
PRICE_RATIO = float(os.environ.get("PRICE_RATIO", "3"))
DUE = ((48, 52), (48, 60), (48, 92), (6, 7), (6, 8), (6, 12))
CHANGEOVERS = (0.02, 0.2, 0.4)
OTHERS = ((24, 26, 0.1), (24, 30, 0.3), (24, 40, 0.05), (36, 40, 0.2), (36, 60, 0.2), (12, 13, 0.1), (12, 15, 0.2))
OTHERS += ((12, 24, 0.3), (3, 4, 0.1), (3, 6, 0.2), (60, 66, 0.2), (60, 90, 0.3))
NAMES = ("greedy", "uniform_progress", "ours")
# The cheapest course is exact in whole units of this many seconds, and a measured changeover is rounded up to them.
UNIT_SECONDS = 5
# What `make bench-nightly` leaves.
CHANGEOVER_FILE = FOLDER / "changeover.json"


@dataclass(slots=True, kw_only=True)
class Figures:
    """What jobs came to under each policy; costs_JN: J jobs on N traces."""

    jobs: Sequence[Job]
    costs_JN: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    moves: dict[str, float] = field(default_factory=dict)

    def over(self, other: str, zone_N: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Return for each job what ours costs over what another costs, of their means over the traces."""
        ours_JN, theirs_JN = self.costs_JN["ours"], self.costs_JN[other]
        where = slice(None) if zone_N is None else zone_N
        return ours_JN[:, where].mean(axis=1) / theirs_JN[:, where].mean(axis=1)

    def summary(self) -> dict[str, object]:
        least_JN = self.costs_JN.get("optimum")
        gaps = {} if least_JN is None else {name: _round((self.costs_JN[name] - least_JN).mean()) for name in NAMES}
        return {
            "missed": sum(self.missed.values()),
            "ours_over_uniform_progress": _round(self.over("uniform_progress").mean()),
            "ours_over_greedy": _round(self.over("greedy").mean()),
            "worst_over_greedy": _round(self.over("greedy").max()),
            "mean_cost": {name: _round(costs_JN.mean()) for name, costs_JN in self.costs_JN.items()},
            **({"gap_to_optimum": gaps} if gaps else {}),
            "moves": {name: _round(moves) for name, moves in self.moves.items()},
        }


def main() -> None:
    start = time.perf_counter()
    traces = read_traces()
    jobs = [a_job(work, due, changeover) for work, due in DUE for changeover in CHANGEOVERS]
    coarse = measure(jobs, traces.spot_NT, "ticks of 600 s")
    coarse.costs_JN["optimum"] = cheapest(jobs, traces.spot_NT)
    show(coarse, f"{traces.source}; on-demand costs {PRICE_RATIO:g} times spot; ticks of 600 s")

    finer_NT = np.repeat(traces.spot_NT, FINER, axis=1)
    fine = measure([replace(job, tick_seconds=TICK_SECONDS / FINER) for job in jobs], finer_NT, "ticks of 60 s")
    # The cheapest course may move at any moment: finer ticks leave it as it is.
    fine.costs_JN["optimum"] = coarse.costs_JN["optimum"]
    show(fine, "ticks of 60 s")

    seconds, origin = live_changeover()
    live_jobs = [a_job(work, due, seconds / HOUR) for work, due in DUE]
    live = measure(live_jobs, traces.spot_NT, "a live changeover")
    live.costs_JN["optimum"] = cheapest(live_jobs, traces.spot_NT)
    show(live, f"a changeover of {seconds:g} s, {origin}; ticks of 600 s")

    others = measure([a_job(*other) for other in OTHERS], traces.spot_NT, "other jobs")
    generated = measure(jobs, generated_traces().spot_NT, "generated traces")
    all_figures = (coarse, fine, live, others, generated)
    figures = {
        "traces": traces.source,
        "price_ratio": PRICE_RATIO,
        **coarse.summary(),
        "missed": sum(sum(figures.missed.values()) for figures in all_figures),
        "ticks_of_60_seconds": fine.summary(),
        "live_changeover": {"seconds": seconds, "from": origin, **live.summary()},
        "jobs_not_chosen_on": others.summary(),
        "generated_traces": generated.summary(),
        "zones_over_greedy": by_zone(coarse, traces),
        "plot": str(plot(coarse, fine)),
        "machine": machine(),
        "seconds": round(time.perf_counter() - start),
    }
    print(json.dumps(figures))


def a_job(work: float, due: float, changeover: float) -> Job:
    """Return a job of so many hours."""
    return Job(
        work_seconds=work * HOUR,
        deadline_seconds=due * HOUR,
        changeover_seconds=round(changeover * HOUR, 6),
        tick_seconds=TICK_SECONDS,
        price_ratio=PRICE_RATIO,
    )


def measure(jobs: Sequence[Job], spot_NT: NDArray[np.bool_], title: str) -> Figures:
    """Replay every job on every trace under each policy."""
    figures = Figures(jobs=jobs)
    outcomes: dict[str, list] = {name: [] for name in NAMES}
    for job in track(jobs, f"replaying {title}", console=console):
        uniform = UniformProgress(job.work_seconds, job.deadline_seconds)
        for name, policy in zip(NAMES, (greedy, uniform, decide_placements), strict=True):
            outcomes[name].append(replay(policy, spot_NT, job))
    for name, found in outcomes.items():
        figures.costs_JN[name] = np.array([outcome.cost_N for outcome in found])
        figures.missed[name] = sum(int(outcome.late_N.sum()) for outcome in found)
        figures.moves[name] = statistics.mean(float(outcome.moves_N.mean()) for outcome in found)
    return figures


def cheapest(jobs: Sequence[Job], spot_NT: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the least cost of every job on every trace."""
    found = track(jobs, "finding the cheapest courses", console=console)
    return np.array([[optimum(spot_T, job) for spot_T in spot_NT] for job in found])


def live_changeover() -> tuple[float, str]:
    """Return the seconds of a changeover here, in whole units, and where they come from."""
    if given := os.environ.get("D_SECONDS"):
        return in_units(float(given)), f"D_SECONDS={given} rounded up"
    if CHANGEOVER_FILE.exists():
        longest = float(json.loads(CHANGEOVER_FILE.read_text())["seconds"])
        return in_units(longest), f"the longest of {longest:.1f} s that bench-nightly has measured, rounded up"
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import flows.batch"], cwd=ROOT, check=True)
        took.append(time.perf_counter() - start)
    measured = statistics.median(took)
    origin = f"the {measured:.1f} s in which a process that imports the batch flow starts here, rounded up"
    return in_units(measured), origin


def in_units(seconds: float) -> float:
    """Return seconds rounded up to whole units."""
    return math.ceil(seconds / UNIT_SECONDS) * UNIT_SECONDS


def by_zone(figures: Figures, traces: Traces) -> dict[str, float]:
    """Return the mean over all jobs of ours over greedy, for the traces of each zone."""
    zone_N = np.array(traces.zones)
    return {zone: _round(figures.over("greedy", zone_N == zone).mean()) for zone in sorted(set(traces.zones))}


def plot(coarse: Figures, fine: Figures) -> Path:
    """Draw the mean cost of every job under each policy, and return where."""
    labels = [
        f"{work} in {due}\nd = {changeover}"
        for work, due, changeover in (tuple(text.removesuffix(" h") for text in label(job)) for job in coarse.jobs)
    ]
    panels = {
        f"ticks of {figures.jobs[0].tick_seconds:g} s": {
            name.replace("_", " "): costs_JN.mean(axis=1) for name, costs_JN in figures.costs_JN.items()
        }
        for figures in (coarse, fine)
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    return draw(panels, labels, len(CHANGEOVERS), FOLDER / "spot.png")


def show(figures: Figures, title: str) -> None:
    table = Table(title=title, title_justify="left")
    names = ("work", "due in", "changeover", "greedy", "uniform progress", "ours", "optimum", "gap", "/ greedy", "/ up")
    for name in names:
        table.add_column(name, justify="right")
    means = {name: costs_JN.mean(axis=1) for name, costs_JN in figures.costs_JN.items()}
    over_greedy, over_uniform = figures.over("greedy"), figures.over("uniform_progress")
    for at, job in enumerate(figures.jobs):
        costs = [means[name][at] for name in (*NAMES, "optimum")]
        rest = (costs[2] - costs[3], over_greedy[at], over_uniform[at])
        table.add_row(*label(job), *(f"{value:.4f}" for value in (*costs, *rest)))
    table.add_section()
    costs = [means[name].mean() for name in (*NAMES, "optimum")]
    rest = (costs[2] - costs[3], over_greedy.mean(), over_uniform.mean())
    table.add_row("mean", "", "", *(f"{value:.4f}" for value in (*costs, *rest)))
    missed = [str(figures.missed[name]) for name in NAMES]
    table.add_row("missed", "", "", *missed)
    table.add_row("moves", "", "", *(f"{figures.moves[name]:.1f}" for name in NAMES))
    Console(width=120).print(table)


def label(job: Job) -> tuple[str, str, str]:
    return (
        f"{job.work_seconds / HOUR:g} h",
        f"{job.deadline_seconds / HOUR:g} h",
        f"{round(job.changeover_seconds / HOUR, 4):g} h",
    )


def _round(value: float) -> float:
    return round(float(value), 4)


if __name__ == "__main__":
    main()
