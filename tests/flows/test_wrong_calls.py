"""What a person may get wrong in a call: each ends by one short message with the fix, and writes nothing."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import httpx
import mlflow
import numpy as np
import polars as pl
import pytest
from mlflow.models import infer_signature
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import ValidationError
from sklearn.linear_model import LinearRegression

from serving.errors import OvernightError, describe_error
from serving.model.registry import resolve_model
from tasks.batch.options import BatchOptions, CsvOptions
from tasks.spot.purchase import PurchaseOptions
from tasks.stream.options import FromNats, ToNats
from tests.child_environment import add_project
from tests.eventually import PROCESS_SECONDS, eventually
from tests.servers import hold_port
from tests.support import register_script, write_customers

if TYPE_CHECKING:
    from infra.local.prefect_server import PrefectServer
    from infra.local.s3 import S3Server

pytestmark = pytest.mark.usefixtures("serverless")

LINES_MAX = 12
# A script's own line, and what it called; what opens predictions is called by no flow and has one more.
FRAMES_MAX = 3
OPTIONS: dict[str, Any] = {"key_columns": "customer", "experiment": None}
HELD = hold_port()
CLOSED = f"http://127.0.0.1:{HELD.getsockname()[1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a wrong call is made: a folder with good customers, and a folder for the scores."""

    folder: Path
    patch: pytest.MonkeyPatch

    @property
    def customers(self) -> Path:
        return self.folder / "customers"

    @property
    def scores(self) -> Path:
        return self.folder / "scores"

    def put(self, name: str, data: bytes | str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def leave(_: Place) -> None:
    """All is as it should be; the call alone is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongCall:
    """A call that can't work: how it differs from one that does, and words of the advice that its message must give."""

    advice: str
    model: str = "models:/linear/1"
    source: Any = "{folder}/customers"
    destination: Any = "{folder}/scores"
    options: Any = field(default_factory=lambda: OPTIONS)
    more: dict[str, Any] = field(default_factory=dict)
    arrange: Callable[[Place], object] = leave
    # Records that a run leaves whose rows were scored before it was refused.
    begins: bool = False


def edit_customers(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Place], object]:
    """Return a step that changes the customers' table."""

    def edit(place: Place) -> None:
        shutil.rmtree(place.customers)
        write_customers(place.customers, rows=100, files=1, rows_per_group=100, edit=change)

    return edit


def set_variable(name: str, value: str) -> Callable[[Place], object]:
    """Return a step that sets an environment variable."""
    return lambda place: place.patch.setenv(name, value)


def use_registry(uri: str) -> Callable[[Place], object]:
    """Return a step that points MLflow at another registry."""

    def use(place: Place) -> None:
        place.patch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=place.folder))
        mlflow.set_tracking_uri(uri.format(folder=place.folder))

    return use


def write_csv(data: bytes | str, name: str = "rows.csv") -> Callable[[Place], object]:
    """Return a step that writes a file of text."""
    return lambda place: place.put(f"text/{name}", data)


def lose_a_model_s_files(place: Place) -> None:
    uri = register_script("lost", "pass")
    shutil.rmtree(resolve_model(uri).folder)


def cut_a_file(place: Place) -> None:
    (path,) = place.customers.glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-40])


def put_on_s3(place: Place) -> None:
    (path,) = place.customers.glob("*.parquet")
    boto3.client("s3").upload_file(str(path), "lake", "wrong-calls/x.parquet")


def use_other_keys(place: Place) -> None:
    place.patch.setenv("AWS_SECRET_ACCESS_KEY", "another")


def use_no_keys(place: Place) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        place.patch.delenv(name)
    place.patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    place.patch.setenv("AWS_CONFIG_FILE", str(place.folder / "none"))
    place.patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(place.folder / "none"))


