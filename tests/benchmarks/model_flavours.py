"""The models of `make bench-models`: how each is fitted and logged, and the ways in which its own library predicts.

Shapes: n rows of a batch, F = 32 features.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import Schema, TensorSpec

from tests.benchmarks.shared import FEATURES, FOLDER

_ROWS_TO_FIT = 20_000
_INPUT = "features"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to predict a batch: `prepare` makes of a DataFrame what `predict` takes."""

    prepare: Callable[[pd.DataFrame], Any]
    predict: Callable[[Any], npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """A kind of model.

    Attributes:
        log: Fits and registers a model, and returns what `log_model` of MLflow returned.
        open_ways: Loads it by its own library, on so many threads; returns each way to predict by name.
        modules: What a process imports before it is timed.
        options: What a call of batch_inference says beside the key.
        as_pyfunc: Makes of a DataFrame what the model takes through mlflow.pyfunc.
    """

    log: Callable[[pd.DataFrame, pd.Series], Any]
    open_ways: Callable[[str, int], dict[str, Way]]
    modules: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    as_pyfunc: Callable[[pd.DataFrame], Any] = lambda frame: frame


def register_flavours(names: tuple[str, ...]) -> dict[str, str]:
    """Fit and register each model once, and return the address of each."""
    done = FOLDER / "flavours.json"
    known: dict[str, str] = json.loads(done.read_text()) if done.exists() else {}
    random = np.random.default_rng(0)
    x_nF = pd.DataFrame(random.standard_normal((_ROWS_TO_FIT, len(FEATURES))), columns=list(FEATURES))
    score_n = x_nF["f00"] + x_nF["f01"] * x_nF["f02"] + random.standard_normal(_ROWS_TO_FIT) / 10
    for name in names:
        if name not in known:
            with mlflow.start_run(), warnings.catch_warnings():
                # MLflow advises on columns of integers; the labels of classifiers are some.
                warnings.simplefilter("ignore", UserWarning)
                version = FLAVOURS[name].log(x_nF, score_n).registered_model_version
            known[name] = f"models:/{name}/{version}"
            done.write_text(json.dumps(known))
    return {name: known[name] for name in names}


def open_pyfunc(name: str, address: str) -> Way:
    """Return the way of MLflow, the same for every flavour."""
    import mlflow.pyfunc

    loaded = mlflow.pyfunc.load_model(address)
    return Way(prepare=FLAVOURS[name].as_pyfunc, predict=lambda batch: flatten(loaded.predict(batch)))


def flatten(predictions: Any) -> npt.NDArray[Any]:
    """Return the predictions of one output as [n]."""
    if isinstance(predictions, dict):
        (predictions,) = predictions.values()
    return np.asarray(predictions).reshape(-1)


def _keep(batch: Any) -> Any:
    return batch


def _to_float32(frame: pd.DataFrame) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(frame.to_numpy(dtype=np.float32))


def _make_options(name: str, requirement: str, inputs: pd.DataFrame, outputs: Any) -> dict[str, Any]:
    return {
        "name": "model",
        "registered_model_name": name,
        "signature": infer_signature(inputs, outputs),
        "pip_requirements": [requirement],
    }


def _log_logistic_regression(x_nF: pd.DataFrame, score_n: pd.Series) -> Any:
    import mlflow.sklearn
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(x_nF, score_n > 0)
    options = _make_options("logistic_regression", "scikit-learn", x_nF[:5], model.predict(x_nF[:5]))
    return mlflow.sklearn.log_model(model, **options)


def _open_logistic_regression(address: str, threads: int) -> dict[str, Way]:
    import mlflow.sklearn
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)
    model = mlflow.sklearn.load_model(address)
    return {
        "frame": Way(prepare=_keep, predict=model.predict),
        "array": Way(prepare=pd.DataFrame.to_numpy, predict=model.predict),
    }


def _log_random_forest(x_nF: pd.DataFrame, score_n: pd.Series) -> Any:
    import mlflow.sklearn
    from sklearn.ensemble import RandomForestRegressor

    model = RandomForestRegressor(100, max_depth=10, n_jobs=-1, random_state=0).fit(x_nF, score_n)
    options = _make_options("random_forest", "scikit-learn", x_nF[:5], model.predict(x_nF[:5]))
    return mlflow.sklearn.log_model(model, serialization_format="cloudpickle", **options)


def _open_random_forest(address: str, threads: int) -> dict[str, Way]:
    import mlflow.sklearn

    model = mlflow.sklearn.load_model(address).set_params(n_jobs=threads)
    return {
        "frame": Way(prepare=_keep, predict=model.predict),
        "array": Way(prepare=_to_float32, predict=model.predict),
    }


