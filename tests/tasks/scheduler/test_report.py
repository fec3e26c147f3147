from __future__ import annotations

import numpy as np
import pytest

from serving.model.batching import CostModel
from tasks.scheduler.decision import Decision
from tasks.scheduler.report import (
    draw_decision,
    format_duration,
    list_alternatives,
    render_decision,
    summarize_decision,
)
from tests.tasks.scheduler.decisions import BACKFILL, EVENTS, FRAUD, NIGHTLY, alternative, decision, profile

SPOT, ALWAYS_ON = alternative("batch", "spot", 0.5), alternative("online", "always-on", 64.0)
ALTERNATIVES = [
    alternative("batch", "spot", 0.5),
    alternative("streaming", "micro-batches", 70, is_feasible=False),
    alternative("online", "always-on", 64),
]


def test_the_report_has_the_choice_its_reason_all_costs_and_what_would_change_it() -> None:
    words = render_decision(decision(NIGHTLY, SPOT, ALWAYS_ON), ["The trace has a gap."])

    assert "# Workload nightly: batch" in words
    assert "**Why:** it costs 0.5." in words
    assert "An endpoint that is always on would cost $63.50 more, 128 times as much." in words
    assert "| online | always-on | 1 x c7i.large | $64.00 (128 x) |" in words
    assert "- traffic times 3.2: then online, always-on" in words
    assert "$0.09 on-demand, $0.03 spot" in words
    assert "- The trace has a gap." in words


def test_what_requests_take_together_is_reported_where_that_was_measured() -> None:
    served = profile(served=CostModel(fixed_seconds=0.5e-3, row_seconds=0.08e-3), jitter=0.4)

    assert "0.5 ms + n x 0.08 ms in a slot, give or take 40%" in render_decision(
        decision(FRAUD, ALWAYS_ON, profile=served)
    )
    assert "n x" not in render_decision(decision(FRAUD, ALWAYS_ON))


def test_a_choice_without_cost_has_no_factors() -> None:
    words = render_decision(decision(NIGHTLY, alternative("batch", "on-demand", 0.0), ALWAYS_ON))

    assert "would cost $64.00 more." in words
    assert " x) |" not in words


def test_an_always_on_endpoint_wastes_nothing() -> None:
    assert "nothing is wasted" in summarize_decision(decision(FRAUD, ALWAYS_ON))


def test_the_first_of_each_mode_policy_and_machine_is_shown() -> None:
    alternatives = [SPOT, alternative("batch", "spot", 0.6, machines=2), ALWAYS_ON]

    assert ["chosen", "feasible"] == [row[""] for row in list_alternatives(decision(NIGHTLY, *alternatives))]


def test_the_promise_to_every_consumer_is_in_the_report() -> None:
    words = [render_decision(decision(workload, ALWAYS_ON)) for workload in (NIGHTLY, FRAUD, EVENTS, BACKFILL)]

    assert "1,000 rows that are there at 01:30 UTC are scored by 06:00, every day" in words[0]
    assert "0.99 of the requests are answered within 50 ms" in words[1]
    assert "0.99 of the events are scored within 30 s" in words[2]
    assert "9 rows are scored once, by 2026-02-01 05:00 UTC" in words[3]
    assert "$64.00 for one run on 1 x c7i.large" in words[3]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 ms"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (90, "90 s"), (600, "10 min"), (2e5, "2.31 d")],
)
def test_a_duration_has_a_unit_of_its_size(seconds: float, words: str) -> None:
    assert words == format_duration(seconds)


@pytest.mark.parametrize(
    ("decided", "seconds"),
    [
        (decision(NIGHTLY, *ALTERNATIVES), 0),
        (decision(BACKFILL, *ALTERNATIVES), 0),
        (decision(FRAUD, *ALTERNATIVES), 1),
        (decision(FRAUD, *ALTERNATIVES), 90_000),
        (decision(FRAUD, alternative("online", "keep-warm", 0.0)), 3600),
    ],
)
def test_every_decision_is_drawn(decided: Decision, seconds: int) -> None:
    png = draw_decision(
        decided, np.ones(seconds, dtype=np.int64) if seconds else None, {"online": [(0.1, 3.0), (1.0, 64.0)]}
    )

    assert png.startswith(b"\x89PNG")
