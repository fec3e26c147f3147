"""Decoding messages: one JSON row or many rows of Arrow IPC become tables, or poison with a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from tasks.batch.json_lines import NotJsonLines, Number, find_written, parse_fields, read_object
from tasks.batch.struct_fields import list_fields, read_field
from tasks.stream.message import Message, Poison

ROWS_MAX = 1 << 20
_BYTES_MAX = 256 << 20
_ARROW_PREFIX = b"\xff\xff\xff\xff"
_CHARACTERS_SHOWN = 200
_SCHEMAS_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageGroup:
    """Messages whose rows make one table: message i has rows [row_offsets[i], row_offsets[i + 1]).

    `rows` holds the parsed rows of JSON messages; None for Arrow messages.
    """

    messages: tuple[Message, ...]
    row_offsets: npt.NDArray[np.int64]
    table: pa.Table
    rows: tuple[dict[str, Any], ...] | None

    def split_in_half(self) -> tuple[MessageGroup, MessageGroup]:
        """Return the first half of the messages, and the second; there must be at least two."""
        middle = len(self.messages) // 2
        return self._slice(0, middle), self._slice(middle, len(self.messages))

    def _slice(self, start: int, stop: int) -> MessageGroup:
        row_start, row_stop = int(self.row_offsets[start]), int(self.row_offsets[stop])
        return MessageGroup(
            messages=self.messages[start:stop],
            row_offsets=self.row_offsets[start : stop + 1] - row_start,
            table=self.table.slice(row_start, row_stop - row_start),
            rows=self.rows[start:stop] if self.rows is not None else None,
        )


class Reason(StrEnum):
    """Why a message can't be read. There are few reasons, since tables count them."""

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

    def to_poison(self, message: Message) -> Poison:
        """Return the message as poison."""
        return Poison(message=message, column=self.column, reason=self.reason, detail=self.detail)


