"""A table of Parquet parts as a sink. The parts are the checkpoint: each holds the next range of its partition.

A part is named by its partition and by the number that it begins at, and is created only once. Where two scorers write
a part of one name, the first succeeds, and the other continues after it. The next part begins after the highest number
of the last one, which its footer holds. So the table does not depend on a broker's acknowledgements.

Each commit is a manifest (`table_commits`), and readers take the newest: `open_predictions` sees the table as of one
commit. Parts are listed when a table is opened; from then on they are found by their names. Shapes: N rows of a part, n
rows of one group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import DestinationUnusable, RunDamaged, SourceChanged, StorageFault
from serving.model.contract import Contract, Frozen
from serving.model.encoding import Flags
from serving.model.interface import Engine, Predictions
from serving.model.pin import ModelPin
from tasks.batch.dataset import Snapshot, map_parallel
from tasks.batch.manifest import Manifest, read_part_lists
from tasks.batch.options import BatchOptions
from tasks.batch.part_digest import read_digests
from tasks.batch.part_footer import is_part_of, parse_footer
from tasks.batch.parts import ChunkId, encode_part, list_parts, part_path
from tasks.batch.plan import ROOT, Plan
from tasks.batch.publish import claim_order_number
from tasks.batch.run_records import load_plan, read_record, save_plan
from tasks.storage import Entry, Storage, check_create_only
from tasks.stream.message import Poison
from tasks.stream.options import ToParts
from tasks.stream.score import ScoredBatch, ScoredGroup
from tasks.stream.table_commits import TableCommits, TablePart

PARTITION, NUMBER, ROW = "source_partition", "source_number", "source_row"

_POSITION = np.dtype([("partition", np.int64), ("number", np.int64), ("row", np.int64)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRows:
    """N rows of a part: their positions in the log, the user's key columns, predictions and flags."""

    positions_N: npt.NDArray[np.void]
    user_keys: pa.Table
    predictions: Predictions
    flags: Flags

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.positions_N)

    @property
    def keys(self) -> pa.Table:
        """The key columns of a part: the position of each row, then the user's keys."""
        columns = {
            name: pa.array(self.positions_N[field])
            for name, field in zip((PARTITION, NUMBER, ROW), ("partition", "number", "row"), strict=True)
        }
        return pa.table(columns | dict(zip(self.user_keys.column_names, self.user_keys.columns, strict=True)))

    def filter(self, mask_N: npt.NDArray[np.bool_]) -> PartRows:
        """Return the rows where the mask is true."""
        return self if mask_N.all() else self._take(np.flatnonzero(mask_N))

    def sort(self) -> PartRows:
        """Return the rows in the order of their positions."""
        order_N = np.argsort(self.positions_N, kind="stable", order=["partition", "number", "row"])
        return self if (order_N[1:] > order_N[:-1]).all() else self._take(order_N)

    def cast_keys(self, types: Mapping[str, pa.DataType]) -> PartRows:
        """Return the rows with their keys cast to these types."""
        columns = {name: self.user_keys.column(name).cast(kind) for name, kind in types.items()}
        return replace(self, user_keys=pa.table(columns) if columns else self.user_keys)

    def _take(self, rows_n: npt.NDArray[np.int64]) -> PartRows:
        return PartRows(
            positions_N=self.positions_N[rows_n],
            user_keys=self.user_keys.take(pa.array(rows_n)) if self.user_keys.num_columns else self.user_keys,
            predictions={name: value[rows_n] for name, value in self.predictions.items()},
            flags=Flags(self.flags.code_N[rows_n], list(self.flags.reasons)),
        )


def build_rows(scored: ScoredGroup, key_columns: Sequence[str]) -> PartRows:
    """Return the rows of a group of messages, numbered from 0 in each message."""
    rows_n = scored.rows
    positions_N = np.empty(int(rows_n.sum()), dtype=_POSITION)
    positions_N["partition"] = np.repeat([message.position.partition for message in scored.group.messages], rows_n)
    positions_N["number"] = np.repeat([message.position.number for message in scored.group.messages], rows_n)
    positions_N["row"] = np.arange(len(positions_N)) - np.repeat(scored.group.row_offsets[:-1], rows_n)
    keys = scored.group.table.select(list(key_columns))
    return PartRows(positions_N=positions_N, user_keys=keys, predictions=scored.predictions, flags=scored.flags)


