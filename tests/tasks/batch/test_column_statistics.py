"""Statistics of columns: exact where they say so, and the same bytes in whatever order chunks are added."""

from __future__ import annotations

import datetime as dt
import json
import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import BadInput, FormatTooNew
from tasks.batch.chunk_statistics import (
    SAMPLE_MAX,
    StatisticsCollector,
    choose_step,
    collect_statistics,
    find_kind,
    sample_rows,
)
from tasks.batch.column_statistics import (
    ColumnStatistics,
    TableStatistics,
    add_columns,
    add_tables,
    pack_statistics,
    read_statistics,
    unpack_statistics,
    write_statistics,
)
from tasks.batch.sketches import POINTS_MAX, STRATA, DistinctSketch, ExactSum, add_sketches, mix_bits, sketch_sorted

FLOATS = st.floats(allow_nan=True, allow_infinity=True) | st.none()
TEXTS = st.text(max_size=12) | st.none()


def column(values: object, kind: pa.DataType | None = None) -> ColumnStatistics:
    """Return the statistics of one column of a chunk."""
    return collect_statistics(pa.table({"a": pa.array(values, kind)}))["a"]


def table(**columns: ColumnStatistics) -> TableStatistics:
    return TableStatistics(rows=1, inputs=columns)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.lists(FLOATS, min_size=1), st.lists(TEXTS, min_size=1)), min_size=1, max_size=6), st.randoms()
)
def test_chunks_added_in_any_order_and_in_any_groups_give_the_same_bytes(chunks, random) -> None:
    parts = [
        TableStatistics(
            rows=len(numbers),
            rejects=1,
            inputs={"number": column(numbers, pa.float64()), "text": column(texts, pa.string())},
            outputs={"score": column(numbers, pa.float32())},
        )
        for numbers, texts in chunks
    ]
    expected = write_statistics(add_tables(parts))
    random.shuffle(parts)
    cut = random.randrange(len(parts) + 1)
    grouped = add_tables([add_tables(parts[:cut]), add_tables(parts[cut:])])

    assert expected == write_statistics(add_tables(parts))
    assert expected == write_statistics(grouped)
    assert grouped == read_statistics(expected, "here")
    assert grouped == unpack_statistics(pack_statistics(grouped), "here")


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(3, 9))
def test_sketches_that_must_be_cut_are_the_same_in_any_order_and_in_any_groups(seed, count) -> None:
    random = np.random.default_rng(seed)
    parts = [sketch_sorted(np.sort(random.standard_normal(3_000) * 10.0**at + at)) for at in range(count)]
    parts += [sketch_sorted(np.sort(random.standard_normal(256))) for _ in range(12)]
    expected = add_sketches(parts)
    random.shuffle(parts)
    cut = int(random.integers(1, len(parts)))

    assert expected == add_sketches(parts)
    assert expected == add_sketches([add_sketches(parts[:cut]), add_sketches(parts[cut:])])
    assert len(expected.points) <= POINTS_MAX
    assert sum(expected.weights) == sum(sum(part.weights) for part in parts)


@given(st.lists(FLOATS, min_size=1, max_size=200), st.data())
def test_blocks_of_a_chunk_make_no_difference(values, data) -> None:
    edges = sorted(data.draw(st.sets(st.integers(1, len(values)), max_size=3)) | {0, len(values)})
    whole = pa.table({"a": pa.array(values, pa.float64())})
    collector = StatisticsCollector(len(values))
    for start, stop in pairwise(edges):
        collector.add(whole.slice(start, stop - start))
    found, expected = collector.finish()["a"], collect_statistics(whole)["a"]

    exact = ("rows", "nulls", "nans", "infinite", "sampled", "minimum", "maximum", "quantiles", "distinct", "frequent")
    assert [getattr(expected, name) for name in exact] == [getattr(found, name) for name in exact]


def test_blocks_of_a_sampled_chunk_give_the_same_bytes() -> None:
    values = np.random.default_rng(9).standard_normal(100_000)
    whole = pa.table({"a": pa.array(values, mask=values > 2), "b": [f"{value:.0f}" for value in values]})
    written = set()
    for rows in (100_000, 30_000, 7_777):
        collector = StatisticsCollector(100_000)
        for start in range(0, 100_000, rows):
            collector.add(whole.slice(start, rows))
        written.add(write_statistics(TableStatistics(rows=100_000, inputs=collector.finish())))

    assert 1 == len(written)


@given(st.lists(st.integers(-200_000, 200_000), min_size=2, max_size=300), st.data())
def test_integers_are_summed_exactly_however_they_are_cut_into_chunks(values, data) -> None:
    cut = data.draw(st.integers(1, len(values) - 1))
    found = add_columns([column(values[:cut], pa.int64()), column(values[cut:], pa.int64())])

    assert (sum(values), sum(value * value for value in values)) == (
        found.sum.as_fraction(),
        found.squares.as_fraction(),
    )
    assert (len(values), min(values), max(values)) == (found.finite, found.minimum, found.maximum)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=300))
