"""Twenty changes of a gateway under a steady load, while its control plane is killed twice, and its Envoy twice.

The callers send a request again where its connection broke without an answer, as HTTP clients do with requests that
change nothing. Lost is what was answered with an error, or not within 30 s. The administrator, too, sends a change
again where the gateway did not confirm it.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from infra.local.gateway import GatewayServer
from infra.local.triton import TritonServer
from serving.errors import EndpointFailed
from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits, Rollout, Route, ServedVersion, Shadow, SleepRule
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract
from tests.benchmarks.figures import show
from tests.benchmarks.shared import console

NAME, SLEEPY, OTHER = "bench-changes", "bench-sleepy", "bench-other"
RATE, CALLERS = 100.0, 8
_ANSWER_S_MAX, _AGAIN_S, _KILL_AFTER_S, _SETTLED_S, _CHANGE_S_MAX = 30.0, 0.01, 0.05, 1.0, 120.0
# Within which a gap, or a request that was sent again, is taken for a kill's doing.
_AFTER_KILL_S = 10.0
_REASONS_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request: when it was first sent and when it was answered, in seconds, and the last status, 0 for none."""

    began: float
    ended: float
    status: int
    is_sent_again: bool
    reason: str


def send_until_answered(connection: HTTPConnection, path: str, body: bytes) -> Answer:
    """Send a request, and again where its connection breaks without an answer, for at most 30 s."""
    began = time.monotonic()
    attempts = 0
    while True:
        attempts += 1
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            connection.close()
            status, reason = 0, repr(error)
        else:
            status, reason = response.status, "" if response.status == 200 else content.decode(errors="replace")
        ended = time.monotonic()
        if status or ended - began > _ANSWER_S_MAX:
            break
        time.sleep(_AGAIN_S)
    return Answer(began=began, ended=ended, status=status, is_sent_again=attempts > 1, reason=reason)


