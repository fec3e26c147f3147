from __future__ import annotations

from typing import Annotated, LiteralString

import numpy as np
import pyarrow as pa
import pytest
from pydantic import AfterValidator, ValidationError
from pydantic_core import PydanticCustomError

from serving.errors import SchemaMismatch
from serving.model.contract import (
    Column,
    ColumnPolicy,
    Contract,
    Frozen,
    Input,
    Output,
    casts_safely,
    find_fill_problem,
)
from tests.serving.toys import alone, column, stacked

NUMBERS = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)


def problems(contract: Contract, schema: pa.Schema) -> str:
    with pytest.raises(SchemaMismatch) as caught:
        contract.check(schema, "The table")
    return str(caught.value)


def accepts(contract: Contract, kind: pa.DataType) -> bool:
    try:
        contract.check(pa.schema([("a", kind)]), "The table")
    except SchemaMismatch:
        return False
    return True


def test_every_problem_of_a_table_is_in_one_message_that_lists_what_there_is() -> None:
    contract = alone(column("float32", "age"), column("str", "city"), column("int8", "plan"), column("bool", "ok"))
    message = problems(contract, pa.schema([("age", pa.float64()), ("city", pa.int32()), ("ok", pa.bool_())]))

    assert message.startswith("The table does not fit the model's signature:")
    assert "column 'age' must be float32, got double, which may lose digits" in message
    assert "column 'city' must be str, got int32" in message
    assert "column 'plan' (int8) is missing" in message
    assert "'ok'" not in message
    assert "Columns found: age (double), city (int32), ok (bool)." in message


@pytest.mark.parametrize(
    ("shape", "names"),
    [((3,), "the 3 columns that fill it, or one of lists"), ((2, 3), "the column of lists or tensors")],
)
def test_the_message_for_a_tensor_without_columns_explains_how_to_map_it(shape: tuple[int, ...], names: str) -> None:
    message = problems(alone(column("float32", "x", shape=shape)), pa.schema([("age", pa.float32())]))

    assert f"column 'x' (float32 {shape}) is missing; name {names} by input_columns={{'x': ['...']}} in the" in message
    assert "or when the model is logged, metadata={'overnight': {'columns': {'x': [...]}}}" in message


def test_a_tensor_that_is_mapped_to_a_column_misses_that_column() -> None:
    value = Input(name="x", dtype="float32", shape=(3,), columns=(column("float32", "features", shape=(3,)),))
    message = problems(Contract(inputs=(value,), outputs=()), pa.schema([("age", pa.float32())]))

    assert "column 'features' (float32 (3,)) is missing\n" in message


def test_a_refused_cast_names_the_policy_that_allows_it() -> None:
    message = problems(alone(column("float32")), pa.schema([("a", pa.float64())]))

    assert "allow it with policies={'a': {'cast': 'round'}} in the options" in message


@pytest.mark.parametrize("cast", ["exact", "round"])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_any_number_may_be_cast_to_any_other_where_the_policy_allows_it(cast: str, dtype: str) -> None:
    contract = alone(column(dtype, policy=ColumnPolicy(cast=cast)))

    assert all(accepts(contract, pa.from_numpy_dtype(np.dtype(given))) for given in NUMBERS)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("given", NUMBERS)
def test_a_safe_cast_is_one_that_keeps_the_extremes_of_its_type(given: str, dtype: str) -> None:
    kind = np.dtype(given)
    if kind.kind == "f":
        extremes = [float(np.finfo(kind).max), float(np.finfo(kind).smallest_subnormal), 0.5]
    else:
        extremes = [0, 1] if kind.kind == "b" else [np.iinfo(kind).min, np.iinfo(kind).max, np.iinfo(kind).max - 1]
    with np.errstate(all="ignore"):
        cast = np.array(extremes, dtype=given).astype(dtype)
    kept = [item.item() for item in cast] == extremes

    assert kept == casts_safely(pa.from_numpy_dtype(kind), dtype)
    assert kept == accepts(alone(column(dtype)), pa.from_numpy_dtype(kind))


@pytest.mark.parametrize(
    ("given", "dtype", "fit"),
    [
        ("int64", "float64", False),
        ("uint64", "float64", False),
        ("float64", "float32", False),
        ("int32", "float32", False),
        ("int32", "float64", True),
        ("int16", "float32", True),
        ("float32", "float64", True),
        ("uint32", "int64", True),
        ("uint64", "int64", False),
        ("bool", "float32", True),
        ("int8", "bool", False),
        ("float16", "float32", True),
    ],
)
def test_the_table_of_safe_casts(given: str, dtype: str, fit: bool) -> None:  # noqa: FBT001 - a column of the table
    assert fit == casts_safely(pa.from_numpy_dtype(np.dtype(given)), dtype)


