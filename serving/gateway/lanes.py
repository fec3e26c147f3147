"""A lane: one version of an endpoint, what asks it, and what is counted of it."""

from __future__ import annotations

from dataclasses import dataclass

from serving.gateway.http import Http
from serving.gateway.metrics import Metrics
from serving.gateway.mlflow_scoring import MlflowUpstream
from serving.gateway.route import Route, Served
from serving.gateway.upstream import Upstream
from serving.gateway.v2 import V2Upstream
from serving.model.contract import Contract

_OK = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The way to one version; it outlives its route for as long as a request is on it."""

    endpoint: str
    version: str
    weight: float
    upstream: Upstream
    metrics: Metrics

    def observe(self, status: int, seconds: float, rows: int) -> None:
        """Count an answer of the version, or that there was none."""
        labels = (self.endpoint, self.version)
        self.metrics.answers.labels(*labels, status).inc()
        self.metrics.upstream_seconds.labels(*labels).observe(seconds)
        if status == _OK:
            self.metrics.rows.labels(*labels).inc(rows)


def lanes(endpoint: str, route: Route, http: Http, metrics: Metrics) -> dict[str, Lane]:
    """Return the lanes of a route by version."""
    return {
        each.version: Lane(
            endpoint=endpoint,
            version=each.version,
            weight=each.weight,
            upstream=_upstream(http, each, route.contract),
            metrics=metrics,
        )
        for each in route.versions
    }


def _upstream(http: Http, served: Served, contract: Contract) -> Upstream:
    """Return the adapter for what a version's server speaks: another protocol is another line here."""
    if served.speaks == "v2":
        return V2Upstream(http, served)
    return MlflowUpstream(http, served, contract)
