"""CSV, JSON lines and Arrow IPC as tables, read from front to back in blocks.

Values of text formats stay text: the contract parses them, and a value that does not parse rejects its row.
"""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc

from serving.errors import SchemaMismatch, SourceCorrupt
from tasks.batch.json_lines import NotJsonLines, find_fields, parse_lines

_BLOCK = 16 << 20
_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedColumns:
    """The columns that a run reads, and those of them that are lists.

    `found` is filled while JSON lines are read: those of the columns that a line has had so far.
    """

    names: tuple[str, ...]
    lists: frozenset[str]
    found: set[str] = field(default_factory=set)


def read_tables(raw: Path, kind: str, wanted: RequestedColumns, where: str) -> Iterable[pa.Table]:
    """Return the rows of a file as tables of one schema, each at most about 16 MiB of text or one Arrow batch.

    `where` is the file's address for messages. JSON lines have the wanted columns, which may be null throughout.
    Raises SourceCorrupt for lines that are not JSON objects, SchemaMismatch where no column is wanted of JSON
    lines; Arrow's own errors come through.
    """
    if not raw.stat().st_size:
        return []
    if kind == "arrow":
        return _read_arrow(raw)
    if kind == "csv":
        return _read_csv(raw, where)
    return _read_jsonl(raw, wanted, where)


def _read_arrow(raw: Path) -> Generator[pa.Table]:
    with pa.OSFile(str(raw), "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            reader = pa.ipc.open_file(stream)
            batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(stream))
        for batch in batches:
            yield _decode_dictionaries(pa.Table.from_batches([batch]))


def _decode_dictionaries(table: pa.Table) -> pa.Table:
    """Return the values themselves: Parquet makes dictionaries of its own, and can't take one that holds a null."""
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def _read_csv(raw: Path, where: str) -> Generator[pa.Table]:
    read = pa.csv.ReadOptions(block_size=_BLOCK)
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    try:
        with pa.csv.open_csv(str(raw), read_options=read, parse_options=parse) as reader:
            names = reader.schema.names
    except pa.ArrowInvalid as error:
        if "Empty CSV" not in str(error):
            raise
        return
    text = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    with pa.csv.open_csv(str(raw), read_options=read, parse_options=parse, convert_options=text) as reader:
        last = ""
        for batch in reader:
            yield pa.Table.from_batches([batch])
            last = (batch.column(batch.num_columns - 1)[-1].as_py() or "") if batch.num_rows else last
    if "\n" in last and _quotes_are_odd(raw):
        # Arrow takes all that follows an open quote for one value, whatever rows are in it.
        message = f"{where} must close every quote, got one that stays open at {last[:_SHOWN]!r}. Repair the file."
        raise SourceCorrupt(message)


def _quotes_are_odd(raw: Path) -> bool:
    with raw.open("rb") as stream:
        return sum(block.count(b'"') for block in iter(lambda: stream.read(_BLOCK), b"")) % 2 == 1


def _read_jsonl(raw: Path, wanted: RequestedColumns, where: str) -> Generator[pa.Table]:
    types: dict[str, pl.DataType] = {
        name: pl.List(pl.String) if name in wanted.lists else pl.String() for name in wanted.names
    }
    line = 1
    with raw.open("rb") as stream:
        for block in line_blocks(stream):
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


def line_blocks(stream: IO[bytes]) -> Generator[bytes]:
    """Yield blocks of whole lines, about 16 MiB each."""
    rest = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    while block := stream.read(_BLOCK):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = block[cut:]
        else:
            rest += block
    if rest.strip():
        yield rest


def _parse_json(block: bytes, types: dict[str, pl.DataType], where: str, line: int) -> pl.DataFrame:
    try:
        return parse_lines(block, types)
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
            parse_lines(b"\n".join(lines[low:middle]), types)
        except NotJsonLines:
            high = middle
        else:
            low = middle
    return low, lines[low]
