from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from infra.local.controller import Serve, local_controller
from serving.errors import EndpointFailed
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract
from serving.model.pin import ModelPin
from serving.model.release import Release
from serving.targets import ReleaseFiles, Target
from serving.targets.bentoml import BentoMLTarget
from serving.targets.folder import (
    FolderHost,
    Status,
    read_imported_modules,
    render_folder,
    resolve_interpreter,
    write_folder,
)
from serving.targets.kserve import KServeTarget
from serving.targets.ray_serve import RayServeTarget
from serving.targets.seldon import SeldonTarget
from tests.eventually import eventually
from tests.releases import release_of
from tests.serving.toys import matrix

pytestmark = pytest.mark.servers

CONTRACT: Contract = matrix(3)
# The release that its server reads out of its folder, over HTTP.
SERVER = """
import http.server, pathlib, sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(pathlib.Path("release.json").read_bytes() + pathlib.Path("model/weights").read_bytes())


http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Files:
    """A target whose server serves the files of a release."""

    def __init__(self, server: str = SERVER) -> None:
        self.server = server

    def render(self, release: Release, model: Path) -> ReleaseFiles:
        return render_folder(
            release,
            model,
            {"server.py": self.server.encode()},
            argv=(sys.executable, "server.py", "{port}"),
            environment={},
            ready_path="/",
            ready_s_max=20,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    with local_controller(tmp_path_factory.mktemp("folder")) as controller:
        yield controller.folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model/__pycache__").mkdir(parents=True)
    (tmp_path / "model/weights").write_text("the weights")
    return tmp_path / "model"


def release(version: str, endpoint: str = "scores", batching: BatchingConfig | None = None) -> Release:
    pin = ModelPin(name="scores", version=version, model_id=None, source="nowhere", digest=version)
    return Release(endpoint=endpoint, pin=pin, contract=CONTRACT, batching=batching or BatchingConfig())


def get(url: str) -> str:
    return httpx.get(url, trust_env=False).text


def test_a_release_is_served_out_of_a_folder_of_its_own_until_it_is_removed(folder: Path, model: Path) -> None:
    host = FolderHost(folder=folder, target=Files())
    first, second = (host.deploy(release(version), model) for version in "12")

    assert [("scores", None)] * 2 == [(each.model, each.version) for each in (first, second)]
    for each, version in ((first, "1"), (second, "2")):
        assert f'"version": "{version}"' in get(each.url)
        assert get(each.url).endswith("the weights")
    place = folder / "scores/1"
    assert [] == list(place.rglob("__pycache__"))

    host.remove(release("1"))
    host.remove(release("1"))

    assert ["scores/2"] == [str(path.relative_to(folder)) for path in folder.glob("[!.]*/*")]
    assert '"version": "2"' in get(second.url)
    with pytest.raises(httpx.ConnectError):
        get(first.url)
    host.remove(release("2"))
    assert [] == list(folder.glob("[!.]*"))


def test_versions_that_are_written_and_removed_at_once_never_take_each_others_folder_away(
    tmp_path: Path,
) -> None:
    host = FolderHost(folder=tmp_path / "releases", target=Files())
    # As little as can be, so that the folders are made and removed most of the time.
    files = ReleaseFiles(files={"serve.json": b"{}"}, trees={})

    def write_and_remove(version: str) -> None:
        for _ in range(300):
            write_folder(files, host.folder / "scores" / version)
            assert (host.folder / "scores" / version / "serve.json").is_file()
            host.remove(release(version))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write_and_remove, "1234"))

    assert [] == list(host.folder.iterdir())


def test_one_version_that_two_write_at_once_is_whole(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "scores/1"

    def write(text: str) -> None:
        for _ in range(50):
            write_folder(ReleaseFiles(files={"text": text.encode()}, trees={"model": model}), folder)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, ["one", "two", "three", "four"]))

    assert {"text", "model"} == {path.name for path in folder.iterdir()}
    assert (folder / "text").read_text() in ("one", "two", "three", "four")
    assert [folder] == list(folder.parent.iterdir())


@pytest.mark.parametrize("seed", range(2))
def test_versions_that_are_deployed_and_removed_in_any_order_each_answer_with_their_own_files(
    tmp_path: Path, model: Path, seed: int
) -> None:
    """Each thread has one version of the endpoint: whatever the others do, it answers until it is removed."""
    with local_controller(tmp_path / "releases") as controller:
        host = FolderHost(folder=controller.folder, target=Files())

        def deploy_and_remove(version: str) -> None:
            order, up = random.Random(f"{seed} {version}"), False
            for _ in range(6):
                if order.random() < 0.6:
                    address, up = host.deploy(release(version), model), True
                    assert f'"version": "{version}"' in get(address.url)
                else:
                    host.remove(release(version))
                    assert not (host.folder / "scores" / version).exists()
                    up = False
                assert up == (host.status(release(version)) is not None)
            host.remove(release(version))

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(deploy_and_remove, "1234"))

        assert [] == list(controller.folder.glob("[!.]*"))
        assert controller.process.running


def test_a_release_that_another_removes_before_it_answers_is_reported_as_removed(folder: Path, model: Path) -> None:
    host = FolderHost(folder=folder, target=Files("import time; time.sleep(60)"))
    place = folder / "fleeting/1"
    with ThreadPoolExecutor(1) as threads:
        deployed = threads.submit(host.deploy, release("1", "fleeting"), model)
        eventually((place / "status.json").exists)
        host.remove(release("1", "fleeting"))

        with pytest.raises(EndpointFailed, match=r"^Version 1 of fleeting must stay.* was removed meanwhile\."):
            deployed.result(timeout=30)
    assert not place.parent.exists()


ENDS_SLOWLY = """
import signal, time


