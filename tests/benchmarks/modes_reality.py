"""What is predicted from a profile, held against what then happens on this machine.

The endpoint: S(b) of the model, what a request costs beside its pass, measured one request at a time, and the dial;
predicted is what 32 connections come to that each send their next request as soon as they have an answer. The batch
run: rows a second and start of runs of a fifth of the rows; predicted are the seconds of all of them.
"""

from __future__ import annotations

import http.client
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from infra.processes import family
from serving.dial import PassTime
from serving.release import Dial
from tasks.consume.server import Server
from tests.benchmarks.shared import FOLDER, ROUNDS, ROWS, child, console, make_customers, make_models, prefect

WARM_SECONDS, SECONDS = 2, 8
SINGLE_REQUESTS = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """Requests one at a time: the median milliseconds of one, and the server's processor milliseconds for each."""

    ms: float
    busy_ms: float


def endpoint_figures() -> dict[str, Any]:
    """Predict what the tuned Triton endpoint does, then measure it; or say why it can't be had."""
    from tests.benchmarks.endpoint import make_served
    from tests.benchmarks.endpoint_servers import contenders
    from tests.benchmarks.endpoint_wrk import CONNECTIONS, median, missing, wrk

    triton = next(each for each in contenders() if each.name == "Triton, tuned")
    if reason := triton.missing or missing():
        return {"endpoint": f"missing here: {reason}"}
    served = make_served("small", 256)
    folder = FOLDER / "modes"
    shutil.rmtree(folder, ignore_errors=True)
    with triton.start(served, folder) as up:
        wrk(up.url, up.bodies, WARM_SECONDS)
        single = measure_single(up.url, up.bodies, up.pids)
        server = _server(served.dial, pass_time(), single)
        console.print(f"{single}, {server}")
        load = median([wrk(up.url, up.bodies, SECONDS) for _ in range(ROUNDS)])
    beside = max(0.0, single.ms / 1000 - server.time(1))
    rate, p99 = closed_loop(server, CONNECTIONS, beside)
    return {
        "endpoint": {
            "requests_per_second": _against(rate, load.per_second),
            "p99_ms": _against(1000 * p99, load.p99_ms),
        }
    }


def pass_time() -> PassTime:
    """Measure the passes of the model, as the dial is chosen by."""
    from tasks.endpoint.resolve import resolve
    from tasks.endpoint.spec import Budget, EndpointSpec
    from tasks.endpoint.tuning import settle_dial

    budget = Budget(latency_ms=50.0, rate=2000.0)
    spec = EndpointSpec(name="bench-modes", model="models:/endpoint-small/latest", budget=budget)
    found = settle_dial(spec, resolve(spec)).time
    assert found is not None
    return found


def _server(dial: Dial, passes: PassTime, single: Single) -> Server:
    """Return the server as the scheduler has it: what a request costs beside its pass keeps the slot busy."""
    return Server(
        slots=1,
        pass_time=passes.pass_ms / 1000,
        request_time=(passes.row_ms + max(0.0, single.busy_ms - passes.ms(1))) / 1000,
        requests_max=dial.batch_size_max,
        wait=dial.wait_ms_max / 1000,
    )


def measure_single(url: str, bodies: list[bytes], pids: tuple[int, ...]) -> Single:
    """Ask one request at a time."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    processes = [each for pid in pids for each in family(pid)]
    before, waited = _processor_seconds(processes), []
    for at in range(SINGLE_REQUESTS):
        start = time.perf_counter()
        connection.request("POST", parts.path, bodies[at % len(bodies)], {"Content-Type": "application/json"})
        connection.getresponse().read()
        waited.append(time.perf_counter() - start)
    busy = (_processor_seconds(processes) - before) / SINGLE_REQUESTS
    connection.close()
    return Single(ms=1000 * statistics.median(waited), busy_ms=1000 * busy)


def _processor_seconds(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def closed_loop(server: Server, connections: int, beside: float, requests: int = 20_000) -> tuple[float, float]:
    """Return the answers a second, and the latency of 99 of 100, of connections that each wait for their answer."""
    coming = [0.0] * connections
    free, waits, now = [0.0] * server.slots, [], 0.0
    while len(waits) < requests:
        slot = min(range(server.slots), key=free.__getitem__)
        line = sorted(coming)
        most = min(server.requests_max, connections)
        full = line[most - 1] if server.requests_max <= len(line) else np.inf
        begin = max(free[slot], min(line[0] + server.wait, full))
        taken = [each for each in line[:most] if each <= begin]
        end = begin + server.time(len(taken))
        free[slot] = end
        waits += [end + beside - each for each in taken]
        coming = line[len(taken) :] + [end + beside] * len(taken)
        now = end
    return len(waits) / now, float(np.quantile(waits, 0.99))


def _against(predicted: float, measured: float) -> dict[str, float]:
    return {
        "predicted": round(predicted, 2),
        "measured": round(measured, 2),
        "off": round(predicted / measured - 1, 3),
    }


def batch_figures() -> dict[str, Any]:
    """Predict the seconds of a batch run of all rows from runs of a fifth, then measure them."""
    few = max(ROWS // 5, 100_000)
    models, less, many = make_models(), make_customers(few), make_customers(ROWS)
    with prefect():
        profiled = [child("overnight", models["mlp"], less) for _ in range(ROUNDS)]
        took = [child("overnight", models["mlp"], many)["seconds"] for _ in range(ROUNDS)]
    rate = few / statistics.median(run["score"] for run in profiled)
    start = statistics.median(run["seconds"] - run["score"] for run in profiled)
    return {"batch": {"rows": ROWS, "seconds": _against(start + ROWS / rate, statistics.median(took))}}
