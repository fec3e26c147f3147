from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.models import Model, infer_signature
from mlflow.types import ColSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType, Array, DataType, Map, Object, Property

from serving.errors import BadInput, ModelUnfit
from serving.model.contract import ColumnPolicy, Contract
from serving.model.signature import read_contract
from tests.serving.toys import SCORE, logged, tensor


def contract_of(
    model: Model,
    *,
    stack: bool = False,
    columns: dict[str, tuple[str, ...]] | None = None,
    policies: dict[str, ColumnPolicy] | None = None,
) -> Contract:
    return read_contract(model, stack=stack, columns=columns or {}, policies=policies or {})


def refusal(model: Model, **options: Any) -> str:
    with pytest.raises(ModelUnfit) as caught:
        contract_of(model, **options)
    return str(caught.value)


def feeds(contract: Contract) -> dict[str, list[str]]:
    return {value.name: [column.name for column in value.columns] for value in contract.inputs}


def stating(**columns: Any) -> dict[str, object]:
    return {"overnight": {"columns": columns}}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (DataType.boolean, "bool"),
        (DataType.integer, "int32"),
        (DataType.long, "int64"),
        (DataType.float, "float32"),
        (DataType.double, "float64"),
        (DataType.string, "str"),
        (DataType.binary, "binary"),
        (DataType.datetime, "datetime64[ns]"),
    ],
)
def test_a_column_of_the_signature_is_an_input_of_its_name_and_type(kind: DataType, dtype: str) -> None:
    (value,) = contract_of(logged(Schema([ColSpec(kind, "a")]))).inputs

    assert ("a", dtype, ()) == (value.name, value.dtype, value.shape)
    assert ("a", dtype, ()) == (value.columns[0].name, value.columns[0].dtype, value.columns[0].shape)


def test_every_mlflow_type_is_known_here() -> None:
    schema = Schema([ColSpec(kind, kind.name) for kind in DataType])

    assert len(DataType) == len(contract_of(logged(schema)).inputs)


@pytest.mark.parametrize(
    "kind", [Array(DataType.double), Object([Property("b", DataType.string)]), Map(DataType.string), AnyType()]
)
def test_a_nested_column_is_refused_by_name(kind: Any) -> None:
    spec = ColSpec(kind, "a", required=not isinstance(kind, AnyType))

    assert "Column 'a' must be a scalar" in refusal(logged(Schema([spec])))


def test_each_property_of_an_object_without_a_name_is_a_column() -> None:
    row = Object([Property("age", DataType.long), Property("city", DataType.string, required=False)])
    price = Object([Property("label", DataType.string, required=False), Property("price", DataType.double)])
    contract = contract_of(logged(Schema([ColSpec(row)]), Schema([ColSpec(price)])))

    assert {"age": ["age"], "city": ["city"]} == feeds(contract)
    assert {"age": ("int64", "reject"), "city": ("str", "keep")} == {
        column.name: (column.dtype, column.policy.null) for column in contract.columns
    }
    assert [("label", "str", False), ("price", "float64", True)] == [
        (output.name, output.dtype, output.required) for output in contract.outputs
    ]


def test_a_nested_property_is_refused_by_name() -> None:
    row = Object([Property("age", DataType.long), Property("home", Object([Property("city", DataType.string)]))])

    assert "Column 'home' must be a scalar" in refusal(logged(Schema([ColSpec(row)])))


@pytest.mark.parametrize("kind", [Map(DataType.string), AnyType()])
def test_rows_without_names_of_columns_are_refused(kind: Any) -> None:
    message = refusal(logged(Schema([ColSpec(kind)])))

    assert "must have columns that its signature names" in message
    assert "a class of pydantic as the type hint of a row" in message


def test_columns_without_names_are_refused() -> None:
    assert "must have a name" in refusal(logged(Schema([ColSpec("double"), ColSpec("double")])))


UNNAMED = Schema([ColSpec("string")])


@pytest.mark.parametrize(
    ("stated", "columns", "fed"),
    [
        ({}, {"text": ("gloss",)}, {"text": ["gloss"]}),
        ({"text": ["gloss"]}, {}, {"text": ["gloss"]}),
        ({"text": ["gloss"]}, {"text": ("title",)}, {"text": ["title"]}),
    ],
)
def test_a_single_unnamed_column_is_named_by_the_call_else_by_the_model(
    stated: dict[str, list[str]], columns: dict[str, tuple[str, ...]], fed: dict[str, list[str]]
) -> None:
    contract = contract_of(logged(UNNAMED, metadata=stating(**stated)), columns=columns)

    assert fed == feeds(contract)
    assert ("str", ()) == (contract.inputs[0].dtype, contract.inputs[0].shape)
    assert "reject" == contract.columns[0].policy.null


