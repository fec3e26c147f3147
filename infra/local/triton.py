"""A real Triton server, out of the nvidia-pytriton wheel, in one process on free loopback ports.

Its Python models run under the interpreter that runs this, and find what it finds: each instance is a process of its
own, which the server starts and watches.
"""

import importlib.util
import secrets
import socket
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from infra.local.process import (
    HOST,
    Running,
    ServerCommand,
    ServerFailed,
    ServerProcess,
    ask,
    base_environment,
    free_ports,
    start_on_free_ports,
)

_PACKAGE = "pytriton"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB = "triton_python_backend_stub"
_LOG = "server.log"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the server and its models share memory, by names of this start


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonServer(Running):
    """A running Triton with explicit model control; a context manager that stops it.

    `url` is what clients ask, `grpc`, as HOST:PORT, what has it load models, and `metrics_url` what Prometheus reads.
    """

    process: ServerProcess
    repository: Path
    folder: Path
    url: str
    grpc: str
    metrics_url: str

    @property
    def running(self) -> bool:
        """Whether the server is still there."""
        return self.process.running

    def started_again(self) -> "TritonServer":
        """Start the server anew on the same ports, where it has ended or is to end; no model is loaded yet.

        Raises ServerFailed, also where another program has taken a port meanwhile.
        """
        self.stop()
        addresses = (self.url, self.grpc, self.metrics_url)
        ports = tuple(int(address.rpartition(":")[2].split("/")[0]) for address in addresses)
        return replace(self, process=_started(self.repository, self.folder, ports))

    def stop(self) -> None:
        """Stop the server and its models, and return when they are gone. Idempotent."""
        self.process.stop()


def triton_server(repository: Path, folder: Path, *, port: int | None = None) -> TritonServer:
    """Start Triton over a model repository with nothing loaded, and return once it answers; its log is in `folder`.

    Without `port` a free one is taken. Raises ServerFailed, also where that port is in use, or FileNotFoundError
    where the wheel is missing.
    """
    package = _find_package()
    repository, folder = repository.resolve(), folder.resolve()
    for each in (repository, folder):
        each.mkdir(parents=True, exist_ok=True)
    if port is None:
        process, ports = start_on_free_ports(3, lambda ports: _command(package, repository, folder, ports))
    else:
        ports = (port, *free_ports(2))
        process = _started(repository, folder, ports)
    return TritonServer(
        process=process,
        repository=repository,
        folder=folder,
        url=f"http://{HOST}:{ports[0]}",
        grpc=f"{HOST}:{ports[1]}",
        metrics_url=f"http://{HOST}:{ports[2]}/metrics",
    )


def _started(repository: Path, folder: Path, ports: Sequence[int]) -> ServerProcess:
    """Start Triton on ports that it has to have."""
    for port in ports:
        with socket.socket() as probe:
            # As the server itself does it, which would take ten seconds to say so: connections of before may linger.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                message = (
                    f"Port {port} of {HOST} must be free for Triton, got: {error}. Stop what has it, or take another."
                )
                raise ServerFailed(message, exit_code=None, log="", log_path=folder / _LOG) from None
    return ServerProcess(_command(_find_package(), repository, folder, ports))


def _find_package() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    root = (
        Path(spec.submodule_search_locations[0]) / "tritonserver" if spec and spec.submodule_search_locations else None
    )
    if root is None or not (root / "bin/tritonserver").exists():
        message = (
            f"The `tritonserver` program must be in the nvidia-pytriton wheel, got none for {sys.executable}; run "
            "`pip install --no-deps --require-hashes -r infra/local/wheels.txt`. The wheel is for Linux on x86-64 with "
            "glibc 2.35 or newer: elsewhere run Triton's container, or another target."
        )
        raise FileNotFoundError(message)
    return root


def _command(package: Path, repository: Path, folder: Path, ports: Sequence[int]) -> ServerCommand:
    identity = f"overnight-{secrets.token_hex(6)}"
    http, grpc, metrics = ports
    return ServerCommand(
        argv=(
            str(package / "bin/tritonserver"),
            *(f"--model-repository={repository}", "--model-control-mode=explicit", f"--id={identity}"),
            *(f"--backend-directory={_backends(package, folder)}", "--disable-auto-complete-config"),
            *(f"--http-address={HOST}", f"--http-port={http}"),
            *(f"--grpc-address={HOST}", f"--grpc-port={grpc}"),
            *(f"--metrics-address={HOST}", f"--metrics-port={metrics}"),
            *("--allow-gpu-metrics=false", "--allow-cpu-metrics=false"),
            # One model that is not ready says nothing of the others.
            "--strict-readiness=false",
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-region-prefix-name={identity}",
        ),
        environment=_environment(package),
        folder=folder,
        log_path=folder / _LOG,
        # Only this very server knows its name: another one that won the port does not.
        ready=lambda: identity in ask("GET", http, "/v2").text and ask("GET", http, "/v2/health/ready").ok,
        # What models and server share outlives a SIGKILL.
        leftovers=lambda _log: _SHARED_MEMORY.glob(f"{identity}*"),
    )


def _backends(package: Path, folder: Path) -> Path:
    """Return a folder of backends with the one for Python, and in it the stub of this very version of Python."""
    stub = package / "python_backend_stubs" / _PYTHON / _STUB
    if not stub.exists():
        found = sorted(path.name for path in stub.parents[1].iterdir())
        message = f"Triton must have a stub for Python {_PYTHON}, found those for {found}; use one of these."
        raise FileNotFoundError(message)
    backends = folder / "backends"
    (backends / "python").mkdir(parents=True, exist_ok=True)
    wheel, utils = package / "backends/python", "triton_python_backend_utils"
    sources = {
        _STUB: stub,
        "libtriton_python.so": wheel / "libtriton_python.so",
        f"{utils}_of_the_wheel.py": wheel / f"{utils}.py",
        f"{utils}.py": Path(__file__).with_name("triton_numpy.py"),
    }
    for name, source in sources.items():
        link = backends / "python" / name
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    return backends


def _environment(package: Path) -> Mapping[str, str]:
    libraries = (sysconfig.get_config_var("LIBDIR"), str(package.parents[1] / "nvidia_pytriton.libs"))
    environment = base_environment()
    inherited = environment.get("LD_LIBRARY_PATH")
    return {
        **environment,
        # The stub is linked against a libpython by name only, and would take the system's before this interpreter's.
        "LD_LIBRARY_PATH": ":".join([*libraries, *([inherited] if inherited else [])]),
        # It ignores PYTHONPATH, and is at home where the first python3 of PATH is, be that a virtual environment.
        "PATH": f"{Path(sys.executable).parent}:{environment.get('PATH', '')}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "HF_HUB_OFFLINE": "1",
    }
