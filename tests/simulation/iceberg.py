"""An Iceberg table that calls at two destinations feed: each committed run is in it once, or the newest one alone."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import polars as pl
from pyiceberg.catalog.noop import NoopCatalog
from pyiceberg.exceptions import (
    CommitStateUnknownException,
    NoSuchTableError,
    ServiceUnavailableError,
    TableAlreadyExistsError,
)
from pyiceberg.partitioning import UNPARTITIONED_PARTITION_SPEC
from pyiceberg.table import CommitTableResponse, Table
from pyiceberg.table.metadata import TableMetadata, new_table_metadata
from pyiceberg.table.sorting import UNSORTED_SORT_ORDER
from pyiceberg.table.update import update_table_metadata
from pyiceberg.utils.concurrent import ExecutorFactory

from tasks.batch import iceberg_table
from tasks.batch.iceberg_catalog import StorageIO
from tasks.batch.options import BatchOptions, TableMode
from tasks.batch.run_records import ORDER, OrderNumber, RunStart, load_start, order_path
from tasks.batch.run_request import RunRequest, make_request
from tasks.storage import Storage, open_storage, split_location
from tests.simulation.calls import attempt_apart, publish_run
from tests.simulation.data import CONTRACT, Source, ToyResolved, expected
from tests.simulation.delta import DeltaOracle
from tests.simulation.oracle import Oracle
from tests.simulation.scheduler import Process, Scheduler
from tests.simulation.storage import SimulatedStorage

_RUN = "overnight.run."
_RESUMES, _CHANGES, _CLOCKS = 0.4, 0.1, 0.3


class Bucket(SimulatedStorage):
    """A bucket whose objects are named by their addresses, as the metadata of a table names them."""

    def address(self, path: str) -> str:
        """Return the address of an object."""
        return f"{self.url}/{path}" if path else self.url


class Catalog(NoopCatalog):
    """A catalog of one table: a commit is done where the table is as it requires. A call may fail, also once done."""

    def __init__(self, scheduler: Scheduler, error: float) -> None:
        super().__init__("sim")
        self.metadata: TableMetadata | None = None
        self.error = error
        self._scheduler = scheduler

    def create_namespace_if_not_exists(self, *_given: Any) -> None:
        """Nothing to do."""

    def load_table(self, identifier: Any) -> Table:
        """Return the table as it is now."""
        self._step("load the table")
        if self.metadata is None:
            raise NoSuchTableError
        return Table(identifier, self.metadata, "", StorageIO(), self)

    def create_table(self, identifier: Any, schema: Any, location: str | None = None, *_more: Any) -> Table:  # type: ignore[override]  # what the product gives
        """Create the table, where there is none."""
        self._step("create the table")
        if self.metadata is not None:
            raise TableAlreadyExistsError
        self.metadata = new_table_metadata(
            self._convert_schema_if_needed(schema),
            UNPARTITIONED_PARTITION_SPEC,
            UNSORTED_SORT_ORDER,
            location or "",
            {},
        )
        return self.load_table(identifier)

    def commit_table(self, table: Table, requirements: Any, updates: Any) -> CommitTableResponse:
        """Change the table, where it is as required."""
        self._step("commit")
        assert self.metadata is not None
        for requirement in requirements:
            requirement.validate(self.metadata)
        self.metadata = update_table_metadata(self.metadata, updates)
        self._scheduler.tell(f"the table has {len(self.metadata.snapshots)} commits")
        if self._fails():
            raise CommitStateUnknownException
        self._scheduler.step("commit answers")
        return CommitTableResponse(metadata=self.metadata, metadata_location="")

    def _step(self, told: str) -> None:
        self._scheduler.step(f"catalog: {told}")
        if self._fails():
            raise ServiceUnavailableError

    def _fails(self) -> bool:
        return self._scheduler.chance.random() < self.error


class _Inline(Executor):
    """An executor without threads."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass
class IcebergOracle(DeltaOracle):
    """Holds the rows of the table against what was asked for."""

    kind: str = "Iceberg"

    def check_table(self, catalog: Catalog, storages: dict[str, Bucket], returned: str | None) -> None:
        """Check the table after a call, which has returned a run of a key or ended otherwise."""
        if catalog.metadata is None:
            return
        committed = [key for key in self.oracle.wanted if _RUN + key in catalog.metadata.properties]
        if returned is not None and returned not in committed:
            self._violate(f"a call returned run {returned}, but the table has no commit of it")
        if not committed:
            return
        table = pl.concat(_read_files(catalog.metadata, storages))
        if self.options.iceberg_mode == "append":
            self._check_appended(table, committed)
        else:
            self._check_replaced(table, committed, returned)


def _read_files(metadata: TableMetadata, storages: dict[str, Bucket]) -> Generator[pl.DataFrame]:
    """Yield the rows of each data file of a table, without a step of the simulation."""
    table = Table(("scores",), metadata, "", _QuietIO(storages), NoopCatalog("sim"))
    for file in iceberg_table._list_data_files(table):
        root, path = split_location(file.file_path)
        yield pl.read_parquet(storages[root].objects[path][0])


class _QuietIO(StorageIO):
    """Opens the copies of objects on the disk."""

    def __init__(self, storages: dict[str, Bucket]) -> None:
        super().__init__()
        self._roots = storages

    def _locate(self, location: str) -> tuple[Storage, str]:
        root, path = split_location(location)
        return open_storage(str(self._roots[root].root)), path


