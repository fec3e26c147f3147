"""Fields of structs as columns: `customer.age` is the field `age` of the column `customer`, at any depth.

A column whose own name is `customer.age` goes before that field. A field is null where the struct is null. Lists stay
as they are: what is in a struct within a list is no column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc


def list_fields(schema: pa.Schema, taken: Collection[str] = ()) -> pa.Schema:
    """Return a schema in which the fields of each struct follow it, named by their paths.

    Args:
        schema: The columns.
        taken: Names of columns that are elsewhere, such as partitions: these go before fields too.
    """
    if not any(map(pa.types.is_struct, schema.types)):
        return schema
    names = {*schema.names, *taken}
    fields = [[column, *(each for each in _iter_below(column) if each.name not in names)] for column in schema]
    return pa.schema([each for found in fields for each in found], metadata=schema.metadata)


def _iter_below(field: pa.Field) -> Iterator[pa.Field]:
    for each in field.flatten() if pa.types.is_struct(field.type) else ():
        yield each
        yield from _iter_below(each)


def read_field(rows: pa.RecordBatch | pa.Table, name: str) -> pa.Array | pa.ChunkedArray | None:
    """Return a column of rows, or a field by its path; None where there is neither."""
    path = _find_path(rows.schema, name)
    if path is None:
        return None
    column = rows.column(path[0])
    return pc.struct_field(column, path[1:]) if len(path) > 1 else column


def _find_path(within: pa.Schema | pa.StructType, name: str) -> list[int] | None:
    """Return the place of a column or a field, and of each field on the way to it."""
    at = within.get_field_index(name)
    if at >= 0:
        return [at]
    for place, field in enumerate(within):
        if pa.types.is_struct(field.type) and name.startswith(f"{field.name}."):
            below = _find_path(field.type, name.removeprefix(f"{field.name}."))
            if below is not None:
                return [place, *below]
    return None
