"""Figures of endpoints: plain FastAPI and every target under the same client in turn, what the gateway costs, how long
callers wait beside one that abuses the gateway, how long a load from zero takes, and the requests that are lost while
versions come and go and processes are killed.

ROUNDS, SECONDS (of each measurement), PARTS (servers, gateway, abuse, latency, lost), MODELS (small, wide) and
BENCH_FOLDER are taken from the environment. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from rich.table import Table

from tests.benchmarks.endpoint_servers import Contender, Served, Up, contenders
from tests.benchmarks.endpoint_wrk import CONNECTIONS, Load, median, missing, wrk
from tests.benchmarks.shared import FEATURES, FOLDER, ROUNDS, console, machine, open_registry, use_experiment

if TYPE_CHECKING:
    from serving.model.release import Release
    from tasks.endpoint.resolve import LoadedModel
    from tasks.endpoint.spec import EndpointSpec

SECONDS = int(os.environ.get("SECONDS", "8"))
PARTS = os.environ.get("PARTS", "servers gateway abuse latency lost").split()
WARM_SECONDS = 2
BUDGET_MS = 50.0
# The rate that the batching is chosen for: what a good part of the answers measured here comes to.
RATES = {"small": 2000.0, "wide": 500.0}
MODELS = os.environ.get("MODELS", "small wide").split()
WIDTHS = {name: width for name, width in (("small", 256), ("wide", 2048)) if name in MODELS}
FASTAPI_OVER_MIN, DEFAULT_OVER_MIN, LONE_OVER_MAX = 3.0, 1.2, 1.1


@dataclass(slots=True)
class Figures:
    """What was measured of one server under one model."""

    loads: list[Load] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, float]:
        load = median(self.loads)
        return {
            "requests_per_second": round(load.per_second, 1),
            "p50_ms": round(load.p50_ms, 2),
            "p99_ms": round(load.p99_ms, 2),
            "errors": load.errors,
            "start_seconds": round(statistics.median(self.start_seconds), 2),
            "memory_mb": round(statistics.median(self.memory_mb)),
        }


Found = dict[tuple[str, str], Figures]


def main() -> None:
    if how := missing():
        sys.exit(how)
    open_registry()
    folder = FOLDER / "endpoint"
    shutil.rmtree(folder, ignore_errors=True)
    models = [make_served(name, width, folder / f"choice-{name}") for name, width in WIDTHS.items()]
    result = {
        "machine": machine(),
        "connections": CONNECTIONS,
        "batching": {model.name: model.batching.model_dump() for model in models},
    }
    found: Found = {}
    if "servers" in PARTS:
        everybody = contenders()
        for each in everybody:
            if each.missing:
                console.print(f"{each.name} is missing here: {each.missing}")
        found = race(models, [each for each in everybody if each.missing is None], folder)
        result |= as_json(found, everybody)
    if "gateway" in PARTS:
        from tests.benchmarks.endpoint_gateway import gateway_figures

        result |= gateway_figures(models, folder, seconds=SECONDS, rounds=ROUNDS)
    if "abuse" in PARTS:
        from tests.benchmarks.endpoint_abuse import abuse_figures

        result |= abuse_figures(models[0], folder, seconds=SECONDS, rounds=ROUNDS)
    if "latency" in PARTS:
        result["latency"] = {name: measure_batching(name, folder / f"latency-{name}") for name in WIDTHS}
    if "lost" in PARTS:
        from tests.benchmarks.endpoint_lost import lost_figures

        result |= lost_figures(models[0], folder)
    show(found, result)
    sys.stdout.write(json.dumps(result) + "\n")


def make_served(name: str, width: int, folder: Path) -> Served:
    """Register a network 32-W-W-1 once, and choose the batching for it as the flow does, on a Triton in the folder."""
    import mlflow

    from tests.benchmarks.endpoint_latency import choose_served
    from tests.support import register_torch

    use_experiment("bench-endpoint")
    registered = f"endpoint-{name}"
    if not mlflow.MlflowClient().search_registered_models(f"name = '{registered}'"):
        torch.manual_seed(0)
        inner = (torch.nn.Linear(32, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU())
        register_torch(registered, torch.nn.Sequential(*inner, torch.nn.Linear(width, 1)), FEATURES)
    spec, subject, release = make_release(name)
    files = subject.resolved.folder
    batching = choose_served(spec, subject, release, folder)
    return Served(name=name, release=release, model=files, batching=batching)


def make_release(name: str) -> tuple[EndpointSpec, LoadedModel, Release]:
    """Return the spec of a network, its model, and a release of it without batching."""
    from serving.model.batching import BatchingConfig
    from tasks.endpoint.deploy import make_release
    from tasks.endpoint.resolve import load_endpoint_model
    from tasks.endpoint.spec import Budget, EndpointSpec

    budget = Budget(latency_ms=BUDGET_MS, rate=RATES[name], callers=CONNECTIONS)
    spec = EndpointSpec(name=f"bench-{name}", model=f"models:/endpoint-{name}/latest", budget=budget)
    subject = load_endpoint_model(spec)
    return spec, subject, make_release(spec, subject, BatchingConfig())


def measure_batching(name: str, folder: Path) -> dict[str, Any]:
    """Measure what a network's batching comes to at 100 requests a second."""
    from tests.benchmarks.endpoint_latency import latency_figures

    spec, subject, release = make_release(name)
    console.print(f"{name}: with its batching and without it, in turn")
    return latency_figures(spec, subject, release, folder, seconds=min(SECONDS, 4), rounds=ROUNDS)


