"""Score, runs and verify: in this process for what they print, as real processes for how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from typer.testing import CliRunner

from deployments.command_line import app
from deployments.command_line.console import LINES_MAX
from infra.local.prefect_server import PrefectServer
from serving.model.process_handle import FIRST_PROCESSES
from tasks.batch.manifest import open_predictions
from tests.eventually import eventually
from tests.support import write_customers
from tests.tasks.batch.test_reuse import call, write

PROGRAM = [sys.executable, "-m", "deployments.command_line"]


def run_program(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, to its end."""
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False, env=environment)


PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def scored(
    server: PrefectServer, doubling: str, customers: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """A destination with a run that a real process has scored, and what it printed."""
    destination = tmp_path_factory.mktemp("scores") / "scores"
    done = run_program("score", doubling, str(customers), str(destination), "--key", "customer", "--json")
    assert 0 == done.returncode, done.stderr
    (line,) = done.stdout.splitlines()
    return destination, json.loads(line)


def test_score_prints_one_json_object_and_all_rows_are_there(scored: tuple[Path, dict[str, object]]) -> None:
    destination, report = scored

    assert ("scored", 10_000, 0) == tuple(report[name] for name in ("status", "rows", "rows_rejected"))
    assert list(range(10_000)) == sorted(open_predictions(str(destination)).collect()["customer"])


def test_score_again_finds_the_run_complete_and_shows_a_table(
    scored: tuple[Path, dict[str, object]], doubling: str, customers: Path
) -> None:
    destination, report = scored
    result = CliRunner().invoke(app, ["score", doubling, str(customers), str(destination), "-k", "customer"])

    assert 0 == result.exit_code, result.output
    assert f"Run {report['run']}" in result.stdout
    assert "already complete" in result.stdout
    assert "Read the predictions:" in result.stdout


def test_runs_are_listed(scored: tuple[Path, dict[str, object]], doubling: str) -> None:
    destination, report = scored
    table = CliRunner().invoke(app, ["runs", str(destination)])
    listed = json.loads(CliRunner().invoke(app, ["runs", str(destination), "--json"]).stdout)

    assert 0 == table.exit_code
    for text in (report["run"], doubling, "10,000", "complete", "planned (UTC)"):
        assert str(text) in table.stdout
    assert [(report["run"], "complete", 10_000)] == [(r["run"], r["state"], r["rows"]) for r in listed["runs"]]


def test_parts_of_an_earlier_run_are_proved_by_scoring_them_again(
    server: PrefectServer, doubling: str, tmp_path: Path
) -> None:
    source, out = write_customers(tmp_path / "in", rows=4_000, files=4, rows_per_group=500), str(tmp_path / "out")
    score = ["score", doubling, str(source), out, "-k", "customer", "--options", '{"rows_per_chunk": 500}']
    assert 0 == CliRunner().invoke(app, score).exit_code
    write_customers(tmp_path / "new", rows=1_000, files=1, rows_per_group=500)
    (tmp_path / "new/customers-00.parquet").rename(source / "customers-04.parquet")
    assert 0 == CliRunner().invoke(app, score).exit_code
    proved = CliRunner().invoke(app, ["verify", out, "--sample", "50%", "--seed", "3", "--json"])
    refused = CliRunner().invoke(app, ["verify", out, "--sample", "half"])

    assert 0 == proved.exit_code, proved.output
    assert [("complete", 4, [])] == [
        (run["state"], run["parts_proved"], run["damages"]) for run in json.loads(proved.stdout)["runs"]
    ]
    assert 1 == refused.exit_code
    assert "A sample must be a percentage such as 1% or 100%" in refused.stderr


def test_rejects_are_counted_and_written_for_a_person_to_correct(tmp_path: Path) -> None:
    out, file = str(tmp_path / "out"), tmp_path / "rejects.csv"
    write(tmp_path / "in/f0.parquet", 1, 20)
    plan, _ = call(tmp_path / "in", tmp_path / "out")
    listed = CliRunner().invoke(app, ["rejects", out])
    told = json.loads(CliRunner().invoke(app, ["rejects", out, "--output", str(file), "--json"]).stdout)
    again = CliRunner().invoke(app, ["rejects", out, "--run", plan.run, "--output", str(file)])

    assert 0 == listed.exit_code, listed.output
    assert f"Of the 20 rows in the parts of run {plan.run}, 2 are rejects." in listed.stdout
    assert f"overnight rejects {out} --run {plan.run} --output rejects.parquet" in listed.stdout
    assert [{"column": "a", "reason": "null", "rows": 2}] == told["rejects"]
    assert (plan.run, 20, 2, str(file)) == tuple(told[name] for name in ("run", "rows", "rows_rejected", "output"))
    assert "id,a,b,reject_column,reject_reason\n7,,0.875,a,null\n14,,1.75,a,null\n" == file.read_text()
    assert (1, "") == (again.exit_code, again.stdout)
    assert f"must be a new one, but {file} is there already" in again.stderr


def test_a_run_without_rejects_writes_no_file_and_one_that_is_not_there_is_told(tmp_path: Path) -> None:
    write(tmp_path / "in/f0.parquet", 1, 6)
    plan, _ = call(tmp_path / "in", tmp_path / "out")
    done = CliRunner().invoke(app, ["rejects", str(tmp_path / "out"), "--output", str(tmp_path / "rejects.csv")])
    missing = CliRunner().invoke(app, ["rejects", str(tmp_path / "in")])

    assert (0, f"Run {plan.run} has no rejects.\n") == (done.exit_code, done.stdout)
    assert not (tmp_path / "rejects.csv").exists()
    assert 1 == missing.exit_code
    assert "must hold a run that is complete, got none" in missing.stderr


def test_costs_of_runs_are_a_table_a_page_and_an_artifact_and_unknown_prices_are_said_to_be(
    scored: tuple[Path, dict[str, object]], server: PrefectServer, tmp_path: Path
) -> None:
    destination, report = scored
    page = tmp_path / "costs.html"
    shown = CliRunner().invoke(app, ["costs", str(destination), "--output", str(page), "--prefect"])
    told = json.loads(CliRunner().invoke(app, ["costs", str(destination), str(tmp_path), "--json"]).stdout)
    with get_client(sync_client=True) as client:
        artifacts = [each for each in client.read_artifacts() if str(each.key).startswith("costs-scores-")]
    (run,) = told["destinations"][str(destination)]

    assert 0 == shown.exit_code, shown.output
    assert "not known" in shown.stdout
    assert "OVERNIGHT_DOLLARS_PER_HOUR was not set" in shown.stdout
    assert str(report["run"]) in shown.stdout
    assert str(report["run"])[:12] in page.read_text()
    assert (report["run"], 10_000, None) == (run["run"], run["rows"], run["spent"])
    assert run["machine_seconds"] > 0
    assert [] == told["destinations"][str(tmp_path)]
    assert 1 == len(artifacts)


def test_costs_of_a_destination_without_runs_write_no_page(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["costs", str(tmp_path), "--output", str(tmp_path / "costs.html")])

    assert (0, "") == (result.exit_code, result.stdout)
    assert f"{tmp_path} has no published run." in result.stderr
    assert not (tmp_path / "costs.html").exists()


def test_a_destination_without_runs_says_how_to_make_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["runs", str(tmp_path)])

    assert (1, "") == (result.exit_code, result.stdout)
    assert "overnight score MODEL SOURCE DESTINATION" in result.stderr


