"""CSV, JSON lines and Arrow IPC as tables."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.errors import SchemaMismatch, SourceCorrupt
from tasks.batch import formats
from tasks.batch.formats import RequestedColumns, read_tables
from tasks.batch.json_lines import find_fields


def rows(folder: Path, kind: str, data: bytes, *names: str, lists: tuple[str, ...] = ()) -> list[dict[str, object]]:
    """Return the rows of a file of these bytes."""
    raw = folder / "raw"
    raw.write_bytes(data)
    wanted = RequestedColumns(names=(*names, *lists), lists=frozenset(lists))
    tables = list(read_tables(raw, kind, wanted, "the/file"))

    assert all(table.schema.equals(tables[0].schema) for table in tables)
    return pa.concat_tables(tables).to_pylist() if tables else []


@pytest.fixture(params=[5, 7, 64, 16 << 20], ids="blocks of {}".format)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks so small that they end in the middle of lines, and the real ones."""
    monkeypatch.setattr(formats, "_BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"id,a,b\n007,1.50,true\n-0, x ,1e5\n", [["007", "1.50", "true"], ["-0", " x ", "1e5"]]),
        (b'a,b\n"x, ""y""\nz\r\n",2\n"""",3\n', [['x, "y"\nz\r\n', "2"], ['"', "3"]]),
        (b'a,b\n,""\n"",\nNA,null\n', [[None, ""], ["", None], ["NA", "null"]]),
        (b"\xef\xbb\xbfa,b\n1,2\n3,4\n", [["1", "2"], ["3", "4"]]),
        (b"a,b\r\n1,2\r\n3,4\r\n", [["1", "2"], ["3", "4"]]),
        (b"a,b\n1,2\n3,4", [["1", "2"], ["3", "4"]]),
        (b"\na,b\n\n1,2\n\r\n\n3,4\n\n", [["1", "2"], ["3", "4"]]),
        (b'"a","b"\n"1","2"\n3,4\n', [["1", "2"], ["3", "4"]]),
    ],
    ids=[
        *("text as it stands", "quotes hold commas, quotes and newlines", "nothing is no empty text"),
        *("a BOM", "CRLF", "no last newline", "blank lines", "quoted names"),
    ],
)
def test_csv_values_are_the_text_of_their_fields(tmp_path: Path, data: bytes, expected: list[list[str | None]]) -> None:
    names = ["id", "a", "b"][-len(expected[0]) :]

    assert [dict(zip(names, row, strict=True)) for row in expected] == rows(tmp_path, "csv", data)


NO_ROWS = [
    *(("csv", data) for data in (b"a,b\n", b"a,b", b"\xef\xbb\xbfa,b\r\n", b"\n", b" \r\n\n", b"\xef\xbb\xbf")),
    ("jsonl", b" \n\r\n"),
]


@pytest.mark.parametrize(("kind", "data"), NO_ROWS)
def test_text_of_a_header_or_blank_lines_alone_has_no_rows(tmp_path: Path, kind: str, data: bytes) -> None:
    assert [] == rows(tmp_path, kind, data)


@pytest.mark.parametrize(("kind", "data"), [("csv", b""), ("jsonl", b""), ("arrow", b""), ("jsonl", b" \n\r\n")])
def test_a_file_without_bytes_or_lines_has_no_rows_of_a_column(tmp_path: Path, kind: str, data: bytes) -> None:
    assert [] == rows(tmp_path, kind, data, "a")


@pytest.mark.parametrize("line", [b"1", b"1,2,3", b'"1,2'])
def test_a_ragged_csv_row_is_an_error_of_arrow(tmp_path: Path, line: bytes) -> None:
    with pytest.raises(pa.ArrowInvalid, match=r"CSV parse error: .*Expected 2 columns, got "):
        rows(tmp_path, "csv", b"a,b\n1,2\n" + line + b"\n")


def test_a_csv_quote_that_stays_open_is_told_since_it_would_hide_rows(tmp_path: Path) -> None:
    told = r"^the/file must close every quote, got one that stays open at '2\\n3,4\\n'"
    with pytest.raises(SourceCorrupt, match=told):
        rows(tmp_path, "csv", b'a,b\n1,"2\n3,4\n')


@pytest.mark.parametrize("data", [b'a,b\n1,"x\ny"\n', b'a,b\n1,5" pipe\n', b'a,b\n5" pipe,2\n'])
def test_csv_quotes_that_hide_nothing_are_fine(tmp_path: Path, data: bytes) -> None:
    assert len(rows(tmp_path, "csv", data)) == 1


