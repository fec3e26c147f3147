"""Which models take missing values, as their files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from mlflow.models import Model as MLmodel
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from serving.model.missing_values import takes_missing_values

X, Y = np.random.default_rng(0).random((20, 2)), [0, 1] * 10
SAVED_BY_SKOPS = {
    "python_function": {"loader_module": "mlflow.sklearn", "model_path": "model.skops"},
    "sklearn": {"serialization_format": "skops"},
}


def impute(*columns: int) -> tuple[Any, list[int]]:
    return make_pipeline(SimpleImputer(), StandardScaler()), list(columns)


@pytest.mark.parametrize(
    ("model", "takes"),
    [
        (make_pipeline(SimpleImputer(), LogisticRegression()), True),
        (make_pipeline(StandardScaler(), "passthrough", SimpleImputer(), LogisticRegression()), True),
        (make_pipeline(make_column_transformer(impute(0, 1)), LogisticRegression()), True),
        (make_pipeline(make_column_transformer(impute(0)), LogisticRegression()), True),
        (HistGradientBoostingClassifier(max_iter=2), True),
        (make_pipeline(make_column_transformer(impute(0), remainder="passthrough"), LogisticRegression()), False),
        (make_pipeline(make_column_transformer((FunctionTransformer(), [1]), impute(0)), LogisticRegression()), False),
        (make_pipeline(StandardScaler(), LogisticRegression()), False),
        (LogisticRegression(), False),
    ],
    ids=lambda value: " ".join(repr(value).split())[:60],
)
def test_a_pipeline_takes_them_where_its_first_steps_do(model: Any, *, takes: bool, tmp_path: Path) -> None:
    skops.io.dump(model.fit(X, Y), tmp_path / "model.skops")

    assert takes == takes_missing_values(tmp_path, MLmodel(flavors=SAVED_BY_SKOPS))


@pytest.mark.parametrize(
    ("flavours", "takes"),
    [
        ({"python_function": {"loader_module": "mlflow.xgboost"}}, True),
        ({"python_function": {"loader_module": "mlflow.lightgbm"}}, True),
        ({"python_function": {"loader_module": "mlflow.pyfunc.model"}}, False),
        ({"pytorch": {}}, False),
        (SAVED_BY_SKOPS, False),
    ],
)
def test_other_models_take_them_by_their_flavour_and_files_that_do_not_read_say_nothing(
    flavours: dict[str, Any],
    *,
    takes: bool,
    tmp_path: Path,
) -> None:
    (tmp_path / "model.skops").write_bytes(b"no zip")

    assert takes == takes_missing_values(tmp_path, MLmodel(flavors=flavours))
