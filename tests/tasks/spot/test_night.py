"""A night keeps count of where its run is, what it costs, and how fast it goes."""

from __future__ import annotations

import pytest

from serving.errors import NightFailed
from tasks.spot.night import Night
from tasks.spot.purchase import Buying, Stay
from tasks.spot.situation import Place
from tests.tasks.spot.market import Market


@pytest.fixture
def market() -> Market:
    return Market()


@pytest.fixture
def night(market: Market) -> Night:
    buying = Buying(spot_price=1, on_demand_price=3, changeover_seconds=50)
    return Night(rows=1000, buying=buying, capacity=market, dispatcher=market, rows_done=lambda: market.rows)


def test_nothing_is_known_before_the_first_rows_and_then_it_is_measured(night: Night, market: Market) -> None:
    night.look(0)
    night.go(night.machines[0], Place.SPOT, 0, "cheap")
    night.look(10)

    assert (night.rate, night.work_seconds, night.changeover_seconds) == (None, None, 50)
    assert night.situation(night.machines[0], 1000) is None

    for now, market.rows in ((20, 100), (30, 200), (40, 300)):
        night.look(now)

    assert (night.rate, night.work_seconds, night.changeover_seconds) == (10, 70, 20)
    situation = night.situation(night.machines[0], 900)
    assert situation is not None
    assert (situation.work_seconds, situation.left_seconds, situation.booting_seconds) == (70, 900, 0)
    assert (situation.place, situation.spot_up, situation.spell_seconds) == (Place.SPOT, True, 40)


def test_a_spot_machine_that_is_gone_is_left_and_counted_as_lost(night: Night, market: Market) -> None:
    night.look(0)
    night.go(night.machines[0], Place.SPOT, 0, "cheap")
    night.look(5)
    market.living_names = frozenset()
    night.look(12)

    assert night.machines[0].place == Place.IDLE
    assert [Stay(kind="spot", start=0, stop=12, lost=True)] == night.stays
    assert [True] == [lost for _, lost in market.drained]
    assert (night.spot_up(night.machines[0]), night.machines[0].spell_seconds) == (False, 0)


def test_a_move_drains_the_run_before_it_is_sent_elsewhere(night: Night, market: Market) -> None:
    night.look(0)
    night.go(night.machines[0], Place.SPOT, 0, "cheap")
    night.look(30)
    night.go(night.machines[0], Place.ON_DEMAND, 30, "late")
    night.go(night.machines[0], Place.ON_DEMAND, 30, "late")

    assert market.sent == ["spot", "on-demand"]
    assert market.drained == [("late", False)]
    assert [Stay(kind="spot", start=0, stop=30, lost=False)] == night.stays
    assert ["spot", "on-demand"] == [move.to for move in night.moves]


def test_a_run_that_is_lost_while_its_machine_lives_is_left_too(night: Night, market: Market) -> None:
    night.look(0)
    night.go(night.machines[0], Place.ON_DEMAND, 0, "late")
    market.stage = "lost"
    night.look(10)

    assert night.machines[0].place == Place.IDLE
    assert night.stays[0].lost


def test_a_run_that_fails_ends_the_night_with_its_words(night: Night, market: Market) -> None:
    night.look(0)
    night.go(night.machines[0], Place.SPOT, 0, "cheap")
    market.stage = "failed"

    with pytest.raises(NightFailed, match=r"must end well, but failed: its last word\."):
        night.look(10)


def test_a_run_that_is_done_finishes_the_night(night: Night, market: Market) -> None:
    night.look(0)
    night.go(night.machines[0], Place.SPOT, 0, "cheap")
    market.stage, market.rows = "done", 1000
    night.look(100)

    assert night.finished
    assert [Stay(kind="spot", start=0, stop=100, lost=False)] == night.stays


@pytest.mark.parametrize("place", [Place.SPOT, Place.ON_DEMAND])
def test_a_run_whose_rows_are_all_done_is_left_where_it_is_until_it_has_published(
    night: Night, market: Market, place: Place
) -> None:
    night.look(0)
    night.go(night.machines[0], place, 0, "begin")
    for now, market.rows in ((20, 100), (30, 200), (110, 1000)):
        night.look(now)

    assert place == night.decide(night.machines[0], 1000)[0]


def test_a_run_that_is_lost_before_it_has_published_is_sent_again(night: Night, market: Market) -> None:
    night.look(0)
    night.go(night.machines[0], Place.SPOT, 0, "cheap")
    for now, market.rows in ((20, 100), (30, 200), (110, 1000)):
        night.look(now)
    market.stage = "lost"
    night.look(111)

    assert night.machines[0].place == Place.IDLE
    assert night.decide(night.machines[0], 1000)[0] == Place.SPOT