def test_csv_in_many_blocks_has_every_row_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_BLOCK", 64)
    data = b"a,b\n" + b"".join(b'%d,"x\n%d"\n' % (at, at) for at in range(500))

    assert [{"a": str(at), "b": f"x\n{at}"} for at in range(500)] == rows(tmp_path, "csv", data)


def test_a_csv_row_longer_than_a_mebibyte_is_read(tmp_path: Path) -> None:
    long = "y" * (3 << 20)

    assert [{"a": "1", "b": long}] == rows(tmp_path, "csv", f"a,b\n1,{long}\n".encode())


def test_csv_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceCorrupt, match="must be text in utf-8"):
        rows(tmp_path, "csv", b"a,b\n1,\xff\n")


@pytest.mark.usefixtures("block")
def test_json_lines_cut_anywhere_have_every_row_in_order(tmp_path: Path) -> None:
    data = b"".join(json.dumps({"id": at, "a": "x" * (at % 40)}).encode() + b"\n" for at in range(60))

    assert [{"id": str(at), "a": "x" * (at % 40)} for at in range(60)] == rows(tmp_path, "jsonl", data, "id", "a")


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"a":1}\n{"a":2}\n',
        b'{"a":1}\r\n{"a":2}\r\n',
        b'{"a":1}\n{"a":2}',
        b'\n\n{"a":1}\n  \n\r\n{"a":2}\n\n',
    ],
    ids=["a BOM", "CRLF", "no last newline", "blank lines"],
)
def test_json_lines_of_any_making_have_the_same_rows(tmp_path: Path, data: bytes) -> None:
    assert [{"a": "1"}, {"a": "2"}] == rows(tmp_path, "jsonl", data, "a")


def test_json_values_of_mixed_types_are_text(tmp_path: Path) -> None:
    values = ["007", 1, 2.5, True, None, {"x": [1, "y"]}, [1, 2], "ü\n", 12345678901234567890, -0.1]
    data = "".join(json.dumps({"a": value}) + "\n" for value in values).encode()

    assert ["007", "1", "2.5", "true", None, '{"x": [1, "y"]}', "[1, 2]", "ü\n", "12345678901234567890", "-0.1"] == [
        row["a"] for row in rows(tmp_path, "jsonl", data, "a")
    ]


def test_json_fields_that_a_line_lacks_are_null(tmp_path: Path) -> None:
    data = b'{"a":1}\n{"b":2,"unused":{"x":1}}\n{}\n{"unused":[1]}\n'

    assert [{"a": "1", "b": None}, {"a": None, "b": "2"}, {"a": None, "b": None}, {"a": None, "b": None}] == rows(
        tmp_path, "jsonl", data, "a", "b"
    )


def found_in(folder: Path, data: bytes, *names: str) -> set[str]:
    """Return which columns the lines of a file have."""
    raw = folder / "raw"
    raw.write_bytes(data)
    wanted = RequestedColumns(names=names, lists=frozenset())
    list(read_tables(raw, "jsonl", wanted, "the/file"))
    return wanted.found


@pytest.mark.usefixtures("block")
def test_names_are_found_in_whatever_line_they_are(tmp_path: Path) -> None:
    data = b'{"a":1}\n' * 20 + b'{"late":null}\n'

    assert {"a", "late"} == found_in(tmp_path, data, "a", "late", "never")


def escaped(name: str, how: str) -> str:
    """Return a name as a JSON string, every character or those that must be escaped."""
    if how == "all":
        units = name.encode("utf-16-be").hex()
        return '"' + "".join(f"\\u{units[at : at + 4].upper()}" for at in range(0, len(units), 4)) + '"'
    return json.dumps(name, ensure_ascii=how == "ascii")


@given(name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), how=st.sampled_from(["raw", "ascii", "all"]))
@example(name="gr\u00f6\u00dfe", how="ascii")
@example(name='"/\\', how="all")
def test_a_field_that_is_null_throughout_is_found_however_its_name_is_escaped(name: str, how: str) -> None:
    line = ("{" + escaped(name, how) + ' : null, "z": "x"}').encode()

    assert {name} == find_fields(b'{"o":1}\n' + line + b"\n", [name, name + "y", "y" + name])


@pytest.mark.parametrize(
    "line",
    [
        b'{"o": {"a": 1}}',
        b'{"o": "\\"a\\": 1"}',
        b'{"\\"a": 1}',
        b'{"o": "a"}',
        b'{"o": ["a"]}',
        b'{"A": 1}',
        b'{"o": "\\\\", "b": "a"}',
        b"{}",
    ],
)
def test_a_name_elsewhere_than_in_a_field_of_the_line_is_not_found(tmp_path: Path, line: bytes) -> None:
    assert set() == found_in(tmp_path, line + b"\n", "a")


