"""`make bench-modes`: whether the choice of a mode is the right one, as tables and one JSON object on the last line.

Regret: 200 generated workloads and the real traces, each decided on, searched through exhaustively, and followed one
request after another on other traffic. Keep-warm: on real functions. Speed: 30 days of per-second arrivals in all
modes. Reality: what is predicted for the tuned Triton endpoint and for a batch run, and what they then do here.

Taken from the environment: CASES (200) of each of SEEDS (0; such as 1,2 or 7101-7110), ROWS and ROUNDS of batch run and
endpoint, TRACES (a folder of real traces; without it there are none), and PARTS, those of regret, keep-warm, speed,
endpoint and batch that are run.
"""

from __future__ import annotations

import itertools
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
from tests.benchmarks.modes_regret import Found, judge, judge_generated
from tests.benchmarks.modes_workloads import from_traces, plain_profile
from tests.benchmarks.shared import console, machine, open_registry

CASES = int(os.environ.get("CASES", "200"))
PARTS = os.environ.get("PARTS", "regret keep-warm speed endpoint batch").split()


def read_seeds(text: str) -> list[int]:
    """Return the seeds of a list with ranges, such as 1,2 or 7101-7110."""
    ends = [each.partition("-") for each in text.replace(",", " ").split()]
    return [seed for first, _, last in ends for seed in range(int(first), int(last or first) + 1)]


SEEDS = read_seeds(os.environ.get("SEEDS", "0"))


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
        "regret_mean": "at most 1.015",
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
    real = [*from_traces()]
    total = len(SEEDS) * CASES + len(real)
    with ProcessPoolExecutor() as pool:
        # Cases hold days of traffic: they are made where they are judged.
        judged = [pool.map(judge_generated, itertools.repeat(seed), range(CASES)) for seed in SEEDS]
        found = [*track(itertools.chain(*judged, pool.map(judge, real)), "deciding", total=total, console=console)]
    by_seed = {seed: found[place * CASES : (place + 1) * CASES] for place, seed in enumerate(SEEDS)} if CASES else {}
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
            "generated": len(SEEDS) * CASES,
            "real traces": len(real),
            "nothing is feasible": len(found) - len(counted),
        },
        "regret_mean": round(statistics.mean(counted), 4),
        "regret_p95": round(statistics.quantiles(counted, n=20)[-1], 4),
        "regret_max": round(max(counted), 3),
        "promises_broken": sum(each.broken for each in found),
        "missed": sum(each.missed for each in found),
        "regret_mean_by_seed": {str(seed): round(_mean_regret(cases), 4) for seed, cases in by_seed.items()},
        "promises_broken_by_seed": {str(seed): sum(each.broken for each in cases) for seed, cases in by_seed.items()},
        "modes_chosen": _chosen(found),
    }


def _mean_regret(found: list[Found]) -> float:
    return statistics.mean(each.regret for each in found if each.regret is not None)


def _chosen(found: list[Found]) -> dict[str, int]:
    names = [" ".join(each.chosen.split()[:2]) for each in found]
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    main()
