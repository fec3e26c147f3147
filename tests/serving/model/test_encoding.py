from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import serving.model.encoding
from serving.model.contract import Column, ColumnPolicy, Contract, Input, casts_safely, is_text
from serving.model.encoding import Encoded, Flags, encode
from tests.serving.reference import LOST, cast_one, parse_one
from tests.serving.toys import KEEP, REJECT, alone, column, stacked

TYPES = {
    **{name: pa.from_numpy_dtype(np.dtype(name)) for name in ("int8", "int32", "int64", "uint16", "uint64")},
    **{name: pa.from_numpy_dtype(np.dtype(name)) for name in ("bool", "float16", "float32", "float64")},
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
    "dictionary of numbers": pa.dictionary(pa.int32(), pa.int64()),
    "null": pa.null(),
}
DTYPES = ("bool", "int8", "int32", "int64", "uint8", "uint64", "float32", "float64")


def rejects(encoded: Encoded) -> list[tuple[str, str] | None]:
    """What each row is rejected for, None for a good one."""
    return [encoded.flags.reasons[code - 1] if code else None for code in encoded.flags.code_N]


def in_pieces(values: list[Any], kind: pa.DataType, cuts: list[int]) -> pa.ChunkedArray:
    """The values in chunks, each of them a slice out of the middle of a longer array."""
    edges = sorted({0, len(values), *(cut % (len(values) + 1) for cut in cuts)})
    pieces = [values[start:stop] for start, stop in pairwise(edges)] or [values]
    around = [None, *values[:2]]
    chunks = []
    for piece in pieces:
        whole = pa.array([*around, *piece, *around], kind.value_type if pa.types.is_dictionary(kind) else kind)
        whole = whole.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else whole
        chunks.append(whole.slice(len(around), len(piece)))
    return pa.chunked_array(chunks)


def values_of(name: str) -> st.SearchStrategy[Any]:
    kind = TYPES[name]
    if pa.types.is_null(kind):
        return st.none()
    if is_text(kind) or name == "dictionary":
        return st.sampled_from(["1", "-1", " 7 ", "20.0", "2e1", "0.5", "true", "no", "", "300", "1e300", "nan", "inf"])
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_dictionary(kind):
        return st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 300)
    info = np.iinfo(kind.to_pandas_dtype())
    return st.integers(int(info.min), int(info.max)) | st.integers(max(-2, int(info.min)), 100)


@dataclass(frozen=True)
class Case:
    """One column of a table: its Arrow type, values, cuts into chunks, and its place in the contract."""

    kind: str
    values: list[Any]
    cuts: list[int]
    dtype: str
    policy: ColumnPolicy


def fills(dtype: str) -> st.SearchStrategy[Any]:
    return st.sampled_from(["reject", "keep", 1.0] + ([0.25, -math.inf] if dtype.startswith("float") else []))


@st.composite
def tables(draw: st.DrawFn) -> list[Case]:
    rows = draw(st.integers(0, 12))
    cases = []
    for _ in range(draw(st.integers(1, 4))):
        kind, dtype = draw(st.sampled_from(sorted(TYPES))), draw(st.sampled_from(DTYPES))
        values = draw(st.lists(st.none() | values_of(kind), min_size=rows, max_size=rows))
        policy = ColumnPolicy(cast=draw(st.sampled_from(["exact", "round"])), null=draw(fills(dtype)))
        cases.append(Case(kind, values, draw(st.lists(st.integers(0, 12), max_size=3)), dtype, policy))
    return cases


def expected_value(case: Case, value: Any) -> Any:
    """What plain Python makes of one value: itself as the model takes it, or the reason of its reject."""
    if value is None:
        null, is_float = case.policy.null, case.dtype.startswith("float")
        if null in (None, "reject") or (null == "keep" and not is_float):
            return "null"
        return math.nan if null == "keep" else null
    source = TYPES[case.kind]
    source = source.value_type if pa.types.is_dictionary(source) else source
    if is_text(source):
        found = parse_one(value, case.dtype, case.policy.cast)
        return f"text that does not parse as {case.dtype}" if found is LOST else found
    found = cast_one(value, case.dtype, case.policy.cast)
    return f"a {source} that does not fit {case.dtype}" if found is LOST else found


