"""Features as of a time: each row of a source gets the latest row of a feature table that is not later than its own."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import given, settings
from pydantic import ValidationError

from deployments.command_line.console import build_model
from infra.local.s3 import S3Server
from serving.errors import BadInput, SchemaMismatch, SourceChanged, SourceEmpty, SourceFormat, SourceNotFound
from serving.model.contract import Column, Contract
from tasks.batch import as_of_join
from tasks.batch.as_of_join import FeatureRows, LatestRows, SortedFeatures, SpineRows
from tasks.batch.chunk_layout import Chunk
from tasks.batch.described_datasets import describe_feature_tables, describe_input
from tasks.batch.feature_lookup import FeatureLookup, GroupRanges, WantedRows, may_match, open_joined_reader
from tasks.batch.feature_pins import (
    JOINED_BYTES,
    FeaturePin,
    choose_joined_rows,
    choose_kept,
    count_joined_bytes,
    describe_features,
)
from tasks.batch.manifest import open_predictions, open_rejects
from tasks.batch.memory import check_memory, feature_bytes
from tasks.batch.open_lineage import _Event, _make_column_lineage, build_event
from tasks.batch.options import BatchOptions
from tasks.batch.part_proof import ProvingModel, prove_reused_parts
from tasks.batch.parts import list_parts, part_path
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, publish
from tasks.batch.reject_rows import write_rejects
from tasks.batch.resolve import CompleteRun, find_run
from tasks.batch.run_records import confirm_plan
from tasks.batch.run_request import RunRequest, make_request
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.batch.verify import verify_run
from tasks.scheduler.profile import ProfileOptions
from tasks.storage import open_storage
from tests.simulation.data import CONTRACT, ToyModel, ToyResolved, load_toy
from tests.tasks.batch.iceberg_tables import configure, delete_rows, open_lake

UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
NOON = dt.datetime(2026, 3, 1, 12)  # noqa: DTZ001 - as clocks show it


# What is expected: written without any of what is tested.


def find_latest(
    spine: Sequence[tuple[Any, int | None]], features: Sequence[tuple[Any, int | None]], age: int | None
) -> list[int | None]:
    """Return the place of the feature row for each row of a spine, both as keys and nanoseconds, by looking at all."""
    found: list[int | None] = []
    for keys, now in spine:
        best: tuple[int, int] | None = None
        for at, (of, then) in enumerate(features):
            if None in keys or None in of or now is None or then is None or keys != of or then > now:
                continue
            if (age is None or now - then <= age) and (best is None or then >= best[0]):
                best = (then, at)
        found.append(None if best is None else best[1])
    return found


# The join of tables.

TICKS = st.one_of(st.none(), st.integers(-3_000, 3_000))
KEYS = st.one_of(st.none(), st.integers(-2, 2))
# A million of each finer unit makes one of a coarser, and what is a little before or after it.
MOMENTS = st.builds(lambda tick, off: None if tick is None else tick * 10**6 + off, TICKS, st.integers(-2, 2))


@st.composite
def sides(draw: st.DrawFn, rows: int) -> tuple[list[Any], list[Any], list[Any], str]:
    """Return two keys, times and the unit of these, of some rows."""
    count = draw(st.integers(0, rows))
    first, second = (draw(st.lists(KEYS, min_size=count, max_size=count)) for _ in range(2))
    times = draw(st.lists(st.one_of(TICKS, MOMENTS), min_size=count, max_size=count))
    return first, second, times, draw(st.sampled_from(list(UNITS)))


@settings(max_examples=150)
@given(spine=sides(12), features=sides(30), age=st.sampled_from([None, 0, 1, 3]), cuts=st.integers(1, 12))
def test_a_row_gets_what_looking_at_all_rows_finds_and_never_a_later_one(
    spine: Any, features: Any, age: int | None, cuts: int
) -> None:
    (s1, s2, s_times, s_unit), (f1, f2, f_times, f_unit) = spine, features
    left = pa.table(
        {
            "k": pa.array(s1, pa.int16()),
            "q": pa.array([None if q is None else str(q) for q in s2], pa.string()),
            "now": pa.array(s_times, pa.timestamp(s_unit, "UTC")),
        }
    )
    right = pa.table(
        {
            "k": pa.array(f1, pa.int64()),
            "q": pa.array([None if q is None else str(q) for q in f2], pa.string()).dictionary_encode(),
            "then": pa.array(f_times, pa.timestamp(f_unit, "Europe/Paris")),
            "place": pa.array(range(len(f1)), pa.int64()),
        }
    )

    def nanoseconds(times: list[int | None], unit: str) -> list[int | None]:
        return [None if time is None else time * UNITS[unit] for time in times]

    nows, thens = nanoseconds(s_times, s_unit), nanoseconds(f_times, f_unit)
    wanted = find_latest(
        list(zip(zip(s1, s2, strict=True), nows, strict=True)),
        list(zip(zip(f1, f2, strict=True), thens, strict=True)),
        None if age is None else age * 10**9,
    )
    rows = SpineRows(left, ["k", "q"], "now")
    with pytest.MonkeyPatch.context() as patch:
        # So that rows which match nothing are dropped in the middle.
        patch.setattr(as_of_join, "HELD_BYTES", 500)
        latest = LatestRows(rows, age, right.select(["place"]).schema)
        for at in range(0, right.num_rows, cuts):
            latest.add(FeatureRows(right.slice(at, cuts), ["k", "q"], "then", ["place"]))
        streamed = latest.finish()["place"].to_pylist()
    kept = SortedFeatures(FeatureRows(right, ["k", "q"], "then", ["place"]))

    assert wanted == streamed == kept.find_latest(rows, age)["place"].to_pylist()
    for now, place in zip(nows, streamed, strict=True):
        assert place is None or (now is not None and (thens[place] or 0) <= now)


@pytest.mark.parametrize("far", [-(2**62), 2**62, -(2**63), 2**63 - 1])
def test_times_that_no_finer_unit_could_hold_are_compared_as_they_are(far: int) -> None:
    """A year of 300,000 in microseconds is no nanosecond of 64 bits."""
    spine = SpineRows(pa.table({"k": [1, 1], "now": pa.array([0, 2**63 - 1], pa.timestamp("ns"))}), ["k"], "now")
    table = pa.table({"k": [1], "then": pa.array([far], pa.timestamp("us")), "v": [7]})
    rows = FeatureRows(table, ["k"], "then", ["v"])
    latest = LatestRows(spine, None, table.select(["v"]).schema)
    latest.add(rows)
    wanted = [7, 7] if far < 0 else [None, None]

    assert wanted == latest.finish()["v"].to_pylist()
    assert wanted == SortedFeatures(rows).find_latest(spine, None)["v"].to_pylist()
    assert [None, None] == SortedFeatures(rows).find_latest(spine, 60)["v"].to_pylist()


def test_a_date_is_the_midnight_at_its_start() -> None:
    spine = pa.table({"k": ["a"] * 3, "now": [NOON - dt.timedelta(days=1), NOON.replace(hour=0), NOON]})
    table = pa.table({"k": ["a", "a"], "then": [NOON.date(), NOON.date() + dt.timedelta(days=1)], "v": [1, 2]})
    rows = FeatureRows(table, ["k"], "then", ["v"])

    assert [None, 1, 1] == SortedFeatures(rows).find_latest(SpineRows(spine, ["k"], "now"), None)["v"].to_pylist()


def test_row_groups_are_left_out_where_no_row_of_theirs_can_matter() -> None:
    wanted = WantedRows(keys={"k": (10, 20)}, oldest=100, latest=200)

    assert may_match(GroupRanges(keys={"k": (20, 30)}, time=(200, 900)), wanted)
    assert may_match(GroupRanges(keys={}, time=None), wanted)
    assert not may_match(GroupRanges(keys={"k": (21, 30)}, time=(100, 900)), wanted)
    assert not may_match(GroupRanges(keys={"k": (0, 30)}, time=(201, 900)), wanted)
    assert not may_match(GroupRanges(keys={"k": (0, 30)}, time=(0, 99)), wanted)


def test_the_smallest_tables_are_kept_as_many_as_fit() -> None:
    assert (False, True, True, False) == choose_kept([70, 20, 30, 60], 100)
    assert () == choose_kept([], 100)
    assert (True, False) == choose_kept([100, 100], 100)


def test_features_of_every_type_are_put_out_as_they_are() -> None:
    """Whatever dictionaries the batches have of their own."""
    table = pa.table(
        {
            "k": [1, 2, 1, 2],
            "then": pa.array([1, 1, 2, 2], pa.timestamp("us")),
            "word": ["x", "y", "z", "x"],
            "list": [[1, 2], [3], None, [4]],
            "vector": pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float32(), 2)),
            "half": pa.array([1, 2, 3, 4], pa.float16()),
        }
    )
    names = ["word", "list", "vector", "half"]
    rows = SpineRows(pa.table({"k": [1, 2, 3], "now": pa.array([9, 1, 1], pa.timestamp("us"))}), ["k"], "now")
    batches = [table.slice(at, 1) for at in range(4)]
    encoded = [each.set_column(2, "word", each["word"].dictionary_encode()) for each in batches]
    latest = LatestRows(rows, None, encoded[0].select(names).schema)
    for each in encoded:
        latest.add(FeatureRows(each, ["k"], "then", names))
    wanted = [*table.select(names).take([2, 1]).to_pylist(), dict.fromkeys(names)]

    assert wanted == latest.finish().to_pylist()
    assert wanted == SortedFeatures(FeatureRows(table, ["k"], "then", names)).find_latest(rows, None).to_pylist()


# Whole runs of a model that gives a + b: b of the source, a of the features.

FILES, ROWS, CUSTOMERS = 3, 60, 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files of 60 rows: some rows have no customer or no time, and some customers no features."""
    random = np.random.default_rng(3)
    (tmp_path / "in").mkdir()
    for at in range(FILES):
        customers = random.integers(0, CUSTOMERS, ROWS)
        minutes = random.integers(-600, 600, ROWS)
        table = {
            "id": np.arange(at * ROWS, (at + 1) * ROWS),
            "customer": pa.array(customers, pa.int32(), mask=random.random(ROWS) < 0.05),
            "as_of": pa.array(
                [None if m % 23 == 0 else NOON + dt.timedelta(minutes=int(m)) for m in minutes], pa.timestamp("ms")
            ),
            "b": np.arange(ROWS) / 8,
        }
        pq.write_table(pa.table(table), tmp_path / "in" / f"f{at}.parquet", row_group_size=25)
    return tmp_path / "in"