def race(models: list[Served], everybody: list[Contender], folder: Path) -> Found:
    """Measure everybody in turn, each started anew; who fails is out, and its reason takes its place."""
    found: Found = {}
    turns = [(at, model, each) for at in range(ROUNDS) for model in models for each in everybody]
    for at, model, each in track(turns, "in turn", console=console):
        if each.missing:
            continue
        place = folder / f"{at}-{model.name}-{each.name.split()[0].strip(',').lower()}-{len(found)}"
        try:
            with each.start(model, place) as up:
                load, memory_mb = measure(up)
            figures = found.setdefault((model.name, each.name), Figures())
            figures.loads.append(load)
            figures.start_seconds.append(up.start_seconds)
            figures.memory_mb.append(memory_mb)
        except Exception as error:  # noqa: BLE001 - whatever a server fails with is what is said of it
            each.missing = f"{type(error).__name__}: {error}"
            console.print(f"{each.name} failed: {each.missing}")
        shutil.rmtree(place, ignore_errors=True)
    return found


def measure(up: Up) -> tuple[Load, float]:
    wrk(up.url, up.bodies, WARM_SECONDS)
    return wrk(up.url, up.bodies, SECONDS), up.memory_mb()


def as_json(found: Found, everybody: list[Contender]) -> dict[str, Any]:
    servers = {
        name: {
            each.name: found[name, each.name].as_json() if (name, each.name) in found else "missing"
            for each in everybody
        }
        for name in WIDTHS
    }
    small, wide = servers.get("small", {}), servers.get("wide", {})
    return {
        "servers": servers,
        "missing": {each.name: each.missing for each in everybody if each.missing},
        "triton_tuned_vs_fastapi": _over(small, "Triton, tuned", "FastAPI"),
        "triton_tuned_p99_ms": _of(small, "Triton, tuned", "p99_ms"),
        "triton_tuned_vs_fastapi_wide": _over(wide, "Triton, tuned", "FastAPI"),
        "triton_tuned_p99_ms_wide": _of(wide, "Triton, tuned", "p99_ms"),
        "triton_tuned_vs_triton_default": _over(wide, "Triton, tuned", "Triton, default"),
        "triton_tuned_vs_triton_default_small": _over(small, "Triton, tuned", "Triton, default"),
    }


def _of(servers: dict[str, Any], name: str, figure: str) -> float | None:
    return servers[name][figure] if isinstance(servers.get(name), dict) else None


def _over(servers: dict[str, Any], one: str, other: str) -> float | None:
    a, b = (_of(servers, name, "requests_per_second") for name in (one, other))
    return round(a / b, 2) if a and b else None


def show(found: Found, result: dict[str, Any]) -> None:
    table = Table(title=f"{CONNECTIONS} connections, single rows as JSON; {machine()}", title_justify="left")
    for name in ("model", "server", "requests/s", "p50 ms", "p99 ms", "errors", "first answer s", "memory MB"):
        table.add_column(name, justify="left" if name in ("model", "server") else "right")
    for (model, name), figures in sorted(found.items(), key=lambda item: item[0][0]):
        row = figures.as_json()
        table.add_row(model, name, *(f"{value:,}" for value in row.values()))
    if found:
        console.print(table)
    wanted = {
        "triton_tuned_vs_fastapi": f"at least {FASTAPI_OVER_MIN:g}, p99 at most {BUDGET_MS:g} ms",
        "triton_tuned_vs_triton_default": f"at least {DEFAULT_OVER_MIN:g}",
        "gateway_of_direct": "small at least 0.55, wide at least 0.85",
        "gateway_of_direct_grpc": "small at least 0.55, wide at least 0.85",
        "gateway_added_p50_ms_at_100_per_second": "at most 0.5",
        "gateway_added_p99_ms_at_100_per_second": "at most 2",
        "abuse_p99_growth": "at most 1.2",
        "requests_lost": "0",
        "wake_seconds": "Triton at most 5, also mid-unload",
        "latency": f"with over without at most {LONE_OVER_MAX:g}; p99 within {BUDGET_MS:g} ms at both rates",
    }
    table = Table(title="figures", title_justify="left")
    for name in ("figure", "measured", "wanted"):
        table.add_column(name)
    for name, value in result.items():
        # What has a table of its own.
        if name not in ("servers", "machine", "gateway", "abuse", "changes_and_kills"):
            table.add_row(name, str(value), wanted.get(name, ""))
    console.print(table)


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    console.print(f"{time.perf_counter() - began:,.0f} s")
