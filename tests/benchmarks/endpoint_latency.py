"""Batching for latency: what a lone caller waits with and without it, and whether the budget holds under load."""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from infra.local.triton import triton_server
from serving.model.batching import BatchingConfig
from serving.model.release import Release
from serving.targets import Host
from serving.targets.triton import TritonHost
from tasks.endpoint.batching import BatchingChoice, resolve_batching
from tasks.endpoint.budget import check_budget
from tasks.endpoint.load import Latency, measure_latency, run_closed_loop
from tasks.endpoint.resolve import LoadedModel
from tasks.endpoint.spec import Budget, EndpointSpec
from tests.benchmarks.shared import console

RATE = 100.0
_TURNS_PER_SECOND = 4


def choose_kept(
    host: Host, release: Release, subject: LoadedModel, choices: Iterable[BatchingChoice], budget: Budget
) -> BatchingChoice:
    """Return the first batching that keeps the budget on this server, as the flow does; else the last one."""
    for choice in choices:
        tried = release.model_copy(update={"batching": choice.batching})
        address = host.deploy(tried, subject.resolved.folder)
        checked = check_budget(address, release.contract, subject.sample, budget, seconds=2.0)
        console.print(f"{choice.describe()}: {checked.describe()}, {'kept' if checked.is_kept else 'NOT kept'}")
        if checked.is_kept:
            break
    host.remove(tried)
    return choice


def choose_served(spec: EndpointSpec, subject: LoadedModel, release: Release, folder: Path) -> BatchingConfig:
    """Return the batching that the flow would serve a model with on Triton."""
    assert spec.budget is not None
    shutil.rmtree(folder, ignore_errors=True)
    with triton_server(folder / "repository", folder / "triton") as server:
        host = TritonHost(repository=server.repository, url=server.url, grpc=server.grpc)
        choices = resolve_batching(spec, subject)
        return choose_kept(host, release, subject, choices, spec.budget).batching


def latency_figures(
    spec: EndpointSpec, subject: LoadedModel, release: Release, folder: Path, *, seconds: int, rounds: int
) -> dict[str, Any]:
    """Measure a model on Triton with its batching and without it in turn, at 100 requests a second."""
    assert spec.budget is not None
    budget = Budget(latency_ms=spec.budget.latency_ms, rate=RATE)
    contract, sample = subject.contract, subject.sample
    with triton_server(folder / "repository", folder / "triton") as server:
        host = TritonHost(repository=server.repository, url=server.url, grpc=server.grpc)
        choices = resolve_batching(spec.model_copy(update={"budget": budget}), subject)
        choice = choose_kept(host, release, subject, choices, budget)
        releases = {
            "without": release.model_copy(update={"endpoint": f"{release.endpoint}-without"}),
            "with": release.model_copy(update={"batching": choice.batching}),
            # Not chosen at this rate: what the batcher itself costs a lone caller.
            "with a batcher": release.model_copy(
                update={"endpoint": f"{release.endpoint}-batcher", "batching": BatchingConfig(batch_size_max=16)}
            ),
        }
        addresses = {name: host.deploy(each, subject.resolved.folder) for name, each in releases.items()}
        lone: dict[str, list[float]] = {name: [] for name in releases}
        steady: dict[str, list[Latency]] = {name: [] for name in releases}
        burst: dict[str, list[Latency]] = {name: [] for name in releases}
        # What differs by a tenth of a millisecond needs short turns: the machine is not the same from second to second.
        for _, (name, address) in itertools.product(range(rounds * seconds * _TURNS_PER_SECOND), addresses.items()):
            turn = run_closed_loop(address, contract, sample, callers=1, seconds=1 / _TURNS_PER_SECOND)
            lone[name].append(turn.p50_ms)
        for _ in range(rounds):
            for name, address in addresses.items():
                for found, rate in ((steady, RATE), (burst, 2 * RATE)):
                    latency = measure_latency(address, contract, sample, rate=rate, seconds=seconds)
                    assert latency is not None
                    found[name].append(latency)
    return {
        "batching": choice.batching.model_dump(),
        "lone_caller_ms": {name: round(statistics.median(each), 3) for name, each in lone.items()},
        "lone_caller_with_over_without": _ratio(lone["with"], lone["without"]),
        "lone_caller_with_a_batcher_over_without": _ratio(lone["with a batcher"], lone["without"]),
        "at_100_per_second": {name: _describe(each) for name, each in steady.items()},
        "at_200_per_second": {name: _describe(each) for name, each in burst.items()},
        "p99_within_budget": {
            "at the rate": _median_p99(steady["with"]) <= budget.latency_ms,
            "at twice the rate": _median_p99(burst["with"]) <= budget.latency_ms,
        },
    }


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios of turns, of which each has both."""
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


def _median_p99(found: Sequence[Latency]) -> float:
    return statistics.median(each.p99_ms for each in found)


def _describe(found: Sequence[Latency]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(each.p50_ms for each in found), 2),
        "p99_ms": round(_median_p99(found), 2),
        "errors": sum(each.errors for each in found),
    }