@pytest.mark.parametrize("text", ['{"größe \\"x\\"": 1}', json.dumps({'größe "x"': 1})])
def test_a_json_name_may_be_escaped(tmp_path: Path, text: str) -> None:
    assert [{'größe "x"': "1"}] == rows(tmp_path, "jsonl", text.encode(), 'größe "x"')
    assert {'größe "x"'} == found_in(tmp_path, text.encode(), 'größe "x"')


def test_json_lists_are_lists_of_text(tmp_path: Path) -> None:
    data = b'{"v":[1,2.5]}\n{"v":[]}\n{"v":null}\n{}\n{"v":[null,"x"]}\n{"v":[9007199254740993]}\n'

    assert [["1", "2.5"], [], None, None, [None, "x"], ["9007199254740993"]] == [
        row["v"] for row in rows(tmp_path, "jsonl", data, lists=("v",))
    ]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    "line",
    [b'{"a":', b"not json", b"[1]", b"3", b"null", b'{"a":1}{"a":2}', b'{"a":1},', b'{"a":NaN}', b'{"a":"\xff"}'],
)
def test_a_line_that_is_no_json_object_is_told_by_its_number(tmp_path: Path, line: bytes) -> None:
    data = b'{"a":1}\n\n' * 10 + line + b"\n" + b'{"a":1}\n' * 10
    told = r"^the/file must be JSON lines, one object a line, got in line 21: b'"
    with pytest.raises(SourceCorrupt, match=told) as it:
        rows(tmp_path, "jsonl", data, "a")

    assert repr(line) in str(it.value)


def test_a_list_column_that_holds_no_list_is_told_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(SourceCorrupt, match=r"got in line 2: b'{\"v\":5}'"):
        rows(tmp_path, "jsonl", b'{"v":[1]}\n{"v":5}\n', lists=("v",))


def test_json_lines_of_which_no_column_is_wanted_are_a_mismatch(tmp_path: Path) -> None:
    told = r"the/file must hold a column that the run reads, got none; .*b'{\"x\":1}'"
    with pytest.raises(SchemaMismatch, match=told):
        rows(tmp_path, "jsonl", b'\n{"x":1}\n')


def ipc(table: pa.Table, *, stream: bool, batch_rows: int) -> bytes:
    sink = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return sink.getvalue()


@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_arrow_keeps_types_and_order(tmp_path: Path, stream: bool) -> None:  # noqa: FBT001
    table = pa.table(
        {
            "id": np.arange(10),
            "word": pa.array(["x", None, "y", "x", "z"] * 2).dictionary_encode(),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(60, dtype=np.float32).reshape(10, 2, 3)),
        }
    )
    raw = tmp_path / "raw"
    raw.write_bytes(ipc(table, stream=stream, batch_rows=3))
    found = pa.concat_tables(read_tables(raw, "arrow", RequestedColumns(names=(), lists=frozenset()), "x"))

    assert [pa.int64(), pa.string(), table.schema.types[2]] == found.schema.types
    assert table.to_pylist() == found.to_pylist()


@pytest.mark.parametrize("edit", [lambda data: data[:-8], lambda data: data + bytes(8), lambda data: data + data])
def test_an_arrow_stream_whose_end_is_not_the_file_s_is_corrupt(tmp_path: Path, edit: Callable[[bytes], bytes]) -> None:
    # The last value has the bytes of the mark.
    data = ipc(pa.table({"a": [1, 2, 2**32 - 1]}), stream=True, batch_rows=2)
    with pytest.raises(SourceCorrupt, match="must end with the mark of an Arrow stream, got"):
        rows(tmp_path, "arrow", edit(data))


def test_an_arrow_dictionary_that_holds_a_null_gives_nulls(tmp_path: Path) -> None:
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["x", None]))

    assert [{"word": "x"}, {"word": None}, {"word": "x"}] == rows(
        tmp_path, "arrow", ipc(pa.table({"word": words}), stream=True, batch_rows=2)
    )


@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_arrow_that_is_cut_short_is_an_error(tmp_path: Path, stream: bool, kept: float) -> None:  # noqa: FBT001
    data = ipc(pa.table({"a": np.arange(1000)}), stream=stream, batch_rows=100)
    with pytest.raises((pa.ArrowInvalid, OSError)):
        rows(tmp_path, "arrow", data[: int(len(data) * kept)])
