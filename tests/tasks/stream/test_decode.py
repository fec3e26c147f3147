"""What a message may be, and what becomes of one that is none."""

from __future__ import annotations

from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.model.contract import Column
from tasks.batch.formats import RequestedColumns, read_tables
from tasks.stream.decode import ROWS_MAX, Decoder, Reason, Unreadable, count_rows, is_arrow, read_arrow
from tasks.stream.score import write_arrow
from tests.tasks.stream.messages import CONTRACT, KEYS, arrow_rows, decoder, json_row, message

UNREADABLE = [
    (b"", Reason.NOT_JSON),
    (b"   ", Reason.NOT_JSON),
    (b"\n", Reason.NOT_JSON),
    (b"nonsense", Reason.NOT_JSON),
    (b'{"id": 1, "a": 1', Reason.NOT_JSON),
    (b'{"id": 1, "a": NaN, "b": 1}', Reason.NOT_JSON),
    (b'{"id": 1, "a": 1, "b": 1} {"id": 2, "a": 1, "b": 1}', Reason.NOT_JSON),
    (b'{"id": 1, "a": 1, "b": 1}\n{"id": 2, "a": 1, "b": 1}', Reason.NOT_JSON),
    (b"\xfe\xfd", Reason.NOT_JSON),
    (b"[1, 2]", Reason.NOT_AN_OBJECT),
    (b"7", Reason.NOT_AN_OBJECT),
    (b"null", Reason.NOT_AN_OBJECT),
    (b'{"a": 1, "b": 1}', Reason.KEY_MISSING),
    (b"\xff\xff\xff\xff", Reason.NOT_ARROW),
    (b"\xff\xff\xff\xff\x10\x00\x00\x00nonsense", Reason.NOT_ARROW),
]


@pytest.mark.parametrize(("payload", "reason"), UNREADABLE)
def test_what_is_no_row_is_poison_with_its_reason_and_the_others_are_read(payload: bytes, reason: Reason) -> None:
    bad = message(payload, 2)
    groups, poison = decoder().decode([json_row(1), bad, json_row(3)])

    assert [(bad, reason)] == [(each.message, each.reason) for each in poison]
    assert [[1, 3]] == [[each.position.number for each in group.messages] for group in groups]


def test_rows_of_json_are_read_as_the_batch_path_reads_json_lines(tmp_path: Path) -> None:
    values = [1.5, 2, "3", True, None, 1e300, -0.0, 0.1, 2**63, -1e-7, " 4 ", {"deep": 1}, [1, 2]]
    sent = [json_row(at, a=value) for at, value in enumerate(values)]
    ((group,), poison) = decoder().decode(sent)
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b"".join(each.payload + b"\n" for each in sent))
    (table,) = read_tables(lines, "jsonl", RequestedColumns(names=("a", "b", "id"), lists=frozenset()), "rows")

    assert [] == poison
    assert table.to_pydict() == group.table.to_pydict()
    assert list(range(len(values))) == [row["id"] for row in group.rows or ()]


COLUMNS = (Column(name="user.age", dtype="float32"), Column(name="a", dtype="float32"))
NESTED = CONTRACT.model_copy(update={"inputs": (CONTRACT.inputs[0].model_copy(update={"columns": COLUMNS}),)})
ROWS_WITHIN = [
    {"user": {"id": 1, "age": 10.5}, "a": 1},
    {"user": {"id": 2}, "a": 2},
    {"user": {"id": 3, "age": "30", "more": [1]}, "user.age": 4, "a": 3},
    {"user.id": 4, "user": {"id": 9, "age": {"years": 1}}, "a": 4},
    {"user": {"id": 5, "age": 1e300}, "a": None},
    {"user.id": 6, "user": None},
]


def test_fields_of_objects_are_read_by_their_paths_as_the_batch_path_reads_them(tmp_path: Path) -> None:
    sent = [message(orjson.dumps(row), at) for at, row in enumerate(ROWS_WITHIN)]
    ((group,), poison) = Decoder(NESTED, ("user.id",)).decode(sent)
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b"".join(each.payload + b"\n" for each in sent))
    wanted = RequestedColumns(names=("user.age", "a", "user.id"), lists=frozenset())
    (table,) = read_tables(lines, "jsonl", wanted, "rows")

    assert [] == poison
    assert table.to_pydict() == group.table.to_pydict()
    assert ["10.5", None, "4", '{"years":1}', "1e+300", None] == group.table["user.age"].to_pylist()
    assert [1, 2, 3, 4, 5, 6] == [row["user.id"] for row in group.rows or ()]


def test_a_key_within_an_object_is_written_as_the_message_writes_it() -> None:
    ((group,), _) = Decoder(NESTED, ("user.id",)).decode([message(b'{"user": {"id": 1.10}, "a": 1}')])

    assert b'{"user.id":1.10}' == orjson.dumps({"user.id": (group.rows or ())[0]["user.id"]})


def test_of_two_objects_of_one_name_the_first_counts() -> None:
    payloads = [b'{"user": {"id": 1}, "user": {"id": 2}}', b'{"user": 5, "user": {"id": 2}}']
    ((group,), _) = Decoder(NESTED, ("user.id",)).decode([message(each) for each in payloads])

    assert b"[1,null]" == orjson.dumps([row["user.id"] for row in group.rows or ()])
    assert ["1", None] == group.table["user.id"].to_pylist()


