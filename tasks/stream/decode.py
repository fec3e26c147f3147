"""From messages to rows: JSON rows and Arrow IPC become tables of what the model reads, or poison with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl
import pyarrow as pa

from serving.errors import SchemaMismatch
from serving.model.contract import Contract
from tasks.batch.json_lines import NotJsonLines, Number, parse_lines, read_object, written_values
from tasks.stream.message import Message, Poison

ROWS_MAX = 1 << 20
_BYTES_MAX = 256 << 20
_ARROW = b"\xff\xff\xff\xff"
_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Messages whose rows make one table: message i has rows [edges[i], edges[i + 1]).

    `rows` holds the rows as they were in JSON, where they were.
    """

    messages: tuple[Message, ...]
    edges: npt.NDArray[np.int64]
    table: pa.Table
    rows: tuple[dict[str, Any], ...] | None

    def halves(self) -> tuple[Group, Group]:
        """Return the first half of the messages and the others; there must be two at least."""
        middle = len(self.messages) // 2
        return self._part(0, middle), self._part(middle, len(self.messages))

    def _part(self, start: int, stop: int) -> Group:
        first, behind = int(self.edges[start]), int(self.edges[stop])
        return Group(
            messages=self.messages[start:stop],
            edges=self.edges[start : stop + 1] - first,
            table=self.table.slice(first, behind - first),
            rows=self.rows[start:stop] if self.rows is not None else None,
        )


class Reason(StrEnum):
    """Why a message can't be read: few, since tables and metrics count them."""

    NOT_JSON = "JSON that does not parse"
    NOT_AN_OBJECT = "JSON that is not one object"
    NOT_A_ROW = "JSON whose values are none of a table"
    NOT_ARROW = "Arrow IPC that does not read"
    SIZE = "an Arrow message of a size that is not taken"
    UNFIT = "columns that do not fit the model"
    KEY_MISSING = "a key column that is missing"
    KEY_NOT_ONCE = "a key column that is not there once"
    KEY_CHANGES = "a key column that changes its type"


