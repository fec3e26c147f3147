"""The demo of the scheduler: three ways to consume the predictions of one model, and the mode that each is served by.

`python -m deployments.demo.modes` measures the delay model once, decides for a nightly table, a fraud check within
50 ms and a stream of events, shows the decisions with what an always-on endpoint would waste, and draws each.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from rich.table import Table as Grid

from deployments.demo.flights import KEY
from deployments.demo.prepare import console, prepare_data, use_registry

if TYPE_CHECKING:
    from tasks.scheduler.decision import Decision
    from tasks.scheduler.workload import ArrivalTrace, Workload

MODEL = "models:/flight-delay@champion"
# What the machine of the demo is priced as: the smallest of its generation has two cores too.
MACHINE = "c7i.large"
ROWS_A_NIGHT = 10_000_000
_MINUTES = 1440


def main() -> None:
    """Run the demo in the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m deployments.demo.modes", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything is kept")
    parser.add_argument(
        "--traces", type=Path, help="a folder with real traces of requests and spot machines; else some are generated"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    use_registry(folder)
    prepare_data(folder)
    from infra.local.prefect_server import prefect_server  # noqa: PLC0415 - a second demo needs no server to train

    console.print("Starting a Prefect server on loopback")
    with prefect_server(folder / "prefect") as server:
        os.environ.update(server.environment)
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
        decisions = _decide_modes(folder, arguments.traces)
    _show_decisions(decisions)
    if not all(decision.chosen.is_feasible for decision in decisions.values()):
        console.print("[bold red]A mode was chosen that does not keep its promise.[/]")
        sys.exit(1)


def _decide_modes(folder: Path, traces: Path | None) -> Mapping[Path, Decision]:
    """Return the decision of each workload by its plot."""
    from flows.scheduler import choose_mode  # noqa: PLC0415 - the server's address must be set before
    from tasks.batch.options import BatchOptions  # noqa: PLC0415
    from tasks.scheduler.profile import ProfileOptions  # noqa: PLC0415

    profile_options = ProfileOptions(source=str(folder / "flights"), batch_options=BatchOptions(key_columns=(KEY,)))
    decisions = {}
    for workload in workloads(folder / "modes", traces):
        start = time.perf_counter()
        path = folder / "modes" / f"{workload.name}.png"
        decisions[path] = choose_mode(workload, profile_options=profile_options, plot_file=str(path))
        console.print(f"{workload.name}: decided after {time.perf_counter() - start:.1f} s", highlight=False)
    return decisions


def workloads(folder: Path, traces: Path | None) -> list[Workload]:
    """Return a table that is due each night, a check that a caller waits for, and events; on real traces if given."""
    from tasks.scheduler import workload as w  # noqa: PLC0415 - needs MLflow's registry to be set

    folder.mkdir(parents=True, exist_ok=True)
    machines = (w.Machine(kind=MACHINE, speed=1),)
    check, events = _check_trace(folder, traces), _event_trace(folder, traces)
    availability = _find_trace(traces, "spot_availability.jsonl")
    spot = w.Spot(trace=str(availability) if availability else None)
    return [
        w.Workload(
            name="nightly-table",
            model=MODEL,
            consumer=w.Table(rows=ROWS_A_NIGHT, ready="01:00", due="06:00"),
            machines=machines,
            spot=spot,
        ),
        w.Workload(
            name="fraud-check", model=MODEL, consumer=w.Requests(latency_ms=50), arrivals=check, machines=machines
        ),
        w.Workload(
            name="event-stream", model=MODEL, consumer=w.Events(within_seconds=5), arrivals=events, machines=machines
        ),
    ]


def _check_trace(folder: Path, traces: Path | None) -> ArrivalTrace:
    """Return requests a minute over a day: those of all functions of the real trace, else generated ones."""
    from tasks.scheduler.workload import ArrivalTrace  # noqa: PLC0415 - the same

    real, path = _find_trace(traces, "requests_per_minute.csv"), folder / "requests-per-minute.csv"
    if real:
        console.print(f"Requests for the fraud check: {real}, all functions together")
        counts = pl.read_csv(real).select(pl.exclude("function")).sum().transpose().to_series()
    else:
        console.print("Requests for the fraud check: generated (--traces names a folder of real ones)")
        hour = np.arange(_MINUTES) / 60
        counts = pl.Series(np.random.default_rng(1).poisson(600 + 500 * np.sin((hour - 8) / 24 * 2 * np.pi)))
    pl.DataFrame({"requests": counts}).write_csv(path)
    return ArrivalTrace(path=str(path), content="per-minute", column="requests")


def _event_trace(folder: Path, traces: Path | None) -> ArrivalTrace:
    """Return when events arrive within an hour, of the real trace or generated."""
    from tasks.scheduler.workload import ArrivalTrace  # noqa: PLC0415 - the same

    real, path = _find_trace(traces, "requests_llm_code.csv"), folder / "events.csv"
    if real:
        console.print(f"Events of the stream: {real}")
        return ArrivalTrace(path=str(real), content="timestamps", column="TIMESTAMP")
    console.print("Events of the stream: generated (--traces names a folder of real ones)")
    gaps = np.random.default_rng(2).exponential(0.4, 9_000)
    pl.DataFrame({"seconds": np.cumsum(gaps)}).write_csv(path)
    return ArrivalTrace(path=str(path), content="timestamps", column="seconds")


def _find_trace(traces: Path | None, name: str) -> Path | None:
    path = traces.absolute() / name if traces else None
    return path if path and path.exists() else None


def _show_decisions(decisions: Mapping[Path, Decision]) -> None:
    """Print the decisions as a table, what an always-on endpoint wastes, and where the plots are."""
    from tasks.scheduler import report  # noqa: PLC0415 - MLflow is imported by it
    from tasks.scheduler.prices import format_usd  # noqa: PLC0415 - the same

    first = next(iter(decisions.values()))
    grid = Grid(title=f"One model, three consumers: 30 days on machines as {MACHINE}", title_justify="left")
    for name in ("workload", "served by", "costs", "always on", "times", "changes where"):
        grid.add_column(name)
    for decision in decisions.values():
        chosen, nearest = decision.chosen, next(iter(decision.break_evens), None)
        grid.add_row(
            decision.workload.name,
            f"{chosen.mode}, {chosen.policy}",
            format_usd(chosen.usd),
            format_usd(chosen.usd + decision.waste_usd),
            report.format_waste_factor(decision),
            f"{nearest.input} x {nearest.factor:.3g}" if nearest else "nothing near",
        )
    console.print(grid)
    for name, value in report.list_profile_figures(first.profile).items():
        console.print(f"{name}: {value}", highlight=False)
    console.print(f"Prices: {first.price_origin}", highlight=False)
    for path, decision in decisions.items():
        console.print(
            f"\n[bold]{decision.workload.name}[/]: {report.describe_promise(decision.workload)}", highlight=False
        )
        console.print(
            f"  {report.summarize_decision(decision)}\n  {decision.chosen.reason}\n  Drawn in {path}", highlight=False
        )


if __name__ == "__main__":
    main()
