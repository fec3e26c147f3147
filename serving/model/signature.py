"""From an MLflow signature to the contract: which columns feed which input.

A tensor input of shape (-1, F) takes its columns, in this order of precedence, from the call's
`input_columns`, from the model's own metadata {"overnight": {"columns": {input: [names]}}}, or from one
list column of the input's name. A signature of columns names them itself. The exception is a single column without a
name, as text models have, which is named in the same two ways. Where that column is an object, as MLflow infers it from
a type hint such as `list[Row]`, each property is a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from mlflow import MlflowException
from mlflow.models import Model as MLmodel
from mlflow.types import ColSpec, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType, Array, DataType, Map, Object
from pydantic import JsonValue, TypeAdapter, ValidationError

from serving.errors import BadInput, ModelUnfit, suggest_name
from serving.model.contract import OPAQUE_DTYPES, Column, ColumnPolicy, Contract, Input, Output, find_fill_problem
from serving.option_words import give_option, name_option

_HOW_TO_LOG = (
    "Log it with one, for example:\n"
    "  signature = mlflow.models.infer_signature(inputs, predictions)\n"
    "  mlflow.<flavor>.log_model(model, name=..., signature=signature, input_example=inputs)"
)
_ALL_COLUMNS = "*"
_COLUMNS = TypeAdapter(dict[str, tuple[str, ...]])
_STATED = TypeAdapter(dict[str, Any])
_SCALARS: dict[object, str] = {
    DataType.boolean: "bool",
    DataType.integer: "int32",
    DataType.long: "int64",
    DataType.float: "float32",
    DataType.double: "float64",
    DataType.string: "str",
    DataType.binary: "binary",
    DataType.datetime: "datetime64[ns]",
}
# Numpy's letters for booleans, integers, floats and text.
_TENSOR_KINDS = "biufOUS"

Names = Mapping[str, tuple[str, ...]]
Policies = Mapping[str, ColumnPolicy]
Params = Mapping[str, JsonValue]


def read_contract(
    mlmodel: MLmodel,
    *,
    stack: bool,
    columns: Names,
    policies: Policies,
    params: Params | None = None,
    takes_missing: bool = False,
) -> Contract:
    """Build the contract of a logged model.

    Args:
        mlmodel: The logged model's description.
        stack: Whether the model takes tensors of numbers only, and a signature of columns becomes one [N, F] float32
            tensor, as in MLflow's pytorch flavour.
        columns: The columns of each tensor input, by input, where the caller names them.
        policies: How columns are cast and what becomes of nulls, by column or "*".
        params: Values of the signature's params, by name. One that is not given has its default there.
        takes_missing: Whether the model takes missing values, so that nulls of floats are kept unless a policy says
            otherwise.

    Raises:
        ModelUnfit: The signature is missing, or does not suffice.
        BadInput: A policy does not suit its column, or a param is not one of the signature's.
    """
    signature = mlmodel.signature
    if signature is None or signature.inputs is None or signature.outputs is None:
        found = "no signature"
        if signature is not None:
            found = f"a signature without {'inputs' if signature.inputs is None else 'outputs'}"
        message = f"A model must be logged with a signature of inputs and outputs, got {found}. {_HOW_TO_LOG}"
        raise ModelUnfit(message)
    inputs = _read_inputs(mlmodel, signature.inputs, stack=stack, columns=columns, policies=policies)
    read = [column for value in inputs for column in value.columns]
    _check_keys("policies", set(policies) - {_ALL_COLUMNS}, {column.name for column in read})
    if misfits := [problem for column in read if (problem := find_fill_problem(column))]:
        meant = (suggest_name(str(column.policy.null), ("reject", "keep")) for column in read)
        message = (
            f"null in {name_option('policies')} must be 'reject', 'keep' or a value of its column, which replaces its "
            f"nulls; got {'; '.join(dict.fromkeys(misfits))}{next(filter(None, meant), '. Correct it.')}"
        )
        raise BadInput(message)
    inputs = tuple(_choose_null_policies(value, takes_missing=takes_missing) for value in inputs)
    outputs = _read_outputs(signature.outputs)
    return Contract(inputs=inputs, outputs=outputs, params=_read_params(mlmodel, params or {}, is_torch=stack))


def _choose_null_policies(value: Input, *, takes_missing: bool) -> Input:
    """Return an input whose columns say what becomes of their nulls."""
    null = "keep" if takes_missing and value.dtype.startswith("float") else "reject"
    columns = tuple(
        column.model_copy(update={"policy": column.policy.model_copy(update={"null": null})})
        if column.policy.null is None
        else column
        for column in value.columns
    )
    return value.model_copy(update={"columns": columns})


def _check_keys(what: str, given: set[str], known: set[str]) -> None:
    if unknown := sorted(given - known):
        message = f"Each key of {what} must be one of {sorted(known)}, got {unknown}. Correct it there."
        raise ModelUnfit(message)


def _read_inputs(
    mlmodel: MLmodel, schema: Schema, *, stack: bool, columns: Names, policies: Policies
) -> tuple[Input, ...]:
    if schema.is_tensor_spec():
        inputs = _read_tensor_inputs(schema, _read_metadata_columns(mlmodel), columns, policies)
    elif is_unnamed(schema):
        inputs = (_read_unnamed_input(schema.inputs[0], columns or _read_metadata_columns(mlmodel), policies),)
    elif columns:
        message = (
            f"A model whose signature names its columns takes no {name_option('input_columns')}, got "
            f"{sorted(columns)}. Leave the option out, and rename the columns of the table where they differ."
        )
        raise ModelUnfit(message)
    else:
        inputs = _read_column_inputs(schema, policies)
    if not stack:
        return inputs
    if opaque := [value.name for value in inputs if value.dtype in OPAQUE_DTYPES]:
        message = f"A pytorch model must take numbers, got other inputs {opaque}. Log it with tensors of numbers."
        raise ModelUnfit(message)
    if schema.is_tensor_spec():
        return inputs
    floats = tuple(column.model_copy(update={"dtype": "float32"}) for value in inputs for column in value.columns)
    return (Input(name="input", dtype="float32", shape=(len(floats),), columns=floats),)


def _read_metadata_columns(mlmodel: MLmodel) -> dict[str, tuple[str, ...]]:
    try:
        stated = _STATED.validate_python((mlmodel.metadata or {}).get("overnight", {}))
        return _COLUMNS.validate_python(stated.get("columns", {}))
    except ValidationError:
        message = (
            'The model\'s metadata must be like {"overnight": {"columns": {"input": ["column", "another"]}}}, '
            f"got {mlmodel.metadata}. Log it again."
        )
        raise ModelUnfit(message) from None


def _find_policy(policies: Policies, column: str) -> ColumnPolicy:
    return policies.get(column, policies.get(_ALL_COLUMNS, ColumnPolicy()))


def _read_tensor_inputs(schema: Schema, stated: Names, columns: Names, policies: Policies) -> tuple[Input, ...]:
    specs = [spec for spec in schema.inputs if isinstance(spec, TensorSpec)]
    if len(specs) == 1 and specs[0].name is None and len(columns or stated) == 1:
        # A single input without a name takes the name that the call gives it, else the model's metadata.
        named = columns or stated
        return (_read_tensor_input(specs[0], next(iter(named)), named, policies),)
    names = [spec.name or f"input_{at}" for at, spec in enumerate(specs)]
    _check_keys("input_columns", set(columns), set(names))
    _check_keys("the columns in the model's metadata", set(stated), set(names))
    named = {**stated, **columns}
    return tuple(_read_tensor_input(spec, name, named, policies) for spec, name in zip(specs, names, strict=True))


def _read_tensor_input(spec: TensorSpec, name: str, named: Names, policies: Policies) -> Input:
    shape = tuple(int(size) for size in spec.shape[1:])
    if not spec.shape or spec.shape[0] != -1 or -1 in shape:
        message = (
            f"Input {name!r} must have a free first dimension and fixed others, got shape {tuple(spec.shape)}. "
            "Log the model with a TensorSpec such as (-1, 32) and an input example of more than one row."
        )
        raise ModelUnfit(message)
    if spec.type.kind not in _TENSOR_KINDS and spec.type.name != "datetime64[ns]":
        message = (
            f"Input {name!r} must be of numbers, text or datetime64[ns], got {spec.type}. Log the model with another "
            "type."
        )
        raise ModelUnfit(message)
    dtype = _read_tensor_dtype(spec)
    sources = named.get(name, (name,))
    # Text is in no list. A number may be in a list of one, which the table says.
    is_scalar = shape == (1,) and (name in named or dtype in OPAQUE_DTYPES)
    if len(shape) == 1 and (len(sources) > 1 or is_scalar):
        if len(sources) != shape[0]:
            message = (
                f"Input {name!r} must be fed by {shape[0]} columns, got {len(sources)}: {list(sources)}. "
                f"Correct {name_option('input_columns')}, or the model's metadata."
            )
            raise ModelUnfit(message)
        each = tuple(Column(name=source, dtype=dtype, policy=_find_policy(policies, source)) for source in sources)
        return Input(name=name, dtype=dtype, shape=shape, columns=each)
    if len(sources) != 1 or (shape and dtype in OPAQUE_DTYPES):
        message = (
            f"Input {name!r} of {dtype} and shape {shape} must be fed by "
            f"{'a column for each value' if dtype in OPAQUE_DTYPES else 'one column'}, got {list(sources)}. "
            f"Correct {name_option('input_columns')}, or the model's metadata."
        )
        raise ModelUnfit(message)
    column = Column(name=sources[0], dtype=dtype, shape=shape, policy=_find_policy(policies, sources[0]))
    return Input(name=name, dtype=dtype, shape=shape, columns=(column,))


def _read_tensor_dtype(spec: TensorSpec) -> str:
    return "str" if spec.type.kind in "OUS" else str(spec.type.name)


def _read_column_inputs(schema: Schema, policies: Policies) -> tuple[Input, ...]:
    specs = [spec for spec in _list_specs(schema) if isinstance(spec, ColSpec)]
    if any(spec.name is None for spec in specs):
        message = "Each column of the signature must have a name, got one without. Log the model with a DataFrame."
        raise ModelUnfit(message)
    return tuple(_make_input(_read_column(spec, str(spec.name), policies)) for spec in specs)


def is_unnamed(schema: Schema) -> bool:
    """Return whether a signature has one input, without a name."""
    return [spec.name for spec in _list_specs(schema)] == [None]


def _list_specs(schema: Schema) -> list[ColSpec | TensorSpec]:
    """Return the values of a signature. Where it is one object without a name, these are its properties."""
    specs = list(schema.inputs)
    if len(specs) == 1 and specs[0].name is None and isinstance(specs[0].type, Object):
        return [ColSpec(each.dtype, each.name, required=each.required) for each in specs[0].type.properties]
    return specs


def _read_unnamed_input(spec: Any, named: Names, policies: Policies) -> Input:
    """Return the single input of a signature that does not name it, fed by the one column that is stated."""
    if isinstance(spec.type, Map | AnyType):
        message = (
            f"The rows of a model must have columns that its signature names, got {spec.type}. State them: log it with "
            "a DataFrame as its input example, or with a class of pydantic as the type hint of a row."
        )
        raise ModelUnfit(message)
    if [len(sources) for sources in named.values()] != [1]:
        message = (
            "A model whose signature has one input without a name needs the one column that feeds it, got "
            f"{dict(named)}. Pass {give_option('input_columns', {'input': ['description']})}, by its own name, or log "
            'the model with metadata={"overnight": {"columns": {"input": ["description"]}}}.'
        )
        raise ModelUnfit(message)
    ((name, (source,)),) = named.items()
    column = _read_column(spec, source, policies)
    return _make_input(column).model_copy(update={"name": name})


def _read_params(mlmodel: MLmodel, given: Params, *, is_torch: bool) -> dict[str, JsonValue]:
    """Return the given params as the model gets them. Raises BadInput, with the names and types that there are."""
    known = {} if is_torch else {spec.name: spec for spec in mlmodel.signature.params or ()}
    if given and not known:
        why = "that runs as a torch module" if is_torch else "whose signature has none"
        message = (
            f"{name_option('params')} must be left out for a model {why}, got {sorted(given)}. Leave them "
            "out, or log the model through pyfunc with infer_signature(inputs, predictions, params={...})."
        )
        raise BadInput(message)
    problems = [f"{name!r}" for name in sorted(given.keys() - known.keys())]
    values: dict[str, JsonValue] = {}
    for name, value in given.items():
        if name in known:
            try:
                values[name] = _convert_param(known[name], value)
            except MlflowException:
                problems.append(f"{name}={value!r}")
    if problems:
        listed = ", ".join(f"{name} ({_describe_param(spec)})" for name, spec in known.items())
        message = (
            f"{name_option('params')} must be of the model's signature, which has {listed}; got {', '.join(problems)}. "
            "Correct it."
        )
        raise BadInput(message)
    return values


def _convert_param(spec: ParamSpec, value: JsonValue) -> JsonValue:
    """Return a value of a param in the signature's type; times stay text, since JSON has none."""
    converted: Any = ParamSpec.validate_param_spec(value, spec)
    return value if spec.dtype == DataType.datetime else converted


