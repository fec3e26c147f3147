"""A model in an environment of its own behind the real servers of BentoML, Seldon (MLServer) and Ray Serve."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from infra.local.controller import local_controller
from infra.worker import list_process_tree
from serving.model.batching import BatchingConfig
from serving.model.encoding import Encoded, Flags
from serving.model.processes import ProcessModel
from serving.model.release import Release
from serving.model.uv import PackageSource
from serving.protocol.oip import decode_response, encode_request
from serving.targets import Address, Host
from tasks.endpoint.deploy import make_host, make_release
from tasks.endpoint.resolve import LoadedModel, load_endpoint_model
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import AnyTarget, BentoML, RayServe, Seldon
from tests.eventually import eventually
from tests.model_wheels import OLD_VERSION, PACKAGE, write_model_wheels
from tests.ray_cluster import ray_cluster
from tests.servers import python_or_skip
from tests.support import register_script

# The first run makes the environment of each server, which takes minutes.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.machines]

DEADLY, SLOW = 666.0, 777.0
LINE = (
    f"import coolname, os; a = model_input['a'].to_numpy(); (a == {SLOW}).any() and time.sleep(0.5); "
    f"(a == {DEADLY}).any() and os.kill(os.getpid(), 11); return a * coolname.SCALE"
)
_SECONDS_MAX = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """An endpoint that is up: `find_pid` returns the first process of its server."""

    host: Host
    loaded: LoadedModel
    release: Release
    address: Address
    find_pid: Callable[[], int]

    @property
    def interpreter(self) -> str:
        """That of the model's environment, which is the only one there."""
        own = self.release.environment
        assert own is not None
        (marker,) = own.folder.glob("*/environment.json")
        return str(marker.parent / "bin/python")

    def list_model_processes(self) -> list[int]:
        """The processes of the server that run on the interpreter of the model's environment."""
        return [pid for pid in list_process_tree(self.find_pid()) if read_program(pid) == self.interpreter]

    def ask(self, *values: float) -> httpx.Response:
        version = "" if self.address.version is None else f"/versions/{self.address.version}"
        url = f"{self.address.url}/v2/models/{self.address.model}{version}/infer"
        body = encode_request(self.release.contract, {"a": np.array(values, dtype=np.float32)})
        return httpx.post(url, content=body.content, headers=body.headers, timeout=_SECONDS_MAX, trust_env=False)

    def score(self, *values: float) -> list[float]:
        answer = self.ask(*values)
        assert 200 == answer.status_code, answer.text
        outputs = decode_response(answer.content, self.release.contract, header_length=None)
        return list(outputs["prediction"].reshape(-1).tolist())