def write_features(folder: Path, seed: int = 4, files: int = 3, rows: int = 80) -> Path:
    """Write features over time in row groups of seven rows, with doubled times, nulls, and none of customer 0."""
    random = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for at in range(files):
        minutes = random.integers(-900, 700, rows) // 20 * 20
        table = {
            "customer": pa.array(random.integers(1, CUSTOMERS, rows), pa.int64(), mask=random.random(rows) < 0.05),
            "updated_at": pa.array(
                [None if m % 340 == 0 else NOON + dt.timedelta(minutes=int(m)) for m in minutes], pa.timestamp("us")
            ),
            "a": random.integers(-99, 99, rows) / 4,
            "unused": ["x" * 50] * rows,
        }
        pq.write_table(pa.table(table), folder / f"part-{at}.parquet", row_group_size=7)
    return folder


@pytest.fixture
def features(tmp_path: Path) -> Path:
    return write_features(tmp_path / "features")


def make_options(features: Path | str, options: dict[str, Any] | None = None, **table: Any) -> BatchOptions:
    """Return the options of a call that joins one feature table."""
    named = {"source": str(features), "join_keys": "customer", "time": "updated_at"} | table
    given = {"key_columns": "id", "batch_size": 4, "rows_per_chunk": 24, "memory_mb": 1024, "max_reject_fraction": 1}
    return BatchOptions.model_validate({**given, "spine_time": "as_of", "features": [named], **(options or {})})


