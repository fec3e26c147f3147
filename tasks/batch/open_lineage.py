"""OpenLineage events of a batch run: that it starts, is complete, fails or is aborted, and which columns made which.

Off unless OPENLINEAGE_URL or OPENLINEAGE_CONFIG is set, which openlineage-python reads. Events are sent in threads of
their own: a collector that does not answer holds a run up for a few seconds at its end, and never fails it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
from prefect.context import FlowRunContext

from serving.machine import find_release
from serving.redaction import hide_secrets
from tasks.batch.described_datasets import (
    DescribedDataset,
    describe_feature_tables,
    describe_input,
    describe_output,
)
from tasks.batch.parts import REJECT_COLUMN, REJECT_REASON
from tasks.batch.plan import Plan
from tasks.batch.report import BatchReport
from tasks.common.artifacts import Logger, start_thread

if TYPE_CHECKING:
    from openlineage.client import event_v2

Moment = Literal["START", "COMPLETE", "FAIL", "ABORT"]

_SECONDS_MAX = 5.0
_REASON_MAX = 2000
# More pairs of an input and an output column than these are sent as inputs of the whole dataset.
_PAIRS_MAX = 20_000
_REJECTS = (REJECT_COLUMN, REJECT_REASON)
_RUNS = uuid.UUID("5d0f6bb8-9bd9-4f0c-9a53-4f5f0f0c6d55")


def is_configured() -> bool:
    """Return whether events are to be sent, by the variables that openlineage-python reads."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return False
    return bool(os.environ.get("OPENLINEAGE_URL") or os.environ.get("OPENLINEAGE_CONFIG"))


def send_start(plan: Plan, destination: str, logger: Logger) -> None:
    """Send that the scoring of a run begins, and return at once."""
    _send(lambda: _Event(moment="START", plan=plan, destination=destination, parent=_find_parent()), logger, wait=False)


def send_complete(plan: Plan, report: BatchReport, logger: Logger) -> None:
    """Send that a run is published, with what it read and wrote."""
    _send(
        lambda: _Event(
            moment="COMPLETE", plan=plan, destination=report.destination, parent=_find_parent(), report=report
        ),
        logger,
    )