CSV: dict[str, Any] = {"source": "{folder}/text"}
GOOD_ROWS = "customer,a,b,c\n1,2,3,4\n"
CALLS = {
    # The model.
    "a model that has a similar name": WrongCall(model="models:/linaer/1", advice="did you mean 'linear'?"),
    "an alias that has a similar name": WrongCall(model="models:/linear@champoin", advice="did you mean 'champion'?"),
    "a version that is not there": WrongCall(model="models:/linear/99", advice="which has versions [1"),
    "a model by its name alone": WrongCall(model="linear", advice="models:/linear/latest"),
    "a model by its file": WrongCall(model="./model.pkl", advice="A model must be models:/NAME@ALIAS"),
    "a model without a name": WrongCall(model="", advice="A model must be models:/NAME@ALIAS"),
    "a model without a signature": WrongCall(model="models:/unsigned/1", advice="signature"),
    "a pickled model": WrongCall(model="models:/pickled/1", advice="Pass allow_pickle=True in the options"),
    "a model whose package is missing": WrongCall(
        model="models:/unpacked/1", advice="pip install no-such-package==1.0"
    ),
    "a model whose files are gone": WrongCall(
        model="models:/lost/latest", advice="must hold an MLmodel", arrange=lose_a_model_s_files
    ),
    # The registry, and Prefect.
    "a registry that does not run": WrongCall(advice="set MLFLOW_TRACKING_URI", arrange=use_registry(CLOSED)),
    "a registry of a host that nobody has": WrongCall(
        advice="set MLFLOW_TRACKING_URI", arrange=use_registry("http://registry.invalid:5000")
    ),
    "a database that does not run": WrongCall(
        advice="set MLFLOW_TRACKING_URI",
        arrange=use_registry(f"postgresql://me@{CLOSED.removeprefix('http://')}/mlflow"),
    ),
    "a registry in a file that is not there": WrongCall(
        advice="must exist, but there is no such file", arrange=use_registry("sqlite:///{folder}/none.db")
    ),
    "artifacts of MLflow in a store that does not run": WrongCall(
        advice="correct MLFLOW_S3_ENDPOINT_URL", arrange=set_variable("MLFLOW_S3_ENDPOINT_URL", CLOSED)
    ),
    # Columns and types.
    "a column of a similar name": WrongCall(
        advice="did you mean 'bb'?", arrange=edit_customers(lambda table: table.rename({"b": "bb"}))
    ),
    "a key of a similar name": WrongCall(options={"key_columns": "custommer"}, advice="did you mean 'customer'?"),
    "a column of another kind": WrongCall(
        advice="cast it in the table first",
        arrange=edit_customers(lambda table: table.with_columns(a=pl.lit("2024-01-01").str.to_date())),
    ),
    "a column that would lose digits": WrongCall(
        advice="allow it with policies={'a': {'cast': 'round'}} in the options",
        arrange=edit_customers(lambda table: table.with_columns(a=pl.col("customer").cast(pl.Int64))),
    ),
    "a key that is called as a prediction": WrongCall(
        options={"key_columns": "score"},
        advice="Choose other keys",
        arrange=edit_customers(lambda table: table.rename({"customer": "score"})),
    ),
    "a value for nulls that is no number": WrongCall(
        options=OPTIONS | {"policies": {"a": {"null": "none"}}}, advice="'none' for column 'a'"
    ),
    "a misspelt policy for nulls": WrongCall(
        options=OPTIONS | {"policies": {"a": {"null": "kep"}}},
        advice="null in policies must be 'reject', 'keep' or a value of its column, which replaces its nulls; got "
        "'kep' for column 'a' (float32); did you mean 'keep'?",
    ),
    "too many rows that are rejects": WrongCall(
        advice="a: text that does not parse as float32 (100 rows, such as 'n/a')",
        arrange=edit_customers(lambda table: table.with_columns(a=pl.lit("n/a"))),
        begins=True,
    ),
    # Paths.
    "a source of a similar name": WrongCall(source="{folder}/custmers", advice="did you mean 'customers'?"),
    "a glob that fits nothing": WrongCall(source="{folder}/*.parquet", advice="* stays within a folder"),
    "a list with a file that is not there": WrongCall(
        source=["{folder}/customers", "{folder}/more.parquet"], advice="got none at"
    ),
    "an empty list": WrongCall(source=[], advice="got an empty list"),
    "lists of two stores": WrongCall(
        source=["{folder}/customers", "s3://lake/wrong-calls"], advice="must lie in one store", arrange=put_on_s3
    ),
    "a source that is no path": WrongCall(source=3, advice="source"),
    "a scheme that is not known": WrongCall(source="ftp://host/customers", advice="must be a path"),
    "two formats at once": WrongCall(
        advice="Narrow it by a glob", arrange=lambda place: place.put("customers/x.csv", "a\n1\n")
    ),
    "a format that is not known": WrongCall(
        source="{folder}/text", advice="give csv=CsvOptions()", arrange=write_csv(GOOD_ROWS, "rows.txt")
    ),
    # Formats.
    "a file that is cut short": WrongCall(
        source="{folder}/customers", advice="Repair or remove the file", arrange=cut_a_file
    ),
    "a file of another format than its name says": WrongCall(
        advice="x.parquet must be readable",
        arrange=lambda place: place.put("customers/x.parquet", "no Parquet"),
    ),
    "values parted by semicolons": WrongCall(
        **CSV, advice="csv=CsvOptions(delimiter=';')", arrange=write_csv(GOOD_ROWS.replace(",", ";"))
    ),
    "text of another encoding": WrongCall(
        **CSV,
        advice="csv=CsvOptions(encoding='cp1252')",
        arrange=write_csv("customer,a,b,c\nMü,1,2,3\n".encode("cp1252")),
    ),
    "a compressed file by another name": WrongCall(
        **CSV, advice="Name it with .gz at its end", arrange=write_csv(gzip.compress(GOOD_ROWS.encode()))
    ),
    "a compressed file that is cut short": WrongCall(
        **CSV,
        advice="Repair or remove the file",
        arrange=write_csv(gzip.compress(os.urandom(9) + GOOD_ROWS.encode())[:-12], "rows.csv.gz"),
    ),
    "a quote that stays open": WrongCall(
        **CSV, advice="give csv=CsvOptions(quote=None)", arrange=write_csv(f'{GOOD_ROWS}2,3,4,"5\n3,4,5,6\n')
    ),
    "a header in other words": WrongCall(
        **CSV, advice="did you mean 'Customer'?", arrange=write_csv("Customer,a,b,c\n1,2,3,4\n")
    ),
    "a line that is no JSON": WrongCall(
        **CSV, advice="got in line 2", arrange=write_csv('{"a": 1}\n{"a": \n', "rows.jsonl")
    ),
    "how CSV is written, of Parquet": WrongCall(
        options=BatchOptions(csv=CsvOptions(delimiter=";")), advice="Leave it out, or name CSV files"
    ),
    # Options.
    "an option of a similar name": WrongCall(options={"key_colums": "customer"}, advice="did you mean 'key_columns'?"),
    "an option that is too small": WrongCall(options={"batch_size": 0}, advice="greater than or equal to 1, got 0"),
    "a delimiter of two characters": WrongCall(options={"csv": {"delimiter": "||"}}, advice="at most 1 character"),
    "an encoding that nobody knows": WrongCall(options={"csv": {"encoding": "utf-9"}}, advice="such as utf-8, cp1252"),
    "an option beside the options": WrongCall(
        more={"batch_size": 64}, advice="pass options=BatchOptions(batch_size=...)"
    ),
    "a misspelt option beside the options": WrongCall(
        more={"keycolumns": ["customer"]}, advice="did you mean options=BatchOptions(key_columns=...)?"
    ),
    "a misspelt parameter": WrongCall(more={"destinaton": "out"}, advice="did you mean 'destination'?"),
    "memory for nothing": WrongCall(
        options=OPTIONS | {"memory_mb": 1, "slots": 64}, advice="Lower rows_per_chunk or slots, or raise memory_mb"
    ),
    "rows that would be there twice": WrongCall(
        options={"rescore": "again", "output": "delta"}, advice="delta_mode must be 'replace'"
    ),
    "workers of no deployment": WrongCall(options=OPTIONS | {"workers": 2}, advice="Run a deployment"),
    # Destinations, stores and credentials.
    "a destination inside the source": WrongCall(
        destination="{folder}/customers/scores", advice="Choose another destination"
    ),
    "a destination that is a file": WrongCall(
        destination="{folder}/file", advice="Choose another path", arrange=lambda place: place.put("file", "")
    ),
    "a destination below a file": WrongCall(
        destination="{folder}/file/scores", advice="Choose another path", arrange=lambda place: place.put("file", "")
    ),
    "a destination that takes no files": WrongCall(
        destination="/proc/scores",
        advice="The destination /proc/scores must be there already, or one that can be made, but /proc takes no new "
        "files (No such file or directory). Choose another path.",
    ),
    "a password in an address": WrongCall(destination="s3://me:pa55word@lake/scores", advice="in the environment"),
    "a store that does not run": WrongCall(
        destination="s3://lake/scores", advice="AWS_ENDPOINT_URL", arrange=set_variable("AWS_ENDPOINT_URL_S3", CLOSED)
    ),
    "a store without keys": WrongCall(
        destination="s3://lake/scores", advice="Set AWS_ACCESS_KEY_ID", arrange=use_no_keys
    ),
    "a store with other keys": WrongCall(
        destination="s3://lake/scores", advice="must be allowed to these credentials", arrange=use_other_keys
    ),
    "a bucket that is not there": WrongCall(
        destination="s3://no-such-bucket/scores", advice="Create it, or correct the address"
    ),
}


