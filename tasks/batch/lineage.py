"""The lineage of a run in MLflow: which model version scored which dataset into which, and how that ended.

The MLflow run has the input and the output as datasets, with source, digest, columns and sizes. The logged model has
the run's main figures as metrics of the input. Collectors of OpenLineage events get those too (open_lineage).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import mlflow
import pyarrow as pa
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, Run, RunTag
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType, Array
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from serving.redaction import hide_secrets
from tasks.batch import open_lineage
from tasks.batch.described_datasets import (
    DescribedDataset,
    describe_feature_tables,
    describe_input,
    describe_output,
)
from tasks.batch.plan import Plan
from tasks.batch.report import BatchReport
from tasks.common.artifacts import Logger, start_thread

KEY_TAG = "overnight.run_key"
ERROR_TAG = "overnight.error"
# MLflow's limits for names, values and schemas.
_TEXT_MAX = 500
_SCHEMA_MAX = 1_000_000
_FAILURE_SECONDS_MAX = 5.0
# A tracking server that does not answer is asked for minutes, by MLflow's own retries.
_RECORD_SECONDS_MAX = 20.0


def record_start(plan: Plan, destination: str, logger: Logger) -> None:
    """Tell those who collect OpenLineage events that the scoring of a run begins. Returns at once."""
    open_lineage.send_start(plan, destination, logger)


def record_lineage(plan: Plan, report: BatchReport, experiment: str | None, logger: Logger) -> str | None:
    """Write the MLflow run of a published run, once, and return its address: a second call adds nothing.

    The MLflow run of an earlier call that failed is continued. What the tracking server refuses, or does not take
    within some seconds, is logged: the predictions are published all the same. Does nothing without an experiment.
    """
    open_lineage.send_complete(plan, report, logger)
    if experiment is None:
        return None
    addresses: list[str] = []

    def record() -> None:
        try:
            addresses.append(_make_address(_write_run(MlflowClient(), plan, report, experiment)))
        except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the predictions are published
            logger.warning("MLflow must take the run's lineage, got: %s. The predictions are published.", error)

    thread = start_thread("record-lineage", record)
    thread.join(_RECORD_SECONDS_MAX)
    if thread.is_alive():
        logger.warning(
            "MLflow must take the run's lineage within %g s, and has not. The predictions are published.",
            _RECORD_SECONDS_MAX,
        )
    return next(iter(addresses), None)


def _make_address(run: Run) -> str:
    """Return the page of a run on a tracking server, else the run as MLflow names it."""
    parts = urlsplit(mlflow.get_tracking_uri())
    if parts.scheme not in ("http", "https"):
        return f"runs:/{run.info.run_id}"
    server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def _write_run(client: MlflowClient, plan: Plan, report: BatchReport, experiment: str) -> Run:
    run = _find_or_create(client, plan, experiment, report.destination)
    run_id = str(run.info.run_id)
    if run.info.status == "FINISHED":
        return run
    source, output = describe_input(plan), describe_output(plan, report.destination, report)
    given, made = _make_dataset(source), _make_dataset(output)
    model_id = _find_logged_model(client, plan.model.model_id)
    params = {"source": report.source, "batch_size": plan.batch_size, "slots": report.slots, "run": plan.run}
    params |= {f"params.{name}": value for name, value in plan.contract.params.items()}
    client.log_batch(
        run_id,
        metrics=_make_metrics(plan, report, given, model_id, run.data.metrics),
        # A parameter can't be written twice with different values, as by a call that was killed here.
        params=[Param(name, str(value)[:_TEXT_MAX]) for name, value in params.items() if name not in run.data.params],
        tags=[RunTag("mlflow.source.name", "overnight")],
    )
    client.log_inputs(
        run_id,
        datasets=[
            _tag_dataset(given, "input", source),
            *(_tag_dataset(_make_dataset(table), "features", table) for table in describe_feature_tables(plan)),
            _tag_dataset(made, "output", output),
        ],
        models=[LoggedModelInput(model_id)] if model_id else None,
    )
    if ERROR_TAG in run.data.tags:
        client.delete_tag(run_id, ERROR_TAG)
    client.set_terminated(run_id)
    return run


def _find_logged_model(client: MlflowClient, model_id: str | None) -> str | None:
    """Return the id of a logged model that the tracking server knows: the registry may be that of another server."""
    if model_id is None:
        return None
    try:
        return str(client.get_logged_model(model_id).model_id)
    except MlflowException:
        return None


def _make_metrics(
    plan: Plan, report: BatchReport, dataset: Dataset, model_id: str | None, there: Mapping[str, float]
) -> list[Metric]:
    """Return the metrics that are not there yet; the main ones belong to the model and the dataset too."""
    main: dict[str, float] = {"rows": report.rows, "rows_rejected": report.rows_rejected}
    others: dict[str, float] = {}
    if report.status == "scored":
        main |= {"rows_per_second": report.rows_per_second}
        others = {"rows_recomputed": report.rows_recomputed}
        others |= {f"seconds_{step}": value for step, value in report.seconds.items()}
    belongs: dict[str, Any] = {"dataset_name": dataset.name, "dataset_digest": dataset.digest, "model_id": model_id}
    # Of the plan, so that two workers which write the same metric at once write one.
    time_ms = int(plan.planned_at.timestamp() * 1000)
    metrics = [Metric(name, float(value), time_ms, 0, **belongs) for name, value in main.items()]
    metrics += [Metric(name, float(value), time_ms, 0) for name, value in others.items()]
    return [metric for metric in metrics if metric.key not in there]


def _tag_dataset(
    dataset: Dataset, context: Literal["input", "features", "output"], described: DescribedDataset
) -> DatasetInput:
    tags = [InputTag(MLFLOW_DATASET_CONTEXT, context)]
    if described.version is not None:
        tags.append(InputTag("overnight.version", described.version[:_TEXT_MAX]))
    return DatasetInput(dataset, tags)


def _make_dataset(described: DescribedDataset) -> Dataset:
    """Return a dataset as mlflow.data writes it, so that mlflow.data.get_source reads it back."""
    source_type, source = _make_source(described)
    sizes = {"num_rows": described.rows, "num_files": described.files, "num_bytes": described.bytes}
    return Dataset(
        name=described.address[-_TEXT_MAX:],
        digest=described.digest,
        source_type=source_type,
        source=json.dumps(source),
        schema=_make_schema(described.schema),
        profile=json.dumps({name: size for name, size in sizes.items() if size is not None}),
    )


def _make_source(described: DescribedDataset) -> tuple[str, dict[str, Any]]:
    if described.kind == "delta":
        version = described.version if described.version and described.version.isdigit() else None
        return "delta_table", {
            "path": described.address,
            **({} if version is None else {"delta_table_version": int(version)}),
        }
    scheme, separator, _ = described.address.partition("://")
    run = f"/run={described.version}" if described.kind == "overnight" else ""
    return scheme if separator else "local", {"uri": f"{described.address.rstrip('/')}{run}"}


def _make_schema(schema: pa.Schema | None) -> str | None:
    """Return a schema as MLflow writes it, None where it is too long for a database of MLflow's."""
    if schema is None:
        return None
    columns: list[ColSpec | TensorSpec] = [ColSpec(_to_mlflow_type(field.type), field.name) for field in schema]
    text = json.dumps({"mlflow_colspec": Schema(columns).to_dict()})
    return text if len(text) <= _SCHEMA_MAX else None


