"""The contract between a table and a model: which column feeds which input, cast how, null or not.

Shapes: N rows, F features; an input is [N, *shape], an output is [N, *shape].
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from serving.errors import SchemaMismatch, list_shortly, suggest_name
from serving.option_words import give_option

TEXT_DTYPES = ("str", "binary")
_NAMES_SHOWN, _PROBLEMS_SHOWN = 20, 4
OPAQUE_DTYPES = (*TEXT_DTYPES, "datetime64[ns]")


class Frozen(BaseModel):
    """The base of every value that crosses a boundary: frozen, without unknown keys."""

    # Without the last, NaN and infinity would become null in JSON, and could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    # Type checkers take the fields for the parameters.
    if not TYPE_CHECKING:

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _suggest_fields(type(self), error) from None

        # Else pydantic would call it, slowly, for each value that it reads from JSON or finds within another.
        __init__.__pydantic_base_init__ = True


def _suggest_fields(kind: type[BaseModel], error: ValidationError) -> ValidationError:
    """Return the error of a call with the field that each unknown name may mean."""
    problems = error.errors(include_url=False)
    if not any(map(_is_unknown, problems)):
        return error
    told = [
        InitErrorDetails(
            type=_suggest_field(kind, each) if _is_unknown(each) else each["type"],
            loc=each["loc"],
            input=each["input"],
            ctx=each.get("ctx", {}),
        )
        for each in problems
    ]
    hides_input = kind.model_config.get("hide_input_in_errors", False)
    try:
        return ValidationError.from_exception_data(error.title, told, hide_input=hides_input)
    except KeyError:
        # A validator has a kind of error of its own, which can't be made again.
        return error


def _is_unknown(problem: ErrorDetails) -> bool:
    return problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1


def _suggest_field(kind: type[BaseModel], problem: ErrorDetails) -> PydanticCustomError:
    meant = suggest_name(str(problem["loc"][0]), kind.model_fields)
    return PydanticCustomError("extra_forbidden", "Extra inputs are not permitted{meant}", {"meant": meant})


# Names of columns as a person gives them: a text alone is one name.
ColumnNames = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]


class ColumnPolicy(Frozen):
    """How one column is cast to what the model takes, and what becomes of its nulls."""

    cast: Literal["safe", "exact", "round"] = Field(
        default="safe",
        description="safe: only types whose every value fits (text is parsed). exact: any number, decimals too, a row "
        "whose value does not survive the cast is rejected. round: to the nearest value.",
    )
    decimal: Literal[".", ","] = Field(
        default=".",
        exclude_if=lambda mark: mark == ".",
        description="The mark before the fraction of a number that is text. With a comma, a text with a point is none.",
    )
    null: float | str | None = Field(
        default=None,
        description="reject: the row gets no prediction. keep: NaN for floats, a missing value for text, bytes and "
        "times; integers and booleans can't keep one, and are rejected. Anything else: the value that takes the "
        "null's place, a number for numbers, text for text and times. Without: keep for floats of a model that takes "
        "missing values, else reject.",
    )


class Column(Frozen):
    """One source column as the model takes it: `shape` is () for a scalar."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    required: bool = True
    policy: ColumnPolicy = ColumnPolicy()

    @property
    def may_be_null(self) -> bool:
        """Whether a null is a value to the model, or it does without the column."""
        if self.policy.null == "keep" and self.required:
            return self.dtype in OPAQUE_DTYPES or self.dtype.startswith("float")
        return self.policy.null not in (None, "reject") or not self.required


class Input(Frozen):
    """One input of the model, [N, *shape]: several scalar columns side by side, or one column."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    columns: tuple[Column, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether scalar columns are stacked into [N, F]."""
        return len(self.shape) == 1 and all(column.shape == () for column in self.columns)


class Output(Frozen):
    """One output of the model, [N, *shape], and the column that it becomes.

    A row whose prediction is null is a reject where the output is required, else the null is its prediction. Among
    floats a null is NaN; among objects it is None. An output that is required has the JSON, and its runs the keys, that
    it had before there were others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    required: bool = Field(default=True, exclude_if=bool)

    @property
    def width(self) -> int:
        """The number of values of a row."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def arrow_type(self) -> pa.DataType:
        """The type of the column: a scalar, or a list of `width` values."""
        scalar = pa.string() if self.dtype == "str" else pa.from_numpy_dtype(np.dtype(self.dtype))
        return scalar if self.width == 1 else pa.list_(scalar, self.width)

    @property
    def has_objects(self) -> bool:
        """Whether its predictions are objects: text, and integers and booleans that may be null."""
        return self.dtype == "str" or not (self.required or self.dtype.startswith("float"))

    def make_empty(self, rows: int) -> npt.NDArray[Any]:
        """Return the predictions of rows that have none, [rows, *shape]: zeros, or None where they are objects."""
        dtype = np.dtype(object if self.has_objects else self.dtype)
        return np.full((rows, *self.shape), None if self.has_objects else 0, dtype)


