"""Columns in the paths of files, as Hive writes them: `day=2024-02-29/store=7/part.parquet`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa

from serving.errors import SchemaMismatch, shorten_error, suggest_name
from serving.option_words import name_option

PartitionType = Literal["text", "int64", "date", "timestamp"]
# Of a file the path, as its user knows it, and the values of its partitions by their names.
PartitionedFile = tuple[str, Mapping[str, str | None]]

_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_ARROW_TYPES = {"text": pa.string(), "int64": pa.int64(), "date": pa.date32(), "timestamp": pa.timestamp("us")}


def parse_hive_values(path: str) -> dict[str, str | None]:
    """Return name and value of each `name=value` folder of a path; None for hive's name of a null."""
    folders = path.split("/")[:-1]
    pairs = [
        (name, _decode_value(value)) for name, sep, value in (part.partition("=") for part in folders) if sep and name
    ]
    return {name: None if value == _NULL_PARTITION else value for name, value in pairs}


def _decode_value(value: str) -> str:
    """Return a value without its escapes; as it is written where they are not UTF-8, and so are none."""
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError:
        return value


def choose_partition_fields(
    files: Sequence[PartitionedFile],
    held: Collection[str],
    used: Collection[str],
    types: Mapping[str, PartitionType],
    stated: Mapping[str, str] = MappingProxyType({}),
) -> list[pa.Field]:
    """Return the columns that are in the paths of files, or in the log of a table.

    They are text unless another type is asked for, or a table's schema states one: a key stays as it is written, and
    the contract parses inputs.

    Args:
        files: The files with rows.
        held: The columns that the files hold themselves, which go before those of their paths.
        used: The columns that are used.
        types: The types that are asked for, by the names of partitions.
        stated: Those that the schema of a table states, in Arrow's words. One that is asked for goes before.

    Raises:
        SchemaMismatch: A column that is used is in the paths of some files only, a type is asked for of what is no
            partition, or a value is none of its type.
    """
    names: dict[str, None] = {}
    lacking: dict[str, str] = {}
    for at, (path, found) in enumerate(files):
        lacking |= {name: files[0][0] for name in found if at and name not in names}
        names |= dict.fromkeys(found)
        lacking |= {name: path for name in names if name not in found}
    if partial := sorted(name for name in lacking if name in used and name not in held):
        listed = ", ".join(f"{name!r} is missing in {lacking[name]}" for name in partial)
        message = f"Every file must lie in a folder of each partition that is used, got: {listed}. Move it, or glob."
        raise SchemaMismatch(message)
    partitions = [name for name in names if name not in lacking and name not in held]
    if others := [name for name in types if name not in partitions]:
        message = (
            f"{name_option('partition_types')} must name partitions that every file lies in, got {others[0]!r}"
            f"{suggest_name(others[0], partitions)}; partitions found: {partitions}. Correct the name."
        )
        raise SchemaMismatch(message)
    for name, kind in types.items():
        _check_values(files, name, kind)
    chosen = {**dict.fromkeys(partitions, "string"), **stated, **{name: _ARROW_TYPES[types[name]] for name in types}}
    return [pa.field(name, chosen[name]) for name in partitions]


def set_partition_types(schema: pa.Schema, types: Mapping[str, PartitionType]) -> pa.Schema:
    """Return the schema of a dataset without rows, with its partitions in the types that are asked for."""
    return pa.schema(
        [field.with_type(_ARROW_TYPES[types[field.name]]) if field.name in types else field for field in schema]
    )


def _check_values(files: Sequence[PartitionedFile], name: str, kind: PartitionType) -> None:
    """Raise SchemaMismatch, with the first file, for a value of a partition that is none of a type."""
    first = dict[str | None, str]()
    for path, values in files:
        first.setdefault(values[name], path)
    for value, path in first.items():
        try:
            pa.scalar(value, pa.string()).cast(_ARROW_TYPES[kind])
        except pa.ArrowInvalid as error:
            message = (
                f"Every value of the partition {name!r} must be of the type {kind}, as {name_option('partition_types')}"
                f" says, got {path}: {shorten_error(error)}. Rename its folder, or leave the partition text."
            )
            raise SchemaMismatch(message) from error
