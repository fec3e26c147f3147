"""The demo's model: minutes of delay on arrival, predicted when a flight leaves the ground.

Shapes: N rows, B rows in a batch, F features (`flights.FEATURES`, in that order).
"""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import mlflow.pytorch
import numpy as np
import polars as pl
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from deployments.demo.flights import FEATURES, TARGET, training_split

DEP_DELAY = FEATURES.index("dep_delay")
SEED = 2013
EPOCHS = 12
ROWS_PER_BATCH = 2_048
LEARNING_RATE_MAX = 2e-2
# Beyond this many minutes an error counts by its size, not its square, so that a few lost days do not rule.
HUBER_MINUTES = 20.0
SHIFT_MINUTES = 10.0
QUIETED_LOGGERS = ("mlflow.store.db.utils", "alembic.runtime.migration")


def train_and_register(folder: Path, name: str = "flight-delay", alias: str = "champion", epochs: int = EPOCHS) -> str:
    """Train on the flights in `folder`, register the model under `name` and return "models:/NAME@ALIAS".

    Tracking and registry are those that MLflow finds in its environment. Every call adds a version and moves
    the alias to it, but only for a model that beats "arrives as late as it left" on the test flights.

    Raises:
        ValueError: the model does not beat the baseline, so nothing was logged.

    """
    training, test = read_flights(folder, training_split()), read_flights(folder, ~training_split())
    model = train(training, epochs)
    scores = _score(model(test.features_NF), test.delay_N)
    baseline = _score(test.features_NF[:, DEP_DELAY], test.delay_N)
    if scores["mae_minutes"] >= baseline["mae_minutes"]:
        message = (
            f"The model must beat the baseline's mean error of {baseline['mae_minutes']:.2f} minutes, "
            f"got {scores['mae_minutes']:.2f}: give it more flights or more epochs."
        )
        raise ValueError(message)
    metrics = {f"test_{key}": value for key, value in scores.items()}
    metrics |= {f"baseline_{key}": value for key, value in baseline.items()}
    with quiet_migrations():
        version = _log(model, name, metrics, epochs)
        mlflow.MlflowClient().set_registered_model_alias(name, alias, version)
    return f"models:/{name}@{alias}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flights:
    """Flights that arrived: features [N, F] float32 and minutes of delay on arrival [N] float32."""

    features_NF: Tensor
    delay_N: Tensor

    def __post_init__(self) -> None:
        """Check that there is something to learn from, and no gap that would turn every weight into NaN."""
        gaps = int((~self.features_NF.isfinite()).sum())
        if gaps or not len(self.delay_N):
            message = (
                "Flights that arrived must be at least one and have all their features, "
                f"got {len(self.delay_N)} of them with {gaps} gaps: write the flights again."
            )
            raise ValueError(message)


class DelayModel(nn.Module):
    """The delay at departure plus the shift the network expects on the way: [B, F] float32 to [B] minutes.

    It standardises by itself: rows go in with the units they have in the files.
    """

    mean_F: Tensor
    scale_F: Tensor

    def __init__(self, mean_F: Tensor, scale_F: Tensor, width: int = 128) -> None:
        """Take each feature's mean and standard deviation over the training flights, both [F]."""
        super().__init__()
        self.register_buffer("mean_F", mean_F)
        self.register_buffer("scale_F", scale_F)
        self.layers = nn.Sequential(
            nn.Linear(len(mean_F), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Predict the delay on arrival in minutes: [B, F] to [B]."""
        shift_B1: Tensor = self.layers((features - self.mean_F) / self.scale_F)
        return features[:, DEP_DELAY] + SHIFT_MINUTES * shift_B1[:, 0]


def read_flights(folder: Path, rows: pl.Expr) -> Flights:
    """Read those of the `rows` that arrived; a cancelled or diverted flight has nothing to learn from."""
    arrived = pl.col(TARGET).is_not_null()
    table = pl.scan_parquet(folder / "flights-*.parquet").filter(rows & arrived).collect()
    return Flights(
        features_NF=table.select(FEATURES).to_torch(dtype=pl.Float32),
        delay_N=table[TARGET].to_torch(),
    )


def train(flights: Flights, epochs: int = EPOCHS) -> nn.Module:
    """Fit a model; the same flights on the same machine give the same weights; global randomness stays."""
    rows = len(flights.delay_N)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        scale_F = flights.features_NF.std(0, correction=0).clamp_min(1e-6)
        model = DelayModel(flights.features_NF.mean(0), scale_F)
        steps = epochs * math.ceil(rows / ROWS_PER_BATCH)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE_MAX, steps)
        for _ in _watched(epochs):
            order_N = torch.randperm(rows)
            for row_start in range(0, rows, ROWS_PER_BATCH):
                index_B = order_N[row_start : row_start + ROWS_PER_BATCH]
                optimizer.zero_grad()
                predicted_B = model(flights.features_NF[index_B])
                loss = nn.functional.huber_loss(predicted_B, flights.delay_N[index_B], delta=HUBER_MINUTES)
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(requires_grad=False)


def _watched(epochs: int) -> Iterator[int]:
    """Count the epochs, with a progress bar on a terminal."""
    yield from track(
        range(epochs),
        description="Training the delay model",
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _score(predicted_N: Tensor, delay_N: Tensor) -> dict[str, float]:
    error_N = (predicted_N - delay_N).double()
    return {
        "mae_minutes": error_N.abs().mean().item(),
        "r2": 1 - (error_N.square().mean() / delay_N.double().var(correction=0)).item(),
    }


def _log(model: nn.Module, name: str, metrics: dict[str, float], epochs: int) -> str:
    """Log the model as a pt2 archive that carries the names of its columns, and return its new version."""
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(FEATURES)), "features")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1,), "arr_delay_predicted")]),
    )
    with mlflow.start_run(run_name=name):
        mlflow.log_params({"seed": SEED, "epochs": epochs, "rows_per_batch": ROWS_PER_BATCH})
        mlflow.log_metrics(metrics)
        logged = mlflow.pytorch.log_model(
            model,
            name="model",
            signature=signature,
            # Two rows, since torch.export would fix a batch of one for ever. A tensor, since MLflow would add
            # its pyfunc flavour for an array, and that one cannot serve an input that has a name.
            input_example=torch.zeros(2, len(FEATURES)),
            metadata={"overnight": {"columns": {"features": list(FEATURES)}}},
            # Without the build's suffix (+cpu), which package indexes do not list.
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
            registered_model_name=name,
        )
    return str(logged.registered_model_version)


@contextmanager
def quiet_migrations() -> Iterator[None]:
    """Keep the creation of a fresh database out of the log; warnings and errors still pass."""
    loggers = [logging.getLogger(logger) for logger in QUIETED_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
