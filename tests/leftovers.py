"""Threads, processes and servers that outlive the test that started them."""

from __future__ import annotations

import gc
import os
import socket
import stat
import sys
import threading
import traceback
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

from tests.eventually import eventually

# What is started once in a process and kept: helpers of multiprocessing, Prefect's threads, and the first of the
# processes that models run in.
_KEPT = (
    "resource_tracker",
    "forkserver",
    "serving.model.process_program",
    "AnyIO worker thread",
    "model-process-starter",
)
_ROOT = Path(__file__).parents[1]

_kept: set[int] = set()


def _runs_our_code(thread: threading.Thread) -> bool:
    """Return whether a thread is within a function of this project, not of a package that it uses."""
    frame = sys._current_frames().get(thread.ident or 0)
    names = (
        [each.f_code.co_filename.removeprefix(f"{_ROOT}/") for each, _ in traceback.walk_stack(frame)] if frame else []
    )
    return any(not name.startswith(("/", ".", "<")) for name in names)


def list_running() -> dict[int, str]:
    """Return the processes that this one has started, its threads that hold it up or run our code, and its servers.

    Those that are kept are left out.
    """
    # Packages such as pyiceberg keep pools of threads for the process, and leave their threads the default name.
    found = {
        id(each): f"thread {each.name}"
        for each in threading.enumerate()
        if not (each.daemon or each.name.startswith("ThreadPoolExecutor-")) or _runs_our_code(each)
    }
    # Only Linux names children without a look at each process of the machine. Before and after each of thousands of
    # tests, paths as objects would take a millisecond more.
    for thread in os.scandir("/proc/self/task"):
        # A thread or a child may end at any moment; one that was not waited for has no command line.
        with suppress(OSError):
            for pid in _read_file(f"{thread.path}/children").split():
                if command := _read_file(f"/proc/{int(pid)}/cmdline").replace(b"\0", b" ").decode():
                    found[int(pid)] = f"process {int(pid)}: {command[:300]}"
    for file in os.scandir("/proc/self/fd"):
        # Another thread may close it at any moment.
        with suppress(OSError):
            state = file.stat()
            if stat.S_ISSOCK(state.st_mode) and (port := _find_port(int(file.name))):
                found[-state.st_ino] = f"port {port}, where this process listens"
    return {key: words for key, words in found.items() if key not in _kept and not any(each in words for each in _KEPT)}


def _read_file(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _find_port(fd: int) -> int | None:
    """Return the TCP port that a socket listens at, None where it does not."""
    each = socket.socket(fileno=fd)
    try:
        is_tcp = each.family in (socket.AF_INET, socket.AF_INET6)
        return each.getsockname()[1] if is_tcp and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) else None
    finally:
        each.detach()


@contextmanager
def keep_running() -> Generator[None]:
    """Let what the block starts outlive a test: a fixture of a module or of the session ends it."""
    before = list_running()
    yield
    _kept.update(list_running().keys() - before)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """Keep what fixtures of a module or of the session start, also where a test is the first that asks for them."""
    with nullcontext() if fixturedef.scope == "function" else keep_running():
        return (yield)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Generator[None]:
    """Fail a test after which a thread or a process runs, or a port is listened at, that did not before."""
    before = list_running()
    yield
    if not list_running().keys() <= before.keys():
        gc.collect()
        eventually(lambda: [words for key, words in list_running().items() if key not in before], lambda left: not left)
