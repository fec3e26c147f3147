"""The seconds of the steps of a call."""

from __future__ import annotations

from flows.runtime.steps import Steps


def test_what_is_measured_apart_within_a_step_is_none_of_its_seconds() -> None:
    ticks = iter([0.0, 1.0, 3.0, 7.0, 8.0, 10.0])
    steps = Steps(clock=lambda: next(ticks))

    def plan() -> str:
        with steps.measure_apart("load"):
            return "planned"

    assert "planned" == steps.run("plan", plan)
    steps.run("load", lambda: None)
    assert [("plan", 5.0), ("load", 4.0)] == list(steps.seconds.items())
