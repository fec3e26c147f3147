"""What a batch run leaves in MLflow and tells a collector of OpenLineage events, with real servers for both."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import attr
import mlflow
import polars as pl
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from serving.errors import TooManyRejects
from tasks.batch.options import BatchOptions
from tasks.batch.report import BatchReport
from tests.eventually import eventually
from tests.servers import serve_http
from tests.support import register_network, write_customers

pytestmark = pytest.mark.usefixtures("serverless", "registry")

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment="overnight")
QUIET = OPTIONS.model_copy(update={"experiment": None})


def infer(model: str, source: Path | str, destination: Path | str, options: BatchOptions = OPTIONS) -> BatchReport:
    from flows.batch import batch_inference

    return batch_inference(model, str(source), str(destination), options)


def mlflow_run(report: BatchReport) -> Run:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("overnight")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`overnight.destination` = '{report.destination}'")
    return client.get_run(run.info.run_id)


class TestMlflow:
    def test_the_run_has_both_datasets_and_the_model_its_figures(self, customers: Path, tmp_path: Path) -> None:
        model = register_network("lineage", seed=3)
        report = infer(model, customers, tmp_path / "scores")
        run = mlflow_run(report)
        given, made = run.inputs.dataset_inputs
        contexts = [{tag.key: tag.value for tag in each.tags}["mlflow.data.context"] for each in (given, made)]

        assert f"runs:/{run.info.run_id}" == report.mlflow_run
        assert ["input", "output"] == contexts
        assert (str(customers), "local") == (given.dataset.name, given.dataset.source_type)
        assert str(customers) == mlflow.data.get_source(given.dataset).uri
        assert {"num_rows": 10_000, "num_files": 4} == {
            name: size for name, size in json.loads(given.dataset.profile).items() if name != "num_bytes"
        }
        columns = {each["name"]: each["type"] for each in json.loads(given.dataset.schema)["mlflow_colspec"]}
        assert {"customer": "long", "a": "float", "b": "float", "c": "float"} == columns
        assert (report.destination, report.plan_digest[:32]) == (made.dataset.name, made.dataset.digest)
        parts = Path(mlflow.data.get_source(made.dataset).uri)
        assert 10_000 == pl.scan_parquet(parts / "*.parquet").select(pl.len()).collect().item()
        columns = {each["name"]: each["type"] for each in json.loads(made.dataset.schema)["mlflow_colspec"]}
        assert {
            "customer": "long",
            "score": "float",
            "reject_column": "string",
            "reject_reason": "string",
        } == columns

        (used,) = run.inputs.model_inputs
        metrics = {each.key: each for each in MlflowClient().get_logged_model(used.model_id).metrics}
        assert {"rows", "rows_rejected", "rows_per_second"} == set(metrics)
        assert (10_000.0, run.info.run_id) == (metrics["rows"].value, metrics["rows"].run_id)
        assert given.dataset.name == metrics["rows"].dataset_name
        assert given.dataset.digest == metrics["rows"].dataset_digest

    def test_a_second_call_and_a_repeated_record_add_nothing(
        self, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        report = infer(linear, customers, tmp_path / "scores")
        client, first = MlflowClient(), mlflow_run(report)
        (used,) = first.inputs.model_inputs
        infer(linear, customers, tmp_path / "scores")
        # As after a kill between the record and the page: the call records once more, into a run that is open again.
        client.update_run(first.info.run_id, status="RUNNING")
        (tmp_path / "scores" / "_overnight" / report.run / "report.html").unlink()
        infer(linear, customers, tmp_path / "scores")
        again = mlflow_run(report)

        assert first.inputs.to_dictionary() == again.inputs.to_dictionary()
        assert first.data.metrics == again.data.metrics
        assert "FINISHED" == again.info.status
        assert 1 == len(client.get_metric_history(first.info.run_id, "rows"))
        ours = [each for each in client.get_logged_model(used.model_id).metrics if each.run_id == first.info.run_id]
        assert 3 == len(ours)

    def test_two_runs_over_the_same_files_have_one_dataset(self, linear: str, customers: Path, tmp_path: Path) -> None:
        other = register_network("lineage-other", seed=4)
        one, two = (
            mlflow_run(infer(model, customers, tmp_path / name)) for name, model in (("one", linear), ("two", other))
        )

        assert one.inputs.dataset_inputs[0].dataset.digest == two.inputs.dataset_inputs[0].dataset.digest
        assert one.inputs.dataset_inputs[1].dataset.digest != two.inputs.dataset_inputs[1].dataset.digest

    def test_a_delta_table_is_one_for_mlflow_too(self, linear: str, tmp_path: Path) -> None:
        source = str(tmp_path / "table")
        customers = write_customers(tmp_path / "customers", rows=500, files=1, rows_per_group=500)
        pl.read_parquet(customers / "*.parquet").write_delta(source)
        report = infer(linear, source, tmp_path / "scores", OPTIONS.model_copy(update={"output": "delta"}))
        given, made = (each.dataset for each in mlflow_run(report).inputs.dataset_inputs)

        assert ["delta_table", "delta_table"] == [given.source_type, made.source_type]
        assert {"path": source, "delta_table_version": 0} == json.loads(given.source)
        assert report.destination == mlflow.data.get_source(made).path

    def test_text_has_the_columns_that_the_model_reads(self, linear: str, tmp_path: Path) -> None:
        customers = write_customers(tmp_path / "customers", rows=50, files=1, rows_per_group=50)
        (tmp_path / "csv").mkdir()
        pl.read_parquet(customers / "*.parquet").write_csv(tmp_path / "csv" / "customers.csv")
        given, _ = mlflow_run(infer(linear, tmp_path / "csv", tmp_path / "scores")).inputs.dataset_inputs
        columns = {each["name"]: each["type"] for each in json.loads(given.dataset.schema)["mlflow_colspec"]}

        assert {"a": "float", "b": "float", "c": "float", "customer": "string"} == columns


@dataclass(slots=True)
class Collector:
    """A server that collects OpenLineage events, or answers as it is told to."""

    url: str = ""
    status: int = 201
    hangs: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    events: list[dict[str, Any]] = field(default_factory=list)

    def of(self, moment: str) -> dict[str, Any]:
        (event,) = (each for each in self.events if each["eventType"] == moment)
        return event

    def wait_for(self, *moments: str) -> None:
        eventually(lambda: sorted(each["eventType"] for each in self.events), lambda seen: seen == sorted(moments))


@contextmanager
def collecting(collector: Collector) -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if collector.hangs:
                collector.over.wait()
            if self.path == "/api/v1/lineage":
                collector.events.append(json.loads(body))
            self.send_response(collector.status)
            self.end_headers()

    with serve_http(Handler) as port:
        collector.url = f"http://127.0.0.1:{port}"
        try:
            yield collector
        finally:
            collector.over.set()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Collector]:
    """A collector that the environment names, as openlineage-python is configured."""
    pytest.importorskip("openlineage.client", reason="pip install 'overnight[openlineage]' brings it")
    with collecting(Collector()) as found:
        config = tmp_path / "openlineage.yml"
        config.write_text(json.dumps({"transport": {"type": "http", "url": found.url, "retry": {"total": 0}}}))
        monkeypatch.setenv("OPENLINEAGE_CONFIG", str(config))
        monkeypatch.delenv("OPENLINEAGE_URL", raising=False)
        yield found


FACETS = {
    "schema": "schema_dataset.SchemaDatasetFacet",
    "columnLineage": "column_lineage_dataset.ColumnLineageDatasetFacet",
    "dataSource": "datasource_dataset.DatasourceDatasetFacet",
    "version": "dataset_version_dataset.DatasetVersionDatasetFacet",
    "storage": "storage_dataset.StorageDatasetFacet",
    "inputStatistics": "input_statistics_input_dataset.InputStatisticsInputDatasetFacet",
    "outputStatistics": "output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet",
    "parent": "parent_run.ParentRunFacet",
    "tags": "tags_run.TagsRunFacet",
    "processing_engine": "processing_engine_run.ProcessingEngineRunFacet",
    "errorMessage": "error_message_run.ErrorMessageRunFacet",
    "jobType": "job_type_job.JobTypeJobFacet",
}


def check_against_facet_classes(event: dict[str, Any]) -> set[str]:
    """Hold every facet of an event against openlineage-python's own class of that name; return the names."""
    datasets = [*event["inputs"], *event["outputs"]]
    from openlineage.client import facet_v2

    parts = [event["run"]["facets"], event["job"]["facets"], *(each["facets"] for each in datasets)]
    parts += [each.get("inputFacets", {}) for each in event["inputs"]]
    parts += [each.get("outputFacets", {}) for each in event["outputs"]]
    seen = {}
    for name, facet in ((name, facet) for part in parts for name, facet in part.items() if name in FACETS):
        module, kind = FACETS[name].split(".")
        cls = getattr(getattr(facet_v2, module), kind)
        fields = {each.name for each in attr.fields(cls)}
        assert set(facet) <= fields, name
        assert cls._get_schema() == facet["_schemaURL"]
        seen[name] = facet
    assert {"2.0.2", "2-0-2"} & {event["schemaURL"].split("/")[4]} or "OpenLineage.json" in event["schemaURL"]
    uuid.UUID(event["run"]["runId"])
    return set(seen)


