"""The data and the model of every demo: the flights, and a model that is trained on them, each made once."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from deployments.demo.flights import write_flights

FLIGHTS = 336_776

console = Console()


def use_registry(folder: Path) -> None:
    """Point MLflow at the demo's own registry, before anything imports it."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"


def prepare_data(folder: Path) -> None:
    """Write the flights and train the model, each unless it exists."""
    flights = folder / "flights"
    if not (folder / "flights.done").exists():
        console.print(f"Writing {FLIGHTS:,} flights to {flights}")
        write_flights(flights)
        (folder / "flights.done").touch()
    if not (folder / "model.done").exists():
        console.print("Training the delay model, and registering it with MLflow as [bold]flight-delay@champion[/]")
        _train(folder, flights)
        (folder / "model.done").touch()


def _train(folder: Path, flights: Path) -> None:
    import mlflow  # noqa: PLC0415 - a second call needs neither MLflow's flavours nor torch

    from deployments.demo.delay_model import quiet_migrations, train_and_register  # noqa: PLC0415

    with quiet_migrations():
        client = mlflow.MlflowClient()
        for name in ("flight-delay", "overnight"):
            if client.get_experiment_by_name(name) is None:
                client.create_experiment(name, artifact_location=(folder / "mlruns" / name).as_uri())
        mlflow.set_experiment("flight-delay")
        train_and_register(flights)
