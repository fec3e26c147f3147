"""The project deployed to a real Prefect server, and real process workers that come and go as machines do."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.benchmarks.shared import FOLDER, prefect

if TYPE_CHECKING:
    from infra.local.prefect_server import PrefectServer, PrefectWorker

# A machine that is gone is seen to be after three.
HEARTBEAT_SECONDS = 2


@contextmanager
def deployed() -> Generator[PrefectServer]:
    """Run a fresh Prefect server that has all of this project's pools, deployments and automations."""
    with prefect() as server:
        from deployments.apply import deploy

        asyncio.run(deploy())
        yield server


def start_machine(server: PrefectServer, pool: str, name: str) -> PrefectWorker:
    """Start a worker that takes flow runs from a pool; its log is in the benchmarks' folder."""
    from infra.local.prefect_server import prefect_worker

    environment = {
        "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OVERNIGHT_METADATA_URL": "off",
        "PREFECT_WORKER_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
    }
    return prefect_worker(server, pool, FOLDER / "workers" / name, environment=environment)


@contextmanager
def machines(server: PrefectServer, pool: str, names: Sequence[str]) -> Generator[dict[str, PrefectWorker]]:
    """Have machines of these names, and tell them to go at the end."""
    found: dict[str, PrefectWorker] = {}
    try:
        for name in names:
            found[name] = start_machine(server, pool, name)
        yield found
    finally:
        for worker in found.values():
            worker.stop()


@contextmanager
def replayed(
    server: PrefectServer, pool: str, traces: Sequence[Sequence[bool]], tick_seconds: float
) -> Generator[list[tuple[float, str]]]:
    """Have a machine for each trace while the block runs, there in the ticks in which the trace says so.

    It vanishes with all that runs on it, and comes back under another name, as another machine. Yields what happened,
    as (seconds, words); past a trace's end its machine is gone.
    """
    over, told = threading.Event(), []
    threads = [_Spot(server, pool, f"spot-{at}", trace, tick_seconds, over, told) for at, trace in enumerate(traces, 1)]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        over.set()
        for thread in threads:
            thread.join()
    for thread in threads:
        if thread.error:
            raise thread.error


class _Spot(threading.Thread):
    """One machine that comes and goes; what it does takes it seconds, so that it may be late by those."""

    def __init__(
        self,
        server: PrefectServer,
        pool: str,
        name: str,
        trace: Sequence[bool],
        tick_seconds: float,
        over: threading.Event,
        told: list[tuple[float, str]],
    ) -> None:
        super().__init__(name=name)
        self._server, self._pool, self._over, self._told = server, pool, over, told
        self._trace, self._tick_seconds = trace, tick_seconds
        self._worker: PrefectWorker | None = None
        self._lives = 0
        self.error: RuntimeError | None = None

    def run(self) -> None:
        began = time.monotonic()
        try:
            for tick, up in enumerate([*self._trace, False]):
                if self._over.wait(max(0.0, began + tick * self._tick_seconds - time.monotonic())):
                    break
                if up != (self._worker is not None):
                    self._turn(up=up)
                    self._told.append(
                        (round(time.monotonic() - began, 1), f"{self._called} is {'there' if up else 'taken'}")
                    )
        except RuntimeError as error:
            self.error = error
        finally:
            if self._worker is not None:
                self._worker.kill()

    def _turn(self, *, up: bool) -> None:
        if self._worker is not None and not up:
            self._worker.kill()
            self._worker = None
        else:
            self._lives += 1
            self._worker = start_machine(self._server, self._pool, self._called)

    @property
    def _called(self) -> str:
        return f"{self.name}-{self._lives}"
