"""Whether a model takes missing values, as its files say; none of them is unpickled, and no code of the model runs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from mlflow.models import Model as MLmodel

# Libraries whose models learn where rows with a missing value go.
_FLAVOURS = {"mlflow.xgboost", "mlflow.lightgbm", "mlflow.catboost"}
_TAKE = {
    *("SimpleImputer", "KNNImputer", "IterativeImputer", "OneHotEncoder", "OrdinalEncoder"),
    *("HistGradientBoostingClassifier", "HistGradientBoostingRegressor"),
    *("XGBClassifier", "XGBRegressor", "LGBMClassifier", "LGBMRegressor"),
}
# These leave a missing value as it is, for the next step.
_PASS_ON = {
    *("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "QuantileTransformer", "PowerTransformer"),
}


def takes_missing_values(folder: Path, mlmodel: MLmodel) -> bool:
    """Return whether a model takes missing values: by its flavour, or by the first steps of a pipeline.

    A pipeline of scikit-learn is looked into where skops has saved it, since that says its steps in JSON.
    """
    pyfunc = mlmodel.flavors.get("python_function", {})
    loader, name = pyfunc.get("loader_module"), str(pyfunc.get("model_path"))
    if loader in _FLAVOURS:
        return True
    is_skops = mlmodel.flavors.get("sklearn", {}).get("serialization_format") == "skops"
    if loader != "mlflow.sklearn" or not is_skops or Path(name).name != name:
        return False
    try:
        with zipfile.ZipFile(folder / name) as archive:
            state = json.loads(archive.read("schema.json"))
        return _find_outcome(state) is True
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile):
        # What is wrong with the file is said when it is loaded.
        return False


def _find_outcome(state: dict[str, Any]) -> bool | None:
    """Return whether a step takes missing values, None where it leaves them to the next one."""
    name = state["__class__"]
    if name == "Pipeline":
        outcomes = (_find_outcome(step["content"][1]) for step in _read_attribute(state, "steps"))
        return next((found for found in outcomes if found is not None), None)
    if name == "ColumnTransformer":
        found = [_find_outcome(each["content"][1]) for each in _read_attribute(state, "transformers_")]
        return False if False in found else None if None in found else True
    if name in ("str", "NoneType"):
        # In place of a step: columns are dropped, or passed on.
        return True if state.get("content") == '"drop"' else None
    return True if name in _TAKE else None if name in _PASS_ON else False


def _read_attribute(state: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = state["content"]["content"][name]["content"]
    return found
