"""A model in processes of its own: one for each slot, so that a crash, a leak or a hang costs a pass and not the run.

The first process imports MLflow and is kept for the life of this one. A copy of it loads a model, and copies of that
make the passes: serving/model/process_program.py has their side. Numbers go through shared memory, which costs a copy.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import mlflow
import numpy as np
import numpy.typing as npt

from serving import errors
from serving.errors import ModelFailed, ModelUnfit, OvernightError
from serving.faults import PROCESS_ENDED, TOOK_LONGER, ProcessFailure
from serving.machine import count_cores
from serving.model.contract import OPAQUE_DTYPES, Contract
from serving.model.encoding import BatchUnit, Encoded
from serving.model.interface import Arrays, Engine, Halted, TuningLimits
from serving.model.process_handle import (
    FIRST_PROCESSES,
    PACKAGE,
    ChildEnded,
    ChildProcess,
    describe_end,
    make_child_environment,
)
from serving.model.process_protocol import pack_opaque, unpack_opaque
from serving.model.python_model import ALLOW_PICKLE, CallForm
from serving.model.shared_memory import (
    ALIGNMENT,
    Allocate,
    OwnRegion,
    RegionPool,
    count_bytes,
    count_place_bytes,
    describe_place,
    put_arrays,
)
from serving.option_words import find_flags

_LOAD_SECONDS_MAX = 3600.0
# What a copy writes to of what it shares, before its model takes anything for a pass.
_COPY_BYTES = 32 << 20
# A pass of fewer rows than one that has hung gets so many times what its rows take, while the row is searched for.
_SEARCH_RATIO, _SEARCH_SECONDS_MIN = 30.0, 2.0
# A process that has grown by so much since its first passes is replaced: its model leaks.
_LEAK_BYTES, _LEAK_RATIO, _FIRST_PASSES = 1 << 30, 2.0, 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """How the processes of a model run.

    Attributes:
        seconds_max: Seconds that a pass may take.
        bytes_max: Bytes that passes may take beyond what the process has before its first one; None: any.
        python: The interpreter: this one, or that of an environment made for the model.
    """

    seconds_max: float = 600.0
    bytes_max: int | None = None
    python: str = sys.executable


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What a process loads: the folder of a model, how it is called, and the libraries that it needs.

    `check` has the process look for what must not be unpickled, before any library reads the files. Without it,
    `allow_pickle` says what was found.
    """

    folder: Path
    form: CallForm
    allow_pickle: bool
    check: bool = False
    libraries: tuple[str, ...] = ()


class _Worker:
    """A process that makes passes, one at a time, and the memory that it shares with this one."""

    def __init__(self, child: ChildProcess, pool: RegionPool) -> None:
        self.child = child
        self._pool = pool
        self._region: OwnRegion | None = None
        # The numbers of the regions that the process has.
        self._sent: set[int] = set()
        self._passes, self._bytes_first = 0, 0
        self.leaks = False

    def predict(
        self, inputs: Arrays, out_bytes: int, *, seconds_max: float, check: Callable[[], None]
    ) -> dict[str, npt.NDArray[Any]]:
        """Have the process run the model. Raises what `ChildProcess.ask` raises, and what the model has raised."""
        shared = self._pool.find_arrays(inputs)
        copied = {name: array for name, array in inputs.items() if name not in shared}
        in_bytes = count_bytes(copied)
        region = self._reserve(in_bytes + out_bytes)
        places = put_arrays(copied, region, 0)
        places += [describe_place(name, inputs[name], *found) for name, found in shared.items()]
        used = {each.number: each for each in (region, *(found for found, _ in shared.values()))}
        new = [used[number] for number in used.keys() - self._sent]
        gone = self._sent - used.keys() - self._pool.numbers
        self._sent = (self._sent | used.keys()) - gone
        opaque, blob = pack_opaque(copied)
        answer = self.child.ask(
            "predict",
            blob,
            [each.descriptor for each in new],
            seconds_max=seconds_max,
            check=check,
            names=list(inputs),
            places=places,
            opaque=opaque,
            new_regions=[{"size": each.size, "number": each.number, "writable": each is region} for each in new],
            gone_regions=list(gone),
            out_region=region.number,
            after=in_bytes,
        )
        _raise_error(answer.body)
        self._note_bytes(answer.body["bytes"])
        # Copies: the next pass writes to the same memory.
        found = {place["name"]: region.view(place).copy() for place in answer.body["places"]}
        return found | unpack_opaque(answer.body["opaque"], answer.blob)

    def _reserve(self, size: int) -> OwnRegion:
        """Return memory of so many bytes for what is copied and for the answer."""
        if self._region is None or self._region.size < size:
            self._region = OwnRegion(size)
        return self._region

    def _note_bytes(self, resident: int) -> None:
        """Note what the process has in memory after a pass; it leaks where that grows without end."""
        self._passes += 1
        if self._passes <= _FIRST_PASSES:
            self._bytes_first = max(self._bytes_first, resident)
        self.leaks = resident > _LEAK_RATIO * self._bytes_first + _LEAK_BYTES


