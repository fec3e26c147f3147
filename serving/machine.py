"""The machine and the process: cores, the kind of machine that figures are kept for, clock, release, environment."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import platform
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


def utc_now() -> datetime:
    """Return the time by this machine's clock, in UTC."""
    return datetime.now(UTC)


def find_release() -> str:
    """Return the release of Overnight that runs here; 0 where it is not installed."""
    try:
        return version("overnight")
    except PackageNotFoundError:
        return "0"


def count_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return what decides this machine's speed and the last bits of results: GPUs, processor, cores, torch's version.

    Does not import torch: GPUs are included only where a model has imported it.
    """
    torch = sys.modules.get("torch")
    cards = torch.cuda.device_count() if torch else 0
    card = f"{cards} x {torch.cuda.get_device_name(0)}, " if torch and cards else ""
    return f"{card}{_describe_processor(cpuinfo)}, {count_cores()} cores, torch {version('torch')}"


def describe_arithmetic(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return what of this machine decides the last bits of results: the kind of GPU, or the processor."""
    torch = sys.modules.get("torch")
    has_card = torch is not None and torch.cuda.device_count()
    return str(torch.cuda.get_device_name(0)) if torch is not None and has_card else _describe_processor(cpuinfo)


@functools.cache
def _describe_processor(cpuinfo: Path) -> str:
    """Return the processor's name, with family and model, since clouds use one name for several processors."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # The first processor's lines: later ones do not replace them.
    fields: dict[str, str] = {}
    for name, value in (line.split(":", 1) for line in lines if ":" in line):
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} {fields.get('cpu family', '')}.{fields.get('model', '')}"


@contextmanager
def set_variable(name: str, value: str) -> Generator[None]:
    """Set an environment variable while the block runs, and put back what was there."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


class SharedSetting(Generic[T]):
    """A setting of the process that blocks change for as long as they run, in several threads too.

    Blocks may overlap: the last one that ends puts the setting back to what it was before the first.
    """

    def __init__(self, read: Callable[[], T], write: Callable[[T], object]) -> None:
        self._read, self._write = read, write
        self._lock, self._before = threading.Lock(), list[T]()
        self._blocks = 0

    @contextmanager
    def keep(self) -> Generator[None]:
        """Let the block change the setting."""
        with self._lock:
            if self._blocks == 0:
                self._before = [self._read()]
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    self._write(self._before.pop())


_COLLECTOR = SharedSetting(gc.isenabled, lambda was_on: gc.enable() if was_on else gc.disable())


# Set once the caller was seen to have frozen objects. To count a million of them takes 40 ms.
_frozen_by_caller = threading.Event()


def _freeze_unless_frozen() -> bool:
    """Freeze every object there is, unless the caller has frozen some, which are to stay so; return whether it did."""
    if _frozen_by_caller.is_set() or gc.get_freeze_count():
        _frozen_by_caller.set()
        return False
    gc.freeze()
    return True


_FROZEN = SharedSetting(_freeze_unless_frozen, lambda did: gc.unfreeze() if did else None)


@contextmanager
def freeze_objects(*, again: bool = False) -> Generator[None]:
    """Have Python's garbage collector leave out the objects that were there when the first such block began.

    To look through what torch, MLflow and Prefect have imported takes it 0.4 s, in which no thread goes on. Where the
    caller has frozen objects, that is left as it is: nobody could tell them from others when the block ends.

    Args:
        again: Leave out what was made since then too, such as a model. Garbage is collected before.
    """
    with _FROZEN.keep():
        if again and not _frozen_by_caller.is_set():
            gc.collect()
            gc.freeze()
        yield


@functools.cache
def end_without_collection() -> None:
    """Have Python end this process without a look for garbage in all that was imported: 0.8 s, and 2.4 s with torch.

    Not for a process of others: what holds an open file in a circle of references would not write its last bytes.
    """
    atexit.register(gc.freeze)


@contextmanager
def pause_garbage_collection() -> Generator[None]:
    """Keep Python's cyclic garbage collector off while the block imports large packages.

    Importing Prefect, MLflow and torch adds more than a million objects that stay; the collector goes through them
    again and again, for a quarter of the time of the imports.
    """
    with _COLLECTOR.keep():
        gc.disable()
        yield