def build_unreadable_rows(
    unreadable: Sequence[Poison], types: Mapping[str, pa.DataType], contract: Contract
) -> PartRows:
    """Return one row for each unreadable message: no keys, no predictions, and the reason."""
    positions_N = np.array([(*poison.message.position, 0) for poison in unreadable], dtype=_POSITION)
    flags = Flags.all_good(len(unreadable))
    for row, poison in enumerate(unreadable):
        flags.mark_row(row, poison.column, poison.reason)
    empty = {output.name: output.make_empty(len(unreadable)) for output in contract.outputs}
    keys = pa.table({name: pa.nulls(len(unreadable), kind) for name, kind in types.items()})
    return PartRows(positions_N=positions_N, user_keys=keys, predictions=empty, flags=flags)


def join_rows(pieces: Sequence[PartRows]) -> PartRows:
    """Return several pieces as one; the types of their keys must be equal."""
    return PartRows(
        positions_N=np.concatenate([piece.positions_N for piece in pieces]),
        user_keys=pa.concat_tables([piece.user_keys for piece in pieces]),
        predictions={
            name: np.concatenate([piece.predictions[name] for piece in pieces]) for name in pieces[0].predictions
        },
        flags=Flags.concat([piece.flags for piece in pieces]),
    )


class TableLog(Frozen):
    """The log that a table is made of: its identity, and the first number of each partition at that time."""

    identity: str
    first: dict[int, int]


