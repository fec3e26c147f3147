"""The program as a whole: its help, how commands end, what an error prints."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlflow.client
import pytest
import typer
from prefect import flow_engine
from prefect._internal.concurrency import services
from typer.testing import CliRunner

from deployments.command_line import app, console
from deployments.command_line.application import describe_error
from deployments.command_line.console import LINES_MAX, build_model, read_document, shorten, show_own_lines
from serving.errors import BadInput
from tasks.batch.options import BatchOptions

COMMANDS = [
    *(["score"], ["runs"], ["costs"], ["verify"], ["deploy"], ["worker"], ["endpoint"], ["endpoint", "retire"]),
    *(
        ["choose"],
        ["model", "check"],
        ["model", "tuning"],
        ["local", "up"],
        ["kubernetes", "render"],
        ["kubernetes", "deploy"],
    ),
    *(["environments", "list"], ["environments", "remove"]),
    *(["aws", "plan"], ["aws", "deploy"], ["aws", "status"], ["aws", "destroy"]),
]
HEAVY = "{'torch', 'prefect', 'mlflow', 'pyarrow', 'polars', 'numpy', 'pandas'}"


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = "import atexit, sys; from deployments.command_line import main; "
    code += f"atexit.register(lambda: print(sorted({HEAVY} & set(sys.modules)))); main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stderr
    assert done.stdout.endswith("\n[]\n")
    for command in COMMANDS:
        assert command[0] in done.stdout


@pytest.mark.parametrize("command", [["score"], ["deploy"], ["endpoint"], ["choose"], ["model", "check"]], ids=" ".join)
def test_whatever_loads_a_model_allows_pickles_by_one_name(command: list[str]) -> None:
    found = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]  # type: ignore[attr-defined]

    assert "--allow-pickle" in {flag for param in found.params for flag in param.opts}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_sentence_an_example_and_options_that_are_described(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    group = typer.main.get_command(app)
    for name in command:
        group = group.commands[name]  # type: ignore[attr-defined]

    assert 0 == result.exit_code
    assert group.help
    assert f"overnight {' '.join(command)}" in str(group.epilog)
    # Those of score are taken from the fields of its options as help is shown.
    described = set(BatchOptions.model_fields) if command == ["score"] else set()
    assert set() == {param.name for param in group.params if not getattr(param, "help", None)} - described
    for param in group.params:
        assert any(name in result.stdout for name in (*param.opts, str(param.metavar)))


def test_options_of_score_are_described_by_the_fields_of_the_options() -> None:
    result = CliRunner().invoke(app, ["score", "--help"], env={"COLUMNS": "300"})
    told = " ".join(result.stdout.replace("│", " ").split())

    for name in ("max_reject_fraction", "rescore", "memory_mb", "output"):
        assert " ".join(str(BatchOptions.model_fields[name].description).split()) in told


@pytest.mark.parametrize(
    ("logger", "module", "is_shown"),
    [
        ("prefect.flow_runs", flow_engine, False),
        # What is left to send when a short call ends.
        ("EventsWorker", services, False),
        ("prefect.overnight", console, True),
        ("mlflow", mlflow.client, True),
    ],
)
def test_a_terminal_shows_no_lines_of_prefect(
    logger: str,
    module: ModuleType,
    is_shown: bool,  # noqa: FBT001 - of the table
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [shown])
    monkeypatch.setattr(logging.getLogger("prefect"), "handlers", [])
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    show_own_lines()
    record = logging.LogRecord(logger, logging.WARNING, str(module.__file__), 1, "3 items remaining", (), None)

    shown.handle(record)
    assert is_shown == ("remaining" in shown.stream.getvalue())


@pytest.mark.parametrize("arguments", [[], ["endpoint"], ["model"], ["local"], ["kubernetes"], ["aws"]], ids=" ".join)
def test_a_group_alone_shows_what_it_has(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)

    assert 2 == result.exit_code
    assert "Usage" in result.output


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])

    assert 0 == result.exit_code
    assert result.stdout.startswith("overnight")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "models:/m/1", "in/"], "Missing argument 'DESTINATION'"),
        (["scor"], "Did you mean 'score'"),
        (["score", "m", "a", "b", "--slot", "3"], "--slots"),
        (["score", "m", "a", "b", "--slots", "two"], "int"),
        (["deploy", "models:/m/1"], "must all be given, or none"),
        (["deploy", "--schedule", "0 1 * * *"], "The options belong to a call"),
        (["endpoint", "--model", "models:/m/1"], "needs --name and --model"),
    ],
)
def test_a_command_line_that_does_not_read_ends_with_two_and_says_why(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)

    assert 2 == result.exit_code
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert len(result.stderr.splitlines()) <= LINES_MAX


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "m", "a", "b", "--output", "csv"], "--output: Input should be 'parquet'"),
        (["score", "m", "a", "b", "--slots", "0"], "--slots: Input should be greater than or equal to 1, got 0"),
        (["score", "m", "a", "b", "--options", '{"csv": {"quote": "||"}}'], "csv.quote of --options: String should"),
        (["score", "m", "a", "b", "--rescore", "x", "--output", "delta"], "delta_mode of --options must be 'replace'"),
        (
            ["score", "m", "a", "b", "--options", '{"slotz": 1}'],
            "slotz of --options: there is no such field; did you mean",
        ),
        (["score", "m", "a", "b", "--options", "[1]"], "--options must be an object"),
        (["score", "m", "a", "b", "--options", "{"], "--options must be JSON"),
        (["score", "m", "a", "b", "--options", "@nowhere.yaml"], "nowhere.yaml, which --options names, must be a file"),
        (["score", "m", "a", "b", "--slots", "1", "--options", '{"slots": 1}'], "given once, got slots in --options"),
        (["runs", "ftp://somewhere"], "must be a path, file:///path or s3://bucket/prefix"),
        (["verify", "nowhere/"], "must hold a run that was published, got none"),
        (["verify", "nowhere/", "--run", "x"], "must hold a run 'x', got: none"),
        (["deploy", "--show", "setup.py"], "must be one of prefect.yaml"),
        (
            ["deploy", "m", "a", "b", "--options", '{"slotz": 1}'],
            "slotz of --options: there is no such field; did you mean",
        ),
        (["endpoint", "--name", "churn"], "must have a model, steps or an ensemble, and one of these three, got none"),
        (["endpoint", "--name", "churn", "--model", "m", "--rate", "3"], "needs both --latency-ms and --rate"),
        (["endpoint", "--name", "churn", "--model", "m", "--keep-warm", "long"], "must be seconds, or auto"),
        (["endpoint", "--name", "churn", "--model", "m", "--canary", "200"], "--canary: Input should be less than or"),
        (
            ["endpoint", "--name", "churn", "--model", "m", "--rate", "0", "--latency-ms", "9"],
            "--rate: Input should be",
        ),
        (["endpoint", "--name", "churn", "--model", "m", "--no-wait"], "must be of a canary, got no --canary PERCENT"),
        (
            ["endpoint", "--name", "churn", "--model", "m", "--api-key", "KEY", "--no-api-key"],
            "Only one of --api-key and --no-api-key must be given, got both: --api-key KEY.",
        ),
        (["endpoint", "retire", "churn", "--target", '{"kind": "tritn"}'], "tritn"),
        (["choose", '{"name": "churn"}'], "model: Field required"),
        (["choose", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["choose", '{"name": "churn", "model": "m", "consumer": {"rows": 10}}'],
            "consumer: its kind must be one of requests, table, events, got {'rows': 10}",
        ),
        (
            ["choose", '{"name": "churn", "model": "m", "consumer": {"kind": "tabel", "rows": 10}}'],
            "consumer: its kind must be one of requests, table, events, got",
        ),
        (
            ["score", "m", "a", "b", "--name", "a b"],
            "--name: must be at most 64 letters, digits, '_', '.' and '-', the first a letter or digit, got 'a b'",
        ),
        (["local", "up", "prefct"], "must be one of prefect, mlflow"),
    ],
)
def test_an_error_ends_a_command_with_its_message_alone_and_one(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)

    assert (1, "") == (result.exit_code, result.stdout)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= LINES_MAX
    assert [] == list(tmp_path.iterdir())


def test_frames_are_shown_where_they_are_asked_for() -> None:
    result = CliRunner().invoke(app, ["--debug", "runs", "ftp://somewhere"])

    assert 1 == result.exit_code
    assert "Traceback" in result.stderr


def test_an_error_that_nobody_expected_says_how_to_find_it() -> None:
    told = describe_error(RuntimeError("odd"))

    assert "RuntimeError: odd" in told
    assert "overnight --debug" in told


def test_a_secret_in_an_unexpected_error_is_hidden() -> None:
    assert "hunter2" not in describe_error(RuntimeError("postgres://me:hunter2@host/db refused"))


def test_a_long_message_is_cut_to_a_screen() -> None:
    told = shorten("\n".join(f"line {at}" for at in range(40)))

    assert LINES_MAX == len(told.splitlines())
    assert "and 29 more lines" in told
    assert "one" == shorten("one\n")


def test_a_document_is_json_or_a_file_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("key_columns: [a]\nslots: 2\n")

    assert {"slots": 2} == read_document('{"slots": 2}', "--options")
    assert {"key_columns": ["a"], "slots": 2} == read_document(f"@{tmp_path / 'options.yaml'}", "--options")
    assert BatchOptions(key_columns=("a",), slots=2, output="delta") == build_model(
        BatchOptions, {"output": "delta", "name": None}, f"@{tmp_path / 'options.yaml'}", "--options"
    )
    with pytest.raises(BadInput, match="must be an object"):
        read_document("3", "--options")


def test_ctrl_c_before_anything_has_begun_is_one_line_and_130() -> None:
    code = "import os, signal, sys; from deployments.command_line import app, batch_commands; "
    code += "import tasks.batch.runs as runs; runs.list_runs = lambda _: os.kill(os.getpid(), signal.SIGINT); "
    code += "app(['runs', '/'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )

    assert (130, "", "Interrupted.\n") == (done.returncode, done.stdout, done.stderr)
