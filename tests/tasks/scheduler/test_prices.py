from __future__ import annotations

from typing import Any

import pytest

from serving.errors import PricesMissing
from tasks.scheduler.prices import find_prices
from tasks.scheduler.workload import Machine, Prices, Table, Workload

GIVEN = Prices(on_demand=0.2, spot=0.07)


def workload(*machines: Machine, **changes: Any) -> Workload:
    return Workload(
        name="nightly", model="models:/churn@champion", consumer=Table(rows=10), machines=machines, **changes
    )


def test_prices_that_the_workload_gives_go_before_the_table() -> None:
    priced = find_prices(workload(Machine(prices=GIVEN), Machine(kind="c7i.large", speed=1, prices=GIVEN)))

    assert {"this": GIVEN, "c7i.large": GIVEN} == priced.prices
    assert "the workload itself" == priced.priced_at


def test_the_table_says_what_it_is_of_and_of_when() -> None:
    priced = find_prices(workload(Machine(prices=GIVEN), Machine(kind="c7i.xlarge", speed=2)))

    assert Prices(on_demand=0.1785, spot=0.0696) == priced.prices["c7i.xlarge"]
    assert "the workload itself; the table of Overnight: AWS us-east-1, on-demand prices of 2026-07" in priced.priced_at
    assert "estimated from savings of 2025-07" in priced.priced_at


def test_this_machine_must_have_prices_or_be_named() -> None:
    with pytest.raises(PricesMissing, match=r"'this' must have prices.*or name the instance type that it is"):
        find_prices(workload(Machine()))


@pytest.mark.parametrize(("kind", "region"), [("x99.huge", "us-east-1"), ("c7i.xlarge", "eu-west-1")])
def test_a_kind_or_a_region_that_the_table_does_not_know_is_named(kind: str, region: str) -> None:
    with pytest.raises(PricesMissing, match=rf"which is of us-east-1 and knows .*got {kind} in {region}.*price_source"):
        find_prices(workload(Machine(kind=kind, speed=1), region=region))
