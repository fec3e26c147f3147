from __future__ import annotations

import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler

import pytest

from serving.model.batching import BatchingConfig
from serving.targets import Address
from tasks.endpoint.batching import BatchingChoice
from tasks.endpoint.budget import BudgetCheck, check_budget, explain_broken_budget
from tasks.endpoint.spec import Budget
from tests.servers import serve_http
from tests.serving.toys import matrix
from tests.tasks.endpoint.values import sample

PATIENT, HASTY = Budget(latency_ms=20_000, rate=40), Budget(latency_ms=5, rate=40)


class Slow(BaseHTTPRequestHandler):
    """Answers after 20 ms."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.02)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


@pytest.fixture(scope="module")
def server() -> Generator[Address]:
    with serve_http(Slow) as port:
        yield Address(url=f"http://127.0.0.1:{port}", model="churn", version=None)


def check(address: Address, budget: Budget) -> BudgetCheck:
    return check_budget(address, matrix(4), sample(), budget, seconds=0.5)


def test_a_budget_is_held_against_the_rate_and_a_burst_of_twice_the_rate(server: Address) -> None:
    kept = check(server, PATIENT)

    assert kept.is_kept
    assert kept.steady is not None
    assert kept.burst is not None
    assert (20, 40) == (kept.steady.requests, kept.burst.requests)
    assert not check(server, HASTY).is_kept


def test_a_server_that_does_not_answer_keeps_no_budget() -> None:
    nowhere = Address(url="http://127.0.0.1:9", model="churn", version=None)
    found = check(nowhere, PATIENT)

    assert not found.is_kept
    assert "no answer, and no answer in a burst" == found.describe()


def test_requests_without_an_answer_break_the_budget(server: Address) -> None:
    found = check(server, PATIENT)
    assert found.burst is not None

    assert found.model_copy(update={"burst": found.burst.model_copy(update={"errors": 0})}).is_kept
    assert not found.model_copy(update={"burst": found.burst.model_copy(update={"errors": 3})}).is_kept


def test_a_broken_budget_is_explained_by_what_was_tried_and_what_to_do(server: Address) -> None:
    found = check(server, HASTY)
    choices = [BatchingChoice(batching=BatchingConfig(batch_size_max=size)) for size in (1, 16)]
    said = str(explain_broken_budget([(choice, found) for choice in choices]))

    for words in (
        "within 5 ms, at 40 rows a second and in a burst of 80",
        "each request alone: p99",
        "up to 16 rows a pass, waiting for no others: p99",
        "raise replicas_max",
        "measure_seconds=0",
    ):
        assert words in said
    assert "leave batching out" not in said


def test_an_explicit_batching_that_breaks_its_budget_may_be_left_out(server: Address) -> None:
    explicit = BatchingChoice(batching=BatchingConfig(batch_size_max=16))
    said = str(explain_broken_budget([(explicit, check(server, HASTY))], is_explicit=True))

    assert "Give another batching, or leave batching out, and it is chosen for the budget" in said
