"""The metrics of runs as Prometheus and node_exporter read them."""

from __future__ import annotations

import logging
import multiprocessing
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from serving.errors import BadInput
from tasks.common.metrics import (
    FOLDER_VARIABLE,
    PORT_VARIABLE,
    RunMetrics,
    RunRecorder,
    add_to_textfile,
    expose_run_metrics,
    read_exposure,
    serve_registry,
)

LOGGER = logging.getLogger("test")
DESTINATION = "s3://lake/scores"


def score(metrics: RunMetrics, *, rows: int, version: str = "3", destination: str = DESTINATION) -> RunRecorder:
    """Record a call that scores so many rows in one chunk, of which one is a reject."""
    recorder = RunRecorder("churn", destination, metrics)
    recorder.note_step("resolve", 0.5)
    recorder.begin(model="churn", version=version, destination=destination, rows=2 * rows, chunks=2)
    recorder.note_scored(
        rows=rows,
        rejects=1,
        chunks=1,
        chunks_dropped=0,
        parts=1,
        bytes_read=800,
        bytes_written=400,
        seconds={"read": 0.25, "write": 0.0},
    )
    recorder.note_progress(rows, 1)
    recorder.finish("complete", 3.6)
    return recorder


def read_samples(text: str) -> dict[str, float]:
    """Return the samples of a page by name and the values of their labels, but for model and destination."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {name_sample(sample): sample.value for sample in samples}


def name_sample(sample: Sample) -> str:
    """Return the name of a sample and the values of its labels, but for model and destination."""
    values = (value for key, value in sample.labels.items() if key not in ("model", "destination"))
    return " ".join([sample.name, *values])


def test_a_file_adds_up_what_the_processes_of_a_machine_have_counted(tmp_path: Path) -> None:
    first, second = RunMetrics(), RunMetrics()
    recorder = score(first, rows=50)
    add_to_textfile(first, tmp_path)
    recorder.note_step("publish", 2.0)
    recorder.note_interruption("SIGTERM", 4.0)
    add_to_textfile(first, tmp_path)
    score(second, rows=7)
    path = add_to_textfile(second, tmp_path)
    found = read_samples(path.read_text())

    expected = {
        "overnight_run_rows_scored_total 3": 57,
        "overnight_run_rows_rejected_total 3": 2,
        "overnight_run_chunks_scored_total 3": 2,
        "overnight_run_parts_put_total 3": 2,
        "overnight_run_read_bytes_total 3": 1600,
        "overnight_run_written_bytes_total 3": 800,
        "overnight_run_step_seconds_total resolve 3": 1.0,
        "overnight_run_step_seconds_total publish 3": 2.0,
        "overnight_run_stage_seconds_total read 3": 0.5,
        "overnight_run_interruptions_total SIGTERM 3": 1,
        "overnight_run_drain_seconds_total 3": 4.0,
        "overnight_run_finished_total complete 3": 2,
        # Gauges are those of the last one.
        "overnight_run_rows 3": 14,
        "overnight_run_rows_done 3": 7,
        "overnight_run_chunks_left 3": 1,
    }
    assert expected == {name: found.get(name) for name in expected}
    assert {"overnight_runs.prom", ".overnight_runs.lock"} == {entry.name for entry in tmp_path.iterdir()}


def test_a_new_version_takes_the_place_of_the_one_before_and_other_destinations_stay(tmp_path: Path) -> None:
    metrics = RunMetrics()
    score(metrics, rows=1, version="3")
    score(metrics, rows=2, version="3", destination="s3://lake/other")
    add_to_textfile(metrics, tmp_path)
    later = RunMetrics()
    score(later, rows=4, version="4")
    refused = RunRecorder("churn", DESTINATION, later)
    refused.finish("refused", None)
    text = add_to_textfile(later, tmp_path).read_text()
    again = RunMetrics()
    RunRecorder("churn", DESTINATION, again).finish("refused", None)
    after = add_to_textfile(again, tmp_path).read_text()

    scored = [line for line in text.splitlines() if line.startswith("overnight_run_rows_scored_total{")]
    assert [
        'overnight_run_rows_scored_total{destination="s3://lake/other",model="churn",version="3"} 2.0',
        'overnight_run_rows_scored_total{destination="s3://lake/scores",model="churn",version="4"} 4.0',
    ] == scored
    # A call that is refused knows no version, and takes nothing away.
    assert scored == [line for line in after.splitlines() if line.startswith("overnight_run_rows_scored_total{")]
    assert 2 == read_samples(after)["overnight_run_finished_total refused "]


def score_many(folder: Path) -> None:
    metrics = RunMetrics()
    for _ in range(20):
        score(metrics, rows=1)
        add_to_textfile(metrics, folder)


def test_processes_that_write_the_file_at_once_lose_no_count(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("spawn").Process(target=score_many, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = read_samples((tmp_path / "overnight_runs.prom").read_text())

    assert [0, 0, 0] == [process.exitcode for process in processes]
    assert 60 == found["overnight_run_rows_scored_total 3"]


def test_the_cost_is_there_where_the_price_is_known_and_only_there() -> None:
    known, unknown = RunMetrics(), RunMetrics()
    RunRecorder("churn", DESTINATION, known).finish("complete", 3.6)
    RunRecorder("churn", DESTINATION, unknown).finish("complete", None)

    def read_costs(metrics: RunMetrics) -> list[str]:
        families = (family for family in metrics.registry.collect() if family.name == "overnight_run_cost_dollars")
        return [sample.name for family in families for sample in family.samples if sample.name.endswith("_total")]

    assert (["overnight_run_cost_dollars_total"], []) == (read_costs(known), read_costs(unknown))


def test_a_night_has_its_margin_its_machines_and_their_price() -> None:
    metrics = RunMetrics()
    recorder = RunRecorder("churn", DESTINATION, metrics, version="3")
    recorder.note_deadline(1_800_000_000)
    recorder.note_night(
        margin_seconds=-30,
        machine_seconds={"spot": 3600, "on-demand": 60},
        cost=0.07,
        cost_on_demand=0.2,
        moves=["spot", "on-demand", "spot"],
    )
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    nights = (sample for sample in samples if sample.name.startswith("overnight_night_"))
    found = {name_sample(sample): sample.value for sample in nights if not sample.name.endswith("_created")}

    assert {
        "overnight_night_finished_total 3": 1,
        "overnight_night_deadline_timestamp_seconds 3": 1_800_000_000,
        "overnight_night_deadline_margin_seconds 3": -30,
        "overnight_night_machine_seconds_total 3 spot": 3600,
        "overnight_night_machine_seconds_total 3 on-demand": 60,
        "overnight_night_cost_dollars_total 3": 0.07,
        "overnight_night_on_demand_cost_dollars_total 3": 0.2,
        "overnight_night_moves_total 3 spot": 2,
        "overnight_night_moves_total 3 on-demand": 1,
    } == found


def test_a_destination_with_a_password_is_a_label_without_it() -> None:
    metrics = RunMetrics()
    score(metrics, rows=1, destination="https://me:s3cr3t-0f-mine@host/scores")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]

    assert {"https://***@host/scores"} == {sample.labels["destination"] for sample in samples}
    names = {name for sample in samples for name in sample.labels}
    assert names <= {"model", "version", "destination", "step", "stage", "sender", "state", "machine", "to"}


def test_the_port_is_on_loopback_and_closed_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = RunMetrics()
    score(metrics, rows=5)
    with serve_registry(metrics.registry, 0, PORT_VARIABLE) as port:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    monkeypatch.setenv(PORT_VARIABLE, str(port))
    with expose_run_metrics(LOGGER, metrics):
        again = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()

    assert read_samples(page) == read_samples(again)
    assert 5 == read_samples(page)["overnight_run_rows_scored_total 3"]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)


def test_a_port_that_is_taken_is_a_warning_and_the_file_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv(PORT_VARIABLE, str(taken.getsockname()[1]))
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
        metrics = RunMetrics()
        with caplog.at_level("WARNING"), expose_run_metrics(LOGGER, metrics):
            score(metrics, rows=5)

    assert f"{PORT_VARIABLE} must be free on loopback" in caplog.text
    assert "The run goes on without." in caplog.text
    assert 5 == read_samples((tmp_path / "overnight_runs.prom").read_text())["overnight_run_rows_scored_total 3"]


def test_a_file_that_is_none_of_prometheus_is_a_warning_and_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "overnight_runs.prom").write_text("{{{ no metrics\n")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with caplog.at_level("WARNING"), expose_run_metrics(LOGGER, RunMetrics()):
        pass

    assert "The metrics must be written to" in caplog.text
    assert "{{{ no metrics\n" == (tmp_path / "overnight_runs.prom").read_text()


@pytest.mark.parametrize("port", ["web", "-1", "70000", "1.5"])
def test_what_is_no_port_is_refused(port: str) -> None:
    with pytest.raises(BadInput, match=rf"{PORT_VARIABLE} must be a port from 0, .* got '{port}'"):
        read_exposure({PORT_VARIABLE: port})


def test_a_folder_that_is_not_there_is_refused_and_nothing_is_asked_for_by_default(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{FOLDER_VARIABLE} must be the folder of node_exporter's textfile collector"):
        read_exposure({FOLDER_VARIABLE: str(tmp_path / "no")})

    assert (None, None) == read_exposure({})
    assert (None, None) == read_exposure({PORT_VARIABLE: " ", FOLDER_VARIABLE: ""})
    assert (9100, tmp_path) == read_exposure({PORT_VARIABLE: "9100", FOLDER_VARIABLE: str(tmp_path)})
