from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.keep_warm import falls_asleep

seconds = st.floats(0.001, 1e6)


@given(seconds, seconds, st.integers(1, 9))
def test_models_stay_while_a_request_is_there(keep_warm_s: float, idle_s: float, present: int) -> None:
    assert not falls_asleep(keep_warm_s=keep_warm_s, idle_s=idle_s, present=present)


@given(seconds, seconds)
def test_models_go_once_nobody_came_for_the_keep_warm_time(keep_warm_s: float, idle_s: float) -> None:
    assert (idle_s >= keep_warm_s) == falls_asleep(keep_warm_s=keep_warm_s, idle_s=idle_s, present=0)
