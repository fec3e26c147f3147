"""The lineage of a run in MLflow: which model version scored which dataset, to what effect."""

from __future__ import annotations

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, Metric, Param, RunTag

from tasks.batch.plan import Plan
from tasks.batch.report import BatchReport

KEY_TAG = "overnight.run_key"


def record_lineage(plan: Plan, report: BatchReport, experiment: str, now_ms: int) -> str:
    """Write one MLflow run for a run, and return its id; called again, it finds the first.

    Raises MlflowException where the tracking server does not take it.
    """
    client = MlflowClient()
    experiment_id = _experiment(client, experiment)
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{plan.key}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {
        KEY_TAG: plan.key,
        "overnight.model": plan.model.uri,
        "overnight.model_digest": plan.model.digest,
        "overnight.destination": report.destination,
    }
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=f"batch {plan.run[:12]}").info.run_id)
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
        params=[Param(name, str(value)[:500]) for name, value in params.items()],
        tags=[RunTag("mlflow.source.name", "overnight")],
    )
    dataset = Dataset(name=report.source[-500:], digest=plan.key, source_type="overnight", source=report.source)
    models = [LoggedModelInput(plan.model.model_id)] if plan.model.model_id else None
    client.log_inputs(run_id, datasets=[DatasetInput(dataset)], models=models)
    client.set_terminated(run_id)
    return run_id


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
