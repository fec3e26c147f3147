"""Keep the instances of every endpoint on a Triton between its bounds, and alive, by the measured queue.

`python -m serving.targets.triton_autoscale --repository R` does so until SIGTERM or Ctrl-C. The bounds are those of
each endpoint's newest release.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from serving.errors import BadInput, EndpointFailed
from serving.extras import import_extra
from serving.model.batching import BatchingConfig
from serving.model.release import Scaling

if TYPE_CHECKING:
    from serving.model.graph import AnyRelease
    from serving.targets.triton import TritonHost

_EVERY_S = 5.0
# Triton itself takes a second to find that an instance is dead.
_CHECK_EVERY_S = 0.25
# An instance is added where more than this share of them is busy and requests wait, and removed where less than that
# share of the remaining ones would be.
_BUSY_MIN, _IDLE_MAX = 0.7, 0.5
# An instance is added at once, since requests wait, and removed after this many idle measurements in a row.
_IDLE_CHECKS_MIN = 3
_TIMEOUT_S = 10.0
_SAMPLE = re.compile(r"^(nv_inference_\w+)\{([^}]*)\}\s+(\S+)$", re.MULTILINE)
_MODEL, _REASON = re.compile(r'\bmodel="([^"]*)"'), re.compile(r'\breason="([^"]*)"')
# The module's name also where it is run as a program, whose name is __main__.
_log = logging.getLogger("serving.targets.triton_autoscale")


def main(arguments: Sequence[str] | None = None) -> None:
    """Scale the endpoints of one Triton until SIGTERM or Ctrl-C; exit with 1 where a package is missing."""
    parser = argparse.ArgumentParser(prog="python -m serving.targets.triton_autoscale", description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="Triton's model repository")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the URL of its HTTP port")
    parser.add_argument("--grpc", default="127.0.0.1:8001", help="its gRPC port, HOST:PORT")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", help="the URL of its metrics")
    parser.add_argument("--seconds", type=float, default=_EVERY_S, help="seconds between two measurements")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("serving").setLevel(logging.INFO)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: over.set())
    try:
        triton = import_extra("serving.targets.triton", "serve")
    except BadInput as error:
        sys.exit(str(error))
    host = triton.TritonHost(repository=options.repository, url=options.url, grpc=options.grpc)
    autoscale(host, options.metrics, over, every_s=options.seconds)


def autoscale(host: TritonHost, metrics_url: str, over: threading.Event, *, every_s: float) -> None:
    """Scale every endpoint of a repository until `over`, those too that are deployed meanwhile.

    A measurement that fails is logged, and the next one is tried.
    """
    scalers: dict[str, InstanceScaler] = {}
    _log.info("scaling the endpoints of %s", host.repository)
    measured_at = time.monotonic() - every_s
    while not over.wait(min(every_s, _CHECK_EVERY_S)):
        _restart_dead_instances(scalers.values(), metrics_url)
        if time.monotonic() - measured_at >= every_s:
            measured_at = time.monotonic()
            scalers = {
                endpoint: _make_scaler(scalers.get(endpoint), host, metrics_url, release)
                for endpoint, release in _find_newest_releases(host).items()
            }
            _adjust_instances(scalers)


def _restart_dead_instances(scalers: Iterable[InstanceScaler], metrics_url: str) -> None:
    """Restart the dead instances of every endpoint; a failure is logged."""
    try:
        metrics = fetch_metrics(metrics_url)
    except EndpointFailed:
        # The next measurement says so, and often enough.
        return
    for scaler in scalers:
        try:
            scaler.restart_dead(metrics)
        except (EndpointFailed, OSError) as error:
            _log.warning("%s: a dead instance must be restarted, got: %s", scaler.endpoint, error)


def _adjust_instances(scalers: dict[str, InstanceScaler]) -> None:
    """Adjust the instances of every endpoint; one that can't be adjusted is logged, and leaves the scalers."""
    for endpoint, scaler in [*scalers.items()]:
        try:
            scaler.adjust()
        except (EndpointFailed, OSError) as error:
            _log.warning("%s: its instances stay as they are: %s", endpoint, error)
            # The next measurement starts over.
            del scalers[endpoint]


def _find_newest_releases(host: TritonHost) -> dict[str, AnyRelease]:
    try:
        return host.find_newest_releases()
    except OSError as error:
        # Most likely a version that is being removed.
        _log.warning("%s must be readable, got: %s", host.repository, error)
        return {}