def _raise_error(values: Mapping[str, Any]) -> None:
    """Raise the error that an answer holds, if any."""
    found = values.get("error")
    if found is None:
        return
    if found["kind"] == "overnight":
        raise getattr(errors, found["type"])(found["message"])
    raise ProcessFailure(found["text"], found["kind"])


class ModelProcesses:
    """The processes of one model with so many threads each; they end with this object."""

    def __init__(self, files: ModelFiles, options: ProcessOptions, threads: int) -> None:
        self._files, self._options, self._threads = files, options, threads
        self._lock = threading.Lock()
        self._loader: ChildProcess | None = None
        self._idle: list[_Worker] = []
        self._children: set[ChildProcess] = set()
        self.model_bytes = 0
        # Whether the model is known to leave its inputs as they are.
        self.keeps_inputs = False
        self.pool = RegionPool()
        weakref.finalize(self, _leave_all, self._children)

    def take(self) -> _Worker:
        """Return a process for a slot: an idle one, else a new one. Raises ModelUnfit where the model does not load."""
        with self._lock:
            return self._idle.pop() if self._idle else _Worker(self._start(), self.pool)

    def give_back(self, worker: _Worker) -> None:
        """Keep a process for the next slot."""
        with self._lock:
            self._idle.append(worker)

    def drop(self, worker: _Worker) -> None:
        """End a process that is of no more use."""
        self._close(worker.child)

    def count_bytes(self, slots: int) -> int:
        """Return the memory of so many processes with the model: copies share it, and take a part for themselves."""
        shared = self._loader is not None
        return self.model_bytes + slots * _COPY_BYTES if shared else slots * self.model_bytes

    def load(self) -> None:
        """Load the model now, rather than for the first slot. Raises ModelUnfit."""
        self.give_back(self.take())

    def _start(self) -> ChildProcess:
        """Start a process that has the model: a copy of one that was loaded before, where copies can be made."""
        for _ in range(2):
            loader = self._loader or self._load()
            self._loader = loader if loader.may_fork else None
            try:
                child = loader.fork() if loader.may_fork else loader
                self._children.add(child)
                if self._options.bytes_max is not None:
                    child.ask("limit", bytes=self._options.bytes_max)
            except (ChildEnded, TimeoutError):
                self._close(loader)
                self._loader = None
            else:
                return child
        message = (
            f"The model in {self._files.folder} must stay loaded, got a process that ended twice. Is memory short?"
        )
        raise ModelFailed(message)

    def _load(self) -> ChildProcess:
        folder = self._files.folder
        child = FIRST_PROCESSES.start(self._options.python, self._files.libraries)
        self._children.add(child)
        try:
            _enter(child, self._files, self._options, self._threads)
            flags = find_flags()
            answer = child.ask(
                "load",
                seconds_max=_LOAD_SECONDS_MAX,
                folder=str(folder),
                form=self._files.form.to_json(),
                check_files=self._files.check,
                flags=asdict(flags) if flags else None,
            ).body
        except (ChildEnded, TimeoutError) as error:
            self._close(child)
            message = (
                f"The model in {folder} must load, got a process that {describe_end(error)} while it read the files."
            )
            raise ModelUnfit(message) from None
        if (found := answer.get("error")) is not None:
            self._close(child)
            _raise_load_error(found)
        child.may_fork, self.model_bytes = answer["may_fork"], answer["bytes"]
        self.keeps_inputs = answer["keeps_inputs"]
        return child

    def _close(self, child: ChildProcess) -> None:
        self._children.discard(child)
        child.close()