@pytest.mark.parametrize("columns", [{}, {"text": ("a", "b")}, {"text": ()}, {"text": ("a",), "more": ("b",)}])
def test_the_message_for_a_single_unnamed_column_explains_how_to_name_it(
    columns: dict[str, tuple[str, ...]],
) -> None:
    message = refusal(logged(UNNAMED), columns=columns)

    assert f"needs the one column that feeds it, got {columns}" in message
    assert "Pass input_columns={'input': ['description']} in the options" in message


def test_an_optional_column_keeps_its_nulls_unless_a_value_replaces_them() -> None:
    schema = Schema(
        [ColSpec("double", "a", required=False), ColSpec("double", "b"), ColSpec("double", "c", required=False)]
    )
    contract = contract_of(logged(schema), policies={"c": ColumnPolicy(null=0.0)})

    assert [("keep", False), ("reject", True), (0.0, False)] == [(c.policy.null, c.required) for c in contract.columns]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Model(), "no signature"),
        (logged(Schema([ColSpec("double", "a")]), None), "a signature without outputs"),
        (logged(None, SCORE), "a signature without inputs"),
    ],
)
def test_the_message_for_an_incomplete_signature_explains_how_to_log_one(model: Model, found: str) -> None:
    message = refusal(model)

    assert f"got {found}." in message
    assert "infer_signature(inputs, predictions)" in message
    assert "log_model(model, name=..., signature=signature" in message


def test_the_models_metadata_names_the_columns_of_a_tensor() -> None:
    model = logged(Schema([tensor("float32", 3, name="x")]), metadata=stating(x=["a", "b", "c"]))
    contract = contract_of(model, policies={"b": ColumnPolicy(null=0.0)})

    assert {"x": ["a", "b", "c"]} == feeds(contract)
    assert contract.inputs[0].is_stacked
    assert ["reject", 0.0, "reject"] == [column.policy.null for column in contract.columns]


def test_the_calls_columns_win_over_the_models() -> None:
    model = logged(Schema([tensor("float32", 2, name="x")]), metadata=stating(x=["a", "b"]))

    assert {"x": ["c", "d"]} == feeds(contract_of(model, columns={"x": ("c", "d")}))


def test_a_tensor_without_named_columns_is_a_list_column_of_the_inputs_name() -> None:
    (value,) = contract_of(logged(Schema([tensor("float32", 2, 3, name="x")]))).inputs

    assert (2, 3) == value.columns[0].shape == value.shape
    assert not value.is_stacked


def test_a_list_column_may_have_another_name() -> None:
    (value,) = contract_of(logged(Schema([tensor("float32", 3, name="x")])), columns={"x": ("vector",)}).inputs

    assert ("vector", (3,)) == (value.columns[0].name, value.columns[0].shape)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_of_one_value_a_row_is_fed_by_a_scalar_column(shape: tuple[int, ...]) -> None:
    (value,) = contract_of(logged(Schema([tensor("float32", *shape, name="x")])), columns={"x": ("a",)}).inputs

    assert ("a", (), shape) == (value.columns[0].name, value.columns[0].shape, value.shape)


def test_each_of_several_inputs_is_fed_in_its_own_way() -> None:
    schema = Schema([tensor("float32", 2, name="x"), tensor("int64", name="id"), tensor("float32", 4, name="vector")])
    model = logged(schema, metadata=stating(x=["a", "b"]))

    assert {"x": ["a", "b"], "id": ["key"], "vector": ["vector"]} == feeds(contract_of(model, columns={"id": ("key",)}))


def test_a_single_unnamed_input_is_named_by_the_call_else_by_the_model() -> None:
    schema = Schema([tensor("float32", 2)])

    assert {"features": ["a", "b"]} == feeds(contract_of(logged(schema, metadata=stating(features=["a", "b"]))))
    assert {"mine": ["c", "d"]} == feeds(
        contract_of(logged(schema, metadata=stating(features=["a", "b"])), columns={"mine": ("c", "d")})
    )
    assert {"input_0": ["input_0"]} == feeds(contract_of(logged(schema)))


@pytest.mark.parametrize("columns", [("a",), ("a", "b", "c", "d"), ()])
def test_a_tensor_needs_as_many_columns_as_it_is_wide(columns: tuple[str, ...]) -> None:
    model = logged(Schema([tensor("float32", 2, 2, name="x"), tensor("float32", 3, name="y")]))
    message = refusal(model, columns={"y": columns} if len(columns) > 1 else {"x": ("a", "b")})

    assert "must be fed by" in message