def resolve(source: Path | str, destination: Path, options: BatchOptions, contract: Contract = CONTRACT) -> RunRequest:
    resolved: Any = ToyResolved(1)
    return make_request(resolved, contract, str(source), str(destination), options)


def make_plan(source: Path | str, destination: Path, options: BatchOptions, contract: Contract = CONTRACT) -> Plan:
    """Plan a call of the toy model."""
    request = resolve(source, destination, options, contract)
    load: Any = load_toy
    run = find_run(request, open_storage(str(destination)), f"flow-{request.key}", load=load)
    assert not isinstance(run, CompleteRun)
    return run.plan


def score(plan: Plan, destination: Path, shards: int | None = None) -> ScoringResult:
    """Score what is missing of a plan, or of some shards of it; publish it once it is whole."""
    storage = open_storage(str(destination))
    scorer = Scorer(plan=plan, destination=storage, model=ToyModel(1), max_reject_fraction=1.0)
    result = ScoringResult()
    for shard in scorer.scheduler.begin()[:shards]:
        result.add(scorer.score_shard(shard))
    if len(list_parts(storage, plan)) == len(plan.chunks):
        publish(storage, confirm_plan(storage, plan), audit_parts(storage, plan))
    return result


def read_parts(plan: Plan, destination: Path) -> list[bytes]:
    return [(destination / part_path(plan, chunk)).read_bytes() for chunk in plan.chunks]


def keep(plan: Plan, *, is_kept: bool) -> Plan:
    """Return a plan whose feature tables workers keep in memory, or read from files for each chunk."""
    pins = tuple(pin.model_copy(update={"is_kept": is_kept}) for pin in plan.features)
    return plan.model_copy(update={"features": pins})


