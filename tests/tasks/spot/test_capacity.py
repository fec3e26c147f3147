"""A night asks for machines of both kinds, keeps a record of what it got, and gives everything back at its end."""

from __future__ import annotations

import logging
import signal
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import TerminationSignal

from serving.errors import CapacityUnusable, NightFailed
from tasks.spot.capacity import ENTRY_POINTS, Buyer, open_capacity
from tasks.spot.night import Night
from tasks.spot.night_report import report_night
from tasks.spot.policy import Placement
from tasks.spot.purchase import AwsMachines, LocalMachines, MachineKind, PurchaseOptions
from tests.tasks.spot.market import Market

ROOT = Path(__file__).parents[3]
LOGGER = logging.getLogger("night")
BUYING = PurchaseOptions(
    spot_price=1,
    on_demand_price=3,
    rows_per_second=10,
    changeover_seconds=50,
    interval_seconds=0.01,
    machines=AwsMachines(),
)


@dataclass
class Machines:
    """Satisfies Capacity: every machine comes at once, as many as a limit allows."""

    limits: dict[MachineKind, int] = field(default_factory=lambda: {"spot": 9, "on-demand": 9})
    asked: list[tuple[MachineKind, int, frozenset[str]]] = field(default_factory=list)
    refuses: str | None = None
    closed: int = 0
    _standing: dict[MachineKind, int] = field(default_factory=lambda: {"spot": 0, "on-demand": 0})

    def set_workers(self, kind: MachineKind, count: int, busy: frozenset[str] = frozenset()) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.asked.append((kind, count, busy))
        self._standing[kind] = min(count, self.limits[kind])

    def count_workers(self, kind: MachineKind) -> int:
        return self._standing[kind]

    def find_problem(self, kind: MachineKind) -> str | None:
        return f"no {kind} machine is to be had"

    def close(self) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.closed += 1
        self._standing = {"spot": 0, "on-demand": 0}


def make_night(market: Market, *, workers: int = 2, rows: int = 2000, **changes: Any) -> Night:
    buying = BUYING.model_copy(update=changes)
    return Night(
        rows=rows,
        buying=buying,
        spot_pool=market,
        dispatcher=market,
        count_rows_done=lambda: market.rows,
        workers=workers,
        spot_wait_seconds=buying.spot_wait_seconds,
    )


def decide_all(night: Night, now: float, left: float) -> list[Placement]:
    for machine in night.machines:
        night.move(machine, night.decide(machine, left)[0], now, "why")
    return [machine.placement for machine in night.machines]


class TestWanted:
    def test_spot_is_asked_for_while_there_is_slack_although_none_is_up(self) -> None:
        night = make_night(Market(living_names=frozenset()))
        night.observe(0)

        assert [Placement.IDLE] * 2 == decide_all(night, 0, 1000)
        assert {"spot": 2, "on-demand": 0} == night.count_wanted(1000)

    def test_on_demand_is_asked_for_when_the_deadline_says_so_and_spot_no_longer(self) -> None:
        night = make_night(Market(living_names=frozenset()))
        night.observe(0)

        assert [Placement.ON_DEMAND] * 2 == decide_all(night, 0, 190)
        assert {"spot": 0, "on-demand": 2} == night.count_wanted(190)

    def test_a_machine_that_is_on_demand_with_time_left_would_go_back_to_spot(self) -> None:
        night = make_night(Market(living_names=frozenset()), workers=1, rows=1000)
        night.observe(0)
        night.move(night.machines[0], Placement.ON_DEMAND, 0, "no spot")

        assert {"spot": 1, "on-demand": 1} == night.count_wanted(1000)
        assert {"spot": 0, "on-demand": 1} == night.count_wanted(180)

    def test_nothing_is_asked_for_once_the_run_is_complete(self) -> None:
        market = Market()
        night = make_night(market)
        night.observe(0)
        decide_all(night, 0, 1000)
        market.stage, market.rows = "done", 2000
        night.observe(10)

        assert {"spot": 0, "on-demand": 0} == night.count_wanted(990)

    def test_a_night_of_unknown_speed_waits_for_its_first_spot_machines_and_not_for_ever(self) -> None:
        market = Market(living_names=frozenset())
        night = make_night(market, rows_per_second=None)
        night.observe(0)

        assert [Placement.IDLE] * 2 == decide_all(night, 0, 9000)
        assert {"spot": 2, "on-demand": 0} == night.count_wanted(9000)

        night.observe(301)

        assert [Placement.ON_DEMAND] * 2 == decide_all(night, 301, 8699)

    def test_it_does_not_wait_where_the_deadline_is_near(self) -> None:
        night = make_night(Market(living_names=frozenset()), rows_per_second=None)
        night.observe(0)

        assert [Placement.ON_DEMAND] * 2 == decide_all(night, 0, 600)