@pytest.mark.parametrize("shape", [(5, 3), (-1, -1), ()])
def test_a_tensor_must_have_rows_and_a_fixed_width(shape: tuple[int, ...]) -> None:
    schema = Schema([TensorSpec(np.dtype("float32"), shape, "x")])

    assert "free first dimension and fixed others" in refusal(logged(schema))


def test_columns_for_unknown_inputs_are_refused_by_name_wherever_they_are_stated() -> None:
    schema = Schema([tensor("float32", 2, name="x"), tensor("float32", 2, name="y")])

    assert "input_columns must be one of ['x', 'y'], got ['z']" in refusal(logged(schema), columns={"z": ("a", "b")})
    assert "metadata must be one of ['x', 'y'], got ['z']" in refusal(logged(schema, metadata=stating(z=["a", "b"])))


def test_input_columns_are_refused_where_the_signature_names_the_columns_itself() -> None:
    message = refusal(logged(Schema([ColSpec("double", "a")])), columns={"a": ("b",)})

    assert "takes no input_columns, got ['a']" in message


@pytest.mark.parametrize("metadata", [stating(x="abc"), {"overnight": "x"}, {"overnight": {"columns": ["a"]}}])
def test_metadata_that_is_no_list_of_columns_is_refused(metadata: dict[str, object]) -> None:
    assert '{"overnight": {"columns":' in refusal(logged(Schema([tensor("float32", 3, name="x")]), metadata=metadata))


def test_other_metadata_is_nobodys_business() -> None:
    model = logged(Schema([tensor("float32", 3, name="x")]), metadata={"team": "growth", "overnight": {"more": 1}})

    assert {"x": ["x"]} == feeds(contract_of(model))


def test_policies_for_unknown_columns_are_refused_by_name() -> None:
    model = logged(Schema([ColSpec("double", "a"), ColSpec("double", "b")]))

    assert "policies must be one of ['a', 'b'], got ['c', 'd']" in refusal(
        model, policies={"a": ColumnPolicy(), "d": ColumnPolicy(), "c": ColumnPolicy()}
    )


def test_the_star_policy_applies_to_every_column_without_its_own() -> None:
    model = logged(Schema([ColSpec("double", "a"), ColSpec("double", "b")]))
    policies = {"*": ColumnPolicy(cast="round"), "b": ColumnPolicy(cast="exact")}

    assert ["round", "exact"] == [c.policy.cast for c in contract_of(model, policies=policies).columns]


def test_nulls_of_floats_are_kept_where_the_model_takes_them_unless_a_policy_says_otherwise() -> None:
    model = logged(Schema([ColSpec("double", name) for name in "abc"] + [ColSpec("long", "count")]))
    policies = {"b": ColumnPolicy(null="reject"), "c": ColumnPolicy(cast="round")}
    taking, other = (
        read_contract(model, stack=False, columns={}, policies=policies, takes_missing=takes) for takes in (True, False)
    )

    assert ["keep", "reject", "keep", "reject"] == [column.policy.null for column in taking.columns]
    assert ("a", "c") == taking.nulls_kept
    assert () == other.nulls_kept


def test_null_values_of_the_wrong_kind_are_refused_all_at_once_when_the_contract_is_made() -> None:
    model = logged(Schema([ColSpec("float", "age"), ColSpec("integer", "count"), ColSpec("string", "city")]))
    with pytest.raises(BadInput) as caught:
        contract_of(model, policies={"*": ColumnPolicy(null="abc"), "count": ColumnPolicy(null=1.5)})

    assert not isinstance(caught.value, ModelUnfit)
    assert "got 'abc' for column 'age' (float32); 1.5 for column 'count' (int32)." in str(caught.value)


def test_a_pytorch_signature_of_columns_is_one_tensor_of_floats() -> None:
    model = logged(Schema([ColSpec("double", "a"), ColSpec("long", "b"), ColSpec("boolean", "c", required=False)]))
    contract = contract_of(model, stack=True)

    assert {"input": ["a", "b", "c"]} == feeds(contract)
    assert [("float32", True), ("float32", True), ("float32", False)] == [
        (c.dtype, c.required) for c in contract.columns
    ]


@pytest.mark.parametrize("schema", [Schema([ColSpec("string", "a")]), Schema([tensor("str", 1, name="a")])])
def test_a_pytorch_model_takes_no_text(schema: Schema) -> None:
    assert "pytorch model must take numbers, got other inputs ['" in refusal(
        logged(schema), stack=True, columns={"a": ("a",)} if schema.is_tensor_spec() else {}
    )


