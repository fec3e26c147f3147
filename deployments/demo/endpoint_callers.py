"""Callers of an endpoint who ask for one row after the other, at a steady rate, until they are told to stop."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 60.0
_REASONS_MAX = 3


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
