"""Measures an endpoint: its cold start, and what requests take on a model server or in a process of its own."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import httpx

from serving.errors import EndpointFailed, ProfileFailed
from serving.extras import import_extra
from serving.model.batching import BatchingConfig, CostModel
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Scaling
from serving.targets import Address
from tasks.endpoint.client import InferClient
from tasks.endpoint.deploy import make_host, make_release
from tasks.endpoint.load import LoopStats, run_closed_loop
from tasks.endpoint.resolve import LoadedModel
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import AnyTarget

_CHILD = "tasks.scheduler.endpoint_process"
_WARM_REQUESTS = 20
_REQUESTS = 300
_SECONDS = 2.0
_END_SECONDS_MAX = 10.0
_TAIL = 600
_NAME_LENGTH = 48
_CALLERS_MAX = 64
_LOOP_SECONDS = 2.0
# With fewer answers, the slowest in a hundred are not known.
_ANSWERS_MIN = 1000
_JITTER_MAX = 1.0
# Of the standard normal distribution.
_P99 = 2.326


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointTimings:
    """What was measured: the time to the first answer, and a request of one row, one at a time.

    busy_ms: the processor time of a request, where that is known. served: what n requests take together in one replica,
    and jitter: how much that varies, where many callers were measured.
    """

    cold_start_seconds: float
    request_ms: float
    busy_ms: float | None = None
    served: CostModel | None = None
    jitter: float = 0.0


def measure_on_target(
    target: AnyTarget,
    spec: EndpointSpec,
    subject: LoadedModel,
    replicas: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> EndpointTimings:
    """Measure the model on a running model server, under a name of its own that is removed afterwards.

    Single rows are sent by one caller, then by few and by many at a time, whose requests the server batches. Raises
    ProfileFailed with the server's message where it does not take the model or does not answer.
    """
    scaling = Scaling(replicas_min=replicas, replicas_max=replicas)
    named = spec.model_copy(update={"name": f"{spec.name[:_NAME_LENGTH]}-profile", "scaling": scaling})
    release = make_release(named, subject, BatchingConfig(batch_size_max=_CALLERS_MAX))
    host, start = make_host(target), clock()
    try:
        address = host.deploy(release, subject.resolved.folder)
        try:
            timings = _measure_requests(address, subject, start, lambda: None, clock)
            few, many = (
                run_closed_loop(address, subject.contract, subject.sample, callers=callers, seconds=_LOOP_SECONDS)
                for callers in _choose_caller_counts(timings.request_ms)
            )
            return replace(timings, served=fit_served_cost(few, many, replicas), jitter=estimate_jitter(many))
        finally:
            host.remove(release)
    except EndpointFailed as error:
        where = f"the model server {target.kind}"
        raise _endpoint_failure(where, error) from error


def fit_served_cost(few: LoopStats, many: LoopStats, replicas: int) -> CostModel:
    """Return a and c of a + c * n: what n requests take together in one replica of a server that never waits for more.

    Of C callers, each of R replicas serves some C / (R + 1) while as many wait for the next replica that is free:
    1 / rate = a * (R + 1) / (R * C) + c / R. Two numbers of callers give both.
    """
    one, other = 1 / few.per_second, 1 / many.per_second
    shared = max(0.0, (one - other) / (1 / few.callers - 1 / many.callers)) if few.callers < many.callers else 0.0
    each = max(0.0, other - shared / many.callers)
    return CostModel(fixed_seconds=shared * replicas / (replicas + 1), row_seconds=each * replicas)


def estimate_jitter(loop: LoopStats) -> float:
    """Return the standard deviation of the logarithm of a pass's time, from the median and the p99 of the answers.

    Each request waits for the rest of a pass and for its own: the sum of two draws varies less by the root of 2.
    """
    if loop.answers < _ANSWERS_MIN:
        return 0.0
    return min(_JITTER_MAX, math.sqrt(2) * math.log(loop.p99_ms / loop.p50_ms) / _P99)


def _choose_caller_counts(request_ms: float) -> tuple[int, int]:
    """Return a small and a large number of callers, both smaller where an answer takes long."""
    many = max(2, min(_CALLERS_MAX, int(1000 * _LOOP_SECONDS / (4 * request_ms))))
    return max(1, many // 16), many


def measure_in_process(
    spec: EndpointSpec, subject: LoadedModel, *, clock: Callable[[], float] = time.perf_counter
) -> EndpointTimings:
    """Measure an endpoint in a process of its own, by single rows one after the other, and end it.

    Raises ProfileFailed with the end of the process's log where it does not answer, and BadInput where a package that
    it needs is missing.
    """
    busy_path = import_extra(_CHILD, "serve").BUSY_SECONDS_PATH
    with tempfile.TemporaryDirectory(prefix="overnight-profile-") as scratch:
        folder = Path(scratch)
        (folder / RELEASE_FILE).write_text(make_release(spec, subject, BatchingConfig()).model_dump_json())
        (folder / MODEL_FOLDER).symlink_to(subject.resolved.folder, target_is_directory=True)
        with (folder / "log").open("w") as log, _run_child(folder, log) as (child, start):
            try:
                return _measure_child(child, spec, subject, busy_path, start, clock)
            except EndpointFailed as error:
                said = (folder / "log").read_text()[-_TAIL:].strip()
                where = f"a process of its own, which said: {said}"
                raise _endpoint_failure(where, error) from error


@contextmanager
def _run_child(folder: Path, log: IO[str]) -> Generator[tuple[subprocess.Popen[str], float]]:
    """Yield the process and when it was started. It ends as its stdin is closed, and is killed where it does not."""
    start = time.perf_counter()
    with subprocess.Popen(  # noqa: S603 - this project's own program, on a folder of its own making
        [sys.executable, "-m", _CHILD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    ) as child:
        try:
            yield child, start
        finally:
            if child.stdin is not None:
                child.stdin.close()
            try:
                child.wait(_END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                child.kill()


def _measure_child(
    child: subprocess.Popen[str],
    spec: EndpointSpec,
    subject: LoadedModel,
    busy_path: str,
    start: float,
    clock: Callable[[], float],
) -> EndpointTimings:
    port = child.stdout.readline().strip() if child.stdout else ""
    if not port:
        message = f"it ended with {child.wait()} before it listened"
        raise EndpointFailed(message)
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(trust_env=False) as http:
        address = Address(url=url, model=spec.name, version=None)
        return _measure_requests(address, subject, start, lambda: _read_busy_seconds(http, url + busy_path), clock)


def _measure_requests(
    address: Address, subject: LoadedModel, start: float, busy: Callable[[], float | None], clock: Callable[[], float]
) -> EndpointTimings:
    """Send single rows until there are enough answers; `busy` returns the server's processor time in seconds."""
    pieces = itertools.cycle(list(subject.sample.split(1)))
    with InferClient(address, subject.contract) as client:
        client(next(pieces).inputs)
        cold = clock() - start
        for _ in range(_WARM_REQUESTS):
            client(next(pieces).inputs)
        waited_ms: list[float] = []
        before, began = busy(), clock()
        while len(waited_ms) < _REQUESTS and (not waited_ms or clock() - began < _SECONDS):
            piece, asked = next(pieces), clock()
            client(piece.inputs)
            waited_ms.append(1000 * (clock() - asked))
        after = busy()
    return EndpointTimings(
        cold_start_seconds=cold,
        request_ms=statistics.median(waited_ms),
        busy_ms=None if after is None or before is None else 1000 * (after - before) / len(waited_ms),
    )


def _read_busy_seconds(http: httpx.Client, url: str) -> float:
    try:
        return float(http.get(url).raise_for_status().json())
    except httpx.HTTPError as error:
        message = f"it must return its processor time, got {error!r}"
        raise EndpointFailed(message) from error


def _endpoint_failure(where: str, error: EndpointFailed) -> ProfileFailed:
    return ProfileFailed(
        f"An endpoint of the model must answer to be measured, got: {error} It was tried on {where}. Correct the "
        "model or the server, or state cold_start_seconds and request_ms."
    )
