"""What a Parquet footer says of the memory that rows take once they are decoded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# Texts of a dictionary that are all shorter are taken to be as long as the longest; of others the lengths are read.
_TEXT_SHORT = 64
_MEASURED_MAX = 64 << 20
_MEASURED_ROWS = 4096
# What pyarrow reads of a file's end at once.
_TAIL = 64 << 10
# The bytes of a page, and of a dictionary, at which writers end them.
_PAGE = 1 << 20
# Allocators have eight sizes to a doubling, and round up to one; what is larger than the greatest has its own.
_ROUNDED, _ROUNDED_MAX = 8, 16 << 20
# What is less is not worth asking every column for.
_READING_MIN = 1 << 20
# The bytes that stand before each text in a page, with its length.
_LENGTH = 4
# The encodings where each text stands in a page as it is, with those of levels; and those of texts in a dictionary.
_PLAIN, _DICTIONARIES = frozenset({"PLAIN", "RLE", "BIT_PACKED"}), frozenset({"PLAIN_DICTIONARY", "RLE_DICTIONARY"})
# Fields of a column's metadata, by their numbers in the format, and the header of the one that is looked for.
_DATA_PAGE, _DICTIONARY_PAGE, _PAGE_ENCODINGS, _SIZES, _TEXT_TOTAL_HEADER = 9, 11, 13, 16, 0x16
# A list of kind, encoding and number of pages, as every column has it: passed over at once, in a third of the time.
_PAGES = re.compile(rb"[\x1c-\xec](?:(?:\x15[\x80-\xff]*[\x00-\x7f]){3}\x00)+")
# Kinds of values in Thrift's compact protocol, in which a footer is written.
_TRUE, _FALSE, _INTEGERS, _DOUBLE, _BINARY, _LIST, _STRUCT = 1, 2, (4, 5, 6), 7, 8, 9, 12
_LONG_LIST = 15
_DECIMAL_DIGITS_SMALL = 38
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


def add_columns(sizes: GroupBytes, rows: int, kinds: Iterable[pa.DataType], keys: Iterable[pa.DataType]) -> GroupBytes:
    """Return what a row group takes where columns, and keys among them, are read in other types than the file has.

    What is made of a column is there beside the column; of texts only the offsets count, since these have their bytes.
    """
    more, more_keys = (
        int(rows * sum(_offset_bytes(kind) if (width := _fixed_bytes(kind)) is None else width for kind in each))
        for each in (kinds, keys)
    )
    decoded, of_keys, encoded, reading = sizes
    return GroupBytes(decoded + more, of_keys + more_keys, encoded + more_keys, reading)


def read_tail(stream: pa.NativeFile) -> bytes:
    """Return the end of a Parquet file, from where its footer begins, by one read of most files."""
    size = stream.size()
    tail: bytes = stream.read_at(min(_TAIL, size), max(size - _TAIL, 0))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < length <= size:
        tail = stream.read_at(length, size - length)
    return tail[-length:]


def check_columns(metadata: pq.FileMetaData, columns: Sequence[int], size: int) -> None:
    """Hold what a footer says of row groups and columns against each other and the size of its file.

    pyarrow's classes for columns end the process over what its reader of rows raises as an error. So that is called
    first, over a file that is closed: it goes through all columns before it asks for the bytes of the first.

    Args:
        metadata: What the footer says.
        columns: The leaf columns that are looked at, by their places in the schema.
        size: The bytes of the file.

    Raises:
        OSError, ValueError: They do not agree.
    """
    rows = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
    if sum(rows) != metadata.num_rows or min(rows, default=0) < 0:
        message = f"the footer says {metadata.num_rows:,} rows, and its row groups {sum(rows):,}"
        raise ValueError(message)
    # No byte is at that address, and none is read.
    closed = pa.BufferReader(pa.foreign_buffer(1, size))
    parquet = pq.ParquetFile(closed, metadata=metadata, pre_buffer=True)
    closed.close()
    with suppress(pa.ArrowInvalid):
        next(parquet.reader.iter_batches(1, range(len(rows)), columns, use_threads=False), None)


def check_chunk(chunk: pq.ColumnChunkMetaData, column: pq.ColumnSchema, rows: int) -> None:
    """Raise ValueError where a footer says of a column of a row group what its schema and the group do not."""
    is_flat = column.max_repetition_level == 0
    if (
        chunk.physical_type != column.physical_type
        or chunk.total_uncompressed_size < 0
        or (is_flat and chunk.num_values != rows)
    ):
        message = f"the footer says of column {column.path!r} what its schema and its row groups do not"
        raise ValueError(message)


class FooterReader:
    """Reads from footers of one schema what the row groups take, of the columns that a run reads.

    Columns of a fixed width take their rows times that. Texts take what they take in the file, and more where each
    stands there once, in a dictionary, or without what it shares with the one before. How long those are together is
    told by footers of most writers since 2025. Where one does not, the dictionary is read, and all texts are taken to
    be as long as its longest; if that is long, the length of each text is read.
    """

    def __init__(
        self, metadata: pq.FileMetaData, schema: pa.Schema, used: Collection[str], keys: Collection[str]
    ) -> None:
        self._used, self._keys = used, keys
        self._fixed, self._fixed_keys = 0.0, 0.0
        self._leaves: list[_Leaf] = []
        loose: dict[str, int] = {}
        for field in schema:
            width = _fixed_bytes(field.type)
            if field.name in used and width is None:
                loose[field.name] = _offset_bytes(field.type)
            elif field.name in used:
                self._fixed += width or 0.0
                self._fixed_keys += (width or 0.0) if field.name in keys else 0.0
        self._read = []
        for at in range(metadata.num_columns):
            column = metadata.schema.column(at)
            name = column.path
            while name not in used and "." in name:
                name = name.rpartition(".")[0]
            if name in loose:
                width, nested = _leaf_width(column), "." in column.path
                self._leaves.append(_Leaf(at, column.path, name in keys, nested, loose[name], width))
            if name in used:
                self._read.append(at)

    def read(
        self, metadata: pq.FileMetaData, tail: bytes, size: int, open_file: Callable[..., pq.ParquetFile]
    ) -> tuple[GroupBytes, ...]:
        """Return what each row group of a file takes.

        Args:
            metadata: What its footer says.
            tail: Its end, from where the footer begins.
            size: Its bytes.
            open_file: Opens it, with options of pyarrow's.

        Raises:
            OSError, ValueError: The footer does not agree with itself.
        """
        check_columns(metadata, self._read, size)
        texts = _TextLengths(tail, metadata, open_file)
        return tuple(self._group(metadata, at, texts) for at in range(metadata.num_row_groups))

    def _group(self, metadata: pq.FileMetaData, at: int, texts: _TextLengths) -> GroupBytes:
        group = metadata.row_group(at)
        decoded, keys = self._fixed * group.num_rows, self._fixed_keys * group.num_rows
        for leaf in self._leaves:
            chunk = group.column(leaf.at)
            check_chunk(chunk, metadata.schema.column(leaf.at), group.num_rows)
            found = chunk.num_values * leaf.width if leaf.width else _text_bytes(chunk, at, leaf, texts)
            found += leaf.offset * group.num_rows if leaf.nested else 0
            decoded, keys = decoded + found, keys + (found if leaf.is_key else 0)
        encoded = self._fixed_keys * group.num_rows
        if keys > _READING_MIN:
            encoded += sum(group.column(leaf.at).total_uncompressed_size for leaf in self._leaves if leaf.is_key)
        else:
            encoded = keys
        small = group.total_byte_size < _READING_MIN
        reading = 0 if small else sum(_reading_bytes(group.column(leaf)) for leaf in self._read)
        return GroupBytes(int(decoded), int(keys), int(min(keys, encoded)), reading)


class _Leaf(NamedTuple):
    """A column of a file, or one within lists or structs: bytes of an offset, and of a value, 0 where they differ."""

    at: int
    path: str
    is_key: bool
    nested: bool
    offset: int
    width: int


def _offset_bytes(kind: pa.DataType) -> int:
    told = str(kind)
    return 16 if "_view" in told else 8 if "large_" in told else 4


def _leaf_width(column: pq.ColumnSchema) -> int:
    width = int(_WIDTHS.get(column.physical_type, column.length))
    if column.logical_type.type == "DECIMAL":
        return max(width, 32 if column.precision > _DECIMAL_DIGITS_SMALL else 16)
    return width


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


def _text_bytes(chunk: pq.ColumnChunkMetaData, group: int, leaf: _Leaf, texts: _TextLengths) -> int:
    """Return the bytes of a row group's texts once they are decoded, with an offset of each."""
    values = int(chunk.num_values)
    offsets, stored = leaf.offset * values, int(chunk.total_uncompressed_size) + (leaf.offset - _LENGTH) * values
    if not chunk.has_dictionary_page and _PLAIN.issuperset(chunk.encodings):
        return stored
    total = texts.find_total(chunk)
    if total is not None:
        return offsets + total
    if not values or (chunk.statistics is not None and chunk.statistics.null_count == values):
        return stored
    lengths = texts.read_dictionary(group, leaf) if _DICTIONARIES.intersection(chunk.encodings) else None
    if lengths is not None and (longest := pc.max(lengths).as_py() or 0) < _TEXT_SHORT:
        return max(stored, offsets + longest * values)
    if chunk.total_uncompressed_size <= _MEASURED_MAX:
        return max(stored, texts.measure(group, leaf))
    return stored if lengths is None else max(stored, offsets + int(values * pc.mean(lengths).as_py()))


