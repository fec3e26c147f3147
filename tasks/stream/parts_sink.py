"""A table of Parquet parts as a sink: the parts are the checkpoint, each a range of the log, one behind the other.

A part is named by the partition and the number that it begins at, and is created once: of two scorers that begin at
one number, one has its part there, and the other goes on behind it. The next part begins behind the highest number in
the last, which its footer tells. So nothing of a broker's acknowledgements decides what is in the table.

Each commit is a manifest of its own that lists every part so far, and readers go by the newest: open_predictions
sees the table as of some commit. Shapes: N rows.
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
from serving.model.registry import ModelPin
from tasks.batch.dataset import Snapshot, map_parallel
from tasks.batch.manifest import Manifest, ManifestPart, RejectCount
from tasks.batch.options import BatchOptions
from tasks.batch.parts import ChunkId, PartFooter, Reasons, encode_part, is_part_of, list_parts, parse_footer, part_path
from tasks.batch.plan import ROOT, Plan, load_plan, read_record, save_plan
from tasks.batch.publish import claim_order_number
from tasks.storage import Entry, Storage, check_create_only
from tasks.stream.message import Poison
from tasks.stream.options import ToParts
from tasks.stream.score import Scored, ScoredGroup

PARTITION, NUMBER, ROW = "source_partition", "source_number", "source_row"

_PLACE = np.dtype([("partition", np.int64), ("number", np.int64), ("row", np.int64)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRows:
    """N rows on their way into a part; `keys` are the user's, with the place of each row before them."""

    places_N: npt.NDArray[np.void]
    user_keys: pa.Table
    predictions: Predictions
    flags: Flags

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.places_N)

    @property
    def keys(self) -> pa.Table:
        """The places and the user's keys, as a part has them."""
        columns = {
            name: pa.array(self.places_N[field])
            for name, field in zip((PARTITION, NUMBER, ROW), ("partition", "number", "row"), strict=True)
        }
        return pa.table(columns | dict(zip(self.user_keys.column_names, self.user_keys.columns, strict=True)))

    def where(self, mask_N: npt.NDArray[np.bool_]) -> PlacedRows:
        """Return the rows of a mask."""
        return self if mask_N.all() else self._take(np.flatnonzero(mask_N))

    def in_order(self) -> PlacedRows:
        """Return the rows in the order of their places."""
        order_N = np.argsort(self.places_N, kind="stable", order=["partition", "number", "row"])
        return self if (order_N[1:] > order_N[:-1]).all() else self._take(order_N)

    def cast(self, types: Mapping[str, pa.DataType]) -> PlacedRows:
        """Return the rows with their keys in these types."""
        columns = {name: self.user_keys.column(name).cast(kind) for name, kind in types.items()}
        return replace(self, user_keys=pa.table(columns) if columns else self.user_keys)

    def _take(self, at: npt.NDArray[np.int64]) -> PlacedRows:
        return PlacedRows(
            places_N=self.places_N[at],
            user_keys=self.user_keys.take(pa.array(at)) if self.user_keys.num_columns else self.user_keys,
            predictions={name: value[at] for name, value in self.predictions.items()},
            flags=Flags(self.flags.code_N[at], list(self.flags.reasons)),
        )


def group_rows(scored: ScoredGroup, key_columns: Sequence[str]) -> PlacedRows:
    """Return the rows of a group of messages; row r of a message is its r-th."""
    rows_n = scored.rows
    places = np.empty(int(rows_n.sum()), dtype=_PLACE)
    places["partition"] = np.repeat([message.place.partition for message in scored.group.messages], rows_n)
    places["number"] = np.repeat([message.place.number for message in scored.group.messages], rows_n)
    places["row"] = np.arange(len(places)) - np.repeat(scored.group.edges[:-1], rows_n)
    keys = scored.group.table.select(list(key_columns))
    return PlacedRows(places_N=places, user_keys=keys, predictions=scored.predictions, flags=scored.flags)


def unread_rows(unread: Sequence[Poison], types: Mapping[str, pa.DataType], contract: Contract) -> PlacedRows:
    """Return one row for each message that could not be read: no keys, no predictions, and the reason."""
    places = np.array([(*poison.message.place, 0) for poison in unread], dtype=_PLACE)
    flags = Flags.all_good(len(unread))
    for at, poison in enumerate(unread):
        flags.mark_row(at, poison.column, poison.reason)
    nothing = {
        output.name: np.full(
            (len(unread), *output.shape),
            None if output.dtype == "str" else 0,
            dtype=object if output.dtype == "str" else output.dtype,
        )
        for output in contract.outputs
    }
    keys = pa.table({name: pa.nulls(len(unread), kind) for name, kind in types.items()})
    return PlacedRows(places_N=places, user_keys=keys, predictions=nothing, flags=flags)


