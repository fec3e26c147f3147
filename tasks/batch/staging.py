"""CSV, JSON lines and Arrow IPC become Parquet once, file by file, under the run's own folder.

These formats have no row groups to read at random, and a run that resumes needs them. The copy is
create-only and pinned like any source; it is deleted once the run is published. Values of text
formats stay text: the contract parses them, and a value that does not parse rejects its row.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import IO

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from serving.contract import Column, Contract, Frozen
from serving.errors import SourceCorrupt
from tasks.batch.dataset import Snapshot, SourceFile, corrupt_as_named
from tasks.storage import Storage, copy_pinned, open_storage

_ROWS_PER_GROUP = 1 << 16
_BLOCK = 16 << 20
_COPY_BYTES = 64 << 20


def stage(
    snapshot: Snapshot,
    destination: Storage,
    folder: str,
    contract: Contract,
    keys: tuple[str, ...],
) -> Snapshot:
    """Return a snapshot of Parquet copies of every file, each made unless it is there already.

    A file becomes copies of about 64 MiB and then a list of them, the commit of its staging, so
    memory is bounded whatever the size of the file. Raises SourceCorrupt by file name.
    """
    source = open_storage(snapshot.root)
    copies: list[_Copy] = []
    for file in snapshot.files:
        listing = f"{folder}/staged/{file.path}.json"
        if not destination.exists(listing):
            made = list(_convert(source, file, snapshot.format, contract.columns, keys, destination, folder))
            destination.put_new(listing, _Copies.dump_json(made))
        copies += _Copies.validate_json(destination.read(listing) or b"")
    found = {entry.path: entry for entry in destination.entries(f"{folder}/staged")}
    files = tuple(
        SourceFile(
            path=copy.path,
            size=found[copy.path].size,
            tag=found[copy.path].tag,
            origin=copy.origin,
            origin_row=copy.origin_row,
        )
        for copy in copies
    )
    return Snapshot(root=destination.url, format="parquet", files=files)


class _Copy(Frozen):
    path: str
    origin: str
    origin_row: int


_Copies = TypeAdapter(list[_Copy])


def _convert(
    source: Storage,
    file: SourceFile,
    kind: str,
    columns: tuple[Column, ...],
    keys: tuple[str, ...],
    destination: Storage,
    folder: str,
) -> Generator[_Copy]:
    where = source.address(file.path)
    with tempfile.TemporaryDirectory(prefix="overnight-") as scratch:
        raw = Path(scratch) / "raw"
        with raw.open("wb") as sink:
            copy_pinned(source, file.entry, sink)
        row = 0
        with corrupt_as_named(where):
            for at, (rows, data) in enumerate(_written(_read(raw, kind, columns, keys, where))):
                path = f"{folder}/staged/{file.path}/{at:05d}.parquet"
                destination.put_new(path, data)
                yield _Copy(path=path, origin=file.path, origin_row=row)
                row += rows


def _written(tables: Iterable[pa.Table]) -> Generator[tuple[int, memoryview]]:
    """Yield Parquet files of at most about 64 MiB, and the rows of each."""
    held: list[pa.Table] = []
    sink, writer, rows = pa.BufferOutputStream(), None, 0
    for table in _in_groups(tables, held):
        writer = writer or pq.ParquetWriter(sink, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=_ROWS_PER_GROUP)
        rows += table.num_rows
        if sink.tell() >= _COPY_BYTES:
            writer.close()
            yield rows, memoryview(sink.getvalue())
            sink, writer, rows = pa.BufferOutputStream(), None, 0
    if writer is not None:
        writer.close()
        yield rows, memoryview(sink.getvalue())


def _in_groups(tables: Iterable[pa.Table], held: list[pa.Table]) -> Generator[pa.Table]:
    for table in tables:
        held.append(table)
        if sum(part.num_rows for part in held) >= _ROWS_PER_GROUP:
            yield pa.concat_tables(held)
            held.clear()
    if held:
        yield pa.concat_tables(held)


def _read(raw: Path, kind: str, columns: tuple[Column, ...], keys: tuple[str, ...], where: str) -> Iterable[pa.Table]:
    if not raw.stat().st_size:
        return []
    if kind == "arrow":
        return _read_arrow(raw)
    if kind == "csv":
        return _read_csv(raw)
    return _read_jsonl(raw, columns, keys, where)


def _read_arrow(raw: Path) -> Generator[pa.Table]:
    with pa.OSFile(str(raw), "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            reader = pa.ipc.open_file(stream)
            yield reader.schema.empty_table()
            for at in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(at)])
        else:
            stream_reader = pa.ipc.open_stream(stream)
            yield stream_reader.schema.empty_table()
            for batch in stream_reader:
                yield pa.Table.from_batches([batch])


def _read_csv(raw: Path) -> Generator[pa.Table]:
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    with raw.open("rb") as stream:
        names = pa.csv.open_csv(stream, parse_options=parse).schema.names
    text = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    read = pa.csv.ReadOptions(block_size=_BLOCK)
    with pa.csv.open_csv(str(raw), read_options=read, parse_options=parse, convert_options=text) as reader:
        yield reader.schema.empty_table()
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _read_jsonl(raw: Path, columns: tuple[Column, ...], keys: tuple[str, ...], where: str) -> Generator[pa.Table]:
    with raw.open("rb") as stream:
        head = stream.read(_BLOCK)
        stream.seek(0)
        present = set(_parse_json(head[: head.rfind(b"\n") + 1] or head, None, where).columns)
        wanted = {column.name: _json_type(column) for column in columns if column.name in present}
        wanted |= {key: pl.String() for key in keys if key in present}
        if not wanted:
            yield pa.table({name: pa.nulls(0, pa.string()) for name in sorted(present)})
            return
        for block in _line_blocks(stream):
            yield _parse_json(block, wanted, where).to_arrow(compat_level=pl.CompatLevel.oldest())


def _json_type(column: Column) -> pl.DataType:
    return pl.List(pl.Float64) if column.shape else pl.String()


def _line_blocks(stream: IO[bytes]) -> Generator[bytes]:
    """Yield blocks of whole lines, about 16 MiB each."""
    rest = b""
    while block := stream.read(_BLOCK):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = block[cut:]
        else:
            rest += block
    if rest.strip():
        yield rest


def _parse_json(block: bytes, wanted: dict[str, pl.DataType] | None, where: str) -> pl.DataFrame:
    try:
        return pl.read_ndjson(io.BytesIO(block), schema=wanted, infer_schema_length=None if wanted else 1000)
    except pl.exceptions.PolarsError as error:
        message = (
            f"{where} must be JSON lines, one object a line, got: {str(error).splitlines()[0][:300]}. Mend the file."
        )
        raise SourceCorrupt(message) from error