def read_program(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    return ""


@pytest.fixture(scope="module")
def packages(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[PackageSource]:
    """Wheels, and folders of uv and of environments that are the tests' own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_CACHE_DIR", str(folder / "uv"))
        patch.setenv("OVERNIGHT_ENVIRONMENTS", str(folder / "environments"))
        yield PackageSource(wheels=write_model_wheels(folder / "wheels"), offline=True)


@pytest.fixture(scope="module")
def model(registry: Path) -> str:
    """A model that was logged with another version of a package than the one here, which has no SCALE."""
    return register_script("own-versions", LINE, requirements=(f"{PACKAGE}=={OLD_VERSION}", "mlflow-skinny"))


@pytest.fixture(scope="module", params=["bentoml", "mlserver", "ray-serve"])
def serving(
    request: pytest.FixtureRequest, model: str, packages: PackageSource, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Serving]:
    """The model behind a server, by what its spec asks for; nothing in it says in which environment."""
    server, folder = request.param, tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        if server == "ray-serve":
            pytest.importorskip("ray", reason="Ray is an extra: pip install 'overnight[ray]'")
            cluster = stack.enter_context(ray_cluster(folder / "ray"))
            stack.enter_context(pytest.MonkeyPatch.context()).setenv("RAY_AUTH_TOKEN", cluster.token)
            target: AnyTarget = RayServe(
                dashboard=cluster.dashboard_url, url=cluster.serve_url, folder=str(folder / "releases")
            )
        else:
            kinds: dict[str, type[BentoML | Seldon]] = {"bentoml": BentoML, "mlserver": Seldon}
            controller = stack.enter_context(local_controller(folder))
            target = kinds[server](folder=str(controller.folder), python=str(python_or_skip(server)))
        spec = EndpointSpec(name="own", model=model, target=target, packages=packages)
        loaded = load_endpoint_model(spec)
        release = make_release(spec, loaded, BatchingConfig(batch_size_max=16))
        host = make_host(target)
        address = host.deploy(release, loaded.resolved.folder)

        def find_pid() -> int:
            if server == "ray-serve":
                return cluster.process.pid
            # A server that is started again answers for a moment before its controller says so.
            pid = eventually(lambda: getattr(host.status(release), "pid", None))  # type: ignore[attr-defined]
            return int(pid)

        yield Serving(host=host, loaded=loaded, release=release, address=address, find_pid=find_pid)


def test_an_answer_is_that_of_the_model_in_its_own_environment_which_the_server_does_not_have(serving: Serving) -> None:
    values = np.array([1.0, 2.5, -3.0], dtype=np.float32)
    model = serving.loaded.model
    assert isinstance(model, ProcessModel)
    with model.slot():
        encoded = Encoded(inputs={"a": values}, flags=Flags.all_good(3), rows=3)
        expected = model.predict(model.prepare(encoded).inputs)["prediction"]

    assert [5.0, 12.5, -15.0] == expected.reshape(-1).tolist() == serving.score(*values.tolist())
    assert serving.list_model_processes()


def test_a_row_that_ends_the_models_process_is_told_and_the_next_ones_are_answered(serving: Serving) -> None:
    answer = serving.ask(DEADLY)

    assert 500 == answer.status_code
    assert "the model's process died (SIGSEGV)" in answer.text
    assert [10.0] == serving.score(2.0)


def test_requests_whose_model_process_is_killed_are_answered_or_told_and_the_next_ones_are_answered(
    serving: Serving,
) -> None:
    before = set(serving.list_model_processes())
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(serving.ask, SLOW, float(at)) for at in range(24)]
        for _ in range(2):
            time.sleep(1.0)
            for pid in serving.list_model_processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        answers = [each.result() for each in asked]
    refused = [each for each in answers if each.status_code != 200]

    assert all("process" in each.text for each in refused), [each.text for each in refused]
    for at, answer in enumerate(answers):
        if answer.status_code == 200:
            outputs = decode_response(answer.content, serving.release.contract, header_length=None)
            assert [5 * SLOW, 5.0 * at] == outputs["prediction"].reshape(-1).tolist()
    assert [15.0] == serving.score(3.0)
    assert not before & set(serving.list_model_processes())


def test_an_environment_that_is_in_use_is_not_removed(serving: Serving) -> None:
    from datetime import UTC, datetime, timedelta

    from serving.model.environment_use import list_environments, remove_environments

    own = serving.release.environment
    assert own is not None
    tomorrow = datetime.now(UTC) + timedelta(days=1)

    assert [] == remove_environments(own.folder, unused_since=tomorrow, delete=True)
    (kept,) = list_environments(own.folder)
    assert (True, (f"{serving.loaded.resolved.pin.uri} {serving.loaded.digest[:12]}",)) == (kept.is_in_use, kept.models)


def test_no_model_process_outlives_its_server(serving: Serving) -> None:
    serving.score(1.0)
    before = serving.list_model_processes()
    servers = {pid for pid in list_process_tree(serving.find_pid()) if pid not in before and has_child(pid, before)}
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(psutil.pid_exists, before)))
    eventually(lambda: bool(serving.list_model_processes()))
    eventually(lambda: is_answered(serving))
    again = serving.list_model_processes()
    serving.host.remove(serving.release)
    eventually(lambda: not any(map(psutil.pid_exists, again)))

    assert before
    assert not set(before) & set(again)


def has_child(pid: int, children: list[int]) -> bool:
    with suppress(psutil.Error):
        return any(child.pid in children for child in psutil.Process(pid).children())
    return False


def is_answered(serving: Serving) -> bool:
    try:
        return serving.ask(1.0).is_success
    except httpx.TransportError:
        return False
