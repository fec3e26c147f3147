"""Keep the instances of every endpoint on a Triton between its bounds, and alive, by the measured queue.

`python -m serving.targets.triton_autoscale --repository R` does so until SIGTERM or Ctrl-C. The bounds are those of
each endpoint's newest release.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.release import Release, Scaling
from serving.targets.triton import TritonHost

_EVERY_S = 5.0
# By its name also where it is run as a program, which has another.
_log = logging.getLogger("serving.targets.triton_autoscale")


def main(arguments: Sequence[str] | None = None) -> None:
    """Look after one Triton."""
    parser = argparse.ArgumentParser(prog="python -m serving.targets.triton_autoscale", description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="Triton's model repository")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="its HTTP door")
    parser.add_argument("--grpc", default="127.0.0.1:8001", help="its gRPC door, HOST:PORT")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", help="its metrics")
    parser.add_argument("--seconds", type=float, default=_EVERY_S, help="between two looks")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("serving").setLevel(logging.INFO)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: over.set())
    host = TritonHost(repository=options.repository, url=options.url, grpc=options.grpc)
    autoscale(host, options.metrics, over, every_s=options.seconds)


def autoscale(host: TritonHost, metrics_url: str, over: threading.Event, *, every_s: float) -> None:
    """Look after every endpoint of a repository until `over`, those that come meanwhile too.

    A look that fails is told to the log, and the next one comes.
    """
    scalers: dict[str, InstanceScaler] = {}
    _log.info("looking after %s", host.repository)
    while not over.wait(every_s):
        scalers = {
            endpoint: _scaler(scalers.get(endpoint), host, metrics_url, release)
            for endpoint, release in _newest(host).items()
        }
        for endpoint, scaler in [*scalers.items()]:
            try:
                scaler.look()
            except (EndpointFailed, OSError) as error:
                _log.warning("%s: its instances stay as they are: %s", endpoint, error)
                # What was measured before says nothing of what comes after.
                del scalers[endpoint]


def _newest(host: TritonHost) -> dict[str, Release]:
    try:
        return host.newest()
    except OSError as error:
        # A version that was on its way out, most likely.
        _log.warning("%s must be readable, got: %s", host.repository, error)
        return {}


def _scaler(known: InstanceScaler | None, host: TritonHost, metrics_url: str, release: Release) -> InstanceScaler:
    if known is not None:
        return replace(known, scaling=release.scaling, batching=release.batching)
    return InstanceScaler(
        host=host,
        metrics_url=metrics_url,
        endpoint=release.endpoint,
        scaling=release.scaling,
        batching=release.batching,
    )


# Above the one, more instances are wanted where requests wait; below the other, one less would do.
_BUSY_MIN, _IDLE_MAX = 0.7, 0.5
# Growing is for the requests that wait now; shrinking can wait for a few looks more.
_CALM_LOOKS = 3
_SAMPLE = re.compile(r'^(nv_inference_\w+)\{[^}]*\bmodel="([^"]*)"[^}]*\}\s+(\S+)$', re.MULTILINE)
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What Triton has counted of some models since they were loaded, and how many requests wait now."""

    requests: float = 0.0
    passes: float = 0.0
    queued_us: float = 0.0
    computed_us: float = 0.0
    pending: float = 0.0
    failed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What requests met between two looks: how long they waited, how long a pass took, how many instances were busy."""

    wait_ms: float
    pass_ms: float
    busy: float
    pending: int


def read_counters(metrics: str, models: Collection[str]) -> Counters:
    """Return the counters of these models out of what Triton's metrics endpoint answers."""
    sums: dict[str, float] = {}
    for name, model, value in _SAMPLE.findall(metrics):
        if model in models:
            sums[name] = sums.get(name, 0.0) + float(value)
    return Counters(
        requests=sums.get("nv_inference_request_success", 0.0),
        passes=sums.get("nv_inference_exec_count", 0.0),
        queued_us=sums.get("nv_inference_queue_duration_us", 0.0),
        computed_us=sums.get("nv_inference_compute_infer_duration_us", 0.0),
        pending=sums.get("nv_inference_pending_request_count", 0.0),
        failed=sums.get("nv_inference_request_failure", 0.0),
    )