def end(*_):
    time.sleep(1.5)
    pathlib.Path("ended").read_text()
    pathlib.Path("../../.ended-well").touch()
    raise SystemExit


signal.signal(signal.SIGTERM, end)
"""


def test_of_two_that_remove_a_release_both_wait_until_its_server_has_ended(folder: Path, model: Path) -> None:
    server = SERVER.replace("\n\nclass", f"\n{ENDS_SLOWLY}\n\nclass", 1)
    host = FolderHost(folder=folder, target=Files(server))
    host.deploy(release("1", "slow"), model)
    (folder / "slow/1/ended").touch()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(host.remove, release("1", "slow"))
        eventually(lambda: not (folder / "slow/1/serve.json").exists())
        host.remove(release("1", "slow"))

        assert (folder / ".ended-well").exists()
        first.result()


def test_a_release_that_is_up_is_kept_and_one_with_another_batching_replaces_it(folder: Path, model: Path) -> None:
    host = FolderHost(folder=folder, target=Files())
    host.deploy(release("1", "again"), model)
    before = host.status(release("1", "again"))
    host.deploy(release("1", "again"), model)

    assert before == host.status(release("1", "again"))

    tuned = release("1", "again", batching=BatchingConfig(batch_size_max=64))
    address = host.deploy(tuned, model)

    assert '"batch_size_max": 64' in get(address.url)
    assert before != host.status(tuned)
    host.remove(tuned)


def test_a_server_that_does_not_come_up_is_removed_and_the_error_has_its_log(folder: Path, model: Path) -> None:
    host = FolderHost(folder=folder, target=Files("raise SystemExit('the model does not load')"))
    with pytest.raises(
        EndpointFailed, match=r"(?s)Version 1 of broken must come up, and is taken away.*the model does not load"
    ):
        host.deploy(release("1", "broken"), model)

    assert not (folder / "broken").exists()
    assert host.status(release("1", "broken")) is None


def test_the_error_for_a_folder_without_a_controller_has_the_command_that_starts_one(
    tmp_path: Path, model: Path
) -> None:
    host = FolderHost(folder=tmp_path / "releases", target=Files())
    with pytest.raises(EndpointFailed, match=r"got none\. Start one: python -m infra\.local\.controller --folder"):
        host.deploy(release("1"), model)
    host.remove(release("1"))

    with local_controller(tmp_path / "releases"):
        host.deploy(release("1"), model)
    with pytest.raises(EndpointFailed, match="A controller must watch"):
        host.deploy(release("2"), model)
    host.remove(release("1"))

    assert [] == list((tmp_path / "releases").glob("[!.]*"))


def test_manifests_lie_beside_the_releases_and_go_with_the_last_of_them(folder: Path, model: Path) -> None:
    host = FolderHost(folder=folder, target=Files())
    for version in "12":
        host.deploy(release(version, "clustered"), model)
    place = folder / "clustered/kubernetes"
    host.write_rollout("clustered", b"kind: HTTPRoute\n")
    written = (place / "rollout.yaml").stat()
    host.write_rollout("clustered", b"kind: HTTPRoute\n")

    assert written == (place / "rollout.yaml").stat()

    host.write_rollout("clustered", b"kind: GRPCRoute\n")
    host.remove(release("1", "clustered"))
    # For a moment there is no release at all.
    host.deploy(release("2", "clustered", BatchingConfig(batch_size_max=64)), model)

    assert ["rollout.yaml"] == [path.name for path in place.iterdir()]
    assert b"kind: GRPCRoute\n" == (place / "rollout.yaml").read_bytes()
    host.remove(release("2", "clustered"))
    assert not (folder / "clustered").exists()


def test_a_release_is_read_where_it_lies_and_a_damaged_one_is_an_error(tmp_path: Path, model: Path) -> None:
    host = FolderHost(folder=tmp_path / "releases", target=Files())
    write_folder(host.target.render(release("1"), model), host.folder / "scores/1")

    assert release("1") == host.read_release("scores", "1")
    assert host.read_release("scores", "2") is None
    (host.folder / "scores/1/release.json").write_text("{}")
    with pytest.raises(EndpointFailed, match="must be a release that this package wrote"):
        host.read_release("scores", "1")


def test_a_status_that_no_controller_wrote_is_an_error(folder: Path, model: Path) -> None:
    (folder / "odd/1").mkdir(parents=True)
    (folder / "odd/1/status.json").write_text('{"state": "fine"}')
    host = FolderHost(folder=folder, target=Files())

    with pytest.raises(EndpointFailed, match="must be a status that a controller wrote"):
        host.status(release("1", "odd"))


def test_an_interpreter_is_found_from_another_folder_or_the_error_says_how_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)

    assert str(tmp_path / "bin/python") == resolve_interpreter(Path("bin/python"), "kserve.txt")
    assert "python3" == resolve_interpreter(Path("python3"), "kserve.txt")
    with pytest.raises(EndpointFailed, match=r"got no no/python\. Make its environment: .*venv kserve\.txt"):
        resolve_interpreter(Path("no/python"), "kserve.txt")


TARGETS: dict[str, Target] = {
    "bentoml": BentoMLTarget(python=Path("python")),
    "kserve": KServeTarget(python=Path("python")),
    "seldon": SeldonTarget(python=Path("python")),
    "ray-serve": RayServeTarget(folder="/releases"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_release_brings_the_modules_that_its_server_imports_and_not_the_gateway(target: str, model: Path) -> None:
    modules = {name for name in TARGETS[target].render(release("1"), model).files if name.startswith("serving/")}

    assert {"serving/__init__.py", "serving/model/release.py", "serving/protocol/oip.py"} <= modules
    assert set() == {name for name in modules if name.startswith("serving/gateway/")}


PREDICT = """
import importlib, json, sys
from pathlib import Path

