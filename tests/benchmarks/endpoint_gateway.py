"""What the gateway costs: requests a second through it over Triton alone, and what it adds at 100 requests a second."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits, Route
from serving.gateway.route import ServedVersion as Version
from serving.targets import Address
from tasks.endpoint.load import measure_latency
from tasks.endpoint.resolve import Sample
from tests.benchmarks.endpoint_servers import Served, triton_tuned
from tests.benchmarks.endpoint_wrk import wrk
from tests.benchmarks.shared import console

KEY = "benchmark-key-of-32-characters-00"
RATE = 100.0


def gateway_figures(models: list[Served], folder: Path, *, seconds: int, rounds: int) -> dict[str, Any]:
    """Measure Triton alone and through the gateway in turn, on one and the same server."""
    from infra.local.gateway import gateway_server

    found: dict[str, Any] = {}
    for model in models:
        with ExitStack() as stack:
            up = stack.enter_context(triton_tuned(model, folder / f"gateway-{model.name}"))
            gateway = stack.enter_context(gateway_server(folder / f"door-{model.name}"))
            assert up.address is not None
            with GatewayClient(gateway.url, gateway.admin_key) as client:
                client.put_key("bench", KEY)
                served = Version.from_address(up.address, version=model.release.version, weight=100)
                limits = Limits(in_flight_max=64, queue_max=256)
                client.put(
                    model.release.endpoint,
                    Route(versions=(served,), contract=model.release.contract, limits=limits, keys=("bench",)),
                )
            console.print(f"{model.name}: Triton alone and through the gateway, in turn")
            through = Address(url=gateway.url, model=model.release.endpoint, version=None)
            found[model.name] = _compare(model, up.url, up.address, through, seconds, rounds)
    return {
        "gateway_cost": {name: each["cost"] for name, each in found.items()},
        "gateway": found,
        "gateway_added_p50_ms_at_100_per_second": max(each["added_p50_ms"] for each in found.values()),
    }


def _compare(
    model: Served, url: str, alone: Address, through: Address, seconds: int, rounds: int
) -> Mapping[str, float]:
    door = f"{through.url}/v2/models/{through.model}/infer"
    rates: dict[str, list[float]] = {"alone": [], "through": []}
    p50s: dict[str, list[float]] = {"alone": [], "through": []}
    x_NF = model.rows()
    sample = Sample(inputs={"x": x_NF}, outputs={}, rows=len(x_NF))
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(rounds):
        rates["alone"].append(wrk(url, model.bodies(), seconds).per_second)
        rates["through"].append(wrk(door, model.bodies(), seconds, KEY).per_second)
        for name, address in (("alone", alone), ("through", through)):
            contract = model.release.contract
            latency = measure_latency(address, contract, sample, rate=RATE, seconds=seconds, headers=headers)
            assert latency is not None
            assert latency.errors == 0
            p50s[name].append(latency.p50_ms)
    middle = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "alone_per_second": round(middle["alone"], 1),
        "through_per_second": round(middle["through"], 1),
        "cost": round(middle["through"] / middle["alone"], 3),
        "alone_p50_ms_at_100": round(statistics.median(p50s["alone"]), 3),
        "through_p50_ms_at_100": round(statistics.median(p50s["through"]), 3),
        "added_p50_ms": round(statistics.median(p50s["through"]) - statistics.median(p50s["alone"]), 3),
    }
