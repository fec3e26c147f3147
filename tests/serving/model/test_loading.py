from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightgbm
import mlflow.lightgbm
import mlflow.sklearn
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ColSpec, Schema
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from serving.errors import ModelFailed, ModelUnfit
from serving.model.contract import Contract
from serving.model.encoding import encode
from serving.model.interface import Model
from serving.model.loading import PyfuncModel, load_model
from serving.model.registry import resolve_model
from serving.model.torch_model import TorchModel
from tests.serving.toys import Careless, Several, matrix, network, tensor

Log = Callable[..., str]

_ALLOW = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
X = np.random.default_rng(1).standard_normal((64, 4), dtype=np.float32)


def load(
    uri: str, *, allow_pickle: bool = False, columns: dict[str, tuple[str, ...]] | None = None
) -> tuple[Model, Contract]:
    resolved = resolve_model(uri)
    contract = resolved.contract(columns or {}, {})
    return load_model(resolved, contract, allow_pickle=allow_pickle), contract


def predict(uri: str, *, allow_pickle: bool = False, **inputs: Any) -> dict[str, Any]:
    model, _ = load(uri, allow_pickle=allow_pickle)
    with model.slot():
        return model.predict(inputs)


def predict_frame(uri: str, frame: pd.DataFrame, *, allow_pickle: bool) -> dict[str, Any]:
    """Predict the rows of a frame on the whole way that a table takes."""
    model, contract = load(uri, allow_pickle=allow_pickle)
    encoded = encode(contract, pa.Table.from_pandas(frame, preserve_index=False))
    with model.slot():
        return model.predict(encoded.inputs)


def signature_of(frame: pd.DataFrame, predictions: Any) -> ModelSignature:
    with warnings.catch_warnings():
        # MLflow advises against columns of integers, which it then takes for no columns at all.
        warnings.simplefilter("ignore", UserWarning)
        return infer_signature(frame, predictions)


def refusal(uri: str) -> str:
    with pytest.raises(ModelUnfit) as caught:
        load(uri)
    return str(caught.value)


def test_an_exported_network_answers_as_its_module_does(pt2: str) -> None:
    with torch.inference_mode():
        expected = network()(torch.from_numpy(X)).numpy()[:, 0]

    assert np.array_equal(expected, predict(pt2, x=X)["score"])


@pytest.mark.parametrize("rows", [1, 2, 63])
def test_the_number_of_rows_is_free(pt2: str, rows: int) -> None:
    assert (rows,) == predict(pt2, x=X[:rows])["score"].shape


def test_columns_side_by_side_in_memory_are_the_same_rows(pt2: str) -> None:
    assert np.array_equal(predict(pt2, x=X)["score"], predict(pt2, x=np.asfortranarray(X))["score"])


def test_a_pickled_network_is_refused_with_what_to_do(pickled: str) -> None:
    message = refusal(pickled)

    assert "must not need unpickling, which runs any code in its files" in message
    assert message.endswith(
        'Log it with serialization_format="pt2", or pass allow_pickle=True in the options if you trust its author.'
    )


def test_a_pickled_network_loads_only_with_allow_pickle(pickled: str) -> None:
    with torch.inference_mode():
        expected = network()(torch.from_numpy(X)).numpy()[:, 0]

    assert np.array_equal(expected, predict(pickled, allow_pickle=True, x=X)["score"])
    refusal(pickled)


def test_an_exported_network_loads_where_pickles_are_allowed_too(pt2: str) -> None:
    assert (64,) == predict(pt2, allow_pickle=True, x=X)["score"].shape


@pytest.mark.parametrize("before", [None, "true", "false"])
@pytest.mark.parametrize("form", ["pickle", "pt2"])
def test_the_environment_is_put_back_whether_loading_works_or_not(
    log_network: Log, monkeypatch: pytest.MonkeyPatch, before: str | None, form: str
) -> None:
    monkeypatch.delenv(_ALLOW, raising=False)
    if before is not None:
        monkeypatch.setenv(_ALLOW, before)
    uri = log_network(f"environment-{form}", network(), form=form)
    try:
        load(uri)
    except ModelUnfit:
        assert form == "pickle"

    assert before == os.environ.get(_ALLOW)


def test_a_model_is_loaded_once_in_a_process_however_many_ask(pt2: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: load(pt2)[0]._module, range(4)))  # type: ignore[attr-defined]

    assert all(module is found[0] for module in found)


@pytest.mark.parametrize("layer", [torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4), torch.nn.AlphaDropout(0.1)])
def test_a_network_exported_in_training_mode_is_refused(log_network: Log, layer: torch.nn.Module) -> None:
    message = refusal(log_network(f"training-{type(layer).__name__}", Careless(layer).train()))

    assert "must be exported for inference" in message
    assert "Call model.eval() before you log it" in message