def _log_xgboost(x_nF: pd.DataFrame, score_n: pd.Series) -> Any:
    import mlflow.xgboost
    import xgboost

    labels = xgboost.DMatrix(x_nF, label=score_n > 0)
    booster = xgboost.train({"objective": "binary:logistic", "max_depth": 6}, labels, 200)
    options = _make_options("xgboost", "xgboost-cpu", x_nF[:5], booster.predict(xgboost.DMatrix(x_nF[:5])))
    return mlflow.xgboost.log_model(booster, **options)


def _open_xgboost(address: str, threads: int) -> dict[str, Way]:
    import mlflow.xgboost

    booster = mlflow.xgboost.load_model(address)
    booster.set_param({"nthread": threads})
    return {
        "frame": Way(prepare=_keep, predict=booster.inplace_predict),
        "array": Way(prepare=_to_float32, predict=lambda x_nF: booster.inplace_predict(x_nF, validate_features=False)),
    }


def _log_lightgbm(x_nF: pd.DataFrame, score_n: pd.Series) -> Any:
    import lightgbm
    import mlflow.lightgbm

    labels = lightgbm.Dataset(x_nF, label=score_n > 0)
    booster = lightgbm.train({"objective": "binary", "verbose": -1}, labels, 200)
    return mlflow.lightgbm.log_model(
        booster, **_make_options("lightgbm", "lightgbm", x_nF[:5], booster.predict(x_nF[:5]))
    )


def _open_lightgbm(address: str, threads: int) -> dict[str, Way]:
    import mlflow.lightgbm

    booster = mlflow.lightgbm.load_model(address)
    return {
        "frame": Way(prepare=_keep, predict=lambda batch: booster.predict(batch, num_threads=threads)),
        # It compares in float64: a rounded value may fall on the other side of a split.
        "array": Way(prepare=pd.DataFrame.to_numpy, predict=lambda batch: booster.predict(batch, num_threads=threads)),
    }


def _log_catboost(x_nF: pd.DataFrame, score_n: pd.Series) -> Any:
    import catboost
    import mlflow.catboost

    settings = {"verbose": False, "allow_writing_files": False, "random_seed": 0}
    model = catboost.CatBoostRegressor(iterations=200, depth=6, **settings).fit(x_nF, score_n)
    return mlflow.catboost.log_model(model, **_make_options("catboost", "catboost", x_nF[:5], model.predict(x_nF[:5])))


def _open_catboost(address: str, threads: int) -> dict[str, Way]:
    import mlflow.catboost

    model = mlflow.catboost.load_model(address)
    return {
        "frame": Way(prepare=_keep, predict=lambda batch: model.predict(batch, thread_count=threads)),
        "array": Way(prepare=_to_float32, predict=lambda batch: model.predict(batch, thread_count=threads)),
    }


def _log_onnx(x_nF: pd.DataFrame, score_n: pd.Series) -> Any:
    import mlflow.onnx
    import onnxmltools
    import xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    model = xgboost.XGBRegressor(n_estimators=200, max_depth=6).fit(_to_float32(x_nF), score_n)
    converted = onnxmltools.convert_xgboost(model, initial_types=[(_INPUT, FloatTensorType([None, len(FEATURES)]))])
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("float32"), (-1, len(FEATURES)), _INPUT)]),
        Schema([TensorSpec(np.dtype("float32"), (-1, 1), "variable")]),
    )
    return mlflow.onnx.log_model(
        converted,
        name="model",
        registered_model_name="onnx",
        signature=signature,
        metadata={"overnight": {"columns": {_INPUT: list(FEATURES)}}},
        pip_requirements=["onnxruntime"],
    )


def _open_onnx(address: str, threads: int) -> dict[str, Way]:
    import mlflow.onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(mlflow.onnx.load_model(address).SerializeToString(), options)
    run = lambda x_nF: flatten(session.run(None, {_INPUT: x_nF})[0])
    return {"array": Way(prepare=_to_float32, predict=run)}


FLAVOURS = {
    "logistic_regression": Flavour(
        log=_log_logistic_regression, open_ways=_open_logistic_regression, modules=("mlflow.sklearn", "skops.io")
    ),
    "xgboost": Flavour(log=_log_xgboost, open_ways=_open_xgboost, modules=("mlflow.xgboost", "xgboost")),
    "lightgbm": Flavour(log=_log_lightgbm, open_ways=_open_lightgbm, modules=("mlflow.lightgbm", "lightgbm")),
    "random_forest": Flavour(
        log=_log_random_forest,
        open_ways=_open_random_forest,
        modules=("mlflow.sklearn", "sklearn.ensemble"),
        options={"allow_pickle": True},
    ),
    "onnx": Flavour(
        log=_log_onnx,
        open_ways=_open_onnx,
        modules=("mlflow.onnx", "onnxruntime"),
        options={"policies": {"*": {"cast": "round"}}},
        as_pyfunc=lambda frame: {_INPUT: _to_float32(frame)},
    ),
    "catboost": Flavour(log=_log_catboost, open_ways=_open_catboost, modules=("mlflow.catboost", "catboost")),
}
