from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.scheduler.candidates import choose_cheapest
from tasks.scheduler.sensitivity import NO_MODE, find_break_evens, scale_traffic
from tests.tasks.scheduler.values import HOUR, THIS, scenario, table_scenario


@given(st.lists(st.integers(0, 100), min_size=1, max_size=50), st.floats(0.01, 100))
def test_traffic_is_scaled_by_the_factor(counts: list[int], by: float) -> None:
    found = scale_traffic(scenario(np.array(counts)), by).counts_T

    assert (found >= np.array(counts) * int(by)).all()
    assert (found <= np.array(counts) * (int(by) + 1)).all()
    assert by * table_scenario(10).rows_per_table == pytest.approx(scale_traffic(table_scenario(10), by).rows_per_table)


def test_a_table_that_grows_can_no_longer_be_scored_in_time() -> None:
    asked = table_scenario(10**6, machines_max=1, availability=None)

    found = find_break_evens(asked, [THIS], choose_cheapest(asked, [THIS]))

    # 180 rows a second for six hours, less the start and a tenth.
    traffic = next(each for each in found if each.input == "traffic")
    assert NO_MODE == traffic.to
    assert 180 * (6 * HOUR / 1.1 - 30) / 10**6 == pytest.approx(traffic.factor, rel=0.2)
    assert "spot price" not in {each.input for each in found}


def test_a_sample_that_leads_to_another_choice_has_no_break_evens() -> None:
    # It never rests for a week, and then nothing comes for days.
    counts_T = np.zeros(24 * HOUR * 10, dtype=np.int64)
    counts_T[: 24 * HOUR * 7] = 50
    asked = scenario(counts_T)

    assert () == find_break_evens(asked, [THIS], choose_cheapest(asked, [THIS]))
