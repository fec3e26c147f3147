"""A storage whose every call is a step of the simulation, and may fail in the ways that storage fails.

Objects lie in memory, with a copy on the disk where libraries read by path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from serving.errors import SourceChanged, StorageFault
from tasks.storage import Entry, LocalStorage
from tests.simulation.scheduler import Scheduler

_DELTA_LOG = "_delta_log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How often each thing goes wrong, as a fraction of the calls it can happen to.

    A put that is refused changes nothing. One that is unanswered is done, and raises; a doubled one is sent twice, and
    the second answer is the one that counts. One that is late raises, and is done some time afterwards. One that is
    torn leaves half an object; one that is lost is answered, and leaves none. A listing that lags is answered after
    others have written.
    """

    kill: float = 0.0
    error: float = 0.0
    refused: float = 0.0
    unanswered: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    torn: float = 0.0
    lost: float = 0.0
    lag: float = 0.0
    is_create_only: bool = True

    def without_faults(self) -> Weather:
        """Return the same kind of storage, on a day on which nothing goes wrong."""
        return Weather(is_create_only=self.is_create_only)


_PUT_FAULTS = ("refused", "unanswered", "doubled", "late", "torn", "lost")


class SimulatedStorage:
    """A bucket: it knows an object by what is in it, and moves one in three steps."""

    is_disk = False

    def __init__(self, scheduler: Scheduler, url: str, folder: Path, weather: Weather) -> None:
        self.root = folder
        self.url = url
        self.weather = weather
        self.objects: dict[str, tuple[bytes, Entry]] = {}
        self.on_put: Callable[[str, bool], None] = lambda _path, _is_late: None
        self.on_list: Callable[[str], None] = lambda _prefix: None
        self.on_delete: Callable[[str], None] = lambda _path: None
        self._scheduler = scheduler
        self._late: list[tuple[str, bytes]] = []
        self._listed: list[Entry] = []
        self._writes = 0

    @property
    def reads_at_once(self) -> int:
        """One: the order of reads comes from the seed."""
        return 1

    # What the product calls.

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        """Create an object, or fail at it."""
        self._step(f"put {path}")
        won = self._put(path, bytes(data))
        self._scheduler.tell(f"put {path}: {won}")
        self._scheduler.step("put answers")
        return won

    def read(self, path: str) -> bytes | None:
        """Return the bytes of an object."""
        self._step(f"read {path}")
        found = self.objects.get(path)
        return None if found is None else found[0]

    def exists(self, path: str) -> bool:
        """Whether an object stands under that name."""
        return self.find(path) is not None

    def find(self, path: str) -> Entry | None:
        """Return the object of that name."""
        self._step(f"find {path}")
        found = self.objects.get(path)
        return None if found is None else found[1]

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        """Return what lies below a prefix, perhaps as it was when that was asked."""
        base = prefix.rstrip("/")
        levels = len(base.split("/")) if base else 0
        below = (entry for entry in self._list(prefix) if not base or entry.path.startswith(f"{base}/"))
        return [entry for entry in below if depth is None or entry.path.count("/") < levels + depth]

    def entries_after(self, folder: str, name: str, count: int) -> list[Entry]:
        """Return a page of what lies right in a folder, perhaps as it was when that was asked."""
        below = [entry for entry in self._list(folder) if entry.path.rpartition("/")[0] == folder]
        if folder == _DELTA_LOG and (self.root / folder).is_dir():
            # What deltalake writes lies on the disk alone.
            names = sorted(path.name for path in (self.root / folder).iterdir())
            below = [Entry(path=f"{folder}/{name}", size=0, tag="") for name in names]
        return [entry for entry in below if entry.path.rpartition("/")[2] > name][:count]

    def _list(self, told: str) -> list[Entry]:
        self._step(f"list {told}")
        self.on_list(told)
        listed = self._listed
        if self._draw(self.weather.lag):
            # Others write meanwhile. S3, GCS, Azure and disks list all that was there when they were asked.
            self._scheduler.tell("lags")
            self._scheduler.step("list answers")
        return listed

    def open_pinned(self, entry: Entry) -> pa.NativeFile:
        """Open an object as it is now, where it is the entry."""
        self._step(f"open {entry.path}")
        self._hold(entry)
        return pa.BufferReader(self.objects[entry.path][0])

    def check_unchanged(self, entry: Entry) -> None:
        """Raise SourceChanged where the object is another by now; of a bucket every read was held already."""
        if self.is_disk:
            self._step(f"hold {entry.path}")
            self._hold(entry)

    def set_aside(self, entry: Entry) -> str | None:
        """Move an object to a hidden name, in one step on a disk."""
        aside = self._hidden(entry.path)
        self._step(f"set aside {entry.path}")
        if not self._is(entry):
            return None
        if not self.is_disk:
            self._step(f"copy {entry.path}")
            if entry.path not in self.objects:
                return None
            self._store(aside, self.objects[entry.path][0])
            self._step(f"delete {entry.path}")
        else:
            self._store(aside, self.objects[entry.path][0])
        self.erase([entry.path])
        return aside

    def delete(self, paths: list[str]) -> None:
        """Delete objects, one a step."""
        for path in paths:
            self._step(f"delete {path}")
            self.on_delete(path)
            self.erase([path])

    def torn_writes(self, prefix: str) -> list[Entry]:
        """Return none: a torn write leaves half an object here, not one beside it."""
        return []

    def delete_torn_writes(self, prefix: str) -> None:
        """Nothing to do: a torn write leaves half an object here, not one beside it."""
        self._step(f"sweep {prefix}")

    def address(self, path: str) -> str:
        """Return where the copy lies."""
        return str(self.root / path) if path else str(self.root)

    # What the simulation calls: no steps, no faults.

    def write(self, path: str, data: bytes) -> Entry:
        """Write an object over whatever stands there; return it."""
        self._store(path, data)
        return self.objects[path][1]

    def erase(self, paths: list[str]) -> None:
        """Delete objects."""
        for path in paths:
            if self.objects.pop(path, None) is not None:
                (self.root / path).unlink(missing_ok=True)
        self._keep_listing()

    def deliver(self, at: int = 0) -> None:
        """Carry out a late put, if there is one."""
        if self._late:
            path, data = self._late.pop(at % len(self._late))
            self._scheduler.tell(f"put {path} arrives: {self._create(path, data, is_late=True)}")

    @property
    def has_late(self) -> bool:
        """Whether a late put has not arrived yet."""
        return bool(self._late)

    def _step(self, told: str) -> None:
        self._scheduler.step(f"{self.url} {told}")
        if self._draw(self.weather.error):
            raise _fault(self.url, told)

    def _put(self, path: str, data: bytes) -> bool:
        fault = next((fault for fault in _PUT_FAULTS if self._draw(getattr(self.weather, fault))), None)
        if fault is None:
            return self._create(path, data)
        self._scheduler.tell(f"put {path} is {fault}")
        if fault == "doubled":
            self._create(path, data)
            return self._create(path, data)
        if fault == "lost":
            return True
        if fault == "torn":
            won = self._create(path, data[: int(len(data) * self._scheduler.chance.random())])
            if self._draw(0.5):
                return won
        elif fault == "unanswered":
            self._create(path, data)
        elif fault == "late":
            self._late.append((path, data))
        raise _fault(self.url, path)

    def _create(self, path: str, data: bytes, *, is_late: bool = False) -> bool:
        if path in self.objects and self.weather.is_create_only:
            return False
        self._store(path, data)
        self.on_put(path, is_late)
        return True

    def _store(self, path: str, data: bytes) -> None:
        self._writes += 1
        # A disk knows a file by its time, a bucket by what is in it.
        tag = str(self._writes) if self.is_disk else hashlib.blake2b(data, digest_size=8).hexdigest()
        self.objects[path] = data, Entry(path=path, size=len(data), tag=tag)
        copy = self.root / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
        self._keep_listing()

    def _keep_listing(self) -> None:
        self._listed = sorted((entry for _, entry in self.objects.values()), key=lambda entry: entry.path)

    def _hidden(self, path: str) -> str:
        folder, _, name = path.rpartition("/")
        self._writes += 1
        return f"{folder}/.{name}.{self._writes}.aside"

    def _is(self, entry: Entry) -> bool:
        found = self.objects.get(entry.path)
        return found is not None and found[1] == entry

    def _hold(self, entry: Entry) -> None:
        if not self._is(entry):
            message = f"{entry.path} must be the object that the plan was made for, but is another by now."
            raise SourceChanged(message)

    def _draw(self, rate: float) -> bool:
        return rate > 0 and self._scheduler.chance.random() < rate


class SimulatedDisk(SimulatedStorage, LocalStorage):
    """A local disk: it knows a file by the time of its last write, and moves one in one step."""

    is_disk = True

    def pin(self, entries: Sequence[Entry], read: object = None) -> list[Entry]:
        """Return the entries as they are: their tags are never those of other files."""
        return list(entries)


def _fault(url: str, told: str) -> StorageFault:
    return StorageFault(f"{url} must answer, but did not: {told}.")