def _describe_param(spec: ParamSpec) -> str:
    dtype = spec.dtype.name if isinstance(spec.dtype, DataType) else "object"
    return f"{'a list of ' if spec.shape else ''}{dtype}, by default {spec.default!r}"


def _make_input(column: Column) -> Input:
    return Input(name=column.name, dtype=column.dtype, shape=column.shape, columns=(column,))


def _read_column(spec: ColSpec, name: str, policies: Policies) -> Column:
    if not isinstance(spec.type, DataType):
        message = (
            f"Column {name!r} must be a scalar of {sorted(_SCALARS.values())}, got {spec.type}. "
            "Log the model with a TensorSpec for columns of lists."
        )
        raise ModelUnfit(message)
    policy = _find_policy(policies, name)
    if not spec.required and policy.null in (None, "reject"):
        policy = policy.model_copy(update={"null": "keep"})
    return Column(name=name, dtype=_SCALARS[spec.type], required=spec.required, policy=policy)


def _read_outputs(schema: Schema) -> tuple[Output, ...]:
    specs = _list_specs(schema)
    outputs = tuple(_read_output(spec, at, len(specs)) for at, spec in enumerate(specs))
    if len({output.name for output in outputs}) < len(outputs):
        message = f"The outputs of the signature must have different names, got {[o.name for o in outputs]}."
        raise ModelUnfit(message)
    return outputs


