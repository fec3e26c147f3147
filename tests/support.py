"""What tests and benchmarks make: models in the registry, and tables to score."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import polars as pl
import torch
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import Schema, TensorSpec


def register_network(name: str, seed: int) -> str:
    """Register a small seeded network over a, b and c as pt2, and return the address of the new version."""
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    return register_torch(name, torch.nn.Sequential(*layers), ("a", "b", "c"))


def register_mlp(name: str, features: tuple[str, ...]) -> str:
    """Register the network F-256-256-1 over these features, and return the address of the new version."""
    torch.manual_seed(0)
    widths = (len(features), 256, 256)
    hidden = [layer for at in (0, 1) for layer in (torch.nn.Linear(widths[at], widths[at + 1]), torch.nn.ReLU())]
    return register_torch(name, torch.nn.Sequential(*hidden, torch.nn.Linear(256, 1)), features)


def register_torch(name: str, network: torch.nn.Module, features: tuple[str, ...]) -> str:
    """Register a network that gives one score a row as pt2, and return the address of the new version."""
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("float32"), (-1, len(features)), "x")]),
        Schema([TensorSpec(np.dtype("float32"), (-1, 1), "score")]),
    )
    with mlflow.start_run():
        logged = mlflow.pytorch.log_model(
            network.eval(),
            name="model",
            signature=signature,
            input_example=torch.zeros(2, len(features)),
            metadata={"overnight": {"columns": {"x": list(features)}}},
            pip_requirements=["torch"],
            registered_model_name=name,
        )
    return f"models:/{name}/{logged.registered_model_version}"


_SCRIPT = """
import time

import mlflow


class Scripted(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        {line}
        return model_input["a"].to_numpy() * 2


mlflow.models.set_model(Scripted())
"""


def register_sleepy(name: str, seconds: float) -> str:
    """Register a model that doubles the column a and sleeps for each batch; return its address."""
    return register_script(name, f"time.sleep({seconds})")


def register_script(name: str, line: str) -> str:
    """Register a pyfunc model that runs one line, then doubles the column a; return its address."""
    inputs = pd.DataFrame({"a": np.zeros(2, dtype=np.float32)})
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(), warnings.catch_warnings():
        # MLflow advises on type hints and examples, which this model has no use for.
        warnings.simplefilter("ignore", UserWarning)
        script = Path(folder) / "scripted.py"
        script.write_text(_SCRIPT.format(line=line))
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(script),
            signature=infer_signature(inputs, np.zeros(2, dtype=np.float32)),
            pip_requirements=["mlflow"],
            registered_model_name=name,
        )
    return f"models:/{name}/{logged.registered_model_version}"


def write_customers(
    folder: Path,
    *,
    rows: int,
    files: int,
    rows_per_group: int,
    edit: Callable[[pl.DataFrame], pl.DataFrame] | None = None,
) -> Path:
    """Write a seeded table of customers with the features a, b and c."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    table = pl.DataFrame(
        {"customer": np.arange(rows), **{name: random.standard_normal(rows, dtype=np.float32) for name in "abc"}}
    )
    table = table if edit is None else edit(table)
    for at in range(files):
        part = table[rows * at // files : rows * (at + 1) // files]
        part.write_parquet(folder / f"customers-{at:02d}.parquet", row_group_size=rows_per_group)
    return folder
