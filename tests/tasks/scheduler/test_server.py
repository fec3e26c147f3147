from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.scheduler.server import UTILISATIONS, Server, measure_waits, serve


def one_after_another(server: Server, at: NDArray[np.float64]) -> list[float]:
    """The same server as anybody would write it down."""
    free, done, next_one = [0.0] * server.slots, [], 0
    while next_one < len(at):
        slot = min(range(server.slots), key=free.__getitem__)
        last = next_one + server.requests_max - 1
        full = at[last] if last < len(at) else np.inf
        begin = max(free[slot], min(at[next_one] + server.wait, full))
        taken = [each for each in at[next_one : last + 1] if each <= begin]
        free[slot] = begin + server.time(len(taken))
        done += [free[slot] - each for each in taken]
        next_one += len(taken)
    return done


servers = st.builds(
    Server,
    slots=st.just(2),
    pass_time=st.floats(0.001, 1),
    request_time=st.floats(0.001, 1),
    requests_max=st.integers(1, 5),
    wait=st.floats(0, 2),
)


@settings(deadline=None)
@given(
    st.lists(servers, min_size=1, max_size=4),
    st.lists(st.integers(0, 64).map(lambda gap: gap / 64), min_size=12, max_size=12),
)
def test_many_servers_side_by_side_serve_as_each_would_alone(found: list[Server], gaps: list[float]) -> None:
    at_LN = np.array([np.cumsum(np.roll(gaps, turn)) for turn in range(len(found))])

    waits_LN = serve(found, at_LN)

    for server, at_N, waits_N in zip(found, at_LN, waits_LN, strict=True):
        assert one_after_another(server, at_N) == pytest.approx(waits_N.tolist(), abs=1e-9)


def test_a_single_queue_waits_what_the_formula_says() -> None:
    server = Server(slots=1, pass_time=0.0, request_time=1.0, requests_max=1)

    waits = measure_waits([server])[0].waits_UN

    # Pollaczek-Khinchine: of a queue with equal service times.
    for share in (0.3, 0.6, 0.8):
        expected = 1 + share / (2 * (1 - share))
        assert expected == pytest.approx(waits[UTILISATIONS.index(share)].mean(), rel=0.1)


@pytest.mark.parametrize("requests_max", [1, 8])
def test_what_is_used_more_waits_longer_and_what_is_twice_as_slow_twice_as_long(requests_max: int) -> None:
    fast = Server(slots=2, pass_time=0.004, request_time=0.001, requests_max=requests_max)
    slow = Server(slots=2, pass_time=0.008, request_time=0.002, requests_max=requests_max)

    found = [measure_waits([server])[0] for server in (fast, slow)]

    assert (np.diff(found[0].waits_UN, axis=0) >= 0).all()
    assert found[1].waits_UN == pytest.approx(2 * found[0].waits_UN)
    assert (np.diff(found[0].late(0.02)) >= 0).all()


def test_passes_that_differ_make_the_slowest_wait_longer_and_take_no_less_on_average() -> None:
    even = Server(slots=1, pass_time=0.004, request_time=0.001, requests_max=4)
    at_N = np.arange(4000) * 1.0
    (waits_N,) = serve([replace(even, jitter=0.3)], at_N[None])

    assert 0.005 == pytest.approx(waits_N.mean(), rel=0.02)
    assert 0.3 == pytest.approx(np.log(waits_N).std(), rel=0.05)
    assert measure_waits([replace(even, jitter=0.3)])[0].waits_UN[0, -1] > measure_waits([even])[0].waits_UN[0, -1]


def test_a_server_takes_what_full_passes_come_to() -> None:
    server = Server(slots=2, pass_time=0.01, request_time=0.01, requests_max=4)

    assert 2 * 4 / 0.05 == pytest.approx(server.rate)