class TestBuyer:
    def test_what_was_bought_and_when_is_recorded_each_time_that_it_changes(self) -> None:
        market = Market(living_names=frozenset())
        night, machines = make_night(market), Machines(limits={"spot": 1, "on-demand": 9})
        buyer = Buyer(capacity=machines, logger=LOGGER, now=lambda: datetime(2030, 1, 1, tzinfo=UTC))
        for now, left in ((0, 1000), (10, 990), (20, 190)):
            night.observe(now)
            decide_all(night, now, left)
            buyer.buy(night, now, left)
        buyer.close(120)

        assert [
            (0, "spot", 2, 1, "no spot machine is to be had"),
            (20, "spot", 0, 0, None),
            (20, "on-demand", 2, 2, None),
            (120, "on-demand", 0, 0, None),
        ] == [(each.seconds, each.kind, each.wanted, each.standing, each.problem) for each in buyer.purchases]
        assert {"spot": 20.0, "on-demand": 200.0} == buyer.seconds
        assert 1 == machines.closed

    def test_the_report_has_it_with_its_price(self) -> None:
        market = Market()
        night, buyer = make_night(market), Buyer(capacity=Machines(), logger=LOGGER)
        night.observe(0)
        decide_all(night, 0, 1000)
        buyer.buy(night, 0, 1000)
        buyer.close(3600)
        report = report_night(night, "r", datetime.now(UTC) + timedelta(seconds=30), 3600, 7, buyer)

        assert 7200 == report.spot_seconds_bought
        assert 2.0 == report.cost_bought
        assert ["2", "0"] == [row["asked for"] for row in report.purchase_table()]
        assert "- bought, with starting up: 7,200 s of spot machines, 0 s on-demand, for 2" in report.markdown()

    def test_workers_that_have_a_run_are_named_as_busy(self) -> None:
        market = Market(names={0: "a"})
        night, machines = make_night(market), Machines()
        night.observe(0)
        decide_all(night, 0, 1000)
        night.observe(10)
        Buyer(capacity=machines, logger=LOGGER).buy(night, 10, 990)

        assert {frozenset({"a"})} == {busy for _, _, busy in machines.asked}

    def test_a_night_goes_on_where_machines_can_not_be_set_and_asks_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        night, machines = make_night(Market(living_names=frozenset())), Machines(refuses="AWS must answer.")
        buyer = Buyer(capacity=machines, logger=LOGGER)
        night.observe(0)
        buyer.buy(night, 0, 1000)
        machines.refuses = None
        buyer.buy(night, 10, 990)

        assert "spot machines can't be set: AWS must answer. The night goes on without." in caplog.text
        assert [(10, "spot", 2)] == [(each.seconds, each.kind, each.standing) for each in buyer.purchases]

    def test_machines_that_can_not_be_given_back_are_told_with_what_to_do(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        Buyer(capacity=Machines(refuses="AWS must answer."), logger=LOGGER).close(10)

        assert "can't be given back: AWS must answer. Look at what there is, and end it by hand." in caplog.text


class TestEnd:
    """However a night ends, its machines are given back; where it is to be taken up again, they stay for that."""

    def run(self, market: Market, stop: BaseException | None, *, cancelled: bool = False) -> Machines:
        from flows.nightly import run_night

        machines = Machines()

        def sleep(_: float) -> None:
            if stop is not None:
                raise stop
            market.stage = "done"

        run_night(
            make_night(market),
            datetime.now(UTC) + timedelta(seconds=1000),
            LOGGER,
            lambda _: None,
            is_cancelled=lambda: cancelled,
            buyer=self.remember(machines),
            sleep=sleep,
        )
        return machines

    def remember(self, machines: Machines) -> Buyer:
        self.machines = machines
        return Buyer(capacity=machines, logger=LOGGER)

    def test_when_it_is_done(self) -> None:
        machines = self.run(Market(), None)

        assert ("spot", 2, frozenset()) in machines.asked
        assert (1, 0) == (machines.closed, machines.count_workers("spot"))

    @pytest.mark.parametrize(
        ("stop", "cancelled", "closed"),
        [
            (KeyboardInterrupt(), False, 1),
            (NightFailed("the run failed"), False, 1),
            (ZeroDivisionError(), False, 1),
            (TerminationSignal(signal.SIGTERM), True, 1),
            (TerminationSignal(signal.SIGTERM), False, 0),
        ],
        ids=["Ctrl-C", "failed", "unexpected", "cancelled", "its own machine goes"],
    )
    def test_when_it_is_ended(self, stop: BaseException, *, cancelled: bool, closed: int) -> None:
        with pytest.raises(type(stop)):
            self.run(Market(), stop, cancelled=cancelled)

        assert closed == self.machines.closed


POOLS: Mapping[MachineKind, str] = {"spot": "a", "on-demand": "b"}


@pytest.fixture
def entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The entry points that pyproject.toml says, as a package that is installed has them; its folder."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][ENTRY_POINTS]
    folder = tmp_path / "site" / "machines-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: machines\nVersion: 1\n")
    lines = [f"[{ENTRY_POINTS}]", *(f"{name} = {where}" for name, where in named.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


class TestOpened:
    def test_machines_that_are_there_by_themselves_are_nobodys_to_start(self) -> None:
        standing = PurchaseOptions(spot_price=1, on_demand_price=3)

        assert open_capacity(standing, owner="n", pools=POOLS, workers=1) is None
        assert 0 == standing.spot_wait_seconds

    def test_workers_of_this_machine_come_by_their_entry_point(
        self, entry_points: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
        local = BUYING.model_copy(update={"machines": LocalMachines()})
        capacity = open_capacity(local, owner="n", pools=POOLS, workers=1)

        assert capacity is not None
        assert [0, 0] == [capacity.count_workers(kind) for kind in POOLS]
        capacity.close()

    def test_what_is_missing_is_said_before_anything_is_bought(
        self, entry_points: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("PREFECT_API_URL", raising=False)
        local = BUYING.model_copy(update={"machines": LocalMachines()})
        away = BUYING.model_copy(update={"machines": AwsMachines(region="nowhere-1")})

        with pytest.raises(CapacityUnusable, match=r"need a Prefect server of their own process, got none"):
            open_capacity(local, owner="n", pools=POOLS, workers=1)
        with pytest.raises(CapacityUnusable, match=r"The region must be one that AWS has, got 'nowhere-1'"):
            open_capacity(away, owner="n", pools=POOLS, workers=1)
