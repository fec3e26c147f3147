"""A night keeps count of where its run is, what it costs, and how fast it goes."""

from __future__ import annotations

import pytest

from serving.errors import NightFailed
from tasks.spot.night import Night
from tasks.spot.policy import Placement
from tasks.spot.purchase import MachineStay, PurchaseOptions
from tests.tasks.spot.market import Market


@pytest.fixture
def market() -> Market:
    return Market()


@pytest.fixture
def night(market: Market) -> Night:
    buying = PurchaseOptions(spot_price=1, on_demand_price=3, changeover_seconds=50)
    return Night(rows=1000, buying=buying, spot_pool=market, dispatcher=market, count_rows_done=lambda: market.rows)


def test_nothing_is_known_before_the_first_rows_and_then_it_is_measured(night: Night, market: Market) -> None:
    night.observe(0)
    night.move(night.machines[0], Placement.SPOT, 0, "cheap")
    night.observe(10)

    assert (night.rate, night.work_seconds, night.changeover_seconds) == (None, None, 50)
    assert night.describe_situation(night.machines[0], 1000) is None

    for now, market.rows in ((20, 100), (30, 200), (40, 300)):
        night.observe(now)

    assert (night.rate, night.work_seconds, night.changeover_seconds) == (10, 70, 20)
    situation = night.describe_situation(night.machines[0], 900)
    assert situation is not None
    assert (situation.work_seconds, situation.left_seconds, situation.booting_seconds) == (70, 900, 0)
    assert (situation.placement, situation.spot_up, situation.spell_seconds) == (Placement.SPOT, True, 40)


def test_a_spot_machine_that_is_gone_is_counted_as_lost(night: Night, market: Market) -> None:
    night.observe(0)
    night.move(night.machines[0], Placement.SPOT, 0, "cheap")
    market.names = {0: "a"}
    night.observe(5)
    market.living_names = frozenset()
    night.observe(12)

    assert night.machines[0].placement == Placement.IDLE
    assert [MachineStay(kind="spot", start=0, stop=12, lost=True)] == night.stays
    assert [(1, 12, "worker a is silent")] == night.losses
    assert [True] == [lost for _, lost in market.drained]
    assert (night.is_spot_up(night.machines[0]), night.machines[0].spell_seconds) == (False, 0)


def test_a_move_drains_the_run_before_it_is_sent_elsewhere(night: Night, market: Market) -> None:
    night.observe(0)
    night.move(night.machines[0], Placement.SPOT, 0, "cheap")
    night.observe(30)
    night.move(night.machines[0], Placement.ON_DEMAND, 30, "late")
    night.move(night.machines[0], Placement.ON_DEMAND, 30, "late")

    assert market.sent == ["spot", "on-demand"]
    assert market.drained == [("late", False)]
    assert [MachineStay(kind="spot", start=0, stop=30, lost=False)] == night.stays
    assert ["spot", "on-demand"] == [move.to for move in night.moves]


def test_a_run_that_is_lost_while_its_machine_is_alive_is_given_up_too(night: Night, market: Market) -> None:
    night.observe(0)
    night.move(night.machines[0], Placement.ON_DEMAND, 0, "late")
    market.stage = "lost"
    night.observe(10)

    assert night.machines[0].placement == Placement.IDLE
    assert night.stays[0].lost


def test_a_run_that_fails_ends_the_night_with_its_message(night: Night, market: Market) -> None:
    night.observe(0)
    night.move(night.machines[0], Placement.SPOT, 0, "cheap")
    market.stage = "failed"

    with pytest.raises(NightFailed, match=r"must end well, but failed: its last message\."):
        night.observe(10)


def test_a_run_that_is_done_finishes_the_night(night: Night, market: Market) -> None:
    night.observe(0)
    night.move(night.machines[0], Placement.SPOT, 0, "cheap")
    market.stage, market.rows = "done", 1000
    night.observe(100)

    assert night.finished
    assert [MachineStay(kind="spot", start=0, stop=100, lost=False)] == night.stays


@pytest.mark.parametrize("placement", [Placement.SPOT, Placement.ON_DEMAND])
def test_a_run_with_all_rows_done_stays_on_its_machine_until_it_has_published(
    night: Night, market: Market, placement: Placement
) -> None:
    night.observe(0)
    night.move(night.machines[0], placement, 0, "begin")
    for now, market.rows in ((20, 100), (30, 200), (110, 1000)):
        night.observe(now)

    assert placement == night.decide(night.machines[0], 1000)[0]


def test_a_run_that_is_lost_before_it_has_published_is_sent_again(night: Night, market: Market) -> None:
    night.observe(0)
    night.move(night.machines[0], Placement.SPOT, 0, "cheap")
    for now, market.rows in ((20, 100), (30, 200), (110, 1000)):
        night.observe(now)
    market.stage = "lost"
    night.observe(111)

    assert night.machines[0].placement == Placement.IDLE
    assert night.decide(night.machines[0], 1000)[0] == Placement.SPOT


