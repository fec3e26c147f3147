"""The lineage of a run in MLflow: which model version scored which dataset, and how that ended."""

from __future__ import annotations

import time
from typing import Literal

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, Metric, Param, Run, RunTag

from tasks.batch.plan import Plan
from tasks.batch.report import BatchReport
from tasks.common.artifacts import Logger, start_thread

KEY_TAG = "overnight.run_key"
ERROR_TAG = "overnight.error"
_TEXT_MAX = 500
_FAILURE_SECONDS_MAX = 5.0
_RECORD_SECONDS_MAX = 5.0


def record_lineage(plan: Plan, report: BatchReport, experiment: str | None, logger: Logger) -> None:
    """Write the MLflow run of a published run, once: a second call finds the first one's.

    The MLflow run of an earlier call that failed is continued. What the tracking server refuses is logged: the
    predictions are published all the same. Does nothing without an experiment.
    """
    if experiment is None:
        return
    try:
        _write_run(MlflowClient(), plan, report, experiment)
    except MlflowException as error:
        logger.warning("MLflow must take the run's lineage, got: %s. The predictions are published.", error)


def _write_run(client: MlflowClient, plan: Plan, report: BatchReport, experiment: str) -> None:
    run = _find_or_create(client, plan, experiment, report.destination)
    run_id = str(run.info.run_id)
    if run.info.status == "FINISHED":
        return
    metrics = {
        "rows": report.rows,
        "rows_rejected": report.rows_rejected,
        "rows_recomputed": report.rows_recomputed,
        "rows_per_second": report.rows_per_second,
        **{f"seconds_{step}": value for step, value in report.seconds.items()},
    }
    params = {"source": report.source, "batch_size": plan.batch_size, "slots": report.slots, "run": plan.run}
    now_ms = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(name, float(value), now_ms, 0) for name, value in metrics.items()],
        # A parameter can't be written twice with different values, as by a call that was killed here.
        params=[Param(name, str(value)[:_TEXT_MAX]) for name, value in params.items() if name not in run.data.params],
        tags=[RunTag("mlflow.source.name", "overnight")],
    )
    dataset = Dataset(name=report.source[-_TEXT_MAX:], digest=plan.key, source_type="overnight", source=report.source)
    models = [LoggedModelInput(plan.model.model_id)] if plan.model.model_id else None
    client.log_inputs(run_id, datasets=[DatasetInput(dataset)], models=models)
    if ERROR_TAG in run.data.tags:
        client.delete_tag(run_id, ERROR_TAG)
    client.set_terminated(run_id)


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
    if experiment is None:
        return

    def record() -> None:
        client = MlflowClient()
        try:
            run = _find_or_create(client, plan, experiment, destination)
            if run.info.status != "FINISHED":
                client.set_tag(run.info.run_id, ERROR_TAG, reason[:_TEXT_MAX])
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