@pytest.mark.parametrize(("living", "place"), [(frozenset("a"), Place.SPOT), (frozenset(), Place.ON_DEMAND)])
def test_before_its_speed_is_known_a_run_goes_where_a_machine_is_and_stays_there(
    night: Night, market: Market, living: frozenset[str], place: Place
) -> None:
    market.living_names = living
    night.look(0)
    first, why = night.decide(night.machines[0], 1000)
    night.go(night.machines[0], first, 0, why)
    night.look(1)

    assert (place, "Nothing is known of its speed yet.") == (first, why)
    assert place == night.decide(night.machines[0], 999)[0]


class TestSeveralMachines:
    @pytest.fixture
    def night(self, market: Market) -> Night:
        market.living_names = frozenset("abc")
        buying = Buying(spot_price=1, on_demand_price=3, changeover_seconds=50, rows_per_second=10)
        return Night(
            rows=3000, buying=buying, capacity=market, dispatcher=market, rows_done=lambda: market.rows, workers=3
        )

    def send_all(self, night: Night, place: Place, now: float = 0) -> None:
        for machine in night.machines:
            night.go(machine, place, now, "begin")

    def test_each_is_decided_on_with_its_share_of_the_work(self, night: Night) -> None:
        night.look(0)

        assert [100.0] * 3 == [
            situation.work_seconds
            for machine in night.machines
            if (situation := night.situation(machine, 1000)) is not None
        ]

    def test_a_spot_machine_is_taken_by_one_alone(self, night: Night, market: Market) -> None:
        market.living_names = frozenset("a")
        night.look(0)
        night.go(night.machines[0], Place.SPOT, 0, "cheap")

        assert [True, False, False] == [night.spot_up(machine) for machine in night.machines]

    def test_the_one_whose_machine_is_gone_is_left_and_no_other(self, night: Night, market: Market) -> None:
        night.look(0)
        self.send_all(night, Place.SPOT)
        market.names = {0: "a", 1: "b", 2: "c"}
        night.look(10)
        market.living_names = frozenset("acd")
        night.look(20)

        assert [Place.SPOT, Place.IDLE, Place.SPOT] == [machine.place for machine in night.machines]
        assert [Stay(kind="spot", start=0, stop=20, lost=True, machine=2)] == night.stays
        # Another one is up, and has been seen for no time yet.
        assert night.spot_up(night.machines[1])
        assert [20.0, 0.0, 20.0] == [machine.spell_seconds for machine in night.machines]

    def test_one_that_waits_for_a_machine_is_taken_back_where_too_few_are_left(
        self, night: Night, market: Market
    ) -> None:
        night.look(0)
        self.send_all(night, Place.SPOT)
        market.names, market.stages = {0: "a"}, {1: "waiting", 2: "waiting"}
        market.living_names = frozenset("ab")
        night.look(10)

        assert [Place.SPOT, Place.SPOT, Place.IDLE] == [machine.place for machine in night.machines]

    def test_the_rate_is_that_of_one_machine_and_the_changeover_of_the_first(
        self, night: Night, market: Market
    ) -> None:
        night.look(0)
        self.send_all(night, Place.SPOT)
        for now, market.rows in ((10, 0), (20, 100), (30, 280), (40, 400), (50, 580), (60, 760)):
            night.look(now)

        assert [20] == night.changeovers
        assert (6.0, 2240 / 6 / 3) == (night.rate, night.work_seconds)

    def test_one_that_joins_others_is_at_work_once_rows_are_done_while_it_runs(
        self, night: Night, market: Market
    ) -> None:
        night.look(0)
        night.go(night.machines[0], Place.SPOT, 0, "begin")
        for now, market.rows in ((10, 100), (20, 200)):
            night.look(now)
        night.go(night.machines[1], Place.ON_DEMAND, 20, "late")
        market.stages = {1: "waiting"}
        market.rows = 300
        night.look(30)
        waiting = night.machines[1].working
        market.stages = {}
        for now, market.rows in ((40, 400), (50, 500)):
            night.look(now)

        assert (False, True) == (waiting, night.machines[1].working)
        assert [10] == night.changeovers

    def test_when_one_has_published_the_others_are_taken_back(self, night: Night, market: Market) -> None:
        night.look(0)
        self.send_all(night, Place.SPOT)
        market.rows, market.stages = 3000, {1: "done"}
        night.look(100)

        assert night.finished
        assert [("The run is complete.", False)] * 2 == market.drained
        assert [2, 1, 3] == [stay.machine for stay in night.stays]
        assert not any(stay.lost for stay in night.stays)


def test_the_last_rows_of_a_machine_that_was_left_are_not_those_of_the_next(night: Night, market: Market) -> None:
    night.look(0)
    night.go(night.machines[0], Place.SPOT, 0, "cheap")
    for now, market.rows in ((10, 100), (20, 200)):
        night.look(now)
    night.go(night.machines[0], Place.ON_DEMAND, 20, "late")
    market.stages = {1: "waiting"}
    market.rows = 250
    night.look(30)
    market.stages = {}
    night.look(40)
    market.rows = 300
    night.look(50)

    assert [10, 30] == night.changeovers
