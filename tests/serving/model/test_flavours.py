"""Every flavour gives what its own library gives when it is called directly, for rows scored in batches.

Predictions must be equal to the last bit, unless a test says why they can't be.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow.catboost
import mlflow.lightgbm
import mlflow.onnx
import mlflow.pyfunc
import mlflow.sklearn
import mlflow.spacy
import mlflow.statsmodels
import mlflow.transformers
import mlflow.xgboost
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ColSpec, Schema

from serving.errors import ModelUnfit
from serving.model.contract import ColumnPolicy
from serving.model.encoding import encode
from serving.model.forward import Forward
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from tests.serving.toys import tiny_bert
from tests.support import load_minilm

Log = Callable[..., str]
Array = npt.NDArray[Any]

ROWS, BATCH = 300, 64
LETTERS = tuple("abcd")
# The features are float64, and some models take float32.
ROUND = {"*": ColumnPolicy(cast="round")}


def score(
    uri: str,
    frame: pd.DataFrame,
    *,
    allow_pickle: bool = False,
    columns: dict[str, tuple[str, ...]] | None = None,
    policies: Mapping[str, ColumnPolicy] | None = None,
) -> dict[str, Array]:
    """Score a frame as a run does, from its table to predictions by output; no row may be a reject."""
    resolved = resolve_model(uri)
    contract = resolved.contract(columns or {}, policies or {})
    table = pa.Table.from_pandas(frame, preserve_index=False)
    contract.check(table.schema, "The table")
    model = load_model(resolved, contract, allow_pickle=allow_pickle)
    encoded = model.prepare(encode(contract, table))
    with model.slot():
        found = Forward(model, contract, BATCH).score(encoded)
    assert [] == encoded.flags.reasons
    return found


def signature(inputs: Any, outputs: Any) -> ModelSignature:
    with warnings.catch_warnings():
        # MLflow advises against columns of integers, which can't hold a null later.
        warnings.simplefilter("ignore", UserWarning)
        return infer_signature(inputs, outputs)


@pytest.fixture(scope="module")
def numbers() -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).standard_normal((ROWS, 4)), columns=list(LETTERS))


@pytest.fixture(scope="module")
def target(numbers: pd.DataFrame) -> pd.Series:
    return numbers.a + numbers.b * numbers.c


@pytest.fixture(scope="module")
def classes(target: pd.Series) -> Array:
    return np.digitize(target, [-0.5, 0.5])


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    """A frame with integers, text, and nulls in both floats and text."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": random.integers(18, 90, ROWS),
            "income": random.random(ROWS) * 1e5,
            "city": random.choice(["Bern", "Köln", "Graz"], ROWS),
            "grade": random.choice(["low", "mid", "high"], ROWS),
        }
    )
    frame.loc[::17, "income"] = np.nan
    frame.loc[5::23, "city"] = None
    return frame


@pytest.fixture(scope="module")
def is_customer(people: pd.DataFrame) -> Array:
    return np.asarray((people.age > 50) ^ (people.city == "Bern"))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """An unfitted pipeline over people: text is encoded, missing numbers are filled in."""
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    columns = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["city", "grade"]),
        (make_pipeline(SimpleImputer(), StandardScaler()), ["age", "income"]),
    )
    return make_pipeline(columns, LogisticRegression(max_iter=1000))


def as_categories(people: pd.DataFrame) -> pd.DataFrame:
    return people.assign(city=people.city.astype("category"), grade=people.grade.astype("category"))


@pytest.mark.parametrize("labels", ["text", "booleans", "integers"])
def test_a_scikit_learn_pipeline_over_text_and_nulls(
    log: Log, pipeline: Any, people: pd.DataFrame, is_customer: Array, labels: str
) -> None:
    given = {"text": np.where(is_customer, "yes", "no"), "booleans": is_customer, "integers": is_customer.astype(int)}
    model = pipeline.fit(people, given[labels])
    expected = model.predict(people)
    options = {"signature": signature(people, expected), "serialization_format": "cloudpickle"}
    uri = log(f"flavour-pipeline-{labels}", mlflow.sklearn.log_model, model, **options)

    assert expected.tolist() == score(uri, people, allow_pickle=True)["prediction"].tolist()