def join_rows(pieces: Sequence[PlacedRows]) -> PlacedRows:
    """Return several pieces, whose keys have the same types, as one."""
    return PlacedRows(
        places_N=np.concatenate([piece.places_N for piece in pieces]),
        user_keys=pa.concat_tables([piece.user_keys for piece in pieces]),
        predictions={
            name: np.concatenate([piece.predictions[name] for piece in pieces]) for name in pieces[0].predictions
        },
        flags=Flags.concat([piece.flags for piece in pieces]),
    )


_PART = re.compile(r"/part-(\d+)-(\d+)")
# The newest may be read while the next is written; whoever has listed the one before still finds it.
_MANIFESTS_KEPT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part that stands: what its footer says, and the number that the next one of its partition begins at."""

    entry: Entry
    footer: PartFooter
    next: int
    keys: pa.Schema


class TableLog(Frozen):
    """The log that a table is made of: its identity, and where each partition began when the table did."""

    identity: str
    first: dict[int, int]


class PartsSink:
    """One table below a destination. `positions` holds the number that each partition is to be read from.

    `confirm` is called before rows are written, and raises where the log is no longer the one that they came from.
    """

    def __init__(self, storage: Storage, plan: Plan, model: ModelPin, key_types: dict[str, pa.DataType]) -> None:
        self.confirm: Callable[[], None] = lambda: None
        self._storage = storage
        check_create_only(storage)
        if load_plan(storage, plan.run) is None:
            plan = plan.model_copy(update={"order": claim_order_number(storage, plan.run)})
        self._plan = save_plan(storage, plan).model_copy(update={"model": model, "contract": plan.contract})
        self._key_types = key_types
        self._parts: dict[ChunkId, _Part] = {}
        self.positions: dict[int, int] = {}
        self._read_chain()
        if last := max(self._parts, default=None, key=lambda at: at[1]):
            schema = self._parts[last].keys
            key_types |= {name: schema.field(name).type for name in plan.options.key_columns}
        self._commit()

    def begin(self, identity: str, reach: Callable[[], dict[int, int]]) -> dict[int, int]:
        """Return where to read each partition from: behind its last part, or where it began when the table did.

        `reach` tells where the partitions begin now, which is kept when the table is first opened. A partition that is
        in neither was added since, and is read from its beginning.
        """
        path = log_path(self._plan.run)
        if (log := read_record(self._storage, path, TableLog)) is None:
            made = TableLog(identity=identity, first=reach())
            self._storage.put_new(path, made.model_dump_json().encode())
            log = read_record(self._storage, path, TableLog) or made
        return log.first | {partition: start for partition, start in self.positions.items() if start}

    def emit(self, scored: Sequence[Scored]) -> list[Poison]:
        """Write the rows of micro-batches as one part a partition, then commit; every message has a row."""
        if not any(each.messages for each in scored):
            return []
        self.confirm()
        rows = self._rows(scored)
        for partition in np.unique(rows.places_N["partition"]).tolist():
            self._write(partition, rows.where(rows.places_N["partition"] == partition))
        self._commit()
        return []

    def _write(self, partition: int, rows: PlacedRows) -> None:
        """Write rows behind the last part of their partition; what another scorer has written meanwhile is left out."""
        while True:
            start = self.positions.get(partition, 0)
            rows = rows.where(rows.places_N["number"] >= start)
            if not rows.rows:
                return
            path = part_path(self._plan, (partition, start))
            data = encode_part(self._plan, None, rows.keys, rows.predictions, rows.flags, self._plan.batch_size)
            self._storage.put_new(path, data)
            # Whoever wrote it: what it holds is left out in the next round.
            self._read_chain([(partition, start)])
            if (partition, start) not in self._parts:
                message = (
                    f"{self._storage.address(path)} must be readable once written, but is gone. Call again: the stream "
                    "goes on behind the last part that stands."
                )
                raise StorageFault(message)

    def _read_chain(self, known: Iterable[ChunkId] = ()) -> None:
        """Read the footers of parts that are not read yet, and follow each partition to its end.

        A listing may lag behind: those that are known to have been written are looked for by name.
        """
        found = list_parts(self._storage, self._plan)
        for at in known:
            if at not in found and (entry := self._storage.find(part_path(self._plan, at))) is not None:
                found[at] = entry
        read = {at: part.entry for at, part in self._parts.items()}
        if others := [entry.path for at, entry in found.items() if read.get(at, entry) != entry]:
            message = (
                f"{self._storage.address(others[0])} must be the part of table {self._plan.run} that this scorer has "
                "read, but is another by now: it was deleted, and written again. Call again: the stream goes on behind "
                "the parts that stand."
            )
            raise RunDamaged(message)
        new = [at for at in found if at not in self._parts]
        for at, part in zip(new, map_parallel(self._storage, lambda at: self._read(found[at]), new), strict=True):
            self._parts[at] = part
        for partition in {partition for partition, _ in self._parts}:
            end = self.positions.get(partition, 0)
            while (standing := self._parts.get((partition, end))) is not None:
                end = standing.next
            self.positions[partition] = end
            if stray := sorted(start for p, start in self._parts if p == partition and start >= end):
                message = (
                    f"The parts of table {self._plan.run} must follow one another without a gap, got none that begins "
                    f"at {end} of partition {partition}, but one at {stray[0]}. Put back what was deleted, or begin "
                    "another table."
                )
                raise RunDamaged(message)

    def _read(self, entry: Entry) -> _Part:
        try:
            with self._storage.open_pinned(entry) as stream:
                file = pq.ParquetFile(stream)
                metadata, schema = file.metadata, file.schema_arrow
            column = schema.names.index(NUMBER)
            groups = [metadata.row_group(at).column(column) for at in range(metadata.num_row_groups)]
            highest = max(group.statistics.max for group in groups)
            part = _Part(entry=entry, footer=parse_footer(entry, metadata), next=int(highest) + 1, keys=schema)
        except (pa.ArrowException, OSError, ValueError, KeyError, SourceChanged) as error:
            message = (
                f"{self._storage.address(entry.path)} must be a part of table {self._plan.run} that can be read, got: "
                f"{error}. Put it back as it was, for without it the stream can't tell where to go on. Or choose "
                "another name for the table."
            )
            raise RunDamaged(message) from error
        if not is_part_of(metadata, self._plan, None):
            message = (
                f"{self._storage.address(entry.path)} must be a part of table {self._plan.run} as it is planned, got "
                "one of another table of that name, whose records below _overnight were deleted. Choose another name "
                f"for the table, or delete run={self._plan.run} below the destination first."
            )
            raise RunDamaged(message)
        return part

    def _rows(self, scored: Sequence[Scored]) -> PlacedRows:
        pieces = [group_rows(group, self._plan.options.key_columns) for each in scored for group in each.groups]
        unread = [poison for each in scored for poison in each.unread]
        types = {name: self._key_types.setdefault(name, pa.string()) for name in self._plan.options.key_columns}
        if unread:
            pieces.append(unread_rows(unread, types, self._plan.contract))
        return join_rows([piece.cast(types) for piece in pieces]).in_order()

    def _commit(self) -> None:
        """Write a manifest of all parts, unless the newest says the same; older ones are deleted in the end."""
        while True:
            numbers = self._manifests()
            newest = read_record(self._storage, self._manifest(numbers[-1]), Manifest) if numbers else None
            if newest is not None and (others := self._unread(newest)):
                # Another scorer wrote them since the parts were listed: the table never goes back behind them.
                self._read_chain(others)
            parts = [self._parts[at].footer for at in sorted(self._parts)]
            listed = tuple(ManifestPart(path=f.path, rows=f.rows, bytes=f.bytes) for f in parts)
            if not parts or (newest is not None and newest.parts == listed):
                return
            number = numbers[-1] + 1 if numbers else 1
            manifest = self._manifest_of(parts, listed, number, newest)
            if self._storage.put_new(self._manifest(number), manifest.model_dump_json().encode()):
                self._storage.delete([self._manifest(old) for old in numbers[: 1 - _MANIFESTS_KEPT]])
                return
            self._read_chain()

    def _unread(self, manifest: Manifest) -> list[ChunkId]:
        """Return the parts of a manifest that were not read yet."""
        read = {part.footer.path for part in self._parts.values()}
        names = (_PART.search(part.path) for part in manifest.parts if part.path not in read)
        return [(int(name[1]), int(name[2])) for name in names if name]

    def _manifest_of(
        self, footers: Sequence[PartFooter], listed: tuple[ManifestPart, ...], number: int, newest: Manifest | None
    ) -> Manifest:
        rejects: Reasons = sum((footer.rejects for footer in footers), Counter())
        now = datetime.now(UTC)
        # Readers take the latest: that is this one, whatever the clock of the machine before said.
        at = max(now, newest.planned_at + timedelta(microseconds=1)) if newest else now
        return Manifest(
            key=self._plan.key,
            run=f"{self._plan.run}-{number:08d}",
            # A scorer whose plan was deleted and planned again meanwhile has another number: a table never goes back.
            order=max(self._plan.order, newest.order if newest else 0),
            commit=number,
            planned_at=at,
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

    def _manifests(self) -> list[int]:
        pattern = re.compile(rf"{ROOT}/{re.escape(self._plan.run)}-(\d{{8}})/manifest\.json")
        found = (pattern.fullmatch(entry.path) for entry in self._storage.entries(ROOT, depth=2))
        return sorted(int(match[1]) for match in found if match)

    def _manifest(self, number: int) -> str:
        return f"{ROOT}/{self._plan.run}-{number:08d}/manifest.json"


def log_path(run: str) -> str:
    """Return where a table keeps what it says of its log."""
    return f"{ROOT}/{run}/log.json"


def table_plan(address: ToParts, identity: str, *, model: ModelPin, contract: Contract, keys: tuple[str, ...]) -> Plan:
    """Return what ties a table to one stream: its identity, the keys and the outputs, whichever version scores it."""
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
