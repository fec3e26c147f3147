"""How many instances a model in Triton should run, by its measured queue: a decision, and what carries it out.

Measured are the sums over all versions of an endpoint; each version runs the same number of instances.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import httpx

from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.release import Scaling
from serving.targets.triton import TritonHost

# Above the one, more instances are wanted where requests wait; below the other, one less would do.
_BUSY_MIN, _IDLE_MAX = 0.7, 0.5
# Growing is for the requests that wait now; shrinking can wait for a few looks more.
_CALM_LOOKS = 3
_SAMPLE = re.compile(r'^(nv_inference_\w+)\{[^}]*\bmodel="([^"]*)"[^}]*\}\s+(\S+)$', re.MULTILINE)
_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


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
