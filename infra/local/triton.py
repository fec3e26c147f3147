"""A real Triton server, out of the nvidia-pytriton wheel, in one process on free loopback ports.

Its Python models run under the interpreter that runs this, and find what it finds: each instance is a process of its
own, which the server starts and watches.
"""

import importlib.util
import secrets
import socket
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from infra.local.process import (
    HOST,
    RunningServer,
    ServerCommand,
    ServerFailed,
    ServerProcess,
    base_environment,
    hold_ports,
    send_request,
    start_on_free_ports,
)

_PACKAGE = "pytriton"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB = "triton_python_backend_stub"
_LOG = "server.log"
_STUB_SECONDS_MAX = 120
# How the stack of a fault begins in the log, how long a server that closed its connections takes to write it, and then
# to end: with 128 + SIGABRT after a SIGSEGV of its own, or with 128 + SIGSEGV.
_STACK = "Signal ("
_STACK_SECONDS, _END_SECONDS = 1.0, 10.0
_CRASHED = (134, 139)
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the server and its models share memory, by names of this start


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonServer(RunningServer):
    """A running Triton with explicit model control; a context manager that stops it.

    `url` is what clients ask, `grpc`, as HOST:PORT, what has it load models, and `metrics_url` what Prometheus reads.
    """

    repository: Path
    folder: Path
    url: str
    grpc: str
    metrics_url: str

    @property
    def running(self) -> bool:
        """Whether the server still runs."""
        return self.process.running

    def has_crashed(self) -> bool:
        """Return whether the server has ended by a fault of its own, or does within some seconds.

        It closes its connections first, then writes its stack into its log, and then ends. Triton 2.51 does so now and
        then while it loads a model.
        """
        asked = time.monotonic()
        while self.running:
            seconds_max = _END_SECONDS if _STACK in self.process.log_text() else _STACK_SECONDS
            if time.monotonic() - asked > seconds_max:
                return False
            time.sleep(0.1)
        return self.process.exit_code in _CRASHED

    def restart(self) -> "TritonServer":
        """Start the server again on the same ports, whether it has ended or not; no model is loaded yet.

        Raises ServerFailed, also where another program has taken a port meanwhile.
        """
        self.stop()
        addresses = (self.url, self.grpc, self.metrics_url)
        ports = tuple(int(address.rpartition(":")[2].split("/")[0]) for address in addresses)
        return replace(self, process=_start_on_ports(self.repository, self.folder, ports))


def triton_server(repository: Path, folder: Path, *, port: int | None = None) -> TritonServer:
    """Start Triton over a model repository with nothing loaded, and return once it answers; its log is in `folder`.

    Without `port` a free one is taken. Raises ServerFailed, also where that port is in use, or FileNotFoundError
    where the wheel is missing.
    """
    package = find_package()
    repository, folder = repository.resolve(), folder.resolve()
    for each in (repository, folder):
        each.mkdir(parents=True, exist_ok=True)
    if port is None:
        process, ports = start_on_free_ports(3, lambda ports: _make_command(package, repository, folder, ports))
    else:
        with hold_ports(2) as free:
            ports = (port, *free)
            process = _start_on_ports(repository, folder, ports)
    return TritonServer(
        process=process,
        repository=repository,
        folder=folder,
        url=f"http://{HOST}:{ports[0]}",
        grpc=f"{HOST}:{ports[1]}",
        metrics_url=f"http://{HOST}:{ports[2]}/metrics",
    )


def _start_on_ports(repository: Path, folder: Path, ports: Sequence[int]) -> ServerProcess:
    """Start Triton on these very ports."""
    for port in ports:
        with socket.socket() as probe:
            # As the server itself binds, which takes ten seconds to fail: earlier connections may linger.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                message = (
                    f"Port {port} of {HOST} must be free for Triton, got: {error}. Stop the program that uses it, or "
                    "choose another port."
                )
                raise ServerFailed(message, exit_code=None, log="", log_path=folder / _LOG) from None
    return ServerProcess(_make_command(find_package(), repository, folder, ports))


def find_package() -> Path:
    """Return the folder of the Triton wheel. Raises FileNotFoundError where it is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    root = (
        Path(spec.submodule_search_locations[0]) / "tritonserver" if spec and spec.submodule_search_locations else None
    )
    if root is None or not (root / "bin/tritonserver").exists():
        wheels = Path(__file__).with_name("wheels.txt")
        message = (
            f"The `tritonserver` program must be in the nvidia-pytriton wheel, got none for {sys.executable}; run "
            f"`pip install --no-deps --require-hashes -r {wheels}`. The wheel is for Linux on x86-64 with glibc 2.35 "
            "or newer: elsewhere run Triton's container, or another target."
        )
        raise FileNotFoundError(message)
    return root


def _make_command(package: Path, repository: Path, folder: Path, ports: Sequence[int]) -> ServerCommand:
    identity = f"overnight-{secrets.token_hex(6)}"
    http, grpc, metrics = ports
    return ServerCommand(
        argv=(
            str(package / "bin/tritonserver"),
            *(f"--model-repository={repository}", "--model-control-mode=explicit", f"--id={identity}"),
            *(f"--backend-directory={_link_backends(package, folder)}", "--disable-auto-complete-config"),
            *(f"--http-address={HOST}", f"--http-port={http}"),
            *(f"--grpc-address={HOST}", f"--grpc-port={grpc}"),
            *(f"--metrics-address={HOST}", f"--metrics-port={metrics}"),
            *("--allow-gpu-metrics=false", "--allow-cpu-metrics=false"),
            # The server is ready even where one of its models is not.
            "--strict-readiness=false",
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-region-prefix-name={identity}",
            # A process of Python takes longer than Triton's 30 s to start where many others start.
            f"--backend-config=python,stub-timeout-seconds={_STUB_SECONDS_MAX}",
        ),
        environment=_make_environment(package),
        folder=folder,
        log_path=folder / _LOG,
        # Only this very server knows its name: another one that took the port does not.
        ready=lambda: (
            identity in send_request("GET", http, "/v2").text and send_request("GET", http, "/v2/health/ready").ok
        ),
        # Memory that models and server share outlives a SIGKILL.
        leftovers=lambda _log: _SHARED_MEMORY.glob(f"{identity}*"),
    )


def _link_backends(package: Path, folder: Path) -> Path:
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


def _make_environment(package: Path) -> Mapping[str, str]:
    libraries = (sysconfig.get_config_var("LIBDIR"), str(package.parents[1] / "nvidia_pytriton.libs"))
    environment = base_environment()
    inherited = environment.get("LD_LIBRARY_PATH")
    return {
        **environment,
        # The stub is linked against a libpython by name only, and would load the system's before this interpreter's.
        "LD_LIBRARY_PATH": ":".join([*libraries, *([inherited] if inherited else [])]),
        # It ignores PYTHONPATH, and uses the environment of the first python3 of PATH.
        "PATH": f"{Path(sys.executable).parent}:{environment.get('PATH', '')}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "HF_HUB_OFFLINE": "1",
    }