@pytest.mark.parametrize("dtype", ["object", "str", "bytes"])
def test_a_tensor_of_text_is_fed_by_columns_of_text_but_not_by_one_of_lists(dtype: str) -> None:
    model = logged(Schema([tensor(dtype, 2, name="x")]))
    (value,) = contract_of(model, columns={"x": ("a", "b")}).inputs

    assert ["str", "str"] == [column.dtype for column in value.columns]
    assert "a column for each value" in refusal(model)


def test_a_tensor_of_one_text_a_row_is_fed_by_the_column_of_its_name() -> None:
    (value,) = contract_of(logged(Schema([tensor("str", 1, name="city")]))).inputs

    assert ("city", (), (1,)) == (value.columns[0].name, value.columns[0].shape, value.shape)


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "timedelta64[ns]"])
def test_tensors_of_other_types_are_refused_both_ways(dtype: str) -> None:
    assert "Input 'x' must be of numbers" in refusal(logged(Schema([tensor(dtype, name="x")])))
    assert "Output 'y' must be numbers or text" in refusal(
        logged(Schema([ColSpec("double", "a")]), Schema([tensor(dtype, name="y")]))
    )


@pytest.mark.parametrize(
    ("predictions", "output"),
    [
        (np.zeros(3), ("prediction", "float64", ())),
        (np.zeros((3, 1), dtype="float32"), ("prediction", "float32", ())),
        (np.zeros((3, 2, 4), dtype="int16"), ("prediction", "int16", (2, 4))),
        (np.array(["a", "b", "c"]), ("prediction", "str", ())),
        (pd.Series([0.5], name="label"), ("label", "float64", ())),
        (pd.DataFrame({"p": [0.5]}), ("p", "float64", ())),
        ({"score": np.zeros((3, 1))}, ("score", "float64", ())),
    ],
)
def test_an_inferred_output_gets_a_name_a_type_and_a_shape(predictions: Any, output: tuple[object, ...]) -> None:
    model = Model(signature=infer_signature(pd.DataFrame({"a": [0.5]}), predictions))
    (found,) = contract_of(model).outputs

    assert output == (found.name, found.dtype, found.shape)


# MLflow advises against columns of integers, which pandas' own types hold beside nulls.
@pytest.mark.filterwarnings("ignore:.*integer column:UserWarning")
def test_outputs_may_be_null_whose_sample_has_a_missing_value() -> None:
    missing = {"count": [1, None], "flag": [True, None], "word": ["a", None]}
    predictions = pd.DataFrame(missing).convert_dtypes().assign(score=[0.5, None], sure=[1.0, 2.0])
    contract = contract_of(Model(signature=infer_signature(pd.DataFrame({"a": [0.5]}), predictions)))

    assert {"count": "int64", "flag": "bool", "word": "str", "score": "float64"} == {
        output.name: output.dtype for output in contract.outputs if not output.required
    }


def test_several_outputs_without_names_are_numbered_and_with_the_same_name_refused() -> None:
    inputs = Schema([ColSpec("double", "a")])
    contract = contract_of(logged(inputs, Schema([ColSpec("float"), ColSpec("string")])))

    assert ["prediction_0", "prediction_1"] == [output.name for output in contract.outputs]
    with pytest.raises(ModelUnfit, match="different names"):
        contract_of(logged(inputs, Schema([tensor("float32", name="y"), tensor("int64", name="y")])))


@pytest.mark.parametrize("kind", [DataType.binary, DataType.datetime, Array(DataType.double)])
def test_outputs_that_are_neither_numbers_nor_text_are_refused(kind: Any) -> None:
    outputs = Schema([ColSpec(kind, "y")])

    assert "Output 'y' must be numbers or text" in refusal(logged(Schema([ColSpec("double", "a")]), outputs))


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        (
            ColSpec(Object([Property("good", DataType.double)]), "y"),
            "a DataFrame with each value as a column of its own",
        ),
        (ColSpec(Array(DataType.double), "y"), 'TensorSpec(np.dtype("float32"), (-1, 384), "embedding")'),
        (ColSpec(AnyType(), required=True), "infer_signature(inputs, predictions) of a DataFrame"),
        (ColSpec(DataType.datetime, "y"), "Return it as text, such as ISO 8601"),
        (tensor("datetime64[ns]", name="y"), "Return it as text, such as ISO 8601"),
    ],
)
def test_the_message_for_an_output_of_another_type_says_what_to_return(spec: ColSpec | TensorSpec, advice: str) -> None:
    assert advice in refusal(logged(Schema([ColSpec("double", "a")]), Schema([spec])))


def test_an_output_of_unknown_width_is_refused() -> None:
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, -1), "y")])

    assert "Output 'y' must have a fixed width" in refusal(logged(Schema([ColSpec("double", "a")]), outputs))