def send_failure(
    plan: Plan, destination: str, status: Literal["FAILED", "KILLED"], reason: str, logger: Logger
) -> None:
    """Send that a run was not published: FAIL, or ABORT where it was interrupted; the reason without secrets."""
    moment: Moment = "FAIL" if status == "FAILED" else "ABORT"
    reason = hide_secrets(reason)[:_REASON_MAX]
    _send(
        lambda: _Event(moment=moment, plan=plan, destination=destination, parent=_find_parent(), reason=reason), logger
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parent:
    """The flow run that a batch run is part of."""

    run_id: str
    flow: str


def _find_parent() -> _Parent | None:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None
    return _Parent(run_id=str(context.flow_run.id), flow=context.flow.name if context.flow else "flow")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """What has happened to a run."""

    moment: Moment
    plan: Plan
    destination: str
    parent: _Parent | None
    report: BatchReport | None = None
    reason: str = ""


def _send(make: Callable[[], _Event], logger: Logger, *, wait: bool = True) -> None:
    if not is_configured():
        return
    event, time = make(), datetime.now(UTC)

    def send() -> None:
        try:
            from openlineage.client import OpenLineageClient  # noqa: PLC0415 - an extra, and only where it is asked for

            client = OpenLineageClient()
            client.emit(build_event(event, time))
            client.close(_SECONDS_MAX)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "openlineage":
                raise
            logger.warning(
                "OpenLineage events must be sent by openlineage-python, which is not installed: "
                "pip install 'overnight[openlineage]', or unset OPENLINEAGE_URL and OPENLINEAGE_CONFIG."
            )
        except Exception as error:  # noqa: BLE001 - whatever a collector does, the run goes on
            logger.warning(
                "The OpenLineage collector must take the event %s of the run, got: %s. The run goes on without.",
                *(event.moment, hide_secrets(str(error))),
            )

    thread = start_thread("send-openlineage", send)
    if not wait:
        return
    thread.join(_SECONDS_MAX)
    if thread.is_alive():
        logger.warning(
            "The OpenLineage collector must take the event %s within %g s, and has not. The run goes on without.",
            *(event.moment, _SECONDS_MAX),
        )


def build_event(event: _Event, time: datetime) -> event_v2.RunEvent:
    """Return an event as openlineage-python sends it. Reads a footer of the source and, at the end, one of a part."""
    from openlineage.client import event_v2  # noqa: PLC0415 - the same
    from openlineage.client.facet_v2 import job_type_job  # noqa: PLC0415 - the same

    plan = event.plan
    source, tables = describe_input(plan), describe_feature_tables(plan)
    output = describe_output(plan, event.destination, event.report)
    namespace = os.environ.get("OPENLINEAGE_NAMESPACE", "overnight")
    job_type = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="OVERNIGHT", jobType="JOB")
    # The id is the same for all events of a flow run, and another for each that scores the run.
    run_id = str(uuid.uuid5(_RUNS, f"{plan.key}/{event.parent.run_id if event.parent else ''}"))
    # The name is the same for every run of a model into a destination.
    place = name_dataset(output.address)[1].strip("/").replace("/", "_")
    job_name = f"batch-inference.{plan.model.name}.{place}"
    return event_v2.RunEvent(
        eventTime=time.isoformat(),
        eventType=event_v2.RunState[event.moment],
        producer=f"urn:overnight:{find_release()}",
        run=event_v2.Run(runId=run_id, facets=_run_facets(event)),
        job=event_v2.Job(namespace=namespace, name=job_name, facets={"jobType": job_type}),
        inputs=[_make_input(each) for each in (source, *tables)],
        outputs=[_make_output(plan, source, tables, output)],
    )


def _run_facets(event: _Event) -> dict[str, Any]:
    from openlineage.client.facet_v2 import (  # noqa: PLC0415 - the same
        error_message_run,
        parent_run,
        processing_engine_run,
        tags_run,
    )

    plan = event.plan
    tags = {"model": plan.model.uri, "model_digest": plan.model.digest, "run": plan.run}
    facets: dict[str, Any] = {
        "processing_engine": processing_engine_run.ProcessingEngineRunFacet(version=find_release(), name="Overnight"),
        "tags": tags_run.TagsRunFacet(
            tags=[tags_run.TagsRunFacetFields(key=key, value=value, source="OVERNIGHT") for key, value in tags.items()]
        ),
    }
    if event.parent is not None:
        facets["parent"] = parent_run.ParentRunFacet(
            run=parent_run.Run(runId=event.parent.run_id),
            job=parent_run.Job(namespace="prefect", name=event.parent.flow),
        )
    if event.reason:
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
            message=event.reason, programmingLanguage="PYTHON"
        )
    return facets


def name_dataset(address: str) -> tuple[str, str]:
    """Return namespace and name of a dataset, by OpenLineage's rules for files and object stores."""
    parts = urlsplit(address)
    if not parts.scheme or "://" not in address:
        return "file", address
    return f"{parts.scheme}://{parts.netloc}", address.partition("://")[2].partition("/")[2].rstrip("/") or "/"


def _make_input(source: DescribedDataset) -> event_v2.InputDataset:
    from openlineage.client import event_v2  # noqa: PLC0415 - the same
    from openlineage.client.facet_v2 import input_statistics_input_dataset as statistics  # noqa: PLC0415 - the same

    namespace, name = name_dataset(source.address)
    counts = statistics.InputStatisticsInputDatasetFacet(
        rowCount=source.rows, size=source.bytes, fileCount=source.files
    )
    return event_v2.InputDataset(
        namespace=namespace, name=name, facets=_dataset_facets(source), inputFacets={"inputStatistics": counts}
    )


