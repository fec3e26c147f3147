"""How text files may be written: delimiters, quotes, encodings, nulls and compression; and what of it is refused."""

from __future__ import annotations

import bz2
import csv as python_csv
import gzip
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.errors import SourceCorrupt, SourceFormat
from serving.model.contract import ColumnPolicy, Contract
from tasks.batch import formats
from tasks.batch.formats import RequestedColumns, find_format, read_tables
from tasks.batch.options import BatchOptions, CsvOptions
from tasks.batch.source import pin_source
from tasks.batch.staging import stage
from tasks.storage import open_storage
from tests.tasks.batch.small import a_contract, put

WANTED = RequestedColumns(names=("a",), lists=frozenset())
Compress = Callable[[bytes], bytes]
COMPRESSIONS: dict[str, Compress] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def read(folder: Path, data: bytes, csv: CsvOptions | None = None, name: str = "rows.csv") -> list[dict[str, object]]:
    """Return the rows of a file of these bytes."""
    raw = folder / "raw"
    raw.write_bytes(data)
    tables = list(read_tables(raw, find_format(name) or "csv", WANTED, name, csv or CsvOptions()))
    return pa.concat_tables(tables).to_pylist() if tables else []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.csv.gz", "csv"),
        ("a.TSV", "csv"),
        ("a/b.tsv.bz2", "csv"),
        ("a.jsonl.zst", "jsonl"),
        ("a.ndjson.GZ", "jsonl"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.txt.gz", None),
    ],
)
def test_the_ending_says_format_and_compression(name: str, expected: str | None) -> None:
    assert expected == find_format(name)


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_text_has_the_rows_of_the_text(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_BLOCK", 64)
    compress = COMPRESSIONS[ending]

    assert [{"a": str(at)} for at in range(100)] == read(
        tmp_path, compress(b"a\n" + b"".join(b"%d\n" % at for at in range(100))), name=f"rows.csv{ending}"
    )
    assert [{"a": str(at)} for at in range(100)] == read(
        tmp_path, compress(b"".join(b'{"a": %d}\n' % at for at in range(100))), name=f"rows.jsonl{ending}"
    )


def test_several_gzip_files_in_one_are_read_to_the_end(tmp_path: Path) -> None:
    assert [{"a": "1"}, {"a": "2"}] == read(tmp_path, gzip.compress(b"a\n1\n") + gzip.compress(b"2\n"), name="x.csv.gz")


# A process of its own, whose peak no other test has raised; prints the bytes that reading adds to it, and the error.
READ_ALONE = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from tasks.batch import formats
formats._LINE_BYTES_MAX = 64 << 20
small, endless, name = sys.argv[1:]
wanted = formats.RequestedColumns(names=("a",), lists=frozenset())
list(formats.read_tables(Path(small), name, wanted, f"small.{name}"))
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    list(formats.read_tables(Path(endless), name, wanted, f"endless.{name}.gz"))
except (ValueError, pa.ArrowInvalid) as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit, type(error).__name__)
"""


@pytest.mark.parametrize(("name", "head", "row"), [("csv", b"a\n", b"1\n"), ("jsonl", b"", b'{"a": 1}\n')])
def test_text_that_decompresses_without_end_takes_little_memory_and_is_refused(
    tmp_path: Path, name: str, head: bytes, row: bytes
) -> None:
    small, endless = tmp_path / "small", tmp_path / "endless"
    small.write_bytes(head + row)
    with gzip.open(endless, "wb", compresslevel=1) as stream:
        stream.write(head)
        for _ in range(512):
            stream.write(b" " * (1 << 20))

    done = subprocess.run(
        [sys.executable, "-c", READ_ALONE, str(small), str(endless), name], capture_output=True, text=True, check=True
    )

    assert endless.stat().st_size < 8 << 20
    taken, error = done.stdout.split()
    assert error in {"ValueError", "ArrowInvalid", "SourceCorrupt"}
    assert int(taken) < 200 << 20


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")) | st.sampled_from('\n\t,;|"'), max_size=8)


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|^"),
    quote=st.sampled_from("\"'"),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"]),
    ending=st.sampled_from(list(COMPRESSIONS)),
)
def test_what_python_writes_comes_back_to_the_letter(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    delimiter: str,
    quote: str,
    encoding: str,
    ending: str,
) -> None:
    text = io.StringIO(newline="")
    writer = python_csv.writer(text, delimiter=delimiter, quotechar=quote, quoting=python_csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    data = COMPRESSIONS[ending](text.getvalue().encode(encoding))
    csv = CsvOptions(delimiter=delimiter, quote=quote, encoding=encoding)
    found = read(tmp_path_factory.mktemp("csv"), data, csv, f"rows.csv{ending}")

    assert [{"a": a, "b": b} for a, b in rows] == found


def test_a_file_named_tsv_has_tabs(tmp_path: Path) -> None:
    assert [{"a": "1,5", "b": "2"}] == read(tmp_path, b"a\tb\n1,5\t2\n", name="rows.tsv")
    assert [{"a": "1", "b": "2"}] == read(tmp_path, b"a;b\n1;2\n", CsvOptions(delimiter=";"), name="rows.tsv")


def test_texts_that_stand_for_null_do_so_without_quotes(tmp_path: Path) -> None:
    csv = CsvOptions(null_values=("NA", "n/a"))

    assert [{"a": None, "b": "NA"}, {"a": None, "b": None}, {"a": "NAN", "b": ""}] == read(
        tmp_path, b'a,b\nNA,"NA"\nn/a,\nNAN,""\n', csv
    )


def test_without_a_quote_a_quote_is_a_character(tmp_path: Path) -> None:
    assert [{"a": '"x', "b": '"'}] == read(tmp_path, b'a,b\n"x,"\n', CsvOptions(quote=None))


def test_files_without_a_line_of_names_take_those_that_are_given(tmp_path: Path) -> None:
    assert [{"a": "1", "b": "2"}, {"a": "3", "b": None}] == read(
        tmp_path, b"1,2\n3,\n", CsvOptions(column_names=("a", "b"))
    )


def test_other_encodings_are_read_and_bytes_that_are_none_are_refused(tmp_path: Path) -> None:
    data = "a\nMüller €\n".encode("cp1252")

    assert [{"a": "Müller €"}] == read(tmp_path, data, CsvOptions(encoding="cp1252"))
    with pytest.raises(SourceCorrupt, match=r"must be text in utf-8, .* csv=CsvOptions\(encoding='cp1252'\)"):
        read(tmp_path, data)
    with pytest.raises(SourceCorrupt, match=r"csv=CsvOptions\(encoding='utf-16'\)"):
        read(tmp_path, "a\nü\n".encode("utf-16"))
    with pytest.raises(SourceCorrupt, match=r"must be text in cp1252, .*encoding='utf-8'"):
        read(tmp_path, b"a\n\x81\n", CsvOptions(encoding="cp1252"))
    with pytest.raises(SourceFormat, match=r"Name it with \.gz at its end"):
        read(tmp_path, gzip.compress(b"a\n1\n"))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_first_line_that_is_parted_otherwise_says_how(tmp_path: Path, delimiter: str) -> None:
    with pytest.raises(SourceFormat) as refused:
        read(tmp_path, f"x{delimiter}a\n1{delimiter}2\n".encode())

    assert f"csv=CsvOptions(delimiter={delimiter!r})" in str(refused.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_compressed_files_are_staged_as_others_are(tmp_path: Path, kind: str) -> None:
    data = b"id,a\n1,2\n" if kind == "csv" else b'{"id": 1, "a": 2}\n'
    put(f"{tmp_path}/in", {f"a.{kind}.gz": gzip.compress(data), f"b.{kind}": data})
    snapshot = pin_source(f"{tmp_path}/in", f"{tmp_path}/out")
    made = stage(snapshot, open_storage(f"{tmp_path}/out"), "_overnight/key", a_contract("a"), ("id",))

    assert kind == snapshot.format
    assert [f"a.{kind}.gz", f"b.{kind}"] == [file.origin for file in made.files]


def test_how_csv_is_written_is_part_of_the_key_and_nothing_is_where_it_is_not_said() -> None:
    assert "csv" not in BatchOptions().key_fields()
    assert BatchOptions(csv=CsvOptions(delimiter=";")).key_fields() != BatchOptions(csv=CsvOptions()).key_fields()
    assert CsvOptions(encoding="UTF8") == CsvOptions(encoding="utf-8")


def test_a_comma_before_the_fraction_is_the_policy_of_every_column_and_changes_no_other_key() -> None:
    said = BatchOptions(csv=CsvOptions(delimiter=";", decimal=","), policies={"a": ColumnPolicy(cast="round")})
    point = BatchOptions(csv=CsvOptions(delimiter=";"))

    assert {"a": ("round", ","), "*": ("safe", ",")} == {
        name: (each.cast, each.decimal) for name, each in said.column_policies.items()
    }
    assert {} == point.column_policies
    assert "decimal" not in point.model_dump_json()


def test_copies_that_were_read_otherwise_are_others(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"a.csv": b"id,a\n1,NA\n"})
    snapshot, out = pin_source(f"{tmp_path}/in", f"{tmp_path}/out"), open_storage(f"{tmp_path}/out")
    contract: Contract = a_contract("a")
    plain = stage(snapshot, out, "_overnight/key", contract, ("id",))
    again = stage(snapshot, out, "_overnight/key", contract, ("id",), CsvOptions(null_values=("NA",)))

    assert {file.path for file in plain.files}.isdisjoint(file.path for file in again.files)
    assert plain == stage(snapshot, out, "_overnight/key", contract, ("id",))


@pytest.mark.parametrize(
    "given",
    [
        {"delimiter": "ab"},
        {"delimiter": "\n"},
        {"delimiter": "ü"},
        {"delimiter": '"'},
        {"quote": ","},
        {"encoding": "utf-9"},
        {"encoding": "base64"},
        {"header": True},
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CsvOptions.model_validate(given)


def test_one_name_is_a_list_of_one() -> None:
    options = BatchOptions.model_validate(
        {"key_columns": "id", "input_columns": {"x": "a"}, "csv": {"null_values": "NA"}}
    )

    assert (("id",), {"x": ("a",)}) == (options.key_columns, options.input_columns)
    assert options.csv == CsvOptions(null_values=("NA",))
    assert options == BatchOptions.model_validate_json(options.model_dump_json())
