"""What every test stands on: no telemetry, a registry of its own, real servers started once."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from _pytest.runner import runtestprotocol

from tests import leftovers
from tests.child_environment import STARTUP, add_folder
from tests.servers import has_triton_crashed, hold_port, read_triton_log, set_environment, triton_or_skip

# What is imported until all tests are collected stays. Python need not look for garbage in it, also not at the end.
gc.disable()
atexit.register(gc.freeze)

# MLflow decides on telemetry, and Prefect on its home and server, when they are first imported.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
# Tests call what runs within flows, and its log lines belong to none then.
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"
# Prefect must not start a hidden server where a test has none: it would still log when pytest has closed the streams.
os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"
# No test looks for a model anywhere but in its own registry.
os.environ["HF_HUB_OFFLINE"] = "1"
# No test asks the machine's own metadata service for notices; those about them name one on loopback.
os.environ["OVERNIGHT_METADATA_URL"] = "off"

# Python looks for no garbage in what the processes of tests import: they take a tenth less of the processors.
os.environ |= add_folder(STARTUP, os.environ)

# Threads of OpenMP, which torch and trees compute with, spin while they wait for one another. Where several processes
# of tests share the processors, that takes more of them than the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No example has a deadline: a busy machine breaks any. In CI the examples are the same in each run; elsewhere they are
# others, and what fails is printed so that it can be run again.
hypothesis.settings.register_profile("overnight", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("overnight")

if TYPE_CHECKING:
    from infra.local.nats import NatsClient, NatsServer
    from infra.local.s3 import S3Server
    from infra.local.triton import TritonServer


# Fixtures that start a real server of Prefect, Triton, NATS, Kafka, AWS, the gateway or the wire protocol. S3's is left
# out: it starts in a second, and answers as a disk does.
_OF_PREFECT, _OF_STREAMS = {"prefect", "server", "deployed"}, {"nats", "nats_client", "brokers"}
# Flows that are called without one take a second each, and are kept with these.
_SERVERS = _OF_PREFECT | _OF_STREAMS | {"triton", "gateway", "admin", "v2", "running_aws", "serverless"}

# The address of the registry once it is made, and what a test that does not ask for it has in its place.
_registries: list[str] = []
_hidden = pytest.MonkeyPatch()


def pytest_configure(config: pytest.Config) -> None:
    """Have no test leave threads or processes behind. What a conftest.py has is not told of fixtures of the session."""
    config.pluginmanager.register(leftovers)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that have a real server, which `make test` leaves to `make test-all`."""
    for item in items:
        if _SERVERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("servers")


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections: they would look through all of it, again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test once more, on another Triton, where its own has crashed.

    Triton 2.51 does now and then while models load on a busy machine: a process of its Python backend dies, by a wild
    pointer in Triton's own code, and leaves memory that it shares with the server locked. It was seen three times in
    three whole runs of the tests, and never in 50 loads under requests that were to provoke it.
    """
    if "triton" not in getattr(item, "fixturenames", ()):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    module = item.getparent(pytest.Module)
    if module is not None and any(report.failed for report in reports) and has_triton_crashed():
        # What the module has on that server goes too.
        item.session._setupstate.teardown_exact(module.parent)  # type: ignore[arg-type]
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
    for report in reports:
        if report.failed:
            # It says why a load failed, and is gone with the folders of the tests.
            report.sections.append(("Triton's log", read_triton_log()))
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hide the registry from a test that does not ask for it, also from its fixtures of a module or of the session."""
    if "registry" in getattr(item, "fixturenames", ()):
        _hidden.undo()
    elif os.environ.get("MLFLOW_TRACKING_URI") in _registries:
        _hidden.delenv("MLFLOW_TRACKING_URI", raising=False)
        _hidden.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
        _hidden.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
        _hidden.setattr("mlflow.tracking.fluent._active_experiment_id", None)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """An MLflow registry on sqlite with local artifacts, made once; only tests that ask for it see it."""
    import mlflow

    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    _registries.append(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        experiment = client.create_experiment("tests", artifact_location=str(folder / "artifacts"))
        client.create_experiment("overnight", artifact_location=str(folder / "artifacts"))
        mlflow.set_experiment(experiment_id=experiment)
        yield folder


@pytest.fixture(scope="session")
def prefect_templates(request: pytest.FixtureRequest) -> Path:
    """Where servers of Prefect find their database migrated, which takes five seconds, once one has done so."""
    return request.config.cache.mkdir("prefect")


@pytest.fixture
def serverless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """No Prefect server for a test that asks for none itself: its flows are called as functions."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if "prefect" in request.fixturenames:
        yield
        return
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


@pytest.fixture(scope="session")
def running_s3(tmp_path_factory: pytest.TempPathFactory) -> Generator[S3Server]:
    """The real S3 server, with a bucket named lake; a test that works with it asks for `s3`."""
    from infra.local.s3 import s3_server

    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket("lake")
        yield server


@pytest.fixture
def s3(running_s3: S3Server) -> Generator[S3Server]:
    """That server, and for this test the environment that points at it."""
    with set_environment(running_s3.environment):
        yield running_s3


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Generator[TritonServer]:
    """A real Triton of the module's own, or a skip that names what brings it."""
    with triton_or_skip(tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Generator[NatsServer]:
    """A real NATS server that nobody kills."""
    from infra.local.nats import nats_server

    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def nats_client(nats: NatsServer) -> Generator[NatsClient]:
    """A client of that server."""
    from infra.local.nats import NatsClient

    with NatsClient(nats.url) as client:
        yield client


@pytest.fixture(scope="session")
def prefect_logging() -> None:
    """Prefect's logging is set up, before a test listens: whoever does so takes away the handlers that are there."""
    from prefect.logging import configuration

    if not configuration.PROCESS_LOGGING_CONFIG:
        configuration.setup_logging()
    # As Python has it; MLflow's import may have raised it.
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture
def caplog(prefect_logging: None, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, at Prefect's own level: a server of another test may have left one at which nothing is."""
    caplog.set_level(logging.INFO, "prefect")
    return caplog


@pytest.fixture
def held_port() -> Generator[int]:
    """A port of loopback that refuses connections until a server of the test listens there."""
    with hold_port() as held:
        yield held.getsockname()[1]


@pytest.fixture
def fresh() -> str:
    """A name for streams and topics that no other test has."""
    return f"T{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def linear(registry: Path) -> str:
    """A registered torch network over the columns a, b and c, which gives one score a row."""
    from tests.support import register_network

    return register_network("linear", seed=0)


@pytest.fixture(scope="session")
def glosses() -> list[str]:
    """What WordNet says of 400 nouns, in no order."""
    from tests.support import read_glosses

    return read_glosses(400)


@pytest.fixture(scope="session")
def minilm(registry: Path) -> str:
    """A registered SentenceTransformer over the column gloss, which gives an embedding of 384 values a row."""
    from tests.support import register_minilm

    return register_minilm("minilm")


@pytest.fixture(scope="session")
def sleepy(registry: Path) -> str:
    """A registered model that doubles the column a, and takes 50 ms for each batch."""
    from tests.support import register_sleepy

    return register_sleepy("sleepy", seconds=0.05)


@pytest.fixture(scope="session")
def doubling(registry: Path) -> str:
    """A registered model that doubles the column a; a new process loads `linear` in five seconds more, by torch."""
    from tests.support import register_script

    return register_script("doubling", "pass")


@pytest.fixture(scope="session")
def failing(registry: Path) -> str:
    """A registered model that raises on every row."""
    from tests.support import register_script

    return register_script("failing", "raise ValueError('no row is good enough')")


@pytest.fixture(scope="session")
def deadly(registry: Path) -> str:
    """A registered model that ends its process where an a is 666."""
    from tests.support import register_script

    return register_script(
        "deadly", "(model_input['a'] == 666).any() and __import__('os').kill(__import__('os').getpid(), 9)"
    )