def expect(source: Path, features: Path, age_seconds: int | None = None) -> dict[int, float | None]:
    """Return the prediction of each row, by looking at all features for each."""
    spine, table = (
        pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))
        for folder in (source, features)
    )

    def pairs(read: pa.Table, time: str) -> list[tuple[Any, int | None]]:
        ticks = [None if at is None else (at - NOON) // dt.timedelta(microseconds=1) for at in read[time].to_pylist()]
        return list(zip(((each,) for each in read["customer"].to_pylist()), ticks, strict=True))

    age = None if age_seconds is None else age_seconds * 10**6
    found = find_latest(pairs(spine, "as_of"), pairs(table, "updated_at"), age)
    a = table["a"].to_pylist()
    return {
        row: None if place is None else a[place] + b
        for row, place, b in zip(spine["id"].to_pylist(), found, spine["b"].to_pylist(), strict=True)
    }


def read_scores(destination: Path) -> dict[int, float | None]:
    table = open_predictions(str(destination)).collect()
    return dict(zip(table["id"].to_list(), table["y"].to_list(), strict=True))


@pytest.mark.parametrize("age", [None, "2h"])
def test_a_run_is_the_join_by_hand_kept_or_from_files_whatever_chunks_and_interruptions(
    source: Path, features: Path, tmp_path: Path, age: str | None
) -> None:
    parts, wanted = [], expect(source, features, None if age is None else 7200)
    for at, is_kept in enumerate((True, False)):
        out = tmp_path / f"out-{at}"
        plan = keep(make_plan(source, out, make_options(features, max_age=age)), is_kept=is_kept)
        # Some shards by one process, and the others by another.
        score(plan, out, shards=1)
        score(plan, out)
        parts.append(read_parts(plan, out))
        assert wanted == read_scores(out)
    other = make_plan(
        source, tmp_path / "other", make_options(features, {"rows_per_chunk": 7, "slots": 3}, max_age=age)
    )
    score(other, tmp_path / "other")

    assert parts[0] == parts[1]
    assert wanted == read_scores(tmp_path / "other")
    assert {None} < set(wanted.values())


def test_of_several_rows_of_a_key_and_time_the_last_of_the_last_file_counts(source: Path, tmp_path: Path) -> None:
    # Files of a table may differ in the types of its columns.
    files = (
        ("b", "int32", "us", [5.0, 6.0, 7.0, 8.0]),
        ("a", "int64", "ns", pa.array([1.0, 2.0, 3.0, 4.0], pa.float32())),
    )
    for name, key, unit, values in files:
        then = pa.array([NOON - dt.timedelta(days=2)] * 4, pa.timestamp(unit))
        table = pa.table({"customer": pa.array([1, 2, 1, 2], key), "updated_at": then, "a": values})
        (tmp_path / "features").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "features" / f"{name}.parquet", row_group_size=1)
    spine = pa.concat_tables(pq.read_table(path) for path in sorted(source.glob("*.parquet"))).to_pylist()
    wanted = {row["id"]: None if row["as_of"] is None else {1: 7.0, 2: 8.0}.get(row["customer"]) for row in spine}
    for at, is_kept in enumerate((True, False)):
        out = tmp_path / f"out-{at}"
        score(keep(make_plan(source, out, make_options(tmp_path / "features")), is_kept=is_kept), out)
        got = read_scores(out)

        assert {row: None if a is None else a + row % ROWS / 8 for row, a in wanted.items()} == got


def test_rows_without_key_time_or_match_get_nulls_which_the_contract_rejects_by_name(
    source: Path, features: Path, tmp_path: Path
) -> None:
    plan = make_plan(source, tmp_path / "out", make_options(features))
    score(plan, tmp_path / "out")
    rejects = open_rejects(str(tmp_path / "out")).collect()
    spine = pl.read_parquet(source / "*.parquet")
    blank = spine.filter(pl.col("customer").is_null() | pl.col("as_of").is_null() | (pl.col("customer") == 0))

    assert set(blank["id"]) <= set(rejects["id"])
    assert {("a", "null")} == set(rejects.select("reject_column", "reject_reason").rows())
    # What a person corrects is the spine: joined features are none of its columns.
    write_rejects(str(tmp_path / "out"), tmp_path / "rejects.parquet")
    written = pl.read_parquet(tmp_path / "rejects.parquet").drop("reject_column", "reject_reason")
    assert spine.filter(pl.col("id").is_in(rejects["id"])).select("id", "b", "customer", "as_of").equals(written)
    nulls = pl.read_parquet(features / "*.parquet")
    counts = {"customer": nulls["customer"].null_count(), "updated_at": nulls["updated_at"].null_count()}
    assert counts == plan.features[0].null_rows
    assert f"{counts['customer']} have no customer, {counts['updated_at']} have no updated_at" in describe_features(
        plan.features[0]
    )