def test_verify_finds_a_whole_run_whole_and_a_damaged_one_damaged(
    scored: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    destination = tmp_path / "copy"
    shutil.copytree(scored[0], destination)
    whole = CliRunner().invoke(app, ["verify", str(destination)])
    part = next(destination.glob("run=*/part-*.parquet"))
    part.write_bytes(part.read_bytes()[:-7])
    damaged = CliRunner().invoke(app, ["verify", str(destination)])
    told = CliRunner().invoke(app, ["verify", str(destination), "--run", str(scored[1]["run"]), "--json"])
    (run,) = json.loads(told.stdout)["runs"]

    assert 0 == whole.exit_code
    assert "10,000 of 10,000 rows are in parts that are as they must be" in whole.stdout
    assert "Delete" not in whole.stdout
    assert (1, 1) == (damaged.exit_code, told.exit_code)
    assert f"size: {part.relative_to(destination)}" in damaged.stdout
    assert f"Delete the damaged files:  rm {part}\n  Then make the call again that scored the run" in damaged.stdout
    assert ("damaged", ["size", "bytes"]) == (run["state"], [damage["kind"] for damage in run["damages"]])
    assert f"Reading run {scored[1]['run']}" in damaged.stderr


def test_runs_ends_with_one_where_a_run_is_damaged_and_says_what_to_do(
    scored: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    destination = tmp_path / "copy"
    shutil.copytree(scored[0], destination)
    part = next(destination.glob("run=*/part-*.parquet"))
    part.unlink()
    run = scored[1]["run"]
    listed = CliRunner().invoke(app, ["runs", str(destination)])
    as_json = CliRunner().invoke(app, ["runs", str(destination), "--json"])

    assert (1, 1) == (listed.exit_code, as_json.exit_code)
    assert f"Run {run} is damaged: 1 parts are gone or of another size" in listed.stderr
    assert f"overnight verify {destination} --run {run}" in listed.stderr
    assert ["damaged"] == [each["state"] for each in json.loads(as_json.stdout)["runs"]]


def test_what_a_model_prints_is_not_on_stdout_beside_json(
    server: PrefectServer, registry: Path, customers: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.support import register_script

    chatty = register_script("chatty", "print('so many rows')")
    result = CliRunner().invoke(app, ["score", chatty, str(customers), str(tmp_path / "scores"), "--json"])

    assert 0 == result.exit_code, result.output
    assert 10_000 == json.loads(result.stdout)["rows"]
    assert "so many rows" not in result.stdout
    # It is printed by a process, to this one's standard error.
    assert "so many rows" in capfd.readouterr().err


def test_a_model_that_is_not_there_ends_with_its_message_alone(
    server: PrefectServer, registry: Path, customers: Path, tmp_path: Path
) -> None:
    done = run_program("score", "models:/nobody/1", str(customers), str(tmp_path / "scores"))

    assert (1, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("models:/nobody/1 must be registered")
    assert 1 == len(done.stderr.splitlines())
    assert not (tmp_path / "scores").exists()


WRONG_CALLS = (
    (["models:/linaer/1", "{customers}", "{folder}/scores"], "did you mean 'linear'?"),
    (["models:/linear/1", "{folder}/wrong", "{folder}/scores"], "is missing; did you mean 'bb'?"),
    (["models:/linear/1", "{customers}", "{folder}/scores", "-k", "custmer"], "did you mean 'customer'?"),
    (["models:/linear/1", "{customers}", "/proc/scores"], "The destination /proc/scores must be there already"),
    (
        ["models:/linear/1", "{folder}/text", "{folder}/scores"],
        """Give --options '{"csv": {"delimiter": ";"}}'.""",
    ),
)


@pytest.mark.parametrize(("arguments", "said"), WRONG_CALLS)
def test_a_wrong_call_is_told_without_a_prefect_server(
    arguments: list[str], said: str, serverless: None, linear: str, customers: Path, tmp_path: Path
) -> None:
    write_customers(tmp_path / "wrong", rows=10, files=1, rows_per_group=10, edit=lambda each: each.rename({"b": "bb"}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "rows.csv").write_text("customer;a;b;c\n1;2;3;4\n")
    given = [each.format(customers=customers, folder=tmp_path) for each in arguments]
    done = CliRunner().invoke(app, ["score", *given])

    assert (1, "") == (done.exit_code, done.stdout)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= LINES_MAX
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "scores" / "_overnight" / "plan.json").exists()


@pytest.mark.parametrize("missing", ["torch", "nothing"])
def test_a_process_for_the_model_starts_before_the_registry_is_asked_where_every_model_needs_one(
    missing: str,
    serverless: None,
    registry: Path,
    customers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    monkeypatch.setattr(FIRST_PROCESSES, "prepare", started.append)
    monkeypatch.setattr(
        "deployments.command_line.batch_commands.find_spec",
        lambda name: None if name == missing else find_spec(name),
    )
    done = CliRunner().invoke(app, ["score", "models:/nobody/1", str(customers), str(tmp_path / "scores")])

    assert done.stderr.startswith("models:/nobody/1 must be registered")
    assert ([sys.executable] if missing == "torch" else []) == started


NOT_IMPORTED = (
    (["runs", "{scored}"], {"mlflow", "prefect", "pandas"}),
    (["verify", "{scored}"], {"mlflow", "prefect", "pandas"}),
    (["score", "{model}", "{customers}", "{scored}", "--key", "customer"], set()),
    (["score", "{model}", "{customers}", "{new}", "--key", "customer"], set()),
)


@pytest.mark.parametrize(
    ("arguments", "more"), NOT_IMPORTED, ids=lambda each: "-".join(each[::3]) if isinstance(each, list) else ""
)
def test_what_a_command_does_not_need_it_does_not_import_and_its_end_is_quick(
    arguments: list[str],
    more: set[str],
    scored: tuple[Path, dict[str, object]],
    doubling: str,
    customers: Path,
    tmp_path: Path,
) -> None:
    names = sorted({"boto3", "matplotlib", "sklearn", "skops", "torch"} | more)
    code = f"""
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 0, sorted(set({names}) & set(sys.modules)), file=sys.stderr))
from deployments.command_line import main
main()
"""
    places = {"scored": scored[0], "new": tmp_path, "model": doubling, "customers": customers}
    given = [each.format(**places) for each in arguments]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)

    # Python looks for no garbage as it ends: all that was imported is left as it is.
    assert "True []" == done.stderr.splitlines()[-1], done.stderr


def test_prefect_s_lines_are_shown_where_they_are_asked_for(
    server: PrefectServer, registry: Path, customers: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PREFECT_LOGGING_LEVEL": "DEBUG"}
    done = run_program("score", "models:/nobody/1", str(customers), str(tmp_path / "scores"), environment=environment)

    assert 1 == done.returncode
    assert "Beginning flow run" in done.stderr


def test_ctrl_c_ends_score_with_130_and_one_line_and_the_same_command_resumes(
    server: PrefectServer, sleepy: str, customers: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "scores"
    options = '{"rows_per_chunk": 100, "experiment": null}'
    command = [*PROGRAM, "score", sleepy, str(customers), str(destination), "-k", "customer", "--batch-size", "100"]
    command += ["--slots", "1", "--options", options, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: list(destination.glob("run=*/part-*")), lambda found: len(found) >= 3, process=process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    kept = len(list(destination.glob("run=*/part-*")))

    assert (130, "") == (process.returncode, stdout)
    assert "are done and stay; the same call resumes." in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert 3 <= kept < 100

    resumed = CliRunner().invoke(app, command[len(PROGRAM) :])

    assert 0 == resumed.exit_code, resumed.stderr

    report = json.loads(resumed.stdout)

    assert report["rows_scored"] <= 10_000 - kept * 100
    assert list(range(10_000)) == sorted(open_predictions(str(destination)).collect()["customer"])
