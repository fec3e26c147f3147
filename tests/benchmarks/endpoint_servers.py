"""Who is measured: a plain FastAPI endpoint, and every target, each started anew and asked by the same client."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from infra.local.process import ServerCommand, ServerProcess, base_environment, start_on_free_ports
from infra.worker import list_process_tree
from serving.model.batching import BatchingConfig
from serving.model.release import Release
from serving.protocol.oip import encode_request
from serving.targets import Address, Host, Target
from tasks.endpoint.client import infer_path

BODIES = 64
_ANSWER_SECONDS_MAX = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model of the benchmark: a release without batching, the batching chosen for it, and its files."""

    name: str
    release: Release
    model: Path
    batching: BatchingConfig

    @property
    def tuned(self) -> Release:
        """The release with the batching."""
        return self.release.model_copy(update={"batching": self.batching})

    def rows(self) -> np.ndarray[Any, Any]:
        """Return the rows that are asked for."""
        return np.random.default_rng(3).standard_normal((BODIES, 32), dtype=np.float32)

    def bodies(self) -> list[bytes]:
        """Return requests of one row each, in the protocol."""
        return [encode_request(self.release.contract, {"x": row[None]}).content for row in self.rows()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """A server that answers: where, what it is asked, the seconds from its start to that answer, and its processes."""

    url: str
    bodies: list[bytes]
    start_seconds: float
    pids: tuple[int, ...]
    address: Address | None = None

    def memory_mb(self) -> float:
        """Return the memory of its processes, what they share counted once, in MiB."""
        pids = {each for pid in self.pids for each in list_process_tree(pid)}
        return sum(_pss_kb(pid) for pid in pids) / 1024


Start = Callable[[Served, Path], AbstractContextManager[Up]]


@dataclass(slots=True, kw_only=True)
class Contender:
    """One who serves, or why it can't here."""

    name: str
    start: Start
    missing: str | None = None


def first_answer(url: str, body: bytes, began: float) -> float:
    """Ask until there is an answer; return the seconds since `began`."""
    until = time.monotonic() + _ANSWER_SECONDS_MAX
    while time.monotonic() < until:
        try:
            answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, trust_env=False)
        except httpx.HTTPError:
            answer = None
        if answer is not None and answer.status_code == 200:
            return time.perf_counter() - began
        time.sleep(0.02)
    message = f"{url} must answer within {_ANSWER_SECONDS_MAX:g} s, got {answer and answer.text}."
    raise RuntimeError(message)


@contextmanager
def fastapi(served: Served, folder: Path) -> Generator[Up]:
    """The plain endpoint, in one process."""
    began = time.perf_counter()
    bodies = [json.dumps({"features": row.tolist()}).encode() for row in served.rows()]
    process, (port,) = start_on_free_ports(1, lambda ports: _fastapi_command(served, folder, ports[0]))
    with process:
        url = f"http://127.0.0.1:{port}/score"
        yield Up(url=url, bodies=bodies, start_seconds=first_answer(url, bodies[0], began), pids=(process.pid,))


def _fastapi_command(served: Served, folder: Path, port: int) -> ServerCommand:
    folder.mkdir(parents=True, exist_ok=True)
    return ServerCommand(
        argv=(sys.executable, "-m", "tests.benchmarks.endpoint_fastapi", str(served.model), str(port)),
        environment={**base_environment(), "PYTHONPATH": os.pathsep.join(sys.path), "MLFLOW_DISABLE_TELEMETRY": "true"},
        folder=folder,
        log_path=folder / "fastapi.log",
        ready=lambda: _healthy(port),
    )


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def triton_default(served: Served, folder: Path) -> Generator[Up]:
    """Triton as it comes: each request alone, one instance."""
    with _triton(served.release, served, folder) as up:
        yield up


@contextmanager
def triton_tuned(served: Served, folder: Path) -> Generator[Up]:
    """Triton with the batching."""
    with _triton(served.tuned, served, folder) as up:
        yield up