@dataclass(slots=True)
class Decoder:
    """Decodes messages for one model; may be called from several threads at once.

    With `fix_key_types` key columns keep the types of the first message (`key_types`), as a table needs them.
    """

    contract: Contract
    key_columns: tuple[str, ...]
    fix_key_types: bool = False
    key_types: dict[str, pa.DataType] = field(default_factory=dict)
    _checked_schemas: set[pa.Schema] = field(default_factory=set)

    def decode(self, messages: Sequence[Message]) -> tuple[list[MessageGroup], list[Poison]]:
        """Return the messages in groups of one schema, in order, and those that are unreadable."""
        poison: list[Poison] = []
        json = self._decode_json([m for m in messages if not is_arrow(m.payload)], poison)
        arrow = self._decode_arrow([m for m in messages if is_arrow(m.payload)], poison)
        return [*json, *arrow], poison

    def _decode_json(self, messages: Sequence[Message], poison: list[Poison]) -> list[MessageGroup]:
        readable: list[Message] = []
        rows: list[dict[str, Any]] = []
        for message in messages:
            try:
                rows.append(self._parse_row(message.payload))
                readable.append(message)
            except Unreadable as unreadable:
                poison.append(unreadable.to_poison(message))
        if not readable:
            return []
        table = self._parse_table(readable)
        if table is None:
            return self._decode_one_by_one(readable, rows, poison)
        self._restore_keys(readable, rows, table)
        return self._cast_keys(
            MessageGroup(
                messages=tuple(readable), row_offsets=np.arange(len(readable) + 1), table=table, rows=tuple(rows)
            ),
            poison,
        )

    def _restore_keys(self, messages: Sequence[Message], rows: Sequence[dict[str, Any]], table: pa.Table) -> None:
        """Put keys into rows as the message writes them, where the parsed value would be written differently.

        A parser reads a number above 2^64 as a float, and `1.10` as 1.1. Of two equal names the first counts, and a key
        that is within the second of two objects alone is a null.
        """
        for key in self.key_columns:
            for message, row, text in zip(messages, rows, table.column(key).to_pylist(), strict=True):
                if not _is_written_alike(row[key], text):
                    row[key] = orjson.Fragment(find_written(message.payload, (key,)).get(key, b"null"))

    def _parse_row(self, payload: bytes) -> dict[str, Any]:
        try:
            row = read_object(payload)
        except NotJsonLines as error:
            detail = f"{error}; it begins {payload[:_CHARACTERS_SHOWN]!r}"
            raise Unreadable(Reason.NOT_JSON, detail) from error
        if not isinstance(row, dict):
            detail = f"got a {type(row).__name__}: {payload[:_CHARACTERS_SHOWN]!r}"
            raise Unreadable(Reason.NOT_AN_OBJECT, detail)
        for key in self.key_columns:
            try:
                row[key] = _find_field(row, key)
            except KeyError:
                raise Unreadable(Reason.KEY_MISSING, f"the message has {sorted(row)[:20]}", key) from None
        return row

    def _parse_table(self, messages: Sequence[Message]) -> pa.Table | None:
        """Return the rows as text, as batch runs read JSON lines; None where they are not one row per message."""
        # A line break within a message can only be between its tokens.
        lines = b"\n".join(message.payload.replace(b"\n", b" ") for message in messages)
        try:
            frame = parse_fields(lines, self._text_types, is_valid=True)
        except NotJsonLines:
            return None
        return frame.to_arrow(compat_level=pl.CompatLevel.oldest()) if frame.height == len(messages) else None

    @property
    def _text_types(self) -> dict[str, pl.DataType]:
        shapes = {column.name: column.shape for column in self.contract.columns}
        names = dict.fromkeys([*shapes, *self.key_columns])
        return {name: pl.List(pl.String) if shapes.get(name) else pl.String() for name in names}

    def _decode_one_by_one(
        self, messages: Sequence[Message], rows: Sequence[dict[str, Any]], poison: list[Poison]
    ) -> list[MessageGroup]:
        readable: list[tuple[Message, dict[str, Any], pa.Table]] = []
        for message, row in zip(messages, rows, strict=True):
            table = self._parse_table([message])
            if table is None:
                unreadable = Unreadable(Reason.NOT_A_ROW, f"{message.payload[:_CHARACTERS_SHOWN]!r}")
                poison.append(unreadable.to_poison(message))
            else:
                self._restore_keys([message], [row], table)
                readable.append((message, row, table))
        if not readable:
            return []
        group = MessageGroup(
            messages=tuple(message for message, _, _ in readable),
            row_offsets=np.arange(len(readable) + 1),
            table=pa.concat_tables([table for _, _, table in readable]),
            rows=tuple(row for _, row, _ in readable),
        )
        return self._cast_keys(group, poison)

    def _decode_arrow(self, messages: Sequence[Message], poison: list[Poison]) -> list[MessageGroup]:
        groups: list[MessageGroup] = []
        pending: list[tuple[Message, pa.Table]] = []
        for message in messages:
            try:
                table = self._read_arrow_table(message.payload)
            except Unreadable as unreadable:
                poison.append(unreadable.to_poison(message))
                continue
            if pending and not pending[0][1].schema.equals(table.schema):
                groups += self._cast_keys(_join_tables(pending), poison)
                pending = []
            pending.append((message, table))
        return groups + (self._cast_keys(_join_tables(pending), poison) if pending else [])

    def _read_arrow_table(self, payload: bytes) -> pa.Table:
        table = read_arrow(payload)
        schema = list_fields(table.schema)
        if schema not in self._checked_schemas:
            self._check_schema(schema)
        used = [column.name for column in self.contract.columns if column.name in schema.names]
        names = list(dict.fromkeys([*used, *self.key_columns]))
        if schema is table.schema:
            return table.select(names)
        return pa.table({name: read_field(table, name) for name in names})

    def _check_schema(self, schema: pa.Schema) -> None:
        try:
            self.contract.check(schema, "The message")
        except SchemaMismatch as error:
            raise Unreadable(Reason.UNFIT, str(error)) from error
        for key in self.key_columns:
            if len(schema.get_all_field_indices(key)) != 1:
                raise Unreadable(Reason.KEY_NOT_ONCE, f"the message has {schema.names[:20]}", key)
        if len(self._checked_schemas) < _SCHEMAS_MAX:
            self._checked_schemas.add(schema)

    def _cast_keys(self, group: MessageGroup, poison: list[Poison]) -> list[MessageGroup]:
        """Return the messages with their keys cast to the types of the first message; others become poison."""
        table = group.table
        for key in self.key_columns if self.fix_key_types else ():
            index = table.schema.get_field_index(key)
            column = table.column(index)
            key_type = self.key_types.setdefault(key, column.type)
            if column.type != key_type:
                cast = _cast_unchanged(column, key_type)
                if cast is None:
                    if len(group.messages) > 1:
                        return [part for half in group.split_in_half() for part in self._cast_keys(half, poison)]
                    detail = f"it has been {key_type} from the first message on, got {column.type}"
                    poison.append(Unreadable(Reason.KEY_CHANGES, detail, key).to_poison(group.messages[0]))
                    return []
                table = table.set_column(index, key, cast)
        return [replace(group, table=table)]