class Contract(Frozen):
    """The inputs and outputs of a model, column by column, and the params that a call gives it.

    A contract without params has the JSON, and its calls the run keys, that it had before there were any.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    params: dict[str, JsonValue] = Field(default_factory=dict, exclude_if=operator.not_)

    def __hash__(self) -> int:
        # Values of params may be lists and objects, which have no hash.
        return hash((self.inputs, self.outputs, frozenset(self.params)))

    @property
    def columns(self) -> tuple[Column, ...]:
        """Every source column that the model reads, once each."""
        seen = {column.name: column for value in self.inputs for column in value.columns}
        return tuple(seen.values())

    @property
    def nullable(self) -> frozenset[str]:
        """The names of source columns that may be null, for every input that they feed."""
        columns = [column for value in self.inputs for column in value.columns]
        refused = {column.name for column in columns if not column.may_be_null}
        return frozenset(column.name for column in columns) - refused

    @property
    def nulls_kept(self) -> tuple[str, ...]:
        """The columns whose nulls the model gets as missing values."""
        return tuple(column.name for column in self.columns if column.policy.null == "keep")

    def row_bytes(self) -> int:
        """Return the bytes of one encoded row, inputs and outputs together."""
        widths = [(value.dtype, int(np.prod(value.shape, dtype=np.int64))) for value in self.inputs]
        widths += [("str" if value.has_objects else value.dtype, value.width) for value in self.outputs]
        return sum(width * (64 if dtype in TEXT_DTYPES else np.dtype(dtype).itemsize) for dtype, width in widths)

    def require_outputs(self) -> Self:
        """Return the contract with every output required."""
        outputs = tuple(output.model_copy(update={"required": True}) for output in self.outputs)
        return self.model_copy(update={"outputs": outputs})

    def with_inputs_of(self, others: Iterable[Contract]) -> Contract:
        """Return the contract with the inputs of others too, those of challengers beside those of their model."""
        inputs = dict.fromkeys([*self.inputs, *(value for each in others for value in each.inputs)])
        return self.model_copy(update={"inputs": tuple(inputs)})

    def check(self, schema: pa.Schema, where: str) -> None:
        """Check the schema of a dataset, which messages call `where`.

        Raises:
            SchemaMismatch: Columns are missing or have wrong types; the message lists the first of them.
        """
        pairs = [(value, column) for value in self.inputs for column in value.columns]
        problems = [problem for value, column in pairs if (problem := _find_problem(value, column, schema))]
        if problems:
            listed = list_shortly(list(dict.fromkeys(problems)), _PROBLEMS_SHOWN)
            # A struct whose fields are listed needs no line of its own.
            found = [f"{field.name} ({field.type})" for field in schema if not _list_fields(field, schema)]
            message = f"{where} does not fit the model's signature:\n{listed}\nColumns found: {_join_names(found)}."
            raise SchemaMismatch(message)


def _list_fields(field: pa.Field, schema: pa.Schema) -> list[str]:
    """Return the names that a schema lists for the fields of a column that is a struct."""
    if not pa.types.is_struct(field.type):
        return []
    below = [each for each in schema if each.name.startswith(f"{field.name}.")]
    return [each.name for each in below if not pa.types.is_struct(each.type)]


def _join_names(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _find_problem(value: Input, column: Column, schema: pa.Schema) -> str | None:
    found = schema.get_all_field_indices(column.name)
    if len(found) > 1:
        return f"column {column.name!r} is in the schema {len(found)} times; rename all but one"
    if not found:
        return _describe_missing(value, column) + suggest_name(column.name, schema.names) if column.required else None
    source = schema.field(found[0]).type
    if fields := _list_fields(schema.field(found[0]), schema):
        shown = _join_names(fields)
        return f"column {column.name!r} must be {column.dtype}, got a struct; name one of its fields: {shown}"
    if column.shape:
        return _find_tensor_problem(column, source)
    return _find_scalar_problem(column, source)


def _describe_missing(value: Input, column: Column) -> str:
    if not column.shape:
        return f"column {column.name!r} ({column.dtype}) is missing"
    missing = f"column {column.name!r} ({column.dtype} {column.shape}) is missing"
    if column.name != value.name:
        return missing
    flat = len(column.shape) == 1
    names = f"the {column.shape[0]} columns that fill it, or one of lists" if flat else "the column of lists or tensors"
    return (
        f"{missing}; name {names} by {give_option('input_columns', {value.name: ['...']})}, or when the model is "
        f"logged, metadata={{'overnight': {{'columns': {{{value.name!r}: [...]}}}}}}"
    )


def _find_tensor_problem(column: Column, source: pa.DataType) -> str | None:
    width = int(np.prod(column.shape))
    storage = source.storage_type if isinstance(source, pa.BaseExtensionType) else source
    must = f"column {column.name!r} must hold {width} {column.dtype} values a row"
    value = Column(name=column.name, dtype=column.dtype, policy=column.policy)
    if isinstance(source, pa.FixedShapeTensorType) and _find_tensor_shape(source) != column.shape:
        return f"{must} in the shape {column.shape}, got {source}"
    if pa.types.is_fixed_size_list(storage):
        if storage.list_size != width:
            return f"{must}, got {source}"
    elif not is_list(storage):
        if width > 1:
            return f"{must}, got {source}"
        return _find_scalar_problem(value, source)
    return _find_scalar_problem(value, storage.value_type)


def is_list(source: pa.DataType) -> bool:
    """Return whether a type is a list, of any length or of one that is fixed."""
    return bool(pa.types.is_list(source) or pa.types.is_large_list(source) or pa.types.is_fixed_size_list(source))


def _find_tensor_shape(tensor: pa.FixedShapeTensorType) -> tuple[int, ...] | None:
    """Return the shape of a tensor type, None where its values are stored in another order."""
    order = tensor.permutation
    return None if order is not None and list(order) != sorted(order) else tuple(tensor.shape)


def is_text(source: pa.DataType) -> bool:
    """Return whether a type is text, in any of Arrow's layouts."""
    return bool(pa.types.is_string(source) or pa.types.is_large_string(source) or pa.types.is_string_view(source))