def queue_between(before: Counters, now: Counters, elapsed_s: float) -> Queue:
    """Return what requests met between two looks; a model that was loaded anew meanwhile counts from zero."""
    if now.requests < before.requests or now.passes < before.passes:
        before = Counters()
    requests, passes = now.requests - before.requests, now.passes - before.passes
    if not requests or not passes:
        return Queue(wait_ms=0.0, pass_ms=0.0, busy=0.0, pending=int(now.pending))
    # Each request of a pass counts the whole of it.
    pass_ms = (now.computed_us - before.computed_us) / requests / 1000
    return Queue(
        wait_ms=(now.queued_us - before.queued_us) / requests / 1000,
        pass_ms=pass_ms,
        busy=pass_ms * passes / (elapsed_s * 1000),
        pending=int(now.pending),
    )


def instances_wanted(
    queue: Queue, instances: int, *, scaling: Scaling, batching: BatchingConfig, calm_looks: int = _CALM_LOOKS
) -> int:
    """Return how many instances there should be, at most one more or less than there are.

    More, where the instances are busy and requests wait longer than the batching allows and the pass ahead of them
    takes, or more of them are pending than the next passes take. Less, once `calm_looks` looks in a row, this one
    counted, found so little that the others would be half idle. Always between the bounds of `scaling`, and one where
    that allows none: to free the memory of an idle model is `unload`.
    """
    low, high = max(1, scaling.replicas_min), max(1, scaling.replicas_min, scaling.replicas_max)
    waits = queue.wait_ms > batching.wait_ms_max + queue.pass_ms or queue.pending > batching.batch_size_max * instances
    if waits and queue.busy > _BUSY_MIN * instances:
        wanted = instances + 1
    elif calm_looks >= _CALM_LOOKS and not waits and queue.busy < _IDLE_MAX * (instances - 1):
        wanted = instances - 1
    else:
        wanted = instances
    return min(max(wanted, low), high)


@dataclass(slots=True, kw_only=True)
class InstanceScaler:
    """Keeps the instances of one endpoint between its bounds by what Triton measures, and alive, look by look."""

    host: TritonHost
    metrics_url: str
    endpoint: str
    scaling: Scaling
    batching: BatchingConfig
    _before: Counters | None = None
    _at: float = 0.0
    _calm: int = field(default=0)

    def look(self) -> int:
        """Measure, change the number of instances where it should be another, and return it.

        The first look only measures. Where requests have failed since the last one, instances that have died are
        started anew. Raises EndpointFailed where Triton does not answer or does not follow.
        """
        models = {address.model for address in self.host.endpoints().get(self.endpoint, ())}
        now, at = read_counters(self._metrics(), models), time.monotonic()
        before, self._before, since, self._at = self._before, now, self._at, at
        instances = self.host.instances(self.endpoint)
        if before is None:
            return instances
        if now.failed > before.failed and self.host.mend(self.endpoint):
            _log.warning("%s: an instance had died, and was started anew", self.endpoint)
            self._before = None
            return instances
        queue = queue_between(before, now, at - since)
        self._calm = 0 if queue.pending or queue.busy > _IDLE_MAX * (instances - 1) else self._calm + 1
        wanted = instances_wanted(queue, instances, scaling=self.scaling, batching=self.batching, calm_looks=self._calm)
        if wanted != instances:
            _log.info("%s: %d instances instead of %d, at %s", self.endpoint, wanted, instances, queue)
            self.host.scale(self.endpoint, wanted)
            # What was measured while instances came or went says little of those that are there now.
            self._before, self._calm = None, 0
        return wanted

    def _metrics(self) -> str:
        try:
            response = httpx.get(self.metrics_url, timeout=_TIMEOUT_S, trust_env=False)
        except httpx.HTTPError as error:
            message = f"Triton must answer at {self.metrics_url}, got {type(error).__name__}: {error}."
            raise EndpointFailed(message) from None
        return response.text


if __name__ == "__main__":
    main()