@contextmanager
def _triton(release: Release, served: Served, folder: Path) -> Generator[Up]:
    from infra.local.triton import triton_server
    from serving.targets.triton import TritonHost

    began = time.perf_counter()
    with triton_server(folder / "repository", folder / "triton") as server:
        host = TritonHost(repository=server.repository, url=server.url, grpc=server.grpc)
        yield _deployed(host, release, served, began, server.process)
        host.remove(release)


@contextmanager
def ray_serve(served: Served, folder: Path) -> Generator[Up]:
    """Ray Serve with the batching."""
    from serving.targets.ray_serve import RayServeHost, RayServeTarget
    from tests.ray_cluster import ray_cluster

    began = time.perf_counter()
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with ray_cluster(folder / "ray", environment=environment) as cluster:
        releases = folder / "releases"
        host = RayServeHost(
            dashboard_url=cluster.dashboard_url,
            serve_url=cluster.serve_url,
            folder=releases,
            target=RayServeTarget(folder=str(releases)),
            token=cluster.token,
        )
        yield _deployed(host, served.tuned, served, began, cluster.process)


def by_folder(make_target: Callable[[], Target]) -> Start:
    """Return how a target is started whose servers a controller runs."""

    @contextmanager
    def start(served: Served, folder: Path) -> Generator[Up]:
        from infra.local.controller import local_controller
        from serving.targets.folder import FolderHost

        began = time.perf_counter()
        with local_controller(folder / "releases") as controller:
            host = FolderHost(folder=controller.folder, target=make_target())
            yield _deployed(host, served.tuned, served, began, controller.process)

    return start


def _deployed(host: Host, release: Release, served: Served, began: float, process: ServerProcess) -> Up:
    address = host.deploy(release, served.model)
    url = address.url.rstrip("/") + infer_path(address)
    bodies = served.bodies()
    seconds = first_answer(url, bodies[0], began)
    return Up(url=url, bodies=bodies, start_seconds=seconds, pids=(process.pid,), address=address)


def contenders() -> list[Contender]:
    """Return everybody, in the order of the table; those that can't run here say why."""
    found = [
        Contender(name="FastAPI", start=fastapi),
        Contender(name="Triton, default", start=triton_default, missing=_no_triton()),
        Contender(name="Triton, tuned", start=triton_tuned, missing=_no_triton()),
        Contender(name="Ray Serve", start=ray_serve, missing=_no_ray()),
    ]
    for name, environment, make in (
        ("Seldon (MLServer)", "mlserver", _seldon),
        ("KServe", "kserve", _kserve),
        ("BentoML", "bentoml", _bentoml),
    ):
        python, missing = _environment(environment)
        found.append(Contender(name=name, start=by_folder(functools.partial(make, python)), missing=missing))
    return found


def _environment(name: str) -> tuple[Path, str | None]:
    """Return the interpreter of an environment, made where it is not there, or why it can't be had."""
    from infra.local.venv import VenvFailed, make_venv

    try:
        return make_venv(Path(f"infra/local/{name}.txt")) / "bin/python", None
    except VenvFailed as error:
        return Path(), str(error).splitlines()[-1]


def _no_triton() -> str | None:
    from infra.local.triton import find_package

    try:
        find_package()
    except FileNotFoundError as error:
        return str(error)
    return None


def _no_ray() -> str | None:
    return None if importlib.util.find_spec("ray") else "pip install 'overnight[ray]'"


def _seldon(python: Path) -> Target:
    from serving.targets.seldon import SeldonTarget

    return SeldonTarget(python=python)


def _kserve(python: Path) -> Target:
    from serving.targets.kserve import KServeTarget

    return KServeTarget(python=python)


def _bentoml(python: Path) -> Target:
    from serving.targets.bentoml import BentoMLTarget

    return BentoMLTarget(python=python)


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
