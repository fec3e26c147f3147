"""What the gateway costs: requests a second through it over Triton alone, by HTTP and by gRPC, and what it adds to the
median and the 99th percentile at 100 requests a second.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits, Route
from serving.gateway.route import ServedVersion as Version
from serving.targets import Address
from tasks.endpoint.client import infer_path
from tasks.endpoint.load import measure_latency
from tasks.endpoint.resolve import Sample
from tests.benchmarks.endpoint_grpc import encode_grpc_requests, run_grpc_load
from tests.benchmarks.endpoint_servers import Served, triton_tuned
from tests.benchmarks.endpoint_wrk import wrk
from tests.benchmarks.figures import show
from tests.benchmarks.shared import console

KEY = "benchmark-key-of-32-characters-00"
RATE = 100.0
BEARER = {"Authorization": f"Bearer {KEY}"}
_SIDES = ("direct", "gateway")
_WANTED = {
    **dict.fromkeys(("http_of_direct", "grpc_of_direct"), "small at least 0.55, wide at least 0.85"),
    "added_p50_ms": "at most 0.5",
    "added_p99_ms": "at most 2",
}


def gateway_figures(models: list[Served], folder: Path, *, seconds: int, rounds: int) -> dict[str, Any]:
    """Measure Triton alone and through the gateway in turn, on one and the same server."""
    found: dict[str, dict[str, float]] = {}
    for model in models:
        with serve_behind_gateway(model, folder / f"gateway-{model.name}") as setup:
            console.print(f"{model.name}: Triton alone and through the gateway, in turn")
            found[model.name] = _compare(setup, seconds, rounds)
    show("Triton alone and through the gateway", found, _WANTED)
    return {
        "gateway_of_direct": {name: each["http_of_direct"] for name, each in found.items()},
        "gateway_of_direct_grpc": {name: each["grpc_of_direct"] for name, each in found.items()},
        "gateway_added_p50_ms_at_100_per_second": {name: each["added_p50_ms"] for name, each in found.items()},
        "gateway_added_p99_ms_at_100_per_second": {name: each["added_p99_ms"] for name, each in found.items()},
        "gateway": found,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A tuned Triton with one model, and a gateway in front of it whose one endpoint needs KEY."""

    model: Served
    triton: Address
    gateway: Address

    def measure_latency(self, side: str, seconds: float) -> tuple[float, ...]:
        """Return the sorted milliseconds of requests at 100 a second to "direct" or "gateway", none of which failed."""
        x_NF = self.model.rows()
        sample = Sample(inputs={"x": x_NF}, outputs={}, rows=len(x_NF))
        address = self.triton if side == "direct" else self.gateway
        found = measure_latency(
            address, self.model.release.contract, sample, rate=RATE, seconds=seconds, headers=BEARER
        )
        assert found is not None
        assert found.errors == 0
        return found.samples_ms


@contextmanager
def serve_behind_gateway(model: Served, folder: Path) -> Generator[Setup]:
    """Run both servers for as long as the block runs."""
    from infra.local.gateway import gateway_server

    with triton_tuned(model, folder / "triton") as up, gateway_server(folder / "gateway") as gateway:
        assert up.address is not None
        with GatewayClient(gateway.url, gateway.admin_key) as client:
            client.put_key("bench", KEY)
            served = Version.from_address(up.address, version=model.release.version, weight=100)
            limits = Limits(in_flight_max=64, queue_max=256)
            contract = model.release.contract
            client.put(
                model.release.endpoint, Route(versions=(served,), contract=contract, limits=limits, keys=("bench",))
            )
        through = Address(url=gateway.url, model=model.release.endpoint, version=None)
        yield Setup(model=model, triton=up.address, gateway=through)


@dataclass(slots=True)
class _Side:
    """What was measured of Triton alone, or through the gateway."""

    http: list[float] = field(default_factory=list)
    grpc: list[float] = field(default_factory=list)
    p50s_ms: list[float] = field(default_factory=list)
    samples_ms: list[float] = field(default_factory=list)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of all rounds together."""
        return float(np.percentile(self.samples_ms, 99))


def _compare(setup: Setup, seconds: int, rounds: int) -> dict[str, float]:
    sides = {side: _Side() for side in _SIDES}
    for number in range(rounds):
        # Neither side has the advantage of coming first.
        for side in _SIDES if number % 2 == 0 else _SIDES[::-1]:
            sides[side].http.append(_measure_http(setup, side, seconds))
            sides[side].grpc.append(_measure_grpc(setup, side, seconds))
            samples_ms = setup.measure_latency(side, seconds)
            sides[side].p50s_ms.append(statistics.median(samples_ms))
            sides[side].samples_ms += samples_ms
    direct, gateway = (sides[side] for side in _SIDES)
    figures = {}
    for protocol in ("http", "grpc"):
        alone, through = (statistics.median(getattr(side, protocol)) for side in (direct, gateway))
        figures[f"{protocol}_direct_per_second"] = round(alone, 1)
        figures[f"{protocol}_gateway_per_second"] = round(through, 1)
        figures[f"{protocol}_of_direct"] = round(through / alone, 3)
    p50s_ms = [statistics.median(side.p50s_ms) for side in (direct, gateway)]
    return {
        **figures,
        "direct_p50_ms": round(p50s_ms[0], 3),
        "gateway_p50_ms": round(p50s_ms[1], 3),
        "added_p50_ms": round(p50s_ms[1] - p50s_ms[0], 3),
        "direct_p99_ms": round(direct.p99_ms, 3),
        "gateway_p99_ms": round(gateway.p99_ms, 3),
        "added_p99_ms": round(gateway.p99_ms - direct.p99_ms, 3),
    }


def _measure_http(setup: Setup, side: str, seconds: int) -> float:
    address = setup.triton if side == "direct" else setup.gateway
    key = None if side == "direct" else KEY
    load = wrk(address.url.rstrip("/") + infer_path(address), setup.model.bodies(), seconds, key)
    assert load.errors == 0
    return load.per_second


def _measure_grpc(setup: Setup, side: str, seconds: int) -> float:
    bodies = encode_grpc_requests(setup.triton.model, "x", setup.model.rows())
    if side == "direct":
        assert setup.triton.grpc is not None
        return run_grpc_load(setup.triton.grpc, bodies, seconds)
    metadata = {"overnight-endpoint": setup.gateway.model, "authorization": f"Bearer {KEY}"}
    return run_grpc_load(setup.gateway.url.removeprefix("http://"), bodies, seconds, metadata)