def _read_output(spec: ColSpec | TensorSpec, at: int, total: int) -> Output:
    name = spec.name if isinstance(spec.name, str) else "prediction" if total == 1 else f"prediction_{at}"
    if not _is_number_or_text(spec.type):
        message = f"Output {name!r} must be numbers or text, got {spec.type}. {_advise_output(spec.type)}"
        raise ModelUnfit(message)
    if isinstance(spec, ColSpec):
        return Output(name=name, dtype=_SCALARS[spec.type], required=spec.required)
    shape = tuple(int(size) for size in spec.shape[1:])
    if -1 in shape:
        message = f"Output {name!r} must have a fixed width, got shape {tuple(spec.shape)}. State it in the signature."
        raise ModelUnfit(message)
    return Output(name=name, dtype=_read_tensor_dtype(spec), shape=() if shape == (1,) else shape)


def _is_number_or_text(kind: Any) -> bool:
    if isinstance(kind, np.dtype):
        return kind.kind in _TENSOR_KINDS
    return isinstance(kind, DataType) and kind not in (DataType.binary, DataType.datetime)


def _advise_output(kind: Any) -> str:
    """Return how to log a model that returns a type that is neither a number nor text."""
    if isinstance(kind, Array):
        return (
            "Give lists a width: log the model with a TensorSpec, such as "
            'Schema([TensorSpec(np.dtype("float32"), (-1, 384), "embedding")]).'
        )
    if isinstance(kind, AnyType):
        return (
            "MLflow found no type for what the model returns, and said why when it was logged. Log it again, with "
            "infer_signature(inputs, predictions) of a DataFrame of predictions, or another type hint of a row."
        )
    if isinstance(kind, DataType | np.dtype):
        return "Return it as text, such as ISO 8601 or base64, and log the model with the signature of that."
    return (
        "Log a mlflow.pyfunc.PythonModel around it, with the model as an artifact, that returns a DataFrame with each "
        "value as a column of its own."
    )
