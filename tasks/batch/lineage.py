"""The lineage of a run in MLflow: which model version scored which dataset, to what effect."""

from __future__ import annotations

from typing import Literal

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, Metric, Param, Run, RunTag

from tasks.batch.plan import Plan
from tasks.batch.report import BatchReport

KEY_TAG = "overnight.run_key"
ERROR_TAG = "overnight.error"
_TAG_MAX = 500


def record_lineage(plan: Plan, report: BatchReport, experiment: str, now_ms: int) -> str:
    """Write the MLflow run of a run that is published, and return its id; called again, it finds the first.

    Where an earlier call failed, its MLflow run is gone on with. Raises MlflowException where the tracking server does
    not take it.
    """
    client = MlflowClient()
    run = _find_or_create(client, plan, experiment, report.destination)
    run_id = str(run.info.run_id)
    if run.info.status == "FINISHED":
        return run_id
    metrics = {
        "rows": report.rows,
        "rows_rejected": report.rows_rejected,
        "rows_recomputed": report.rows_recomputed,
        "rows_per_second": report.rows_per_second,
        **{f"seconds_{stage}": value for stage, value in report.seconds.items()},
    }
    params = {"source": report.source, "batch_size": plan.batch_size, "slots": report.slots, "run": plan.run}
    client.log_batch(
        run_id,
        metrics=[Metric(name, float(value), now_ms, 0) for name, value in metrics.items()],
        # A parameter can't be written twice with different values, as by a call that was killed here.
        params=[Param(name, str(value)[:500]) for name, value in params.items() if name not in run.data.params],
        tags=[RunTag("mlflow.source.name", "overnight")],
    )
    dataset = Dataset(name=report.source[-500:], digest=plan.key, source_type="overnight", source=report.source)
    models = [LoggedModelInput(plan.model.model_id)] if plan.model.model_id else None
    client.log_inputs(run_id, datasets=[DatasetInput(dataset)], models=models)
    if ERROR_TAG in run.data.tags:
        client.delete_tag(run_id, ERROR_TAG)
    client.set_terminated(run_id)
    return run_id


def record_failure(
    plan: Plan, destination: str, experiment: str, status: Literal["FAILED", "KILLED"], reason: str
) -> str:
    """End the MLflow run of a run that was not published as it ended, with the reason as a tag; return its id.

    A run that was published before, by another worker, stays FINISHED. Raises MlflowException where the tracking
    server does not take it.
    """
    client = MlflowClient()
    run = _find_or_create(client, plan, experiment, destination)
    run_id = str(run.info.run_id)
    if run.info.status != "FINISHED":
        client.set_tag(run_id, ERROR_TAG, reason[:_TAG_MAX])
        client.set_terminated(run_id, status)
    return run_id


def _find_or_create(client: MlflowClient, plan: Plan, experiment: str, destination: str) -> Run:
    experiment_id = _experiment(client, experiment)
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


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:
        # Another worker was first between the look and the creation.
        again = client.get_experiment_by_name(name)
        if again is None:
            raise
        return str(again.experiment_id)
