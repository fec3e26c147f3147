"""`make bench-modes`: whether the choice of a mode is the right one, as tables and one JSON object on the last line.

Regret: 200 generated workloads and the real traces, each decided on, searched through exhaustively, and followed one
request after another on other traffic. Keep-warm: on real functions. Speed: 30 days of per-second arrivals in all
modes. Reality: what is predicted for the tuned Triton endpoint and for a batch run, and what they then do here.

Taken from the environment: CASES (200) and SEED (0) of the workloads, ROWS and ROUNDS of batch run and endpoint, TRACES
(a folder of real traces; without it there are none), and PARTS, those of regret, keep-warm, speed,
endpoint and batch that are run.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from typing import Any

from rich.progress import track

from tasks.scheduler.arrivals import read_arrivals
from tasks.scheduler.candidates import simulate_candidates
from tasks.scheduler.prices import PriceQuote
from tasks.scheduler.scenario import DecisionInputs, build_scenario, list_instance_types
from tasks.scheduler.spot_simulation import read_availability
from tasks.scheduler.workload import ArrivalRate, Events, Prices, Requests, Workload
from tests.benchmarks.figures import show
from tests.benchmarks.modes_keep_warm import EXPECTED, keep_warm_figures
from tests.benchmarks.modes_reality import batch_figures, endpoint_figures
from tests.benchmarks.modes_regret import Found, judge
from tests.benchmarks.modes_workloads import from_traces, generated, plain_profile
from tests.benchmarks.shared import console, machine, open_registry

CASES, SEED = int(os.environ.get("CASES", "200")), int(os.environ.get("SEED", "0"))
PARTS = os.environ.get("PARTS", "regret keep-warm speed endpoint batch").split()


def main() -> None:
    figures: dict[str, Any] = {}
    if "speed" in PARTS:
        figures |= speed_figures()
    if "keep-warm" in PARTS:
        figures["keep_warm_over_least"] = keep_warm_figures()
    if "regret" in PARTS:
        figures |= regret_figures()
    if {"endpoint", "batch"} & set(PARTS):
        open_registry()
    if "endpoint" in PARTS:
        figures |= endpoint_figures()
    if "batch" in PARTS:
        figures |= batch_figures()
    expected = {
        "simulate_30_days_seconds": "under 10",
        "regret_mean": "at most 1.02",
        "promises_broken": "0",
        "keep_warm_over_least": f"T* at most {', '.join(map(str, EXPECTED))}",
        "endpoint": "within 0.25",
        "batch": "within 0.10",
    }
    show("the choice of a mode", {"measured": figures}, expected)
    print(json.dumps({**figures, "machine": machine()}))


def speed_figures() -> dict[str, float]:
    """Simulate 30 days of requests in all modes, and of events, on one kind of machine; the slower of the two."""
    took = {}
    for consumer in ("requests", "events"):
        asked = Workload(
            name="speed",
            model="models:/m/1",
            consumer=Requests(latency_ms=50) if consumer == "requests" else _hourly(),
            arrivals=ArrivalRate(per_second=2000),
        )
        arrivals = read_arrivals(asked)
        inputs = DecisionInputs(
            workload=asked,
            profile=plain_profile(),
            arrivals=arrivals,
            quote=PriceQuote(prices={"this": Prices(on_demand=0.4, spot=0.15)}, price_origin="made up"),
            availability=read_availability(asked.spot),
            now=datetime.now(UTC),
        )
        scenario = build_scenario(inputs)
        (kind,) = list_instance_types(asked, inputs.quote.prices)
        start = time.process_time()
        simulate_candidates(scenario, kind)
        took[consumer] = time.process_time() - start
    return {"simulate_30_days_seconds": round(max(took.values()), 2)}


def _hourly() -> Events:
    return Events(within_seconds=3600)


def regret_figures() -> dict[str, Any]:
    cases = [*generated(CASES, SEED)] if CASES else []
    real = [*from_traces()]
    with ProcessPoolExecutor() as pool:
        judged = pool.map(judge, [*cases, *real])
        found = [*track(judged, "deciding and searching", total=len(cases) + len(real), console=console)]
    counted = [each.regret for each in found if each.regret is not None]
    worst = sorted((each for each in found if each.regret is not None), key=lambda each: -(each.regret or 0))[:10]
    for each in worst:
        console.print(f"{each.name}: {each.regret:.3f}: {each.chosen}; least {each.least}")
    for each in found:
        if each.broken or each.missed:
            console.print(
                f"{each.name} {'broken' if each.broken else 'missed'}: {each.late_share:.4%}: {each.chosen} "
                f"{each.least}"
            )
    return {
        "workloads": {
            "generated": len(cases),
            "real traces": len(real),
            "nothing is feasible": len(found) - len(counted),
        },
        "regret_mean": round(statistics.mean(counted), 4),
        "regret_p95": round(statistics.quantiles(counted, n=20)[-1], 4),
        "regret_max": round(max(counted), 3),
        "promises_broken": sum(each.broken for each in found),
        "missed": sum(each.missed for each in found),
        "modes_chosen": _chosen(found),
    }


def _chosen(found: list[Found]) -> dict[str, int]:
    names = [" ".join(each.chosen.split()[:2]) for each in found]
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    main()