@pytest.mark.parametrize("payload", [b'{"user": null, "a": 1}', b'{"user": 7}', b'{"user": {"age": 1}}', b"{}"])
def test_a_key_that_no_object_holds_is_missing(payload: bytes) -> None:
    groups, poison = Decoder(NESTED, ("user.id",)).decode([message(payload)])

    assert [] == groups
    assert [Reason.KEY_MISSING] == [each.reason for each in poison]


def test_fields_of_structs_are_read_by_their_paths() -> None:
    kind = pa.struct([("id", pa.int64()), ("age", pa.float32())])
    user = pa.array([{"id": 1, "age": 10.5}, {"id": 2, "age": None}], kind)
    table = pa.table({"user": user, "a": pa.array([1.0, 2.0], pa.float32())})
    ((group,), poison) = Decoder(NESTED, ("user.id",)).decode([message(write_arrow(table))])

    assert [] == poison
    assert {"user.age": [10.5, None], "a": [1.0, 2.0], "user.id": [1, 2]} == group.table.to_pydict()


def test_json_may_be_written_over_several_lines() -> None:
    ((group,), _) = decoder().decode([message(b'{\n "id": 1,\n "a": 1.5,\n "b": 2\n}\n'), json_row(2)])

    assert ["1.5", "1.5"] == group.table["a"].to_pylist()


def test_a_value_that_is_no_scalar_is_the_contracts_to_reject() -> None:
    groups, poison = decoder().decode([json_row(1), json_row(2, a={"deep": 1}), json_row(3, a=[1, 2]), json_row(4)])

    assert 4 == sum(len(group.messages) for group in groups) + len(poison)
    assert "1.5" == groups[0].table["a"][0].as_py()


def test_arrow_messages_of_one_schema_are_one_group_and_another_schema_is_another() -> None:
    wide = arrow_rows(3, [4.0], extra=pa.array(["x"]), a=pa.array([4], pa.int8()))
    groups, poison = decoder().decode([arrow_rows(1, [1.0, 2.0]), arrow_rows(2, [3.0]), wide, json_row(4)])

    assert [] == poison
    assert [[4], [1, 2], [3]] == [[each.position.number for each in group.messages] for group in groups]
    assert [[0, 1], [0, 2, 3], [0, 1]] == [group.row_offsets.tolist() for group in groups]


def test_a_schema_that_stops_fitting_in_the_middle_is_poison_and_names_the_column() -> None:
    changed = arrow_rows(2, [1.0], a=pa.array([1.0], pa.float64()))
    gone = message(write_arrow(pa.table({"id": [1], "a": pa.array([1.0], pa.float32())})), 3)
    groups, poison = decoder().decode([arrow_rows(1, [1.0]), changed, gone, arrow_rows(4, [1.0])])

    assert [[1, 4]] == [[each.position.number for each in group.messages] for group in groups]
    assert [Reason.UNFIT, Reason.UNFIT] == [each.reason for each in poison]
    assert "column 'a' must be float32, got double" in poison[0].description
    assert "column 'b' (float32) is missing" in poison[1].description


def test_a_key_keeps_the_type_of_the_first_message_where_it_can() -> None:
    decode = decoder()
    decode.decode([arrow_rows(1, [1.0])])
    narrow = arrow_rows(2, [1.0], id=pa.array([7], pa.int8()))
    text = arrow_rows(3, [1.0], id=pa.array(["seven"]))
    groups, poison = decode.decode([narrow, text])

    assert 2 == len(Decoder(CONTRACT, KEYS).decode([narrow, text])[0])
    assert pa.int64() == groups[0].table.schema.field("id").type
    assert [(3, "id", Reason.KEY_CHANGES)] == [(p.message.position.number, p.column, p.reason) for p in poison]


def test_one_key_of_another_type_takes_none_of_its_neighbours_with_it() -> None:
    decode = decoder()
    decode.decode([arrow_rows(1, [1.0])])
    sent = [json_row(number) for number in range(2, 12)]
    sent[3], sent[8] = message(b'{"id": "five", "a": 1, "b": 2}', 5), message(b'{"id": "ten", "a": 1, "b": 2}', 10)
    groups, poison = decode.decode(sent)

    assert [5, 10] == [each.message.position.number for each in poison]
    assert [2, 3, 4, 6, 7, 8, 9, 11] == [each.position.number for group in groups for each in group.messages]
    assert [2, 3, 4, 6, 7, 8, 9, 11] == [key for group in groups for key in group.table["id"].to_pylist()]
    assert [2, 3, 4, 6, 7, 8, 9, 11] == [row["id"] for group in groups for row in group.rows or ()]


@pytest.mark.parametrize("rows", [0, ROWS_MAX + 1])
def test_an_arrow_message_has_rows_and_not_too_many(rows: int) -> None:
    with pytest.raises(Unreadable, match=f"got {rows:,} rows"):
        read_arrow(write_arrow(pa.table({"a": pa.nulls(rows)})))


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_no_bytes_make_the_decoder_raise_the_error_of_a_library(noise: bytes, at: int, byte: int) -> None:
    whole = bytearray(arrow_rows(1, [1.0, 2.0]).payload)
    whole[at % len(whole)] = byte
    sent = [message(noise, 1), message(bytes(whole), 2), message(bytes(whole[: at % len(whole)]), 3)]
    groups, poison = decoder().decode(sent)

    assert 3 == sum(len(group.messages) for group in groups) + len(poison)


def test_rows_are_counted_without_being_read() -> None:
    assert [1, 3, 1, 1] == [
        count_rows(payload)
        for payload in (b"{}", arrow_rows(1, [1.0, 2.0, 3.0]).payload, b"\xff\xff\xff\xffno", orjson.dumps([1, 2]))
    ]
    assert not is_arrow(b"{}")
