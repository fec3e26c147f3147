import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra.local.controller import Controller, local_controller, run_controller
from infra.local.process import ServerFailed, send_request
from serving.targets.folder import remove_folder
from tests.eventually import eventually

pytestmark = pytest.mark.servers

SERVER = """
import http.server, sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/ready", "/name") else 404)
        self.end_headers()
        self.wfile.write(sys.argv[2].encode())


print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
Put = Callable[..., Path]


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    with local_controller(tmp_path_factory.mktemp("releases")) as controller:
        yield controller


def put(controller: Controller, name: str, code: str = SERVER, **changes: Any) -> Path:
    """Put a release there in one step, as a host does."""
    serve = {"argv": [sys.executable, "-c", code, "{port}", name], "ready_path": "/ready"} | changes
    staged, place = controller.folder / f".{name.replace('/', '-')}", controller.folder / name
    staged.mkdir()
    (staged / "serve.json").write_text(json.dumps(serve))
    place.parent.mkdir(exist_ok=True)
    staged.rename(place)
    return place


def wait_for(place: Path, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        return json.loads((place / "status.json").read_text()) if (place / "status.json").exists() else None

    told = eventually(look, lambda told: told is not None and wanted(told))
    assert told is not None
    return told


def ready(place: Path) -> dict[str, Any]:
    return wait_for(place, lambda told: told["url"])


def name_at(url: str) -> str:
    return send_request("GET", int(url.rsplit(":", 1)[1]), "/name").text


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_release_has_a_server_and_one_that_is_removed_leaves_the_others(controller: Controller) -> None:
    first, second = (put(controller, name) for name in ("scores/1", "scores/2"))
    one, two = ready(first), ready(second)

    assert ["scores/1", "scores/2"] == [name_at(one["url"]), name_at(two["url"])]

    (first / "serve.json").unlink()
    told = wait_for(first, lambda told: told["state"] == "ended")

    assert (None, False) == (told["url"], alive(one["pid"]))
    assert "scores/2" == name_at(two["url"])


def test_a_server_that_is_killed_is_started_again_where_it_was(controller: Controller) -> None:
    place = put(controller, "killed/1")
    before = ready(place)
    os.kill(before["pid"], signal.SIGKILL)
    after = wait_for(place, lambda told: told["pid"] not in (None, before["pid"]))

    assert (before["url"], 2) == (after["url"], after["starts"])
    assert "killed/1" == name_at(after["url"])


def test_a_port_that_is_taken_meanwhile_is_given_up(controller: Controller) -> None:
    # It dies with the port that it had in the hands of a child, which lives on in a session of its own.
    child = "import socket, time; s = socket.socket(fileno=0); time.sleep(20)"
    steal = f"""
import os, socket, subprocess, sys
if not os.path.exists("stolen"):
    open("stolen", "w").close()
    s = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    subprocess.Popen([sys.executable, "-c", {child!r}], stdin=s, start_new_session=True)
    sys.exit(3)
