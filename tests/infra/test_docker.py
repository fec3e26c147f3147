"""The worker's image, built for real without a network: what is in it, and that it scores, drains and is healthy.

The Prefect server, the registry and the storage are outside of it, and it has nothing of this machine but its network.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deployments.demo.flights import KEY, write_flights
from infra.local.prefect_server import PrefectServer, prefect_server
from infra.local.process import hold_ports
from infra.local.s3 import s3_server
from infra.worker import list_process_tree
from tests.deployments.flow_runs import machine_of, read, start, state_of, wait_for
from tests.eventually import eventually
from tests.infra.buildah import (
    Buildah,
    download_wheels,
    make_base,
    make_context,
    make_storage,
    skip_without_programs,
)
from tests.infra.locks import DOCKER, read_lock

pytestmark = pytest.mark.machines
ROWS = 336_776
ROWS_PER_CHUNK = 1_024
AUTH = "overnight:only-for-this-test"
USER = 10_001
SIZE_MAX = 2.5e9
BUILD_TOOLS = ("pip", "pip3", "cc", "gcc", "g++", "make", "git", "curl", "wget", "cargo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """The image of a worker, and what it was built of."""

    buildah: Buildah
    name: str
    base: str
    context: Path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Generator[Image]:
    """The image for CPUs, of this checkout, built from a folder of wheels."""
    skip_without_programs()
    folder = tmp_path_factory.mktemp("image")
    context = folder / "context"
    for each in (context, folder / "base", folder / "scratch"):
        each.mkdir()
    make_context(context)
    with make_storage(folder / "storage") as storage:
        buildah = Buildah(storage=storage, scratch=folder / "scratch")
        make_base(folder / "base/root.tar")
        base = buildah.import_base(folder / "base/root.tar")
        python = buildah.call(
            *("run", "--isolation", "chroot", buildah.start_container(base), "--"),
            *("python3", "-c", "import platform; print(platform.python_version())"),
        )
        download_wheels(context, folder / "wheels", python.strip())
        built = buildah.build(
            context,
            "localhost/overnight-worker",
            *("--file", context / "infra/docker/Dockerfile", "--build-arg", f"BASE_IMAGE={base}"),
            *("--build-context", f"wheels={folder / 'wheels'}"),
        )
        assert 0 == built.returncode, (built.stdout + built.stderr)[-4_000:]
        yield Image(buildah=buildah, name="localhost/overnight-worker", base=base, context=context)
        buildah.call("rm", "--all")
    assert not (folder / "storage").exists()


@pytest.fixture(scope="module")
def container(image: Image) -> str:
    return image.buildah.start_container(image.name)


def run(image: Image, container: str, *command: str) -> subprocess.CompletedProcess[str]:
    line = image.buildah.run_command(container, *command)
    return subprocess.run(
        line, env=image.buildah.environment(), cwd="/", capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "GIVE--build-arg_BASE_IMAGE=NAME@sha256:DIGEST"),
        (("BASE_IMAGE=localhost/base",), "BASE_IMAGE must be NAME@sha256:DIGEST, got localhost/base"),
        (("TORCH=rocm",), "TORCH must be cpu or cuda, got rocm"),
    ],
    ids=["none", "a name alone", "another torch"],
)
def test_a_build_without_a_pinned_base_or_with_another_torch_is_refused_with_what_to_give(
    image: Image, arguments: tuple[str, ...], said: str
) -> None:
    given = (f"BASE_IMAGE={image.base}", *arguments) if said.startswith("TORCH") else arguments
    built = image.buildah.build(
        image.context,
        "localhost/refused",
        *("--file", image.context / "infra/docker/Dockerfile"),
        *(part for argument in given for part in ("--build-arg", argument)),
    )

    assert built.returncode
    assert said in built.stderr


def test_a_wheel_whose_hash_is_not_in_the_lock_is_not_installed(image: Image, tmp_path: Path) -> None:
    make_context(tmp_path)
    lock = tmp_path / "infra/docker/torch-cpu.txt"
    lock.write_text(lock.read_text().split()[0] + " --hash=sha256:" + "0" * 64 + "\n")
    # The other locks would be found in order, and take a minute.
    for name in ("requirements", "sbom"):
        (tmp_path / f"infra/docker/{name}.txt").write_text("")
    built = image.buildah.build(
        tmp_path,
        "localhost/refused",
        *("--file", tmp_path / "infra/docker/Dockerfile", "--build-arg", f"BASE_IMAGE={image.base}"),
        *("--build-context", f"wheels={image.context.parent / 'wheels'}"),
    )

    assert built.returncode
    assert "DO NOT MATCH THE HASHES" in built.stderr + built.stdout


def test_the_image_is_of_a_user_without_rights_and_small_enough(image: Image, container: str) -> None:
    config = image.buildah.inspect(image.name)
    (listed,) = [each for each in _list_images(image) if any("overnight-worker" in name for name in each["names"])]
    with image.buildah.mounted(container) as files:
        size = int(subprocess.check_output(["du", "-sxB1", files], text=True).split()[0])
        raising = subprocess.check_output(["find", files, "-xdev", "-type", "f", "-perm", "/6000"], text=True)
        writable = subprocess.check_output(
            ["find", files / "opt", "-xdev", "(", "-uid", str(USER), "-o", "-perm", "-o+w", ")", "!", "-type", "l"],
            text=True,
        )

    print(f"The image holds {size / 1e9:.2f} GB; as listed, {listed['size']}.")
    assert f"{USER}:{USER}" == config["config"]["User"]
    assert size < SIZE_MAX
    assert ("", "") == (raising, writable)


def _list_images(image: Image) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(image.buildah.call("images", "--json"))
    return [each for each in found if each.get("names")]


def test_the_image_has_no_tools_to_build_or_to_fetch_with(image: Image, container: str) -> None:
    found = run(image, container, "sh", "-c", f"for each in {' '.join(BUILD_TOOLS)}; do command -v $each; done; id -u")
    imported = run(image, container, "python", "-c", "import pip")

    assert str(USER) == found.stdout.strip()
    assert "No module named 'pip'" in imported.stderr


# It installs nothing, and so needs no network.
MAKE_ENVIRONMENT = """
import subprocess
from serving.model.environment import make_environment
from serving.model.requirements import ModelEnvironment
from serving.model.uv import PackageSource
made = make_environment(ModelEnvironment(), packages=PackageSource(offline=True), extra_requirements=())
print(made, subprocess.check_output([made, "-c", "print(1 + 1)"], text=True).strip())
"""


def test_the_user_of_the_image_makes_environments_of_models_in_a_cache_of_its_own(image: Image, container: str) -> None:
    made = run(image, container, "python", "-c", MAKE_ENVIRONMENT)
    owner = run(image, container, "stat", "--format", "%u:%g", "/home/overnight/.cache")

    assert re.fullmatch(r"/home/overnight/\.cache/overnight/environments/\w+/bin/python 2", made.stdout.strip()), made
    assert f"{USER}:{USER}" == owner.stdout.strip()


def test_the_inventory_in_the_image_is_valid_and_lists_what_was_locked(
    image: Image, container: str, tmp_path: Path
) -> None:
    with image.buildah.mounted(container) as files:
        text = (files / "opt/overnight/sbom.cdx.json").read_text()
    (tmp_path / "sbom.json").write_text(text)
    checked = validate_inventory(tmp_path, image.context.parent / "wheels")
    python = run(image, container, "python", "-c", "import platform; print(platform.python_version())").stdout.strip()
    pins = [*read_lock(image.context / "infra/docker/torch-cpu.txt"), *read_lock(DOCKER / "requirements.txt")]
    listed = {each["name"].lower().replace("_", "-").replace(".", "-"): each for each in json.loads(text)["components"]}

    assert "valid" == checked
    assert {pin.name: pin.version for pin in pins if pin.holds_for(python)} == {
        name: each["version"] for name, each in listed.items() if name not in {"overnight", "pip"}
    }
    assert all("purl" in each for name, each in listed.items() if name != "overnight")


VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
print(error or "valid")
"""


