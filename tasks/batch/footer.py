"""What a Parquet footer says of the memory that rows take once they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# A writer that keeps the least and the greatest text cuts them at 64 bytes or more, where it cuts them.
_TEXT_SHORT = 64
_MEASURED_MAX = 64 << 20
_MEASURED_ROWS = 4096
# The bytes of a page, and of a dictionary, at which writers end them.
_PAGE = 1 << 20
# Allocators have eight sizes to a doubling, and round up to one; what is larger than the greatest has its own.
_ROUNDED, _ROUNDED_MAX = 8, 16 << 20
# What is less is not worth asking every column for.
_READING_MIN = 1 << 20
_OFFSET = 4
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8}


class GroupBytes(NamedTuple):
    """Bytes of one row group: of the columns that are read, decoded, of the keys among them, and of these as encoded.

    The last are those of pages before they are compressed, where a text of a dictionary counts once. `reading` is
    what a reader holds beside what it has decoded: stored columns, and a page and a dictionary of each.
    """

    decoded: int
    keys: int
    keys_encoded: int
    reading: int


class FooterReader:
    """Reads from footers of one schema what the row groups take, of the columns that a run reads.

    Columns of a fixed width take their rows times that. Texts take what they take in the file, and more where each
    stands there once, in a dictionary. How long those are is told by the least and the greatest of them; where the
    footer has neither, or long ones that may be cut, their lengths are read.
    """

    def __init__(
        self, metadata: pq.FileMetaData, schema: pa.Schema, used: Collection[str], keys: Collection[str]
    ) -> None:
        self._used, self._keys = used, keys
        self._fixed, self._fixed_keys = 0.0, 0.0
        self._leaves: list[tuple[int, str, bool]] = []
        loose = set()
        for field in schema:
            width = _fixed_bytes(field.type)
            if field.name in used and width is None:
                loose.add(field.name)
            elif field.name in used:
                self._fixed += width or 0.0
                self._fixed_keys += (width or 0.0) if field.name in keys else 0.0
        self._read = []
        for at in range(metadata.num_columns):
            path = metadata.schema.column(at).path
            name = path if path in used else path.partition(".")[0]
            if name in loose:
                self._leaves.append((at, path, name in keys))
            if name in used:
                self._read.append(at)

    def read(self, metadata: pq.FileMetaData, open_file: Callable[..., pq.ParquetFile]) -> tuple[GroupBytes, ...]:
        """Return what each row group of a file takes; `open_file` opens it, with options of pyarrow's."""
        return tuple(self._group(metadata, at, open_file) for at in range(metadata.num_row_groups))

    def _group(self, metadata: pq.FileMetaData, at: int, open_file: Callable[..., pq.ParquetFile]) -> GroupBytes:
        group = metadata.row_group(at)
        decoded, keys = self._fixed * group.num_rows, self._fixed_keys * group.num_rows
        for leaf, path, is_key in self._leaves:
            found = _leaf_bytes(group, group.column(leaf), partial(_measured, open_file, at, path))
            decoded, keys = decoded + found, keys + (found if is_key else 0)
        encoded = self._fixed_keys * group.num_rows
        if keys > _READING_MIN:
            encoded += sum(group.column(leaf).total_uncompressed_size for leaf, _, is_key in self._leaves if is_key)
        else:
            encoded = keys
        small = group.total_byte_size < _READING_MIN
        reading = 0 if small else sum(_reading_bytes(group.column(leaf)) for leaf in self._read)
        return GroupBytes(int(decoded), int(keys), int(min(keys, encoded)), reading)


def _reading_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    """Return what a reader holds of a column: all of it as stored, its dictionary, and a page as it is decompressed."""
    stored, whole = chunk.total_compressed_size, chunk.total_uncompressed_size
    dictionary = 0
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        # The footer has what a dictionary takes as stored; it is taken to compress as the column does.
        share = (chunk.data_page_offset - chunk.dictionary_page_offset) / max(stored, 1)
        dictionary = int(whole * min(max(share, 0.0), 1.0))
    sizes = stored, dictionary, max(dictionary, min(whole - dictionary, _PAGE))
    return int(sum(size + min(size, _ROUNDED_MAX) // _ROUNDED for size in sizes))


def _fixed_bytes(kind: pa.DataType) -> float | None:
    """Return the bytes of a value in memory, None where they depend on the value."""
    if isinstance(kind, pa.BaseExtensionType):
        return _fixed_bytes(kind.storage_type)
    if pa.types.is_fixed_size_list(kind):
        inner = _fixed_bytes(kind.value_type)
        return None if inner is None else inner * kind.list_size
    if pa.types.is_struct(kind):
        parts = [_fixed_bytes(kind.field(at).type) for at in range(kind.num_fields)]
        return None if None in parts else float(sum(part for part in parts if part is not None))
    if pa.types.is_dictionary(kind) or pa.types.is_nested(kind):
        return None
    try:
        return float(kind.bit_width) / 8
    except ValueError:
        return None


def _leaf_bytes(group: pq.RowGroupMetaData, chunk: pq.ColumnChunkMetaData, measure: Callable[[], int]) -> int:
    nested = _OFFSET * group.num_rows if "." in chunk.path_in_schema else 0
    if chunk.physical_type != "BYTE_ARRAY":
        width = _WIDTHS.get(chunk.physical_type)
        return nested + int(chunk.total_uncompressed_size if width is None else chunk.num_values * width)
    stored = nested + int(chunk.total_uncompressed_size)
    if not chunk.has_dictionary_page or chunk.total_uncompressed_size > _MEASURED_MAX:
        return stored
    ends = chunk.statistics
    if ends is not None and ends.null_count == chunk.num_values:
        return stored
    if ends is not None and ends.has_min_max and max(len(ends.min), len(ends.max)) < _TEXT_SHORT:
        return max(stored, int(chunk.num_values) * (_OFFSET + (len(ends.min) + len(ends.max)) // 2))
    return max(stored, measure())


def _measured(open_file: Callable[..., pq.ParquetFile], group: int, path: str) -> int:
    """Return the bytes of a row group's texts, decoded, from their lengths: one of the dictionary is read once."""
    parquet = open_file(read_dictionary=[path])
    nested = path not in parquet.schema_arrow.names
    if nested:
        # Within lists and structs pyarrow would keep the dictionary, whose texts are counted once.
        parquet = open_file()
    found = 0
    for batch in parquet.iter_batches(64 if nested else _MEASURED_ROWS, [group], [path], use_threads=False):
        column = batch.column(0)
        if pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary).take(column.indices)
            found += _OFFSET * len(column) + (pc.sum(lengths).as_py() or 0)
        else:
            found += column.nbytes
    return found
