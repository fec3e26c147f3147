"""The model beats its baseline, comes back from the registry as it was, and says what it eats."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import polars as pl
import pytest
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow.models.model import ModelInfo

from deployments.demo import delay_model
from deployments.demo.delay_model import Flights, read_flights, train, train_and_register
from deployments.demo.flights import FEATURES, KEY, TARGET, training_split

# MLflow 3.17 maps its tables with a loader strategy that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """What one call of train_and_register left behind."""

    uri: str
    trained: torch.nn.Module
    version: ModelVersion
    info: ModelInfo
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def unseen_flights(flights_folder: Path) -> Flights:
    return read_flights(flights_folder, ~training_split())


@pytest.fixture(scope="module")
def registered(flights_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    folder = tmp_path_factory.mktemp("registry")
    models: list[torch.nn.Module] = []

    def train_in_sight(flights: Flights, epochs: int) -> torch.nn.Module:
        models.append(train(flights, epochs))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setattr(delay_model, "train", train_in_sight)
        patch.chdir(folder)
        uri = train_and_register(flights_folder)
        client = mlflow.MlflowClient()
        version = client.get_model_version_by_alias("flight-delay", "champion")
        assert version.run_id is not None
        yield Registered(
            uri=uri,
            trained=models[0],
            version=version,
            info=mlflow.models.get_model_info(uri),
            metrics=client.get_run(version.run_id).data.metrics,
        )


@pytest.mark.machines
def test_the_alias_resolves_to_the_new_version(registered: Registered) -> None:
    assert registered.uri == "models:/flight-delay@champion"
    assert str(registered.version.version) == "1"


@pytest.mark.machines
def test_the_model_beats_arriving_as_late_as_it_left(registered: Registered) -> None:
    metrics = registered.metrics

    assert metrics["test_mae_minutes"] < 0.75 * metrics["baseline_mae_minutes"]
    assert metrics["test_r2"] > 0.89 > metrics["baseline_r2"]


@pytest.mark.machines
def test_the_signature_names_the_tensors_and_leaves_the_batch_open(registered: Registered) -> None:
    signature = registered.info.signature
    inputs = [(spec.name, spec.type, spec.shape) for spec in signature.inputs]
    outputs = [(spec.name, spec.type, spec.shape) for spec in signature.outputs]

    assert [("features", np.float32, (-1, len(FEATURES)))] == inputs
    assert [("arr_delay_predicted", np.float32, (-1,))] == outputs


@pytest.mark.machines
def test_the_model_carries_the_names_of_its_columns(registered: Registered) -> None:
    assert {"overnight": {"columns": {"features": list(FEATURES)}}} == registered.info.metadata


@pytest.mark.parametrize("rows", [1, 2, 7, 4_096])
@pytest.mark.machines
def test_it_loads_without_pickle_and_predicts_the_same(
    registered: Registered, unseen_flights: Flights, rows: int
) -> None:
    features = unseen_flights.features_NF[:rows]
    loaded = mlflow.pytorch.load_model(registered.uri)

    assert torch.equal(registered.trained(features), loaded(features))


def test_training_twice_gives_the_same_weights_and_keeps_the_random_state(unseen_flights: Flights) -> None:
    before = torch.get_rng_state()
    first, second = (train(unseen_flights, epochs=1).state_dict() for _ in range(2))

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_does_not_beat_the_baseline_is_never_logged(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    columns = {name: generator.normal(size=512).astype(np.float32) for name in FEATURES}
    punctual = pl.DataFrame({KEY: range(512), **columns, TARGET: columns["dep_delay"]})
    punctual.write_parquet(tmp_path / "flights-000.parquet")

    with pytest.raises(ValueError, match=r"must beat the baseline's mean error of 0\.00 minutes"):
        train_and_register(tmp_path)


def test_flights_with_gaps_are_refused() -> None:
    features = torch.full((1, len(FEATURES)), torch.nan)

    with pytest.raises(ValueError, match=f"got 1 of them with {len(FEATURES)} gaps"):
        Flights(features_NF=features, delay_N=torch.zeros(1))