@settings(max_examples=400)
@given(tables())
@example([Case("string", ["1e300", "inf", " 7 ", None], [2], "float32", KEEP)])
@example([Case("uint64", [2**64 - 1, 2**63, 2**53 + 1], [], "float64", ColumnPolicy(cast="exact"))])
@example([Case("int64", [-(2**63), 2**63 - 1, None], [1], "float64", ColumnPolicy(cast="exact"))])
def test_encoding_a_table_is_encoding_its_values_one_by_one(cases: list[Case]) -> None:
    columns = [column(case.dtype, f"c{at}", policy=case.policy) for at, case in enumerate(cases)]
    table = pa.table({f"c{at}": in_pieces(case.values, TYPES[case.kind], case.cuts) for at, case in enumerate(cases)})
    encoded = encode(alone(*columns), table)
    expected = [[expected_value(case, case.values[row]) for case in cases] for row in range(table.num_rows)]
    reasons = [next(((f"c{at}", one) for at, one in enumerate(row) if isinstance(one, str)), None) for row in expected]

    assert reasons == rejects(encoded)
    for row, values in enumerate(expected):
        for at, one in enumerate(values):
            assert isinstance(one, str) or np.array_equal(one, encoded.inputs[f"c{at}"][row].item(), equal_nan=True)


@settings(max_examples=100)
@given(tables())
def test_stacked_columns_have_the_values_of_separate_ones(cases: list[Case]) -> None:
    columns = [column("float64", f"c{at}", policy=case.policy) for at, case in enumerate(cases)]
    table = pa.table({f"c{at}": in_pieces(case.values, TYPES[case.kind], case.cuts) for at, case in enumerate(cases)})
    together, apart = encode(stacked(*columns), table), encode(alone(*columns), table)

    assert rejects(apart) == rejects(together)
    assert (table.num_rows, len(cases)) == together.inputs["x"].shape
    for at in range(len(cases)):
        assert np.array_equal(apart.inputs[f"c{at}"], together.inputs["x"][:, at], equal_nan=True)


def test_a_stacked_input_is_one_row_of_memory_a_column() -> None:
    table = pa.table({name: pa.array([1.0, 2.0], pa.float32()) for name in "abc"})
    x_NF = encode(stacked(*(column("float32", name) for name in "abc")), table).inputs["x"]

    assert 4 == x_NF.strides[0]
    assert x_NF.strides[1] % 4096


lists = st.none() | st.lists(st.none() | st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=2)
ragged = lists | st.lists(st.integers(0, 9), max_size=4)


@settings(max_examples=200)
@given(
    st.sampled_from([pa.list_(pa.int32(), 2), pa.list_(pa.int32()), pa.large_list(pa.int32())]).flatmap(
        lambda kind: st.tuples(
            st.just(kind), st.lists(lists if pa.types.is_fixed_size_list(kind) else ragged, max_size=12)
        )
    ),
    st.lists(st.integers(0, 12), max_size=3),
    st.sampled_from(["float32", "int16"]).flatmap(lambda dtype: st.tuples(st.just(dtype), fills(dtype))),
    st.sampled_from(["exact", "round"]),
)
def test_encoding_a_column_of_lists_is_encoding_them_one_by_one(
    kind_values: tuple[pa.DataType, list[Any]], cuts: list[int], dtype_null: tuple[str, Any], cast: str
) -> None:
    (kind, values), (dtype, null) = kind_values, dtype_null
    case = Case("int32", values, cuts, dtype, ColumnPolicy(cast=cast, null=null))
    encoded = encode(
        alone(column(dtype, "v", shape=(2,), policy=case.policy)), pa.table({"v": in_pieces(values, kind, cuts)})
    )

    for row, value in enumerate(values):
        if value is not None and len(value) != 2:
            assert ("v", "a list that has not 2 values") == rejects(encoded)[row]
            continue
        expected = [expected_value(case, item) for item in (value or [None, None])]
        reasons = {one if value is None else f"in its list, {one}" for one in expected if isinstance(one, str)}
        found = rejects(encoded)[row]
        assert (found[1] in reasons) if found else not reasons
        assert reasons or np.array_equal(expected, encoded.inputs["v"][row], equal_nan=True)


def test_an_arrow_tensor_is_taken_in_its_shape_wherever_it_is_cut() -> None:
    x = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(x)
    table = pa.table({"v": pa.chunked_array([tensors.slice(1, 2), tensors.slice(4)])})
    encoded = encode(alone(column("float64", "v", shape=(2, 3))), table)

    assert np.array_equal(x[[1, 2, 4]], encoded.inputs["v"])
    assert np.float64 == encoded.inputs["v"].dtype


