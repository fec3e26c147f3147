"""A whole run over a join as of a time: killed, resumed, and called from the command line, it is the join by hand."""

from __future__ import annotations

import datetime as dt
import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from deployments.command_line import app
from tasks.batch.comparison_records import open_challenger
from tasks.batch.feature_table import FeatureTable
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tests.eventually import PROCESS_SECONDS
from tests.flows.children import call, score, start_child
from tests.support import digests, register_slow, write_customers

pytestmark = pytest.mark.usefixtures("serverless")

ROWS = 6_000
NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
PLAIN = {"key_columns": ["customer"], "batch_size": 64, "rows_per_chunk": 512, "experiment": None}


def add_times(table: pl.DataFrame) -> pl.DataFrame:
    """Return customers without what the model reads, by accounts and as of a time."""
    random = np.random.default_rng(1)
    minutes = random.integers(0, 10_000, ROWS)
    return table.select(
        "customer",
        account=pl.Series(random.integers(0, 900, ROWS)),
        as_of=pl.Series([NOON + dt.timedelta(minutes=int(each)) for each in minutes]),
    )


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spine, the features of its accounts, and the join of both, made by looking at all features for each row."""
    folder = tmp_path_factory.mktemp("lake")
    write_customers(folder / "spine", rows=ROWS, files=3, rows_per_group=900, edit=add_times)
    random = np.random.default_rng(2)
    accounts, minutes, values = random.integers(0, 800, 9_000), random.integers(-3_000, 9_000, 9_000), np.arange(9_000)
    (folder / "features").mkdir()
    at = pl.Series([NOON + dt.timedelta(minutes=int(each)) for each in minutes], dtype=pl.Datetime("ms", "UTC"))
    table = pl.DataFrame({"account": accounts, "at": at, "a": values.astype(np.float32)})
    table.write_parquet(folder / "features" / "f.parquet", row_group_size=1_000)
    (folder / "joined").mkdir()
    for path in sorted((folder / "spine").glob("*.parquet")):
        spine = pl.read_parquet(path)
        found: list[float | None] = []
        for account, as_of in spine.select("account", "as_of").rows():
            known = (accounts == account) & (minutes <= (as_of - NOON) // dt.timedelta(minutes=1))
            latest = np.flatnonzero(known & (minutes == minutes[known].max(initial=-9_999)))
            found.append(float(values[latest[-1]]) if len(latest) else None)
        joined = spine.with_columns(a=pl.Series(found, dtype=pl.Float32))
        joined.write_parquet(folder / "joined" / path.name, row_group_size=900)
    return folder


def test_a_killed_run_over_a_join_is_completed_to_the_bytes_of_an_undisturbed_one_and_to_the_join_by_hand(
    doubling: str, lake: Path, tmp_path: Path
) -> None:
    table = {"source": f"{lake}/features", "join_keys": ["account"], "time": "at"}
    document = {**PLAIN, "spine_time": "as_of", "features": [table], "max_reject_fraction": 0.5}
    options = BatchOptions.model_validate(document)
    arguments = call(doubling, lake / "spine", tmp_path / "killed", options)
    with start_child(
        *("kill_child.py", "after a part", "4", *arguments),
        environment={**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL"},
    ) as child:
        child.communicate(timeout=PROCESS_SECONDS)
    done = len(digests(tmp_path / "killed"))
    resumed = score(doubling, lake / "spine", tmp_path / "killed", options)
    undisturbed = score(doubling, lake / "spine", tmp_path / "undisturbed", options)
    score(
        doubling, lake / "joined", tmp_path / "by-hand", options.model_copy(update={"features": (), "spine_time": None})
    )
    given = {name: value for name, value in document.items() if name != "key_columns"}
    command = ["score", doubling, f"{lake}/spine", str(tmp_path / "killed"), "-k", "customer", "--json"]
    again = CliRunner().invoke(app, [*command, "--options", json.dumps(given)])
    ours, by_hand = (
        open_predictions(str(tmp_path / name)).collect().sort("customer") for name in ("killed", "by-hand")
    )

    assert -9 == child.returncode
    assert 4 <= done < len(resumed)
    assert undisturbed == resumed == digests(tmp_path / "killed")
    assert by_hand.equals(ours)
    assert 0 < ours["prediction"].null_count() < ROWS // 2
    assert 0 == again.exit_code, again.output
    assert "already complete" == json.loads(again.stdout.splitlines()[-1])["status"]


@pytest.mark.parametrize("others", [("b",), ("c",), ("b", "c")])
def test_a_challenger_may_read_features_that_the_model_does_not(
    doubling: str, lake: Path, tmp_path: Path, others: tuple[str, ...]
) -> None:
    table = pl.read_parquet(lake / "features").with_columns(b=pl.col("a") / 3, c=pl.col("a") / 7)
    for name, columns in (("both", ["a", "b"]), ("more", ["c"])):
        (tmp_path / name).mkdir()
        table.select("account", "at", *columns).write_parquet(tmp_path / name / "f.parquet", row_group_size=1_000)
    challenger = register_slow(f"reads-{'-'.join(others)}", ("a", *others), 0)
    tables = [FeatureTable(source=f"{tmp_path}/both", join_keys=("account",), time="at")]
    options = BatchOptions.model_validate(
        {**PLAIN, "spine_time": "as_of", "features": tables, "max_reject_fraction": 0.5}
    )
    plain = score(doubling, lake / "spine", tmp_path / "plain", options)
    more = FeatureTable(source=f"{tmp_path}/more", join_keys=("account",), time="at")
    options = options.model_copy(update={"features": (*tables, more) if "c" in others else (*tables,)})
    score(challenger, lake / "spine", tmp_path / "alone", options)
    both = score(
        doubling, lake / "spine", tmp_path / "both-models", options.model_copy(update={"challengers": (challenger,)})
    )
    one, two, first = (open_predictions(str(tmp_path / each)) for each in ("plain", "alone", "both-models"))
    second = open_challenger(str(tmp_path / "both-models"), challenger).select(two.collect_schema().names())

    assert one.collect().equals(first.collect())
    assert two.collect().equals(second.collect())
    if "c" not in others:
        # Another feature table is another call. Where it is the same, parts are as without a challenger.
        assert {*plain.values()} == {*both.values()}