class TestOpenLineage:
    @pytest.mark.usefixtures("prefect")
    def test_a_run_tells_of_its_start_and_of_what_it_read_and_wrote(
        self, collector: Collector, linear: str, customers: Path, tmp_path: Path
    ) -> None:
        report = infer(linear, customers, tmp_path / "scores", QUIET)
        collector.wait_for("START", "COMPLETE")
        start, complete = collector.of("START"), collector.of("COMPLETE")
        ((given,), (made,)) = complete["inputs"], complete["outputs"]

        assert FACETS.keys() - {"errorMessage"} == check_against_facet_classes(complete)
        assert check_against_facet_classes(start) >= {"parent", "schema", "tags"}
        assert start["run"]["runId"] == complete["run"]["runId"]
        assert start["job"] == complete["job"]
        assert complete["job"]["name"].startswith("batch-inference.linear.")
        assert "batch-inference" == complete["run"]["facets"]["parent"]["job"]["name"]
        assert ("file", str(customers)) == (given["namespace"], given["name"])
        assert ("file", report.destination) == (made["namespace"], made["name"])
        assert 10_000 == given["inputFacets"]["inputStatistics"]["rowCount"]
        assert {"rowCount": 10_000, "fileCount": report.parts} == {
            name: value for name, value in made["outputFacets"]["outputStatistics"].items() if name.endswith("Count")
        }
        assert ["customer", "score", "reject_column", "reject_reason"] == [
            each["name"] for each in made["facets"]["schema"]["fields"]
        ]
        fields = made["facets"]["columnLineage"]["fields"]
        read = {name: [each["field"] for each in found["inputFields"]] for name, found in fields.items()}
        assert {"customer": ["customer"], "score": ["a", "b", "c"]} == {
            name: columns for name, columns in read.items() if not name.startswith("reject")
        }
        (copied,) = fields["customer"]["inputFields"]
        assert ("DIRECT", "IDENTITY") == tuple(copied["transformations"][0][key] for key in ("type", "subtype"))
        tags = {each["key"]: each["value"] for each in complete["run"]["facets"]["tags"]["tags"]}
        assert (report.model, report.run) == (tags["model"], tags["run"])

        infer(linear, customers, tmp_path / "scores", QUIET)

        assert 2 == len(collector.events)  # a call that finds its run complete has done nothing to tell of

    def test_a_run_that_fails_says_why(self, collector: Collector, linear: str, tmp_path: Path) -> None:
        edit = lambda table: table.with_columns(a=pl.when(pl.col("customer") % 2 == 0).then("a"))
        source = write_customers(tmp_path / "customers", rows=1_000, files=1, rows_per_group=500, edit=edit)
        with pytest.raises(TooManyRejects):
            infer(linear, source, tmp_path / "scores", QUIET)
        collector.wait_for("START", "FAIL")
        failed = collector.of("FAIL")

        assert "errorMessage" in check_against_facet_classes(failed)
        assert "reject" in failed["run"]["facets"]["errorMessage"]["message"]
        assert collector.of("START")["run"]["runId"] == failed["run"]["runId"]

    @pytest.mark.parametrize(("hangs", "said"), [(False, "of the run, got: "), (True, "within 0.5 s, and has not")])
    def test_a_collector_that_fails_or_hangs_fails_no_run_and_holds_none_up_for_long(
        self,
        collector: Collector,
        customers: Path,
        linear: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        *,
        hangs: bool,
        said: str,
    ) -> None:
        monkeypatch.setattr("tasks.batch.open_lineage._SECONDS_MAX", 0.5 if hangs else 60)
        collector.status, collector.hangs = 500, hangs
        caplog.set_level("WARNING", logger="prefect.overnight")
        report = infer(linear, customers, tmp_path / "scores", QUIET)

        assert "scored" == report.status
        # A collector that hangs does so until the test ends.
        assert said in caplog.text

    def test_without_the_package_the_run_says_what_to_install(
        self, customers: Path, linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sys

        monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:1")
        monkeypatch.setitem(sys.modules, "openlineage", None)
        monkeypatch.setitem(sys.modules, "openlineage.client", None)
        warnings: list[str] = []

        class Logger:
            def warning(self, text: str, *values: object) -> None:
                warnings.append(text % values)

        import tasks.batch.open_lineage as module

        module._send(lambda: None, Logger())  # type: ignore[arg-type, return-value]

        assert ["pip install 'overnight[openlineage]'"] == [
            part for text in warnings for part in [text[text.index("pip") : text.index(", or")]]
        ]