@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [
        ("str", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.null()]),
        ("binary", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4), pa.null()]),
        ("datetime64[ns]", [pa.timestamp("s"), pa.timestamp("us", "UTC"), pa.date32(), pa.date64(), pa.null()]),
        ("datetime64[ns]", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]),
        ("int32", [pa.int32(), pa.string(), pa.string_view(), pa.dictionary(pa.int8(), pa.int16()), pa.null()]),
    ],
)
def test_every_layout_of_a_kind_of_value_is_taken(dtype: str, kinds: list[pa.DataType]) -> None:
    assert all(accepts(alone(column(dtype)), kind) for kind in kinds)


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.binary(), pa.list_(pa.int32()), pa.time32("s")])
def test_what_is_no_number_is_refused_for_numbers_whatever_the_policy(kind: pa.DataType) -> None:
    contract = alone(column("float32", policy=ColumnPolicy(cast="round")))

    assert f"column 'a' must be float32, got {kind}; cast it in the table first" in problems(
        contract, pa.schema([("a", kind)])
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "fit"),
    [
        (pa.decimal128(15, 0), "float64", True),
        (pa.decimal128(16, 0), "float64", False),
        (pa.decimal128(7, 0), "float32", True),
        (pa.decimal128(8, 0), "float32", False),
        (pa.decimal128(9, 2), "float64", False),
        (pa.decimal128(13, -2), "float64", True),
        (pa.decimal256(18, 0), "int64", True),
        (pa.decimal128(19, 0), "int64", False),
        (pa.decimal128(1, 0), "uint8", False),
    ],
)
def test_decimals_are_taken_where_every_value_fits_or_the_policy_allows_it(
    kind: pa.DataType, dtype: str, *, fit: bool
) -> None:
    assert fit == accepts(alone(column(dtype)), kind)
    assert all(accepts(alone(column(dtype, policy=ColumnPolicy(cast=cast))), kind) for cast in ("exact", "round"))
    assert not accepts(alone(column("bool", policy=ColumnPolicy(cast="round"))), kind)


@pytest.mark.parametrize("dtype", ["str", "binary", "datetime64[ns]"])
def test_numbers_are_not_made_into_text_bytes_or_times(dtype: str) -> None:
    assert not accepts(alone(column(dtype)), pa.int64())


def test_lists_must_have_the_width_and_a_fitting_value_type() -> None:
    contract = alone(column("float32", shape=(2, 3)))

    assert accepts(contract, pa.list_(pa.float32(), 6))
    assert accepts(contract, pa.list_(pa.int16()))
    assert accepts(contract, pa.large_list(pa.string()))
    assert accepts(contract, pa.fixed_shape_tensor(pa.float32(), (2, 3)))
    assert not accepts(contract, pa.list_(pa.float32(), 5))
    assert not accepts(contract, pa.list_(pa.float64()))
    assert not accepts(contract, pa.float32())
    assert not accepts(contract, pa.list_(pa.list_(pa.float32())))


def test_a_tensor_column_of_another_shape_or_order_is_refused_though_the_width_is_right() -> None:
    contract = alone(column("float32", shape=(2, 3)))

    assert not accepts(contract, pa.fixed_shape_tensor(pa.float32(), (3, 2)))
    assert not accepts(contract, pa.fixed_shape_tensor(pa.float32(), (3, 2), permutation=[1, 0]))


def test_an_optional_column_may_be_missing_but_not_of_a_wrong_type() -> None:
    contract = alone(Column(name="a", dtype="float32", required=False))
    contract.check(pa.schema([]), "The table")

    assert not accepts(contract, pa.date32())


def test_a_column_that_is_there_twice_is_refused() -> None:
    schema = pa.schema([("a", pa.float32()), ("a", pa.float32())])

    assert "column 'a' is in the schema 2 times" in problems(alone(column("float32")), schema)


def test_a_column_that_feeds_two_inputs_must_suit_both() -> None:
    inputs = (
        Input(name="whole", dtype="int8", columns=(column("int8"),)),
        Input(name="real", dtype="float64", columns=(column("float64"),)),
    )
    contract = Contract(inputs=inputs, outputs=())

    assert ("a",) == tuple(found.name for found in contract.columns)
    assert "column 'a' must be int8, got double" in problems(contract, pa.schema([("a", pa.float64())]))


def test_a_long_list_of_columns_is_cut_short() -> None:
    schema = pa.schema([(f"c{at}", pa.int8()) for at in range(50)])

    assert "c19 (int8) and 30 more." in problems(alone(column("float32", "z")), schema)


