"""Workloads of all sorts, made at random: consumers, traffic, promises, models, machines and prices."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from serving.model.batching import CostModel
from tasks.scheduler.arrivals import DAY_SECONDS, Arrivals, draw_arrivals, read_arrivals, spread_counts
from tasks.scheduler.decision import Profile
from tasks.scheduler.prices import PriceQuote
from tasks.scheduler.scenario import DecisionInputs
from tasks.scheduler.spot_simulation import SpotAvailability, read_availability
from tasks.scheduler.workload import ArrivalRate, ArrivalTrace, Events, Machine, Prices, Requests, Spot, Table, Workload
from tests.benchmarks.traces import ROOT

# No deadline of a case is a date.
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TRACES = Path(os.environ.get("TRACES") or ROOT / ".bench/traces")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload with all that it is decided on, and the same traffic another time."""

    workload: Workload
    profile: Profile
    arrivals: Arrivals | None
    again: Arrivals | None
    prices: dict[str, Prices]
    availability: SpotAvailability
    spot_again: SpotAvailability

    @property
    def inputs(self) -> DecisionInputs:
        """What is decided on."""
        return DecisionInputs(
            workload=self.workload,
            profile=self.profile,
            arrivals=self.arrivals,
            quote=PriceQuote(prices=self.prices, price_origin="made up"),
            availability=self.availability,
            now=NOW,
        )


def generate_case(seed: int, at: int) -> Case:
    """Return one of the workloads of a seed."""
    return _case(np.random.default_rng([seed, at]), at)


