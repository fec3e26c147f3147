"""Distances between a run and its baseline: those of scipy and numpy on the rows themselves."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tasks.batch.chunk_statistics import collect_statistics
from tasks.batch.column_statistics import ColumnStatistics, TableStatistics, add_columns
from tasks.batch.drift import compare_column, compare_rates, compare_tables, find_edges, tabulate_drift
from tasks.batch.drift_plot import draw_drift


def column(values: object, kind: pa.DataType | None = None) -> ColumnStatistics:
    return collect_statistics(pa.table({"a": pa.array(values, kind)}))["a"]


def in_chunks(values: np.ndarray) -> ColumnStatistics:
    """Return the statistics of values that come in chunks of 50,000."""
    return add_columns([column(values[start : start + 50_000]) for start in range(0, len(values), 50_000)])


def psi_of_rows(now: np.ndarray, then: np.ndarray, edges: np.ndarray) -> float:
    """Return the index of the rows themselves, by the same bins."""
    bins = [-np.inf, *np.nextafter(edges, np.inf), np.inf]
    p, q = (np.maximum(np.histogram(values, bins)[0] / len(values), 1e-4) for values in (now, then))
    return float(((p - q) * np.log(p / q)).sum())


SMALL = st.lists(st.integers(-8, 8), min_size=1, max_size=60)


@given(SMALL, SMALL)
def test_of_few_values_they_are_exactly_those_of_the_rows(now, then) -> None:
    drift = compare_column("input", "a", column(now, pa.int64()), column(then, pa.int64()))
    deviation = np.std(then)

    shares = [np.mean(np.less_equal.outer(rows, np.arange(-8, 9)), axis=0) for rows in (now, then)]

    assert np.abs(shares[0] - shares[1]).max() == pytest.approx(drift.ks.value, abs=1e-12)
    assert psi_of_rows(np.array(now), np.array(then), np.unique(then)) == pytest.approx(drift.psi.value, abs=1e-9)
    if deviation:
        shift = abs(np.mean(now) - np.mean(then)) / deviation
        assert shift == pytest.approx(drift.mean.value, rel=1e-9, abs=1e-12)
    else:
        assert (np.mean(now) == then[0]) == (drift.mean.value == 0.0)


@pytest.mark.parametrize("shift", [0.0, 0.2, 1.0])
def test_of_many_values_they_are_near_those_of_the_rows(shift) -> None:
    random = np.random.default_rng(8)
    now, then = random.gamma(2, 1, 400_000) + shift, random.gamma(2, 1, 400_000)
    current, baseline = in_chunks(now), in_chunks(then)
    drift = compare_column("output", "score", current, baseline)

    assert stats.ks_2samp(now, then, method="asymp").statistic == pytest.approx(drift.ks.value, abs=0.01)
    assert psi_of_rows(now, then, find_edges(baseline)) == pytest.approx(drift.psi.value, rel=0.1, abs=0.002)
    assert 10 == len(find_edges(baseline)) + 1


def test_chance_is_what_one_of_a_thousand_pairs_of_samples_exceeds() -> None:
    random = np.random.default_rng(1)
    drifts = [
        compare_column("input", "a", *(column(random.standard_normal(300)) for _ in range(2))) for _ in range(800)
    ]
    for distances in (
        [drift.psi for drift in drifts],
        [drift.ks for drift in drifts],
        [drift.mean for drift in drifts],
    ):
        exceeded = sum(distance.value > distance.chance for distance in distances)
        assert exceeded <= 5
        assert np.quantile([distance.value for distance in distances], 0.99) > distances[0].chance / 2


def test_the_chance_of_two_rates_is_that_of_a_test_of_proportions() -> None:
    random = np.random.default_rng(4)
    exceeded = 0
    for first, second in random.binomial(5_000, 0.03, (3_000, 2)):
        distance = compare_rates(int(first), 5_000, int(second), 5_000)
        exceeded += distance.value > distance.chance

    assert exceeded <= 12
    assert math.isnan(compare_rates(0, 0, 1, 5).value)


def test_texts_are_compared_by_name() -> None:
    then = column(["basic"] * 500 + ["plus"] * 300 + ["pro"] * 200)
    same = column(["basic"] * 50 + ["plus"] * 30 + ["pro"] * 20)
    other = column(["basic"] * 500 + ["plus"] * 300 + ["max"] * 200)

    assert 0.0 == pytest.approx(compare_column("input", "plan", same, then).psi.value, abs=1e-6)
    assert compare_column("input", "plan", other, then).psi.value > 2


def test_texts_that_are_too_many_to_name_are_no_drift() -> None:
    random = np.random.default_rng(6)
    draws = [column([f"city {at}" for at in random.integers(0, 400, 8_000)]) for _ in range(2)]

    assert compare_column("input", "city", *draws).psi.value < 0.01


@pytest.mark.parametrize(
    ("now", "then", "problem"),
    [
        (column([1.0]), None, "the baseline does not have it"),
        (None, column([1.0]), "only the baseline has it"),
        (column(["a"]), column([1.0]), "its values are of the kind text, in the baseline number"),
        (column([[1.0]]), column([[1.0]]), "of values like these only nulls are counted"),
        (column([1.0]), column([None], pa.float64()), "the baseline has no value in it"),
        (column([None], pa.float64()), column([1.0]), "this run has no value in it"),
        (column([1.0]), ColumnStatistics(kind="number", rows=5), "the baseline has no sketch of it"),
    ],
)
def test_what_cannot_be_compared_says_why(now, then, problem) -> None:
    drift = compare_column("input", "a", now, then)

    assert problem == drift.problem
    assert math.isnan(drift.psi.value)
    assert math.isnan(drift.null_rate.value) == (now is None or then is None)


def test_tables_are_compared_column_by_column() -> None:
    now = TableStatistics(rows=1, inputs={"b": column([1.0]), "a": column([1.0])}, outputs={"a": column([2.0])})
    then = TableStatistics(rows=1, inputs={"c": column([1.0])}, outputs={"a": column([1.0])})

    assert ["input a", "input b", "input c", "output a"] == [drift.title for drift in compare_tables(now, then)]
    assert 3 == len(compare_tables(now, None))
    assert math.inf == compare_tables(now, then)[-1].mean.value


def test_the_table_shows_what_moved_most_first_beside_the_baseline() -> None:
    now = TableStatistics(rows=1, inputs={"b": column([1.0])}, outputs={"a": column([2.0])})
    then = TableStatistics(rows=1, inputs={"c": column([1.0])}, outputs={"a": column([1.0])})
    rows = tabulate_drift(compare_tables(now, then))

    assert ["output a", "input b", "input c"] == [row["column"] for row in rows]
    assert ("1", "2 (1)", "0 (0)", "0 (0)", "") == tuple(
        rows[0][name] for name in ("ks", "mean", "deviation", "null rate", "note")
    )
    assert ("1", "(1)", "only the baseline has it") == (rows[1]["mean"], rows[2]["mean"], rows[2]["note"])


def test_the_picture_shows_each_kind_of_column_and_has_a_bounded_size() -> None:
    random = np.random.default_rng(2)

    def make(shift: float) -> TableStatistics:
        columns = {
            "number": random.standard_normal(3_000) + shift,
            "plan": random.choice(
                ["basic", r"$\frac$ plus", "$100 & <more>"], 3_000, p=[0.6 - shift, 0.3, 0.1 + shift]
            ),
            "note": [f"{at} {'x' * int(at % 7 + 9 * shift)}" for at in random.integers(0, 3_000, 3_000)],
            r"$\class$": random.integers(0, 4, 3_000) * (random.random(3_000) > shift),
            "since": pa.array((random.random(3_000) + shift) * 1e16, pa.float64()).cast(pa.int64(), safe=False),
            "far": random.uniform(-1.7, 1.7, 3_000) * 1e308,
            "rare": np.where(random.random(3_000) < 0.001 + shift / 10, random.random(3_000), 0.0),
            "more": random.standard_normal(3_000),
        }
        table = pa.table(columns)
        table = table.set_column(4, "since", table["since"].cast(pa.timestamp("us")))
        return TableStatistics(rows=3_000, inputs=collect_statistics(table))

    png = draw_drift(compare_tables(make(0.4), make(0.0)), "tonight", "last night")

    assert png is not None
    assert png.startswith(b"\x89PNG")
    assert len(png) < 150_000
    assert draw_drift(compare_tables(make(0.0), None), "tonight", "none") is None
