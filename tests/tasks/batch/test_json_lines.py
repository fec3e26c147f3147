"""Values of JSON are copied to the letter, in batch and in streams, and parsed once."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.model.encoding import encode
from tasks.batch.json_lines import (
    NotJsonLines,
    find_fields,
    parse_fields,
    parse_lines,
    quote_numbers,
    read_object,
    written_values,
)
from tasks.stream.score import build_answers
from tests.tasks.stream.messages import CONTRACT, KEYS, message, score

NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
BLANKS = st.text(" \t\r", max_size=2)
STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LITERALS = st.one_of(
    NUMBERS,
    st.sampled_from(["true", "false"]),
    st.builds(lambda text, ascii_only: json.dumps(text, ensure_ascii=ascii_only), STRINGS, st.booleans()),
)
NESTED = st.recursive(
    LITERALS,
    lambda inner: st.one_of(
        st.builds(
            lambda items, blank: "[" + f",{blank}".join(items) + blank + "]", st.lists(inner, max_size=3), BLANKS
        ),
        st.builds(
            lambda pairs, blank: "{" + ",".join(f"{json.dumps(k)}{blank}:{v}" for k, v in pairs) + "}",
            st.lists(st.tuples(STRINGS, inner), max_size=3),
            BLANKS,
        ),
    ),
    max_leaves=6,
)


def as_text(literal: str) -> str:
    """Return what a table holds of a value: of a string what it stands for, of others what is written."""
    return str(json.loads(literal)) if literal.startswith('"') else literal


@given(values=st.lists(st.tuples(NESTED, NESTED, BLANKS), min_size=1, max_size=5))
@example(values=[("1.10", "1e2", ""), ("9007199254740993.0", "-0", " "), ("36893488147419103232", "1E+400", "")])
@example(values=[('"1.10"', '"\\\\"', ""), ('"{\\"a\\": 1}"', '[1.10, {"b" : 2.0}]', "\t")])
def test_every_value_is_read_as_it_is_written(values: list[tuple[str, str, str]]) -> None:
    lines = [f'{{{blank}"k"{blank}:{first}{blank},"v":{second}}}{blank}' for first, second, blank in values]
    frame = parse_lines("\n".join(lines).encode(), {"k": pl.String(), "v": pl.String(), "none": pl.String()})

    assert [(as_text(first), as_text(second), None) for first, second, _ in values] == frame.rows()


@given(numbers=st.lists(NUMBERS, max_size=5))
def test_lists_hold_their_numbers_as_they_are_written(numbers: list[str]) -> None:
    frame = parse_lines(('{"v":[' + ", ".join(numbers) + "]}").encode(), {"v": pl.List(pl.String)})

    assert [(numbers,)] == frame.rows()


@given(literal=NESTED, deep=BLANKS)
@example(literal="36893488147419103232", deep="")
@example(literal="1.10", deep="")
@example(literal="-0", deep="")
@example(literal="1e999", deep="")
def test_a_key_of_a_stream_is_answered_as_it_is_written(literal: str, deep: str) -> None:
    payload = f'{{"a": 1.5,{deep} "id": {literal}, "b": 2}}'.encode()
    scored = score([message(payload)])
    (answer,) = build_answers(scored, CONTRACT, KEYS)
    (key,) = written_values(answer.payload, KEYS).values()
    table = scored.groups[0].group.table

    # Of a string the characters are kept; how they are escaped is the writer's own.
    assert (literal if not literal.startswith('"') else json.loads(literal)) == (
        key.decode() if not literal.startswith('"') else json.loads(key)
    )
    assert [as_text(literal)] == table["id"].to_pylist()


def test_of_a_name_that_stands_twice_the_first_counts_in_batch_and_in_streams() -> None:
    line = b'{"id": 1.50, "a": 1, "b": 2, "a": 3, "id": 7}'
    scored = score([message(line)])
    (answer,) = build_answers(scored, CONTRACT, KEYS)

    assert [("1.50", "1")] == parse_lines(line, {"id": pl.String(), "a": pl.String()}).rows()
    assert b'{"id":1.50,"score":5.0}' == answer.payload


@given(
    numbers=st.lists(
        st.tuples(NUMBERS, st.floats(width=32, allow_nan=False, allow_infinity=False)), min_size=1, max_size=5
    )
)
@example(numbers=[("1.00000017881393432617187499", 0.0), ("16777217.0000001", -0.0), ("7.038531e-26", 1.0)])
def test_a_number_is_parsed_once_into_the_nearest_float_of_the_contract(numbers: list[tuple[str, float]]) -> None:
    lines = [f'{{"a": {literal}, "b": {value!r}}}' for literal, value in numbers]
    frame = parse_lines("\n".join(lines).encode(), {"a": pl.String(), "b": pl.String()})
    encoded = encode(CONTRACT, frame.to_arrow(compat_level=pl.CompatLevel.oldest()))
    found = encoded.inputs["x"]

    assert [value for _, value in numbers] == found[:, 1].tolist()
    for (literal, _), got, code in zip(numbers, found[:, 0], encoded.flags.code_N, strict=True):
        exact = Fraction(literal)
        if code:
            assert abs(exact) > Fraction(float(np.finfo(np.float32).max))
            continue
        neighbours = (np.nextafter(got, np.float32(-np.inf)), np.nextafter(got, np.float32(np.inf)))
        off = abs(Fraction(float(got)) - exact)

        assert all(off <= abs(Fraction(float(each)) - exact) for each in neighbours if np.isfinite(each))


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), other=st.integers(-(2**24), 2**24))
def test_a_row_from_json_has_the_prediction_of_its_values(value: float, other: int) -> None:
    payload = json.dumps({"id": 1, "a": value, "b": other}).encode()
    (group,) = score([message(payload)]).groups
    with np.errstate(over="ignore"):
        expected = np.float32(value) + np.float32(2) * np.float32(other)

    if not group.flags.code_N[0]:
        assert expected == group.predictions["score"].reshape(-1)[0]


BAD = [
    *("01", "-01", "1.", ".5", "+1", "1e", "1e+", "--1", "1-2", "1.2.3", "1e5.0", "-", "e5", "1 2", "NaN", "Infinity"),
    *("-Infinity", "0x10", "1_000", "'1'", '"\\ud800"', '"\\udc00x"', '"\\x"', '"a\tb"', "[1,]", "{1:2}", "{1 :2}"),
    *("nul", "True", "", '"', '{"x":1', "[" * 2000 + "]" * 2000),
]


@pytest.mark.parametrize("value", BAD, ids=lambda value: value[:12])
def test_what_is_no_json_stays_none_in_batch_and_in_streams(value: str) -> None:
    line = f'{{"k":{value}}}'.encode()
    with pytest.raises(NotJsonLines):
        parse_lines(b'{"k":1}\n' + line, {"k": pl.String()})
    with pytest.raises(NotJsonLines):
        read_object(line)


@given(noise=st.text('{}[]":,\\ \n0123456789.-+eEtrufalsn', max_size=40))
def test_numbers_in_quotes_are_json_where_the_line_was_and_only_there(noise: str) -> None:
    def parsed(text: bytes) -> object:
        try:
            return json.loads(text, parse_float=str, parse_int=str)
        except ValueError:
            return None

    given_n = ['{"k":' + part + "}" for part in noise.split("\n")]
    quoted = bytes(quote_numbers("\n".join(given_n).encode())).decode().split("\n")
    # A quote that stays open changes what the lines after it mean: such a block is refused as a whole.
    if all(parsed(line.encode()) is not None for line in given_n):
        assert [parsed(line.encode()) for line in given_n] == [parsed(line.encode()) for line in quoted]
    if len(given_n) == 1:
        assert (parsed(given_n[0].encode()) is None) == (parsed(quoted[0].encode()) is None)


def test_a_number_that_no_float_can_hold_is_a_value_of_json_all_the_same() -> None:
    large = "1" * 5000

    assert [("1e999", large)] == parse_lines(
        f'{{"a":1e999,"b":{large}}}'.encode(), {"a": pl.String(), "b": pl.String()}
    ).rows()
    assert {"a": "1e999", "b": large} == read_object(f'{{"a":1e999,"b":{large}}}'.encode())


def test_pairs_of_escapes_are_one_character() -> None:
    assert [("\U0001f600",)] == parse_lines(b'{"k":"\\ud83d\\ude00"}', {"k": pl.String()}).rows()


def test_a_block_in_which_objects_are_rare_is_read_as_one_in_which_they_are_not() -> None:
    rows = [{"k": {"at": at} if at % 7 == 0 else at, "v": "[1]" if at % 3 else "x"} for at in range(100)]
    lines = b"\n\n".join(orjson.dumps(row) for row in rows)
    frame = parse_lines(lines, {"k": pl.String(), "v": pl.String()})

    assert [re.sub(" ", "", json.dumps(row["k"])) for row in rows] == frame["k"].to_list()
    assert [row["v"] for row in rows] == frame["v"].to_list()


FIELDS = st.sampled_from(["a", "b", "c", "a.b", "b.c", "a.b.c"])
OBJECTS = st.recursive(
    st.none() | st.sampled_from(["x", "{y", "1.50"]),
    lambda inner: st.dictionaries(FIELDS, inner, max_size=3),
    max_leaves=6,
)


def find_field(given: Any, path: str) -> Any:
    """Return what a path leads to; nothing at all, as an empty list, where it leads nowhere."""
    if not isinstance(given, dict) or path in given:
        return given[path] if isinstance(given, dict) else []
    splits = ((path[:at], path[at + 1 :]) for at, mark in enumerate(path) if mark == ".")
    return next((found for head, rest in splits if (found := find_field(given.get(head), rest)) != []), [])


@given(
    lines=st.lists(st.dictionaries(FIELDS, OBJECTS, max_size=3), min_size=1, max_size=4),
    paths=st.sampled_from([["a.b", "c"], ["a.b.c", "b.c"], ["a", "b.c", "a.b.c"]]),
    b=st.sampled_from(["b", "\\u0062"]),
)
@example(lines=[{"a": {"b": {"c": "x"}}}, {"a": None}, {"a": {"b": {"c": "1.50"}}}], paths=["a.b.c", "b.c"], b="b")
def test_a_path_leads_to_a_field_unless_one_has_the_path_as_its_name(
    lines: list[dict[str, Any]], paths: list[str], b: str
) -> None:
    def write(given: Any) -> str | None:
        return json.dumps(given).replace("b", b) if isinstance(given, dict) else given or None

    block = "\n".join(json.dumps(each).replace("b", b) for each in lines).encode()
    found = [[find_field(each, path) for path in paths] for each in lines]
    frame = parse_fields(block, dict.fromkeys(paths, pl.String()))

    assert [tuple(map(write, row)) for row in found] == frame.rows()
    assert {path for path, *values in zip(paths, *found, strict=True) if values != [[]] * len(lines)} == find_fields(
        block, paths
    )
