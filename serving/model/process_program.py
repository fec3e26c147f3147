"""What runs in a model process: it loads a model, answers its parent, and makes copies of itself.

A process answers requests on its socket until the other side closes it. Asked for a copy, it forks: the first process
has MLflow and the libraries of models imported, its copy loads a model, and the copies of that one make the passes. A
copy takes a hundredth of the time of a new process, and shares the model's memory. Where threads run, or the system is
not Linux, nothing is forked, and the same process does all of it.

Needs nothing but Python 3.10, numpy, pandas, pyarrow and MLflow: it may run in the model's own environment.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serving.errors import OvernightError
from serving.faults import describe_failure
from serving.model.process_protocol import (
    THREAD_VARIABLES,
    VERSION,
    Message,
    pack_opaque,
    receive_message,
    send_message,
    unpack_opaque,
)
from serving.model.python_model import ALLOW_PICKLE, CallForm, PythonModel, load_python_model
from serving.model.shared_memory import Region, put_arrays
from serving.option_words import Flags, name_options_by_flags

# Threads that wait and hold nothing of ours: those of the allocator of Arrow and polars, and polars' cleaner.
_HARMLESS_THREADS = ("jemalloc_bg_thd", "polars-ooc")
_PR_SET_PDEATHSIG = 1
_MESSAGE_LENGTH_MAX = 4000
# What numpy says of an array that may not be written to, without its hyphen.
_READ_ONLY = "readonly"
_PAGE_BYTES = resource.getpagesize()
_SKOPS = "skops.io"


def main(descriptor: int, parent: int, modules: Sequence[str]) -> None:
    """Import modules, and answer requests on a socket until the parent, by its process id, closes it or ends."""
    _end_with_parent(parent)
    # The parent decides what Ctrl-C and a notice mean, and closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The collector would go through all that is imported, which stays: a quarter of the time. It is on for the passes.
    gc.disable()
    import mlflow.pyfunc  # noqa: PLC0415, F401 - what every copy needs
    import pandas  # noqa: PLC0415, F401, ICN001 - the same

    _import_libraries(modules)
    if _may_fork():
        _end_with_parent(None)
    _Process(socket.socket(fileno=descriptor)).serve()


Answer = tuple[dict[str, Any], bytes]


class _Process:
    """One process, which may hold a model and be the parent of copies."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._own_id = channel, os.getpid()
        self._model: PythonModel | None = None
        self._threads = 1
        # The memory that is shared with the parent, by its number.
        self._regions: dict[int, Region] = {}
        self._copies_inputs = False
        # The copies that run, and how those have ended that do not.
        self._copies: set[int] = set()
        self._ended: dict[int, int] = {}

    def serve(self) -> None:
        """Answer requests until the other side closes the socket."""
        requests = {
            "greet": self._greet,
            "fork": self._fork,
            "import": self._import,
            "status": self._find_status,
            "kill": self._kill,
            "enter": self._enter,
            "load": self._load,
            "limit": self._limit_memory,
            "predict": self._predict,
        }
        while (message := receive_message(self._channel)) is not None:
            try:
                values, blob = requests[message.body["do"]](message)
            except BaseException as error:  # noqa: BLE001 - of the model: whatever it raises is told
                values, blob = {"error": _describe(error)}, b""
            if os.getpid() != self._own_id:
                # A model has forked, and its child came back here.
                os._exit(0)
            try:
                send_message(self._channel, {**values, "number": message.body["number"]}, blob)
            except OSError:
                break
        # Copies with the model end with what it has started in them. One that has loaded it sees to its own.
        for copy in self._copies if self._model else ():
            _kill_group(copy)
        os._exit(0)

    def _greet(self, _: Message) -> Answer:
        return {"version": VERSION, "may_fork": _may_fork()}, b""

    def _import(self, message: Message) -> Answer:
        _import_libraries(message.body["modules"])
        return {"may_fork": _may_fork()}, b""

    def _fork(self, message: Message) -> Answer:
        """Make a copy of this process that answers on the socket that came with the request."""
        (descriptor,) = message.descriptors
        self._collect_ended()
        gc.collect()
        gc.freeze()
        child = os.fork()
        if child == 0:
            # With what the model starts in it, so that all of it can be ended.
            os.setpgid(0, 0)
            _end_with_parent(self._own_id)
            self._channel.close()
            self._copies, self._ended = set(), {}
            self._channel, self._own_id = socket.socket(fileno=descriptor), os.getpid()
            if numpy := sys.modules.get("numpy"):
                # Copies would draw the same numbers; Python's own generator does this by itself.
                numpy.random.seed()
            self.serve()
        os.close(descriptor)
        self._copies.add(child)
        return {"id": child}, b""

    def _find_status(self, message: Message) -> Answer:
        """Tell how a copy has ended: its wait status, or null while it runs."""
        self._collect_ended()
        return {"status": self._ended.get(message.body["id"])}, b""

    def _kill(self, message: Message) -> Answer:
        """Kill a copy and what it has started. Nobody else waits for it, so that its id is its own."""
        copy = message.body["id"]
        if copy in self._copies:
            _kill_group(copy)
            self._ended[copy] = os.waitpid(copy, 0)[1]
            self._copies.discard(copy)
        return {}, b""

    def _collect_ended(self) -> None:
        for copy in list(self._copies):
            found, status = os.waitpid(copy, os.WNOHANG)
            if found:
                # What the model had started goes with it.
                _kill_group(copy)
                self._copies.discard(copy)
                self._ended[copy] = status

    def _enter(self, message: Message) -> Answer:
        """Take over what the parent's process has now: environment, folder, path of imports, and its output for errors.

        What a model prints goes there too: standard output is for the results of the parent.
        """
        (output,) = message.descriptors
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        values = message.body
        for name in os.environ.keys() - values["environment"].keys():
            del os.environ[name]
        os.environ.update(values["environment"])
        os.chdir(values["folder"])
        sys.path[:] = values["path"] or sys.path
        self._threads = values["threads"]
        _set_threads(self._threads)
        return {}, b""

    def _load(self, message: Message) -> Answer:
        values = message.body
        form, folder = CallForm.from_json(values["form"]), Path(values["folder"])
        if values["check_files"]:
            with name_options_by_flags(Flags(**values["flags"])) if values["flags"] else nullcontext():
                os.environ[ALLOW_PICKLE] = str(_check_files(folder)).lower()
        self._model = load_python_model(folder, form, self._threads)
        gc.enable()
        may_fork = _may_fork()
        if may_fork:
            # It is idle from now on, and ends its copies when the socket is closed.
            _end_with_parent(None)
        keeps = self._model.keeps_inputs
        return {"may_fork": may_fork, "keeps_inputs": keeps, "bytes": _count_resident_bytes()}, b""

    def _limit_memory(self, message: Message) -> Answer:
        """Let this process take so many bytes of address space beyond what it has."""
        allowed = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE_BYTES + message.body["bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return {}, b""

    def _predict(self, message: Message) -> Answer:
        values = message.body
        for descriptor, new in zip(message.descriptors, values["new_regions"], strict=True):
            self._regions[new["number"]] = Region(descriptor, **new)
            os.close(descriptor)
        for number in values["gone_regions"]:
            del self._regions[number]
        assert self._model is not None  # noqa: S101 - the parent loads first
        inputs = {place["name"]: self._regions[place["region"]].view(place) for place in values["places"]}
        inputs |= unpack_opaque(values["opaque"], message.blob)
        outputs = self._run(self._model, {name: inputs[name] for name in values["names"]})
        places = put_arrays(outputs, self._regions[values["out_region"]], values["after"])
        opaque, blob = pack_opaque(outputs)
        return {"places": places, "opaque": opaque, "bytes": _count_resident_bytes()}, blob

    def _run(self, model: PythonModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the model; one that wants to write to its inputs gets copies from then on."""
        if not self._copies_inputs:
            try:
                return model.predict(inputs)
            except ValueError as error:
                if _READ_ONLY not in str(error).replace("-", ""):
                    raise
            self._copies_inputs = True
        return model.predict({name: array.copy() for name, array in inputs.items()})


def _check_files(folder: Path) -> bool:
    """Return whether MLflow may read the files of a model as it reads pickles. Raises ModelUnfit."""
    from mlflow.models import Model  # noqa: PLC0415 - MLflow is imported by now

    from serving.model.model_files import check_files  # noqa: PLC0415 - the same

    return check_files(folder, Model.load(str(folder / "MLmodel")))


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _describe(error: BaseException) -> dict[str, Any]:
    """Return an error as JSON: what the parent raises of it, and what explains a model that does not load."""
    failure = describe_failure(error)
    kind = "overnight" if isinstance(error, OvernightError) else failure.kind
    message, name = str(error)[:_MESSAGE_LENGTH_MAX], getattr(error, "name", None)
    return {"kind": kind, "text": str(failure), "type": type(error).__name__, "message": message, "name": name}


def _end_with_parent(parent: int | None) -> None:
    """Have this process killed when its parent ends, however that ends; with None, no longer.

    A process that waits for requests ends by itself when its socket is closed. Elsewhere than on Linux a thread looks
    for the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if parent else 0)
        if parent and os.getppid() != parent:
            os._exit(0)
    elif parent:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _may_fork() -> bool:
    """Return whether a copy of this process would be whole: no other thread can hold a lock that it needs."""
    if sys.platform != "linux":
        return False
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return all(name.startswith(_HARMLESS_THREADS) for name in names)


def _import_libraries(modules: Sequence[str]) -> None:
    """Import what copies of this process will load models by, so that none of them has to.

    Libraries read the number of threads when they are imported; later only threadpoolctl can change it.
    """
    if find_spec("threadpoolctl") is None:
        return
    for module in modules:
        # One that does not work here says so when a model is loaded.
        with suppress(Exception):
            if module == _SKOPS:
                from serving.model.model_files import import_skops  # noqa: PLC0415 - it imports MLflow

                import_skops()
            else:
                import_module(module)


def _set_threads(threads: int) -> None:
    """Have the libraries of models use so many threads; they read it when they are imported."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    if "numpy" in sys.modules and threads > 1:
        try:
            from threadpoolctl import (  # type: ignore[import-untyped]  # noqa: PLC0415 - scikit-learn brings it
                threadpool_limits,
            )
        except ImportError:
            return
        threadpool_limits(threads)


def _count_resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
