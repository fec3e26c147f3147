"""Avro files as tables."""

from __future__ import annotations

import datetime as dt
import io
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pytest

from serving.errors import SchemaMismatch, SourceCorrupt
from tasks.batch import avro
from tasks.batch.avro import read_avro

UTC = dt.UTC
NOON = dt.datetime(2026, 5, 1, 12, 0, 0, 123_000, tzinfo=UTC)
POINT = {"type": "record", "name": "point", "fields": [{"name": "x", "type": "int"}]}


def write(types: dict[str, Any], rows: list[dict[str, Any]], codec: str = "deflate") -> bytes:
    """Return the bytes of a file in blocks of some rows."""
    fields = [{"name": name, "type": kind} for name, kind in types.items()]
    stream = io.BytesIO()
    fastavro.writer(stream, {"type": "record", "name": "row", "fields": fields}, rows, codec=codec, sync_interval=200)
    return stream.getvalue()


def read(folder: Path, data: bytes, *wanted: str) -> pa.Table:
    raw = folder / "raw"
    raw.write_bytes(data)
    return pa.concat_tables(read_avro(raw, wanted, "the/file"))


@pytest.mark.parametrize(
    ("kind", "values", "arrow"),
    [
        ("boolean", [True, False], pa.bool_()),
        ("int", [-(2**31)], pa.int32()),
        ("long", [2**63 - 1, -(2**63)], pa.int64()),
        ("float", [0.5], pa.float32()),
        ("double", [0.1], pa.float64()),
        ("string", ["é", ""], pa.string()),
        ("bytes", [b"\xff"], pa.binary()),
        (["null", "long"], [None, 5], pa.int64()),
        (["string", "null"], ["a", None], pa.string()),
        ({"type": "enum", "name": "e", "symbols": ["A", "B"]}, ["B"], pa.string()),
        ({"type": "fixed", "name": "f", "size": 3}, [b"abc"], pa.binary(3)),
        ({"type": "array", "items": ["null", "int"]}, [[1, None], []], pa.list_(pa.int32())),
        (["null", POINT], [{"x": 1}, None], pa.struct([("x", pa.int32())])),
        ({"type": "int", "logicalType": "date"}, [dt.date(1900, 1, 1)], pa.date32()),
        ({"type": "int", "logicalType": "time-millis"}, [dt.time(1, 2, 3)], pa.time32("ms")),
        ({"type": "long", "logicalType": "timestamp-millis"}, [NOON], pa.timestamp("ms", "UTC")),
        (["null", {"type": "long", "logicalType": "timestamp-micros"}], [NOON, None], pa.timestamp("us", "UTC")),
        ({"type": "long", "logicalType": "local-timestamp-micros"}, [NOON.replace(tzinfo=None)], pa.timestamp("us")),
        (
            {"type": "bytes", "logicalType": "decimal", "precision": 10, "scale": 2},
            [Decimal("-3.00")],
            pa.decimal128(10, 2),
        ),
    ],
)
def test_each_type_of_avro_is_one_of_arrow_and_keeps_its_values(
    kind: Any, values: list[Any], arrow: pa.DataType, tmp_path: Path
) -> None:
    found = read(tmp_path, write({"v": kind}, [{"v": value} for value in values]), "v")

    assert (arrow, values) == (found.schema.field("v").type, found["v"].to_pylist())


def test_a_uuid_is_text(tmp_path: Path) -> None:
    key = str(uuid.UUID(int=7))
    kind = ["null", {"type": "string", "logicalType": "uuid"}]

    assert [key, None] == read(tmp_path, write({"v": kind}, [{"v": key}, {"v": None}]), "v")["v"].to_pylist()


@pytest.mark.parametrize("codec", ["null", "deflate"])
def test_only_the_columns_that_are_wanted_are_read_block_by_block_and_none_of_them_is_all(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avro, "_ROWS", 40)
    data = write({"id": "long", "odd": ["int", "string"]}, [{"id": at, "odd": "x"} for at in range(300)], codec)

    assert {"id": list(range(300))} == read(tmp_path, data, "id", "other").to_pydict()
    with pytest.raises(SchemaMismatch, match=r"the/file must have columns of one type each.*got odd \(\['int', 'str"):
        read(tmp_path, data, "other")
    assert (0, ["id"]) == ((empty := read(tmp_path, write({"id": "long"}, []))).num_rows, empty.column_names)


def test_a_file_that_ends_within_a_block_or_has_a_wrong_count_or_mark_is_refused(tmp_path: Path) -> None:
    data = write({"id": "long"}, [{"id": at} for at in range(300)], "null")
    (tmp_path / "raw").write_bytes(data)
    with (tmp_path / "raw").open("rb") as stream:
        starts = {block.offset for block in fastavro.block_reader(stream)}
    cut = [data[:end] for end in range(len(data)) if end not in starts]
    first = min(starts)
    fewer = data[:first] + bytes([data[first] - 2]) + data[first + 1 :]

    # The mark after a block is random, so any byte may be its last already.
    other_mark = data[:-1] + bytes([data[-1] ^ 1])

    for wrong in [*cut, fewer, other_mark, b"Obj\x01"]:
        with pytest.raises(SourceCorrupt, match="the/file must be a whole Avro file"):
            read(tmp_path, wrong, "id")
