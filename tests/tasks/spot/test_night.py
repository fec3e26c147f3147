"""A night keeps count of where its run is, what it costs, and how fast it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest

from serving.errors import NightFailed
from tasks.spot.dispatch import Seen, Stage
from tasks.spot.night import Night
from tasks.spot.policy import decide
from tasks.spot.purchase import Buying, Kind, Stay
from tasks.spot.situation import Place


@dataclass
class Market:
    """Machines and flow runs as a test has them; satisfies Capacity and Dispatcher."""

    spot: bool = True
    stage: Stage = "running"
    rows: int = 0
    sent: list[Kind] = field(default_factory=list)
    drained: list[tuple[str, bool]] = field(default_factory=list)

    def up(self) -> bool:
        return self.spot

    def send(self, kind: Kind) -> UUID:
        self.sent.append(kind)
        return uuid4()

    def look_at(self, flow_run_id: UUID) -> Seen:
        return Seen(stage=self.stage, message="its last word.")

    def drain(self, flow_run_id: UUID, why: str, *, lost: bool) -> None:
        self.drained.append((why, lost))


@pytest.fixture
def market() -> Market:
    return Market()


@pytest.fixture
def night(market: Market) -> Night:
    buying = Buying(spot_price=1, on_demand_price=3, changeover_seconds=50)
    return Night(rows=1000, buying=buying, capacity=market, dispatcher=market, rows_done=lambda: market.rows)


def test_nothing_is_known_before_the_first_rows_and_then_it_is_measured(night: Night, market: Market) -> None:
    night.look(0)
    night.go(Place.SPOT, 0, "cheap")
    night.look(10)

    assert (night.rate, night.work_seconds, night.changeover_seconds) == (None, None, 50)
    assert night.situation(1000) is None

    for now, market.rows in ((20, 100), (30, 200), (40, 300)):
        night.look(now)

    assert (night.rate, night.work_seconds, night.changeover_seconds) == (10, 70, 20)
    situation = night.situation(900)
    assert situation is not None
    assert (situation.work_seconds, situation.left_seconds, situation.booting_seconds) == (70, 900, 0)
    assert (situation.place, situation.spot_up, situation.spell_seconds) == (Place.SPOT, True, 40)


def test_a_spot_machine_that_is_gone_is_left_and_counted_as_lost(night: Night, market: Market) -> None:
    night.look(0)
    night.go(Place.SPOT, 0, "cheap")
    night.look(5)
    market.spot = False
    night.look(12)

    assert night.place == Place.IDLE
    assert [Stay(kind="spot", start=0, stop=12, lost=True)] == night.stays
    assert [True] == [lost for _, lost in market.drained]
    assert (night.spot_up, night.spell_seconds) == (False, 0)


def test_a_move_drains_the_run_before_it_is_sent_elsewhere(night: Night, market: Market) -> None:
    night.look(0)
    night.go(Place.SPOT, 0, "cheap")
    night.look(30)
    night.go(Place.ON_DEMAND, 30, "late")
    night.go(Place.ON_DEMAND, 30, "late")

    assert market.sent == ["spot", "on-demand"]
    assert market.drained == [("late", False)]
    assert [Stay(kind="spot", start=0, stop=30, lost=False)] == night.stays
    assert ["spot", "on-demand"] == [move.to for move in night.moves]


def test_a_run_that_is_lost_while_its_machine_lives_is_left_too(night: Night, market: Market) -> None:
    night.look(0)
    night.go(Place.ON_DEMAND, 0, "late")
    market.stage = "lost"
    night.look(10)

    assert night.place == Place.IDLE
    assert night.stays[0].lost


def test_a_run_that_fails_ends_the_night_with_its_words(night: Night, market: Market) -> None:
    night.look(0)
    night.go(Place.SPOT, 0, "cheap")
    market.stage = "failed"

    with pytest.raises(NightFailed, match=r"must end well, but failed: its last word\."):
        night.look(10)


def test_a_run_that_is_done_finishes_the_night(night: Night, market: Market) -> None:
    night.look(0)
    night.go(Place.SPOT, 0, "cheap")
    market.stage, market.rows = "done", 1000
    night.look(100)

    assert night.finished
    assert [Stay(kind="spot", start=0, stop=100, lost=False)] == night.stays


@pytest.mark.parametrize("place", [Place.SPOT, Place.ON_DEMAND])
def test_a_run_whose_rows_are_all_done_is_left_where_it_is_until_it_has_published(
    night: Night, market: Market, place: Place
) -> None:
    night.look(0)
    night.go(place, 0, "begin")
    for now, market.rows in ((20, 100), (30, 200), (110, 1000)):
        night.look(now)
    situation = night.situation(1000)

    assert situation is not None
    assert place == decide(situation, night.terms).place


def test_a_run_that_is_lost_before_it_has_published_is_sent_again(night: Night, market: Market) -> None:
    night.look(0)
    night.go(Place.SPOT, 0, "cheap")
    for now, market.rows in ((20, 100), (30, 200), (110, 1000)):
        night.look(now)
    market.stage = "lost"
    night.look(111)
    situation = night.situation(1000)

    assert night.place == Place.IDLE
    assert situation is not None
    assert decide(situation, night.terms).place == Place.SPOT