@pytest.fixture(scope="module")
def models(linear: str) -> None:
    """The models that wrong calls name."""
    mlflow.MlflowClient().set_registered_model_alias("linear", "champion", "1")
    frame = pl.DataFrame({name: np.zeros(4, dtype=np.float32) for name in "abc"}).to_pandas()
    model = LinearRegression().fit(frame, np.zeros(4))
    signature = infer_signature(frame, model.predict(frame))
    with mlflow.start_run():
        mlflow.sklearn.log_model(model, name="model", registered_model_name="unsigned", serialization_format="skops")
        mlflow.sklearn.log_model(
            model,
            name="model",
            signature=signature,
            registered_model_name="pickled",
            serialization_format="cloudpickle",
            pip_requirements=["scikit-learn"],
        )
    uri = register_script("unpacked", "pass")
    folder = resolve_model(uri).folder
    (folder / "requirements.txt").write_text("mlflow\nno-such-package==1.0\n")
    (folder / "scripted.py").write_text("import no_such_package\n")


@pytest.fixture
def place(tmp_path: Path, models: None, s3: S3Server) -> Generator[Place]:
    """A folder with customers; environment and registry are put back afterwards."""
    write_customers(tmp_path / "customers", rows=100, files=1, rows_per_group=100)
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        yield Place(folder=tmp_path, patch=patch)
    mlflow.set_tracking_uri(before)


