"""One type for each column of files that differ, by the rules of Iceberg's schema evolution.

Arrow has several layouts of one type: string, large_string and string_view are text, as is a dictionary of texts. Of
two types the wider one holds all values of the other: an integer of more bits, a float of more bits, a decimal of more
digits, a timestamp of a finer unit, a timestamp for a date. Every value stays what it is.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from serving.errors import SchemaMismatch, list_shortly
from serving.model.contract import is_list, is_text
from serving.option_words import give_option
from tasks.batch.join_types import has_zone, is_time
from tasks.batch.struct_fields import read_field

_UNITS = ("s", "ms", "us", "ns")
_DECIMAL128_DIGITS = 38
_INTEGER_BITS_MAX = 64
# Of one column the types that a message names.
_TYPES_SHOWN = 4
# Of a table that has other columns than a run.
_DIFFERENCES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FileColumns:
    """The path of a file, as its user knows it, and the schema of its columns and their fields."""

    path: str
    schema: pa.Schema


def choose_types(
    files: Sequence[FileColumns],
    names: Iterable[str],
    declared: Mapping[str, pa.DataType],
    nullable: Collection[str] | None,
) -> dict[str, pa.DataType]:
    """Return the type of each named column that a file has, or the schema of a table: one that holds all its values.

    The order of the files decides nothing.

    Args:
        files: The files with rows.
        names: The columns that are used.
        declared: The types that the schema of a table gives its columns.
        nullable: The other columns that are null in a file that lacks them. None: none, and no option changes that.

    Raises:
        SchemaMismatch: No type holds all values of a column, or a file lacks one that must be there.
    """
    # Most files share one schema, which is looked at once.
    distinct = list({id(file.schema): file for file in reversed(files)}.values())[::-1]
    types, problems, is_missing = dict[str, pa.DataType](), list[str](), False
    for name in names:
        found, lacking = _find_kinds(distinct, name)
        told = declared.get(name)
        if lacking is not None and found and told is None and name not in (nullable or ()):
            is_missing = True
            problems.append(f"column {name!r}: {found[0].describe()}, missing in {lacking}")
        elif (chosen := _choose_type([each.kind for each in found], told)) is not None:
            types[name] = chosen
        # One that is twice in every file is told where the contract and the keys are checked.
        elif any(each.kind is not None for each in found):
            problems.append(_describe_kinds(name, found, told))
    if problems:
        is_option = is_missing and nullable is not None
        option = f" {give_option('missing_columns', 'null')} reads missing columns as nulls." if is_option else ""
        message = (
            "Every file must hold the columns that are used, in types of which one holds the values of all, got:\n"
            f"{list_shortly(problems)}\nRewrite the files, or narrow the source by a glob.{option}"
        )
        raise SchemaMismatch(message)
    return types


class _Held(NamedTuple):
    """A type that files hold a column in, and the first file that does; None where it is there more than once."""

    kind: pa.DataType | None
    path: str

    def describe(self) -> str:
        """Say which type is in which file."""
        return f"{'more than one of the name' if self.kind is None else self.kind} in {self.path}"


def _find_kinds(files: Sequence[FileColumns], name: str) -> tuple[list[_Held], str | None]:
    """Return each type that files hold a column in, and the first file that lacks it."""
    found: list[_Held] = []
    lacking = None
    for file in files:
        at = file.schema.get_all_field_indices(name)
        if not at:
            lacking = lacking or file.path
            continue
        kind = file.schema.field(at[0]).type if len(at) == 1 else None
        if all(kind != each.kind for each in found):
            found.append(_Held(kind, file.path))
    return found, lacking


def _describe_kinds(name: str, found: Sequence[_Held], declared: pa.DataType | None) -> str:
    told = [] if declared is None else [f"{declared} by the table's schema"]
    told += [each.describe() for each in found]
    more = [f"and {len(told) - _TYPES_SHOWN} more types"] if len(told) > _TYPES_SHOWN else []
    return f"column {name!r}: {', '.join(told[:_TYPES_SHOWN] + more)}"


def _choose_type(kinds: Sequence[pa.DataType | None], declared: pa.DataType | None) -> pa.DataType | None:
    """Return the type in which a column is read; None where there is none. One type of all files stays as it is.

    Views are the exception: a table has them in those files alone that deltalake has rewritten.
    """
    single = [kind for kind in kinds if kind is not None]
    if not single or len(single) < len(kinds):
        return None if kinds else declared
    told = None if declared is None else simplify_type(declared)
    is_uniform = len(single) == 1 and "_view" not in str(single[0])
    if is_uniform and told in (None, simplify_type(single[0])):
        return single[0]
    if told is None:
        return widen_types(single)
    # Spark writes the times of a Delta table without their zone, which is UTC.
    zoned = [pa.timestamp(kind.unit, told.tz) if _lacks_zone(kind, told) else kind for kind in single]
    return told if widen_types([*zoned, told]) == told else None


def _lacks_zone(kind: pa.DataType, told: pa.DataType) -> bool:
    return has_zone(told) and bool(pa.types.is_timestamp(kind)) and not has_zone(kind)


def simplify_type(kind: pa.DataType) -> pa.DataType:
    """Return the plain layout of a type, which all of its layouts have in common."""
    return next((make(kind) for is_of, make in _LAYOUTS if is_of(kind)), kind)


def _is_loose_list(kind: pa.DataType) -> bool:
    is_view = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return bool(is_view or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _make_decimal(kind: pa.DataType) -> pa.DataType:
    make = pa.decimal128 if kind.precision <= _DECIMAL128_DIGITS else pa.decimal256
    return make(kind.precision, kind.scale)


_LAYOUTS: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType], pa.DataType]], ...] = (
    (pa.types.is_dictionary, lambda kind: simplify_type(kind.value_type)),
    (is_text, lambda _: pa.string()),
    (pa.types.is_large_binary, lambda _: pa.binary()),
    (pa.types.is_binary_view, lambda _: pa.binary()),
    (pa.types.is_date, lambda _: pa.date32()),
    (pa.types.is_decimal, _make_decimal),
    (pa.types.is_fixed_size_list, lambda kind: pa.list_(simplify_type(kind.value_type), kind.list_size)),
    (_is_loose_list, lambda kind: pa.list_(simplify_type(kind.value_type))),
)


def widen_types(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    """Return the narrowest type that holds all values of some types as they are, in its plain layout; None for none."""
    sizes = {kind.list_size for kind in kinds if pa.types.is_fixed_size_list(kind)}
    if len(sizes) > 1:
        return None
    return functools.reduce(_widen_two, map(simplify_type, kinds))


def _widen_two(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    """Return the narrowest type for two in their plain layouts. In whatever order several are taken, it is the same."""
    if one is None or other is None or one == other:
        return None if other is None else one
    if pa.types.is_null(one) or pa.types.is_null(other):
        return other if pa.types.is_null(one) else one
    families = ((widen, is_of(one) and is_of(other)) for is_of, widen in _FAMILIES)
    return next((widen(one, other) for widen, are_both in families if are_both), None)


def _widen_integers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    signed = pa.types.is_signed_integer(one) or pa.types.is_signed_integer(other)
    # A signed integer holds the values of an unsigned one of half its bits.
    bits = max(k.bit_width * (2 if signed and pa.types.is_unsigned_integer(k) else 1) for k in (one, other))
    return pa.type_for_alias(f"{'int' if signed else 'uint'}{bits}") if bits <= _INTEGER_BITS_MAX else None


def _widen_floats(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    return max(one, other, key=lambda kind: int(kind.bit_width))


def _widen_decimals(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    return max(one, other, key=lambda kind: int(kind.precision)) if one.scale == other.scale else None


def _widen_times(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the type of two timestamps, or of one and dates: which instant a date is in some zone, it does not say."""
    times = [kind for kind in (one, other) if pa.types.is_timestamp(kind)]
    zones = {kind.tz if pa.types.is_timestamp(kind) else None for kind in (one, other)}
    return max(times, key=lambda kind: _UNITS.index(kind.unit)) if len(zones) == 1 else None


