"""Several local servers as one: started side by side, with what a shell must export to use them, stopped together."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.gateway import gateway_server
from infra.local.mlflow_server import mlflow_server
from infra.local.prefect_server import prefect_server
from infra.local.process import RunningServer, ServerFailed, check_packages
from infra.local.s3 import s3_server
from infra.local.triton import triton_server

BUCKET = "lake"
# Servers whose programs come by wheels, and where those are pinned.
SERVERS_OF_WHEELS = frozenset({"s3", "triton", "nats"})
WHEELS_FILE = Path(__file__).with_name("wheels.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedServer:
    """One server of the stack: the line that says where it is, and the variables that lead to it.

    `credentials` are variables that would replace a person's own, and are exported only where that is asked for.
    """

    server: RunningServer
    where: str
    exports: Mapping[str, str] = field(default_factory=dict, repr=False)
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)


def _start_prefect(folder: Path) -> StartedServer:
    # A user who may create a flow run on it can have its workers run any code: not for every user of this machine.
    server = prefect_server(folder, auth=f"overnight:{secrets.token_urlsafe(24)}")
    where = f"Prefect's pages: {server.ui_url}, which ask for what PREFECT_API_AUTH_STRING holds"
    return StartedServer(server=server, where=where, exports=server.environment)


def _start_mlflow(folder: Path) -> StartedServer:
    server = mlflow_server(folder)
    return StartedServer(server=server, where=f"MLflow's pages: {server.url}", exports=server.environment)


def _start_s3(folder: Path) -> StartedServer:
    server = s3_server(folder)
    with suppress(ValueError):
        # A folder that was used before has it.
        server.create_bucket(BUCKET)
    where = f"S3: {server.endpoint_url}, with the bucket s3://{BUCKET}"
    return StartedServer(server=server, where=where, credentials=server.environment)


def _start_triton(folder: Path) -> StartedServer:
    server = triton_server(folder / "models", folder)
    target = {"kind": "triton", "repository": str(server.repository), "url": server.url, "grpc": server.grpc}
    return StartedServer(server=server, where=f"Triton: {server.url}", exports={"OVERNIGHT_TARGET": json.dumps(target)})


def _start_gateway(folder: Path) -> StartedServer:
    server = gateway_server(folder)
    exports = {"OVERNIGHT_GATEWAY": server.url, "OVERNIGHT_ADMIN_KEY": server.admin_key}
    return StartedServer(server=server, where=f"Gateway: {server.url}", exports=exports)


def _start_nats(folder: Path) -> StartedServer:
    check_packages("The client of NATS", ("nats",), "stream")
    from infra.local.nats import nats_server  # noqa: PLC0415 - its client is an extra

    server = nats_server(folder)
    return StartedServer(server=server, where=f"NATS with JetStream: {server.url}")


SERVERS: Mapping[str, Callable[[Path], StartedServer]] = {
    "prefect": _start_prefect,
    "mlflow": _start_mlflow,
    "s3": _start_s3,
    "triton": _start_triton,
    "gateway": _start_gateway,
    "nats": _start_nats,
}
DEFAULT_SERVERS = ("prefect", "mlflow", "s3", "triton", "gateway")


@contextmanager
def local_stack(
    folder: Path, names: Sequence[str], report: Callable[[str], None], *, skip_missing: bool = False
) -> Generator[dict[str, StartedServer]]:
    """Start servers side by side, yield them by name once all answer, and stop them all at the end.

    Args:
        folder: Each server keeps what it has in a folder of its name below.
        names: Keys of SERVERS.
        report: Is told of each server as it is ready, and of each that is passed over.
        skip_missing: Pass over a server whose program or package is not installed.

    Raises:
        ServerFailed: A server did not start; the others are stopped.
        FileNotFoundError: The program or a package of a server is missing; the message says how to install it.
    """
    with ExitStack() as stack:
        started: dict[str, StartedServer] = {}
        failed: Exception | None = None
        with ThreadPoolExecutor(len(names)) as threads:
            futures = {threads.submit(SERVERS[name], folder / name): name for name in names}
            for future in as_completed(futures):
                name = futures[future]
                try:
                    started[name] = future.result()
                except FileNotFoundError as error:
                    if skip_missing:
                        report(f"{name} is left out: {error}")
                    else:
                        failed = failed or error
                except ServerFailed as error:
                    failed = failed or error
                else:
                    stack.enter_context(started[name].server)
                    report(started[name].where)
        if failed is not None:
            raise failed
        yield {name: started[name] for name in names if name in started}


def render_exports(exports: Mapping[str, str]) -> str:
    """Return variables as lines for a shell."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items())


def write_exports(path: Path, exports: Mapping[str, str]) -> Path:
    """Write variables as a file that a shell can read, for its owner alone; return its path."""
    path.touch(mode=0o600)
    path.write_text(render_exports(exports))
    return path