class PartsSink:
    """One table below a destination.

    `check_source` is called before rows are written, and raises where the log is not the one that they came from.
    """

    def __init__(self, storage: Storage, plan: Plan, model: ModelPin, key_types: dict[str, pa.DataType]) -> None:
        self.check_source: Callable[[], None] = lambda: None
        self._storage = storage
        check_create_only(storage)
        if load_plan(storage, plan.run) is None:
            plan = plan.model_copy(update={"order": claim_order_number(storage, plan.run)})
        self._plan = save_plan(storage, plan).model_copy(update={"model": model, "contract": plan.contract})
        self._key_types = key_types
        self._commits = TableCommits(storage, self._plan)
        # The parts that no commit is known to have, and the last part of each partition.
        self._new: dict[ChunkId, TablePart] = {}
        self._last: dict[int, TablePart] = {}
        # A manifest that no other goes on from: it lists other parts than there are, or is of an earlier release.
        self._unfit: Manifest | None = None
        self._written: ChunkId | None = None
        self._read_parts()
        if last := max(self._last.values(), default=None, key=lambda part: part.next_number):
            key_types |= {name: last.keys.field(name).type for name in plan.options.key_columns}
        self._commit()

    @property
    def next_numbers(self) -> dict[int, int]:
        """The number that each partition continues at."""
        return {partition: part.next_number for partition, part in self._last.items()}

    def find_start(self, identity: str, find_first: Callable[[], dict[int, int]]) -> dict[int, int]:
        """Return the number to read each partition from: after its last part, or the first when the table was new.

        A partition without a number was added since, and is read from its beginning.

        Args:
            identity: What tells the log from any other; kept with the table when it is first opened.
            find_first: Returns the first number of each partition now; kept likewise.
        """
        path = log_path(self._plan.run)
        if (log := read_record(self._storage, path, TableLog)) is None:
            made = TableLog(identity=identity, first=find_first())
            self._storage.put_new(path, made.model_dump_json().encode())
            log = read_record(self._storage, path, TableLog) or made
        return log.first | {partition: start for partition, start in self.next_numbers.items() if start}

    def emit(self, scored: Sequence[ScoredBatch]) -> list[Poison]:
        """Write the rows of micro-batches as one part per partition, then commit. Every message has a row."""
        if not any(each.messages for each in scored):
            return []
        self.check_source()
        rows = self._build_rows(scored)
        for partition in np.unique(rows.positions_N["partition"]).tolist():
            self._write_part(partition, rows.filter(rows.positions_N["partition"] == partition))
        self._commit()
        return []

    def _write_part(self, partition: int, rows: PartRows) -> None:
        """Write rows after the last part of their partition, except those that another scorer has written since."""
        while True:
            start = self._find_end(partition)
            rows = rows.filter(rows.positions_N["number"] >= start)
            if not rows.rows:
                return
            path = part_path(self._plan, (partition, start))
            data = encode_part(self._plan, None, rows.keys, rows.predictions, rows.flags, self._plan.batch_size)
            if self._storage.put_new(path, data):
                self._written = partition, start
            entry = self._storage.find(path)
            if entry is None:
                message = (
                    f"{self._storage.address(path)} must be readable once written, but is gone. Call again: the stream "
                    "continues after the last part that exists."
                )
                raise StorageFault(message)
            if (last := self._last.get(partition)) is not None:
                self._check_same(last, self._storage.find(last.entry.path))
            # Whether this scorer or another one wrote it: its rows are left out in the next round.
            self._new[partition, start] = self._last[partition] = self._read_part(entry)
            if self._written != (partition, start):
                self._check_bytes(entry)

    def _find_end(self, partition: int) -> int:
        return self._last[partition].next_number if partition in self._last else 0

    def _read_parts(self) -> None:
        """Read the footers of the parts that the newest manifest does not list, and find where each partition ends.

        Where that lists others than there are, or is of an earlier release, the footers of all parts are read. The last
        part of a partition says what is scored next, so all of its bytes are read, unless this scorer wrote it.
        """
        newest = self._commits.read_newest()
        found = list_parts(self._storage, self._plan)
        paths = {entry.path: entry for entry in found.values()}
        for part in self._last.values():
            self._check_same(part, paths.get(part.entry.path))
        lasts = self._read_listed(newest, found)
        self._unfit = None if lasts else newest
        new = sorted(chunk for chunk in found if chunk[0] not in lasts or chunk[1] >= lasts[chunk[0]].next_number)
        self._new = dict(zip(new, self._read_all([found[chunk] for chunk in new]), strict=True))
        self._last = lasts
        at: dict[int, ChunkId] = {}
        for chunk in new:
            partition, start = chunk
            end = self._find_end(partition)
            if start != end:
                raise RunDamaged(self._describe_break(at.get(partition), end, chunk))
            self._last[partition], at[partition] = self._new[chunk], chunk
        for part in self._last.values():
            if self._written is None or part.entry.path != part_path(self._plan, self._written):
                self._check_bytes(part.entry)

    def _read_listed(self, newest: Manifest | None, found: Mapping[ChunkId, Entry]) -> dict[int, TablePart]:
        """Return the last part that a manifest lists of each partition, none where it lists others than there are."""
        ends = newest.ends if newest else {}
        before = {e.path: e.size for (at, start), e in found.items() if at in ends and start < ends[at].next}
        try:
            listed = read_part_lists(self._storage, newest).parts if newest else ()
        except DestinationUnusable:
            return {}
        lasts = [found.get((partition, end.last)) for partition, end in ends.items()]
        known = [entry for entry in lasts if entry is not None]
        if before != {part.path: part.bytes for part in listed} or len(known) < len(lasts):
            return {}
        read = dict(zip(ends, self._read_all(known), strict=True))
        return read if all(part.next_number == ends[at].next for at, part in read.items()) else {}

    def _read_all(self, entries: Sequence[Entry]) -> list[TablePart]:
        return map_parallel(self._storage, self._read_part, entries)

    def _check_same(self, part: TablePart, found: Entry | None) -> None:
        """Raise RunDamaged where a part that this scorer has read is gone, or another by now."""
        if found != part.entry:
            then = (
                "gone. Put it back, then call again."
                if found is None
                else "another by now: it was deleted, and written again. Call again: the stream continues after the "
                "parts that exist."
            )
            message = (
                f"{self._storage.address(part.entry.path)} must be the part of table {self._plan.run} that this scorer "
                f"has read, but is {then}"
            )
            raise RunDamaged(message)

    def _describe_break(self, last: ChunkId | None, end: int, found: ChunkId) -> str:
        """Say what must hold where a part does not begin where the one before it, if there is one, ends."""
        must = f"The parts of table {self._plan.run} must follow one another"
        if last is None or found[1] > end:
            return (
                f"{must} without a gap, got none that begins at {end} of partition {found[0]}, but one at {found[1]}. "
                "Put back what was deleted, or begin another table."
            )
        path, before = (self._storage.address(part_path(self._plan, chunk)) for chunk in (found, last))
        return (
            f"{must}, but {path} begins at message {found[1]} of partition {found[0]}, within {before}, which has "
            f"messages up to {end - 1}: that was deleted, and written again, while a stream went on. Delete "
            f"{path}: messages that no other part has are scored again."
        )

    def _read_part(self, entry: Entry) -> TablePart:
        try:
            with self._storage.open_pinned(entry) as stream:
                file = pq.ParquetFile(stream)
                metadata, schema = file.metadata, file.schema_arrow
            column = schema.names.index(NUMBER)
            groups = [metadata.row_group(index).column(column) for index in range(metadata.num_row_groups)]
            highest = max(group.statistics.max for group in groups)
            part = TablePart(
                entry=entry, footer=parse_footer(entry, metadata), next_number=int(highest) + 1, keys=schema
            )
        except (pa.ArrowException, OSError, ValueError, KeyError, SourceChanged) as error:
            raise RunDamaged(self._describe_unreadable(entry, str(error))) from error
        if not is_part_of(metadata, self._plan, None):
            message = (
                f"{self._storage.address(entry.path)} must be a part of table {self._plan.run} as it is planned, got "
                "one of another table of that name, whose records below _overnight were deleted. Choose another name "
                f"for the table, or delete run={self._plan.run} below the destination first."
            )
            raise RunDamaged(message)
        return part

    def _check_bytes(self, entry: Entry) -> None:
        """Hold the bytes of a part against the digest that it bears. Raises RunDamaged."""
        try:
            with self._storage.open_pinned(entry) as stream:
                borne, found = read_digests(stream.read())
        except (OSError, SourceChanged) as error:
            raise RunDamaged(self._describe_unreadable(entry, str(error))) from error
        if borne != found:
            got = f"bytes of digest {found[:12]} where {borne[:12]} was written"
            raise RunDamaged(self._describe_unreadable(entry, got))

    def _describe_unreadable(self, entry: Entry, got: str) -> str:
        return (
            f"{self._storage.address(entry.path)} must be a part of table {self._plan.run} that can be read, got: "
            f"{got}. Without it the stream can't know where to continue: put it back as it was, or choose "
            "another name for the table."
        )

    def _build_rows(self, scored: Sequence[ScoredBatch]) -> PartRows:
        pieces = [build_rows(group, self._plan.options.key_columns) for each in scored for group in each.groups]
        unreadable = [poison for each in scored for poison in each.unreadable]
        types = {name: self._key_types.setdefault(name, pa.string()) for name in self._plan.options.key_columns}
        if unreadable:
            pieces.append(build_unreadable_rows(unreadable, types, self._plan.contract))
        return join_rows([piece.cast_keys(types) for piece in pieces]).sort()

    def _commit(self) -> None:
        """Write manifests until the newest has all parts that this scorer knows of, then delete old ones.

        One that was written is not always the newest: its number is free again once another scorer has deleted it.
        """
        while True:
            newest = self._commits.read_newest()
            base = None if newest == self._unfit else newest
            lacking = self._list_lacking(base) if self._take_others(base) else None
            if lacking is None:
                self._read_parts()
            elif lacking:
                self._commits.put(newest, base, lacking)
            else:
                break
        self._new = {}
        self._commits.delete_old()

    def _take_others(self, base: Manifest | None) -> bool:
        """Continue each partition after the parts of other scorers; return whether those are as a manifest has them."""
        for partition, end in base.ends.items() if base else ():
            if end.next > self._find_end(partition):
                entry = self._storage.find(part_path(self._plan, (partition, end.last)))
                part = None if entry is None else self._read_part(entry)
                if part is None or part.next_number != end.next:
                    return False
                self._last[partition] = part
        return True

    def _list_lacking(self, base: Manifest | None) -> dict[ChunkId, TablePart] | None:
        """Return the parts that a manifest lacks, in order; None where it lacks more than this scorer knows of."""
        numbers = {partition: end.next for partition, end in base.ends.items()} if base else {}
        lacking = {chunk: part for chunk, part in sorted(self._new.items()) if chunk[1] >= numbers.get(chunk[0], 0)}
        for (partition, start), part in lacking.items():
            if start == numbers.get(partition, 0):
                numbers[partition] = part.next_number
        return lacking if numbers == self.next_numbers else None


def log_path(run: str) -> str:
    """Return the path of a table's TableLog."""
    return f"{ROOT}/{run}/log.json"


def build_table_plan(
    address: ToParts, identity: str, *, model: ModelPin, contract: Contract, keys: tuple[str, ...]
) -> Plan:
    """Return the plan that ties a table to one log, its keys and outputs; any version of the model may score it."""
    outputs = "\n".join(output.model_dump_json() for output in contract.outputs)
    key = hashlib.sha256(f"{identity}\n{keys}\n{outputs}".encode()).hexdigest()[:32]
    log = Snapshot(root=identity, format="stream", files=())
    return Plan(
        key=key,
        run=address.name,
        planned_at=datetime.now(UTC),
        model=model,
        contract=contract,
        options=BatchOptions(key_columns=keys, name=address.name),
        source=log,
        snapshot=log,
        columns=keys,
        partitions={},
        batch_size=0,
        batch_unit="rows",
        engine=Engine(),
        tuning=None,
        row_bytes=0.0,
        rows=0,
        shards=(),
    )