@pytest.mark.parametrize(
    ("layer", "train"),
    [(torch.nn.Dropout(0.5), False), (torch.nn.BatchNorm1d(4), False), (torch.nn.Dropout(0.0), True)],
)
def test_a_network_exported_for_inference_answers_the_same_each_time(
    log_network: Log,
    layer: torch.nn.Module,
    train: bool,  # noqa: FBT001 - a column of the table
) -> None:
    uri = log_network(f"inference-{type(layer).__name__}-{train}", Careless(layer).train(train))

    assert np.array_equal(predict(uri, x=X)["score"], predict(uri, x=X)["score"])


def test_a_network_pickled_in_training_mode_is_run_for_inference(log_network: Log) -> None:
    uri = log_network("pickled-training", torch.nn.Sequential(torch.nn.Dropout(0.5), network()).train(), form="pickle")

    assert np.array_equal(predict(uri, allow_pickle=True, x=X)["score"], predict(uri, allow_pickle=True, x=X)["score"])


@pytest.mark.parametrize("named", [False, True])
def test_a_network_may_answer_with_several_outputs_as_a_tuple_or_by_name(log_network: Log, named: bool) -> None:  # noqa: FBT001
    outputs = Schema([tensor("float32", 1, name="total"), tensor("float32", 8, name="wide")])
    found = predict(log_network(f"several-{named}", Several(named=named), outputs), x=X)

    assert ["total", "wide"] == list(found)
    assert np.array_equal(torch.from_numpy(X).sum(dim=1).numpy(), found["total"])
    assert np.array_equal(np.concatenate([X, -X], axis=1), found["wide"])


def test_a_network_of_another_width_than_its_signature_fails_by_name(log_network: Log) -> None:
    uri = log_network(
        "too-wide", Several(named=False), Schema([tensor("float32", 1, name="a"), tensor("float32", 3, name="b")])
    )

    with pytest.raises(
        ModelFailed, match=r"Output 'b' must hold 3 values for each of 64 rows, in the shape \(64, 3\), got \(64, 8\)"
    ):
        predict(uri, x=X)


def test_a_slot_has_one_thread_in_inference_mode_and_gives_the_threads_back() -> None:
    model = TorchModel(network(), matrix(4))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with model.slot():
            inside = (torch.get_num_threads(), torch.is_inference_mode_enabled())
        outside = (torch.get_num_threads(), torch.is_inference_mode_enabled())
    finally:
        torch.set_num_threads(before)

    assert ((1, True), (2, False)) == (inside, outside)


def test_a_slot_gives_the_threads_back_after_an_error_too() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), TorchModel(network(), matrix(4)).slot():
        raise KeyError

    assert (before, False) == (torch.get_num_threads(), torch.is_inference_mode_enabled())


def test_a_network_has_a_slot_a_core_and_anything_else_one(pt2: str) -> None:
    assert len(os.sched_getaffinity(0)) == load(pt2)[0].slots
    assert 1 == PyfuncModel.slots.fget(None)  # type: ignore[attr-defined]


def test_a_pickled_scikit_learn_model_needs_allow_pickle_and_answers_as_itself(log: Log, frame: pd.DataFrame) -> None:
    model = make_pipeline(StandardScaler(), LinearRegression()).fit(frame, frame.a + frame.n)
    signature = signature_of(frame, model.predict(frame))
    uri = log("sklearn", mlflow.sklearn.log_model, model, signature=signature, serialization_format="cloudpickle")

    assert "(mlflow.sklearn). Pass allow_pickle=True in the options if you trust its author." in refusal(uri)
    assert np.array_equal(model.predict(frame), predict_frame(uri, frame, allow_pickle=True)["prediction"])


def test_a_classifier_of_text_into_text_answers_as_itself(log: Log, frame: pd.DataFrame) -> None:
    table = frame.assign(city=np.array(["Bern", "Köln", "Graz"])[frame.n % 3])
    model = make_pipeline(
        make_column_transformer((OneHotEncoder(), ["city"]), remainder="passthrough"), LogisticRegression()
    ).fit(table, np.where(table.city == "Bern", "yes", "no"))
    signature = signature_of(table, model.predict(table))
    uri = log("labels", mlflow.sklearn.log_model, model, signature=signature, serialization_format="cloudpickle")
    found = predict_frame(uri, table, allow_pickle=True)["prediction"]

    assert model.predict(table).tolist() == found.tolist()
    assert {"yes", "no"} == set(found)


def test_a_lightgbm_booster_needs_no_pickle_and_answers_as_itself(log: Log, frame: pd.DataFrame) -> None:
    booster = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(frame, label=frame.a), 5)
    uri = log("booster", mlflow.lightgbm.log_model, booster, signature=signature_of(frame, booster.predict(frame)))

    assert np.array_equal(booster.predict(frame), predict_frame(uri, frame, allow_pickle=False)["prediction"])