def _find_field(row: Mapping[str, Any], path: str) -> Any:
    """Return a field of an object, or of objects within it by its path. Raises KeyError."""
    if path in row:
        return row[path]
    for at in (at for at, mark in enumerate(path) if mark == "."):
        within = row.get(path[:at])
        if isinstance(within, dict):
            with suppress(KeyError):
                return _find_field(within, path[at + 1 :])
    raise KeyError(path)


def _cast_unchanged(column: pa.ChunkedArray, key_type: pa.DataType) -> pa.ChunkedArray | None:
    """Return keys in another type, None where a value would change: "007" is no integer."""
    try:
        cast = column.cast(key_type)
        return cast if cast.cast(column.type).equals(column) else None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _is_written_alike(value: object, text: object) -> bool:
    """Return whether a parsed key is written as in the message, where its text is `text`."""
    if isinstance(value, str):
        return value == text and not isinstance(value, Number)
    if isinstance(value, int):
        return text == (str(value).lower() if isinstance(value, bool) else str(value))
    return value is None and text is None


def is_arrow(payload: bytes) -> bool:
    """Return whether a payload is Arrow IPC rather than JSON, by its first bytes."""
    return payload[:4] == _ARROW_PREFIX


def read_arrow(payload: bytes) -> pa.Table:
    """Return the rows of an Arrow IPC stream.

    Raises:
        Unreadable: It is not Arrow IPC, or has no rows, or too many.
    """
    try:
        with pa.ipc.open_stream(payload) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Unreadable(Reason.NOT_ARROW, str(error)[:_CHARACTERS_SHOWN]) from error
    if not 1 <= table.num_rows <= ROWS_MAX or table.nbytes > _BYTES_MAX:
        detail = (
            f"1 to {ROWS_MAX:,} rows in at most {_BYTES_MAX >> 20} MiB are, got {table.num_rows:,} rows in "
            f"{table.nbytes >> 20} MiB"
        )
        raise Unreadable(Reason.SIZE, detail)
    return table


def count_rows(payload: bytes) -> int:
    """Return how many rows a message has: 1 where it is JSON, or can't be read."""
    if not is_arrow(payload):
        return 1
    try:
        with pa.ipc.open_stream(payload) as reader:
            return max(1, sum(int(batch.num_rows) for batch in reader))
    except (pa.ArrowException, OSError, ValueError):
        return 1


def _join_tables(pending: Sequence[tuple[Message, pa.Table]]) -> MessageGroup:
    return MessageGroup(
        messages=tuple(message for message, _ in pending),
        row_offsets=np.cumsum([0, *(table.num_rows for _, table in pending)]),
        table=pa.concat_tables([table for _, table in pending]),
        rows=None,
    )