class Unreadable(ValueError):
    """A message that holds no rows that the model can be given; `column` is empty where no column is at fault."""

    def __init__(self, reason: Reason, detail: str, column: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.column = reason, detail, column

    def of(self, message: Message) -> Poison:
        """Return the message as poison."""
        return Poison(message=message, column=self.column, reason=self.reason, detail=self.detail)


@dataclass(slots=True)
class Decoder:
    """Decodes messages for one model; may be called from several threads at once.

    With `one_type` key columns keep the type that they had in the first message (`key_types`), as a table needs it.
    """

    contract: Contract
    key_columns: tuple[str, ...]
    one_type: bool = False
    key_types: dict[str, pa.DataType] = field(default_factory=dict)
    _fitting: set[pa.Schema] = field(default_factory=set)

    def decode(self, messages: Sequence[Message]) -> tuple[list[Group], list[Poison]]:
        """Return the messages in groups of one schema, in order, and those that are unreadable."""
        poison: list[Poison] = []
        json = self._json([m for m in messages if not is_arrow(m.payload)], poison)
        arrow = self._arrow([m for m in messages if is_arrow(m.payload)], poison)
        return [*json, *arrow], poison

    def _json(self, messages: Sequence[Message], poison: list[Poison]) -> list[Group]:
        good: list[Message] = []
        rows: list[dict[str, Any]] = []
        for message in messages:
            try:
                rows.append(self._json_row(message.payload))
                good.append(message)
            except Unreadable as unreadable:
                poison.append(unreadable.of(message))
        if not good:
            return []
        table = self._json_table(good)
        if table is None:
            return self._json_one_by_one(good, rows, poison)
        self._write_keys(good, rows, table)
        return self._with_fitting_keys(
            Group(messages=tuple(good), edges=np.arange(len(good) + 1), table=table, rows=tuple(rows)), poison
        )

    def _write_keys(self, messages: Sequence[Message], rows: Sequence[dict[str, Any]], table: pa.Table) -> None:
        """Put keys into rows as they are written, wherever the value would be written otherwise.

        A number above 2^64 is a float to a parser, and `1.10` is 1.1; of a name that stands twice the first counts.
        """
        for key in self.key_columns:
            for message, row, text in zip(messages, rows, table.column(key).to_pylist(), strict=True):
                if not _is_as_written(row[key], text):
                    row[key] = orjson.Fragment(written_values(message.payload, [key])[key])

    def _json_row(self, payload: bytes) -> dict[str, Any]:
        try:
            row = read_object(payload)
        except NotJsonLines as error:
            detail = f"{error}; it begins {payload[:_SHOWN]!r}"
            raise Unreadable(Reason.NOT_JSON, detail) from error
        if not isinstance(row, dict):
            detail = f"got a {type(row).__name__}: {payload[:_SHOWN]!r}"
            raise Unreadable(Reason.NOT_AN_OBJECT, detail)
        for key in self.key_columns:
            if key not in row:
                raise Unreadable(Reason.KEY_MISSING, f"the message has {sorted(row)[:20]}", key)
        return row

    def _json_table(self, messages: Sequence[Message]) -> pa.Table | None:
        """Return the rows as text, as the batch path reads JSON lines; None where they are not one row a message."""
        # A line break within a message can only stand between its tokens.
        lines = b"\n".join(message.payload.replace(b"\n", b" ") for message in messages)
        try:
            frame = parse_lines(lines, self._json_types)
        except NotJsonLines:
            return None
        return frame.to_arrow(compat_level=pl.CompatLevel.oldest()) if frame.height == len(messages) else None

    @property
    def _json_types(self) -> dict[str, pl.DataType]:
        shapes = {column.name: column.shape for column in self.contract.columns}
        names = dict.fromkeys([*shapes, *self.key_columns])
        return {name: pl.List(pl.String) if shapes.get(name) else pl.String() for name in names}

    def _json_one_by_one(
        self, messages: Sequence[Message], rows: Sequence[dict[str, Any]], poison: list[Poison]
    ) -> list[Group]:
        kept: list[tuple[Message, dict[str, Any], pa.Table]] = []
        for message, row in zip(messages, rows, strict=True):
            table = self._json_table([message])
            if table is None:
                unreadable = Unreadable(Reason.NOT_A_ROW, f"{message.payload[:_SHOWN]!r}")
                poison.append(unreadable.of(message))
            else:
                self._write_keys([message], [row], table)
                kept.append((message, row, table))
        if not kept:
            return []
        group = Group(
            messages=tuple(message for message, _, _ in kept),
            edges=np.arange(len(kept) + 1),
            table=pa.concat_tables([table for _, _, table in kept]),
            rows=tuple(row for _, row, _ in kept),
        )
        return self._with_fitting_keys(group, poison)

    def _arrow(self, messages: Sequence[Message], poison: list[Poison]) -> list[Group]:
        groups: list[Group] = []
        held: list[tuple[Message, pa.Table]] = []
        for message in messages:
            try:
                table = self._arrow_table(message.payload)
            except Unreadable as unreadable:
                poison.append(unreadable.of(message))
                continue
            if held and not held[0][1].schema.equals(table.schema):
                groups += self._with_fitting_keys(_joined(held), poison)
                held = []
            held.append((message, table))
        return groups + (self._with_fitting_keys(_joined(held), poison) if held else [])

    def _arrow_table(self, payload: bytes) -> pa.Table:
        table = read_arrow(payload)
        if table.schema not in self._fitting:
            self._check(table.schema)
        names = [column.name for column in self.contract.columns if column.name in table.schema.names]
        return table.select(list(dict.fromkeys([*names, *self.key_columns])))

    def _check(self, schema: pa.Schema) -> None:
        try:
            self.contract.check(schema, "The message")
        except SchemaMismatch as error:
            raise Unreadable(Reason.UNFIT, str(error)) from error
        for key in self.key_columns:
            if len(schema.get_all_field_indices(key)) != 1:
                raise Unreadable(Reason.KEY_NOT_ONCE, f"the message has {schema.names[:20]}", key)
        if len(self._fitting) < _SCHEMAS_KEPT:
            self._fitting.add(schema)

    def _with_fitting_keys(self, group: Group, poison: list[Poison]) -> list[Group]:
        """Return the messages with their keys in the types that they have had from the first on; others are poison."""
        table = group.table
        for key in self.key_columns if self.one_type else ():
            at = table.schema.get_field_index(key)
            column = table.column(at)
            wanted = self.key_types.setdefault(key, column.type)
            if column.type != wanted:
                cast = _cast_unchanged(column, wanted)
                if cast is None:
                    if len(group.messages) > 1:
                        return [part for half in group.halves() for part in self._with_fitting_keys(half, poison)]
                    detail = f"it has been {wanted} from the first message on, got {column.type}"
                    poison.append(Unreadable(Reason.KEY_CHANGES, detail, key).of(group.messages[0]))
                    return []
                table = table.set_column(at, key, cast)
        return [replace(group, table=table)]


_SCHEMAS_KEPT = 1000


def _cast_unchanged(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray | None:
    """Return keys in another type, None where one would not come back as it was: "007" is no integer."""
    try:
        cast = column.cast(wanted)
        return cast if cast.cast(column.type).equals(column) else None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _is_as_written(value: object, text: object) -> bool:
    """Return whether a key is written in the answer as in the message; `text` is how a table of text holds it."""
    if isinstance(value, str):
        return value == text and not isinstance(value, Number)
    if isinstance(value, int):
        return text == (str(value).lower() if isinstance(value, bool) else str(value))
    return value is None and text is None


def is_arrow(payload: bytes) -> bool:
    """Whether a payload is Arrow IPC rather than JSON, by its first bytes."""
    return payload[:4] == _ARROW


def read_arrow(payload: bytes) -> pa.Table:
    """Return the rows of an Arrow IPC stream; raises Unreadable where it is none, or has no rows, or too many."""
    try:
        with pa.ipc.open_stream(payload) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Unreadable(Reason.NOT_ARROW, str(error)[:_SHOWN]) from error
    if not 1 <= table.num_rows <= ROWS_MAX or table.nbytes > _BYTES_MAX:
        detail = (
            f"1 to {ROWS_MAX:,} rows in at most {_BYTES_MAX >> 20} MiB are, got {table.num_rows:,} rows in "
            f"{table.nbytes >> 20} MiB"
        )
        raise Unreadable(Reason.SIZE, detail)
    return table


def count_rows(payload: bytes) -> int:
    """Return the rows of a message for the size of its batch: one where it is JSON, or can't be read."""
    if not is_arrow(payload):
        return 1
    try:
        with pa.ipc.open_stream(payload) as reader:
            return max(1, sum(int(batch.num_rows) for batch in reader))
    except (pa.ArrowException, OSError, ValueError):
        return 1


def _joined(held: Sequence[tuple[Message, pa.Table]]) -> Group:
    return Group(
        messages=tuple(message for message, _ in held),
        edges=np.cumsum([0, *(table.num_rows for _, table in held)]),
        table=pa.concat_tables([table for _, table in held]),
        rows=None,
    )
