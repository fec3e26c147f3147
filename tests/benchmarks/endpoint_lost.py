"""Requests that are lost while an endpoint changes and processes are killed, and how long a load from zero takes.

The first changes are made by the flow: a version is switched, a canary promoted, another rolled back, and a load begins
while nothing is loaded. Twenty more, four of them with a kill -9, are those of `endpoint_kills`. A load from zero is
also measured for a request that comes while Triton is unloading the model.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from deployments.demo.endpoint import Callers
from deployments.demo.endpoint_faulty import LATE_MINUTES
from infra.local.triton import TritonServer, triton_server
from serving.errors import RolledBack
from serving.protocol.oip import encode_request
from tests.benchmarks.endpoint_kills import kill_figures
from tests.benchmarks.endpoint_servers import Served
from tests.benchmarks.shared import FEATURES, console, prefect

NAME = "bench-lost"
RATE = 50.0
WAKES = 3
_SETTLED_SECONDS = 2.0
_ASLEEP_SECONDS_MAX = 60.0
_KEEP_WARM_SECONDS = 1.0


def lost_figures(served: Served, folder: Path) -> dict[str, Any]:
    """Take an endpoint through its life under a steady load, then have each target that can sleep be woken."""
    from infra.local.gateway import gateway_server

    with ExitStack() as stack:
        stack.enter_context(prefect())
        triton = stack.enter_context(triton_server(folder / "lost" / "repository", folder / "lost" / "triton"))
        gateway = stack.enter_context(gateway_server(folder / "lost" / "gateway"))
        os.environ["OVERNIGHT_ADMIN_KEY"] = gateway.admin_key
        life = _Life(served, gateway.url, gateway.admin_key, triton)
        lost = life.lost()
        wake: dict[str, float | str] = {
            "triton": life.wake_seconds(),
            "triton_mid_unload": life.wake_seconds_mid_unload(),
        }
        killed = kill_figures(_versions(), served.batching, _bodies(served), gateway, triton)
        lost["changes and kills"] = killed["lost"]
        wake["ray_serve"] = _ray_wake_seconds(served, folder / "lost-ray")
    return {
        "requests_lost": sum(lost.values()),
        "requests_lost_while": lost,
        "requests_sent_again_after_a_kill": killed["sent_again_after_a_kill"],
        "longest_gap_ms": killed["longest_gap_ms"],
        "changes_and_kills": killed,
        "wake_seconds": wake,
    }


class _Life:
    """One endpoint on Triton, through the flow and the gateway."""

    def __init__(self, served: Served, gateway: str, admin_key: str, triton: TritonServer) -> None:
        self.served, self.gateway, self.admin_key, self.triton = served, gateway, admin_key, triton
        self.url = f"{gateway}/v2/models/{NAME}/infer"
        *self.versions, self.failing = _versions()

    def lost(self) -> dict[str, int]:
        """Return the requests that were lost by what went on meanwhile."""
        from tasks.endpoint.spec import Canary

        self.put(self.versions[0])
        rule = Canary(percent=20, requests_min=30, error_rate_max=0.05, seconds_max=60)
        lost = {
            "switching": self.during(lambda: self.put(self.versions[1])),
            "a canary is promoted": self.during(lambda: self.put(self.versions[0], rollout=rule)),
            "a canary is rolled back": self.during(lambda: self.rolled_back(rule)),
        }
        self.put(self.versions[0], keep_warm=_KEEP_WARM_SECONDS)
        self.wait_asleep()
        # The load begins while nothing is loaded.
        lost["waking"] = self.during(lambda: time.sleep(_SETTLED_SECONDS))
        return lost

    def put(self, model: str, **changes: Any) -> None:
        from flows.endpoint import online_endpoint
        from tasks.endpoint.spec import EndpointSpec
        from tasks.endpoint.targets import Triton

        target = Triton(repository=str(self.triton.repository), url=self.triton.url, grpc=self.triton.grpc)
        spec = {"name": NAME, "model": model, "gateway": self.gateway, "target": target}
        spec["batching"] = self.served.batching
        online_endpoint(EndpointSpec.model_validate({**spec, **changes}))

    def rolled_back(self, rule: Any) -> None:
        try:
            self.put(self.failing, rollout=rule)
        except RolledBack as error:
            console.print(str(error))
        else:
            message = "a version that fails must be rolled back, and was not"
            raise AssertionError(message)

    def during(self, change: Callable[[], None]) -> int:
        callers = Callers(url=self.url, bodies=_bodies(self.served), rate=RATE)
        with callers:
            time.sleep(_SETTLED_SECONDS)
            change()
            time.sleep(_SETTLED_SECONDS)
        console.print(f"{len(callers.answers):,} requests, {callers.lost} lost {callers.reasons}")
        return callers.lost

    def wait_asleep(self) -> None:
        _wait_asleep(self.gateway, self.admin_key, NAME)

    def wake_seconds(self) -> float:
        """Return the median seconds of a request that finds nothing loaded."""
        return round(statistics.median(self._wake() for _ in range(WAKES)), 3)

    def wake_seconds_mid_unload(self) -> float:
        """Return the median seconds of a request that comes while Triton is unloading the model."""
        return round(statistics.median(self._wake_mid_unload() for _ in range(WAKES)), 3)

    def _wake(self) -> float:
        self.wait_asleep()
        return _ask(self.url, self.served.bodies()[0])

    def _wake_mid_unload(self) -> float:
        until = time.monotonic() + _ASLEEP_SECONDS_MAX
        while "UNLOADING" not in _read_states(self.triton.url):
            assert time.monotonic() < until
            time.sleep(0.005)
        return _ask(self.url, self.served.bodies()[0])


def _wait_asleep(gateway: str, admin_key: str, name: str) -> None:
    from serving.gateway.client import GatewayClient

    with GatewayClient(gateway, admin_key) as client:
        client.wait_until(name, lambda state: state.models == "asleep", timeout_s=_ASLEEP_SECONDS_MAX)
    time.sleep(0.5)


def _read_states(triton: str) -> set[str]:
    """Return the states of Triton's models."""
    listed = httpx.post(f"{triton}/v2/repository/index", content=b"{}", trust_env=False).json()
    return {each["state"] for each in listed if "state" in each}


