"""A table of Parquet parts as a sink. The parts are the checkpoint: each holds the next range of its partition.

A part is named by its partition and by the number that it begins at, and is created only once. Where two scorers write
a part of one name, the first succeeds, and the other continues after it. The next part begins after the highest number
of the last one, which its footer holds. So the table does not depend on a broker's acknowledgements.

Each commit is a manifest that lists every part so far, and readers take the newest: `open_predictions` sees the table
as of one commit. Shapes: N rows of a part, n rows of one group.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import RunDamaged, SourceChanged, StorageFault
from serving.model.contract import Contract, Frozen
from serving.model.encoding import Flags
from serving.model.interface import Engine, Predictions
from serving.model.pin import ModelPin
from tasks.batch.dataset import Snapshot, map_parallel
from tasks.batch.manifest import Manifest, ManifestPart, RejectCount
from tasks.batch.options import BatchOptions
from tasks.batch.part_digest import read_digests
from tasks.batch.parts import ChunkId, PartFooter, Reasons, encode_part, is_part_of, list_parts, parse_footer, part_path
from tasks.batch.plan import ROOT, Plan
from tasks.batch.publish import claim_order_number
from tasks.batch.run_records import load_plan, read_record, save_plan
from tasks.storage import Entry, Storage, check_create_only
from tasks.stream.message import Poison
from tasks.stream.options import ToParts
from tasks.stream.score import ScoredBatch, ScoredGroup

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


_PART_PATH = re.compile(r"/part-(\d+)-(\d+)")
# A reader that has listed an older manifest still finds it while newer ones are written.
_MANIFESTS_KEPT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A committed part: its footer, its keys, and the number that the next part of its partition begins at."""

    entry: Entry
    footer: PartFooter
    next_number: int
    keys: pa.Schema


class TableLog(Frozen):
    """The log that a table is made of: its identity, and the first number of each partition at that time."""

    identity: str
    first: dict[int, int]