def test_a_scikit_learn_pipeline_saved_by_skops_gives_its_probabilities(
    log: Log, pipeline: Any, people: pd.DataFrame, is_customer: Array
) -> None:
    model = pipeline.fit(people, is_customer)
    expected = model.predict_proba(people)
    options = {"signature": signature(people, expected), "pyfunc_predict_fn": "predict_proba"}
    # MLflow logs no pipeline with a SimpleImputer without it.
    options["skops_trusted_types"] = ["numpy.dtype"]
    uri = log("flavour-probabilities", mlflow.sklearn.log_model, model, **options)

    assert np.array_equal(expected, score(uri, people)["prediction"])


def test_a_scikit_learn_model_fitted_on_pandas_categories(log: Log, people: pd.DataFrame, is_customer: Array) -> None:
    from sklearn.ensemble import HistGradientBoostingClassifier

    frame = as_categories(people)
    model = HistGradientBoostingClassifier(categorical_features="from_dtype", max_iter=5).fit(frame, is_customer)
    expected = model.predict(frame)
    options = {"signature": signature(frame, expected), "serialization_format": "cloudpickle"}
    uri = log("flavour-categories", mlflow.sklearn.log_model, model, **options)

    assert np.array_equal(expected, score(uri, frame, allow_pickle=True)["prediction"])


def test_an_xgboost_booster(log: Log, numbers: pd.DataFrame, target: pd.Series) -> None:
    import xgboost

    data = xgboost.DMatrix(numbers, label=target)
    booster = xgboost.train({"max_depth": 3, "nthread": 1}, data, 10)
    expected = booster.predict(data)
    uri = log("flavour-booster", mlflow.xgboost.log_model, booster, signature=signature(numbers, expected))

    assert np.array_equal(expected, score(uri, numbers)["prediction"])


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "binary:logistic"},
        {"objective": "multi:softprob", "num_class": 3},
        {"objective": "count:poisson", "booster": "dart"},
        # XGBoost says that it will go.
        pytest.param({"booster": "gblinear"}, marks=pytest.mark.filterwarnings("ignore::UserWarning")),
    ],
    ids=["gbtree", "classes", "dart", "gblinear"],
)
def test_boosters_over_columns_of_several_types_with_nulls(
    log: Log, numbers: pd.DataFrame, classes: Array, settings: dict[str, Any]
) -> None:
    import xgboost

    large = 2**24 + np.arange(ROWS)
    frame = numbers.assign(e=large, f=large % 2 == 0, g=numbers.a.astype(np.float32))
    frame.loc[::7, "a"] = np.nan
    labels = classes if "num_class" in settings else classes > 0
    booster = xgboost.train({"max_depth": 3, "nthread": 1, **settings}, xgboost.DMatrix(frame, label=labels), 10)
    expected = booster.predict(xgboost.DMatrix(frame))
    uri = log("flavour-boosters", mlflow.xgboost.log_model, booster, signature=signature(frame, expected))

    found = next(iter(score(uri, frame).values()))
    assert np.array_equal(expected, found)


def test_an_xgboost_classifier(log: Log, numbers: pd.DataFrame, classes: Array) -> None:
    import xgboost

    model = xgboost.XGBClassifier(n_estimators=10, n_jobs=1).fit(numbers, classes)
    expected = model.predict(numbers)
    uri = log("flavour-xgboost-classes", mlflow.xgboost.log_model, model, signature=signature(numbers, expected))

    assert np.array_equal(expected, score(uri, numbers)["prediction"])


def test_an_xgboost_model_of_an_array_without_a_name(log: Log, numbers: pd.DataFrame, target: pd.Series) -> None:
    import xgboost

    x_NF = numbers.to_numpy(np.float32)
    model = xgboost.XGBRegressor(n_estimators=10, n_jobs=1).fit(x_NF, target)
    expected = model.predict(x_NF)
    uri = log("flavour-xgboost-array", mlflow.xgboost.log_model, model, signature=signature(x_NF, expected))

    assert np.array_equal(expected, score(uri, numbers, columns={"x": LETTERS}, policies=ROUND)["prediction"])