def validate_inventory(folder: Path, wheels: Path) -> str:
    """Hold sbom.json of a folder against CycloneDX's schema, by the library in the lock; say "valid" or why."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--find-links", wheels]
    subprocess.run([*install, "--require-hashes", "-r", DOCKER / "sbom.txt"], check=True)
    done = subprocess.run([python, "-c", VALIDATE, folder / "sbom.json"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What is outside of the image: a Prefect server, and the variables that lead to everything."""

    server: PrefectServer
    environment: Mapping[str, str]


@pytest.fixture(scope="module")
def outside(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Generator[Outside]:
    """A Prefect server with a password, the flights on S3, and the demo's model in a registry."""
    from infra.local.mlflow_server import mlflow_server

    folder = tmp_path_factory.mktemp("outside")
    (folder / "mlflow").mkdir()
    with (
        prefect_server(folder / "prefect", auth=AUTH) as server,
        mlflow_server(folder / "mlflow") as registry,
        s3_server(folder / "s3") as s3,
        pytest.MonkeyPatch.context() as patch,
    ):
        s3.create_bucket("lake")
        environment = {**server.environment, **registry.environment, **s3.environment}
        for name, value in environment.items():
            patch.setenv(name, value)
        _prepare(folder, registry.url)
        # Of this test's own home, which the image does not have.
        passed = {name: value for name, value in environment.items() if name != "PREFECT_HOME"}
        yield Outside(server=server, environment={**passed, "PREFECT_WORKER_QUERY_SECONDS": "2"})


def _prepare(folder: Path, registry: str) -> None:
    import boto3
    import mlflow

    from deployments.demo.delay_model import train_and_register

    write_flights(folder / "flights")
    mlflow.set_tracking_uri(registry)
    train_and_register(folder / "flights", epochs=2)
    client = boto3.client("s3")
    for path in (folder / "flights").glob("*.parquet"):
        client.upload_file(str(path), "lake", f"flights/{path.name}")


@contextmanager
def start_worker(image: Image, outside: Outside, name: str, port: int, log: Path) -> Generator[subprocess.Popen[bytes]]:
    """Run the image's own command in a new container, with a name and with another port for its health."""
    container = image.buildah.start_container(image.name)
    command = [*image.buildah.inspect(image.name)["config"]["Cmd"], "--name", name]
    line = image.buildah.run_command(
        container,
        *(str(port) if part == "8080" else part for part in command),
        variables=list(outside.environment),
    )
    environment = image.buildah.environment(outside.environment)
    with log.open("wb") as stream, subprocess.Popen(line, stdout=stream, stderr=stream, env=environment) as started:
        try:
            eventually(log.read_text, lambda words: "started!" in words, process=started, seconds=400)
            yield started
        finally:
            for pid in reversed(list_process_tree(started.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def first_process(started: subprocess.Popen[bytes]) -> int:
    """Return the first process of the container, which is the one that Docker's and Kubernetes' stop signal."""
    return next(pid for pid in list_process_tree(started.pid) if "/bin/overnight" in _command_of(pid))


def _command_of(pid: int) -> str:
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return ""
    return " ".join(parts[:2]) if "python" in parts[0] else ""


def count_parts(destination: str) -> int:
    import boto3

    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="lake", Prefix=f"{destination}/run=")
    return sum("/part-" in each["Key"] for page in pages for each in page.get("Contents", []))


def read_parts(destination: str) -> dict[str, str]:
    import boto3

    client = boto3.client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="lake", Prefix=f"{destination}/run=")
    return {each["Key"].removeprefix(destination): each["ETag"] for page in pages for each in page.get("Contents", [])}


def test_a_worker_in_the_image_scores_drains_on_sigterm_and_another_finishes_the_same_table(
    image: Image, outside: Outside, container: str, tmp_path: Path
) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    from deployments.apply import deploy
    from flows import open_predictions
    from tasks.batch.options import BatchOptions

    options = BatchOptions(
        key_columns=(KEY,),
        rows_per_chunk=ROWS_PER_CHUNK,
        batch_size=512,
        slots=2,
        max_reject_fraction=1,
        experiment=None,
    )
    call = ("models:/flight-delay@champion", "s3://lake/flights/")
    with (
        hold_ports(2) as (port, other_port),
        temporary_settings({PREFECT_API_URL: outside.server.api_url, PREFECT_API_AUTH_STRING: AUTH}),
    ):
        health = [
            part.replace("8080", str(port))
            for part in image.buildah.inspect(image.name)["config"]["Healthcheck"]["Test"][1:]
        ]
        asyncio.run(deploy())
        flow_run = start("adhoc", *call, "s3://lake/drained/", options)
        with start_worker(image, outside, "first", port, tmp_path / "first.log") as first:
            pid = first_process(first)
            users = {line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:")}
            healthy = run(image, container, *health)
            eventually(lambda: count_parts("drained"), lambda count: count >= 5, seconds=400)
            os.kill(pid, signal.SIGTERM)
            ended = first.wait(90)
            left = count_parts("drained")
            state = state_of(read(flow_run.id))
            unhealthy = run(image, container, *health)
        with start_worker(image, outside, "second", other_port, tmp_path / "second.log"):
            wait_for(flow_run.id, "Completed", "Failed", "Crashed")
            # Parts have the versions in their names that they were made with: Python's here may be another.
            undisturbed = start("adhoc", *call, "s3://lake/undisturbed/", options)
            wait_for(undisturbed.id, "Completed", "Failed", "Crashed")
        machine = machine_of(flow_run.id)
    log = (tmp_path / "first.log").read_text()

    assert {f"Uid:\t{USER}\t{USER}\t{USER}\t{USER}"} == users
    assert (0, 1) == (healthy.returncode, unhealthy.returncode), healthy.stderr
    assert (0, "AwaitingRetry") == (ended, state), log
    assert "Ending: 1 flow runs" in log
    assert 5 <= left < count_parts("undisturbed")
    assert "second" == machine
    assert count_parts("undisturbed") > ROWS // ROWS_PER_CHUNK
    assert read_parts("undisturbed") == read_parts("drained")
    assert list(range(ROWS)) == open_predictions("s3://lake/drained/").select(KEY).collect()[KEY].sort().to_list()
    assert AUTH not in log + (tmp_path / "second.log").read_text()


def test_a_worker_in_the_image_takes_no_work_over_plain_http(image: Image, container: str) -> None:
    line = image.buildah.run_command(container, "overnight", "worker", variables=["PREFECT_API_URL"])
    given = image.buildah.environment({"PREFECT_API_URL": "http://prefect.invalid:4200/api"})
    done = subprocess.run(line, env=given, capture_output=True, text=True, check=False, timeout=60)

    assert 1 == done.returncode
    assert "must reach it by https or on this machine; got http to prefect.invalid" in done.stderr
