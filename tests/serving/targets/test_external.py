"""A model that others serve is looked at before it gets traffic."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from pathlib import Path

import orjson
import pytest

from serving.errors import EndpointFailed
from serving.protocol.oip import make_model_metadata
from serving.targets.external import ExternalHost
from tasks.endpoint.deploy import make_release_to_remove
from tests.servers import hold_port, serve_http
from tests.serving.toys import matrix

RELEASE = make_release_to_remove("churn", "3", matrix(4))
FITS = make_model_metadata("sold", matrix(4), versions=("7",), platform="theirs").model_dump_json().encode()


def describe(**tensors: list[dict[str, object]]) -> bytes:
    return orjson.dumps(orjson.loads(FITS) | tensors)


class _Server(BaseHTTPRequestHandler):
    """Answers GET by the path."""

    answers: dict[str, bytes]

    def do_GET(self) -> None:
        answer = self.answers.get(self.path)
        self.send_response(404 if answer is None else 200)
        self.end_headers()
        self.wfile.write(answer or b"")


def test_it_answers_at_its_own_name_and_version_and_is_asked_for_no_more_than_its_metadata() -> None:
    _Server.answers = {"/v2/models/sold/versions/7/ready": b"", "/v2/models/sold/versions/7": FITS}
    with serve_http(_Server) as port:
        host = ExternalHost(url=f"http://127.0.0.1:{port}", model="sold", version="7")
        address = host.deploy(RELEASE, Path("none"))
        host.remove(RELEASE)

    assert (f"http://127.0.0.1:{port}", "sold", "7") == (address.url, address.model, address.version)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({}, "must be ready, got status 404"),
        ({"/v2/models/churn": FITS}, "must be ready, got status 404"),
        ({"/v2/models/churn/ready": b"", "/v2/models/churn": b"<html>"}, "must answer with a model's metadata"),
        (
            {"/v2/models/churn/ready": b"", "/v2/models/churn": describe(inputs=[])},
            r"must have the tensors of models:/churn/3, got\n  - input 'x': none there, FP32 here",
        ),
        (
            {
                "/v2/models/churn/ready": b"",
                "/v2/models/churn": describe(outputs=[{"name": "more", "datatype": "INT64", "shape": [-1]}]),
            },
            "output 'more': INT64 there, none here",
        ),
    ],
)
def test_a_model_that_is_not_up_or_has_other_tensors_is_refused(answers: dict[str, bytes], said: str) -> None:
    _Server.answers = answers
    with serve_http(_Server) as port, pytest.raises(EndpointFailed, match=said):
        ExternalHost(url=f"http://127.0.0.1:{port}").deploy(RELEASE, Path("none"))


def test_a_server_that_does_not_answer_is_refused() -> None:
    with hold_port() as held, pytest.raises(EndpointFailed, match="must answer at http:"):
        ExternalHost(url=f"http://127.0.0.1:{held.getsockname()[1]}").deploy(RELEASE, Path("none"))