@pytest.mark.parametrize(
    ("dtype", "null", "suits"),
    [
        ("float32", 0.5, True),
        ("float32", float("nan"), True),
        ("float32", 1e300, False),
        ("float32", "abc", False),
        ("float32", "1", False),
        ("int32", -1.0, True),
        ("int32", 1.5, False),
        ("int8", 300.0, False),
        ("uint8", -1.0, False),
        ("int64", float("nan"), False),
        ("int64", 1e30, False),
        ("bool", 1.0, True),
        ("bool", 2.0, False),
        ("str", "unknown", True),
        ("str", 0.0, False),
        ("binary", "unknown", False),
        ("datetime64[ns]", "1970-01-01", True),
        ("datetime64[ns]", "1970-01-01 12:00:00.5", True),
        ("datetime64[ns]", "someday", False),
        ("datetime64[ns]", "9999-01-01", False),
        ("datetime64[ns]", 0.0, False),
    ],
)
def test_what_replaces_nulls_must_be_a_value_of_the_column(dtype: str, null: float | str, *, suits: bool) -> None:
    assert suits == (find_fill_problem(column(dtype, policy=ColumnPolicy(null=null))) is None)


def test_an_output_is_a_scalar_or_a_list_of_its_width() -> None:
    assert pa.float32() == Output(name="y", dtype="float32").arrow_type
    assert pa.string() == Output(name="y", dtype="str").arrow_type
    assert pa.list_(pa.int64(), 6) == Output(name="y", dtype="int64", shape=(2, 3)).arrow_type


def test_the_bytes_of_a_row_are_those_of_its_inputs_and_outputs() -> None:
    assert 3 * 4 + 4 == stacked(*(column("float32", name) for name in "abc")).row_bytes()
    assert 64 + 8 + 4 == alone(column("str", "s"), column("datetime64[ns]", "t")).row_bytes()


def test_an_unknown_field_is_refused_with_the_one_that_may_be_meant() -> None:
    with pytest.raises(ValidationError) as refused:
        ColumnPolicy(nulls="keep", decimals=",", zzz=1, cast="near")  # type: ignore[call-arg]

    said = {each["loc"]: (each["type"], each["msg"], each["input"]) for each in refused.value.errors()}
    meant = "Extra inputs are not permitted; did you mean {!r}?".format
    assert {
        ("cast",): ("literal_error", "Input should be 'safe', 'exact' or 'round'", "near"),
        ("nulls",): ("extra_forbidden", meant("null"), "keep"),
        ("decimals",): ("extra_forbidden", meant("decimal"), ","),
        ("zzz",): ("extra_forbidden", "Extra inputs are not permitted", 1),
    } == said


def test_all_problems_of_a_call_are_told_also_where_a_validator_has_an_error_of_its_own() -> None:
    def refuse(given: str) -> str:
        kind: LiteralString = "own"
        raise PydanticCustomError(kind, "Not {given}", {"given": given})

    class Given(Frozen):
        a: Annotated[str, AfterValidator(refuse)]

    with pytest.raises(ValidationError, match=r"(?s)2 validation errors.*Not x.*Extra inputs are not permitted"):
        Given(a="x", aa="y")  # type: ignore[call-arg]


def test_a_value_that_does_not_fit_is_refused_as_pydantic_does_and_so_is_what_lies_within_another() -> None:
    with pytest.raises(ValidationError, match="Input should be 'safe', 'exact' or 'round'"):
        ColumnPolicy(cast="near")  # type: ignore[arg-type]
    with pytest.raises(ValidationError) as refused:
        Column(name="a", dtype="int8", policy={"nulls": "keep"})  # type: ignore[arg-type]

    assert [("policy", "nulls")] == [each["loc"] for each in refused.value.errors()]
    # Or pydantic would make each value within another by a call in Python.
    assert not ColumnPolicy.__pydantic_custom_init__


def test_an_output_that_may_be_null_says_so_in_json_and_any_other_is_written_as_ever() -> None:
    optional = Output(name="y", dtype="int64", required=False)
    contract = stacked(column("float32", "a"), outputs=(optional,))

    assert {"name": "y", "dtype": "int64", "shape": (), "required": False} == optional.model_dump()
    assert {"name": "y", "dtype": "int64", "shape": ()} == contract.require_outputs().outputs[0].model_dump()
    assert contract == Contract.model_validate_json(contract.model_dump_json())


def test_a_contract_survives_the_way_through_json() -> None:
    contract = stacked(column("float32", "a", policy=ColumnPolicy(null=0.5)), column("float32", "b"))

    assert contract == Contract.model_validate_json(contract.model_dump_json())
