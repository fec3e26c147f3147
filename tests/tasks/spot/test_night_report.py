"""What a person sees of a night: its moves, its figures and its plot."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from tasks.spot.night import Night
from tasks.spot.night_report import plot_night, report_night
from tasks.spot.purchase import MachineKind, MachineStay, Move, NightlyReport, PurchaseOptions
from tasks.spot.work_pools import FlowRunStatus

PNG = b"\x89PNG\r\n\x1a\n"


class Nobody:
    """A market that nobody asks."""

    def list_live_workers(self) -> frozenset[str]:
        raise AssertionError

    def submit(self, kind: MachineKind) -> UUID:
        return uuid4()

    def read_status(self, flow_run_id: UUID) -> FlowRunStatus:
        raise AssertionError

    def end(self, flow_run_id: UUID, why: str, *, lost: bool) -> None:
        raise AssertionError


@pytest.fixture
def report() -> NightlyReport:
    """A night of two machines at once, at 10 rows a second each: one was taken, and one was moved."""
    buying = PurchaseOptions(spot_price=36, on_demand_price=108, changeover_seconds=20, rows_per_second=10)
    night = Night(
        rows=1000,
        buying=buying,
        spot_pool=Nobody(),
        dispatcher=Nobody(),
        count_rows_done=lambda: 1000,
        workers=2,
        stays=[
            MachineStay(kind="spot", start=0, stop=40, lost=True, machine=1),
            MachineStay(kind="spot", start=0, stop=70, lost=False, machine=2),
            MachineStay(kind="on-demand", start=50, stop=70, lost=False, machine=1),
        ],
        moves=[
            Move(machine=1, seconds=0, to="spot", rows_done=0, why="cheap"),
            Move(machine=2, seconds=0, to="spot", rows_done=0, why="cheap"),
            Move(machine=1, seconds=50, to="on-demand", rows_done=600, why="late"),
        ],
        changeovers=[15, 12],
    )
    return report_night(night, "r", datetime.now(UTC) + timedelta(hours=1), 70, rows_in_flight_max=7)


def test_a_night_costs_each_second_of_each_machine_and_is_held_against_on_demand_alone(report: NightlyReport) -> None:
    # 110 s of spot at 0.01 a second, 20 s of on-demand at 0.03; on-demand alone, 100 s of work and two changeovers.
    assert 110 * 0.01 + 20 * 0.03 == pytest.approx(report.cost)
    assert (100 + 2 * 15) * 0.03 == pytest.approx(report.cost_on_demand)
    assert 1.7 / 3.9 == pytest.approx(report.cost_fraction)


def test_the_report_has_slack_moves_changeovers_and_the_rows_scored_again(report: NightlyReport) -> None:
    assert 0 < report.slack_seconds <= 3600
    assert ((15.0, 12.0), 15.0, 7) == (report.changeovers, report.changeover_seconds, report.rows_recomputed_max)
    assert [("1", "spot"), ("2", "spot"), ("1", "on-demand"), ("", "done")] == [
        (row["machine"], row["to"]) for row in report.table()
    ]
    assert "before the deadline, for 43.6% of what on-demand alone costs, in 3 moves." in report.summary
    assert "3 moves, 2 machines at a time" in report.markdown()


def test_the_report_states_a_missed_deadline(report: NightlyReport) -> None:
    late = report.model_copy(update={"slack_seconds": -12.0})

    assert "12 s after the deadline" in late.summary


@pytest.mark.parametrize("stays", [[], [MachineStay(kind="spot", start=0, stop=5, lost=True, machine=3)]])
def test_a_night_without_observations_can_be_plotted(stays: list[MachineStay]) -> None:
    assert plot_night([], stays, 10, 60).startswith(PNG)
    assert plot_night([(0, 0), (5, 10)], stays, 10, 60).startswith(PNG)