def _widen_lists(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    value = _widen_two(one.value_type, other.value_type)
    is_fixed = pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other)
    return None if value is None else pa.list_(value, one.list_size if is_fixed else -1)


_FAMILIES: tuple[
    tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType, pa.DataType], pa.DataType | None]], ...
] = (
    (pa.types.is_integer, _widen_integers),
    (pa.types.is_floating, _widen_floats),
    (pa.types.is_decimal, _widen_decimals),
    (is_time, _widen_times),
    (is_list, _widen_lists),
)


def find_others(files: Sequence[FileColumns], types: Mapping[str, pa.DataType]) -> list[dict[str, str]]:
    """Return, for each file, the types in words of those columns that it holds in another type, or not at all."""
    found = dict[int, dict[str, str]]()
    for file in files:
        if id(file.schema) not in found:
            held = {field.name: field.type for field in file.schema}
            found[id(file.schema)] = {name: str(kind) for name, kind in types.items() if held.get(name) != kind}
    return [found[id(file.schema)] for file in files]


def describe_differences(run: Mapping[str, str], table: Mapping[str, str]) -> str:
    """Say in which columns a run and a table differ; of each the types are given in words. Empty where in none."""
    told = [
        f"{name!r} is {kind} in the run and {table.get(name, 'missing')} in the table"
        for name, kind in run.items()
        if table.get(name) != kind
    ]
    told += [f"{name!r} is in the table alone" for name in table if name not in run]
    more = [f"and {len(told) - _DIFFERENCES_SHOWN} more columns differ"] if len(told) > _DIFFERENCES_SHOWN else []
    return "; ".join([*told[:_DIFFERENCES_SHOWN], *more])


def read_column(rows: pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
    """Return a column of rows of a file in the type that it has in all files; nulls where the file lacks it.

    Raises ArrowInvalid for a value that the type does not hold: a date or a time that is too far from 1970.
    """
    column = read_field(rows, name)
    if column is None:
        return pa.nulls(rows.num_rows, kind)
    return (column.dictionary_decode() if pa.types.is_dictionary(column.type) else column).cast(kind)


def pack_types(types: Mapping[str, pa.DataType]) -> str:
    """Return types by the names of their columns as a text."""
    return pack_schema(pa.schema(types.items())) if types else ""


def unpack_types(text: str) -> dict[str, pa.DataType]:
    """Return the types that `pack_types` has made a text of."""
    return {field.name: field.type for field in unpack_schema(text)} if text else {}


def pack_schema(schema: pa.Schema) -> str:
    """Return a schema as a text, for a record: in Arrow's IPC format, in base64."""
    return base64.b64encode(schema.remove_metadata().serialize()).decode()


def unpack_schema(text: str) -> pa.Schema:
    """Return the schema that `pack_schema` has made a text of."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))
