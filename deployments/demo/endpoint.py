"""The demo of an endpoint: the delay model of the flights behind a real Triton and the gateway.

`python -m deployments.demo.endpoint` puts the model online, asks it, promotes a second version by a canary while
callers keep asking, has three bad ones turned away, lets the endpoint fall asleep and wakes it, and stops everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

import httpx
import polars as pl

from deployments.demo.flights import FEATURES
from deployments.demo.prepare import console, prepare_data, use_registry

if TYPE_CHECKING:
    from deployments.demo.endpoint_versions import Versions
    from infra.local.triton import TritonServer
    from serving.gateway.client import GatewayClient
    from tasks.endpoint.report import Endpoint
    from tasks.endpoint.spec import EndpointSpec
    from tasks.endpoint.targets import Triton


NAME = "flight-delay"
KEY = "FLIGHT_DELAY_KEY"
CALLS_PER_SECOND = 60.0
LATENCY_MS = 50.0
KEEP_WARM_SECONDS = 3.0
TOLERANCE = 1e-4
_WAKE_SECONDS_MAX = 60.0
_ROWS = 600
_BODY_SHOWN = 110
_ASLEEP_SECONDS_MAX = 30.0
_OK = 200
_TIMEOUT_SECONDS = 60.0
_REASONS_MAX = 3


def main() -> None:
    """Run the demo in the folder that the command line names; exits with 1 where anything is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m deployments.demo.endpoint", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything is kept")
    folder: Path = parser.parse_args().folder.absolute()
    # MLflow's advice to those who log a model, at every load of one without type hints.
    warnings.filterwarnings("ignore", ".*Add type hints", UserWarning)
    use_registry(folder)
    prepare_data(folder)
    from deployments.demo.endpoint_versions import register_versions  # noqa: PLC0415 - the registry is set by now

    console.print("Registering two good versions and three bad ones, each unless it is there")
    versions = register_versions(folder)
    with ExitStack() as stack:
        stage = start_servers(stack, folder)
        run_life_cycle(stage, versions)
    console.print("[bold green]Everything is stopped.[/]")
    if stage.wrong:
        console.print(f"[bold red]Not as it must be:[/] {'; '.join(stage.wrong)}")
        sys.exit(1)