def _make_output(
    plan: Plan, source: DescribedDataset, tables: Sequence[DescribedDataset], output: DescribedDataset
) -> event_v2.OutputDataset:
    from openlineage.client import event_v2  # noqa: PLC0415 - the same
    from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics  # noqa: PLC0415 - the same

    namespace, name = name_dataset(output.address)
    facets = _dataset_facets(output)
    made: dict[str, Any] = {}
    if output.rows is not None:
        facets["columnLineage"] = _make_column_lineage(plan, source, tables)
        made["outputStatistics"] = statistics.OutputStatisticsOutputDatasetFacet(
            rowCount=output.rows, size=output.bytes, fileCount=output.files
        )
    return event_v2.OutputDataset(namespace=namespace, name=name, facets=facets, outputFacets=made)


def _dataset_facets(described: DescribedDataset) -> dict[str, Any]:
    from openlineage.client.facet_v2 import (  # noqa: PLC0415 - the same
        dataset_version_dataset,
        datasource_dataset,
        schema_dataset,
        storage_dataset,
    )

    namespace, _ = name_dataset(described.address)
    address = described.address if "://" in described.address else f"file://{described.address}"
    layer = described.kind if described.kind in ("delta", "iceberg") else namespace.partition("://")[0]
    facets: dict[str, Any] = {
        "dataSource": datasource_dataset.DatasourceDatasetFacet(name=namespace, uri=address),
        "version": dataset_version_dataset.DatasetVersionDatasetFacet(
            datasetVersion=described.version or described.digest
        ),
        "storage": storage_dataset.StorageDatasetFacet(storageLayer=layer, fileFormat=described.format),
    }
    if described.schema is not None:
        fields = [_make_field(field.name, field.type) for field in described.schema]
        facets["schema"] = schema_dataset.SchemaDatasetFacet(fields=fields)
    return facets


def _make_field(name: str, kind: pa.DataType) -> Any:
    from openlineage.client.facet_v2 import schema_dataset  # noqa: PLC0415 - the same

    inner = [_make_field(field.name, field.type) for field in kind] if pa.types.is_struct(kind) else []
    return schema_dataset.SchemaDatasetFacetFields(name=name, type=str(kind), fields=inner)


def _make_column_lineage(plan: Plan, source: DescribedDataset, tables: Sequence[DescribedDataset]) -> Any:
    """Return which input columns made each output column: keys are copied, all else is made of what the model reads."""
    from openlineage.client.facet_v2 import column_lineage_dataset as columns  # noqa: PLC0415 - the same

    def read_from(column: tuple[str, str], kind: str, subtype: str, description: str) -> Any:
        namespace, name = name_dataset(column[0])
        step = columns.Transformation(type=kind, subtype=subtype, description=description, masking=False)
        return columns.InputField(namespace=namespace, name=name, field=column[1], transformations=[step])

    # Each by the address of its table and its name there.
    names = [column.name for column in plan.contract.columns if column.name in plan.columns]
    read = [(source.address, name) for name in names]
    pairs = zip(tables, plan.features, strict=True)
    read += [(table.address, name) for table, pin in pairs for name in pin.columns]
    fields = {
        key: columns.Fields(inputFields=[read_from((source.address, key), "DIRECT", "IDENTITY", "copied")])
        for key in plan.options.key_columns
    }
    predictions = [output.name for output in plan.contract.outputs]
    made = dict.fromkeys(predictions, ("DIRECT", "TRANSFORMATION", plan.model.uri))
    made |= dict.fromkeys(_REJECTS, ("INDIRECT", "CONDITIONAL", "why a row has no prediction"))
    if len(made) * len(read) <= _PAIRS_MAX:
        fields |= {
            output: columns.Fields(inputFields=[read_from(column, *step) for column in read])
            for output, step in made.items()
        }
        return columns.ColumnLineageDatasetFacet(fields=fields)
    whole = [read_from(column, "DIRECT", "TRANSFORMATION", plan.model.uri) for column in read]
    return columns.ColumnLineageDatasetFacet(fields=fields, dataset=whole)
