"""What an endpoint costs beside its passes, measured on a model server or in a process of its own: start and door."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from serving.errors import EndpointFailed, ProfileFailed
from serving.release import MODEL_FOLDER, RELEASE_FILE, Dial
from serving.targets import Address
from tasks.consume.door_child import BUSY
from tasks.endpoint.client import InferClient
from tasks.endpoint.deploy import host_of
from tasks.endpoint.render import make_release
from tasks.endpoint.resolve import Subject
from tasks.endpoint.spec import AnyTarget, EndpointSpec

_CHILD = "tasks.consume.door_child"
_WARM_REQUESTS = 20
_REQUESTS = 300
_SECONDS = 2.0
_END_SECONDS_MAX = 10.0
_TAIL = 600
_NAME_LENGTH = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What was measured: the first answer from nothing, a request of one row, and the CPU that it took, if known."""

    cold_start_seconds: float
    request_ms: float
    busy_ms: float | None


def try_target(
    target: AnyTarget, spec: EndpointSpec, subject: Subject, *, clock: Callable[[], float] = time.perf_counter
) -> Door:
    """Put the model on a running model server under a name of its own, ask it for single rows, and take it down again.

    Raises ProfileFailed with what the server said where it does not take it or does not answer.
    """
    named = spec.model_copy(update={"name": f"{spec.name[:_NAME_LENGTH]}-profile"})
    release, host, start = make_release(named, subject, Dial()), host_of(target), clock()
    try:
        address = host.deploy(release, subject.resolved.folder)
        try:
            return _ask(address, subject, start, lambda: None, clock)
        finally:
            host.remove(release)
    except EndpointFailed as error:
        where = f"the model server {target.kind}"
        raise _failed(where, error) from error


def try_door(spec: EndpointSpec, subject: Subject, *, clock: Callable[[], float] = time.perf_counter) -> Door:
    """Start an endpoint in a process of its own, ask it for single rows one after the other, and end it.

    Raises ProfileFailed with what the process said where it does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="overnight-profile-") as scratch:
        folder = Path(scratch)
        (folder / RELEASE_FILE).write_text(make_release(spec, subject, Dial()).model_dump_json())
        (folder / MODEL_FOLDER).symlink_to(subject.resolved.folder, target_is_directory=True)
        with (folder / "log").open("w") as log, _child(folder, log) as (child, start):
            try:
                return _ask_child(child, spec, subject, start, clock)
            except EndpointFailed as error:
                said = (folder / "log").read_text()[-_TAIL:].strip()
                where = f"a process of its own, which said: {said}"
                raise _failed(where, error) from error


@contextmanager
def _child(folder: Path, log: IO[str]) -> Generator[tuple[subprocess.Popen[str], float]]:
    """Start the process, and say when that was; its stdin is its life, and what does not end by that is made to."""
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


def _ask_child(
    child: subprocess.Popen[str], spec: EndpointSpec, subject: Subject, start: float, clock: Callable[[], float]
) -> Door:
    port = child.stdout.readline().strip() if child.stdout else ""
    if not port:
        message = f"it ended with {child.wait()} before it listened"
        raise EndpointFailed(message)
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(trust_env=False) as http:
        address = Address(url=url, model=spec.name, version=None)
        return _ask(address, subject, start, lambda: _busy(http, url), clock)


def _ask(
    address: Address, subject: Subject, start: float, busy: Callable[[], float | None], clock: Callable[[], float]
) -> Door:
    """Ask for single rows until there are enough answers; `busy` tells the seconds that the server has computed."""
    pieces = itertools.cycle(list(subject.sample.pieces(1)))
    with InferClient(address, subject.contract) as ask:
        ask(next(pieces).inputs)
        cold = clock() - start
        for _ in range(_WARM_REQUESTS):
            ask(next(pieces).inputs)
        waited_ms: list[float] = []
        before, began = busy(), clock()
        while len(waited_ms) < _REQUESTS and (not waited_ms or clock() - began < _SECONDS):
            piece, asked = next(pieces), clock()
            ask(piece.inputs)
            waited_ms.append(1000 * (clock() - asked))
        after = busy()
    return Door(
        cold_start_seconds=cold,
        request_ms=statistics.median(waited_ms),
        busy_ms=None if after is None or before is None else 1000 * (after - before) / len(waited_ms),
    )


def _busy(http: httpx.Client, url: str) -> float:
    try:
        return float(http.get(url + BUSY).raise_for_status().json())
    except httpx.HTTPError as error:
        message = f"it must say for how long it has computed, got {error!r}"
        raise EndpointFailed(message) from error


def _failed(where: str, error: EndpointFailed) -> ProfileFailed:
    return ProfileFailed(
        f"An endpoint of the model must answer to be measured, got: {error} It was tried on {where}. Mend the model or "
        "the server, or state cold_start_seconds and request_ms."
    )
