"""Between a notice and the kill."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.spot.drain import Drain, Notice, is_chunk_finishable, reserve_exit_seconds, sigterm_notice


@pytest.mark.parametrize(
    ("notice", "cause", "words"),
    [
        (sigterm_notice(30), "SIGTERM", "SIGTERM: this process is to end within 30 s"),
        (
            Notice(source="AWS", action="terminate", seconds_left=117.3),
            "AWS (terminate)",
            "AWS is going to terminate this machine in 117 s",
        ),
        (
            Notice(source="AWS", action="rebalance recommendation", seconds_left=120, certain=False),
            "AWS (rebalance recommendation)",
            "AWS sees this machine at risk (rebalance recommendation)",
        ),
    ],
)
def test_a_notice_has_a_short_name_and_a_description(notice: Notice, cause: str, words: str) -> None:
    assert (cause, words) == (notice.cause, notice.description)


seconds = st.floats(0, 1e4)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def aws(left: float, action: str = "terminate") -> Notice:
    return Notice(source="AWS", action=action, seconds_left=left)


@pytest.mark.parametrize(
    ("left", "chunk", "taken", "finished"),
    [
        (30.0, 10.0, 0.0, True),
        (30.0, 25.0, 0.0, True),
        (30.0, 25.1, 0.0, False),
        (30.0, 40.0, 15.0, True),
        (30.0, 40.0, 14.0, False),
        (30.0, None, 99.0, True),
        (6.0, 10.0, 12.0, True),
        (4.0, 10.0, 12.0, False),
        (4.0, None, 0.0, False),
    ],
)
def test_a_chunk_is_finished_where_what_is_left_of_it_fits_before_the_time_to_leave(
    left: float, chunk: float | None, taken: float, *, finished: bool
) -> None:
    assert finished == is_chunk_finishable(seconds_left=left, exit_seconds=5.0, chunk_seconds=chunk, taken=taken)


@given(left=seconds, leave=seconds, chunk=seconds, taken=seconds, wait=seconds)
def test_a_chunk_that_was_dropped_would_be_dropped_at_any_later_time_too(
    left: float, leave: float, chunk: float, taken: float, wait: float
) -> None:
    now = is_chunk_finishable(seconds_left=left, exit_seconds=leave, chunk_seconds=chunk, taken=taken)
    # A thousandth for what the sums lose to rounding.
    later = is_chunk_finishable(
        seconds_left=left - wait - 1e-3, exit_seconds=leave, chunk_seconds=chunk, taken=min(taken + wait, chunk)
    )

    assert now or not later


@pytest.mark.parametrize(("notice", "leave"), [(0, 0), (5, 1), (30, 5), (120, 5)])
def test_the_time_to_leave_is_a_fifth_of_the_notice_and_five_seconds_at_most(notice: float, leave: float) -> None:
    assert leave == reserve_exit_seconds(notice)


def test_without_a_notice_everything_goes_on() -> None:
    drain = Drain()

    assert (None, float("inf"), False) == (drain.notice, drain.seconds_left, drain.is_over)
    assert drain.may_finish(1e9, 0)


def test_a_notice_runs_out_and_what_is_late_is_left_in_the_last_half_of_the_time_to_leave() -> None:
    clock = Clock()
    drain = Drain(clock)
    drain.add_notice(sigterm_notice(30))
    found = []
    for clock.now in (1000.0, 1020.0, 1024.0, 1027.4, 1027.6, 1031.0):
        found.append((drain.seconds_left, drain.may_finish(10, 5), drain.is_over))

    assert [(30, True, False), (10, True, False), (6, False, False)] == found[:3]
    assert [False, True, True] == [over for _, _, over in found[3:]]
    assert 0.0 == found[-1][0]


def test_a_notice_read_again_never_moves_its_end_away() -> None:
    clock = Clock()
    drain = Drain(clock)
    drain.add_notice(aws(30))
    clock.now += 10
    drain.add_notice(aws(30))
    assert 20 == drain.seconds_left
    drain.add_notice(aws(5))
    assert 5 == drain.seconds_left
    drain.add_notice(aws(60, action="stop"))

    assert 60 == drain.seconds_left


def test_of_several_notices_the_nearest_counts_and_each_source_withdraws_only_its_own() -> None:
    drain = Drain(Clock())
    drain.add_notice(aws(120))
    drain.add_notice(sigterm_notice(30))
    assert sigterm_notice(30) == drain.notice
    drain.withdraw_notice("AWS")
    assert sigterm_notice(30) == drain.notice
    drain.withdraw_notice("SIGTERM")

    assert drain.notice is None


def test_hibernation_which_begins_at_once_leaves_no_chunk_in_hand() -> None:
    clock = Clock()
    drain = Drain(clock)
    drain.add_notice(aws(0, action="hibernate"))
    clock.now += 0.1

    assert not drain.may_finish(0.1, 0)
    assert drain.is_over