@pytest.mark.parametrize("as_tensors", [True, False], ids=["tensors", "lists of a fixed size"])
def test_images_are_copied_once_an_arrow_chunk_and_never_once_a_row(
    as_tensors: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image_NHW = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(image_NHW)
    whole = tensors if as_tensors else tensors.storage
    copied: list[int] = []
    inner = serving.model.encoding._cast_chunk

    def counted(out_n: Any, column: Column, chunk: pa.Array, *rest: Any) -> None:
        copied.append(len(chunk))
        assert chunk.buffers()[1].address == tensors.storage.values.buffers()[1].address, "Arrow itself copies nothing"
        inner(out_n, column, chunk, *rest)

    monkeypatch.setattr(serving.model.encoding, "_cast_chunk", counted)
    table = pa.table({"v": pa.chunked_array([whole.slice(0, 100), whole.slice(100, 300), whole.slice(500)])})
    encoded = encode(alone(column("uint8", "v", shape=(28, 28))), table)

    assert [100 * 784, 300 * 784, 100 * 784] == copied
    assert np.array_equal(image_NHW[[*range(400), *range(500, 600)]], encoded.inputs["v"])
    assert encoded.inputs["v"].flags.writeable, "the place of a reject is overwritten"


def test_text_in_lists_is_parsed() -> None:
    table = pa.table({"v": pa.array([["1", " 2"], ["3", "x"], ["nan", "5"]])})
    encoded = encode(alone(column("float32", "v", shape=(2,))), table)

    assert [1.0, 2.0] == encoded.inputs["v"][0].tolist()
    assert [None, ("v", "in its list, text that does not parse as float32"), None] == rejects(encoded)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string())]
)
@pytest.mark.parametrize(
    ("policy", "seen", "reason"),
    [
        (REJECT, None, ("s", "null")),
        (KEEP, None, None),
        (ColumnPolicy(null="unknown"), "unknown", None),
        (ColumnPolicy(null=""), "", None),
    ],
)
def test_text_stays_text_and_its_nulls_follow_the_policy(
    kind: pa.DataType, policy: ColumnPolicy, seen: str | None, reason: tuple[str, str] | None
) -> None:
    table = pa.table({"s": in_pieces(["a", None, "", "ü"], kind, [1, 3])})
    encoded = encode(alone(column("str", "s", policy=policy)), table)

    assert ["a", "", "ü"] == encoded.inputs["s"][[0, 2, 3]].tolist()
    assert [None, reason, None, None] == rejects(encoded)
    assert reason or seen == encoded.inputs["s"][1]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2)])
def test_bytes_stay_bytes(kind: pa.DataType) -> None:
    encoded = encode(alone(column("binary", "b", policy=KEEP)), pa.table({"b": pa.array([b"\x00\xff", None], kind)}))

    assert [b"\x00\xff", None] == encoded.inputs["b"].tolist()
    assert [None, None] == rejects(encoded)


@pytest.mark.parametrize(
    ("kind", "value", "seen"),
    [
        (pa.timestamp("s"), dt.datetime(2020, 1, 2, 3, 4, 5), "2020-01-02T03:04:05"),  # noqa: DTZ001 - a time without a zone
        (pa.timestamp("us", "UTC"), dt.datetime(2020, 1, 2, tzinfo=dt.UTC), "2020-01-02"),
        (pa.timestamp("ms", "Europe/Berlin"), dt.datetime(2020, 1, 2, tzinfo=dt.UTC), "2020-01-02"),
        (pa.date32(), dt.date(1969, 12, 31), "1969-12-31"),
        (pa.date64(), dt.date(2020, 1, 2), "2020-01-02"),
    ],
)
def test_times_and_dates_are_nanoseconds_in_utc(kind: pa.DataType, value: Any, seen: str) -> None:
    table = pa.table({"t": in_pieces([value, None, value], kind, [1])})
    rejected = encode(alone(column("datetime64[ns]", "t")), table)
    kept = encode(alone(column("datetime64[ns]", "t", policy=KEEP)), table)
    filled = encode(alone(column("datetime64[ns]", "t", policy=ColumnPolicy(null="1970-01-01"))), table)

    assert np.datetime64(seen, "ns") == rejected.inputs["t"][0] == rejected.inputs["t"][2]
    assert [None, ("t", "null"), None] == rejects(rejected)
    assert [None] * 3 == rejects(kept) == rejects(filled)
    assert np.isnat(kept.inputs["t"][1])
    assert np.datetime64("1970-01-01", "ns") == filled.inputs["t"][1]


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_a_text_that_is_no_time_rejects_only_its_row(kind: pa.DataType) -> None:
    table = pa.table({"t": in_pieces(["2020-01-02", "someday", None, "2020-01-02T00:00Z"], kind, [3])})
    encoded = encode(alone(column("datetime64[ns]", "t")), table)

    assert [None, ("t", "text that does not parse as datetime64[ns]"), ("t", "null"), None] == rejects(encoded)
    assert np.datetime64("2020-01-02", "ns") == encoded.inputs["t"][0] == encoded.inputs["t"][3]


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("s", "UTC"), pa.date32()])
def test_a_time_that_does_not_fit_nanoseconds_rejects_only_its_row(kind: pa.DataType) -> None:
    days = [
        dt.date(9999, 12, 31),
        dt.date(2020, 1, 1),
        None,
        dt.date(1, 1, 1),
        dt.date(2262, 4, 11),
        dt.date(1677, 9, 22),
    ]
    table = pa.table({"t": pa.array(days, pa.date32()).cast(kind)})
    encoded = encode(alone(column("datetime64[ns]", "t")), table)
    far = ("t", f"a {kind} that does not fit datetime64[ns]")

    assert [far, None, ("t", "null"), far, None, None] == rejects(encoded)
    assert np.datetime64("2262-04-11", "ns") == encoded.inputs["t"][4]
    assert np.datetime64("1677-09-22", "ns") == encoded.inputs["t"][5]


