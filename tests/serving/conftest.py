"""Models logged once into the registry that the tests share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pytorch
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema

from tests.serving.toys import SCORE, network, tensor

Log = Callable[..., str]

_SCRIPT = """
import mlflow
import numpy as np
import pandas as pd


class Scripted(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        import {helper}

        return {helper}.answer(model_input)


mlflow.models.set_model(Scripted())
"""


def register(name: str, log_model: Callable[..., Any], *model: Any, **options: Any) -> str:
    """Register a model and return the address of its new version."""
    with mlflow.start_run(), warnings.catch_warnings():
        # MLflow advises on examples and type hints, which these models have no use for.
        warnings.simplefilter("ignore", UserWarning)
        logged = log_model(*model, name="model", registered_model_name=name, pip_requirements=["mlflow"], **options)
    return f"models:/{name}/{logged.registered_model_version}"


@pytest.fixture(scope="session")
def log(registry: Path) -> Log:
    """Registers a model by one of MLflow's log_model functions."""
    return register


@pytest.fixture(scope="session")
def log_network(registry: Path) -> Log:
    """Registers a torch module over the input x of four columns, as pt2 unless told."""

    def log_network(name: str, module: torch.nn.Module, outputs: Schema = SCORE, form: str = "pt2") -> str:
        signature = ModelSignature(Schema([tensor("float32", 4, name="x")]), outputs)
        example = {"input_example": torch.zeros(3, 4)} if form == "pt2" else {}
        options = {"signature": signature, "serialization_format": form, **example}
        return register(name, mlflow.pytorch.log_model, module, **options)

    return log_network


@pytest.fixture(scope="session")
def log_code(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Registers a Python model as code: `answer` is an expression over x, its input."""

    def log_code(name: str, answer: str, inputs: Schema, outputs: Schema) -> str:
        folder = tmp_path_factory.mktemp("code")
        # Python imports a name once, so that each model needs one of its own.
        helper = folder / f"helper_of_{name.replace('-', '_')}.py"
        helper.write_text(f"import numpy as np\nimport pandas as pd\n\n\ndef answer(x):\n    return {answer}\n")
        script = folder / "script.py"
        script.write_text(_SCRIPT.format(helper=helper.stem))
        options = {"signature": ModelSignature(inputs, outputs), "code_paths": [str(helper)]}
        return register(name, mlflow.pyfunc.log_model, python_model=str(script), **options)

    return log_code


@pytest.fixture(scope="session")
def pt2(log_network: Log) -> str:
    return log_network("pt2", network())


@pytest.fixture(scope="session")
def pickled(log_network: Log) -> str:
    return log_network("pickled", network(), form="pickle")


@pytest.fixture(scope="session")
def frame() -> pd.DataFrame:
    random = np.random.default_rng(3)
    columns = {"a": random.random(200), "b": random.random(200), "n": random.integers(0, 9, 200).astype("int32")}
    return pd.DataFrame(columns)
