"""What is predicted from a profile, held against what then happens on this machine.

The endpoint: the profile measures the model on a running Triton with the scheduler's own client, by one, few and many
callers and without batching; predicted is what another client's 32 connections come to on the tuned endpoint. The batch
run: the trial that the profile makes, on a fifth of the rows; predicted is how long a process takes for all of them.
"""

from __future__ import annotations

import shutil
import statistics
from typing import Any, NoReturn

import numpy as np

from serving.model.queueing import BatchingServer, draw_lognormal
from tasks.batch.options import BatchOptions
from tasks.endpoint.client import infer_path
from tasks.endpoint.resolve import load_endpoint_model
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import Triton
from tasks.scheduler.decision import Profile
from tasks.scheduler.profile import ProfileOptions, StatedFigures, measure_profile
from tasks.scheduler.simulate_online import split_serving_cost
from tests.benchmarks.shared import FOLDER, ROUNDS, ROWS, child, console, make_customers, make_models, prefect

WARM_SECONDS, SECONDS = 2, 8
_SEED = 23


def endpoint_figures() -> dict[str, Any]:
    """Predict what the tuned Triton endpoint does, then measure it; or say why it can't be had."""
    from infra.local.triton import triton_server
    from serving.targets.triton import TritonHost
    from tests.benchmarks.endpoint import make_served
    from tests.benchmarks.endpoint_servers import contenders
    from tests.benchmarks.endpoint_wrk import CONNECTIONS, median, missing, wrk

    triton = next(each for each in contenders() if each.name == "Triton, tuned")
    if reason := triton.missing or missing():
        return {"endpoint": f"missing here: {reason}"}
    served = make_served("small", 256, FOLDER / "modes-choice")
    folder = FOLDER / "modes"
    shutil.rmtree(folder, ignore_errors=True)
    with triton_server(folder / "repository", folder / "server") as running:
        profile = profiled(Triton(repository=str(running.repository), url=running.url, grpc=running.grpc))
        console.print(f"{profile.served}, jitter {profile.jitter:.3g}, {served.batching}")
        host = TritonHost(repository=running.repository, url=running.url, grpc=running.grpc)
        address = host.deploy(served.tuned, served.model)
        url, bodies = address.url + infer_path(address), served.bodies()
        wrk(url, bodies, WARM_SECONDS)
        load = median([wrk(url, bodies, SECONDS) for _ in range(ROUNDS)])
    cost, beside = split_serving_cost(profile, 1.0)
    server = BatchingServer(
        slots=profile.slots,
        cost=cost,
        requests_max=served.batching.batch_size_max,
        wait_seconds=served.batching.wait_seconds_max,
        jitter=profile.jitter,
    )
    rate, p99 = closed_loop(server, CONNECTIONS, beside)
    return {
        "endpoint": {
            "requests_per_second": _against(rate, load.per_second),
            "p99_ms": _against(1000 * p99, load.p99_ms),
        }
    }


def profiled(target: Triton) -> Profile:
    """Measure the model on a running server, in one instance, as the scheduler does; nothing of it is a batch run's."""
    spec = EndpointSpec(name="bench-modes", model="models:/endpoint-small/latest")
    profile_options = ProfileOptions(
        target=target,
        batch_options=BatchOptions(slots=1),
        stated_figures=StatedFigures(batch_rows_per_second=1e6, start_seconds=10.0),
        remeasure=True,
    )

    def refuse_batch_run(*_: object) -> NoReturn:
        message = "No batch run is needed here."
        raise AssertionError(message)

    return measure_profile(spec, load_endpoint_model(spec), profile_options, refuse_batch_run)


def closed_loop(server: BatchingServer, connections: int, beside: float, requests: int = 20_000) -> tuple[float, float]:
    """Return the answers a second, and the latency of 99 of 100, of connections that each wait for their answer."""
    drawn = iter(np.random.default_rng(_SEED).standard_normal(requests))
    coming = [0.0] * connections
    free, waits, now = [0.0] * server.slots, [], 0.0
    while len(waits) < requests:
        slot = min(range(server.slots), key=free.__getitem__)
        line = sorted(coming)
        most = min(server.requests_max, connections)
        full = line[most - 1] if server.requests_max <= len(line) else np.inf
        begin = max(free[slot], min(line[0] + server.wait_seconds, full))
        taken = [each for each in line[:most] if each <= begin]
        end = begin + server.cost.seconds(len(taken)) * float(draw_lognormal(server.jitter, np.array(next(drawn))))
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
    """Predict how long a process that scores all rows takes by the scheduler's trial of a fifth, then measure it."""
    from flows.runtime.calibration_run import run_calibration

    few = max(ROWS // 5, 100_000)
    models, less, many = make_models(), make_customers(few), make_customers(ROWS)
    scores, options = FOLDER / "out", BatchOptions(key_columns=("customer",))
    with prefect():
        predicted, took = [], []
        for _ in range(ROUNDS):
            shutil.rmtree(scores, ignore_errors=True)
            trial = run_calibration(models["mlp"], less, scores, options)
            predicted.append(trial.start_seconds + ROWS / trial.rows_per_second)
            took.append(child("whole", models["mlp"], many)["whole"])
    return {"batch": {"rows": ROWS, "seconds": _against(statistics.median(predicted), statistics.median(took))}}
