from __future__ import annotations

import pytest

from serving.model.batching import CostModel
from tasks.scheduler.money import usd
from tasks.scheduler.report import alternatives_table, markdown, span, summary
from tests.tasks.scheduler.decisions import BACKFILL, EVENTS, FRAUD, NIGHTLY, decision, profile, way

SPOT, ALWAYS_ON = way("batch", "spot", 0.5), way("online", "always-on", 64.0)


def test_the_report_says_what_was_chosen_why_what_the_rest_costs_and_what_would_change_it() -> None:
    words = markdown(decision(NIGHTLY, SPOT, ALWAYS_ON), ["The trace has a gap."])

    assert "# Workload nightly: batch" in words
    assert "**Why:** it costs 0.5." in words
    assert "An endpoint that is always on would cost $63.50 more, 128 times as much." in words
    assert "| online | always-on | 1 x c7i.large | $64.00 (128 x) |" in words
    assert "- traffic times 3.2: then online, always-on" in words
    assert "$0.09 on-demand, $0.03 spot" in words
    assert "- The trace has a gap." in words


def test_what_requests_take_together_is_told_where_that_was_measured() -> None:
    served = profile(served=CostModel(fixed_seconds=0.5e-3, row_seconds=0.08e-3), jitter=0.4)

    assert "0.5 ms + n x 0.08 ms in a slot, give or take 40%" in markdown(decision(FRAUD, ALWAYS_ON, profile=served))
    assert "n x" not in markdown(decision(FRAUD, ALWAYS_ON))


def test_a_choice_that_costs_nothing_is_divided_by_nothing() -> None:
    words = markdown(decision(NIGHTLY, way("batch", "on-demand", 0.0), ALWAYS_ON))

    assert "would cost $64.00 more." in words
    assert " x) |" not in words


def test_an_endpoint_that_is_always_on_wastes_nothing_against_itself() -> None:
    assert "nothing is wasted" in summary(decision(FRAUD, ALWAYS_ON))


def test_of_each_mode_policy_and_machine_the_first_is_shown() -> None:
    ways = [SPOT, way("batch", "spot", 0.6, machines=2), ALWAYS_ON]

    assert ["chosen", "stands"] == [row[""] for row in alternatives_table(decision(NIGHTLY, *ways))]


def test_every_consumer_s_promise_is_said() -> None:
    words = [markdown(decision(workload, ALWAYS_ON)) for workload in (NIGHTLY, FRAUD, EVENTS, BACKFILL)]

    assert "1,000 rows that are there at 01:30 UTC are scored by 06:00, every day" in words[0]
    assert "0.99 of the requests are answered within 50 ms" in words[1]
    assert "0.99 of the events are scored within 30 s" in words[2]
    assert "9 rows are scored once, by 2026-02-01 05:00 UTC" in words[3]
    assert "$64.00 for one run on 1 x c7i.large" in words[3]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 ms"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (90, "90 s"), (600, "10 min"), (2e5, "2.31 d")],
)
def test_a_span_of_time_is_said_in_its_own_unit(seconds: float, words: str) -> None:
    assert words == span(seconds)


@pytest.mark.parametrize(("amount", "words"), [(0, "$0"), (0.0123, "$0.0123"), (12.3, "$12.30"), (12345.6, "$12,346")])
def test_money_is_said_as_people_write_it(amount: float, words: str) -> None:
    assert words == usd(amount)