def test_columns_of_text_are_stacked_too() -> None:
    columns = [column("str", "a"), column("str", "b", policy=ColumnPolicy(null="-"))]
    encoded = encode(stacked(*columns), pa.table({"a": ["longer", None], "b": [None, "y"]}))

    assert ["longer", "-"] == encoded.inputs["x"][0].tolist()
    assert [None, ("a", "null")] == rejects(encoded)


@pytest.mark.parametrize(
    ("dtype", "policy", "seen", "reason"),
    [
        ("float32", KEEP, math.nan, None),
        ("float32", ColumnPolicy(null=0.5), 0.5, None),
        ("int32", KEEP, None, ("z", "null")),
        ("int32", ColumnPolicy(null=7.0), 7, None),
        ("str", KEEP, None, None),
        ("str", ColumnPolicy(null="none"), "none", None),
        ("datetime64[ns]", KEEP, None, None),
    ],
)
def test_a_missing_optional_column_is_a_column_of_nulls(
    dtype: str, policy: ColumnPolicy, seen: object, reason: tuple[str, str] | None
) -> None:
    optional = Column(name="z", dtype=dtype, required=False, policy=policy)
    encoded = encode(alone(optional), pa.table({"a": [1, 2]}))

    assert [reason, reason] == rejects(encoded)
    assert reason or [seen] * 2 == pytest.approx(encoded.inputs["z"].tolist(), nan_ok=True)


@pytest.mark.parametrize("make", [pa.decimal32, pa.decimal64, pa.decimal128, pa.decimal256])
@pytest.mark.parametrize(
    ("dtype", "cast", "expected"),
    [
        ("float64", "round", [0.1, 0.25, -3.0, 1e6, None]),
        ("float64", "exact", ["lost", 0.25, -3.0, 1e6, None]),
        ("float32", "round", [np.float32(0.1), 0.25, -3.0, 1e6, None]),
        ("int16", "exact", ["lost", "lost", -3, "lost", None]),
        ("int16", "round", [0, 0, -3, "lost", None]),
    ],
)
def test_a_decimal_is_cast_as_the_policy_says(make: Any, dtype: str, cast: Any, expected: list[Any]) -> None:
    given = pa.array([Decimal(text) for text in ("0.10", "0.25", "-3.00", "1000000.00")] + [None], make(9, 2))
    encoded = encode(alone(column(dtype, policy=ColumnPolicy(cast=cast))), pa.table({"a": given}))
    lost, null = ("a", f"a {given.type} that does not fit {dtype}"), ("a", "null")
    found = encoded.inputs["a"].reshape(-1).tolist()

    assert [lost if value == "lost" else null if value is None else None for value in expected] == rejects(encoded)
    assert all(held == value for held, value in zip(found, expected, strict=True) if value not in ("lost", None))


def test_a_large_decimal_becomes_the_nearest_float() -> None:
    given = [Decimal("12345678901234567890.12345678"), Decimal(9007199254740993)]
    table = pa.table({"a": pa.array(given, pa.decimal128(28, 8))})
    encoded = encode(alone(column("float64", policy=ColumnPolicy(cast="round"))), table)

    assert list(map(float, given)) == encoded.inputs["a"].reshape(-1).tolist()


def test_text_has_a_comma_before_the_fraction_where_the_policy_says_so_and_then_no_point() -> None:
    table = pa.table({"a": ["1,5", "2", "-0,25", "1.500", "1.500,25", None]})
    encoded = encode(alone(column("float64", policy=ColumnPolicy(decimal=","))), table)

    assert [1.5, 2.0, -0.25] == encoded.inputs["a"].reshape(-1)[:3].tolist()
    assert [False] * 3 + [True] * 3 == [each is not None for each in rejects(encoded)]


