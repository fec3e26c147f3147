"""CSV, JSON lines, Arrow IPC and Avro as tables, read from front to back in blocks.

Values of text formats stay text: the contract parses them, and a value that does not parse rejects its row. Text may be
compressed: it is decompressed as it is read, block by block, so that memory is bounded whatever it comes to.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc

from serving.errors import SchemaMismatch, SourceCorrupt, SourceFormat
from serving.option_words import give_option
from tasks.batch.avro import read_avro
from tasks.batch.json_lines import NotJsonLines, find_fields, parse_fields
from tasks.batch.options import CsvOptions

if TYPE_CHECKING:
    from _typeshed import SupportsRead

_BLOCK = 16 << 20
# A line of compressed text may be no longer: decompressed, it could be of any length.
_LINE_BYTES_MAX = 256 << 20
_SHOWN = 200
_CSV = CsvOptions()
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".arrows": "arrow",
    ".avro": "avro",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_TEXT = ("csv", "jsonl")
_DELIMITERS = ";\t|"


def find_format(path: str) -> str | None:
    """Return the format of a file by its name, None for another; only text is read where it is compressed."""
    suffix, compression = _split_suffixes(path)
    found = _FORMATS.get(suffix)
    return found if compression is None or found in _TEXT else None


def list_suffixes() -> list[str]:
    """Return the endings of names that are known."""
    return [*sorted(_FORMATS), *(f"{text}{packed}" for text in (".csv", ".jsonl") for packed in _COMPRESSIONS)]


def _split_suffixes(path: str) -> tuple[str, str | None]:
    """Return the ending of a name without that of its compression, and the compression."""
    name = PurePosixPath(path.lower())
    compression = _COMPRESSIONS.get(name.suffix)
    return (PurePosixPath(name.stem).suffix if compression else name.suffix), compression


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedColumns:
    """The columns that a run reads, and those of them that are lists.

    `found` is filled while JSON lines are read: those of the columns that a line has had so far.
    """

    names: tuple[str, ...]
    lists: frozenset[str]
    found: set[str] = field(default_factory=set)


def read_tables(
    raw: Path, kind: str, wanted: RequestedColumns, where: str, csv: CsvOptions = _CSV
) -> Iterable[pa.Table]:
    """Return the rows of a file as tables of one schema, each at most about 16 MiB of text or one Arrow batch.

    `where` is the file's address, for messages; its ending says whether the text is compressed. JSON lines have the
    wanted columns, which may be null throughout.
    Raises SourceCorrupt for lines that are not JSON objects, SchemaMismatch where no column is wanted of JSON
    lines; Arrow's own errors come through.
    """
    if not raw.stat().st_size:
        return []
    if kind in _TEXT:
        _check_uncompressed(raw, where)
    return _READERS[kind](raw, wanted, where, csv)


def _check_uncompressed(raw: Path, where: str) -> None:
    with raw.open("rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    if is_gzip and _split_suffixes(where)[1] is None:
        message = f"{where} must be text, got a file that gzip has compressed. Name it with .gz at its end."
        raise SourceFormat(message)


def _read_arrow(raw: Path, where: str) -> Generator[pa.Table]:
    with pa.OSFile(str(raw), "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            reader = pa.ipc.open_file(stream)
            batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(stream)
            batches = _iter_stream(reader, stream, where)
        for table in _as_tables(batches, reader.schema):
            # Parquet makes dictionaries of its own, and can't take one that holds a null.
            yield table.cast(pa.schema([field.with_type(_decode_type(field.type)) for field in table.schema]))


def _as_tables(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Generator[pa.Table]:
    """Yield each batch as a table; where there are none, a table without rows says what columns there are."""
    is_empty = True
    for batch in batches:
        is_empty = False
        yield pa.Table.from_batches([batch])
    if is_empty:
        yield schema.empty_table()


def _iter_stream(reader: pa.RecordBatchStreamReader, stream: pa.NativeFile, where: str) -> Generator[pa.RecordBatch]:
    """Yield the batches of an Arrow stream. Raises SourceCorrupt where it does not end with its mark, or goes on after.

    A file whose writer died between two batches has whole batches, and Arrow itself takes its end for the stream's.
    """
    while True:
        end = stream.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            break
        yield batch
    if stream.tell() == end or stream.tell() < stream.size():
        found = "none: its writer ended before it had written all" if stream.tell() == end else "more bytes after it"
        message = f"{where} must end with the mark of an Arrow stream, got {found}. Write the file again."
        raise SourceCorrupt(message)


def _decode_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_decode_type(field.type)) for field in kind])
    return kind.value_type if pa.types.is_dictionary(kind) else kind


@contextmanager
def _open_text(raw: Path, where: str, encoding: str = "utf-8") -> Generator[pa.NativeFile]:
    """Open a file of text as UTF-8, decompressed as its name says."""
    _, compression = _split_suffixes(where)
    with ExitStack() as stack:
        stream: pa.NativeFile = stack.enter_context(pa.OSFile(str(raw), "rb"))
        if compression is not None:
            stream = stack.enter_context(pa.CompressedInputStream(stream, compression))
        if encoding != "utf-8":
            stream = stack.enter_context(pa.transcoding_input_stream(stream, encoding, "utf-8"))
        yield stream


def _read_csv(raw: Path, wanted: RequestedColumns, where: str, csv: CsvOptions) -> Generator[pa.Table]:
    read = pa.csv.ReadOptions(block_size=_BLOCK, column_names=list(csv.column_names) or None)
    suffix, _ = _split_suffixes(where)
    parse = pa.csv.ParseOptions(
        delimiter=csv.delimiter or ("\t" if suffix == ".tsv" else ","),
        quote_char=csv.quote or False,
        newlines_in_values=True,
    )
    try:
        names = _read_names(raw, where, csv, read, parse)
        _check_delimiter(names, wanted, where, csv)
        text = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=["", *csv.null_values],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        last = ""
        with (
            _open_text(raw, where, csv.encoding) as stream,
            pa.csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=text) as reader,
        ):
            for table in _as_tables(reader, reader.schema) if names else ():
                yield table
                last = (table.column(table.num_columns - 1)[-1].as_py() or "") if table.num_rows else last
    except (pa.ArrowInvalid, UnicodeError) as error:
        if "Empty CSV" in str(error):
            return
        if isinstance(error, UnicodeError) or "UTF8" in str(error):
            raise SourceCorrupt(_explain_encoding(raw, where, csv)) from error
        raise
    if csv.quote is not None and "\n" in last and _quotes_are_odd(raw, where, csv):
        # Arrow takes all that follows an open quote for one value, whatever rows are in it.
        message = (
            f"{where} must close every quote, got one that stays open at {last[:_SHOWN]!r}. Repair the file; where "
            f"quotes have no meaning in it, give {give_option('csv', CsvOptions(quote=None))}."
        )
        raise SourceCorrupt(message)


def _read_names(
    raw: Path, where: str, csv: CsvOptions, read: pa.csv.ReadOptions, parse: pa.csv.ParseOptions
) -> list[str]:
    with (
        _open_text(raw, where, csv.encoding) as stream,
        pa.csv.open_csv(stream, read_options=read, parse_options=parse) as reader,
    ):
        return list(reader.schema.names)


def _check_delimiter(names: list[str], wanted: RequestedColumns, where: str, csv: CsvOptions) -> None:
    """Raise SourceFormat where a file has one column, whose name looks like several, and none that the run reads."""
    if len(names) != 1 or set(names) & set(wanted.names):
        return
    found = next((each for each in _DELIMITERS if each in names[0]), None)
    if found is not None and csv.delimiter is None:
        message = (
            f"{where} must have its values parted by commas, got a first line that is parted by {found!r}: "
            f"{names[0][:_SHOWN]!r}. Give {give_option('csv', CsvOptions(delimiter=found))}."
        )
        raise SourceFormat(message)


def _explain_encoding(raw: Path, where: str, csv: CsvOptions) -> str:
    with raw.open("rb") as stream:
        first = stream.read(4)
    likely = "utf-16" if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "cp1252"
    likely = "utf-8" if csv.encoding == likely else likely
    return (
        f"{where} must be text in {csv.encoding}, got bytes that are none. Say how it is encoded, by "
        f"{give_option('csv', CsvOptions(encoding=likely))}, for one, or repair it."
    )


def _quotes_are_odd(raw: Path, where: str, csv: CsvOptions) -> bool:
    quote, quotes = str(csv.quote).encode(), 0
    with _open_text(raw, where, csv.encoding) as stream:
        while block := stream.read(_BLOCK):
            quotes += block.count(quote)
    return quotes % 2 == 1


def _read_jsonl(raw: Path, wanted: RequestedColumns, where: str) -> Generator[pa.Table]:
    types: dict[str, pl.DataType] = {
        name: pl.List(pl.String) if name in wanted.lists else pl.String() for name in wanted.names
    }
    line = 1
    compressed = _split_suffixes(where)[1] is not None
    with _open_text(raw, where) as stream:
        for block in line_blocks(stream, _LINE_BYTES_MAX if compressed else None):
            if types:
                frame = _parse_json(block, types, where, line)
                _note_found(frame, block, wanted)
                yield frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            elif text := block.strip():
                message = f"{where} must hold a column that the run reads, got none; it begins {text[:_SHOWN]!r}."
                raise SchemaMismatch(message)
            line += block.count(b"\n")


def _note_found(frame: pl.DataFrame, block: bytes, wanted: RequestedColumns) -> None:
    """Add the columns that lines of a block have; only one that is null throughout may be in none."""
    missing = [name for name in wanted.names if name not in wanted.found]
    filled = {name for name in missing if frame[name].null_count() < frame.height}
    wanted.found.update(filled, find_fields(block, [name for name in missing if name not in filled]))


_READERS: dict[str, Callable[[Path, RequestedColumns, str, CsvOptions], Iterable[pa.Table]]] = {
    "arrow": lambda raw, _wanted, where, _csv: _read_arrow(raw, where),
    "avro": lambda raw, wanted, where, _csv: read_avro(raw, wanted.names, where),
    "csv": _read_csv,
    "jsonl": lambda raw, wanted, where, _csv: _read_jsonl(raw, wanted, where),
}


def line_blocks(stream: SupportsRead[bytes], line_bytes_max: int | None = None) -> Generator[bytes]:
    """Yield blocks of whole lines, about 16 MiB each. Raises ValueError where a line is longer than is allowed."""
    rest = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    while block := stream.read(_BLOCK):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = block[cut:]
        else:
            rest += block
            if line_bytes_max is not None and len(rest) > line_bytes_max:
                message = f"a line of more than {line_bytes_max >> 20} MiB, which no row has"
                raise ValueError(message)
    if rest.strip():
        yield rest


def _parse_json(block: bytes, types: dict[str, pl.DataType], where: str, line: int) -> pl.DataFrame:
    try:
        return parse_fields(block, types)
    except NotJsonLines as error:
        at, text = _first_bad_line(block, types)
        message = (
            f"{where} must be JSON lines, one object a line, got in line {line + at}: {text[:_SHOWN]!r} "
            f"({str(error)[:200]}). Repair the file, then call again."
        )
        raise SourceCorrupt(message) from error


def _first_bad_line(block: bytes, types: dict[str, pl.DataType]) -> tuple[int, bytes]:
    """Find the first line that does not parse in a block that does not, by halving."""
    lines = block.split(b"\n")
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            parse_fields(b"\n".join(lines[low:middle]), types)
        except NotJsonLines:
            high = middle
        else:
            low = middle
    return low, lines[low]