def _leave_all(children: set[ChildProcess]) -> None:
    for child in children:
        child.leave()


def _enter(child: ChildProcess, files: ModelFiles, options: ProcessOptions, threads: int) -> None:
    """Give a process what this one has now: environment, folder, path of imports, and its output for errors."""
    own = options.python == sys.executable
    environment = make_child_environment(options.python) | {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
        ALLOW_PICKLE: str(files.allow_pickle).lower(),
    }
    path = [*sys.path, str(PACKAGE.parent)] if own else None
    child.ask("enter", descriptors=[2], environment=environment, folder=str(Path.cwd()), path=path, threads=threads)


def _raise_load_error(found: Mapping[str, Any]) -> None:
    """Raise what a library raised when it loaded the model, under its name."""
    if found["kind"] == "overnight":
        _raise_error({"error": found})
    if found["type"] == "ModuleNotFoundError":
        raise ModuleNotFoundError(found["message"], name=found["name"])
    raise type(found["type"], (Exception,), {})(found["message"])


class ProcessModel:
    """A model whose passes are made in processes, one for each slot.

    Args:
        files: What each process loads.
        contract: What the model takes and returns.
        options: How its processes run.
    """

    batch_size, batch_sizes = 4096, (64, 1024, 4096, 16384, 65536)
    batch_unit: BatchUnit = "rows"

    def __init__(self, files: ModelFiles, contract: Contract, options: ProcessOptions) -> None:
        self._files, self._contract, self._options = files, contract, options
        self.engine = Engine()
        self._by_threads: dict[int, ModelProcesses] = {}
        self._here = threading.local()
        self._row_bytes = sum(
            each.width * np.dtype(each.dtype).itemsize for each in contract.outputs if each.dtype != "str"
        )
        # Seconds of a row in passes that ended, the fastest.
        self._row_seconds: float | None = None

    @property
    def processes(self) -> ModelProcesses:
        """Those of the engine."""
        threads = self.engine.threads
        if threads not in self._by_threads:
            self._by_threads.setdefault(threads, ModelProcesses(self._files, self._options, threads))
        return self._by_threads[threads]

    def prepare(self, encoded: Encoded) -> Encoded:
        """Return the inputs as they are."""
        return encoded

    def lend_memory(self, rows: int) -> Allocate:
        """Return what makes the arrays of numbers of so many rows: in shared memory, where the model leaves them alone.

        A limit of the memory of passes would count what is shared.
        """
        if self._options.bytes_max is not None or not self.processes.keeps_inputs:
            return np.empty
        sizes = [
            rows * math.prod(each.shape) * np.dtype(each.dtype).itemsize
            for each in self._contract.inputs
            if not each.is_stacked and each.dtype not in OPAQUE_DTYPES
        ]
        return self.processes.pool.lend(sum(map(count_place_bytes, sizes))) if sizes else np.empty

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the model on N rows in the process of this thread's slot; must be called inside `slot()`.

        Raises ProcessFailure for what the model raises and where its process ends or takes too long; it then has
        another one for the next pass.
        """
        return self.predict_while(inputs, lambda: True)

    def predict_while(self, inputs: Arrays, may_continue: Callable[[], bool]) -> dict[str, npt.NDArray[Any]]:
        """Run the model as `predict` does, as long as `may_continue` returns True. Raises Halted where it does not."""
        try:
            return self._run_pass(inputs, may_continue)
        except ProcessFailure as failure:
            if failure.kind != "memory" or self._here.worker is not None:
                raise
            # Whatever killed the process may have nothing to do with these rows: they come to the same bits once more.
            return self._run_pass(inputs, may_continue)

    def _run_pass(self, inputs: Arrays, may_continue: Callable[[], bool]) -> dict[str, npt.NDArray[Any]]:
        def check() -> None:
            if not may_continue():
                raise Halted

        here, rows = self._here, len(next(iter(inputs.values())))
        worker = here.worker = here.worker or self.processes.take()
        start = time.monotonic()
        try:
            # Each output of numbers has a place of its own in the shared memory.
            out_bytes = rows * self._row_bytes + ALIGNMENT * len(self._contract.outputs)
            found = worker.predict(inputs, out_bytes, seconds_max=self._limit(rows), check=check)
        except (ProcessFailure, OvernightError):
            raise
        except (ChildEnded, TimeoutError) as error:
            self._drop(worker)
            if isinstance(error, TimeoutError):
                here.slow_rows = min(rows, here.slow_rows or rows)
            failure = self._explain_end(error)
            # One warning for a batch: the search for its rows is among those who debug it.
            level = logging.DEBUG if rows < here.failed_rows else logging.WARNING
            _log.log(level, "A pass of %d rows failed: %s. The process is started again.", rows, failure)
            here.failed_rows = max(rows, here.failed_rows)
            raise failure from None
        except BaseException:
            # Its answer may still come, and would be taken for that to the next pass.
            self._drop(worker)
            raise
        self._row_seconds = min((time.monotonic() - start) / rows, self._row_seconds or math.inf)
        if rows >= here.failed_rows:
            here.failed_rows, here.slow_rows = 0, None
        if worker.leaks:
            _log.warning("The model's process has grown to more than twice what it had: it is started again.")
            self._drop(worker)
        return found

    def _drop(self, worker: _Worker) -> None:
        self._here.worker = None
        self.processes.drop(worker)

    def _limit(self, rows: int) -> float:
        """Return the seconds that a pass may take.

        After one has taken too long, smaller ones get a multiple of what their rows take: the row is found sooner. A
        row alone gets all of it.
        """
        seconds_max = self._options.seconds_max
        slow_rows = self._here.slow_rows
        if slow_rows is None or not 1 < rows < slow_rows or self._row_seconds is None:
            return seconds_max
        return min(seconds_max, max(_SEARCH_SECONDS_MIN, _SEARCH_RATIO * rows * self._row_seconds))

    def _explain_end(self, error: ChildEnded | TimeoutError) -> ProcessFailure:
        if isinstance(error, TimeoutError):
            return ProcessFailure(f"{TOOK_LONGER}{self._options.seconds_max:g} s", "row")
        killed = (
            error.status is not None and os.WIFSIGNALED(error.status) and os.WTERMSIG(error.status) == signal.SIGKILL
        )
        # Nobody here has killed it: the system does that where memory is short.
        return ProcessFailure(f"{PROCESS_ENDED}{describe_end(error)}", "memory" if killed else "row")

    def count_slot_bytes(self, slots: int, batch_size: int) -> int:  # noqa: ARG002 - what a pass takes is not known
        """Return the memory of the processes of so many slots, without what their passes take."""
        return self.processes.count_bytes(slots)

    @contextmanager
    def slot(self) -> Generator[None]:
        """Have a process for the passes of this thread while the block runs."""
        self._here.worker, self._here.failed_rows, self._here.slow_rows = None, 0, None
        try:
            yield
        finally:
            if self._here.worker is not None:
                self.processes.give_back(self._here.worker)
                self._here.worker = None

    @property
    def slots(self) -> int:
        """The cores over the threads of a process."""
        return max(1, count_cores() // self.engine.threads)

    def engines(self, limits: TuningLimits) -> list[Engine]:
        """Return a process for each core, and one for all of them: some libraries share their work out themselves."""
        cores = count_cores()
        return [Engine()] if limits.slots or cores == 1 else [Engine(), Engine(threads=cores)]

    def with_engine(self, engine: Engine) -> Self:
        """Return the same model with other threads; the processes of each engine are kept."""
        other = type(self)(self._files, self._contract, self._options)
        other.engine, other._by_threads = engine, self._by_threads  # noqa: SLF001 - of its own kind
        return other
