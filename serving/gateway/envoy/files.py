"""The files of clusters and routes that a running Envoy reads again whenever one is replaced."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.errors import EndpointFailed
from serving.gateway.envoy.admin import EnvoyAdmin, EnvoyGone
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.envoy.clusters import render_clusters
from serving.gateway.envoy.messages import CONTROL_PLANE, LISTENER_STATS, ROUTES_NAME, Json, RoutedEndpoint
from serving.gateway.envoy.routes import render_routes
from serving.gateway.store import write_atomically

# A request whose body still comes is on no cluster yet, and has its route already.
_KEPT_S = 10.0
_ACCEPTED_S_MAX, _POLL_S = 10.0, 0.002
_CLUSTERS, _ROUTES = "cluster_manager.cds", f"http.{LISTENER_STATS}.rds.{ROUTES_NAME}"
_REASON_CHARACTERS_MAX = 1000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRequests:
    """The requests that a cluster's server has, and those that wait for a connection to it."""

    active: int
    waiting: int


class ConfigurationFiles:
    """Envoy's files of one gateway. Not to be used by two threads at once.

    Promises: Envoy has a new cluster before a route names it, and a cluster goes only once no route names it and no
    request is on it. A file that Envoy rejects is put back as it was.
    """

    def __init__(self, options: BootstrapOptions) -> None:
        self._options = options
        self._admin = EnvoyAdmin(options.admin_socket)
        self._log_file = options.folder / "envoy.log"
        # Earlier ones may have left some.
        self._has_unused_clusters = True
        self._unused_since_s: dict[str, float] = {}

    def apply(self, endpoints: Iterable[RoutedEndpoint], known_digests: Iterable[str]) -> None:
        """Put the endpoints in force, and return once Envoy routes by them, or at once where none runs.

        Raises EndpointFailed where Envoy rejects the configuration; what was in force before stays in force.
        """
        endpoints = sorted(endpoints, key=lambda each: each.name)
        present = _read_clusters(self._options.clusters_file)
        self._has_unused_clusters = True
        self._replace(
            self._options.clusters_file, render_clusters(endpoints, self._options.control_socket, present), _CLUSTERS
        )
        self._replace(self._options.routes_file, render_routes(endpoints, known_digests), _ROUTES)

    def remove_unused_clusters(self, endpoints: Iterable[RoutedEndpoint]) -> None:
        """Remove the clusters that no endpoint has had, and no request was on, for some seconds."""
        if not self._has_unused_clusters:
            return
        endpoints = [*endpoints]
        present = _read_clusters(self._options.clusters_file)
        needed = {
            str(each["name"]) for each in render_clusters(endpoints, self._options.control_socket, {})["resources"]
        }
        if present.keys() <= needed:
            self._has_unused_clusters = False
            return
        requests, now_s = self.read_requests(), time.monotonic()
        used = {name for name, found in requests.items() if found.active or found.waiting} | needed
        self._unused_since_s = {name: self._unused_since_s.get(name, now_s) for name in present.keys() - used}
        gone = {name for name, since_s in self._unused_since_s.items() if now_s - since_s >= _KEPT_S}
        kept = {name: cluster for name, cluster in present.items() if name not in gone}
        if kept.keys() != present.keys():
            self._replace(
                self._options.clusters_file, render_clusters(endpoints, self._options.control_socket, kept), _CLUSTERS
            )

    def read_requests(self, endpoint: str | None = None) -> dict[str, ClusterRequests]:
        """Return the requests of each cluster, of one endpoint or of all. Raises EnvoyGone."""
        name = "" if endpoint is None else f"{endpoint}\\|"
        found = self._admin.read_statistics(rf"^cluster\.{name}.*\.upstream_rq_(active|pending_active)$")
        clusters = {key.removeprefix("cluster.").rpartition(".")[0] for key in found}
        return {
            cluster: ClusterRequests(
                active=found.get(f"cluster.{cluster}.upstream_rq_active", 0),
                waiting=found.get(f"cluster.{cluster}.upstream_rq_pending_active", 0),
            )
            for cluster in clusters
        }

    def count_dropped_copies(self, endpoint: str) -> int:
        """Return the copies for the shadow that were too many at once since Envoy started. Raises EnvoyGone."""
        found = self._admin.read_statistics(rf"^cluster\.{endpoint}\|shadow\|.*\.upstream_rq_pending_overflow$")
        return sum(found.values())

    def _replace(self, path: Path, content: Json, subscription: str) -> None:
        before = path.read_bytes() if path.exists() else None
        text = json.dumps(content, separators=(",", ":")).encode()
        if text == before:
            return
        try:
            counts = self._count_updates(subscription)
        except EnvoyGone:
            write_atomically(path, text)
            return
        write_atomically(path, text)
        if not self._is_accepted(subscription, counts):
            if before is not None:
                write_atomically(path, before)
            message = f"Envoy must accept the configuration, but rejected it: {self._read_reason()}"
            raise EndpointFailed(message)

    def _is_accepted(self, subscription: str, before: tuple[int, int]) -> bool:
        deadline = time.monotonic() + _ACCEPTED_S_MAX
        while time.monotonic() < deadline:
            try:
                accepted, rejected = self._count_updates(subscription)
            except EnvoyGone:
                # It reads the file when it is started again.
                return True
            if rejected > before[1]:
                return False
            if accepted > before[0]:
                return True
            time.sleep(_POLL_S)
        _log.warning("Envoy must read %s within %g s, but did not say so.", subscription, _ACCEPTED_S_MAX)
        return True

    def _count_updates(self, subscription: str) -> tuple[int, int]:
        found = self._admin.read_statistics(rf"^{re.escape(subscription)}\.update_(success|rejected|failure)$")
        refused = found.get(f"{subscription}.update_rejected", 0) + found.get(f"{subscription}.update_failure", 0)
        return found.get(f"{subscription}.update_success", 0), refused

    def _read_reason(self) -> str:
        lines = self._log_file.read_text(errors="replace").splitlines() if self._log_file.exists() else []
        found = next((line for line in reversed(lines) if "rejected" in line or "error" in line.lower()), "no reason")
        return found[:_REASON_CHARACTERS_MAX]


def _read_clusters(path: Path) -> Mapping[str, Json]:
    try:
        resources: list[Json] = json.loads(path.read_bytes())["resources"]
    except (FileNotFoundError, ValueError, KeyError):
        return {}
    clusters = {str(each.pop("name")): each for each in resources}
    for name, cluster in clusters.items():
        cluster.pop("@type", None)
        cluster["name"] = name
    clusters.pop(CONTROL_PLANE, None)
    return clusters