@dataclass(kw_only=True)
class FlowRun:
    """A flow run: the destination that it was called with, and whether it came to its end."""

    id: str
    destination: str


@dataclass(kw_only=True)
class IcebergWorld:
    """Two destinations, one table, and all that happens to them."""

    scheduler: Scheduler
    chance: random.Random
    source: Source
    destinations: dict[str, Bucket]
    mode: TableMode
    callers: int
    calls: int
    refusals: Counter[str] = field(default_factory=Counter)
    _ids: int = 0
    _began: dict[Process, int] = field(default_factory=dict)
    _unfinished: list[FlowRun] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = next(iter(self.destinations.values()))
        self.options = BatchOptions(
            key_columns=("id",),
            batch_size=4,
            rows_per_chunk=8,
            slots=1,
            memory_mb=1024,
            max_reject_fraction=1.0,
            output="iceberg",
            iceberg_table="sim.sales.scores",
            iceberg_mode=self.mode,
        )
        self.oracle = IcebergOracle(Oracle(first.root), self.options)
        self.catalog = Catalog(self.scheduler, first.weather.error)

    @property
    def violations(self) -> list[str]:
        """What must never be."""
        return self.oracle.oracle.violations

    def run(self) -> None:
        """Let callers call while things go wrong, then make each call that was left once more, on a calm day."""
        with self._take_place():
            self.source.write_some()
            first = next(iter(self.destinations.values()))
            for number in range(1, self.chance.randint(1, 4)):
                # It has had runs that went into no table, or another.
                first.write(order_path(number, ORDER), OrderNumber(run="other").model_dump_json().encode())
            for storage in self.destinations.values():
                storage.on_put = self._see_put
            self.scheduler.kill_rate = first.weather.kill
            names = [f"caller-{at}" for at in range(self.callers)]
            actors = [self.scheduler.spawn(Process(name), name, self._call_often) for name in names]
            for actor in actors:
                self.scheduler.join(actor).value()
            self.scheduler.kill_rate = self.catalog.error = 0.0
            for storage in self.destinations.values():
                storage.weather = storage.weather.without_faults()
            last = [self._new_flow_run(url) for url in self.destinations]
            for flow_run in [*self._unfinished, *last]:
                self._attempt_apart(flow_run)

    @contextmanager
    def _take_place(self) -> Generator[None]:
        """Have pyiceberg find the catalog, wait by the scheduler, and name its files by the seed."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(iceberg_table, "open_catalog", lambda _name: self.catalog))
            stack.enter_context(patch.object(iceberg_table, "time", self.scheduler))
            stack.enter_context(patch.object(iceberg_table, "random", self.chance))
            stack.enter_context(patch.object(ExecutorFactory, "get_or_create", _Inline))
            stack.enter_context(
                patch.object(uuid, "uuid4", lambda: uuid.UUID(int=self.chance.getrandbits(128), version=4))
            )
            yield

    def _see_put(self, path: str, is_late: bool) -> None:  # noqa: FBT001 - as the storage calls it
        if path.endswith("/plan.json"):
            began = float("-inf") if is_late else self._began.get(self.scheduler.process, float("-inf"))
            self.oracle.oracle.see_put(path, self.scheduler.steps, began)

    def _call_often(self) -> None:
        for _ in range(self.calls):
            resumes = self._unfinished and self.chance.random() < _RESUMES
            flow_run = self.chance.choice(self._unfinished) if resumes else self._new_flow_run()
            if not resumes:
                self._unfinished.append(flow_run)
            if self._attempt_apart(flow_run) and flow_run in self._unfinished:
                self._unfinished.remove(flow_run)
            if self.chance.random() < _CHANGES:
                self.source.change()

    def _new_flow_run(self, destination: str | None = None) -> FlowRun:
        self._ids += 1
        return FlowRun(id=f"flow-{self._ids}", destination=destination or self.chance.choice(list(self.destinations)))

    def _attempt_apart(self, flow_run: FlowRun) -> bool:
        process = Process(f"{flow_run.id}.{self.scheduler.steps}")
        if self.chance.random() < _CLOCKS:
            process.clock_error = timedelta(minutes=self.chance.uniform(-600, 600))
        self._began[process] = self.scheduler.steps
        actor = attempt_apart(self.scheduler, process, lambda: self._attempt(flow_run), self.refusals, self.violations)
        if actor.error is not None:
            self.oracle.check_table(self.catalog, self.destinations, None)
        return actor.error is None

    def _attempt(self, flow_run: FlowRun) -> None:
        storage = open_storage(flow_run.destination)
        request = load_start(storage, flow_run.id) or self._make_request(flow_run)
        manifest = publish_run(self.scheduler, request, storage, flow_run.id, self.options)
        self.scheduler.tell(f"{flow_run.id} returns run {manifest.run}")
        self.oracle.check_table(self.catalog, self.destinations, manifest.key)

    def _make_request(self, flow_run: FlowRun) -> RunRequest | RunStart:
        resolved: Any = ToyResolved(self.chance.randint(1, 4))
        request = make_request(resolved, CONTRACT, self.source.url, flow_run.destination, self.options)
        rows = {file.path: self.source.rows_of(file.entry) for file in request.snapshot.files}
        self.oracle.oracle.ask(request.key, expected(rows, resolved.version, self.options.key_columns))
        return request
