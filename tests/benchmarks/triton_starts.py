"""`make bench-triton-starts`: how often a process of Triton's Python backend dies while it starts, and by which signal.

STARTS (200) times a server is started, loads a model of INSTANCES (2) processes that import what a release imports, is
asked, and stops. BUSY (2) other processes compute meanwhile. Each process of the backend runs under a shell that notes
how it ended. A process that dies by a signal leaves a core, of which gdb prints the stack where it is installed. The
last line is one JSON object.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.progress import track

from infra.local.process import ServerFailed
from infra.local.triton import TritonServer, triton_server
from serving.targets.triton_control import ControlRefused, control_model
from tests.benchmarks.figures import show
from tests.benchmarks.shared import FOLDER, console, machine

STARTS = int(os.environ.get("STARTS", "200"))
INSTANCES = int(os.environ.get("INSTANCES", "2"))
BUSY = int(os.environ.get("BUSY", "2"))
_STUB = "triton_python_backend_stub"
_WANTED = {"models_that_never_loaded": "0", "servers_died": "0"}
_LOAD_S_MAX = 120.0
_CONFIG = """
name: "starts"
backend: "python"
max_batch_size: 8
input {{ name: "x" data_type: TYPE_STRING dims: [1] }}
output {{ name: "y" data_type: TYPE_STRING dims: [1] }}
instance_group {{ count: {instances} kind: KIND_CPU }}
"""
_MODEL = """
import mlflow.pyfunc
import numpy
import pyarrow
import torch
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        given = [pb_utils.get_input_tensor_by_name(request, "x") for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", each.as_numpy())]) for each in given]
"""
# Triton asks each for its version of Python first, without arguments, and that ends with 1.
_WATCHED = """#!/bin/bash
[ $# -eq 0 ] && exec "{stub}"
ulimit -c unlimited
cd "{cores}"
"{stub}" "$@"
code=$?
echo $code >> "{endings}"
exit $code
"""


@dataclass(slots=True, kw_only=True)
class Counts:
    """What many starts have shown."""

    started: int = 0
    servers_died: int = 0
    never_loaded: int = 0
    restarts: int = 0
    load_s: list[float] = field(default_factory=list)


class Restarts(logging.Handler):
    """Counts the loads that were tried again."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "loaded again" in record.getMessage()


def main() -> None:
    """Start, load, ask and stop, then print how often what died."""
    folder = FOLDER / "triton-starts"
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder / "repository")
    (folder / "cores").mkdir()
    counts, restarts = Counts(), Restarts()
    logging.getLogger("serving.targets.triton_control").addHandler(restarts)
    with busy_processes():
        for _ in track(range(STARTS), "starts", console=console):
            start_once(folder, counts)
    counts.restarts = restarts.count
    endings = folder / "endings"
    codes = Counter(endings.read_text().split() if endings.exists() else [])
    # A shell says 128 + N of a process that died by signal N.
    deaths = {signal.Signals(int(code) - 128).name: count for code, count in codes.items() if int(code) > 128}
    figures = {
        "servers_started": counts.started,
        "processes_started": counts.started * INSTANCES,
        "processes_died_by_signal": deaths,
        "servers_died": counts.servers_died,
        "loads_tried_again": counts.restarts,
        "models_that_never_loaded": counts.never_loaded,
        "load_s_median": round(statistics.median(counts.load_s), 2) if counts.load_s else None,
        "load_s_max": round(max(counts.load_s), 2) if counts.load_s else None,
    }
    show(f"{machine()}, {BUSY} busy processes beside", {"figure": figures}, _WANTED)
    for core in sorted((folder / "cores").glob("core*")):
        print_stack(core, folder)
    print(json.dumps({"machine": machine(), **figures}))


def write_model(repository: Path) -> None:
    (repository / "starts/1").mkdir(parents=True)
    (repository / "starts/config.pbtxt").write_text(_CONFIG.format(instances=INSTANCES))
    (repository / "starts/1/model.py").write_text(_MODEL)


def start_once(folder: Path, counts: Counts) -> None:
    """Start a server, load the model, ask each of its processes, and note what went wrong."""
    try:
        server = triton_server(folder / "repository", folder / "server")
    except ServerFailed as failure:
        counts.servers_died += 1
        console.print(f"the server ended with {failure.exit_code} before it was ready")
        return
    with server:
        counts.started += 1
        watch_processes(server, folder)
        start = time.perf_counter()
        try:
            control_model(server.grpc, "load", "starts", timeout_s=_LOAD_S_MAX)
        except ControlRefused as refused:
            counts.never_loaded += 1
            console.print(f"the model did not load: {refused}")
        else:
            counts.load_s.append(time.perf_counter() - start)
            ask(server)
        counts.servers_died += not server.running


def watch_processes(server: TritonServer, folder: Path) -> None:
    """Have the processes that the server will start run under a shell that notes how each ends."""
    link = server.folder / "backends/python" / _STUB
    stub = link.readlink()
    link.unlink()
    link.write_text(_WATCHED.format(stub=stub, cores=folder / "cores", endings=folder / "endings"))
    link.chmod(0o755)


def ask(server: TritonServer) -> None:
    given = {"name": "x", "datatype": "BYTES", "shape": [1, 1], "data": ["a"]}
    for _ in range(2 * INSTANCES):
        answer = httpx.post(f"{server.url}/v2/models/starts/infer", json={"inputs": [given]}, timeout=60)
        if not answer.is_success:
            console.print(f"a request was answered {answer.status_code}: {answer.text}")


@contextmanager
def busy_processes() -> Generator[None]:
    """Have other processes compute all the while."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def print_stack(core: Path, folder: Path) -> None:
    """Print where a process died, by gdb where it is installed."""
    if shutil.which("gdb") is None:
        console.print(f"{core}: `apt-get install gdb` shows the stack")
        return
    stub = next((folder / "server/backends/python").glob(_STUB)).read_text().split('exec "')[1].split('"')[0]
    command = ["gdb", "-batch", "-ex", "thread apply all backtrace 25", stub, str(core)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    console.print(done.stdout[-6000:], markup=False)


if __name__ == "__main__":
    main()