def test_row_groups_that_can_not_matter_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "features").mkdir()
    spine = {"id": [0, 1], "customer": ["m", "n"], "as_of": pa.array([NOON, NOON]), "b": [0.0, 1.0]}
    pq.write_table(pa.table(spine), tmp_path / "in" / "f.parquet")
    keys, days = ["m", "n", "a", "z", "m", "n"], [-1, -1, -1, -1, 1, -90]
    table = pa.table(
        {"customer": keys, "updated_at": [NOON + dt.timedelta(days=day) for day in days], "a": np.arange(6) * 1.0}
    )
    path = tmp_path / "features" / "f.parquet"
    pq.write_table(table, path, row_group_size=1, compression="none", use_dictionary=False, write_page_checksum=True)
    column = 2
    whole, metadata = bytearray(path.read_bytes()), pq.read_metadata(path)
    for group in range(2, 6):
        # The last byte of the value of a page whose checksum is held against it.
        chunk = metadata.row_group(group).column(column)
        whole[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(whole)
    options = make_options(tmp_path / "features", max_age="30d")
    plan = keep(make_plan(tmp_path / "in", tmp_path / "out", options), is_kept=False)
    score(plan, tmp_path / "out")
    of_all = keep(make_plan(tmp_path / "in", tmp_path / "kept", options), is_kept=True)

    assert {0: 0.0, 1: 2.0} == read_scores(tmp_path / "out")
    assert "must be readable" in str(score(of_all, tmp_path / "kept").faults_error())


def test_files_of_a_delta_table_whose_partitions_can_not_matter_are_not_read(tmp_path: Path) -> None:
    spine = {"id": [0, 1], "customer": [10, 11], "as_of": pa.array([NOON, NOON]), "b": [0.0, 1.0]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(spine), tmp_path / "in" / "f.parquet")
    # The first file by its path, of customer 10, is read for the size of a row.
    customers, days = [10, 11, 9, 12, 10, 11], [0, -1, -1, -1, 1, -90]
    times = [(NOON + dt.timedelta(days=day)).date() for day in days]
    table = pa.table({"customer": customers, "updated_at": times, "a": np.arange(6) * 1.0})
    write_deltalake(str(tmp_path / "features"), table, partition_by=["customer", "updated_at"])
    for customer, time in zip(customers[2:], times[2:], strict=True):
        (path,) = (tmp_path / "features" / f"customer={customer}" / f"updated_at={time}").iterdir()
        whole = bytearray(path.read_bytes())
        # The header of the first page; the footer stays.
        whole[4:20] = bytes(16)
        path.write_bytes(whole)
    options = make_options(tmp_path / "features", max_age="30d")
    plan = keep(make_plan(tmp_path / "in", tmp_path / "out", options), is_kept=False)
    score(plan, tmp_path / "out")
    of_all = keep(make_plan(tmp_path / "in", tmp_path / "kept", options), is_kept=True)

    assert {0: 0.0, 1: 2.0} == read_scores(tmp_path / "out")
    assert "must be readable" in str(score(of_all, tmp_path / "kept").faults_error())


def test_columns_of_two_tables_are_told_apart_by_a_prefix(source: Path, features: Path, tmp_path: Path) -> None:
    columns = tuple(Column(name=name, dtype="float64") for name in ("new_a", "old_a"))
    inputs = (CONTRACT.inputs[0].model_copy(update={"columns": columns}),)
    contract = CONTRACT.model_copy(update={"inputs": inputs})
    older = write_features(tmp_path / "older", seed=8)
    table = {"join_keys": "customer", "time": "updated_at"}
    tables = [
        {"source": str(features), "prefix": "new_", **table},
        {"source": str(older), "prefix": "old_", "columns": "a", **table},
    ]
    out = tmp_path / "out"
    plan = make_plan(source, out, make_options(features, {"features": tables}), contract)
    score(plan, out)
    new, old = (expect(source, folder) for folder in (features, older))

    assert ("new_a", "old_a") == plan.feature_names
    sums = {row: None if None in (new[row], old[row]) else new[row] + old[row] - 2 * (row % ROWS / 8) for row in new}
    assert sums == read_scores(out)


def test_a_feature_table_that_changes_between_plan_and_read_is_refused_and_the_next_call_reads_it_again(
    source: Path, features: Path, tmp_path: Path
) -> None:
    for is_kept in (True, False):
        out = tmp_path / f"out-{is_kept}"
        write_features(features, seed=4)
        plan = keep(make_plan(source, out, make_options(features)), is_kept=is_kept)
        write_features(features, seed=5)
        result = score(plan, out)

        assert not result.rows
        with pytest.raises(SourceChanged, match=r"part-0\.parquet"):
            raise result.faults_error()
        again = make_plan(source, out, make_options(features))
        score(again, out)
        assert again.key != plan.key
        assert expect(source, features) == read_scores(out)


def test_a_file_of_the_source_that_changes_fails_its_own_chunks_alone_though_several_are_joined_at_once(
    source: Path, features: Path, tmp_path: Path
) -> None:
    plan = keep(make_plan(source, tmp_path / "out", make_options(features)), is_kept=False)
    pq.write_table(pq.read_table(source / "f1.parquet").slice(1), source / "f1.parquet")
    result = score(plan, tmp_path / "out")
    hit = [at for at, chunk in plan.chunks.items() if any(piece.file == 1 for piece in chunk.pieces)]

    assert sorted(hit) == sorted(result.faults)
    assert plan.rows - sum(plan.chunk(at).rows for at in hit) == result.rows


def test_features_are_joined_to_several_chunks_at_once_where_their_table_is_read_from_files(
    source: Path, features: Path, tmp_path: Path
) -> None:
    (pin,) = keep(make_plan(source, tmp_path / "out", make_options(features)), is_kept=False).features

    assert 24 == choose_joined_rows([pin.model_copy(update={"is_kept": True})], 24)
    assert JOINED_BYTES == pytest.approx(choose_joined_rows([pin], 24) * count_joined_bytes([pin]), rel=0.01)
    assert 1 << 30 == choose_joined_rows([pin], 1 << 30)


def test_a_changed_feature_table_scores_every_row_again_and_the_same_one_none(
    source: Path, features: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    score(make_plan(source, out, make_options(features)), out)
    pq.write_table(pq.read_table(source / "f1.parquet").slice(0, 50), source / "f1.parquet", row_group_size=25)
    same = make_plan(source, out, make_options(features))
    score(same, out)
    model = ProvingModel(model=ToyModel(1), made_with=same.made_with)
    storage = open_storage(str(out))
    proof = prove_reused_parts(storage, verify_run(storage, same.run), "100%", seed=1, load=lambda _: model)
    write_features(features, seed=6, files=1)
    changed = make_plan(source, out, make_options(features))
    score(changed, out)

    assert 2 * ROWS == same.rows_reused
    assert (len(same.reused), ()) == (proof.parts_proved, proof.damages)
    assert 0 == changed.rows_reused
    assert "the files of" in changed.reuse_note
    assert expect(source, features) == read_scores(out)
    assert "complete" == verify_run(open_storage(str(out)), changed.run).state
    with_other = make_options(features, max_age="1h")
    assert {changed.shape} < {changed.shape, make_plan(source, out, with_other).shape}


def test_delta_and_iceberg_tables_are_read_as_they_were_when_the_run_was_planned(
    source: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expect(source, features)
    spine, table = (
        pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))
        for folder in (source, features)
    )
    # Of a key and time there is one row: writers of tables order rows as they like.
    rows = pl.DataFrame(table).unique(["customer", "updated_at"], keep="last", maintain_order=True)
    table = rows.to_arrow().cast(table.schema)
    configure(monkeypatch, str(tmp_path))
    lake = open_lake(str(tmp_path))
    spine = spine.set_column(2, "as_of", spine["as_of"].cast(pa.timestamp("us")))
    iceberg = lake.create_table("sales.spine", spine.schema)
    iceberg.append(spine)
    lake.create_table("sales.features", table.schema).append(table)
    write_deltalake(str(tmp_path / "delta"), table)
    options = make_options(tmp_path / "delta")
    plan = make_plan("iceberg:lake.sales.spine", tmp_path / "first", options)
    write_deltalake(str(tmp_path / "delta"), table.slice(0, 1), mode="overwrite")
    score(plan, tmp_path / "first")
    iceberg_options = make_options("iceberg:lake.sales.features")
    score(make_plan(source, tmp_path / "second", iceberg_options), tmp_path / "second")

    assert "0" == plan.features[0].snapshot.version
    assert wanted == read_scores(tmp_path / "first") == read_scores(tmp_path / "second")
    # A spine with deletes is copied first, with the columns that join; a feature table with deletes is refused.
    path = next(iter(iceberg.scan().plan_files())).file.file_path
    delete_rows(iceberg, path, [0, 1])
    score(make_plan("iceberg:lake.sales.spine", tmp_path / "third", iceberg_options), tmp_path / "third")
    assert {row: y for row, y in wanted.items() if row > 1} == read_scores(tmp_path / "third")
    with pytest.raises(SourceFormat, match="rows were deleted or columns changed"):
        make_plan(source, tmp_path / "fourth", make_options("iceberg:lake.sales.spine", time="as_of", columns="a"))


def test_tables_in_s3_and_the_newest_run_of_a_destination_are_feature_tables(
    source: Path, features: Path, tmp_path: Path, s3: S3Server
) -> None:
    address = f"s3://lake/{uuid.uuid4().hex}"
    for folder in (source, features):
        for path in sorted(folder.glob("*.parquet")):
            open_storage(f"{address}/{folder.name}").put_new(path.name, path.read_bytes())
    options = make_options(f"{address}/features")
    for is_kept in (True, False):
        out = tmp_path / f"out-{is_kept}"
        score(keep(make_plan(f"{address}/in", out, options), is_kept=is_kept), out)
        assert expect(source, features) == read_scores(out)
    # Scores of the past as features: the newest row as of each row's own time is that of the row itself, or of a twin.
    keyed = make_plan(source, tmp_path / "scores", make_options(features, {"key_columns": ["customer", "as_of"]}))
    score(keyed, tmp_path / "scores")
    columns = tuple(Column(name=name, dtype="float64") for name in ("y", "b"))
    contract = CONTRACT.model_copy(update={"inputs": (CONTRACT.inputs[0].model_copy(update={"columns": columns}),)})
    past = make_options(tmp_path / "scores", time="as_of")
    plan = make_plan(source, tmp_path / "again", past, contract)
    score(plan, tmp_path / "again")

    assert keyed.run == plan.features[0].snapshot.version
    with_score = [row for row, y in expect(source, features).items() if y is not None]
    assert set(with_score) >= {row for row, y in read_scores(tmp_path / "again").items() if y is not None} > set()


def test_a_key_may_have_any_name_and_be_in_the_paths_of_the_files(tmp_path: Path) -> None:
    spine = {"id": [0, 1, 2, 3], "__code": ["de", "fr", "de", None], "as_of": [NOON] * 4, "b": [0.0, 1.0, 2.0, 3.0]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(spine), tmp_path / "in" / "f.parquet")
    for country, a in (("de", 5.0), ("fr", 6.0)):
        (tmp_path / "features" / f"__code={country}").mkdir(parents=True)
        table = pa.table({"updated_at": [NOON - dt.timedelta(days=1)] * 2, "a": [1.0, a]})
        pq.write_table(table, tmp_path / "features" / f"__code={country}" / "f.parquet", row_group_size=1)
    for is_kept in (True, False):
        out = tmp_path / f"out-{is_kept}"
        plan = make_plan(tmp_path / "in", out, make_options(tmp_path / "features", join_keys="__code"))
        score(keep(plan, is_kept=is_kept), out)

        assert {0: 5.0, 1: 7.0, 2: 7.0, 3: None} == read_scores(out)


def test_an_arrow_file_is_a_spine_and_text_has_no_times(source: Path, features: Path, tmp_path: Path) -> None:
    spine = pl.read_parquet(source / "*.parquet")
    spine.write_ipc(tmp_path / "spine.arrow")
    spine.write_csv(tmp_path / "spine.csv")
    score(make_plan(tmp_path / "spine.arrow", tmp_path / "out", make_options(features)), tmp_path / "out")

    assert expect(source, features) == read_scores(tmp_path / "out")
    with pytest.raises(SchemaMismatch, match="'as_of' must be a date or a timestamp, got string"):
        make_plan(tmp_path / "spine.csv", tmp_path / "text", make_options(features))


def test_lineage_has_each_feature_table_as_an_input_and_says_which_columns_came_from_it(
    source: Path, features: Path, tmp_path: Path
) -> None:
    plan = make_plan(source, tmp_path / "out", make_options(features))
    (table,) = describe_feature_tables(plan)
    begun = build_event(_Event(moment="START", plan=plan, destination=str(tmp_path / "out"), parent=None), NOON)
    (output,) = begun.outputs
    lineage = _make_column_lineage(plan, describe_input(plan), [table])

    assert (str(features), "files", 240, 3) == (table.address, table.kind, table.rows, table.files)
    assert ["customer", "updated_at", "a"] == table.schema.names
    assert [str(source), str(features)] == [each.name for each in begun.inputs]
    assert str(tmp_path / "out") == output.name
    fields = [(each.name, each.field) for each in lineage.fields["y"].inputFields]
    assert [(str(source), "b"), (str(features), "a")] == fields


# What is refused.


def cast(path: Path, column: str, kind: pa.DataType) -> None:
    """Write every file of a folder again with a column of another type."""
    for file in path.glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.set_column(table.column_names.index(column), column, table[column].cast(kind)), file)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"spine_time": "asof"}, SchemaMismatch, "spine_time 'asof' once, .*did you mean 'as_of'.*as_of"),
        ({"join_keys": ("customer", "unused")}, SchemaMismatch, "the key 'unused' once, .*columns found at .*: id "),
        (
            {"join_keys": ("client",)},
            SchemaMismatch,
            "Feature table .*the column 'client' once.*columns found: customer ",
        ),
        ({"time": "updated"}, SchemaMismatch, "the column 'updated' once; did you mean 'updated_at'"),
        ({"columns": ("a", "aa")}, SchemaMismatch, "the column 'aa' once"),
        ({"time": "unused"}, SchemaMismatch, "'unused' must be a date or a timestamp, got string"),
        ({"prefix": "no_"}, BadInput, "The model must read a column of it, got none: the model reads a, b"),
        ({"source": "no/such/table"}, SourceNotFound, "Feature table no/such/table: "),
        ({"source": "block:lake"}, BadInput, "Feature table block:lake: .*batch_inference alone takes blocks"),
    ],
)
def test_what_is_not_there_is_refused_by_its_name(
    source: Path, features: Path, tmp_path: Path, given: dict[str, Any], error: type[BadInput], words: str
) -> None:
    options = {name: given[name] for name in given if name == "spine_time"}
    table = {name: given[name] for name in given if name != "spine_time"}
    with pytest.raises(error, match=words) as refused:
        make_plan(source, tmp_path / "out", make_options(features, options, **table))

    assert 12 >= str(refused.value).count("\n") + 1
    assert not (tmp_path / "out" / "_overnight").exists()