"""
    place = put(controller, "taken/1", steal + SERVER)
    told = ready(place)

    assert "taken/1" == name_at(told["url"])
    assert 2 == told["starts"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a server can't listen at a port that is kept")
def test_no_other_program_is_given_a_port_of_a_release_before_its_server_listens_there(controller: Controller) -> None:
    code = "import sys; print(sys.argv[3]);" + SERVER
    place = put(controller, "later/1", argv=[sys.executable, "-c", code, "{port}", "x", "{port2}"])
    ready(place)
    port = int((place / "server.log").read_text().split()[0])

    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind(("127.0.0.1", port))
    socket.create_server(("127.0.0.1", port)).close()


def test_a_server_that_keeps_dying_is_reported_with_the_end_of_its_log(controller: Controller) -> None:
    place = put(controller, "broken/1", "import sys; print('the model is no model'); sys.exit(3)")
    told = wait_for(place, lambda told: told["starts"] >= 3)

    assert "ended with exit code 3" in told["error"]
    assert "the model is no model" in told["error"]
    assert told["url"] is None


def test_a_server_that_is_not_ready_in_time_is_reported(controller: Controller) -> None:
    place = put(controller, "slow/1", "import time; time.sleep(60)", ready_s_max=0.3)

    assert "still not ready" in wait_for(place, lambda told: told["state"] == "failed")["error"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"argv": []}, "argv: Tuple should have at least 1 item"),
        ({"ready_path": "ready"}, "ready_path: String should match pattern"),
        ({"ready_path": 7}, "ready_path: Input should be a valid string"),
        ({"command": "x"}, "command: Extra inputs are not permitted"),
        ({"environment": {"A": "x" * 70_000}}, "must have at most 65536 bytes"),
        ({"argv": ["no-such-program"]}, "no-such-program must be an executable file"),
    ],
)
def test_a_release_with_an_invalid_serve_file_gets_the_reason(
    controller: Controller, changes: dict[str, Any], words: str
) -> None:
    place = put(controller, f"bad/{time.monotonic_ns()}", **changes)

    assert words in wait_for(place, lambda told: told["state"] == "failed")["error"]


def test_a_release_that_is_corrected_is_started(controller: Controller) -> None:
    place = put(controller, "fixed/1", ready_path="ready")
    wait_for(place, lambda told: told["state"] == "failed")
    serve = json.loads((place / "serve.json").read_text()) | {"ready_path": "/ready"}
    (place / "serve.part").write_text(json.dumps(serve))
    (place / "serve.part").rename(place / "serve.json")

    assert "fixed/1" == name_at(ready(place)["url"])


def test_a_server_gets_its_own_folder_ports_and_environment_and_none_of_the_controllers(controller: Controller) -> None:
    code = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open('told', 'w'));" + SERVER
    argv = [sys.executable, "-c", code, "{port}", "x", "{port2}", "{folder}", "{other}"]
    place = put(controller, "told/1", argv=argv, environment={"AT": "{folder}:{port}"})
    url = ready(place)["url"]
    (port, _, second, folder, other), environment = json.loads((place / "told").read_text())

    assert url == f"http://127.0.0.1:{port}"
    assert port != second
    assert (str(place), "{other}") == (folder, other)
    assert f"{place}:{port}" == environment["AT"]
    assert "PYTHONPATH" not in environment


def test_every_server_ends_with_a_controller_that_is_killed(tmp_path: Path) -> None:
    with local_controller(tmp_path) as controller:
        told = ready(put(controller, "scores/1"))
        os.kill(controller.process.pid, signal.SIGKILL)
        eventually(lambda: not alive(told["pid"]))

    with local_controller(tmp_path) as controller:
        again = wait_for(controller.folder / "scores/1", lambda now: now["url"] and now["pid"] != told["pid"])
        controller.stop()

        assert not alive(again["pid"])
        assert "ended" == json.loads((tmp_path / "scores/1/status.json").read_text())["state"]


def test_one_controller_watches_a_folder(controller: Controller) -> None:
    with pytest.raises(ServerFailed, match=r"another one does\. Stop it first"):
        local_controller(controller.folder)


@pytest.mark.parametrize("seed", range(3))
def test_releases_that_are_removed_while_they_are_read_do_not_end_the_controller(tmp_path: Path, seed: int) -> None:
    order, over = random.Random(seed), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        controlling = threads.submit(run_controller, tmp_path, over)
        for _ in range(20):
            # Servers that could never start: what counts is that they are looked at.
            for at in range(60):
                place = tmp_path / f"endpoint-{at}" / "1"
                place.mkdir(parents=True)
                (place / "serve.json").write_text("{}")
            time.sleep(order.uniform(0.05, 0.15))
            for at in order.sample(range(60), 60):
                remove_folder(tmp_path / f"endpoint-{at}")
            assert not controlling.done(), controlling.exception()
        over.set()
        controlling.result()
