"""The training set of a model, as MLflow knows it: its statistics are what a gate may hold runs against.

The run that logged the model has them as an artifact, or names the training set as one of its datasets. Then the
Parquet files are read once, and what came of them is kept at the destination.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient, MlflowException
from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset as LoggedDataset
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from serving.errors import BadInput, OvernightError, SourceFormat, StorageFault, shorten_error, suggest_name
from serving.model.pin import ModelPin
from tasks.batch.chunk_layout import CHUNK_BYTES_MAX, block_rows, cut_chunks
from tasks.batch.chunk_reader import Reader
from tasks.batch.chunk_statistics import StatisticsCollector, describe_table
from tasks.batch.column_statistics import TableStatistics, add_tables, read_statistics, write_statistics
from tasks.batch.dataset import Dataset, open_dataset
from tasks.batch.plan import ROOT, Plan
from tasks.batch.source import pin_source
from tasks.storage import Storage

# Where the run that logged a model has the statistics of its training set.
STATISTICS_ARTIFACT = "overnight/statistics.json"
# The second is what MLflow's own autologging says.
_TRAINING_CONTEXTS = ("training", "train")
_ARTIFACT_BYTES_MAX = 256 << 20
_ROWS_PER_CHUNK = 250_000
_CHUNKS_AT_ONCE = 256
_SHOWN = 10
_DIGEST_SHOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStatistics:
    """The statistics of a training set: columns that the model reads as inputs, and those named as its predictions."""

    title: str
    statistics: TableStatistics


def log_training_statistics(training: Any, run_id: str | None = None) -> TableStatistics:
    """Log the statistics of a training set with an MLflow run, for gates over the models that this run logs.

    A gate with the baseline TrainingSet takes them from there, and does not read the training set itself.

    Args:
        training: A table, as pyarrow.table takes it: of pandas, polars or Arrow. A column of predictions or labels
            has the name that the model's predictions have.
        run_id: The MLflow run; the active one where None.

    Returns:
        What was logged.

    Raises:
        BadInput: There is no active run.
    """
    active = mlflow.active_run()
    chosen = run_id or (active.info.run_id if active else None)
    if chosen is None:
        message = (
            "Statistics of a training set must go with an MLflow run, got no active one. Call this within "
            "mlflow.start_run(), or give run_id."
        )
        raise BadInput(message)
    statistics = describe_table(training if isinstance(training, pa.Table) else pa.table(training))
    MlflowClient().log_text(chosen, write_statistics(statistics).decode(), STATISTICS_ARTIFACT)
    return statistics


def find_training_statistics(storage: Storage, plan: Plan, dataset_name: str | None = None) -> TrainingStatistics:
    """Return the statistics of what the model of a plan was trained on.

    Those that its MLflow run has logged come first. Else the Parquet files of its dataset for training are read, only
    the columns that the model reads or predicts, and what came of them is kept at the destination: the next run over
    the same dataset and model reads no file of it.

    Args:
        storage: The destination of the run.
        plan: Names the model and its columns.
        dataset_name: The name of the dataset in MLflow, where the model's run has logged several.

    Raises:
        BadInput: The model has no run, the run no such dataset, or the dataset is no Parquet that can be read, or has
            no column that the model reads.
        StorageFault: The storage of the dataset does not answer.
    """
    uri = plan.model.uri
    client = MlflowClient()
    run = _find_run(client, plan.model)
    logged = _find_logged_statistics(client, run, uri)
    if logged is not None:
        title = f"the training set of {uri} (logged with its MLflow run)"
        return TrainingStatistics(title=title, statistics=_sort_columns(logged, plan, title))
    dataset = _choose_dataset(run, uri, dataset_name)
    address = _read_address(dataset, uri)
    title = f"the training set of {uri} ({address})"
    path = _find_path(dataset, plan)
    kept = storage.read(path)
    if kept is not None:
        return TrainingStatistics(title=title, statistics=read_statistics(kept, storage.address(path)))
    statistics = _sort_columns(_describe_files(address, plan, storage), plan, title)
    storage.put_new(path, write_statistics(statistics))
    return TrainingStatistics(title=title, statistics=statistics)


def _find_run(client: MlflowClient, pin: ModelPin) -> Run:
    """Return the MLflow run that has logged a model version."""
    try:
        run_id = client.get_model_version(pin.name, pin.version).run_id
        if not run_id and pin.model_id is not None:
            run_id = client.get_logged_model(pin.model_id).source_run_id
        if run_id:
            return client.get_run(run_id)
        got = "a version without a run"
    except MlflowException as error:
        got = shorten_error(error)
    message = (
        f"The MLflow run of {pin.uri} must say what the model was trained on, got: {got}. Log the model within a run "
        "that logs its training set too, or give the gate another baseline."
    )
    raise BadInput(message)


def _find_logged_statistics(client: MlflowClient, run: Run, uri: str) -> TableStatistics | None:
    """Return the statistics that a run has as an artifact, None where it has none."""
    run_id = str(run.info.run_id)
    address = f"runs:/{run_id}/{STATISTICS_ARTIFACT}"
    folder = STATISTICS_ARTIFACT.rpartition("/")[0]
    try:
        files = {file.path: file for file in client.list_artifacts(run_id, folder)}
        if STATISTICS_ARTIFACT not in files:
            return None
        size = files[STATISTICS_ARTIFACT].file_size or 0
        if size <= _ARTIFACT_BYTES_MAX:
            with tempfile.TemporaryDirectory() as below:
                data = Path(download_artifacts(artifact_uri=address, dst_path=below)).read_bytes()
            return read_statistics(data, address)
        got = f"{size >> 20} MiB, {_ARTIFACT_BYTES_MAX >> 20} at most allowed"
    except (MlflowException, BotoCoreError, ClientError, OSError) as error:
        got = shorten_error(error)
    message = (
        f"The statistics of the training set of {uri} must be readable at {address}, got: {got}. Log them again by "
        "log_training_statistics, or give the gate another baseline."
    )
    raise BadInput(message)


def _choose_dataset(run: Run, uri: str, dataset_name: str | None) -> LoggedDataset:
    """Return the dataset that a run has logged for training."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    found = {
        (given.dataset.name, given.dataset.digest): given.dataset
        for given in inputs
        if any(tag.key == MLFLOW_DATASET_CONTEXT and tag.value in _TRAINING_CONTEXTS for tag in given.tags)
    }
    names = [str(name) for name, _ in found]
    chosen = [dataset for dataset in found.values() if dataset_name in (None, dataset.name)]
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(map(repr, names[:_SHOWN])) + (" and more" if len(names) > _SHOWN else "")
    if dataset_name is not None and not chosen:
        must, got = f"the dataset {dataset_name!r} for training", f"{listed or 'none'}"
        got += suggest_name(dataset_name, names)
    else:
        must, got = "one dataset for training", f"{len(chosen)}: {listed}" if chosen else "none"
    then = (
        "Name one by TrainingSet(dataset=...)"
        if found
        else "Log one with the model, by mlflow.log_input(dataset, context='training') or log_training_statistics"
    )
    message = (
        f"The MLflow run of {uri}, {run.info.run_id}, must have {must} for the gate, got {got}. {then}, or give the "
        "gate another baseline."
    )
    raise BadInput(message)