class PartsSink:
    """One table below a destination. `next_numbers` holds the number that each partition continues at.

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
        self._parts: dict[ChunkId, _Part] = {}
        self._written: ChunkId | None = None
        self.next_numbers: dict[int, int] = {}
        self._read_parts()
        if last := max(self._parts, default=None, key=lambda chunk: chunk[1]):
            schema = self._parts[last].keys
            key_types |= {name: schema.field(name).type for name in plan.options.key_columns}
        self._commit()

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
            start = self.next_numbers.get(partition, 0)
            rows = rows.filter(rows.positions_N["number"] >= start)
            if not rows.rows:
                return
            path = part_path(self._plan, (partition, start))
            data = encode_part(self._plan, None, rows.keys, rows.predictions, rows.flags, self._plan.batch_size)
            if self._storage.put_new(path, data):
                self._written = partition, start
            # Whether this scorer or another one wrote it: its rows are left out in the next round.
            self._read_parts([(partition, start)])
            if (partition, start) not in self._parts:
                message = (
                    f"{self._storage.address(path)} must be readable once written, but is gone. Call again: the stream "
                    "continues after the last part that exists."
                )
                raise StorageFault(message)

    def _read_parts(self, known: Iterable[ChunkId] = ()) -> None:
        """Read the footers of new parts, and find where each partition ends.

        A listing may be out of date, so parts that are known to be written are looked up by name. The last part of a
        partition says what is scored next, so all of its bytes are read, unless this scorer wrote it.
        """
        found = list_parts(self._storage, self._plan)
        for chunk in known:
            if chunk not in found and (entry := self._storage.find(part_path(self._plan, chunk))) is not None:
                found[chunk] = entry
        read = {chunk: part.entry for chunk, part in self._parts.items()}
        if others := [entry.path for chunk, entry in found.items() if read.get(chunk, entry) != entry]:
            message = (
                f"{self._storage.address(others[0])} must be the part of table {self._plan.run} that this scorer has "
                "read, but is another by now: it was deleted, and written again. Call again: the stream continues "
                "after the parts that exist."
            )
            raise RunDamaged(message)
        new = [chunk for chunk in found if chunk not in self._parts]
        for chunk, part in zip(
            new, map_parallel(self._storage, lambda chunk: self._read_part(found[chunk]), new), strict=True
        ):
            self._parts[chunk] = part
        last: dict[int, ChunkId] = {}
        for partition, start in sorted(self._parts):
            end = self._parts[last[partition]].next_number if partition in last else 0
            if start != end:
                raise RunDamaged(self._describe_break(last.get(partition), end, (partition, start)))
            last[partition] = partition, start
        for partition, chunk in last.items():
            if chunk in new and chunk != self._written:
                self._check_bytes(found[chunk])
            self.next_numbers[partition] = self._parts[chunk].next_number

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

    def _read_part(self, entry: Entry) -> _Part:
        try:
            with self._storage.open_pinned(entry) as stream:
                file = pq.ParquetFile(stream)
                metadata, schema = file.metadata, file.schema_arrow
            column = schema.names.index(NUMBER)
            groups = [metadata.row_group(index).column(column) for index in range(metadata.num_row_groups)]
            highest = max(group.statistics.max for group in groups)
            part = _Part(entry=entry, footer=parse_footer(entry, metadata), next_number=int(highest) + 1, keys=schema)
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
        """Write a manifest of all parts, unless the newest lists them already, and delete old manifests."""
        while True:
            numbers = self._list_manifests()
            newest = read_record(self._storage, self._manifest_path(numbers[-1]), Manifest) if numbers else None
            if newest is not None and (others := self._find_unread(newest)):
                # Another scorer wrote them since the parts were listed. A newer manifest must list them too.
                self._read_parts(others)
            parts = [self._parts[chunk].footer for chunk in sorted(self._parts)]
            listed = tuple(ManifestPart(path=f.path, rows=f.rows, bytes=f.bytes, digest=f.digest) for f in parts)
            if not parts or (newest is not None and newest.parts == listed):
                return
            number = numbers[-1] + 1 if numbers else 1
            manifest = self._build_manifest(parts, listed, number, newest)
            if self._storage.put_new(self._manifest_path(number), manifest.model_dump_json().encode()):
                self._storage.delete([self._manifest_path(old) for old in numbers[: 1 - _MANIFESTS_KEPT]])
                return
            self._read_parts()

    def _find_unread(self, manifest: Manifest) -> list[ChunkId]:
        """Return the parts of a manifest that this scorer has not read."""
        read = {part.footer.path for part in self._parts.values()}
        names = (_PART_PATH.search(part.path) for part in manifest.parts if part.path not in read)
        return [(int(name[1]), int(name[2])) for name in names if name]

    def _build_manifest(
        self, footers: Sequence[PartFooter], listed: tuple[ManifestPart, ...], number: int, newest: Manifest | None
    ) -> Manifest:
        rejects: Reasons = sum((footer.rejects for footer in footers), Counter())
        now = datetime.now(UTC)
        # Readers take the latest manifest: it is this one, even if an earlier machine had a clock ahead of ours.
        planned_at = max(now, newest.planned_at + timedelta(microseconds=1)) if newest else now
        return Manifest(
            key=self._plan.key,
            run=f"{self._plan.run}-{number:08d}",
            # A plan that was deleted and made again has another number: the order of a table never decreases.
            order=max(self._plan.order, newest.order if newest else 0),
            commit=number,
            planned_at=planned_at,
            model=self._plan.model,
            source=self._plan.source.root,
            output="parquet",
            rows=sum(footer.rows for footer in footers),
            rejects=tuple(
                RejectCount(column=column, reason=reason, rows=rows)
                for (column, reason), rows in sorted(rejects.items())
            ),
            rows_key_null=sum(footer.rows_key_null for footer in footers),
            parts=listed,
        )

    def _list_manifests(self) -> list[int]:
        pattern = re.compile(rf"{ROOT}/{re.escape(self._plan.run)}-(\d{{8}})/manifest\.json")
        found = (pattern.fullmatch(entry.path) for entry in self._storage.entries(ROOT, depth=2))
        return sorted(int(match[1]) for match in found if match)

    def _manifest_path(self, number: int) -> str:
        return f"{ROOT}/{self._plan.run}-{number:08d}/manifest.json"


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