@pytest.mark.parametrize(
    ("side", "column", "kind", "words"),
    [
        ("features", "customer", pa.string(), "must be of one kind in both tables, .* got int32 .* string here"),
        ("source", "customer", pa.float64(), "must be of one kind in both tables, .* got double"),
        ("features", "customer", pa.uint64(), "must be of one kind in both tables, .* uint64 here"),
        ("features", "updated_at", pa.timestamp("us", "UTC"), "must both have a zone, or both none, .*tz=UTC"),
        ("source", "as_of", pa.timestamp("us", "UTC"), "must both have a zone, or both none"),
        ("source", "as_of", pa.int64(), "'as_of' must be a date or a timestamp, got int64"),
    ],
)
def test_keys_and_times_that_can_not_be_compared_are_refused(
    source: Path, features: Path, tmp_path: Path, side: str, column: str, kind: pa.DataType, words: str
) -> None:
    cast(source if side == "source" else features, column, kind)
    with pytest.raises(SchemaMismatch, match=words):
        make_plan(source, tmp_path / "out", make_options(features))


def test_a_column_of_two_tables_and_a_table_without_rows_are_refused(
    source: Path, features: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(features / "part-0.parquet").slice(0, 0), empty)
    with pytest.raises(SourceEmpty, match=f"Feature table {empty}: .*at least one row"):
        make_plan(source, tmp_path / "out", make_options(empty))
    pl.read_parquet(features / "*.parquet").with_columns(b=pl.lit(1.0)).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(BadInput, match=r"must be in one table, got \['b'\] in the source too"):
        make_plan(source, tmp_path / "out", make_options(tmp_path / "b.parquet"))
    twice = [{"source": str(features), "join_keys": "customer", "time": "updated_at"}] * 2
    with pytest.raises(BadInput, match="must be in one table, got 'a' in the feature tables"):
        make_plan(source, tmp_path / "out", make_options(features, {"features": twice}))
    (tmp_path / "rows.csv").write_text("customer,updated_at,a\n1,2026-01-01,2\n")
    with pytest.raises(SourceFormat, match=r"must be Parquet files.*got files of csv"):
        make_plan(source, tmp_path / "out", make_options(tmp_path / "rows.csv"))