def _make_scaler(
    known: InstanceScaler | None, host: TritonHost, metrics_url: str, release: AnyRelease
) -> InstanceScaler:
    if known is not None:
        return replace(known, scaling=release.scaling, batching=release.batching)
    return InstanceScaler(
        host=host,
        metrics_url=metrics_url,
        endpoint=release.endpoint,
        scaling=release.scaling,
        batching=release.batching,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonCounters:
    """What Triton has counted of some models since they were loaded, and how many requests wait now."""

    requests: float = 0.0
    passes: float = 0.0
    queued_us: float = 0.0
    computed_us: float = 0.0
    pending: float = 0.0
    failed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """The queue between two measurements: how long requests waited, a pass took, and how many instances were busy."""

    wait_ms: float
    pass_ms: float
    busy: float
    pending: int


def parse_counters(metrics: str, models: Collection[str]) -> TritonCounters:
    """Return the counters of these models out of the answer of Triton's metrics endpoint."""
    sums: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(metrics):
        model, reason = _MODEL.search(labels), _REASON.search(labels)
        # Other requests that fail were cancelled, or refused before they reached the model.
        if model and model[1] in models and (reason is None or reason[1] == "BACKEND"):
            sums[name] = sums.get(name, 0.0) + float(value)
    return TritonCounters(
        requests=sums.get("nv_inference_request_success", 0.0),
        passes=sums.get("nv_inference_exec_count", 0.0),
        queued_us=sums.get("nv_inference_queue_duration_us", 0.0),
        computed_us=sums.get("nv_inference_compute_infer_duration_us", 0.0),
        pending=sums.get("nv_inference_pending_request_count", 0.0),
        failed=sums.get("nv_inference_request_failure", 0.0),
    )


def measure_queue(before: TritonCounters, now: TritonCounters, elapsed_s: float) -> QueueStats:
    """Return the queue between two measurements. The counters of a model that was loaded again start from zero."""
    if now.requests < before.requests or now.passes < before.passes:
        before = TritonCounters()
    requests, passes = now.requests - before.requests, now.passes - before.passes
    if not requests or not passes:
        return QueueStats(wait_ms=0.0, pass_ms=0.0, busy=0.0, pending=int(now.pending))
    # Each request of a pass counts the whole of it.
    pass_ms = (now.computed_us - before.computed_us) / requests / 1000
    return QueueStats(
        wait_ms=(now.queued_us - before.queued_us) / requests / 1000,
        pass_ms=pass_ms,
        busy=pass_ms * passes / (elapsed_s * 1000),
        pending=int(now.pending),
    )


def choose_instance_count(
    queue: QueueStats,
    instances: int,
    *,
    scaling: Scaling,
    batching: BatchingConfig,
    idle_checks: int = _IDLE_CHECKS_MIN,
) -> int:
    """Return how many instances there should be, at most one more or less than there are.

    More, where the instances are busy and requests wait longer than the batching allows and the pass ahead of them
    takes, or more of them are pending than the next passes take. Less, once `idle_checks` measurements in a row,
    including this one, found so little that the others would be half idle. Always between the bounds of `scaling`, and
    one where that allows none: `unload` frees the memory of an idle model.
    """
    low, high = max(1, scaling.replicas_min), max(1, scaling.replicas_min, scaling.replicas_max)
    waits = queue.wait_ms > batching.wait_ms_max + queue.pass_ms or queue.pending > batching.batch_size_max * instances
    if waits and queue.busy > _BUSY_MIN * instances:
        target = instances + 1
    elif idle_checks >= _IDLE_CHECKS_MIN and not waits and queue.busy < _IDLE_MAX * (instances - 1):
        target = instances - 1
    else:
        target = instances
    return min(max(target, low), high)


@dataclass(slots=True, kw_only=True)
class InstanceScaler:
    """Keeps the instances of one endpoint between its bounds, by what Triton measures, and restarts dead ones.

    `restarts` is how often it has restarted some.
    """

    host: TritonHost
    metrics_url: str
    endpoint: str
    scaling: Scaling
    batching: BatchingConfig
    restarts: int = 0
    _counted: dict[str, TritonCounters] = field(default_factory=dict)
    _before: TritonCounters | None = None
    _measured_at: float = 0.0
    _idle_checks: int = field(default=0)

    def restart_dead(self, metrics: str) -> bool:
        """Restart dead instances where requests have failed since the last call; return whether there were any.

        `metrics` is the answer of Triton's metrics endpoint. The first call only counts what has failed. Raises
        EndpointFailed where Triton does not answer.
        """
        counted = {model: parse_counters(metrics, {model}) for model in self.host.list_models(self.endpoint)}
        before, self._counted = self._counted, counted
        failing = {model for model, now in counted.items() if model in before and now.failed > before[model].failed}
        # A model's own error ends a pass. Where none has ended, every instance that was asked is dead.
        dead = {model for model in failing if counted[model].passes <= before[model].passes}
        if not failing or not self.host.restart_dead_instances(self.endpoint, dead):
            return False
        self.restarts += 1
        _log.warning("%s: an instance had died, and was restarted (%d so far)", self.endpoint, self.restarts)
        # The counters of a model that was loaded again start from zero.
        self._counted, self._before = {}, None
        return True

    def adjust(self) -> int:
        """Measure, change the number of instances where it should be another, and return it.

        The first call only measures. Raises EndpointFailed where Triton does not answer or does not follow.
        """
        models = self.host.list_scaled_models(self.endpoint)
        now, at = parse_counters(fetch_metrics(self.metrics_url), models), time.monotonic()
        before, self._before, since, self._measured_at = self._before, now, self._measured_at, at
        instances = self.host.count_instances(self.endpoint)
        if before is None:
            return instances
        queue = measure_queue(before, now, at - since)
        self._idle_checks = 0 if queue.pending or queue.busy > _IDLE_MAX * (instances - 1) else self._idle_checks + 1
        target = choose_instance_count(
            queue, instances, scaling=self.scaling, batching=self.batching, idle_checks=self._idle_checks
        )
        if target != instances:
            _log.info("%s: %d instances instead of %d, at %s", self.endpoint, target, instances, queue)
            self.host.scale(self.endpoint, target)
            # A measurement while instances are added or removed says little of those that remain.
            self._before, self._idle_checks = None, 0
        return target


def fetch_metrics(metrics_url: str) -> str:
    """Return the answer of Triton's metrics endpoint. Raises EndpointFailed where there is none."""
    try:
        return httpx.get(metrics_url, timeout=_TIMEOUT_S, trust_env=False).text
    except httpx.HTTPError as error:
        message = f"Triton must answer at {metrics_url}, got {type(error).__name__}: {error}."
        raise EndpointFailed(message) from None


if __name__ == "__main__":
    main()