def from_traces() -> Iterator[Case]:
    """Yield workloads under real traffic, where the traces are: functions alone and together, and an LLM's requests."""
    minutes = TRACES / "requests_per_minute.csv"
    if minutes.exists():
        frame = pl.read_csv(minutes).drop("function").to_numpy()
        busy = np.argsort(-frame.sum(axis=1), kind="stable")
        picks = [frame.sum(axis=0), *(frame[at] for at in busy[:: max(1, len(busy) // 12)])]
        for at, counts_M in enumerate(picks):
            counts_T = spread_counts(counts_M.astype(np.int64), 60)
            yield _traced(np.random.default_rng([1, at]), f"azure-{at}", Arrivals(counts_T=counts_T))
    requests = TRACES / "requests_llm_code.csv"
    if requests.exists():
        trace = ArrivalTrace(path=str(requests))
        asked = Workload(
            name="llm", model="models:/m/1", consumer=Requests(latency_ms=1), arrivals=trace, horizon_days=1
        )
        yield from (_traced(np.random.default_rng([2, at]), f"llm-{at}", read_arrivals(asked)) for at in range(3))


def _case(random: np.random.Generator, at: int) -> Case:
    profile, machines, prices = _profile(random), *_machines(random)
    kind = random.choice(["requests", "table", "events"], p=[0.4, 0.25, 0.35])
    days = float(random.choice([1, 1, 2, 4]))
    spot = Spot(interruptions_per_day=_log(random, 0.2, 20), gap_minutes=_log(random, 5, 60))
    common = {"name": f"case-{at}", "model": "models:/m/1", "machines": machines, "spot": spot, "horizon_days": days}
    if kind == "table":
        hours = float(random.uniform(1, 12))
        rows = profile.batch_rows_per_second * 3600 * hours * _log(random, 0.001, 8)
        due = f"{int(hours)}:{int(hours % 1 * 60):02d}"
        workload = Workload(consumer=Table(rows=round(rows), due=due), **common)
        return _finish(workload, profile, prices, None, None)
    rate, kept = _rate(random, profile), float(random.choice([0.9, 0.95, 0.99, 0.999]))
    one = 1000 * profile.pass_time.seconds(1) + profile.request_ms
    if kind == "requests":
        consumer: Requests | Events = Requests(latency_ms=min(_log(random, 3, 300) * one, 60_000), share_in_time=kept)
    else:
        consumer = Events(within_seconds=max(_log(random, 1, DAY_SECONDS), 3 * one / 1000), share_in_time=kept)
    workload = Workload(consumer=consumer, arrivals=rate, **common)
    bursts = random.random() < 0.3
    seeds = random.integers(1 << 30, size=2).tolist()
    first, again = (_traffic(rate, round(days * DAY_SECONDS), seed, bursts=bursts) for seed in seeds)
    return _finish(workload, profile, prices, first, again)


def _finish(
    workload: Workload, profile: Profile, prices: dict[str, Prices], first: Arrivals | None, again: Arrivals | None
) -> Case:
    spot = read_availability(workload.spot)
    other = read_availability(workload.spot, seed=99)
    return Case(
        workload=workload,
        profile=profile,
        arrivals=first,
        again=again,
        prices=prices,
        availability=spot,
        spot_again=other,
    )


def _traced(random: np.random.Generator, name: str, arrivals: Arrivals) -> Case:
    profile, machines, prices = _profile(random), *_machines(random)
    one = 1000 * profile.pass_time.seconds(1) + profile.request_ms
    consumer = (
        Requests(latency_ms=min(_log(random, 4, 300) * one, 60_000))
        if random.random() < 0.6
        else Events(within_seconds=max(_log(random, 1, DAY_SECONDS), 3 * one / 1000))
    )
    days = len(arrivals.counts_T) / DAY_SECONDS
    workload = Workload(
        name=name,
        model="models:/m/1",
        consumer=consumer,
        arrivals=ArrivalRate(per_second=1),
        machines=machines,
        horizon_days=days,
    )
    # There is no other time of a real trace: it is judged on the same counts, at other moments within their seconds.
    return _finish(workload, profile, prices, arrivals, arrivals)


def _profile(random: np.random.Generator) -> Profile:
    pass_ms, slots = _log(random, 0.1, 200), int(random.choice([1, 2, 4, 8]))
    fixed = pass_ms / 1000
    cost = CostModel(fixed_seconds=fixed, row_seconds=fixed * float(random.uniform(0.02, 0.5)))
    request_ms = _log(random, 0.2, 3)
    return Profile(
        model="models:/m/1",
        digest="0" * 64,
        machine="made up",
        slots=slots,
        pass_time=cost,
        batch_rows_per_second=slots * cost.rows_per_second(256) * float(random.uniform(0.3, 0.9)),
        cold_start_seconds=_log(random, 2, 120),
        start_seconds=_log(random, 5, 180),
        request_ms=request_ms,
        request_busy_ms=request_ms * float(random.random()),
        measured_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def plain_profile() -> Profile:
    """A small network on two cores."""
    return Profile(
        model="models:/m/1",
        digest="0" * 64,
        machine="made up",
        slots=2,
        pass_time=CostModel(fixed_seconds=2e-4, row_seconds=2e-5),
        batch_rows_per_second=500_000,
        cold_start_seconds=20,
        start_seconds=30,
        request_ms=0.4,
        measured_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def _machines(random: np.random.Generator) -> tuple[tuple[Machine, ...], dict[str, Prices]]:
    names = ("this", "other", "third")[: int(random.integers(1, 4))]
    base = _log(random, 0.05, 5)
    machines, prices = [], {}
    for name in names:
        speed = 1.0 if name == "this" else _log(random, 0.5, 8)
        on_demand = base * speed * _log(random, 0.6, 1.6)
        spot = None if random.random() < 0.2 else on_demand / float(random.uniform(1.2, 5))
        machines.append(Machine(kind=name, speed=speed))
        prices[name] = Prices(on_demand=on_demand, spot=spot)
    return tuple(machines), prices


def _rate(random: np.random.Generator, profile: Profile) -> ArrivalRate:
    most = min(profile.slots * profile.pass_time.rows_per_second(64) * 20, 2000.0)
    return ArrivalRate(
        per_second=_log(random, 1e-4, most),
        peak=float(random.choice([1.0, 1.5, 2.0, 4.0, 8.0])),
        rows_per_arrival=float(random.choice([1, 1, 1, 4, 32])),
    )


def _traffic(rate: ArrivalRate, seconds: int, seed: int, *, bursts: bool) -> Arrivals:
    counts_T = draw_arrivals(rate, seconds, seed)
    if bursts:
        counts_T = np.random.default_rng(seed).poisson(counts_T * _bursts(seconds, seed))
    return Arrivals(counts_T=counts_T, rows_per_arrival=rate.rows_per_arrival)


def _bursts(seconds: int, seed: int) -> NDArray[np.float64]:
    """Now and then, for a minute or some, several times as much."""
    random = np.random.default_rng([seed, 1])
    factor_T = np.ones(seconds)
    for _ in range(int(random.poisson(seconds / 7200))):
        start, length = int(random.integers(seconds)), int(_log(random, 20, 600))
        factor_T[start : start + length] = _log(random, 1.5, 6)
    return factor_T


def _log(random: np.random.Generator, low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))
