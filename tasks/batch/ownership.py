"""The owner of a destination: of several calls that would share its work out, one does, and a dead one never blocks.

Owners are numbered, and a number is an object that is created once. The owner puts a heartbeat every few seconds.
Another call takes over where the owner has ended, where it was a process of this machine that is gone, or where its
heartbeat does not change for a while, by the clock of the one that watches: no two clocks are compared. An owner that
was merely slow finds the higher number, and goes on with nothing more.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from serving.errors import AlreadyRunning, StorageFault
from serving.model.contract import Frozen
from tasks.batch.plan import ROOT
from tasks.batch.run_records import read_record
from tasks.storage import Storage

_RECORD = re.compile(r"(owner|beat|ended)-(\d{8})(?:-(\d{8}))?\.json")
_POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Owner(Frozen):
    """Who owns a destination: the flow run, its machine and process, and the model version that it scores by."""

    owner: str
    machine: str
    process: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    """The highest number, its owner, its last heartbeat, and whether it has ended."""

    number: int = 0
    owner: Owner | None = None
    beat: int = 0
    has_ended: bool = True


class Ownership:
    """The ownership of a destination, for as long as nobody has taken it over."""

    def __init__(self, storage: Storage, folder: str, number: int) -> None:
        self._storage, self._folder, self._number = storage, folder, number
        self._beat = 0
        self._is_lost = threading.Event()

    def check(self) -> None:
        """Raise AlreadyRunning where another call has taken over."""
        if self._is_lost.is_set():
            message = (
                f"One call at a time must do the work at {self._storage.url}, but another has taken over from this "
                "one, whose heartbeat it did not see. What is done stays. Let that call go on."
            )
            raise AlreadyRunning(message)

    def beat(self) -> None:
        """Put a heartbeat in place of the one before, and see whether another call has taken over."""
        self._beat += 1
        self._storage.put_new(self._name_beat(self._beat), b"{}")
        self._storage.delete([self._name_beat(self._beat - 1)])
        if _read_standing(self._storage, self._folder).number > self._number:
            self._is_lost.set()

    def _name_beat(self, beat: int) -> str:
        return f"{self._folder}/beat-{self._number:08d}-{beat:08d}.json"

    def end(self) -> None:
        """Say that the owner has ended, and delete its last heartbeat."""
        self._storage.put_new(f"{self._folder}/ended-{self._number:08d}.json", b"{}")
        self._storage.delete([self._name_beat(self._beat)])


def find_owner(storage: Storage, purpose: str) -> Owner | None:
    """Return the last owner of a destination for this purpose, whether it has ended or not."""
    return _read_standing(storage, f"{ROOT}/{purpose}").owner


def name_machine() -> str:
    """Return what tells the processes of this machine, or of this container of it, from those of others."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{namespace.stat().st_ino if namespace.exists() else 0}"


@contextmanager
def own_destination(
    storage: Storage,
    purpose: str,
    owner: Owner,
    *,
    beat_seconds: float = 5.0,
    silent_seconds: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[Ownership]:
    """Own a destination during the block.

    Args:
        storage: The destination.
        purpose: What it is owned for; another purpose has other owners.
        owner: This flow run. An earlier attempt of it is taken over from at once.
        beat_seconds: Seconds between two heartbeats.
        silent_seconds: Seconds without one, after which an owner is taken to be dead.
        clock: Counts seconds.
        sleep: Waits.

    Raises:
        AlreadyRunning: Another owner is alive.
    """
    ownership = _acquire(storage, f"{ROOT}/{purpose}", owner, silent_seconds, clock, sleep)
    stop = threading.Event()
    thread = threading.Thread(target=_beat_until, args=(ownership, stop, beat_seconds), daemon=True, name="heartbeat")
    thread.start()
    try:
        yield ownership
    finally:
        stop.set()
        thread.join()
        with suppress(StorageFault):
            ownership.end()


def _acquire(
    storage: Storage,
    folder: str,
    owner: Owner,
    silent_seconds: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Ownership:
    watched, since = None, clock()
    while True:
        standing = _read_standing(storage, folder)
        seen = (standing.number, standing.beat)
        if _may_follow(standing, owner) or (seen == watched and clock() - since >= silent_seconds):
            number = standing.number + 1
            is_new = storage.put_new(f"{folder}/owner-{number:08d}.json", owner.model_dump_json().encode())
            # A number below the highest may be free again, since its records were deleted.
            if is_new and _read_standing(storage, folder).number == number:
                _delete_earlier(storage, folder, number)
                return Ownership(storage, folder, number)
            continue
        if watched is not None and seen != watched:
            raise _make_running_error(storage, standing.owner)
        watched = seen
        sleep(min(_POLL_SECONDS, silent_seconds / 4))


def _may_follow(standing: _Standing, owner: Owner) -> bool:
    """Return whether a number may be followed at once: it has ended, is our own, or its process here is gone."""
    if standing.has_ended or standing.owner is None or standing.owner.owner == owner.owner:
        return True
    return standing.owner.machine == owner.machine and not _is_alive(standing.owner.process)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _make_running_error(storage: Storage, owner: Owner | None) -> AlreadyRunning:
    who = f"flow run {owner.owner} (process {owner.process} of {owner.machine.split('/')[0]})" if owner else "another"
    return AlreadyRunning(
        f"One call at a time must do the work at {storage.url}, got this one while {who} goes on. Wait until that has "
        "ended, or stop it, and call again: what it has done is passed over."
    )


def _read_standing(storage: Storage, folder: str) -> _Standing:
    found = [
        match
        for entry in storage.entries(folder, depth=1)
        if (match := _RECORD.fullmatch(entry.path.rpartition("/")[2]))
    ]
    number = max((int(match[2]) for match in found if match[1] == "owner"), default=0)
    if not number:
        return _Standing()
    own = [match for match in found if int(match[2]) == number]
    return _Standing(
        number=number,
        owner=read_record(storage, f"{folder}/owner-{number:08d}.json", Owner),
        beat=max((int(match[3]) for match in own if match[1] == "beat"), default=0),
        has_ended=any(match[1] == "ended" for match in own),
    )


def _delete_earlier(storage: Storage, folder: str, number: int) -> None:
    names = [entry.path for entry in storage.entries(folder, depth=1)]
    matches = [(path, _RECORD.fullmatch(path.rpartition("/")[2])) for path in names]
    storage.delete([path for path, match in matches if match and int(match[2]) < number])


def _beat_until(ownership: Ownership, stop: threading.Event, seconds: float) -> None:
    while not stop.wait(seconds):
        try:
            ownership.beat()
        except Exception as error:  # noqa: BLE001 - an owner whose heart stops is taken to be dead, whatever stopped it
            _log.warning("The heartbeat must be written for no other call to take over, got: %s", error)