@dataclass(slots=True, kw_only=True)
class Stage:
    """The servers of the demo, and what went wrong on them."""

    gateway: str
    triton: TritonServer
    key: str = field(repr=False)
    bodies: Sequence[bytes]
    admin_key: str = field(repr=False)
    wrong: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where the endpoint is asked."""
        return f"{self.gateway}/v2/models/{NAME}/infer"

    @property
    def headers(self) -> dict[str, str]:
        """What a caller sends beside its request."""
        return {"Authorization": f"Bearer {self.key}"}

    def check(self, what: str, *, holds: bool) -> None:
        """Record what must hold and does not."""
        if not holds:
            self.wrong.append(what)


def start_servers(stack: ExitStack, folder: Path) -> Stage:
    """Start Prefect, Triton and the gateway on loopback; the stack stops them."""
    from infra.local.gateway import gateway_server  # noqa: PLC0415 - the versions are registered before
    from infra.local.prefect_server import prefect_server  # noqa: PLC0415
    from infra.local.triton import triton_server  # noqa: PLC0415

    console.print("Starting Prefect, Triton and the gateway on loopback")
    prefect = stack.enter_context(prefect_server(folder / "prefect"))
    triton = stack.enter_context(triton_server(folder / "endpoint" / "repository", folder / "endpoint" / "triton"))
    gateway = stack.enter_context(gateway_server(folder / "endpoint" / "gateway"))
    key = secrets.token_hex(32)
    os.environ.update(prefect.environment)
    os.environ.update({KEY: key, "OVERNIGHT_ADMIN_KEY": gateway.admin_key, "PREFECT_LOGGING_LEVEL": "CRITICAL"})
    console.print(f"Prefect at {prefect.ui_url}, Triton at {triton.url}, the gateway at {gateway.url}/v2")
    return Stage(
        gateway=gateway.url,
        triton=triton,
        key=key,
        bodies=make_bodies(folder),
        admin_key=gateway.admin_key,
    )


def make_bodies(folder: Path) -> list[bytes]:
    """Return requests for single flights, one in ten of which left over an hour late."""
    table = pl.scan_parquet(folder / "flights" / "flights-*.parquet").select(FEATURES).head(50_000).collect()
    late = table.filter(pl.col("dep_delay") > 60).head(_ROWS // 10)  # noqa: PLR2004 - an hour in minutes
    usual = table.filter(pl.col("dep_delay").is_between(-60, 59)).head(_ROWS - len(late))
    rows = pl.concat([usual, late]).sample(fraction=1, shuffle=True, seed=1).rows()
    tensors = ({"name": "features", "datatype": "FP32", "shape": [1, len(row)], "data": row} for row in rows)
    return [json.dumps({"inputs": [tensor]}).encode() for tensor in tensors]


def run_life_cycle(stage: Stage, versions: Versions) -> None:
    """Go through the life of an endpoint."""
    from flows.endpoint import retire_endpoint  # noqa: PLC0415 - the servers' addresses must be set before
    from tasks.endpoint.spec import AllAtOnce, Canary  # noqa: PLC0415

    _print_title("1. The first version goes online, batching for 50 ms")
    console.print(deploy_version(stage, versions.first, AllAtOnce()).markdown())
    ask(stage, stage.bodies[:3])
    canary = Canary(percent=20, requests_min=50, error_rate_max=0.01, p99_ms_max=200, seconds_max=60)
    _print_title("2. A second version, by a canary of 20 %, while callers keep asking")
    change_under_load(stage, "the second version is promoted", lambda: deploy_version(stage, versions.second, canary))
    _print_title("3. A version that answers differently each time: it fails its verification")
    change_under_load(
        stage, "the moody version fails to verify", lambda: check_refused(stage, versions.moody, canary, "VerifyFailed")
    )
    _print_title("4. A version that fails on late flights, which its verification can't know: it is rolled back")
    change_under_load(
        stage, "the delicate version is rolled back", lambda: check_refused(stage, versions.delicate, canary)
    )
    _print_title("5. A version that is slow on late flights: it is rolled back")
    change_under_load(stage, "the slow version is rolled back", lambda: check_refused(stage, versions.slow, canary))
    _print_title(f"6. Nobody asks for {KEEP_WARM_SECONDS:g} s: the model is unloaded, and the next request wakes it")
    deploy_version(stage, versions.second, AllAtOnce(), keep_warm=KEEP_WARM_SECONDS)
    unload_and_reload(stage)
    _print_title("7. The endpoint is retired")
    gone = retire_endpoint(NAME, make_target(stage), stage.gateway)
    console.print(f"Versions {', '.join(gone)} are taken down")
    status = httpx.post(stage.url, content=stage.bodies[0], headers=stage.headers).status_code
    console.print(f"A request is answered with {status} now")
    stage.check("a retired endpoint is not found", holds=status == 404)  # noqa: PLR2004 - HTTP's Not Found


def make_spec(stage: Stage, model: str, rollout: object, keep_warm: float | None = None) -> EndpointSpec:
    """Return the endpoint of the demo with one of its versions."""
    from tasks.endpoint.spec import Access, Budget, EndpointSpec  # noqa: PLC0415 - the same

    return EndpointSpec.model_validate(
        {
            "name": NAME,
            "model": model,
            "gateway": stage.gateway,
            "target": make_target(stage),
            "budget": Budget(latency_ms=LATENCY_MS, rate=CALLS_PER_SECOND, callers=32),
            "rollout": rollout,
            "access": Access(environment=(KEY,)),
            "keep_warm": keep_warm,
            # Minutes out of features of thousands: a batch of another size moves the fifth digit of a float32.
            "tolerance": TOLERANCE,
        }
    )


def make_target(stage: Stage) -> Triton:
    """Return the Triton of the demo as a target."""
    from tasks.endpoint.targets import Triton  # noqa: PLC0415 - the same

    triton = stage.triton
    return Triton(repository=str(triton.repository), url=triton.url, grpc=triton.grpc)


def deploy_version(stage: Stage, model: str, rollout: object, keep_warm: float | None = None) -> Endpoint:
    """Run the flow, and print its result."""
    from flows.endpoint import online_endpoint  # noqa: PLC0415 - the same

    endpoint = online_endpoint(make_spec(stage, model, rollout, keep_warm))
    console.print(f"[green]{endpoint.summary}[/]")
    return endpoint


def check_refused(stage: Stage, model: str, rollout: object, kind: str = "RolledBack") -> None:
    """Run the flow for a version that must be refused, and print why it was."""
    from serving.errors import EndpointFailed  # noqa: PLC0415 - the same

    try:
        deploy_version(stage, model, rollout)
    except EndpointFailed as error:
        console.print(f"[yellow]{type(error).__name__}:[/] {error}", markup=True, highlight=False)
        stage.check(f"{model} ends as {kind}, got {type(error).__name__}", holds=type(error).__name__ == kind)
    else:
        stage.check(f"{model} is turned away", holds=False)


def change_under_load(stage: Stage, what: str, change: Callable[[], object]) -> None:
    """Change something while callers keep asking, and count what they got."""
    callers = Callers(url=stage.url, bodies=stage.bodies, rate=CALLS_PER_SECOND, headers=stage.headers)
    with callers:
        time.sleep(1)
        change()
        time.sleep(1)
    counts = ", ".join(f"{count:,} by version {version}" for version, count in sorted(callers.versions.items()))
    console.print(f"Meanwhile {len(callers.answers):,} calls, {callers.lost} of them lost: {counts}")
    for reason in callers.reasons:
        console.print(f"  [red]{reason}[/]", highlight=False)
    stage.check(f"no call is lost while {what}", holds=callers.lost == 0)


def ask(stage: Stage, several: Sequence[bytes]) -> None:
    """Ask as curl does, and print both sides."""
    for body in several:
        text = body.decode()
        shown = text if len(text) <= _BODY_SHOWN else f"{text[:_BODY_SHOWN]}..."
        console.print(f"$ curl -H 'Authorization: Bearer ...' {stage.url} -d '{shown}'", highlight=False)
        start = time.perf_counter()
        headers = {**stage.headers, "Content-Type": "application/json"}
        answer = httpx.post(stage.url, content=body, headers=headers, timeout=_WAKE_SECONDS_MAX)
        console.print(f"{answer.text}   [dim]{1000 * (time.perf_counter() - start):.1f} ms[/]", highlight=False)
        stage.check(f"a request is answered, got {answer.status_code}", holds=answer.status_code == _OK)


def unload_and_reload(stage: Stage) -> None:
    """Wait until the model is unloaded, then ask once."""
    from serving.gateway.client import GatewayClient  # noqa: PLC0415 - the same

    with GatewayClient(stage.gateway, stage.admin_key) as client:
        deadline = time.monotonic() + _ASLEEP_SECONDS_MAX
        while (state := _read_models(client)) != "asleep" and time.monotonic() < deadline:
            time.sleep(0.2)
        console.print(f"The model is {state}; Triton lists: {_list_triton_models(stage)}")
        stage.check(f"the model is asleep, got {state}", holds=state == "asleep")
        ask(stage, stage.bodies[:1])
        console.print(f"The model is {_read_models(client)}; Triton lists: {_list_triton_models(stage)}")
        ask(stage, stage.bodies[1:2])


def _read_models(client: GatewayClient) -> str:
    status = client.get(NAME)
    return status.models if status else "gone"


def _list_triton_models(stage: Stage) -> str:
    listed = httpx.post(f"{stage.triton.url}/v2/repository/index", json={}).json()
    return ", ".join(f"{each['name']} {each.get('version', '')} {each.get('state', 'not loaded')}" for each in listed)


def _print_title(words: str) -> None:
    console.print(f"\n[bold]{words}[/]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer: when it came, in seconds since the callers began, how long it took, its status and its version."""

    at_seconds: float
    ms: float
    status: int
    version: str | None


