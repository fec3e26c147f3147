"""Avro object container files as tables: their blocks are decoded by fastavro, one after the other.

A record's fields are columns. `null` beside one other type is a value that may be null; nested records are structs, and
arrays are lists. A column of maps, of a union of several types or with nested UUIDs is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from serving.errors import SchemaMismatch, SourceCorrupt
from serving.extras import import_extra

_ROWS = 1 << 16
_DECIMAL128_DIGITS = 38
_TYPES = {
    "null": pa.null(),
    "boolean": pa.bool_(),
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "bytes": pa.binary(),
    "string": pa.string(),
    "enum": pa.string(),
    # Logical types.
    "date": pa.date32(),
    "time-millis": pa.time32("ms"),
    "time-micros": pa.time64("us"),
    "timestamp-millis": pa.timestamp("ms", "UTC"),
    "timestamp-micros": pa.timestamp("us", "UTC"),
    "timestamp-nanos": pa.timestamp("ns", "UTC"),
    "local-timestamp-millis": pa.timestamp("ms"),
    "local-timestamp-micros": pa.timestamp("us"),
    "local-timestamp-nanos": pa.timestamp("ns"),
}


def read_avro(raw: Path, wanted: Collection[str], where: str) -> Generator[pa.Table]:
    """Yield the rows of a file as tables with those of the `wanted` columns that it has; where it has none, with all.

    Args:
        raw: The file.
        wanted: Names of columns, and of fields of structs as `column.field`.
        where: The file's address, for messages.

    Raises:
        BadInput: fastavro is not installed.
        SchemaMismatch: A column has no type of Arrow.
        SourceCorrupt: The file is no Avro, or ends within a block. One that lost whole blocks at its end can't be told.
    """
    fastavro = import_extra("fastavro", "avro")
    try:
        with raw.open("rb") as stream:
            blocks = fastavro.block_reader(stream)
            fields = fastavro.schema.expand_schema(blocks.writer_schema)["fields"]
            schema = _make_schema(fields, wanted, where)
            is_empty, end = True, stream.tell()
            rows: list[Mapping[str, Any]] = []
            for block in blocks:
                rows += block
                if block.bytes_.read(1):
                    # It has more than its rows.
                    break
                end = block.offset + block.size
                if len(rows) >= _ROWS:
                    yield _make_table(rows, schema)
                    rows, is_empty = [], False
    except SchemaMismatch:
        raise
    except Exception as error:  # what fastavro raises for bytes that are no Avro depends on what it takes them for
        message = f"{where} must be a whole Avro file, got: {type(error).__name__}: {error}. Write the file again."
        raise SourceCorrupt(message) from error
    if end != raw.stat().st_size:
        message = f"{where} must be a whole Avro file, got one whose block at byte {end} is none. Write the file again."
        raise SourceCorrupt(message)
    if rows or is_empty:
        yield _make_table(rows, schema)


def _make_schema(fields: Sequence[Mapping[str, Any]], wanted: Collection[str], where: str) -> pa.Schema:
    roots = {name.partition(".")[0] for name in wanted}
    chosen = [each for each in fields if each["name"] in roots] or fields
    found = {each["name"]: _find_type(each["type"]) for each in chosen}
    if refused := [f"{each['name']} ({str(each['type'])[:80]})" for each in chosen if found[each["name"]] is None]:
        message = (
            f"{where} must have columns of one type each, without maps, unions of several types or nested UUIDs, got "
            f"{', '.join(refused)}. Leave them out of the call, or write them as other types."
        )
        raise SchemaMismatch(message)
    return pa.schema(list(found.items()))


def _find_type(given: Any) -> pa.DataType | None:  # noqa: PLR0911 - one for each kind of types
    """Return the Arrow type of an Avro type, None where there is none."""
    if isinstance(given, list):
        others = [each for each in given if each != "null"]
        return _find_type(others[0]) if len(others) == 1 else None if others else pa.null()
    if isinstance(given, str):
        return _TYPES.get(given)
    if given.get("logicalType") == "decimal":
        decimal = pa.decimal128 if given["precision"] <= _DECIMAL128_DIGITS else pa.decimal256
        return decimal(given["precision"], given.get("scale", 0))
    if (known := _TYPES.get(given.get("logicalType"))) is not None:
        return known
    match given["type"]:
        case "fixed":
            return pa.binary(given["size"])
        case "array":
            items = _find_nested_type(given["items"])
            return None if items is None else pa.list_(items)
        case "record":
            parts = {each["name"]: _find_nested_type(each["type"]) for each in given["fields"]}
            return None if None in parts.values() else pa.struct(list(parts.items()))
        case kind:
            return _find_type(kind)


def _find_nested_type(given: Any) -> pa.DataType | None:
    """Return the Arrow type of a value within another. There is none for a UUID, which is text in a column alone."""
    return None if "'uuid'" in str(given) else _find_type(given)


def _make_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        values = [row[field.name] for row in rows]
        if pa.types.is_string(field.type):
            # A UUID comes as an object of its own.
            values = [value if value is None or isinstance(value, str) else str(value) for value in values]
        columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)
