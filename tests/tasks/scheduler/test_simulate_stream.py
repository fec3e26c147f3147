from __future__ import annotations

import numpy as np
import pytest

from tasks.scheduler.simulate_stream import stream, stream_fit
from tests.tasks.scheduler.values import HOUR, THIS, problem, profile


def test_a_stream_scores_events_in_time_on_machines_that_are_always_on() -> None:
    asked = problem(np.full(HOUR, 100), consumer="events", within=5.0)

    (found,) = stream(asked, THIS)

    assert ("streaming", "micro-batches", None) == (found.mode, found.policy, found.flaw)
    assert found.machines * HOUR == found.paid_seconds
    assert found.age_p99 <= 5
    assert 0 < found.wait <= 0.5


def test_a_stream_is_no_faster_than_it_was_measured_from_broker_to_broker() -> None:
    asked = problem(np.full(HOUR, 100), consumer="events", within=60.0)
    slow = problem(np.full(HOUR, 100), consumer="events", within=60.0, profile=profile(stream_rows_per_second=20.0))

    assert 20 == pytest.approx(stream_fit(slow, THIS).waits.server.rate, rel=0.02)
    assert stream(slow, THIS)[0].machines > 3 * stream(asked, THIS)[0].machines


def test_the_dial_of_a_stream_leaves_time_for_two_passes() -> None:
    fit = stream_fit(problem(consumer="events", within=1.0), THIS)

    assert fit.wait + 2 * fit.waits.server.time(fit.waits.server.requests_max) <= 1


def test_who_waits_for_an_answer_gets_none_from_a_stream() -> None:
    (found,) = stream(problem(), THIS)

    assert "a stream gives no answer to one who waits for it" == found.flaw