def joined(times: int = 1, **given: Any) -> dict[str, Any]:
    return {"features": [{"source": "x", "join_keys": "k", "time": "t", **given}] * times}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (joined(max_age="-3d"), "zero or more, .* got '-3d'"),
        (joined(max_age="3 months"), "got '3 months'"),
        (joined(max_age="99999d"), "at most 36500d"),
        (joined(17), "at most 16 items"),
        (joined(join_keys=[]), "at least 1 item"),
        (joined(join_keys=["k", "k"]), r"must be different columns, got \['k'\]"),
        (joined(time="k"), r"must be other columns than time .*\['k'\]"),
        (joined(0), "spine_time must name the source's column of time where features are given, and only there"),
        ({"spine_time": None, **joined()}, "got spine_time=None and 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BatchOptions.model_validate({"spine_time": "as_of", **given})


def test_a_join_is_a_plain_value_of_json_from_the_command_line_and_in_a_plan(
    source: Path, features: Path, tmp_path: Path
) -> None:
    document = {
        "spine_time": "as_of",
        "features": [{"source": str(features), "join_keys": ["customer"], "time": "updated_at"}],
    }
    options = build_model(BatchOptions, {"key_columns": ["id"]}, json.dumps(document), "--options")
    plan = make_plan(source, tmp_path / "out", options)

    assert options == BatchOptions.model_validate_json(options.model_dump_json())
    assert plan == Plan.model_validate_json(plan.model_dump_json())
    assert "features" not in BatchOptions().key_fields()
    with pytest.raises(ValidationError, match="must have no features"):
        ProfileOptions(batch_options=options)


def test_the_memory_of_a_join_is_bounded_by_its_chunks_and_stated(source: Path, features: Path, tmp_path: Path) -> None:
    plan = make_plan(source, tmp_path / "out", make_options(features))
    large = {"decoded": 1 << 30, "keys": 1 << 20}
    grown = [
        file.model_copy(update={"group_bytes": tuple(sizes._replace(**large) for sizes in file.group_bytes)})
        for file in plan.features[0].snapshot.files
    ]
    pin: FeaturePin = plan.features[0]
    snapshot = pin.snapshot.model_copy(update={"files": tuple(grown)})
    huge = plan.model_copy(update={"features": (pin.model_copy(update={"snapshot": snapshot}),)})
    kept, streamed = keep(huge, is_kept=True), keep(huge, is_kept=False)

    assert 0 == feature_bytes(plan.model_copy(update={"features": ()}), 2)
    assert feature_bytes(streamed, 1) < huge.features[0].decoded_bytes < feature_bytes(kept, 1)
    assert feature_bytes(kept, 1) < feature_bytes(kept, 2, 1) < feature_bytes(kept, 2, 2)
    options = make_options(features, {"memory_mb": 1 << 20})
    without = plan.model_copy(update={"features": ()})
    assert check_memory(plan, 1, options) - check_memory(without, 1, options) == feature_bytes(plan, 1)


def test_blocks_of_a_chunk_have_the_features_of_their_own_rows(source: Path, features: Path, tmp_path: Path) -> None:
    plan = make_plan(source, tmp_path / "out", make_options(features))
    whole = Chunk(pieces=tuple(piece for chunk in plan.chunks.values() for piece in chunk.pieces))
    lookup = FeatureLookup(plan.features)
    tables = [pa.concat_tables(open_joined_reader(plan, lookup).blocks(whole, rows)) for rows in (3, 1000)]

    assert tables[0].to_pydict() == tables[1].to_pydict()
    assert {"b", "id", "customer", "as_of", "a"} == set(tables[0].column_names)
