"""A model that takes times scores tables that hold them as text."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tests.support import register_hours

pytestmark = pytest.mark.usefixtures("serverless")

DEPARTED = {
    1: ("2024-02-29", 0.0),
    2: ("2024-02-29T06:00:00", 6.0),
    3: ("2024-02-29 18:00:00.000+02:00", 16.0),
    4: ("2024-03-01T00:00Z", 24.0),
    5: ("29.02.2024", None),
    6: (None, None),
}
REJECTS = {5: ("departed", "text that does not parse as datetime64[ns]"), 6: ("departed", "null")}


@pytest.fixture(scope="module")
def hours(registry: Path) -> str:
    return register_hours("hours")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_texts_of_times_are_parsed_and_those_that_are_none_are_rejects(kind: str, hours: str, tmp_path: Path) -> None:
    from flows.batch import batch_inference

    # The day is a text as well: the value of a partition.
    folder = tmp_path / "flights" / "day=2024-02-29"
    folder.mkdir(parents=True)
    table = pl.DataFrame({"flight": list(DEPARTED), "departed": [text for text, _ in DEPARTED.values()]})
    write = {"csv": table.write_csv, "jsonl": table.write_ndjson, "parquet": table.write_parquet}[kind]
    write(folder / f"flights.{kind}")
    options = BatchOptions(key_columns=("flight",), experiment=None, max_reject_fraction=0.5)
    batch_inference(hours, str(tmp_path / "flights"), str(tmp_path / "scores"), options)

    scored = open_predictions(str(tmp_path / "scores")).collect().with_columns(pl.col("flight").cast(pl.Int64))
    found = {row["flight"]: row for row in scored.iter_rows(named=True)}
    assert {flight: score for flight, (_, score) in DEPARTED.items()} == {f: row["hours"] for f, row in found.items()}
    assert REJECTS == {f: (row["reject_column"], row["reject_reason"]) for f, row in found.items() if f in REJECTS}