def _read_address(dataset: LoggedDataset, uri: str) -> str:
    """Return the path or address of a dataset, which MLflow keeps as JSON that differs by kind."""
    try:
        source = json.loads(dataset.source)
        address = source.get("uri") if isinstance(source, dict) else None
    except ValueError:
        address = None
    if not isinstance(address, str) or not address:
        message = (
            f"The dataset {dataset.name!r} that {uri} was trained on must have a path or an address of Parquet files "
            f"as its source, got a source of the kind {dataset.source_type!r}. Say where it lies, as in "
            "mlflow.data.from_pandas(frame, source='s3://lake/training/'), or log its statistics by "
            "log_training_statistics."
        )
        raise BadInput(message)
    return address


def _find_path(dataset: LoggedDataset, plan: Plan) -> str:
    """Return where the statistics of a dataset are kept at a destination: for this model, and these columns of it."""
    told = [dataset.name, dataset.digest, dataset.source, plan.model.digest, _list_inputs(plan), _list_outputs(plan)]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:_DIGEST_SHOWN]
    return f"{ROOT}/training-{digest}.json"


def _list_inputs(plan: Plan) -> list[str]:
    return [column.name for column in plan.contract.columns]


def _list_outputs(plan: Plan) -> list[str]:
    """Return the names of predictions that are not those of inputs too."""
    inputs = _list_inputs(plan)
    return [output.name for output in plan.contract.outputs if output.name not in inputs]


def _describe_files(address: str, plan: Plan, storage: Storage) -> TableStatistics:
    """Return the statistics of Parquet files, a block at a time; all columns as inputs."""
    wanted = [*_list_inputs(plan), *_list_outputs(plan)]
    try:
        snapshot = pin_source(address, storage.url, wanted)
        if snapshot.format != "parquet":
            message = f"files of the format {snapshot.format}"
            raise SourceFormat(message)
        dataset = open_dataset(snapshot, wanted, ())
        return _describe_dataset(dataset, [name for name in wanted if name in dataset.schema.names])
    except OvernightError as error:
        message = (
            f"The training set of {plan.model.uri} must be Parquet that can be read at {address}, got: "
            f"{shorten_error(error)}. Put it there, log its statistics with the model by log_training_statistics, or "
            "give the gate another baseline."
        )
        kind = type(error) if isinstance(error, StorageFault) else BadInput
        raise kind(message) from error


def _describe_dataset(dataset: Dataset, columns: Sequence[str]) -> TableStatistics:
    files = dataset.snapshot.files
    if not columns:
        return TableStatistics(rows=dataset.rows)
    decoded = sum(size.decoded for file in files for size in file.group_bytes)
    rows = block_rows(1, decoded / dataset.rows)
    reader = Reader(dataset.snapshot, columns, dataset.partitions, rows, places=False)
    summed: list[TableStatistics] = []
    for chunk in cut_chunks(files, _ROWS_PER_CHUNK, 1, CHUNK_BYTES_MAX):
        collector = StatisticsCollector(chunk.rows, sums_all=True)
        for block in reader.blocks(chunk):
            collector.add(block)
        summed.append(TableStatistics(rows=chunk.rows, inputs=collector.finish()))
        if len(summed) == _CHUNKS_AT_ONCE:
            summed = [add_tables(summed)]
    return add_tables(summed)


def _sort_columns(statistics: TableStatistics, plan: Plan, title: str) -> TableStatistics:
    """Return the columns that the model reads as inputs, and those that it predicts as outputs. Raises BadInput."""
    columns = {**statistics.inputs, **statistics.outputs}
    inputs = {name: columns[name] for name in _list_inputs(plan) if name in columns}
    if not inputs:
        message = (
            f"A baseline must have a column that the model reads ({', '.join(_list_inputs(plan)[:_SHOWN])}), but "
            f"{title} has none of them. Log the training set as the model reads it, or give the gate another baseline."
        )
        raise BadInput(message)
    outputs = {name: columns[name] for name in _list_outputs(plan) if name in columns}
    return TableStatistics(rows=statistics.rows, rejects=statistics.rejects, inputs=inputs, outputs=outputs)
