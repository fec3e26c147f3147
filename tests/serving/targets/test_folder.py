from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from infra.local.controller import local_controller
from serving.contract import Contract
from serving.errors import EndpointFailed
from serving.registry import ModelPin
from serving.release import Dial, Release, Scaling
from serving.targets import Rendered
from serving.targets.folder import FolderHost, Serve, interpreter, rendered
from tests.serving.toys import matrix

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

    def render(self, release: Release, model: Path) -> Rendered:
        serve = Serve(argv=(sys.executable, "server.py", "{port}"), ready_path="/", ready_s_max=20)
        return rendered(release, model, serve, {"server.py": self.server.encode()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    with local_controller(tmp_path_factory.mktemp("folder")) as controller:
        yield controller.folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model/__pycache__").mkdir(parents=True)
    (tmp_path / "model/weights").write_text("the weights")
    return tmp_path / "model"


def release(version: str, endpoint: str = "scores", dial: Dial | None = None) -> Release:
    pin = ModelPin(name="scores", version=version, model_id=None, source="nowhere", digest=version)
    return Release(endpoint=endpoint, pin=pin, contract=CONTRACT, dial=dial or Dial(), scaling=Scaling())


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
    assert (place / "serving/release.py").is_file()
    assert [] == list(place.rglob("__pycache__"))

    host.remove(release("1"))
    host.remove(release("1"))

    assert ["scores/2"] == [str(path.relative_to(folder)) for path in folder.glob("[!.]*/*")]
    assert '"version": "2"' in get(second.url)
    with pytest.raises(httpx.ConnectError):
        get(first.url)
    host.remove(release("2"))
    assert [] == list(folder.glob("[!.]*"))


def test_a_release_that_is_up_stays_and_one_with_another_dial_takes_its_place(folder: Path, model: Path) -> None:
    host = FolderHost(folder=folder, target=Files())
    host.deploy(release("1", "again"), model)
    before = host.status(release("1", "again"))
    host.deploy(release("1", "again"), model)

    assert before == host.status(release("1", "again"))

    tuned = release("1", "again", dial=Dial(batch_size_max=64))
    address = host.deploy(tuned, model)

    assert '"batch_size_max": 64' in get(address.url)
    assert before != host.status(tuned)
    host.remove(tuned)


def test_one_that_does_not_come_up_says_why_and_is_taken_away(folder: Path, model: Path) -> None:
    host = FolderHost(folder=folder, target=Files("raise SystemExit('the model does not load')"))
    with pytest.raises(
        EndpointFailed, match=r"(?s)Version 1 of broken must come up, and is taken away.*the model does not load"
    ):
        host.deploy(release("1", "broken"), model)

    assert not (folder / "broken").exists()
    assert host.status(release("1", "broken")) is None


def test_a_folder_that_nobody_watches_is_told_with_the_command_that_does(tmp_path: Path, model: Path) -> None:
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


def test_what_no_controller_wrote_is_told(folder: Path, model: Path) -> None:
    (folder / "odd/1").mkdir(parents=True)
    (folder / "odd/1/status.json").write_text('{"state": "fine"}')
    host = FolderHost(folder=folder, target=Files())

    with pytest.raises(EndpointFailed, match="must be a controller's word"):
        host.status(release("1", "odd"))


def test_an_interpreter_is_found_from_another_folder_or_told_how_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)

    assert str(tmp_path / "bin/python") == interpreter(Path("bin/python"), "kserve.txt")
    assert "python3" == interpreter(Path("python3"), "kserve.txt")
    with pytest.raises(EndpointFailed, match=r"got no no/python\. Make its environment: .*venv kserve\.txt"):
        interpreter(Path("no/python"), "kserve.txt")