def test_a_pickled_lightgbm_classifier_needs_allow_pickle_and_answers_as_itself(log: Log, frame: pd.DataFrame) -> None:
    model = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1, n_jobs=1).fit(frame, frame.n % 3)
    signature = signature_of(frame, model.predict(frame))
    uri = log("classifier", mlflow.lightgbm.log_model, model, signature=signature, serialization_format="cloudpickle")

    booster = log(
        "its-booster",
        mlflow.lightgbm.log_model,
        model.booster_,
        signature=signature_of(frame, model.predict_proba(frame)),
    )

    assert 'Log its Booster (model.booster_), or it with serialization_format="skops", or pass allow' in refusal(uri)
    assert np.array_equal(model.predict(frame), predict_frame(uri, frame, allow_pickle=True)["prediction"])
    assert (200, 3) == predict_frame(booster, frame, allow_pickle=False)["prediction"].shape


def test_a_booster_of_many_classes_has_one_wide_output(log: Log, frame: pd.DataFrame) -> None:
    parameters = {"objective": "multiclass", "num_class": 3, "verbose": -1, "num_threads": 1}
    booster = lightgbm.train(parameters, lightgbm.Dataset(frame, label=frame.n % 3), 3)
    uri = log("classes", mlflow.lightgbm.log_model, booster, signature=signature_of(frame, booster.predict(frame)))

    assert (200, 3) == predict_frame(uri, frame, allow_pickle=False)["prediction"].shape
    assert np.array_equal(booster.predict(frame), predict_frame(uri, frame, allow_pickle=False)["prediction"])


UNNAMED = Schema([ColSpec("string")])
FRAME = Schema([ColSpec("double", "a"), ColSpec("string", "s")])


def test_a_pickled_python_model_is_refused_with_the_advice_to_log_it_as_code(log: Log) -> None:
    class Doubled(mlflow.pyfunc.PythonModel):
        def predict(self, context: object, model_input: pd.DataFrame, params: object = None) -> Any:
            return model_input["a"].to_numpy() * 2

    frame = pd.DataFrame({"a": [1.0, 2.0]})
    uri = log(
        "object", mlflow.pyfunc.log_model, python_model=Doubled(), signature=signature_of(frame, frame.a.to_numpy())
    )

    assert 'Log it as code (python_model="model.py"), or pass allow_pickle=True' in refusal(uri)
    assert [2.0, 4.0] == predict_frame(uri, frame, allow_pickle=True)["prediction"].tolist()


def test_a_model_logged_as_code_needs_no_pickle_and_may_answer_with_a_frame(log_code: Log) -> None:
    answer = 'pd.DataFrame({"label": x["s"].str.upper(), "double": x["a"] * 2})'
    uri = log_code("as-code", answer, FRAME, Schema([ColSpec("double", "double"), ColSpec("string", "label")]))
    found = predict(uri, a=np.array([0.5, 1.0]), s=np.array(["x", "y"], dtype=object))

    assert {"double": [1.0, 2.0], "label": ["X", "Y"]} == {name: value.tolist() for name, value in found.items()}


def test_a_null_text_reaches_the_model_as_a_missing_value_and_is_returned_as_none(log_code: Log) -> None:
    uri = log_code("nulls", 'x["s"].where(x["s"].notna() & (x["a"] > 0))', FRAME, Schema([ColSpec("string", "label")]))
    texts = np.array(["x", "y", None], dtype=object)

    assert ["x", None, None] == predict(uri, a=np.array([1.0, 0.0, 1.0]), s=texts)["label"].tolist()
    assert [None] == predict(uri, a=np.ones(1), s=np.array([None], dtype=object))["label"].tolist()


def test_every_type_of_column_reaches_the_model_unchanged(log_code: Log) -> None:
    kinds = ["boolean", "integer", "long", "float", "double", "string", "binary", "datetime"]
    inputs = Schema([ColSpec(kind, kind) for kind in kinds])
    uri = log_code(
        "kinds",
        "[', '.join(f'{kind} {value}' for kind, value in zip(x.dtypes, x.iloc[0]))]",
        inputs,
        Schema([tensor("str")]),
    )
    table = pa.table(
        {
            "boolean": [True],
            "integer": pa.array([1], pa.int32()),
            "long": [2],
            "float": pa.array([0.5], pa.float32()),
            "double": [0.25],
            "string": ["s"],
            "binary": [b"b"],
            "datetime": pa.array([0], pa.timestamp("s")),
        }
    )
    model, contract = load(uri)
    encoded = encode(contract, table)

    assert not encoded.flags.reasons
    expected = (
        "bool True, int32 1, int64 2, float32 0.5, float64 0.25, str s, object b'b', datetime64[ns] 1970-01-01 00:00:00"
    )
    (found,) = model.predict(encoded.inputs)["prediction"].tolist()

    # Text is a type of its own since pandas 3.
    assert found in (expected, expected.replace("str s", "object s"))


