"""A real Ray cluster of one node, with its dashboard and Serve, on free loopback ports.

Measured with Ray 2.60 on two cores: ready in 7 to 9 s, gone in 3 s; with one small model on Serve it takes 1.4 GB, of
which the model's replica is 0.4 GB.
"""

import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.process import (
    HOST,
    RunningServer,
    ServerCommand,
    base_environment,
    hold_ports,
    send_request,
    start_on_free_ports,
)

_PORT_FLAGS = (
    *("port", "dashboard-port", "node-manager-port", "object-manager-port", "ray-client-server-port"),
    *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port"),
)
# Serve sends nothing through it; the default is a third of the memory.
_OBJECT_STORE_BYTES = 128 << 20
_READY_S_MAX = 120.0
# Ray gives its node 30 s to report, a constant of its own, and ends with these words: on a busy machine it is late.
_LATE = "The current node timed out during startup"
_GRACE_S = 30.0
_SERVER_ENVIRONMENT = {
    # A node that ends first waits half a minute for others to take over its work.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster(RunningServer):
    """A running cluster; a context manager that stops it.

    `serve_url` is where Serve is to answer once its first application is there. `token` is what the dashboard asks
    for, and `environment` what a driver needs. What Ray keeps goes with a stop, and stays where the starter is killed.
    """

    dashboard_url: str
    serve_url: str
    token: str = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    _session: Path
    _held: ExitStack

    def stop(self) -> None:
        """Stop every process of the cluster and return when they have ended. Idempotent."""
        self.process.stop()
        self._held.close()
        shutil.rmtree(self._session, ignore_errors=True)


def ray_cluster(folder: Path, *, cpus: int = 8, environment: Mapping[str, str] | None = None) -> RayCluster:
    """Start a cluster that counts `cpus` CPUs, whatever the machine has.

    It returns once the dashboard answers and the node has reported. Its log is in `folder`; `environment` is added to
    that of its workers. Raises ServerFailed: after four attempts if its node was late, or at once for another reason.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # The path of a Unix socket ends at 107 characters, of which Ray takes 60 below its folder: TMPDIR may be too long.
    session = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    token = secrets.token_hex(32)
    given = {**_make_environment(token), **(environment or {})}
    try:
        process, ports = start_on_free_ports(
            len(_PORT_FLAGS),
            lambda ports: _make_command(folder, session, ports, cpus, token, given),
            passing=[_LATE],
        )
    except BaseException:
        shutil.rmtree(session, ignore_errors=True)
        raise
    held = ExitStack()
    # Serve listens there long after the cluster is up.
    (serve_port,) = held.enter_context(hold_ports(1))
    return RayCluster(
        process=process,
        dashboard_url=f"http://{HOST}:{ports[1]}",
        serve_url=f"http://{HOST}:{serve_port}",
        token=token,
        environment={**_make_environment(token), "RAY_ADDRESS": f"{HOST}:{ports[0]}"},
        _session=session,
        _held=held,
    )


def _make_command(
    folder: Path, session: Path, ports: Sequence[int], cpus: int, token: str, environment: Mapping[str, str]
) -> ServerCommand:
    flags = [f"--{flag}={port}" for flag, port in zip(_PORT_FLAGS, ports, strict=True)]
    return ServerCommand(
        argv=(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags),
            *(f"--node-ip-address={HOST}", f"--dashboard-host={HOST}", "--include-dashboard=true"),
            # Any free port, where the default is a range that others use too.
            *("--min-worker-port=0", "--max-worker-port=0"),
            *(f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={_OBJECT_STORE_BYTES}"),
            *(f"--temp-dir={session}", "--disable-usage-stats", "--include-log-monitor=false", "--no-monitor"),
        ),
        environment={**base_environment(), **_SERVER_ENVIRONMENT, **environment},
        # Ray puts the folder it is started in first on its workers' path: keep it ours.
        folder=folder,
        log_path=folder / "ray.log",
        ready=lambda: _is_ready(ports[1], token),
        ready_s_max=_READY_S_MAX,
        # Ray's processes are not of one group: the first of them ends the others, and needs the time for it.
        grace_s=_GRACE_S,
    )


def _is_ready(port: int, token: str) -> bool:
    # Only this very cluster knows the new token. The dashboard answers before the node has reported.
    headers = {"Authorization": f"Bearer {token}"}
    nodes = send_request("GET", port, "/nodes?view=summary", headers)
    return '"ALIVE"' in nodes.text and send_request("GET", port, "/api/serve/applications/", headers).ok


def _make_environment(token: str) -> dict[str, str]:
    return {
        # Without a token, anyone who reaches the cluster may run code in it.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Despite its name, this makes a single node listen on loopback only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
