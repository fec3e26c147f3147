from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.scheduler.choose import best
from tasks.scheduler.flips import NOTHING, busier, flips
from tests.tasks.scheduler.values import HOUR, THIS, problem, table_problem


@given(st.lists(st.integers(0, 100), min_size=1, max_size=50), st.floats(0.01, 100))
def test_traffic_is_as_many_times_as_much_as_it_is_said_to_be(counts: list[int], by: float) -> None:
    found = busier(problem(np.array(counts)), by).counts_T

    assert (found >= np.array(counts) * int(by)).all()
    assert (found <= np.array(counts) * (int(by) + 1)).all()
    assert by * table_problem(10).rows_per_table == pytest.approx(busier(table_problem(10), by).rows_per_table)


def test_a_table_that_grows_can_no_longer_be_scored_in_time() -> None:
    asked = table_problem(10**6, machines_max=1, availability=None)

    found = flips(asked, [THIS], best(asked, [THIS]))

    # 180 rows a second for six hours, less the start and a tenth.
    traffic = next(flip for flip in found if flip.input == "traffic")
    assert NOTHING == traffic.to
    assert 180 * (6 * HOUR / 1.1 - 30) / 10**6 == pytest.approx(traffic.factor, rel=0.2)
    assert "spot price" not in {flip.input for flip in found}


def test_a_sample_that_is_decided_otherwise_says_nothing() -> None:
    # It never rests for a week, and then nothing comes for days.
    counts_T = np.zeros(24 * HOUR * 10, dtype=np.int64)
    counts_T[: 24 * HOUR * 7] = 50
    asked = problem(counts_T)

    assert () == flips(asked, [THIS], best(asked, [THIS]))