@dataclass(slots=True, kw_only=True)
class Callers:
    """Several callers side by side; a context manager that has them call while its block runs.

    `bodies` are asked in turn. A call that gets no answer at all counts as one of status 0.
    """

    url: str
    bodies: Sequence[bytes]
    rate: float
    callers: int = 8
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    answers: list[Answer] = field(default_factory=list, init=False)
    reasons: list[str] = field(default_factory=list, init=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False)
    _threads: list[threading.Thread] = field(default_factory=list, init=False)
    _start: float = field(default=0.0, init=False)

    def __enter__(self) -> Self:
        """Begin to call."""
        self._start = time.perf_counter()
        numbers = range(self.callers)
        self._threads = [threading.Thread(target=self._call, args=(at,), name=f"caller-{at}") for at in numbers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let every caller have its answer, then return."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def lost(self) -> int:
        """How many calls got no prediction."""
        return sum(answer.status != 200 for answer in self.answers)  # noqa: PLR2004 - HTTP's OK

    @property
    def versions(self) -> Counter[str]:
        """How many predictions came from each version."""
        return Counter(answer.version for answer in self.answers if answer.version is not None)

    def _call(self, caller: int) -> None:
        parts = urlsplit(self.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_SECONDS)
        for call in itertools.count():
            due = self._start + (caller + call * self.callers) / self.rate
            if self._over.wait(max(0.0, due - time.perf_counter())):
                break
            began = time.perf_counter()
            body = self.bodies[(caller + call * self.callers) % len(self.bodies)]
            status, version = self._ask(connection, parts.path, body)
            now = time.perf_counter()
            self.answers.append(
                Answer(at_seconds=now - self._start, ms=1000 * (now - began), status=status, version=version)
            )
        connection.close()

    def _ask(self, connection: HTTPConnection, path: str, body: bytes) -> tuple[int, str | None]:
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json", **self.headers})
            response = connection.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            connection.close()
            self._note(repr(error))
            return 0, None
        if response.status != 200:  # noqa: PLR2004 - HTTP's OK
            self._note(f"{response.status} {content.decode(errors='replace')}")
            return response.status, None
        return response.status, json.loads(content).get("model_version")

    def _note(self, reason: str) -> None:
        if len(self.reasons) < _REASONS_MAX:
            self.reasons.append(reason)


if __name__ == "__main__":
    main()