@pytest.mark.parametrize(
    ("living", "placement"), [(frozenset("a"), Placement.SPOT), (frozenset(), Placement.ON_DEMAND)]
)
def test_before_its_speed_is_known_a_run_goes_where_a_machine_is_and_stays_there(
    night: Night, market: Market, living: frozenset[str], placement: Placement
) -> None:
    market.living_names = living
    night.observe(0)
    first, why = night.decide(night.machines[0], 1000)
    night.move(night.machines[0], first, 0, why)
    night.observe(1)

    assert (placement, "Nothing is known of its speed yet.") == (first, why)
    assert placement == night.decide(night.machines[0], 999)[0]


class TestSeveralMachines:
    @pytest.fixture
    def night(self, market: Market) -> Night:
        market.living_names = frozenset("abc")
        buying = PurchaseOptions(spot_price=1, on_demand_price=3, changeover_seconds=50, rows_per_second=10)
        return Night(
            rows=3000,
            buying=buying,
            spot_pool=market,
            dispatcher=market,
            count_rows_done=lambda: market.rows,
            workers=3,
        )

    def send_all(self, night: Night, placement: Placement, now: float = 0) -> None:
        for machine in night.machines:
            night.move(machine, placement, now, "begin")

    def test_each_is_decided_on_with_its_share_of_the_work(self, night: Night) -> None:
        night.observe(0)

        assert [100.0] * 3 == [
            situation.work_seconds
            for machine in night.machines
            if (situation := night.describe_situation(machine, 1000)) is not None
        ]

    def test_a_spot_machine_is_taken_by_one_alone(self, night: Night, market: Market) -> None:
        market.living_names = frozenset("a")
        night.observe(0)
        night.move(night.machines[0], Placement.SPOT, 0, "cheap")

        assert [True, False, False] == [night.is_spot_up(machine) for machine in night.machines]

    def test_only_the_flow_run_of_a_lost_machine_is_given_up(self, night: Night, market: Market) -> None:
        night.observe(0)
        self.send_all(night, Placement.SPOT)
        market.names = {0: "a", 1: "b", 2: "c"}
        night.observe(10)
        market.living_names = frozenset("acd")
        night.observe(20)

        assert [Placement.SPOT, Placement.IDLE, Placement.SPOT] == [machine.placement for machine in night.machines]
        assert [MachineStay(kind="spot", start=0, stop=20, lost=True, machine=2)] == night.stays
        # Another one is up, and has been seen for no time yet.
        assert night.is_spot_up(night.machines[1])
        assert [20.0, 0.0, 20.0] == [machine.spell_seconds for machine in night.machines]

    def test_a_flow_run_that_waits_for_a_machine_ends_where_too_few_are_left(
        self, night: Night, market: Market
    ) -> None:
        night.observe(0)
        self.send_all(night, Placement.SPOT)
        market.names, market.stages = {0: "a"}, {1: "waiting", 2: "waiting"}
        market.living_names = frozenset("ab")
        night.observe(10)

        assert [Placement.SPOT, Placement.SPOT, Placement.IDLE] == [machine.placement for machine in night.machines]

    def test_the_rate_is_that_of_one_machine_and_the_changeover_of_the_first(
        self, night: Night, market: Market
    ) -> None:
        night.observe(0)
        self.send_all(night, Placement.SPOT)
        for now, market.rows in ((10, 0), (20, 100), (30, 280), (40, 400), (50, 580), (60, 760)):
            night.observe(now)

        assert [20] == night.changeovers
        assert (6.0, 2240 / 6 / 3) == (night.rate, night.work_seconds)

    def test_one_that_joins_others_is_at_work_once_rows_are_done_while_it_runs(
        self, night: Night, market: Market
    ) -> None:
        night.observe(0)
        night.move(night.machines[0], Placement.SPOT, 0, "begin")
        for now, market.rows in ((10, 100), (20, 200)):
            night.observe(now)
        night.move(night.machines[1], Placement.ON_DEMAND, 20, "late")
        market.stages = {1: "waiting"}
        market.rows = 300
        night.observe(30)
        waiting = night.machines[1].working
        market.stages = {}
        for now, market.rows in ((40, 400), (50, 500)):
            night.observe(now)

        assert (False, True) == (waiting, night.machines[1].working)
        assert [10] == night.changeovers

    def test_the_other_flow_runs_end_once_one_has_published(self, night: Night, market: Market) -> None:
        night.observe(0)
        self.send_all(night, Placement.SPOT)
        market.rows, market.stages = 3000, {1: "done"}
        night.observe(100)

        assert night.finished
        assert [("The run is complete.", False)] * 2 == market.drained
        assert [2, 1, 3] == [stay.machine for stay in night.stays]
        assert not any(stay.lost for stay in night.stays)


def test_the_last_rows_of_a_machine_that_was_left_are_not_those_of_the_next(night: Night, market: Market) -> None:
    night.observe(0)
    night.move(night.machines[0], Placement.SPOT, 0, "cheap")
    for now, market.rows in ((10, 100), (20, 200)):
        night.observe(now)
    night.move(night.machines[0], Placement.ON_DEMAND, 20, "late")
    market.stages = {1: "waiting"}
    market.rows = 250
    night.observe(30)
    market.stages = {}
    night.observe(40)
    market.rows = 300
    night.observe(50)

    assert [10, 30] == night.changeovers