_OPAQUE_TYPES: dict[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    "str": (is_text,),
    "binary": (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    ),
    "datetime64[ns]": (pa.types.is_timestamp, pa.types.is_date, is_text),
}


def _find_scalar_problem(column: Column, source: pa.DataType) -> str | None:
    must = f"column {column.name!r} must be {column.dtype}, got {source}"
    if pa.types.is_dictionary(source):
        source = source.value_type
    if pa.types.is_null(source):
        return None
    if column.dtype in OPAQUE_DTYPES:
        return None if any(is_kind(source) for is_kind in _OPAQUE_TYPES[column.dtype]) else must
    if is_text(source):
        return None
    number = pa.types.is_boolean(source) or pa.types.is_integer(source) or pa.types.is_floating(source)
    if not number and not (pa.types.is_decimal(source) and column.dtype != "bool"):
        return f"{must}; cast it in the table first"
    if column.policy.cast != "safe" or casts_safely(source, column.dtype):
        return None
    allow = give_option("policies", {column.name: {"cast": "round"}})
    return f"{must}, which may lose digits; allow it with {allow}"


@functools.lru_cache(maxsize=256)
def casts_safely(source: pa.DataType, dtype: str) -> bool:
    """Return whether every value of a number type stays the same when it is cast to `dtype`.

    Stricter than numpy in one point: 64-bit integers above 2**53 do not fit float64. Decimals fit where they are whole
    and have so few digits: a float has no 0.1.
    """
    if pa.types.is_decimal(source):
        return bool(source.scale <= 0 and 10 ** (source.precision - source.scale) - 1 <= _find_largest_whole(dtype))
    source_dtype = np.dtype(source.to_pandas_dtype())
    target = np.dtype(dtype)
    if target.kind == "f" and source_dtype.kind in "iu" and source_dtype.itemsize >= target.itemsize:
        return False
    return bool(np.can_cast(source_dtype, target, "safe"))


def _find_largest_whole(dtype: str) -> int:
    """Return up to which whole number a type holds all, negative ones too; 0 where it has none of these."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return int(2 ** (np.finfo(kind).nmant + 1))
    return int(np.iinfo(kind).max) if kind.kind == "i" else 0


def find_fill_problem(column: Column) -> str | None:
    """Return what is wrong with the value that replaces a column's nulls, None where it fits the column's dtype."""
    if column.policy.null in (None, "reject", "keep"):
        return None
    try:
        convert_fill_value(column)
    except (ValueError, OverflowError):
        return f"{column.policy.null!r} for column {column.name!r} ({column.dtype})"
    return None


def convert_fill_value(column: Column) -> Any:
    """Return the value that replaces a column's nulls, as a value of numpy.

    Raises ValueError or OverflowError where it does not fit the column's dtype.
    """
    null, dtype = column.policy.null, column.dtype
    if dtype == "str" and isinstance(null, str):
        return null
    if dtype == "datetime64[ns]" and isinstance(null, str):
        return np.datetime64(pa.scalar(null).cast(pa.timestamp("ns")).value, "ns")
    if dtype in OPAQUE_DTYPES or null is None or isinstance(null, str):
        message = f"A null of a column of {dtype} can't become {null!r}."
        raise ValueError(message)
    with np.errstate(over="ignore"):
        value = np.dtype(dtype).type(null)
    changed = np.isfinite(null) != np.isfinite(value) if value.dtype.kind == "f" else value != null
    if changed:
        message = f"{null!r} must be a value of {dtype}."
        raise ValueError(message)
    return value
