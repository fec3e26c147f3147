"""What is said of a model before it is run: whether it loads, what it takes and gives, and what it lacks."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature, infer_signature
from mlflow.types.schema import ColSpec, Schema

from serving.errors import ModelNotFound
from serving.model.model_check import check_model


class Doubles(mlflow.pyfunc.PythonModel):
    """A model that is logged as an object, by cloudpickle."""

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN201
        return model_input["a"].to_numpy() * 2


def register_pickled(name: str, **options: object) -> str:
    """Register a pickled model and return its address."""
    inputs = pd.DataFrame({"a": np.zeros(2, dtype=np.float32)})
    with mlflow.start_run(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        given = {"pip_requirements": ["mlflow"], "signature": infer_signature(inputs, np.zeros(2, dtype=np.float32))}
        logged = mlflow.pyfunc.log_model(
            name="model", python_model=Doubles(), registered_model_name=name, **(given | options)
        )
    return f"models:/{name}/{logged.registered_model_version}"


def test_a_model_that_loads_is_told_in_full(linear: str) -> None:
    found = check_model(linear)

    assert (True, (), ("pytorch",), None) == (found.loads, found.problems, found.flavors, found.install)
    assert found.contract is not None
    assert ["a", "b", "c"] == [column.name for column in found.contract.columns]
    assert ["score"] == [output.name for output in found.contract.outputs]
    assert (platform.python_version(), platform.python_version()) == (found.python_logged, found.python_here)
    assert ("torch", True) in [(each.name, each.fits) for each in found.requirements]
    assert () == found.pickles
    assert Path(found.folder).is_dir()
    assert ("loads here", "yes") in found.list_figures()


def test_a_pickled_model_is_told_with_its_pickles_and_loads_where_that_is_allowed(registry: Path) -> None:
    uri = register_pickled("pickled")
    refused, allowed = check_model(uri), check_model(uri, allow_pickle=True)

    assert (False, True) == (refused.loads, allowed.loads)
    assert "must not need unpickling" in refused.problems[0]
    assert any(name.endswith(".pkl") for name in refused.pickles)
    assert ("loads here", "no") in refused.list_figures()


def test_packages_that_are_missing_or_differ_are_told_with_the_command_that_installs_them(registry: Path) -> None:
    uri = register_pickled("lacking", pip_requirements=["mlflow", "no-such-package==1.2", "numpy<1", "-e .", "# none"])
    found = check_model(uri, allow_pickle=True)
    unfit = {each.name: each.installed for each in found.requirements if not each.fits}

    assert {"no-such-package": None, "numpy": np.__version__} == unfit
    assert "pip install no-such-package==1.2 'numpy<1'" == found.install
    assert "no-such-package==1.2 (is missing)" in dict(found.list_figures())["packages"]


def test_columns_and_outputs_that_may_be_null_are_told(registry: Path) -> None:
    taken = Schema([ColSpec("double", "a"), ColSpec("double", "b", required=False)])
    given = Schema([ColSpec("double", "score"), ColSpec("string", "why", required=False)])
    figures = dict(check_model(register_pickled("nulls", signature=ModelSignature(taken, given))).list_figures())

    assert "a (float64), b (float64, may be null)" == figures["inputs"]
    assert "score (float64), why (str, may be null)" == figures["outputs"]


def test_a_model_without_a_signature_is_told(registry: Path) -> None:
    found = check_model(register_pickled("unsigned", signature=None), allow_pickle=True)

    assert (False, None) == (found.loads, found.contract)
    assert "signature" in found.problems[0]
    assert ("inputs", "unknown") in found.list_figures()


def test_code_in_a_model_is_told(sleepy: str) -> None:
    found = check_model(sleepy)

    assert found.loads
    assert any(name.endswith(".py") for name in found.code)


def test_a_model_that_is_not_there_is_an_error(registry: Path) -> None:
    with pytest.raises(ModelNotFound, match="models:/nobody/1 must be registered"):
        check_model("models:/nobody/1")
