"""The sample of a run's predictions: bounded, spread over the run, and shown in values that a table holds."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.model.contract import Contract, Output
from tasks.batch.manifest import Manifest, ManifestPart
from tasks.batch.prediction_sample import PredictionSample, draw_distributions, read_sample, split_classes
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import PIN, a_contract, parquet


def publish(storage: Storage, tables: list[pa.Table]) -> Manifest:
    """Write tables as the parts of a published run."""
    parts = []
    for at, table in enumerate(tables):
        data = parquet(table)
        storage.put_new(f"part-{at}.parquet", data)
        parts.append(ManifestPart(path=f"part-{at}.parquet", rows=table.num_rows, bytes=len(data)))
    return Manifest(
        key="k",
        run="r",
        planned_at=dt.datetime.now(dt.UTC),
        model=PIN,
        source="customers",
        output="parquet",
        rows=sum(table.num_rows for table in tables),
        rejects=(),
        parts=tuple(parts),
    )


def scores(start: int, stop: int, reject_every: int = 0) -> pa.Table:
    rows = np.arange(start, stop)
    rejected = (rows % reject_every == 0) if reject_every else np.zeros(len(rows), dtype=bool)
    reason = pa.array(["null"] * len(rows), mask=~rejected)
    score = pa.array(rows / 7, mask=rejected)
    return pa.table({"customer": rows, "score": score, "reject_column": reason, "reject_reason": reason})


def test_it_is_spread_over_the_run_and_bounded_whatever_the_size(place: str) -> None:
    storage = open_storage(place)
    manifest = publish(storage, [scores(at * 5_000, (at + 1) * 5_000) for at in range(20)])

    sample = read_sample(storage, manifest, a_contract("a"))

    assert 8 * 2_500 == sample.table.num_rows
    assert {"customer", "score"} == set(sample.table.column_names)
    assert {0, 2, 5, 7, 10, 12, 15, 17} == {value // 5_000 for value in sample.table["customer"].to_pylist()}
    assert 10 == len(sample.list_rows(10))
    assert sample.list_rows(10) == sample.list_rows(10)


def test_rejects_are_left_out_and_a_run_of_rejects_alone_has_no_rows(local: Storage) -> None:
    some = read_sample(local, publish(local, [scores(0, 100, reject_every=2)]), a_contract("a"))

    assert 50 == some.table.num_rows
    assert all(row["score"] is not None for row in some.list_rows(100))

    none = PredictionSample(table=some.table.slice(0, 0), outputs=("score",), rows=100)
    assert ([], None) == (none.list_rows(10), draw_distributions(none))


def test_a_part_that_a_table_has_rewritten_since_is_left_out(local: Storage, tmp_path: Path) -> None:
    manifest = publish(local, [scores(0, 10), scores(10, 20)])
    (tmp_path / "place/part-0.parquet").unlink()

    assert list(range(10, 20)) == read_sample(local, manifest, a_contract("a")).table["customer"].to_pylist()


def test_wide_outputs_are_bounded_by_their_values(local: Storage) -> None:
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3_000 * 1_000, dtype=np.float32)), 1_000)
    nulls = pa.nulls(3_000, pa.string())
    table = pa.table({"embedding": values, "reject_column": nulls, "reject_reason": nulls})
    contract = a_contract("a", outputs=(Output(name="embedding", dtype="float32", shape=(1_000,)),))

    sample = read_sample(local, publish(local, [table]), contract)

    assert 250 == sample.table.num_rows
    assert "[0.0, 0.0, 0.0, … 1000 values]" == sample.list_rows(1)[0]["embedding"]


def test_probabilities_of_classes_are_drawn_apart_and_longer_lists_as_one() -> None:
    pairs = pa.array([[0.25, 0.75], [0.5, 0.5], [0.125, 0.875]])
    wide, ragged, whole = pa.array([[0.5] * 9] * 3), pa.array([[0.5], [0.5, 0.5]]), pa.array([[1, 2], [3, 4]])

    assert [[0.25, 0.5, 0.125], [0.75, 0.5, 0.875]] == [each.to_pylist() for each in split_classes(pairs)]
    assert [[], [], [], []] == [split_classes(each) for each in (wide, ragged, whole, pa.array([0.5]))]
    assert draw_distributions(PredictionSample(table=pa.table({"score": pairs}), outputs=("score",), rows=3))


def test_every_type_of_key_is_shown_in_what_json_holds() -> None:
    table = pa.table(
        {
            "whole": [1, 2**60],
            "real": [1 / 3, float("nan")],
            "text": ["a" * 200, None],
            "binary": [b"abc", b""],
            "day": [dt.date(2026, 3, 1), None],
            "money": [Decimal("1.10"), None],
            "flag": [True, None],
        }
    )
    rows = PredictionSample(table=table, outputs=(), rows=2).list_rows(2)

    assert rows == json.loads(json.dumps(rows, allow_nan=False))
    assert {"whole": 1, "real": 0.333333, "binary": "3 bytes", "day": "2026-03-01", "money": "1.10", "flag": True} == {
        name: value for name, value in rows[0].items() if name != "text"
    }
    assert (80, str(2**60), "nan") == (len(rows[0]["text"]), rows[1]["whole"], rows[1]["real"])


@pytest.mark.parametrize("outputs", [1, 4, 12])
def test_each_output_has_its_plot_numbers_classes_and_texts(outputs: int, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    columns = {
        "score": pa.array(random.beta(2, 5, 2_000)),
        "label": pa.array(random.choice(["stays", "churns", "asks for a discount first"], 2_000)),
        "class": pa.array(random.integers(0, 4, 2_000)),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(random.standard_normal(2_000 * 8)), 8),
        **{f"more_{at}": pa.array(random.standard_normal(2_000)) for at in range(8)},
    }
    table = pa.table(dict(list(columns.items())[:outputs]))
    picture = draw_distributions(PredictionSample(table=table, outputs=tuple(table.column_names), rows=10_000_000))

    assert picture is not None
    assert len(picture) < 50_000
    words = [each.text for each in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314 - drawn here
    assert words[0] == f"2,000 of 10,000,000 rows{'; 3 outputs are not shown' if outputs == 12 else ''}"
    titles = ["score", "label", "class", "embedding, all values", *(f"more_{at}" for at in range(8))]
    assert titles[: min(outputs, 9)] == [each for each in words if each in titles]


def test_constants_infinite_values_nulls_and_neighbours_are_drawn_too() -> None:
    columns = {
        "constant": np.ones(20),
        "wild": [float("inf"), *[1.0] * 19],
        "huge": [1e300, *[-1e300] * 19],
        "neighbours": [1.0, *[np.nextafter(1.0, 2.0)] * 19],
        "numbers": [None, *range(2**63 - 20, 2**63 - 1)],
        "flag": [None, *[True] * 19],
    }

    assert draw_distributions(PredictionSample(table=pa.table(columns), outputs=tuple(columns), rows=20)) is not None


def test_reading_it_opens_eight_parts_at_most_and_no_rejects_columns_are_needed(local: Storage) -> None:
    manifest = publish(local, [scores(0, 10)])
    contract = Contract(inputs=a_contract("a").inputs, outputs=(Output(name="score", dtype="float64"),))

    assert (
        pq.read_schema(local.address("part-0.parquet")).names[:2]
        == read_sample(local, manifest, contract).table.column_names
    )