class _TextLengths:
    """How long the texts of a file are: as its footer tells, or as they are read."""

    def __init__(self, tail: bytes, metadata: pq.FileMetaData, open_file: Callable[..., pq.ParquetFile]) -> None:
        self._tail, self._metadata, self._open_file = tail, metadata, open_file
        self._tail_at = 0

    def find_total(self, chunk: pq.ColumnChunkMetaData) -> int | None:
        """Return how long all texts of a column of a row group are together; None where the footer does not tell.

        pyarrow reads and writes this field of the format, unencoded_byte_array_data_bytes, but has no name for it: it
        is looked for behind those that it has. Ask for columns in the order of the file: the search goes on from there.
        """
        dictionary = chunk.dictionary_page_offset
        known = b"\x16" + _varint(chunk.total_compressed_size) + b"\x26" + _varint(chunk.data_page_offset)
        known += b"" if dictionary is None else b"\x26" + _varint(dictionary)
        at = self._tail.find(known, self._tail_at)
        if at < 0:
            return None
        self._tail_at = at + len(known)
        last = _DATA_PAGE if dictionary is None else _DICTIONARY_PAGE
        # The same bytes may stand elsewhere in a footer, before what is no column's metadata.
        with suppress(IndexError, RecursionError):
            return _find_text_total(self._tail, self._tail_at, last)
        return None

    def read_dictionary(self, group: int, leaf: _Leaf) -> pa.Array | None:
        """Return the length of each text of a dictionary; None where pyarrow has none of it."""
        parquet = self._open_file(read_dictionary=[leaf.path], metadata=self._metadata, buffer_size=_PAGE)
        batch = next(parquet.iter_batches(1, [group], [leaf.path], use_threads=False))
        column = batch.column(0)
        while pa.types.is_nested(column.type):
            column = column.field(0) if pa.types.is_struct(column.type) else column.values
        return pc.binary_length(column.dictionary) if pa.types.is_dictionary(column.type) else None

    def measure(self, group: int, leaf: _Leaf) -> int:
        """Return the bytes of a row group's texts, decoded, from their lengths: one of the dictionary is read once."""
        # Within lists and structs pyarrow would keep the dictionary, whose texts are counted once.
        options = {} if leaf.nested else {"read_dictionary": [leaf.path]}
        parquet = self._open_file(metadata=self._metadata, **options)
        rows = 64 if leaf.nested else _MEASURED_ROWS
        found = 0
        for batch in parquet.iter_batches(rows, [group], [leaf.path], use_threads=False):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                lengths = pc.binary_length(column.dictionary).take(column.indices)
                found += leaf.offset * len(column) + (pc.sum(lengths).as_py() or 0)
            else:
                found += column.nbytes
        return found


