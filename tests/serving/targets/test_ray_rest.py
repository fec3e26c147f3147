"""The dashboard of a Ray cluster as HTTP; tests/serving/targets/test_ray_host.py asks a real cluster."""

from __future__ import annotations

import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from serving.model.registry import ModelPin
from serving.model.release import Release
from serving.targets.ray_host import RayServeHost
from serving.targets.ray_serve import RayServe
from tests.serving.toys import matrix


class Idle(BaseHTTPRequestHandler):
    """Runs no application."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"applications": {}}')

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Generator[str]:
    with HTTPServer(("127.0.0.1", 0), Idle) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_proxy_of_the_environment_never_sees_the_token(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    target = RayServe(folder=str(tmp_path))
    host = RayServeHost(dashboard_url=dashboard, serve_url=dashboard, folder=tmp_path, target=target, token="0" * 64)
    pin = ModelPin(name="toy", version="1", model_id=None, source="", digest="")

    host.remove(Release(endpoint="toy", pin=pin, contract=matrix(2)))