_MLFLOW_TYPES: tuple[tuple[Callable[[pa.DataType], bool], DataType], ...] = (
    (pa.types.is_boolean, DataType.boolean),
    (pa.types.is_uint32, DataType.long),
    (pa.types.is_int64, DataType.long),
    (pa.types.is_uint64, DataType.long),
    (pa.types.is_integer, DataType.integer),
    (pa.types.is_float64, DataType.double),
    (pa.types.is_floating, DataType.float),
    (pa.types.is_string, DataType.string),
    (pa.types.is_large_string, DataType.string),
    (pa.types.is_string_view, DataType.string),
    (pa.types.is_binary, DataType.binary),
    (pa.types.is_large_binary, DataType.binary),
    (pa.types.is_fixed_size_binary, DataType.binary),
    (pa.types.is_timestamp, DataType.datetime),
    (pa.types.is_date, DataType.datetime),
)


_ANY: Any = AnyType  # whose constructor has no types


def _to_mlflow_type(given: pa.DataType) -> DataType | Array | AnyType:
    if isinstance(given, pa.BaseExtensionType):
        given = given.storage_type
    if pa.types.is_dictionary(given):
        given = given.value_type
    if pa.types.is_list(given) or pa.types.is_large_list(given) or pa.types.is_fixed_size_list(given):
        return Array(_to_mlflow_type(given.value_type))
    # MLflow has no decimals, durations or times of day.
    return next((named for is_kind, named in _MLFLOW_TYPES if is_kind(given)), _ANY())


def record_failure(
    plan: Plan,
    destination: str,
    experiment: str | None,
    status: Literal["FAILED", "KILLED"],
    reason: str,
    logger: Logger,
) -> None:
    """End the MLflow run of a run that was not published, with the reason as a tag. Nothing without an experiment.

    It takes a few seconds at most: a tracking server that does not answer holds nothing up. An MLflow run that
    another worker has finished stays FINISHED.
    """
    open_lineage.send_failure(plan, destination, status, reason, logger)
    if experiment is None:
        return

    def record() -> None:
        client = MlflowClient()
        try:
            run = _find_or_create(client, plan, experiment, destination)
            if run.info.status != "FINISHED":
                client.set_tag(run.info.run_id, ERROR_TAG, hide_secrets(reason)[:_TEXT_MAX])
                client.set_terminated(run.info.run_id, status)
        except MlflowException as error:
            logger.warning("MLflow must take how the run ended (%s), got: %s.", status, error)

    start_thread("record-failure", record).join(_FAILURE_SECONDS_MAX)


def _find_or_create(client: MlflowClient, plan: Plan, experiment: str, destination: str) -> Run:
    experiment_id = _find_or_create_experiment(client, experiment)
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{plan.key}'", max_results=1)
    if found:
        return found[0]
    tags = {
        KEY_TAG: plan.key,
        "overnight.model": plan.model.uri,
        "overnight.model_digest": plan.model.digest,
        "overnight.destination": destination,
    }
    return client.create_run(experiment_id, tags=tags, run_name=f"batch {plan.run[:12]}")


def _find_or_create_experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:
        # Another worker has created it since.
        again = client.get_experiment_by_name(name)
        if again is None:
            raise
        return str(again.experiment_id)