def test_a_mean_of_floats_is_within_a_small_part_of_the_range(values) -> None:
    found, exact = column(values, pa.float64()), [Fraction(value) for value in values]
    span = max(exact) - min(exact)
    # Of values that differ in their last bits only, float64 itself rounds more than this.
    rounding = max(span / 2**19, max(map(abs, exact)) / 2**49)

    assert abs(found.sum.as_fraction() / len(values) - sum(exact) / len(values)) <= rounding
    assert (min(values), max(values)) == (found.minimum, found.maximum)
    assert found.deviation <= float(span / 2) * 1.001 or found.deviation < 1e-300


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4, -3e-5])
def test_mean_and_deviation_are_numpys(dtype, offset) -> None:
    values = (np.random.default_rng(5).gamma(2, 3, 100_000) + offset).astype(dtype)
    found = column(values)

    assert values.mean(dtype=np.float64) == pytest.approx(found.mean, rel=1e-6)
    assert values.std(dtype=np.float64) == pytest.approx(found.deviation, rel=1e-5)


SHAPES = {
    "normal": lambda random, rows: random.standard_normal(rows),
    "far from zero": lambda random, rows: 1e6 + random.standard_normal(rows),
    "heavy tails": lambda random, rows: random.standard_cauchy(rows),
    "small and large": lambda random, rows: np.exp(random.standard_normal(rows) * 8),
    "zeros": lambda random, rows: random.exponential(size=rows) * (random.random(rows) < 0.3),
    "years": lambda random, rows: random.integers(1990, 2027, rows).astype(np.float64),
    "repeating": lambda random, rows: np.arange(rows) % 32 + random.random(rows),
    "rising": lambda random, rows: random.random() + np.arange(rows),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_quantiles_are_within_one_percent_of_the_rows(shape) -> None:
    values = SHAPES[shape](np.random.default_rng(11), 400_000).astype(np.float32)
    sketch = add_columns([column(chunk) for chunk in np.split(values, 16)]).quantiles
    shares = np.arange(1, 100) / 100
    found = np.array([sketch.quantile(share) for share in shares])
    ordered = np.sort(values)
    below, up_to = (np.searchsorted(ordered, found, side) / len(values) for side in ("left", "right"))

    # The quantile of a share is any value at which the share of rows below it, and up to it, are on either side.
    assert ((below - 0.01 <= shares) & (shares <= up_to + 0.01)).all()
    assert np.abs(sketch.share_up_to(ordered) - np.searchsorted(ordered, ordered, "right") / len(values)).max() < 0.01


def test_few_different_values_are_counted_exactly() -> None:
    sketch = column([3.0] * 5 + [1.0] * 2 + [7.0]).quantiles

    assert ((1.0, 3.0, 7.0), (2, 5, 1)) == (sketch.points, sketch.weights)
    assert (3.0, 1.0, 7.0) == (sketch.quantile(0.5), sketch.quantile(0.0), sketch.quantile(1.0))
    assert math.isnan(sketch_sorted(np.empty(0)).quantile(0.5))


@given(st.integers(1, 200_000))
def test_a_sample_is_of_all_rows_or_of_one_in_each_k(rows) -> None:
    sampled, step = sample_rows(rows), choose_step(rows)

    assert (rows // step) == len(sampled)
    assert len(sampled) == rows or SAMPLE_MAX / 2 < len(sampled) <= SAMPLE_MAX
    assert (sampled // step).tolist() == list(range(len(sampled)))


@pytest.mark.parametrize("count", [0, 1, 20, 700, 50_000])
def test_distinct_values_are_estimated_within_three_standard_errors(count) -> None:
    keys = np.arange(count, dtype=np.float64)
    sketch = DistinctSketch.of_hashes(mix_bits(keys.view(np.uint64)))

    assert count == pytest.approx(sketch.estimate(), rel=3 * 0.046, abs=0.5)
    assert (sketch.registers == DistinctSketch.parse(sketch.as_text()).registers).all()


def test_floats_that_are_too_many_are_not_counted() -> None:
    few, many = column(np.arange(1_000) % 200 / 8), column(np.arange(1_000) / 8)

    assert 200 == pytest.approx(few.distinct_sampled, rel=0.14)
    assert [None, None] == [many.distinct_sampled, add_columns([few, many]).distinct_sampled]


def test_sums_are_of_every_row_where_asked_for_and_else_of_the_sample() -> None:
    rows = pa.table({"a": np.arange(100_000) * 1.0})
    every, sampled = (collect_statistics(rows, sums_all=sums_all)["a"] for sums_all in (True, False))

    assert (100_000, 49_999.5) == (every.summed, every.mean)
    assert (4_000, sampled.sampled) == (sampled.summed, 4_000)
    assert 49_999.5 == pytest.approx(sampled.mean, rel=0.001)
    assert every.deviation == pytest.approx(sampled.deviation, rel=0.001)
    assert (every.minimum, every.maximum) == (sampled.minimum, sampled.maximum)


def test_distinct_values_of_chunks_are_those_of_all_rows() -> None:
    parts = [column([f"customer {at % 300}" for at in range(start, start + 1_000)]) for start in range(0, 4_000, 1_000)]

    assert 300 == pytest.approx(add_columns(parts).distinct_sampled, rel=0.14)
    assert parts[0].distinct == add_columns(parts).distinct


def test_frequent_texts_are_named_and_rare_ones_are_not() -> None:
    texts = ["gold"] * 40 + ["silver"] * 20 + ["tin"] * 20 + [f"person {at}" for at in range(20)] + ["a" * 90] * 11
    found = column(texts)

    assert (("gold", 40), ("silver", 20), ("tin", 20), ("a" * 64, 11)) == found.frequent
    assert (3, 90, 111) == (found.minimum, found.maximum, found.finite)
    assert 24 == pytest.approx(found.distinct_sampled, rel=0.14)


def test_a_sample_of_texts_counts_for_all_rows() -> None:
    found = column(np.random.default_rng(2).choice(["yes", "no"], 100_000, p=[0.25, 0.75]))

    assert 100_000 == pytest.approx(sum(rows for _, rows in found.frequent), rel=0.001)
    assert 25_000 == pytest.approx(dict(found.frequent)["yes"], rel=0.06)


DAY = 86_400 * 1_000_000


@pytest.mark.parametrize(
    ("values", "kind", "low", "high"),
    [
        ([True, False, None], pa.bool_(), 0, 1),
        ([1, None, 2**62], pa.int64(), 1, 2**62),
        ([0, 2**64 - 1], pa.uint64(), 0, 2**64 - 1),
        ([2**60, 2**60 + 1, 2**60 + 2], pa.int64(), 2**60, 2**60 + 2),
        (np.array([1, 3], np.float16), pa.float16(), 1.0, 3.0),
        ([None, np.float16(3)], pa.float16(), 3.0, 3.0),
        ([None, 2, 1, None], pa.time64("us"), 1, 2),
        ([None, "a", "bb"], pa.large_string(), 1, 2),
        ([Decimal("1.5"), None, Decimal("-2.25")], pa.decimal128(10, 2), -2.25, 1.5),
        ([dt.date(1970, 1, 3), None, dt.date(1969, 12, 31)], pa.date32(), -DAY, 2 * DAY),
        ([dt.date(1970, 1, 3)], pa.date64(), 2 * DAY, 2 * DAY),
        ([dt.datetime(1970, 1, 2), None], pa.timestamp("s"), DAY, DAY),  # noqa: DTZ001 - as a table holds it
        ([dt.datetime(1970, 1, 2, tzinfo=dt.UTC)], pa.timestamp("ns", "UTC"), DAY, DAY),
        ([-(2**63), 2**63 - 1], pa.timestamp("s"), -(2**63 // 10**6) * 10**6, 2**63 // 10**6 * 10**6),
        ([1, 2], pa.time32("ms"), 1_000, 2_000),
        ([5_000, 7_999], pa.duration("ns"), 5, 7),
        (["a", None, "ääää"], pa.string_view(), 1, 4),
        (["a", "b", None], pa.dictionary(pa.int8(), pa.string()), 1, 1),
        ([1e308, -1.7e308, 1.7e308], pa.float64(), -1.7e308, 1.7e308),
        ([5e-324, 0.0], pa.float64(), 0.0, 5e-324),
        ([[1.0], None, []], pa.list_(pa.float32()), None, None),
        ([b"a", None], pa.binary(), None, None),
        ([None, None], pa.null(), None, None),
        ([None, None], pa.float32(), None, None),
        ([], pa.float32(), None, None),
    ],
)
def test_every_type_has_its_range_and_its_nulls(values, kind, low, high) -> None:
    array = pa.array(values, kind) if not pa.types.is_date64(kind) else pa.array(values, pa.date32()).cast(kind)
    found = collect_statistics(pa.table({"a": array}))["a"]

    assert (len(values), array.null_count) == (found.rows, found.nulls)
    assert (low, high) == (found.minimum, found.maximum)
    assert found == read_statistics(write_statistics(table(a=found)), "here").inputs["a"]
    if low is None:
        assert math.isnan(found.mean)
        assert math.isnan(found.deviation)
    else:
        assert low <= found.mean <= high


def test_an_extension_type_is_counted_as_what_it_stores() -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((3, 2), np.float32))

    assert ("other", 3) == (find_kind(tensors.type), collect_statistics(pa.table({"a": tensors}))["a"].rows)


@given(st.lists(FLOATS, min_size=1, max_size=100), st.booleans())
def test_nulls_and_what_is_not_finite_leave_no_trace_in_the_rest(values, sums_all) -> None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    found, expected = (
        collect_statistics(pa.table({"a": pa.array(given, pa.float64())}), sums_all=sums_all)["a"]
        for given in (values, finite)
    )

    exact = ("finite", "sampled", "summed", "minimum", "maximum", "quantiles", "distinct")
    assert [getattr(expected, name) for name in exact] == [getattr(found, name) for name in exact]
    assert (values.count(None), len(values)) == (found.nulls, found.finite + found.nulls + found.nans + found.infinite)


def test_values_that_are_not_finite_are_counted_apart() -> None:
    found = column([1.0, float("nan"), float("inf"), -float("inf"), None, 3.0])

    assert (1, 1, 2, 2, 1.0, 3.0, 2.0, 2) == (
        *(found.nulls, found.nans, found.infinite, found.finite),
        *(found.minimum, found.maximum, found.mean, found.sampled),
    )
    assert 2 / 6 == found.null_rate


@given(st.integers(), st.integers(-2_000, 2_000), st.integers(), st.integers(-2_000, 2_000))
def test_exact_sums_are_exact_and_have_one_form(first, exponent, second, other) -> None:
    total = ExactSum.normalize(first, exponent) + ExactSum.normalize(second, other)

    assert Fraction(first) * Fraction(2) ** exponent + Fraction(second) * Fraction(2) ** other == total.as_fraction()
    assert total == ExactSum.parse(total.as_text())


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_the_numbers_of_a_sketch_keep_their_order_and_stay_in_the_range(values) -> None:
    ordered = np.sort(np.array(values))
    sketch = sketch_sorted(ordered, 3)

    assert list(sketch.points) == sorted(set(sketch.points))
    assert ordered[0] <= sketch.points[0] <= sketch.points[-1] <= ordered[-1]
    assert 3 * len(values) == sum(sketch.weights)
    assert len(sketch.points) <= STRATA


DAMAGES = [
    {"kind": "colour"},
    {"kind": "number", "points": "0 5 1:00", "weights": "1:0101"},
    {"kind": "number", "points": "0 9218868437227405312 1:", "weights": "1:01"},
    {"kind": "number", "points": "900 1 1:", "weights": "1:01"},
    {"kind": "number", "points": "0 5 1:01", "weights": "1:01"},
    {"kind": "number", "points": "0 5 1:01", "weights": "9:0101"},
    {"kind": "number", "points": "0 5", "weights": "1:01"},
    {"kind": "number", "distinct": "~"},
    {"kind": "number", "minimum": "x"},
    {"kind": "number", "sum": "1.5"},
    {"kind": "text", "frequent": [["a"]]},
]


@pytest.mark.parametrize("damage", ["", "[]", "{}", "{", *DAMAGES])
def test_what_is_no_statistics_is_refused(damage) -> None:
    inputs = {"format_version": 1, "rows": 1, "rejects": 0, "inputs": {"a": damage}, "outputs": {}}
    document = damage if isinstance(damage, str) else json.dumps(inputs)

    with pytest.raises(BadInput, match=r"s3://lake/statistics.json must hold statistics that Overnight has written"):
        read_statistics(document.encode(), "s3://lake/statistics.json")


@pytest.mark.parametrize("text", ["", "5:AAAA", "nonsense", "99999999999999999999:AAAA"])
def test_damaged_metadata_of_a_part_is_refused(text) -> None:
    with pytest.raises(BadInput, match="part-0 must hold statistics"):
        unpack_statistics(text, "part-0")


def test_statistics_of_a_newer_release_are_refused() -> None:
    with pytest.raises(FormatTooNew, match="must be of format 1 or older, got 2"):
        read_statistics(b'{"format_version":2}', "statistics.json")


def test_columns_of_different_kinds_do_not_add_up() -> None:
    with pytest.raises(BadInput, match="must be of one kind, got number, text"):
        add_columns([column([1.0]), column(["a"])])


def test_statistics_of_a_part_are_small() -> None:
    random = np.random.default_rng(3)
    columns = {f"f{at}": random.standard_normal(100_000).astype(np.float32) for at in range(34)}
    packed = pack_statistics(TableStatistics(rows=100_000, inputs=collect_statistics(pa.table(columns))))

    assert len(packed) < 34 * 400


def test_a_column_without_values_adds_nothing() -> None:
    some = column([1.0, 2.0])
    both = add_columns([some, column([None, None], pa.float64())])

    assert (4, 2, 1.5) == (both.rows, both.nulls, both.mean)
    assert some.quantiles == both.quantiles