def _varint(value: int) -> bytes:
    """Return a number as Thrift's compact protocol has it. Raises ValueError where it is negative."""
    if value < 0:
        message = f"the footer has an offset or a size of {value}"
        raise ValueError(message)
    value <<= 1
    out = bytearray()
    while value >> 7:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return an unsigned number, and where the next byte is."""
    value = shift = 0
    while (byte := data[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def _find_text_total(data: bytes, at: int, field: int) -> int | None:
    """Return what the rest of a column's metadata, behind this field of it, tells of the length of its texts."""
    while header := data[at]:
        at, field = at + 1, field + (header >> 4)
        if field == _SIZES:
            return _read_varint(data, at + 1)[0] >> 1 if data[at] == _TEXT_TOTAL_HEADER else None
        pages = _PAGES.match(data, at) if field == _PAGE_ENCODINGS else None
        at = pages.end() if pages else _skip_value(data, at, header & 0xF)
    return None


def _skip_value(data: bytes, at: int, kind: int) -> int:
    """Return where what follows a value begins."""
    if kind in _INTEGERS:
        while data[at] & 0x80:
            at += 1
        return at + 1
    if kind in (_TRUE, _FALSE):
        return at
    if kind == _BINARY:
        size, at = _read_varint(data, at)
        return at + size
    if kind == _STRUCT:
        return _skip_struct(data, at)
    if kind == _LIST:
        count, inner = data[at] >> 4, data[at] & 0xF
        count, at = _read_varint(data, at + 1) if count == _LONG_LIST else (count, at + 1)
        for _ in range(min(count, len(data))):
            at = _skip_value(data, at, inner)
        return at
    # What else the format has is one byte, or a number of eight.
    return at + (8 if kind == _DOUBLE else 1)


def _skip_struct(data: bytes, at: int) -> int:
    while header := data[at]:
        at += 1
        if header & 0xF in _INTEGERS:
            # As above: a call for each would take most of the time.
            while data[at] & 0x80:
                at += 1
            at += 1
        else:
            at = _skip_value(data, at, header & 0xF)
    return at + 1