def fill(value: Any, place: Place) -> Any:
    """Return a value of the table with the folder of this test in it."""
    if isinstance(value, list):
        return [fill(each, place) for each in value]
    return value.format(folder=place.folder) if isinstance(value, str) else value


def run_wrong_call(call: WrongCall, place: Place) -> str:
    """Make a wrong call, and return what a person sees of its end."""
    from flows.batch import batch_inference

    wrong: Any = batch_inference
    with pytest.raises((OvernightError, ValidationError)) as caught:
        wrong(call.model, fill(call.source, place), fill(call.destination, place), call.options, **call.more)
    return describe_error(caught.value)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_says_what_to_do_and_writes_nothing(name: str, place: Place) -> None:
    call = CALLS[name]
    call.arrange(place)
    before = {path for path in place.folder.rglob("*") if path.is_file()}
    message = run_wrong_call(call, place)

    assert call.advice in message
    assert len(message.split("\n")) <= LINES_MAX
    written = {path for path in place.folder.rglob("*") if path.is_file()} - before
    assert [] == [path for path in written if not call.begins or path.name == "manifest.json"]


def test_the_table_has_fifty_calls_or_more() -> None:
    assert len(CALLS) >= 50


class TestPrefect:
    """A Prefect server that is not to be had."""

    @pytest.mark.parametrize("url", [f"{CLOSED}/api", "http://prefect.invalid:4200/api"])
    def test_that_does_not_run(self, url: str, place: Place) -> None:
        with temporary_settings({PREFECT_API_URL: url}):
            message = run_wrong_call(WrongCall(advice=""), place)

        assert "correct PREFECT_API_URL" in message
        assert f"The Prefect server at {url} must answer" in message

    def test_whose_address_lacks_the_api(self, prefect: PrefectServer, place: Place) -> None:
        with temporary_settings({PREFECT_API_URL: f"{prefect.api_url}/v9"}):
            message = run_wrong_call(WrongCall(advice=""), place)

        assert "which ends in /api" in message

    def test_that_wants_another_password(self, place: Place) -> None:
        class Refuse(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(401)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
                message = run_wrong_call(WrongCall(advice=""), place)
            server.shutdown()

        assert "PREFECT_SERVER_API_AUTH_STRING" in message


def test_servers_that_accept_and_never_answer_are_asked_once_and_named_together(place: Place) -> None:
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        registry, store, prefect = (f"http://127.0.0.1:{each.getsockname()[1]}" for each in listeners)
        use_registry(registry)(place)
        place.patch.setenv("AWS_ENDPOINT_URL_S3", store)
        stack.enter_context(temporary_settings({PREFECT_API_URL: f"{prefect}/api"}))
        message = run_wrong_call(WrongCall(destination="s3://lake/scores", advice=""), place)
        for listener in listeners:
            listener.accept()[0].close()
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()

    assert 4 == len(message.split("\n"))
    for words in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3", "PREFECT_API_URL", f"{store} must answer, got: no"):
        assert words in message


@pytest.mark.usefixtures("prefect")
class TestAFlowRun:
    """What Prefect keeps of a call that failed."""

    def test_is_failed_with_the_message_and_logs_it_once_without_frames(
        self, prefect: PrefectServer, place: Place
    ) -> None:
        from flows.batch import batch_inference

        state = batch_inference(
            "models:/linaer/1", str(place.customers), str(place.scores), BatchOptions(**OPTIONS), return_state=True
        )
        expected = "ModelNotFound: models:/linaer/1 must be registered"
        run = state.state_details.flow_run_id
        kept = httpx.get(f"{prefect.api_url}/flow_runs/{run}").json()["state"]

        assert ("FAILED", True) == (kept["type"], kept["message"].startswith(expected))
        of_run = {"logs": {"flow_run_id": {"any_": [str(run)]}, "level": {"ge_": 40}}}
        logs = eventually(lambda: httpx.post(f"{prefect.api_url}/logs/filter", json=of_run).json())
        lines = [line["message"] for line in logs]
        assert 1 == sum(expected in line for line in lines)
        assert not any("Traceback" in line for line in lines)

    def test_of_another_flow_is_failed_with_the_message_too(self, place: Place) -> None:
        from flows.nightly import nightly_inference
        from flows.stream import stream_inference

        wrong: Any = "models:/linaer/1"
        streamed = stream_inference(wrong, FromNats(stream="events"), ToNats(subject="scores"), return_state=True)
        night = nightly_inference(
            *(wrong, place.customers, place.scores, "06:00", PurchaseOptions(spot_price=1, on_demand_price=2)),
            return_state=True,
        )

        for state in (streamed, night):
            assert str(state.message).startswith("ModelNotFound: models:/linaer/1 must be registered")

    def test_is_retried_where_it_is_asked_for(self, place: Place) -> None:
        from flows.batch import batch_inference

        retried = batch_inference.with_options(retries=1)
        state = retried("models:/linaer/1", str(place.customers), str(place.scores), return_state=True)

        assert state.is_failed()


_PROGRAM = """
from pathlib import Path
from flows import batch_inference, open_predictions
{line}
"""
PROGRAMS = {
    "a model that is not there": (
        "batch_inference('models:/linaer/1', 'customers', 'scores')",
        "ModelNotFound: models:/linaer/1 must be registered",
    ),
    "an option beside the options": (
        "batch_inference('models:/linear/1', 'customers', 'scores', key_columns=['customer'])",
        "BadInput: batch_inference must be called with",
    ),
    "options with a wrong name": (
        "from flows import BatchOptions; BatchOptions(key_colums='customer', batch_size=0)",
        "2 validation errors for BatchOptions",
    ),
    "rows that are rejects": (
        "batch_inference('models:/linear/1', 'text', 'scores', {'experiment': None})",
        "TooManyRejects: At most 0.1 of 100 rows may be rejects",
    ),
    "no predictions": ("open_predictions('scores')", "NoCompleteRun: "),
}


@pytest.mark.machines
@pytest.mark.usefixtures("prefect")
def test_a_script_ends_with_its_own_line_and_the_message_and_no_frames_in_between(place: Place) -> None:
    place.put("text/rows.csv", "a,b,c\n" + "n/a,1,2\n" * 100)
    environment = {**add_project(), "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    environment.pop("PREFECT_LOGGING_LEVEL", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(line=line)],
            cwd=place.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line, _ in PROGRAMS.values()
    ]
    screens = {
        name: process.communicate(timeout=PROCESS_SECONDS)[0] for name, process in zip(PROGRAMS, started, strict=True)
    }

    assert {1} == {process.returncode for process in started}
    for name, (_, expected) in PROGRAMS.items():
        lines = screens[name].rstrip().split("\n")
        frames = [line for line in lines if line.startswith('  File "')]
        assert 'File "<string>"' in frames[0], screens[name]
        assert len(frames) <= FRAMES_MAX, screens[name]
        assert len(lines[lines.index(frames[-1]) :]) <= LINES_MAX, screens[name]
        assert 1 == screens[name].count(expected), screens[name]
        assert 1 == screens[name].count("Traceback"), screens[name]
