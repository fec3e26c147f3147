"""Digests stay as they are from one release to the next: by them a plan that was written is finished after an update.

Where one of these must change, the plans of the release before can't be finished any more: FORMAT_VERSION goes up, and
CHANGELOG.md says so.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from serving.model.interface import Engine
from serving.model.pin import ModelPin
from tasks.batch.chunk_layout import Chunk, Piece
from tasks.batch.dataset import Snapshot, SourceFile
from tasks.batch.feature_pins import FeaturePin
from tasks.batch.feature_table import FeatureTable
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Challenger, Plan, digest_chunk, digest_plan, digest_shape, record_path, run_key
from tests.tasks.batch.small import PIN, a_contract


def a_model(version: str) -> ModelPin:
    return PIN.model_copy(update={"version": version, "digest": version * 64})


FILES = (
    SourceFile(path="day=1/a.parquet", size=9, tag="t1", row_groups=(6, 2), read_as={"a": "int32", "other": "int8"}),
    SourceFile(path="day=2/b.parquet", size=8, tag="t2", row_groups=(4,), origin="b.csv", origin_row=5, content="c"),
)
CHUNKS = (
    Chunk(pieces=(Piece(file=0, row_group=0, row_start=0, row_stop=4),)),
    Chunk(
        pieces=(
            Piece(file=0, row_group=0, row_start=4, row_stop=6),
            Piece(file=0, row_group=1, row_start=0, row_stop=2),
            Piece(file=1, row_group=0, row_start=0, row_stop=4),
        )
    ),
)
FEATURES = FeaturePin(
    table=FeatureTable(source="/features", join_keys=("id",), time="at", prefix="f_"),
    snapshot=Snapshot(
        root="/features",
        format="parquet",
        files=(
            SourceFile(path="part=x/f.parquet", size=7, tag="t3", row_groups=(3,), read_as={"n": "int16"}),
            SourceFile(path="part=y/f.parquet", size=6, tag="t4", row_groups=(1,)),
        ),
    ),
    columns=("n", "beside"),
    partitions={"part": "string", "beside": "string"},
    is_kept=True,
    null_rows={},
)


def a_written_plan(*, version: int, key_columns: tuple[str, ...] = ("id",), **change: object) -> Plan:
    """Return a plan of two files in two chunks, as it is written."""
    options = BatchOptions(key_columns=key_columns, rows_per_chunk=8)
    source = Snapshot(root="/in", format="parquet", files=FILES)
    plan = Plan(
        format_version=version,
        key="k" * 32,
        run="nightly",
        order=7,
        planned_at=datetime(2026, 1, 2, tzinfo=UTC),
        model=a_model("3"),
        contract=a_contract("a", "f_n"),
        options=options,
        source=source,
        snapshot=source.model_copy(update={"columns_missing": ("gone",)}),
        columns=("a", *key_columns),
        partitions={"day": "string"},
        batch_size=4,
        batch_unit="rows",
        engine=Engine(threads=2),
        tuning=None,
        row_bytes=8.0,
        rows=12,
        shape="s" * 32,
        made_with=("numpy 2", "x86"),
        shards=((CHUNKS[0],), (CHUNKS[1],)),
    )
    return plan.model_copy(update=change)


CHALLENGER = Challenger(
    model=a_model("4"),
    contract=a_contract("a", "b"),
    columns=("a", "b"),
    batch_size=2,
    batch_unit="rows",
    engine=Engine(),
    environment="model",
    made_with=("numpy 1",),
)
OTHER = CHALLENGER.model_copy(update={"environment": "caller", "batch_size": 3, "columns": ("b", "id")})
PLANS: dict[str, dict[str, Any]] = {
    "version 1": {"version": 1},
    "version 2": {"version": 2},
    "without keys": {"version": 2, "key_columns": ()},
    "without keys, version 1": {"version": 1, "key_columns": ()},
    "in an environment of its own": {"version": 1, "environment": "model"},
    "with features": {"version": 2, "features": (FEATURES,)},
    "with challengers": {
        "version": 2,
        "challengers": (CHALLENGER, OTHER),
        "columns_beside": ("b",),
        "columns_kept": ("b",),
    },
}


def short(digest: str) -> str:
    assert len(digest) == 64
    return digest[:8]


DIGESTS = {
    "version 1": ("adf4ee08", "2eb51e3b", "71375864"),
    "version 2": ("8045667b", "ef5d0654", "a74246b0"),
    "without keys": ("a1d38af4", "a76d4891", "8256a453"),
    "without keys, version 1": ("8a6be30d", "2eb51e3b", "71375864"),
    "in an environment of its own": ("ae830c53", "2eb51e3b", "71375864"),
    "with features": ("8045667b", "16c4022a", "c5bfd69d"),
    "with challengers": ("31ec71ec", "ef5d0654", "a74246b0"),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_digests_of_a_plan_and_of_its_chunks_stay(name: str) -> None:
    plan = a_written_plan(**PLANS[name])

    assert DIGESTS[name] == (short(digest_plan(plan)), *(short(digest_chunk(plan, chunk)) for chunk in CHUNKS))


def test_the_digests_of_challengers_stay_and_their_plans_are_of_their_own() -> None:
    plan = a_written_plan(**PLANS["with challengers"], reuse_note="of the run")
    plans = plan.challenger_plans

    assert [
        ("8bfef608", "d92bb92385b55868a295169699e06f67", "962fc300"),
        ("e71cc76c", "d92bb92385b55868a295169699e06f67", "26866282"),
    ] == [(short(each.digest), each.shape, short(digest_chunk(each, CHUNKS[1]))) for each in plans]
    assert [1, 2] == [each.place for each in plans]
    assert {((), (), (), "", None)} == {
        (each.challengers, each.columns_beside, each.reused, each.reuse_note, each.tuning) for each in plans
    }
    assert [("a", "b", "id"), ("b", "id")] == [each.columns for each in plans]
    assert [f"{plan.folder}/challengers/{each.place}" for each in plans] == [each.parts_folder for each in plans]


def test_the_keys_of_runs_and_the_names_of_their_records_stay() -> None:
    plan = a_written_plan(version=2)
    features = (FEATURES.snapshot,)
    challengers = ((CHALLENGER.model, CHALLENGER.contract),)
    given = plan.model, plan.source, plan.contract, plan.options

    assert [
        "0a6d3d1720ae34ab6758e5d31b48bbb4",
        "735fca981390371bd8829eff288afe8c",
        "d36294c043fa9443bddef73f01b3ff83",
    ] == [run_key(*given), run_key(*given, features), run_key(*given, features, challengers)]
    assert "162a0d7dfbb86b7262d8dbf17fc68636" == digest_shape(plan.model, plan.contract, plan.options)
    assert "_overnight/nightly/gate-0123456789ab.json" == record_path("nightly", "0123456789abcdef", "gate")
    assert "_overnight/nightly/gate.json" == record_path("nightly", "", "gate")