@contextmanager
def steady_load(url: str, bodies: Sequence[bytes]) -> Generator[list[Answer]]:
    """Send requests at a steady rate while the block runs; the list has their answers."""
    parts = urlsplit(url)
    answers: list[Answer] = []
    over = threading.Event()
    start = time.monotonic()

    def call(caller: int) -> None:
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=_ANSWER_S_MAX)
        for number in itertools.count(caller, CALLERS):
            if over.wait(max(0.0, start + number / RATE - time.monotonic())):
                break
            answers.append(send_until_answered(connection, parts.path, bodies[number % len(bodies)]))
        connection.close()

    callers = [threading.Thread(target=call, args=(caller,), name=f"caller-{caller}") for caller in range(CALLERS)]
    for each in callers:
        each.start()
    try:
        yield answers
    finally:
        over.set()
        for each in callers:
            each.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What was killed, "control_plane" or "envoy", and when."""

    process: str
    at: float


@dataclass(slots=True, kw_only=True)
class Administration:
    """The changes of the endpoints, and the kills in the midst of them."""

    gateway: GatewayServer
    triton: TritonServer
    contract: Contract
    versions: dict[str, ServedVersion]
    sleepy: ServedVersion
    body: bytes
    kills: list[Kill] = field(default_factory=list)
    wakes: list[Answer] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def change_all(self) -> None:
        """Make twenty changes, one after the other, four of them with a kill."""
        old, new, failing = self.versions
        self.change("another version", lambda: self.put({new: 100}))
        self.change("the earlier version", lambda: self.put({old: 100}), kill="control_plane")
        self.change("a canary is promoted", lambda: self.run_canary(old, new, "promoted"))
        self.change("a shadow", lambda: self.put({new: 100, old: 0}, shadow=Shadow(version=old)))
        self.change("no shadow", lambda: self.put({new: 100}))
        self.change("a canary is rolled back", lambda: self.run_canary(new, failing, "rolled back"))
        self.change("another endpoint is unloaded", self.let_sleep)
        self.change("another endpoint is loaded", self.wake, kill="envoy")
        self.change("two versions side by side", lambda: self.put({old: 50, new: 50}))
        self.change("another endpoint is added", lambda: self.put({old: 100}, name=OTHER))
        self.change("another endpoint is deleted", lambda: self.delete(OTHER))
        self.change("a canary is promoted", lambda: self.run_canary(new, old, "promoted"), kill="control_plane")
        self.change("another endpoint is unloaded", self.let_sleep)
        self.change("another endpoint is loaded", self.wake)
        self.change("other limits", lambda: self.put({old: 100}, limits=Limits(in_flight_max=32, queue_max=512)))
        self.change("a shadow that fails", lambda: self.put({old: 100, failing: 0}, shadow=Shadow(version=failing)))
        self.change("no shadow", lambda: self.put({old: 100}))
        self.change("a canary is rolled back", lambda: self.run_canary(old, failing, "rolled back"), kill="envoy")
        self.change("another endpoint is added", lambda: self.put({new: 100}, name=OTHER))
        self.change("another endpoint is deleted", lambda: self.delete(OTHER))

    def change(self, what: str, action: Callable[[], None], *, kill: str | None = None) -> None:
        """Make a change until the gateway confirms it; kill a process shortly after it began."""
        console.print(f"{len(self.changes) + 1}: {what}" + (f", kill -9 of {kill}" if kill else ""))
        self.changes.append(what)
        killer = threading.Timer(_KILL_AFTER_S, self._kill, (kill,)) if kill else None
        if killer:
            killer.start()
        until = time.monotonic() + _CHANGE_S_MAX
        while True:
            try:
                action()
                break
            except EndpointFailed:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        if killer:
            killer.join()
        time.sleep(_SETTLED_S)

    def put(self, weights: dict[str, float], *, name: str = NAME, **options: Any) -> None:
        """Put a route to these versions."""
        versions = tuple(
            self.versions[version].model_copy(update={"weight": weight}) for version, weight in weights.items()
        )
        with self._client() as client:
            client.put(name, Route(versions=versions, contract=self.contract, **options))

    def delete(self, name: str) -> None:
        """Delete an endpoint."""
        with self._client() as client:
            client.delete(name)

    def run_canary(self, old: str, canary: str, outcome: str) -> None:
        """Put a canary, and wait for its end. Raises AssertionError for another outcome."""
        rule = Rollout(version=canary, requests_min=50, error_rate_max=0.03)
        self.put({old: 50, canary: 50}, rollout=rule)
        with self._client() as client:
            state = client.wait_until(NAME, lambda each: each.verdict is not None, timeout_s=_CHANGE_S_MAX)
        assert state.verdict is not None
        assert outcome == state.verdict.outcome, state.verdict.reason

    def let_sleep(self) -> None:
        """Have the models of another endpoint unloaded."""
        rule = SleepRule(keep_warm_s=0.5, hold_s_max=120, grpc=self.triton.grpc)
        with self._client() as client:
            client.put(SLEEPY, Route(versions=(self.sleepy,), contract=self.contract, sleep=rule))
            client.wait_until(SLEEPY, lambda each: each.models == "asleep", timeout_s=_CHANGE_S_MAX)

    def wake(self) -> None:
        """Send it a request, which has its models loaded."""
        parts = urlsplit(self.gateway.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=_CHANGE_S_MAX)
        self.wakes.append(send_until_answered(connection, f"/v2/models/{SLEEPY}/infer", self.body))
        connection.close()

    def _client(self) -> GatewayClient:
        return GatewayClient(self.gateway.url, self.gateway.admin_key)

    def _kill(self, process: str) -> None:
        path = self.gateway.folder / f"{process}.pid"
        before = path.read_text()
        self.kills.append(Kill(process=process, at=time.monotonic()))
        os.kill(int(before), signal.SIGKILL)
        until = time.monotonic() + _CHANGE_S_MAX
        while path.read_text() == before and time.monotonic() < until:
            time.sleep(0.01)


def kill_figures(
    models: Sequence[str],
    batching: BatchingConfig,
    bodies: Sequence[bytes],
    gateway: GatewayServer,
    triton: TritonServer,
) -> dict[str, Any]:
    """Return the requests that were lost and sent again, and the longest gaps between two answers.

    Args:
        models: Two versions of a model, and one that fails on some bodies.
        batching: How Triton serves them.
        bodies: The requests.
        gateway: The gateway, whose processes are killed.
        triton: The model server.
    """
    administration = _deploy(models, batching, bodies[1], gateway, triton)
    administration.put({next(iter(administration.versions)): 100})
    with steady_load(f"{gateway.url}/v2/models/{NAME}/infer", bodies) as answers:
        time.sleep(_SETTLED_S)
        administration.change_all()
        time.sleep(_SETTLED_S)
    answers += administration.wakes
    lost = [answer for answer in answers if answer.status != 200]
    for answer in lost[:_REASONS_MAX]:
        console.print(f"lost: {answer.status} {answer.reason}")
    again = [answer for answer in answers if answer.is_sent_again]
    after_kill = [answer for answer in again if _is_after_kill(answer, administration.kills)]
    figures = {
        "changes": len(administration.changes),
        "kills": len(administration.kills),
        "requests": len(answers),
        "lost": len(lost),
        "sent_again_after_a_kill": len(after_kill),
        "sent_again_otherwise": len(again) - len(after_kill),
        "longest_gap_ms": _measure_gaps(answers, administration.kills),
    }
    show("changes and kills under a steady load", {"measured": figures}, {"lost": "0", "sent_again_otherwise": "0"})
    return figures


def _deploy(
    models: Sequence[str], batching: BatchingConfig, body: bytes, gateway: GatewayServer, triton: TritonServer
) -> Administration:
    """Deploy every version on Triton, and the first one once more as another endpoint's."""
    from serving.model.registry import resolve_model
    from serving.model.release import Release
    from serving.targets.triton import TritonHost
    from tasks.endpoint.resolve import load_endpoint_model
    from tasks.endpoint.spec import EndpointSpec

    host = TritonHost(repository=triton.repository, url=triton.url, grpc=triton.grpc)

    def deploy(name: str, model: str) -> tuple[ServedVersion, Contract]:
        contract = load_endpoint_model(EndpointSpec(name=name, model=model)).contract
        resolved = resolve_model(model)
        release = Release(endpoint=name, pin=resolved.pin, contract=contract, batching=batching)
        address = host.deploy(release, resolved.folder)
        return ServedVersion.from_address(address, version=release.version, weight=100), contract

    sleepy, contract = deploy(SLEEPY, models[0])
    versions = [deploy(NAME, model)[0] for model in models]
    return Administration(
        gateway=gateway,
        triton=triton,
        contract=contract,
        versions={each.version: each for each in versions},
        sleepy=sleepy,
        body=body,
    )


def _is_after_kill(answer: Answer, kills: Sequence[Kill]) -> bool:
    return any(answer.began < kill.at + _AFTER_KILL_S and kill.at < answer.ended for kill in kills)


def _measure_gaps(answers: Sequence[Answer], kills: Sequence[Kill]) -> dict[str, float]:
    """Return the longest time between two answers at a kill of each process, and while nothing was killed.

    A gap is that of the last kill, where several were shortly before it.
    """
    ended = sorted(answer.ended for answer in answers if answer.status == 200)
    gaps: dict[str, float] = {"control_plane": 0.0, "envoy": 0.0, "no kill": 0.0}
    for start, stop in itertools.pairwise(ended):
        earlier = [kill.process for kill in kills if start < kill.at + _AFTER_KILL_S and kill.at < stop]
        killed = earlier[-1] if earlier else "no kill"
        gaps[killed] = max(gaps[killed], 1000 * (stop - start))
    return {name: round(gap) for name, gap in gaps.items()}