def _ask(url: str, body: bytes) -> float:
    began = time.perf_counter()
    answer = httpx.post(url, content=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - began


def _versions() -> list[str]:
    """Register two networks and a model that fails on some rows as versions of one model, once."""
    import mlflow
    import torch

    from deployments.demo.endpoint_versions import register_faulty
    from tests.support import register_torch

    if not mlflow.MlflowClient().search_registered_models(f"name = '{NAME}'"):
        for seed in (1, 2):
            torch.manual_seed(seed)
            layers = (torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
            register_torch(NAME, torch.nn.Sequential(*layers), FEATURES)
        register_faulty("delicate", NAME, "x", FEATURES, "score")
    return [f"models:/{NAME}/{version}" for version in (1, 2, 3)]


def _bodies(served: Served) -> list[bytes]:
    """Return requests of one row, one in four of which the faulty version fails on."""
    x_NF = served.rows()
    x_NF[::4, 0] = 2 * LATE_MINUTES
    return [encode_request(served.release.contract, {"x": row[None]}).content for row in x_NF]


def _ray_wake_seconds(served: Served, folder: Path) -> float | str:
    """Return the seconds of a request that finds no replica, at Ray Serve's own address."""
    from serving.targets.ray_serve import RayServeHost, RayServeTarget
    from tasks.endpoint.change import scale_to_zero
    from tasks.endpoint.client import infer_path
    from tests.ray_cluster import ray_cluster

    with ray_cluster(folder / "ray", environment={"PYTHONPATH": os.pathsep.join(sys.path)}) as cluster:
        target = RayServeTarget(folder=str(folder / "releases"), keep_warm_seconds=_KEEP_WARM_SECONDS)
        host = RayServeHost(
            dashboard_url=cluster.dashboard_url,
            serve_url=cluster.serve_url,
            folder=folder / "releases",
            target=target,
            token=cluster.token,
        )
        address = host.deploy(scale_to_zero(served.tuned), served.model)
        url = address.url.rstrip("/") + infer_path(address)
        waits = []
        for _ in range(WAKES):
            _wait_no_replica(cluster.dashboard_url, cluster.token)
            waits.append(_ask(url, served.bodies()[0]))
    return round(statistics.median(waits), 3)


def _wait_no_replica(dashboard: str, token: str) -> None:
    until = time.monotonic() + _ASLEEP_SECONDS_MAX
    headers = {"Authorization": f"Bearer {token}"}
    while time.monotonic() < until:
        told = httpx.get(f"{dashboard}/api/serve/applications/", headers=headers, trust_env=False).json()
        applications = told["applications"].values()
        if not any(each["replicas"] for found in applications for each in found["deployments"].values()):
            return
        time.sleep(0.5)
    message = f"Ray Serve must have no replica within {_ASLEEP_SECONDS_MAX:g} s without requests, and still has one."
    raise AssertionError(message)