def test_tensors_reach_a_model_by_name_and_a_single_unnamed_one_as_an_array(log_code: Log) -> None:
    score = Schema([tensor("float64")])
    two = log_code(
        "two", 'x["x"][:, 0] + x["y"]', Schema([tensor("float32", 2, name="x"), tensor("float64", name="y")]), score
    )
    lone = log_code("lone", "x[:, 1].astype(float)", Schema([tensor("float32", 2)]), score)
    x = np.array([[1, 2], [3, 4]], dtype=np.float32)

    assert [1.5, 3.5] == predict(two, x=x, y=np.array([0.5, 0.5]))["prediction"].tolist()
    assert [2.0, 4.0] == predict(lone, input_0=x)["prediction"].tolist()


def test_a_single_unnamed_column_reaches_a_model_as_mlflow_passes_a_list(log_code: Log) -> None:
    uri = log_code("unnamed", "[f'{x.columns[0]} {text}' for text in x.iloc[:, 0]]", UNNAMED, UNNAMED)
    model, contract = load(uri, columns={"text": ("gloss",)})
    encoded = encode(contract, pa.table({"gloss": ["a", "b"]}))
    loaded = mlflow.pyfunc.load_model(uri)

    assert loaded.predict(["a", "b"]) == model.predict(encoded.inputs)["prediction"].tolist() == ["0 a", "0 b"]


@pytest.mark.parametrize("dtype", ["str", "object"])
def test_a_tensor_of_text_reaches_a_model_in_the_kind_that_it_was_logged_with(log_code: Log, dtype: str) -> None:
    inputs = Schema([tensor(dtype, 2, name="x")])
    uri = log_code(f"text-{dtype}", "[a + b for a, b in x['x'].tolist()]", inputs, Schema([tensor("str")]))
    model, contract = load(uri, columns={"x": ("a", "b")})
    encoded = encode(contract, pa.table({"a": ["x", "long"], "b": ["y", "er"]}))

    assert ["xy", "longer"] == model.predict(encoded.inputs)["prediction"].tolist()


def test_a_tensor_of_fixed_width_text_takes_no_null(log_code: Log) -> None:
    uri = log_code("text-null", "x['x']", Schema([tensor("str", name="x")]), Schema([tensor("str")]))

    with pytest.raises(ValueError, match="a tensor of str can't hold a null"):
        predict(uri, x=np.array(["a", None], dtype=object))


def test_a_model_that_does_not_load_here_is_unfit_with_the_reason(log_code: Log) -> None:
    uri = log_code("broken", "x", FRAME, Schema([tensor("float64")]))
    script = next(resolve_model(uri).folder.glob("script.py"))
    script.write_text("import a_library_that_nobody_has\n")

    assert "must load here, got" in refusal(uri)
    assert "No module named 'a_library_that_nobody_has'" in refusal(uri)


FLOATS = Schema([ColSpec("double", "a"), ColSpec("string", "s")])
SORTED = {
    "series": ('x.sort_values("a")["a"] * 2', Schema([ColSpec("double")])),
    "frame": (
        'x.sort_values("a").assign(double=x["a"] * 2)[["s", "double"]]',
        Schema([ColSpec("string", "s"), ColSpec("double", "double")]),
    ),
    "grouped": ('x.groupby("s", group_keys=False)["a"].apply(lambda a: a * 2)', Schema([ColSpec("double")])),
    "shuffled": ('x.sample(frac=1, random_state=3)["a"] * 2', Schema([ColSpec("double")])),
}


@pytest.mark.parametrize("form", SORTED)
def test_a_model_that_sorts_its_rows_gives_each_row_its_own_prediction(log_code: Log, form: str) -> None:
    answer, outputs = SORTED[form]
    values = np.random.default_rng(0).standard_normal(3000)
    texts = np.array([f"group {at % 7}" for at in range(3000)], dtype=object)
    found = predict(log_code(f"sorts-{form}", answer, FLOATS, outputs), a=values, s=texts)

    assert np.array_equal(values * 2, found["double" if form == "frame" else "prediction"])


def test_a_model_that_names_its_rows_by_a_column_is_refused(log_code: Log) -> None:
    uri = log_code("names-rows", 'x.set_index("s")["a"]', FLOATS, Schema([ColSpec("double")]))

    with pytest.raises(ModelFailed, match=r"0 to 1, each once, got \['x', 'y'\]"):
        predict(uri, a=np.array([1.0, 2.0]), s=np.array(["x", "y"], dtype=object))
