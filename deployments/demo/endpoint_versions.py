"""The versions of the delay model that the demo's endpoint is offered: two good ones, and three with a fault."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from deployments.demo.delay_model import quiet_migrations, train_and_register
from deployments.demo.flights import FEATURES

# Apart from flight-delay, whose versions the batch demo goes by.
NAME = "flight-delay-online"
FAULTS = ("moody", "delicate", "slow")
_EPOCHS_LONGER = 16
_SCRIPT = Path(__file__).with_name("endpoint_faulty.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Addresses of the versions, as a spec takes them."""

    first: str
    second: str
    moody: str
    delicate: str
    slow: str


def register_versions(folder: Path) -> Versions:
    """Register what is not there yet; the demo's own model is the first version."""
    client = mlflow.MlflowClient()
    aliases = _aliases(client)
    with quiet_migrations():
        if "first" not in aliases:
            copy = client.copy_model_version("models:/flight-delay@champion", NAME)
            client.set_registered_model_alias(NAME, "first", copy.version)
        mlflow.set_experiment("flight-delay")
        if "second" not in aliases:
            train_and_register(folder / "flights", NAME, "second", epochs=_EPOCHS_LONGER)
        for fault in FAULTS:
            if fault not in aliases:
                version = register_faulty(fault, NAME, "features", FEATURES, "arr_delay_predicted")
                client.set_registered_model_alias(NAME, fault, version)
    aliases = _aliases(client)
    return Versions(**{alias: f"models:/{NAME}/{version}" for alias, version in aliases.items()})


def _aliases(client: mlflow.MlflowClient) -> dict[str, str]:
    found = client.search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for model in found for alias, version in dict(model.aliases).items()}


def register_faulty(fault: str, name: str, given: str, columns: Sequence[str], output: str) -> str:
    """Register a version with a fault, "" for none, of a model that takes the columns as `given`; return its number."""
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(columns)), given)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1,), output)]),
    )
    with mlflow.start_run(run_name=f"{name}-{fault}"), warnings.catch_warnings():
        # MLflow advises on type hints and examples, which this model has no use for.
        warnings.simplefilter("ignore", UserWarning)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(_SCRIPT),
            model_config={"fault": fault},
            signature=signature,
            metadata={"overnight": {"columns": {given: list(columns)}}},
            pip_requirements=["mlflow"],
            registered_model_name=name,
        )
    return str(logged.registered_model_version)