def test_a_lightgbm_booster(log: Log, numbers: pd.DataFrame, target: pd.Series) -> None:
    import lightgbm

    booster = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(numbers, label=target), 10)
    expected = booster.predict(numbers)
    uri = log("flavour-lightgbm", mlflow.lightgbm.log_model, booster, signature=signature(numbers, expected))

    assert np.array_equal(expected, score(uri, numbers)["prediction"])


def test_a_lightgbm_classifier(log: Log, numbers: pd.DataFrame, classes: Array) -> None:
    import lightgbm

    model = lightgbm.LGBMClassifier(n_estimators=10, n_jobs=1, verbose=-1).fit(numbers, classes)
    expected = model.predict(numbers)
    options = {"signature": signature(numbers, expected), "serialization_format": "skops"}
    uri = log("flavour-lightgbm-classes", mlflow.lightgbm.log_model, model, **options)

    assert np.array_equal(expected, score(uri, numbers)["prediction"])


CATBOOST = {"iterations": 10, "depth": 3, "verbose": False, "allow_writing_files": False, "thread_count": 1}


def test_a_catboost_regressor(log: Log, numbers: pd.DataFrame, target: pd.Series) -> None:
    import catboost

    model = catboost.CatBoostRegressor(**CATBOOST).fit(numbers, target)
    expected = model.predict(numbers)
    uri = log("flavour-catboost", mlflow.catboost.log_model, model, signature=signature(numbers, expected))

    assert np.array_equal(expected, score(uri, numbers)["prediction"])


@pytest.mark.parametrize("dtype", ["str", "category"])
def test_a_catboost_classifier_over_categories(log: Log, people: pd.DataFrame, is_customer: Array, dtype: str) -> None:
    import catboost

    # CatBoost takes no null as a category.
    frame = people.assign(city=people.city.fillna("none").astype(dtype), grade=people.grade.astype(dtype))
    model = catboost.CatBoostClassifier(cat_features=["city", "grade"], **CATBOOST)
    expected = model.fit(frame, np.where(is_customer, "yes", "no")).predict(frame)
    uri = log(f"flavour-catboost-{dtype}", mlflow.catboost.log_model, model, signature=signature(frame, expected))

    assert expected.tolist() == score(uri, frame)["prediction"].tolist()


def run_onnx(model: Any, feeds: Mapping[str, Array]) -> list[Array]:
    import onnxruntime

    return list(onnxruntime.InferenceSession(model.SerializeToString()).run(None, dict(feeds)))


