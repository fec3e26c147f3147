"""What an endpoint costs beside its passes, measured on one in a process of its own: its start, and its door."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from serving.errors import EndpointFailed, ProfileFailed
from serving.release import MODEL_FOLDER, RELEASE_FILE, Dial
from serving.targets import Address
from tasks.consume.door_child import BUSY
from tasks.endpoint.client import InferClient
from tasks.endpoint.render import make_release
from tasks.endpoint.resolve import Subject
from tasks.endpoint.spec import EndpointSpec

_CHILD = "tasks.consume.door_child"
_WARM_REQUESTS = 20
_REQUESTS = 300
_SECONDS = 2.0
_WAIT_SECONDS_MAX = 600.0
_TAIL = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What was measured: the first answer of a new process, a request of one row, and the CPU that it took there."""

    cold_start_seconds: float
    request_ms: float
    busy_ms: float


def try_door(spec: EndpointSpec, subject: Subject, *, clock: Callable[[], float] = time.perf_counter) -> Door:
    """Start an endpoint in a process of its own, ask it for single rows one after the other, and end it.

    Raises ProfileFailed with what the process said where it does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="overnight-profile-") as scratch:
        folder = Path(scratch)
        release = make_release(spec, subject, Dial())
        (folder / RELEASE_FILE).write_text(release.model_dump_json())
        (folder / MODEL_FOLDER).symlink_to(subject.resolved.folder, target_is_directory=True)
        with (folder / "log").open("w+") as log:
            start = clock()
            child = subprocess.Popen(  # noqa: S603 - this project's own program, on a folder of its own making
                [sys.executable, "-m", _CHILD, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            try:
                return _measure(child, spec, subject, start, clock)
            except EndpointFailed as error:
                raise _failed(log.name, error) from error
            finally:
                # Its stdin is its life; what does not end by that is made to.
                assert child.stdin is not None, "it is a pipe"  # noqa: S101 - our own mistake
                child.stdin.close()
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                assert child.stdout is not None, "it is a pipe"  # noqa: S101 - our own mistake
                child.stdout.close()


def _measure(
    child: subprocess.Popen[str], spec: EndpointSpec, subject: Subject, start: float, clock: Callable[[], float]
) -> Door:
    assert child.stdout is not None, "it is a pipe"  # noqa: S101 - our own mistake
    port = child.stdout.readline().strip()
    if not port:
        message = f"the process ended with {child.wait()}"
        raise EndpointFailed(message)
    url = f"http://127.0.0.1:{port}"
    address = Address(url=url, model=spec.name, version=None)
    pieces = itertools.cycle(list(subject.sample.pieces(1)))
    with InferClient(address, subject.contract) as ask, httpx.Client(trust_env=False) as http:
        ask(next(pieces).inputs)
        cold = clock() - start
        for _ in range(_WARM_REQUESTS):
            ask(next(pieces).inputs)
        busy, began, waited_ms = _busy(http, url), clock(), []
        while len(waited_ms) < _REQUESTS and (not waited_ms or clock() - began < _SECONDS):
            piece, asked = next(pieces), clock()
            ask(piece.inputs)
            waited_ms.append(1000 * (clock() - asked))
        busy = _busy(http, url) - busy
    return Door(
        cold_start_seconds=cold,
        request_ms=statistics.median(waited_ms),
        busy_ms=1000 * busy / len(waited_ms),
    )


def _busy(http: httpx.Client, url: str) -> float:
    try:
        return float(http.get(url + BUSY).raise_for_status().json())
    except httpx.HTTPError as error:
        message = f"the process must say what it has computed, got {error!r}"
        raise EndpointFailed(message) from error


def _failed(log: str, error: EndpointFailed) -> ProfileFailed:
    tail = Path(log).read_text()[-_TAIL:].strip()
    return ProfileFailed(
        f"An endpoint of the model must answer in a process of its own to be measured, got: {error}. {tail}\n"
        "Mend the model or this environment, or state cold_start_seconds and request_ms."
    )