def test_a_row_is_rejected_for_the_first_column_that_breaks_the_contract() -> None:
    table = pa.table({"a": pa.array([None, 1.0, None], pa.float32()), "b": pa.array([None, "x", "2"])})
    encoded = encode(stacked(column("float32", "a"), column("float32", "b")), table)

    assert [("a", "null"), ("b", "text that does not parse as float32"), ("a", "null")] == rejects(encoded)


@pytest.mark.parametrize(
    "contract", [alone(column("str")), stacked(column("float32")), alone(column("int8", shape=(3,)))]
)
def test_a_table_without_rows_is_encoded(contract: Contract) -> None:
    kind = pa.list_(pa.int8(), 3) if contract.columns[0].shape else pa.string()
    for chunks in ([], [pa.array([], kind)]):
        encoded = encode(contract, pa.table({"a": pa.chunked_array(chunks, kind)}))

        assert 0 == encoded.rows == len(next(iter(encoded.inputs.values())))


def test_one_column_may_feed_two_inputs() -> None:
    inputs = (
        Input(name="x", dtype="float32", shape=(1,), columns=(column("float32"),)),
        Input(name="id", dtype="int64", columns=(column("int64"),)),
    )
    encoded = encode(Contract(inputs=inputs, outputs=()), pa.table({"a": pa.array([1, 2], pa.int16())}))

    assert [[1.0], [2.0]] == encoded.inputs["x"].tolist()
    assert [1, 2] == encoded.inputs["id"].tolist()


def test_a_tensor_of_one_value_a_row_takes_values_as_it_takes_lists_of_one() -> None:
    values = pa.array([1.5, None, 3.0])
    lists = pa.array([[1.5], None, [3.0]])
    for policy, expected in ((REJECT, [None, ("a", "null"), None]), (ColumnPolicy(null=9.0), [None] * 3)):
        contract = alone(column("float64", shape=(1,), policy=policy))
        found = [encode(contract, pa.table({"a": given})) for given in (values, lists)]
        contract.check(pa.schema([("a", pa.float64())]), "The table")

        assert expected == rejects(found[0]) == rejects(found[1])
        assert [[1.5], [3.0]] == found[0].inputs["a"][[0, 2]].tolist() == found[1].inputs["a"][[0, 2]].tolist()
        assert policy == REJECT or [9.0] == found[0].inputs["a"][1].tolist() == found[1].inputs["a"][1].tolist()


def test_encoding_does_not_change_the_table() -> None:
    table = pa.table({"a": pa.array([1.0, None, 3.0], pa.float32()), "b": pa.array([["1"], None, ["x"]])})
    before = table.to_pydict()
    encode(alone(column("float32", policy=ColumnPolicy(null=9.0)), column("float32", "b", shape=(1,))), table)

    assert before == table.to_pydict()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_safe_cast_is_the_identity_on_values(dtype: str) -> None:
    for name in ("bool", "int8", "int32", "int64", "uint16", "uint64", "float16", "float32", "float64"):
        if casts_safely(TYPES[name], dtype):
            encoded = encode(alone(column(dtype)), pa.table({"a": pa.array([1, 0, 1], pa.int8()).cast(TYPES[name])}))

            assert [1, 0, 1] == encoded.inputs["a"].tolist()
            assert [None] * 3 == rejects(encoded)


parts = st.lists(
    st.lists(st.sampled_from([None, ("a", "null"), ("b", "null"), ("", "ValueError: x")]), max_size=5), min_size=1
)


@given(parts)
def test_the_flags_of_consecutive_rows_join_into_those_of_all(rows: list[list[tuple[str, str] | None]]) -> None:
    several = []
    for part in rows:
        flags = Flags.all_good(len(part))
        for row, pair in enumerate(part):
            if pair:
                flags.mark_row(row, *pair)
        several.append(flags)
    whole = Flags.concat(several)

    assert [pair for part in rows for pair in part] == [whole.reasons[c - 1] if c else None for c in whole.code_N]
    assert len(whole.reasons) == len(set(whole.reasons))


def test_a_row_keeps_its_first_reason() -> None:
    flags = Flags.all_good(4)
    flags.mark(np.array([True, True]), "a", "null", start=1)
    flags.mark(np.ones(4, dtype=np.bool_), "b", "null")
    flags.mark_row(0, "c", "null")

    assert [2, 1, 1, 2] == flags.code_N.tolist()
    assert [("a", "null"), ("b", "null")] == flags.reasons