@pytest.mark.parametrize("named", [True, False])
def test_an_onnx_classifier_gives_labels_and_probabilities(
    log: Log,
    numbers: pd.DataFrame,
    classes: Array,
    named: bool,  # noqa: FBT001 - a column of the table
) -> None:
    import skl2onnx
    from sklearn.linear_model import LogisticRegression

    x_NF = numbers.to_numpy(np.float32)
    model = skl2onnx.to_onnx(LogisticRegression().fit(x_NF, classes), x_NF[:1], options={"zipmap": False})
    label, probabilities = run_onnx(model, {"X": x_NF})
    outputs = {"label": label, "probabilities": probabilities}
    inferred = signature({"X": x_NF} if named else x_NF, outputs)
    uri = log(f"flavour-onnx-classes-{named}", mlflow.onnx.log_model, model, signature=inferred)
    found = score(uri, numbers, columns={"X": LETTERS}, policies=ROUND)

    assert np.array_equal(label, found["label"])
    # The last batch is shorter, and the kernels of some machines sum it in another order.
    np.testing.assert_allclose(probabilities, found["probabilities"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["array", "columns"])
def test_an_onnx_regressor_whose_signature_does_not_name_its_output(
    log: Log, numbers: pd.DataFrame, target: pd.Series, form: str
) -> None:
    import skl2onnx
    from sklearn.linear_model import LinearRegression

    x_NF = numbers.to_numpy(np.float32)
    model = skl2onnx.to_onnx(LinearRegression().fit(x_NF, target), x_NF[:1])
    (expected,) = run_onnx(model, {"X": x_NF})
    inferred = signature(x_NF, expected) if form == "array" else signature(numbers, expected[:, 0])
    uri = log(f"flavour-onnx-{form}", mlflow.onnx.log_model, model, signature=inferred)
    columns = {"x": LETTERS} if form == "array" else None
    found = score(uri, numbers, columns=columns, policies=ROUND)

    np.testing.assert_allclose(expected[:, 0], found["prediction"], rtol=0, atol=1e-6)  # for the same reason


def test_an_onnx_pipeline_with_an_input_for_each_column(log: Log, people: pd.DataFrame, is_customer: Array) -> None:
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    frame = people.assign(city=people.city.fillna("none"), income=people.income.fillna(0) / 1e5)
    columns = make_column_transformer((OneHotEncoder(), ["city", "grade"]), remainder="passthrough")
    pipeline = make_pipeline(columns, LinearRegression()).fit(frame, is_customer)
    feeds = {name: frame[[name]].to_numpy(np.float32 if name in ("age", "income") else object) for name in frame}
    types = [
        (name, (StringTensorType if x.dtype == object else FloatTensorType)([None, 1])) for name, x in feeds.items()
    ]
    model = skl2onnx.convert_sklearn(pipeline, initial_types=types)
    (expected,) = run_onnx(model, feeds)
    texts = {name: x.astype(str) if x.dtype == object else x for name, x in feeds.items()}
    uri = log("flavour-onnx-pipeline", mlflow.onnx.log_model, model, signature=signature(texts, expected))

    found = score(uri, frame, policies=ROUND)["prediction"]
    np.testing.assert_allclose(expected[:, 0], found, rtol=0, atol=1e-6)  # for the same reason


def test_a_statsmodels_regression_of_a_formula(log: Log, numbers: pd.DataFrame, target: pd.Series) -> None:
    import statsmodels.formula.api as formulas

    model = formulas.ols("y ~ a + b * c", numbers.assign(y=target)).fit()
    expected = model.predict(numbers).to_numpy()
    uri = log("flavour-statsmodels", mlflow.statsmodels.log_model, model, signature=signature(numbers, expected))

    with pytest.raises(ModelUnfit, match=r"\(mlflow.statsmodels\). Pass allow_pickle=True"):
        score(uri, numbers)
    # A formula's terms are added up in an order that depends on how many rows there are.
    np.testing.assert_allclose(expected, score(uri, numbers, allow_pickle=True)["prediction"], rtol=1e-14)


TEXTS = [
    f"a {size} {thing} of number {at}" for at in range(50) for size in ("good", "bad") for thing in ("person", "it")
]


TEXT_MODEL = {
    "@architectures": "spacy.TextCatBOW.v3",
    "exclusive_classes": True,
    "ngram_size": 1,
    "no_output_layer": False,
}


@pytest.fixture(scope="module")
def text_categories() -> Any:
    """A spaCy pipeline that has learnt two categories of text, from nothing."""
    import spacy
    from spacy.training import Example

    pipeline = spacy.blank("en")
    categories = pipeline.add_pipe("textcat", config={"model": TEXT_MODEL})
    for label in ("good", "bad"):
        categories.add_label(label)  # type: ignore[attr-defined]
    examples = [
        Example.from_dict(
            pipeline.make_doc(text), {"cats": {"good": float("good" in text), "bad": float("bad" in text)}}
        )
        for text in TEXTS[:20]
    ]
    pipeline.initialize(lambda: examples)
    pipeline.update(examples)
    return pipeline


def test_what_spacy_itself_returns_is_no_table_and_the_message_says_what_is(log: Log, text_categories: Any) -> None:
    frame = pd.DataFrame({"text": TEXTS})
    expected = pd.DataFrame({"predictions": [text_categories(text).cats for text in TEXTS]})
    uri = log("flavour-spacy", mlflow.spacy.log_model, text_categories, signature=signature(frame, expected))

    with pytest.raises(ModelUnfit, match=r"must be numbers or text, got .*each value as a column of its own"):
        score(uri, frame)


READS_SPACY = """
import mlflow
import pandas as pd
import spacy


class Categories(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.pipeline = spacy.load(context.artifacts["pipeline"])

    def predict(self, context, model_input):
        return pd.DataFrame([document.cats for document in self.pipeline.pipe(model_input["text"])])


mlflow.models.set_model(Categories())
"""


def test_a_spacy_pipeline_as_an_artifact_of_a_python_model(log: Log, text_categories: Any, tmp_path: Path) -> None:
    text_categories.to_disk(tmp_path / "pipeline")
    (tmp_path / "model.py").write_text(READS_SPACY)
    frame = pd.DataFrame({"text": TEXTS})
    expected = pd.DataFrame([text_categories(text).cats for text in TEXTS])
    options = {"artifacts": {"pipeline": str(tmp_path / "pipeline")}, "signature": signature(frame, expected)}
    uri = log("flavour-artifacts", mlflow.pyfunc.log_model, python_model=str(tmp_path / "model.py"), **options)
    found = score(uri, frame)

    # A matrix product of another number of rows may differ in the last place.
    np.testing.assert_allclose(expected.good, found["good"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(expected.bad, found["bad"], rtol=0, atol=1e-6)


READS_FILE = """
import json

import mlflow


class Prices(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input):
        with open(context.artifacts["prices"]) as file:
            prices = json.load(file)
        return [prices[grade] * age for grade, age in zip(model_input["grade"], model_input["age"])]


mlflow.models.set_model(Prices())
"""


def test_a_python_model_that_opens_a_file_in_each_pass(log: Log, people: pd.DataFrame, tmp_path: Path) -> None:
    prices = {"low": 0.5, "mid": 0.75, "high": 1.0}
    (tmp_path / "prices.json").write_text(json.dumps(prices))
    (tmp_path / "model.py").write_text(READS_FILE)
    expected = people.grade.map(prices) * people.age
    options = {
        "artifacts": {"prices": str(tmp_path / "prices.json")},
        "signature": signature(people, expected.to_numpy()),
    }
    uri = log("flavour-file", mlflow.pyfunc.log_model, python_model=str(tmp_path / "model.py"), **options)

    assert expected.tolist() == score(uri, people)["prediction"].tolist()


WITH_HINTS = """
import mlflow


class Shout(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[str]) -> list[str]:
        return [text.upper() for text in model_input]


mlflow.models.set_model(Shout())
"""


def test_a_python_model_whose_signature_is_its_type_hints(log: Log, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(WITH_HINTS)
    options = {"python_model": str(tmp_path / "model.py"), "input_example": ["a text"]}
    uri = log("flavour-hints", mlflow.pyfunc.log_model, **options)
    found = score(uri, pd.DataFrame({"text": TEXTS}), columns={"input": ("text",)})

    assert [text.upper() for text in TEXTS] == found["prediction"].tolist()


WITH_ROWS = """
import mlflow
import pydantic


class Person(pydantic.BaseModel):
    age: int
    city: str | None = None


class Price(pydantic.BaseModel):
    price: float
    city: str | None = None


class Prices(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[Person]) -> list[Price]:
        return [Price(price=row.age / 2, city=row.city) for row in model_input]


mlflow.models.set_model(Prices())
"""


def test_a_python_model_whose_type_hints_are_classes_of_rows(log: Log, people: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(WITH_ROWS)
    options = {"python_model": str(tmp_path / "model.py"), "input_example": [{"age": 40, "city": "Bern"}]}
    found = score(log("flavour-rows", mlflow.pyfunc.log_model, **options), people)

    assert (people.age / 2).tolist() == found["price"].tolist()
    assert people.city.astype(object).where(people.city.notna(), None).tolist() == found["city"].tolist()


def test_a_transformers_pipeline(log: Log) -> None:
    pytest.importorskip("transformers", reason="pip install -e '.[dev]' brings transformers")
    classify = tiny_bert("right")
    expected = [classify(text, truncation=True)[0] for text in TEXTS]
    schemas = Schema([ColSpec("string")]), Schema([ColSpec("string", "label"), ColSpec("double", "score")])
    uri = log("flavour-transformers", mlflow.transformers.log_model, classify, signature=ModelSignature(*schemas))
    found = score(uri, pd.DataFrame({"text": TEXTS}), columns={"text": ("text",)})

    assert [answer["label"] for answer in expected] == found["label"].tolist()
    # Texts are padded to those of their batch.
    np.testing.assert_allclose([answer["score"] for answer in expected], found["score"], rtol=0, atol=1e-5)


def test_a_sentence_transformer(minilm: str) -> None:
    expected = load_minilm().encode(TEXTS)
    found = score(minilm, pd.DataFrame({"gloss": TEXTS}))["prediction"]

    np.testing.assert_allclose(expected, found, rtol=0, atol=1e-5)  # for the same reason


def test_a_torch_network(linear: str, numbers: pd.DataFrame) -> None:
    import torch

    frame = numbers[["a", "b", "c"]].astype("float32")
    with torch.inference_mode():
        expected = mlflow.pytorch.load_model(linear)(torch.from_numpy(frame.to_numpy().copy())).numpy()
    found = score(linear, frame)["score"]

    # A matrix product of another number of rows may differ in the last place.
    np.testing.assert_allclose(expected[:, 0], found, rtol=0, atol=1e-6)


def log_trees(log: Log, library: str, frame: pd.DataFrame, labels: Array) -> tuple[str, Array]:
    """Fit trees of a library on a frame with categories, and register them; return what they predict, too."""
    import lightgbm
    import xgboost

    flavor: Any = mlflow.xgboost if library == "xgboost" else mlflow.lightgbm
    model: Any
    if library == "lightgbm":
        model = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(frame, label=labels), 10)
    elif library == "xgboost":
        model = xgboost.XGBClassifier(n_estimators=10, n_jobs=1, enable_categorical=True).fit(frame, labels)
    else:
        model = lightgbm.LGBMClassifier(n_estimators=10, n_jobs=1, verbose=-1).fit(frame, labels)
    expected = model.predict(frame)
    uri = log(
        f"flavour-text-{library.replace(' ', '-')}", flavor.log_model, model, signature=signature(frame, expected)
    )
    return uri, expected


@pytest.mark.parametrize("library", ["lightgbm", "lightgbm classifier", "xgboost"])
def test_trees_fitted_on_pandas_categories_take_their_texts(
    log: Log, people: pd.DataFrame, is_customer: Array, library: str
) -> None:
    frame = as_categories(people)
    uri, expected = log_trees(log, library, frame, is_customer)
    # In another order, and so that most batches lack some of the categories.
    order = frame.city.sort_values(ascending=False).index.to_numpy()
    found = score(uri, people.iloc[order].reset_index(drop=True))["prediction"]

    assert np.array_equal(expected[order], found)


MAKES_CATEGORIES = """
import lightgbm
import mlflow


class Trees(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.booster = lightgbm.Booster(model_file=context.artifacts["booster"])

    def predict(self, context, model_input):
        return self.booster.predict(model_input.astype({"city": "category", "grade": "category"}))


mlflow.models.set_model(Trees())
"""


def test_a_python_model_may_make_categories_of_text_for_lightgbm(
    log: Log, people: pd.DataFrame, is_customer: Array, tmp_path: Path
) -> None:
    import lightgbm

    frame = as_categories(people)
    booster = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(frame, label=is_customer), 10)
    booster.save_model(tmp_path / "booster.txt")
    (tmp_path / "model.py").write_text(MAKES_CATEGORIES)
    expected = booster.predict(frame)
    options = {"artifacts": {"booster": str(tmp_path / "booster.txt")}, "signature": signature(frame, expected)}
    uri = log("flavour-makes-categories", mlflow.pyfunc.log_model, python_model=str(tmp_path / "model.py"), **options)

    # LightGBM looks up each category by its text, so that a batch without some of them is no different.
    assert np.array_equal(expected, score(uri, frame)["prediction"])