# Neither the checkout nor its installation: the release alone.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [name for name in sys.path if not (Path(name) / "flows").is_dir()]
for path in sorted(Path("serving").rglob("*.py")):
    if path.name not in ("bento_service.py", "ray_application.py", "triton_model.py", "triton_tensors.py"):
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))

import numpy as np
from serving.model.release import open_release

with open_release(Path()) as runtime:
    json.dump(runtime.predict({"x": np.ones((2, 3), np.float32)})["score"].tolist(), sys.stdout)
"""


@pytest.mark.machines
@pytest.mark.parametrize("target", TARGETS)
def test_a_release_predicts_with_nothing_of_this_project_but_what_it_brings(
    target: str, linear: str, tmp_path: Path
) -> None:
    put = release_of(linear, "scores")
    write_folder(TARGETS[target].render(put.release, put.model), tmp_path / "release")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PREDICT]
    done = subprocess.run(
        command, cwd=tmp_path / "release", env=environment, capture_output=True, text=True, check=False
    )

    assert 0 == done.returncode, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), put.predict(np.ones((2, 3), np.float32)), rtol=0, atol=1e-6)


def test_imports_inside_of_functions_count_and_several_threads_may_read_them_at_once() -> None:
    programs = [f"def main():\n    from serving.model import encoding  # {number}".encode() for number in range(4)]
    with ThreadPoolExecutor(len(programs)) as threads:
        first, *others = threads.map(lambda program: read_imported_modules((program,)), programs)

    assert {"serving/__init__.py", "serving/model/encoding.py", "serving/model/contract.py"} <= first.keys()
    assert not {name for name in first if name.startswith(("serving/gateway/", "serving/targets/"))}
    assert [first] * len(others) == others


@pytest.mark.parametrize("target", ["bentoml", "kserve", "seldon"])
def test_a_target_and_the_controller_agree_on_serve_json(target: str, model: Path) -> None:
    rendered = TARGETS[target].render(release("1"), model).files["serve.json"]
    serve = Serve.model_validate_json(rendered)

    assert json.loads(rendered) == serve.model_dump(mode="json")
    assert "/v2/models/scores/ready" == serve.ready_path


def test_the_controller_and_the_host_agree_on_status_json(folder: Path, model: Path) -> None:
    host = FolderHost(folder=folder, target=Files())
    address = host.deploy(release("1", "agrees"), model)
    written = json.loads((folder / "agrees/1/status.json").read_bytes())

    assert Status.model_fields.keys() == written.keys()
    assert address.url == written["url"]
    assert host.status(release("1", "agrees")) == Status.model_validate(written)
    host.remove(release("1", "agrees"))
