"""What a night bought is the sum of its stays; a deadline says when it is."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadInput
from tasks.spot.purchase import MachineStay, PurchaseOptions, median_rate, parse_deadline, sum_cost, sum_seconds

BUYING = PurchaseOptions(spot_price=1.0, on_demand_price=3.0)
NOW = datetime(2030, 1, 31, 22, 0, tzinfo=UTC)


def test_each_second_costs_its_machine() -> None:
    stays = [
        MachineStay(kind="spot", start=0, stop=1800, lost=True),
        MachineStay(kind="on-demand", start=1900, stop=3700, lost=False),
    ]

    assert sum_cost(stays, BUYING) == pytest.approx(0.5 + 1.5)
    assert sum_seconds(stays, "spot") == sum_seconds(stays, "on-demand") == 1800
    assert BUYING.price_ratio == 3


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 1000)), max_size=20))
def test_a_rate_lies_among_the_rates_between_observations(steps: list[tuple[float, int]]) -> None:
    at, rows, samples = 0.0, 0, [(0.0, 0)]
    for seconds, more in steps:
        at, rows = at + seconds, rows + more
        samples.append((at, rows))
    rates = [more / seconds for seconds, more in steps if more]

    rate = median_rate(samples)

    assert (rate is None) == (not rates)
    assert rate is None or min(rates) * 0.999 <= rate <= max(rates) * 1.001


def test_a_changeover_does_not_count_as_slow_work() -> None:
    # The second machine goes on at 10 s of work, by the clock much later.
    assert median_rate([(0, 0), (10, 1000), (10, 1500), (20, 2500)]) == 100


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("06:00", datetime(2030, 2, 1, 6, tzinfo=UTC)),
        ("23:30", datetime(2030, 1, 31, 23, 30, tzinfo=UTC)),
        ("22:00", datetime(2030, 2, 1, 22, tzinfo=UTC)),
        ("2030-02-02T06:00+02:00", datetime(2030, 2, 2, 4, tzinfo=UTC)),
    ],
)
def test_a_deadline_is_the_next_such_time_or_that_very_one(words: str, expected: datetime) -> None:
    assert expected == parse_deadline(words, NOW)


@pytest.mark.parametrize("words", ["", "soon", "25:00", "06:61", "2030-02-02T06:00", "6"])
def test_other_words_are_refused_with_an_example(words: str) -> None:
    with pytest.raises(BadInput, match="must be a time of day in UTC, such as 06:00"):
        parse_deadline(words, NOW)


def test_a_deadline_that_is_past_is_refused() -> None:
    with pytest.raises(BadInput, match=r"must be ahead, got 2030-01-31T21:00:00\+00:00, and it is 2030-01-31T22:00:00"):
        parse_deadline("2030-01-31T21:00+00:00", NOW)
