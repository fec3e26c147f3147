"""Challengers score what the model scores in the same read, change none of its bytes, and are compared exactly."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.models import infer_signature
from pydantic import ValidationError
from sklearn import metrics
from sklearn.dummy import DummyClassifier

from serving.errors import (
    BadInput,
    DestinationUnusable,
    KeysUnfit,
    ModelFailed,
    ModelNotFound,
    OvernightError,
    SchemaMismatch,
    SourceEmpty,
    StorageFault,
)
from serving.model.contract import Contract, Output
from serving.model.encoding import Encoded
from serving.model.interface import Engine
from serving.model.registry import resolve_model
from tasks.batch.backfill import Partitions, list_pieces
from tasks.batch.challenger_rules import Labels, PromoteIf
from tasks.batch.challengers import find_label_kind, resolve_challengers
from tasks.batch.clean import clean
from tasks.batch.compare import compare_challenger
from tasks.batch.comparison import (
    ChallengerComparison,
    ChallengersRecord,
    LabelComparison,
    Promotion,
    RunComparison,
    challengers_path,
    judge_promotion,
)
from tasks.batch.comparison_plot import describe_challenger, draw_comparison, tabulate_comparison
from tasks.batch.comparison_records import (
    audit_challengers,
    compare_challengers,
    compare_published,
    find_comparison,
    list_missing_chunks,
    save_challenger_parts,
)
from tasks.batch.exact_deciles import find_deciles, place_in_deciles
from tasks.batch.label_metrics import ROWS_EXACT, RocArea, finish_metric, measure_labels
from tasks.batch.labels import join_labels, open_label_table
from tasks.batch.manifest import Manifest, open_predictions
from tasks.batch.memory import memory_bytes
from tasks.batch.options import BatchOptions
from tasks.batch.parts import (
    count_done,
    give_up_challenger,
    list_done,
    list_parts,
    part_path,
    read_given_up,
    write_part,
)
from tasks.batch.plan import Challenger, Plan, digest_plan, run_key
from tasks.batch.promotion import check_alias
from tasks.batch.publish import audit_parts, publish
from tasks.batch.run_records import save_plan
from tasks.batch.run_request import make_request
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.batch.verify import verify_run
from tasks.storage import LocalStorage, Storage, open_storage
from tests.support import register_script
from tests.tasks.batch.small import PIN, a_contract, a_plan, numbers, put

OPTIONS = BatchOptions(key_columns=("id",), rows_per_chunk=10)


class Formula:
    """A model that multiplies the sum of its inputs; may write to its inputs, and fail on some rows or on all."""

    slots = 2

    def __init__(self, factor: float = 1.0, fails: Any = None, *, writes: bool = False) -> None:
        self.factor, self.fails, self.writes = factor, fails, writes
        self.rows = 0

    def prepare(self, encoded: Encoded) -> Encoded:
        return encoded

    @contextmanager
    def slot(self) -> Generator[None]:
        yield

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        x_NF = inputs["x"]
        if self.fails is not None and self.fails(x_NF[:, 0]).any():
            message = "no such thing"
            raise ValueError(message)
        self.rows += len(x_NF)
        score = x_NF.sum(axis=1) * np.float32(self.factor)
        if self.writes:
            x_NF[:] = -1.0
        return {"score": score}


def challenge(plan: Plan, *contracts: Contract, batch_size: int = 3, kept: tuple[str, ...] = ()) -> Plan:
    """Return a plan with a challenger for each contract."""
    challengers = tuple(
        Challenger(
            model=PIN.model_copy(update={"version": str(at), "digest": f"{at:064x}"}),
            contract=contract,
            columns=tuple(column.name for column in contract.columns),
            batch_size=batch_size,
            batch_unit="rows",
            engine=Engine(),
        )
        for at, contract in enumerate(contracts, start=4)
    )
    wanted = [name for each in challengers for name in each.columns]
    beside = tuple(name for name in dict.fromkeys([*wanted, *kept]) if name not in plan.columns)
    update = {"challengers": challengers, "columns_beside": beside, "columns_kept": kept, "beside_bytes": 8.0}
    planned = plan.model_copy(update=update)
    return planned.model_copy(update={"digest": digest_plan(planned)})


def score(plan: Plan, destination: Storage, *models: Formula, fraction: float = 1.0, slots: int = 2) -> ScoringResult:
    champion, *others = models
    scorer = Scorer(
        plan=plan, destination=destination, model=champion, challengers=others, max_reject_fraction=fraction
    )
    done = ScoringResult()
    with ThreadPoolExecutor(slots) as pool:
        for scored in pool.map(scorer.score_shard, scorer.scheduler.begin()):
            done.add(scored)
    return done


def read_parts(plan: Plan, destination: Storage) -> dict[str, bytes]:
    parts = list_parts(destination, plan)
    return {str(chunk): bytes(destination.read(entry.path) or b"") for chunk, entry in parts.items()}


def read_table(plan: Plan, destination: Storage) -> pl.DataFrame:
    paths = sorted(entry.path for entry in list_parts(destination, plan).values())
    return pl.concat([pl.read_parquet(destination.address(path)) for path in paths]).sort("id")


@pytest.fixture
def source(tmp_path: Path) -> str:
    tables = {}
    for at in range(4):
        table = numbers(at * 100, at * 100 + 100)
        rows = np.arange(at * 100, at * 100 + 100)
        table = table.append_column("c", pa.array(rows, pa.float32()))
        table = table.append_column("region", pa.array([f"r{row % 3}" for row in rows]))
        tables[f"{at}.parquet"] = table.append_column("label", pa.array(rows * 2.5, mask=rows % 10 == 0))
    return put(str(tmp_path / "source"), tables)


@pytest.fixture
def plan(source: str, tmp_path: Path) -> Plan:
    return a_plan(source, str(tmp_path / "scores"), OPTIONS, batch_size=5, slots=2)


@pytest.fixture
def destination(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "scores"))


@settings(max_examples=15)
@given(
    groups=st.lists(st.lists(st.integers(1, 23), min_size=1, max_size=3), min_size=1, max_size=3),
    rows_per_chunk=st.integers(1, 30),
    batch_sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    left=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 9))),
)
def test_any_partition_and_any_parts_that_are_there_give_each_model_every_row_once(
    groups: list[list[int]], rows_per_chunk: int, batch_sizes: tuple[int, int], left: set[tuple[int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows, files = 0, {}
        for at, file in enumerate(groups):
            files[f"{at}.parquet"] = numbers(rows, rows + sum(file))
            rows += sum(file)
        source = put(f"{folder}/source", files)
        options = BatchOptions(key_columns=("id",), rows_per_chunk=rows_per_chunk)
        plain = a_plan(source, f"{folder}/plain", options, batch_size=batch_sizes[0])
        challenged = challenge(
            a_plan(source, f"{folder}/scores", options, batch_size=batch_sizes[0]),
            *(a_contract("a", "b"), a_contract("a")),
            batch_size=batch_sizes[1],
        )
        one, other = open_storage(f"{folder}/plain"), open_storage(f"{folder}/scores")
        score(plain, one, Formula())
        score(challenged, other, Formula(), Formula(3.0), Formula(5.0))
        plans = (challenged, *challenged.challenger_plans)
        before = [read_parts(each, other) for each in plans]
        chunks = list(challenged.chunks)
        gone = [part_path(plans[place], chunks[at % len(chunks)]) for place, at in left]
        other.delete(gone)
        again = [Formula(), Formula(3.0), Formula(5.0)]
        done = score(challenged, other, *again)

        assert read_parts(plain, one) == read_parts(challenged, other)
        assert before == [read_parts(each, other) for each in plans]
        assert [list(range(rows))] * 3 == [read_table(each, other)["id"].to_list() for each in plans]
        tables = [read_table(each, other)["score"].to_list() for each in plans]
        assert [
            [2.0 * n for n in range(rows)],
            [6.0 * n for n in range(rows)],
            [5.0 * n for n in range(rows)],
        ] == tables
        assert len(set(gone)) == done.parts_put
        assert (sum(each.rows for each in again) > 0) == bool(gone)


def test_a_challenger_scores_what_it_scores_alone_though_models_write_to_their_inputs(
    plan: Plan, destination: Storage, tmp_path: Path
) -> None:
    both = challenge(plan, a_contract("a", "b"), batch_size=5)
    score(both, destination, Formula(1.0, writes=True), Formula(2.0, writes=True))
    alone = open_storage(str(tmp_path / "alone"))
    score(plan, alone, Formula(2.0))

    assert read_table(plan, alone).equals(read_table(both.challenger_plans[0], destination))
    assert [2.0 * row for row in range(400)] == read_table(both, destination)["score"].to_list()


def test_rejects_of_one_model_are_no_rejects_of_the_other(plan: Plan, destination: Storage) -> None:
    both = challenge(plan, a_contract("a", "b"), batch_size=5)
    score(both, destination, Formula(fails=lambda a: a == 7), Formula(2.0, fails=lambda a: (a > 20) & (a < 24)))
    ours, theirs = read_table(both, destination), read_table(both.challenger_plans[0], destination)
    compared = compare_challenger(destination, both, both.challenger_plans[0])

    assert [7] == ours.filter(pl.col("score").is_null())["id"].to_list()
    assert [21, 22, 23] == theirs.filter(pl.col("score").is_null())["id"].to_list()
    assert (396, 1, 3, 0) == (
        *(compared.rows, compared.rejects_champion_only),
        *(compared.rejects_challenger_only, compared.rejects_both),
    )


def test_rows_that_either_model_predicts_a_null_for_are_counted_and_not_compared(
    source: str, destination: Storage
) -> None:
    class Unsure(Formula):
        def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            (score,) = super().predict(inputs).values()
            return {"score": np.where((score >= 40) & (score < 50), np.nan, score)}

    optional = a_contract("a", "b", outputs=(Output(name="score", dtype="float32", required=False),))
    wanted = {"labels": Labels(column="label"), "segment_columns": ("region",), "challengers": ("models:/churn/4",)}
    options = OPTIONS.model_copy(update=wanted)
    plan = a_plan(source, destination.url, options, contract=optional, batch_size=5)
    both = challenge(plan, optional, kept=("region", "label"))
    publish_run(both, destination, Unsure(), Unsure(0.5))
    compared = compare_challenger(destination, both, both.challenger_plans[0])
    labels = compared.labels

    assert (385, 5, 10, 0) == (
        *(compared.rows, compared.rejects_champion_only),
        *(compared.rejects_challenger_only, compared.rejects_both),
    )
    assert 399.0 == compared.outputs[0].difference_max
    assert labels is not None
    assert (True, True) == (labels.rows > 300, all(each >= 0 for each in labels.champion.values()))
    assert 385 == sum(each.rows for each in compared.segments)
    assert "complete" == verify_run(destination, plan.run).state


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_a_challenger_that_fails_is_given_up_and_the_run_goes_on(
    plan: Plan, destination: Storage, fraction: float
) -> None:
    both = challenge(plan, a_contract("a", "b"), a_contract("a"), batch_size=5)
    fails = (lambda a: a >= 0) if fraction == 1.0 else (lambda a: a % 10 != 1)
    score(both, destination, Formula(), Formula(2.0, fails=fails), Formula(3.0), fraction=fraction)
    broken, good = both.challenger_plans
    why = read_given_up(destination, broken) or ""

    assert ("At least one row of the first batch" if fraction == 1.0 else "at most 0.1 of 400 rows") in why
    assert (400, len(both.chunks)) == count_done(destination, both)
    assert set(both.chunks) == list_done(destination, both) == set(list_parts(destination, good))
    assert 400 == read_table(both, destination).height
    assert compare_challenger(destination, both, broken).given_up == why
    assert "given up" in describe_challenger(compare_challenger(destination, both, broken))["challenger churn v4"]


class Unprepared(Formula):
    """A model that can't prepare its inputs."""

    def prepare(self, encoded: Encoded) -> Encoded:
        message = "no tokenizer"
        raise RuntimeError(message)


def test_a_challenger_that_can_not_prepare_its_inputs_is_given_up(plan: Plan, destination: Storage) -> None:
    both = challenge(plan, a_contract("a", "b"), a_contract("a"))
    score(both, destination, Formula(), Unprepared(), Formula(2.0))
    with pytest.raises(RuntimeError, match="no tokenizer"):
        score(plan.model_copy(update={"run": "other"}), destination, Unprepared())

    assert "RuntimeError: no tokenizer" == read_given_up(destination, both.challenger_plans[0])
    assert set(both.chunks) == list_done(destination, both)


def test_the_model_of_the_run_still_fails_it(plan: Plan, destination: Storage) -> None:
    both = challenge(plan, a_contract("a", "b"))
    with pytest.raises(ModelFailed):
        score(both, destination, Formula(fails=lambda a: a >= 0), Formula())


def publish_run(plan: Plan, destination: Storage, *models: Formula) -> Manifest:
    score(plan, destination, *models)
    save_plan(destination, plan)
    audits = audit_challengers(destination, plan)
    assert not list_missing_chunks(audits)
    save_challenger_parts(destination, plan, audits)
    return publish(destination, plan, audit_parts(destination, plan))


def test_readers_never_mix_models_and_cleaning_keeps_the_parts_of_challengers_as_long_as_their_run(
    plan: Plan, destination: Storage, source: str
) -> None:
    both = challenge(plan, a_contract("a", "b"), kept=("region",))
    manifest = publish_run(both, destination, Formula(), Formula(2.0))
    everything = {entry.path for entry in destination.entries()}
    kept = clean(destination, delete=True)
    newer = challenge(
        a_plan(source, destination.url, OPTIONS.model_copy(update={"name": "newer"}), batch_size=5), a_contract("b")
    )
    publish_run(newer, destination, Formula(), Formula(3.0))
    dropped = clean(destination, keep=1, delete=True)
    left = {entry.path for entry in destination.entries()}

    assert ["id", "score", "reject_column", "reject_reason"] == open_predictions(
        destination.url
    ).collect_schema().names()
    assert (400, 0) == (open_predictions(destination.url, "newer").collect().height, kept.objects)
    assert (manifest.run,) == dropped.runs_dropped
    assert not [path for path in left if manifest.run in path and "/order/" not in path]
    assert len([path for path in everything if "/challengers/1/part-" in path]) == len(both.chunks)
    assert set(list_parts(destination, newer.challenger_plans[0])) == set(newer.chunks)
    assert "complete" == verify_run(destination, "newer").state


def test_a_part_of_a_challenger_that_was_cut_is_found_and_scored_again(plan: Plan, destination: Storage) -> None:
    both = challenge(plan, a_contract("a", "b"))
    score(both, destination, Formula(), Formula(2.0))
    path = Path(destination.url) / part_path(both.challenger_plans[0], (0, 1))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    missing = list_missing_chunks(audit_challengers(destination, both))
    champion = Formula()
    score(both, destination, champion, Formula(2.0))

    assert {(0, 1)} == missing
    assert whole == path.read_bytes()
    assert 0 == champion.rows


def damage_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 2] ^= 1
    path.write_bytes(data)


def blank_scores(path: Path) -> None:
    table = pq.read_table(path)
    path.write_bytes(write_part(table.set_column(1, "score", pa.nulls(table.num_rows, pa.float32()))))


def drop_segment(path: Path) -> None:
    path.write_bytes(write_part(pq.read_table(path).drop_columns(["source.region"])))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "The part must be there, but is gone"),
        (damage_page, "bytes: The part must have the bytes that it was written with"),
        (blank_scores, "rejects: Its column 'score' must be null in rejects and nowhere else"),
        (drop_segment, "schema: Its columns must be"),
    ],
)
def test_a_damaged_part_of_a_challenger_is_named_by_a_verification(
    plan: Plan, destination: Storage, damage: Callable[[Path], None], told: str
) -> None:
    both = challenge(plan, a_contract("a", "b"), a_contract("a"), kept=("region",))
    publish_run(both, destination, Formula(fails=lambda a: a == 7), Formula(2.0, fails=lambda a: a == 9), Formula(3.0))
    before = verify_run(destination, plan.run)
    path = part_path(both.challenger_plans[0], (0, 1))
    damage(Path(destination.url) / path)
    found = verify_run(destination, plan.run)

    assert ("complete", 2 * len(both.chunks), ()) == (before.state, before.challenger_parts_read, before.damages)
    assert ("damaged", len(both.chunks)) == (found.state, found.parts_read)
    assert {("challenger", path)} == {(each.kind, each.path) for each in found.damages}
    assert any(told in each.message and "models:/churn/4" in each.message for each in found.damages)


def test_a_list_of_the_parts_of_challengers_that_was_edited_or_is_gone_is_named(
    plan: Plan, destination: Storage
) -> None:
    both = challenge(plan, a_contract("a", "b"))
    publish_run(both, destination, Formula(), Formula(2.0))
    path = Path(destination.url) / challengers_path(both.run, both.digest)
    record = json.loads(path.read_text())
    edited = json.loads(path.read_text())
    edited["challengers"][0]["parts"][1]["rows"] += 1
    other = {**record, "plan_digest": "0" * 64}
    unnamed = {**record, "challengers": []}
    told = []
    for each in (edited, other, unnamed, {}, None):
        path.unlink() if each is None else path.write_text(json.dumps(each))
        found = verify_run(destination, plan.run)
        assert "damaged" == found.state
        assert {"challenger"} == {damage.kind for damage in found.damages}
        told.append(" ".join(damage.message for damage in found.damages))

    assert "It must hold the 11 rows that challengers.json has, got 10" in told[0]
    assert "It must be of plan" in told[1]
    assert "It must name this challenger as number 1, got nothing" in told[2]
    assert "must be there once their run is published, but is gone" in told[4]


class ForgetfulStorage(LocalStorage):
    """Says that it has stored what it has not."""

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        return True


@pytest.mark.parametrize(("standing", "error"), [("none", StorageFault), ("torn", DestinationUnusable)])
def test_a_run_is_not_published_without_its_own_list_of_the_parts_of_challengers(
    plan: Plan, destination: Storage, standing: str, error: type[OvernightError]
) -> None:
    both = challenge(plan, a_contract("a", "b"))
    score(both, destination, Formula(), Formula(2.0))
    storage = ForgetfulStorage(Path(destination.url)) if standing == "none" else destination
    if standing == "torn":
        storage.put_new(challengers_path(both.run, both.digest), b'{"run"')

    with pytest.raises(error, match="challengers"):
        save_challenger_parts(storage, both, audit_challengers(storage, both))


def test_nothing_that_was_kept_of_another_plan_of_the_same_name_is_taken_for_the_runs_own(
    plan: Plan, destination: Storage
) -> None:
    before, now = challenge(plan, a_contract("a", "b")), challenge(plan, a_contract("a"))
    give_up_challenger(destination, before.challenger_plans[0], "no such thing")
    publish_run(before, destination, Formula(), Formula(2.0))
    compare_published(destination, before, None)
    score(now, destination, Formula(), Formula(2.0))
    save_challenger_parts(destination, now, audit_challengers(destination, now))
    listed = ChallengersRecord.model_validate_json(destination.read(challengers_path(now.run, now.digest)) or b"")

    assert read_given_up(destination, now.challenger_plans[0]) is None
    assert (now.digest, None) == (listed.plan_digest, listed.challengers[0].given_up)
    assert find_comparison(destination, before) is not None
    assert find_comparison(destination, now) is None


def test_challengers_that_were_given_up_or_are_not_done_are_told_and_are_no_damage(
    plan: Plan, destination: Storage
) -> None:
    both = challenge(plan, a_contract("a", "b"), a_contract("a"))
    save_plan(destination, both)
    score(both, destination, Formula(), Formula(2.0), Formula(fails=lambda a: a >= 0))
    Path(destination.url, part_path(both.challenger_plans[0], (0, 0))).unlink()
    found = verify_run(destination, plan.run)

    assert ("incomplete", ()) == (found.state, found.damages)
    assert any("models:/churn/5 was given up, and its parts were not read: " in note for note in found.notes)
    assert f"1 of {len(both.chunks)} parts of models:/churn/4 are not scored yet." in found.notes


def test_two_workers_on_one_run_leave_one_part_of_each_model_for_each_chunk(
    plan: Plan, destination: Storage, tmp_path: Path
) -> None:
    both = challenge(plan, a_contract("a", "b"), a_contract("a"))
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(score, both, destination, Formula(), Formula(2.0), Formula(3.0)) for _ in range(2)]
        done = [each.result() for each in work]
    alone = open_storage(str(tmp_path / "alone"))
    score(both, alone, Formula(), Formula(2.0), Formula(3.0))
    plans = (both, *both.challenger_plans)

    assert 3 * len(both.chunks) == sum(each.parts_put for each in done)
    assert [read_parts(each, alone) for each in plans] == [read_parts(each, destination) for each in plans]


def test_a_backfill_promotes_nothing(source: str, tmp_path: Path) -> None:
    rule = PromoteIf(metric="mae", by=0)
    options = BatchOptions(challengers=("models:/churn/2",), labels=Labels(column="label"), promote_if=rule)
    with pytest.raises(BadInput, match="must be promoted by one run, got promote_if for every piece"):
        list_pieces(source, str(tmp_path / "scores"), Partitions(column="day"), options)


def test_a_scorer_without_the_challengers_of_its_plan_is_an_error(plan: Plan, destination: Storage) -> None:
    both = challenge(plan, a_contract("a", "b"))
    with pytest.raises(ValueError, match="zip"):
        Scorer(plan=both, destination=destination, model=Formula(), max_reject_fraction=1.0)


def test_memory_is_that_of_all_models(plan: Plan) -> None:
    one, two = challenge(plan, a_contract("a", "b")), challenge(plan, a_contract("a", "b"), a_contract("a"))

    assert memory_bytes(plan, 2) < memory_bytes(one, 2) < memory_bytes(two, 2) < memory_bytes(two, 3)


def test_a_run_with_challengers_is_another_run_and_one_without_has_the_key_of_before(plan: Plan) -> None:
    contract, pins = plan.contract, [PIN.model_copy(update={"version": version}) for version in "45"]
    keys = [
        run_key(PIN, plan.source, contract, OPTIONS, challengers=[(pin, contract) for pin in some])
        for some in ([], pins[:1], pins[1:], pins)
    ]

    assert 4 == len(set(keys))
    assert plan.key == keys[0]
    assert "challengers" not in OPTIONS.key_fields()
    assert "columns_beside" not in plan.model_dump_json()


def test_figures_are_those_of_the_whole_tables(plan: Plan, destination: Storage) -> None:
    options = OPTIONS.model_copy(update={"segment_columns": ("region",), "labels": Labels(column="label")})
    both = challenge(plan.model_copy(update={"options": options}), a_contract("a", "c"), kept=("region", "label"))
    score(both, destination, Formula(1.0, fails=lambda a: a == 50), Formula(1.25, fails=lambda a: a > 390))
    other = both.challenger_plans[0]
    compared = compare_challenger(destination, both, other)
    ours, theirs = read_table(both, destination), read_table(other, destination)
    table = theirs.rename({"score": "theirs"}).with_columns(ours=ours["score"])
    good = table.filter(pl.col("ours").is_not_null() & pl.col("theirs").is_not_null())
    good = good.with_columns(off=(pl.col("ours").cast(pl.Float64) - pl.col("theirs")).abs())
    output, labelled = compared.outputs[0], good.drop_nulls("source.label")
    y, one, two = (labelled[name].to_numpy().astype(float) for name in ("source.label", "ours", "theirs"))

    assert good.height == compared.rows == output.rows
    assert int((good["off"] == 0).sum()) == output.equal
    assert good["off"].max() == output.difference_max
    assert good["off"].mean() == pytest.approx(output.difference_mean)
    assert {"1e-06": int((good["off"] > 1e-6).sum()), "1": int((good["off"] > 1).sum())} == {
        name: output.rows_beyond[name] for name in ("1e-06", "1")
    }
    assert abs((good["off"] <= output.quantiles["p90"]).mean() - 0.9) < 1 / 128
    assert output.rows_decile_changed is not None
    assert output.rows_decile_changed < 10
    assert {f"r{at}": good.filter(pl.col("source.region") == f"r{at}").height for at in range(3)} == {
        each.value: each.rows for each in compared.segments
    }
    assert compared.labels is not None
    assert len(labelled) == compared.labels.rows
    assert metrics.mean_absolute_error(y, one) == pytest.approx(compared.labels.champion["mae"])
    assert metrics.root_mean_squared_error(y, two) == pytest.approx(compared.labels.challenger["rmse"])
    assert sum(each.rows for each in compared.labels.segments) == len(labelled)
    assert 4 == len(tabulate_comparison([compared]))
    assert (draw_comparison("models:/churn/3", [compared]) or b"").startswith(b"\x89PNG")
    assert RunComparison.model_validate_json(
        RunComparison(run="r", plan_digest="d", model="m", rows=1, challengers=(compared,)).model_dump_json()
    ).challengers == (compared,)


class Classes(Formula):
    """A model that puts out a class, or the probabilities of three."""

    def __init__(self, shift: int, *, lists: bool) -> None:
        super().__init__()
        self.shift, self.lists = shift, lists

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = (inputs["x"][:, 0].astype(np.int64) + self.shift * (inputs["x"][:, 0] % 7 == 0)).astype(np.int64) % 3
        if not self.lists:
            return {"score": number}
        return {"score": np.where(np.eye(3, dtype=bool)[number], 0.5, 0.25).astype(np.float32)}


@pytest.mark.parametrize("lists", [False, True])
def test_classes_and_lists_are_compared_by_what_they_are(source: str, destination: Storage, *, lists: bool) -> None:
    shaped = Output(name="score", dtype="float32" if lists else "int64", shape=(3,) if lists else ())
    contract = a_contract("a", "b", outputs=(shaped,))
    plan = challenge(a_plan(source, destination.url, OPTIONS, contract=contract, batch_size=5), contract)
    score(plan, destination, Classes(0, lists=lists), Classes(1, lists=lists))
    compared = compare_challenger(destination, plan, plan.challenger_plans[0])
    differ = len([row for row in range(400) if row % 7 == 0])

    assert 400 - differ == compared.outputs[0].equal
    assert (0.25 if lists else None) == compared.outputs[0].difference_max
    assert (400 - differ if lists else None) == compared.outputs[0].equal_class
    assert compared.outputs[0].rows_decile_changed is None


def test_labels_of_another_table_are_found_by_key_in_any_order(
    plan: Plan, destination: Storage, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).permutation(500)
    table = pa.table({"id": pa.array(rows, pa.int32()), "spent": pa.array(rows * 2.5, mask=rows % 4 == 0)})
    put(str(tmp_path / "later"), {"a.parquet": table.slice(0, 200), "b.parquet": table.slice(200)})
    both = challenge(plan, a_contract("a", "b"))
    publish_run(both, destination, Formula(), Formula(1.25))
    labels = Labels(column="spent", source=str(tmp_path / "later"))
    compared = compare_challengers(destination.url, labels=labels).comparison.challengers[0].labels

    assert compared is not None
    assert 300 == compared.rows
    assert compared.challenger["mae"] == pytest.approx(0.0, abs=1e-9)
    known = [row for row in range(400) if row % 4]
    assert compared.champion["mae"] == pytest.approx(np.mean([0.5 * row for row in known]))


def test_labels_of_a_wrong_kind_are_refused_by_their_column_and_table(
    plan: Plan, destination: Storage, tmp_path: Path
) -> None:
    put(str(tmp_path / "later"), {"a.parquet": pa.table({"id": [1, 2], "spent": ["1.5", "much"]})})
    publish_run(challenge(plan, a_contract("a", "b")), destination, Formula(), Formula(1.25))
    labels = Labels(column="spent", source=str(tmp_path / "later"), kind="regression")

    with pytest.raises(BadInput, match=r"^Labels, the column 'spent' of the table .*later: .* must be numbers, .*much"):
        compare_challengers(destination.url, labels=labels)


@settings(max_examples=30)
@given(
    left=st.lists(st.one_of(st.none(), st.integers(-5, 40)), max_size=60),
    right=st.sets(st.integers(-5, 40), max_size=40),
)
def test_a_join_by_files_is_a_join(left: list[int | None], right: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        labels = pa.table({"id": pa.array(sorted(right), pa.int64()), "y": pa.array([1.0] * len(right), pa.float64())})
        if not right:
            return
        put(f"{folder}/labels", {"a.parquet": labels})
        schema = pa.schema([("id", pa.int64())])
        table = open_label_table(Labels(column="y", source=f"{folder}/labels"), ["id"], schema, f"{folder}/scores")
        rows = pa.table({"id": pa.array(left, pa.int64())})
        joined = list(join_labels([rows.slice(0, 7), rows.slice(7)], table, 5 << 20))
        found = sorted(value for each in joined for value in each.column("id").to_pylist())

    assert sorted(value for value in left if value in right) == found


@pytest.mark.parametrize(
    ("table", "error", "match"),
    [
        (
            {"id": [1, 2, 1], "y": [1.0, 2.0, 3.0]},
            KeysUnfit,
            r"one label for each key, but 1 key occurs more than once",
        ),
        ({"id": [1, 2], "z": [1.0, 2.0]}, SchemaMismatch, r"must hold the column 'y' of the labels once"),
        (
            {"id": ["1", "2"], "y": [1.0, 2.0]},
            SchemaMismatch,
            r"must be of one kind in the run and its labels, got int64",
        ),
        (
            {"id": pa.array([], pa.int64()), "y": pa.array([], pa.float64())},
            SourceEmpty,
            r"^Labels, .*'y' of the table /.*",
        ),
        ({"id": [1, 2], "y": [[1.0], [2.0]]}, SchemaMismatch, r"must hold numbers, texts, booleans or times, got list"),
    ],
)
def test_a_table_of_labels_that_does_not_fit_is_refused_by_name(
    table: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    put(str(tmp_path / "labels"), {"a.parquet": table})
    labels = Labels(column="y", source=str(tmp_path / "labels"))
    with pytest.raises(error, match=match):
        open_label_table(labels, ["id"], pa.schema([("id", pa.int64())]), str(tmp_path / "scores"))


@settings(max_examples=80)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=70),
    size=st.integers(1, 20),
    wide=st.booleans(),
)
def test_deciles_are_those_of_the_sorted_numbers(values: list[float], size: int, *, wide: bool) -> None:
    array = np.array(values, np.float64 if wide else np.float32)
    found = find_deciles(lambda: ([array[at : at + size]] for at in range(0, len(array), size)), 1)[0]
    ordered = np.sort(array.astype(np.float64))
    expected = [ordered[-(-len(ordered) * tenth // 10) - 1] for tenth in range(1, 10)] if values else []

    assert expected == found.tolist()
    if values:
        assert [sum(value > edge for edge in expected) for value in ordered] == place_in_deciles(
            ordered, found
        ).tolist()


def measure(kind: Any, predicted: pa.Array, labels: pa.Array) -> dict[str, Any]:
    measured = measure_labels(kind, predicted, labels)
    return {name: finish_metric(name, float(values.sum()), len(values)) for name, values in measured.items()}


def test_metrics_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(1)
    chance, truth = random.random(500).astype(np.float32), random.random(500) < 0.3
    chance[:2] = (0.0, 1.0)
    binary = measure("classification", pa.array(chance), pa.array(truth))
    several, numbers_of = random.dirichlet((1, 2, 3), 500), random.integers(0, 3, 500)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(several.reshape(-1)), 3)
    of_lists = measure("classification", lists, pa.array(numbers_of))
    regression = measure("regression", pa.array(chance), pa.array(several[:, 0]))
    area = RocArea()
    area.add(chance[:100].astype(float), truth[:100])
    area.add(chance[100:].astype(float), truth[100:])

    assert metrics.log_loss(truth, chance) == pytest.approx(binary["log_loss"], rel=1e-6)
    assert metrics.accuracy_score(truth, chance > 0.5) == binary["accuracy"]
    assert metrics.log_loss(numbers_of, several) == pytest.approx(of_lists["log_loss"])
    assert metrics.accuracy_score(numbers_of, several.argmax(axis=1)) == of_lists["accuracy"]
    assert metrics.root_mean_squared_error(several[:, 0], chance.astype(float)) == pytest.approx(regression["rmse"])
    assert (pytest.approx(metrics.roc_auc_score(truth, chance)), 0.0) == area.result()
    assert (True, True) == tuple(map(math.isnan, RocArea().result()))


def test_an_area_of_many_rows_is_off_by_no_more_than_it_says() -> None:
    random = np.random.default_rng(2)
    scores = random.standard_normal(ROWS_EXACT + 100_000)
    truth = scores + random.standard_normal(len(scores)) > 1
    area = RocArea()
    for at in range(0, len(scores), 200_000):
        area.add(scores[at : at + 200_000], truth[at : at + 200_000])
    found, off = area.result()

    assert 0 < off < 1e-4
    assert abs(found - metrics.roc_auc_score(truth, scores)) <= off


@pytest.mark.parametrize(
    ("predicted", "labels", "expected"),
    [
        (pa.array([1, 2, 3]), pa.array(["1", "2", "4"]), 2 / 3),
        (pa.array([True, False]), pa.array([1, 1]), 0.5),
        (pa.array(["a", "b"]), pa.array(["a", "c"]), 0.5),
        (pa.array([1, 0]), pa.array([1.0, 0.0]), 1.0),
        (pa.array([0.9, 0.2]), pa.array(["True", "false"]), 1.0),
    ],
)
def test_classes_are_equal_whatever_their_type(predicted: pa.Array, labels: pa.Array, expected: float) -> None:
    assert expected == measure("classification", predicted, labels)["accuracy"]


def test_what_is_no_probability_has_no_log_loss_and_what_is_no_class_is_refused() -> None:
    found = measure("classification", pa.array([3.5, -1.0]), pa.array([True, False]))
    with pytest.raises(BadInput, match="must be true or false, or 1 or 0, where a prediction is the probability"):
        measure("classification", pa.array([0.5]), pa.array(["maybe"]))
    with pytest.raises(BadInput, match="must be classes from 0 to 1"):
        measure("classification", pa.FixedSizeListArray.from_arrays(pa.array([0.5, 0.5]), 2), pa.array([2]))
    with pytest.raises(BadInput, match="must be numbers, got"):
        measure("regression", pa.array([0.5]), pa.array(["half"]))

    assert {"accuracy": None, "log_loss": None} == found


def compared(version: int, metric: str, ours: float, theirs: float, rows: int = 5_000, **more: Any) -> Any:
    labels = LabelComparison(
        kind="classification", rows=rows, champion={metric: ours}, challenger={metric: theirs}, **more
    )
    return ChallengerComparison(model=f"models:/churn/{version}", model_digest="d", rows=rows, labels=labels)


@pytest.mark.parametrize(
    ("rule", "given_", "holds"),
    [
        (PromoteIf(metric="auc", by=0.01), compared(4, "auc", 0.7, 0.72), True),
        (PromoteIf(metric="auc", by=0.03), compared(4, "auc", 0.7, 0.72), False),
        (PromoteIf(metric="auc", by=0.01), compared(4, "auc", 0.7, 0.72, auc_error_max=0.01), False),
        (PromoteIf(metric="mae", by=0.5), compared(4, "mae", 3.0, 2.5), True),
        (PromoteIf(metric="mae", by=0.0), compared(4, "mae", 3.0, 3.5), False),
        (PromoteIf(metric="mae", by=0.0), compared(4, "rmse", 3.0, 1.0), False),
        (PromoteIf(metric="mae", by=0.0), compared(4, "mae", 3.0, 2.0, rows=999), False),
        *(
            (PromoteIf(metric="mae", by=0.0), compared(4, "mae", 3.0, 2.0).model_copy(update=update), False)
            for update in ({"given_up": "x"}, {"rejects_challenger_only": 9})
        ),
    ],
)
def test_a_rule_holds_or_says_why_not(rule: PromoteIf, given_: ChallengerComparison, *, holds: bool) -> None:
    margin, why = judge_promotion(rule, given_, 5_000)

    assert holds == (margin >= 0)
    assert "models:/churn/4" in why


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"challengers": [f"models:/churn/{at}" for at in range(5)]}, "at most 4 items"),
        ({"challengers": ["models:/churn/2"], "bfloat16_tolerance": 0.1}, "bfloat16_tolerance must be unset"),
        ({"segment_columns": ["region"]}, "challengers must name a model where segment_columns is given"),
        ({"challengers": ["models:/churn/2"], "promote_if": {"metric": "mae", "by": 0}}, "labels must be given"),
        ({"challengers": ["models:/churn/2"], "labels": {"column": "y", "source": "t"}}, "key_columns must name"),
    ],
)
def test_options_that_can_not_go_together_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        BatchOptions.model_validate(options)


@pytest.mark.parametrize(
    ("dtype", "given_", "kind", "rule", "match"),
    [
        ("int64", pa.string(), "regression", None, "must be numbers, got labels of string"),
        ("float32", pa.bool_(), None, PromoteIf(metric="mae", by=0), "must be one of a classification, got 'mae'"),
        ("float32", pa.int64(), None, PromoteIf(metric="auc", by=0), "must be one of a regression, got 'auc'"),
        ("int64", pa.int64(), None, PromoteIf(metric="auc", by=0), "must be that of probabilities"),
    ],
)
def test_labels_and_rules_that_do_not_fit_the_models_are_refused(
    dtype: str, given_: pa.DataType, kind: Any, rule: PromoteIf | None, match: str
) -> None:
    contract = a_contract("a", outputs=(Output(name="score", dtype=dtype),))
    with pytest.raises(BadInput, match=match):
        find_label_kind(Labels(column="y", kind=kind), contract, given_, rule)


def register_classes(name: str) -> str:
    """Register a model whose predictions are whole numbers, and return its address."""
    rows = pd.DataFrame({"a": np.zeros(2, np.float32)})
    with mlflow.start_run():
        logged = mlflow.sklearn.log_model(
            DummyClassifier().fit(rows, [0, 1]),
            name="model",
            signature=infer_signature(rows, np.array([0, 1])),
            pip_requirements=["scikit-learn"],
            registered_model_name=name,
        )
    return f"models:/{name}/{logged.registered_model_version}"


def test_challengers_that_can_not_be_compared_are_refused_by_name(
    registry: Path, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Other tests may have set the level of all loggers.
    caplog.set_level("WARNING", logger="tasks.batch.challengers")
    name = "refusals"
    addresses = [register_script(name, "pass"), register_script(name, "pass")]
    classes = register_classes("refusals-of-another-kind")
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, "challenger", "1")
    resolved = resolve_model(addresses[0])
    contract = resolved.contract({}, {})

    def refuse(error: type[Exception], match: str, *challengers: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            resolve_challengers(resolved, contract, BatchOptions(challengers=challengers, **options))

    labels = {"labels": Labels(column="label"), "promote_if": PromoteIf(metric="mae", by=0)}
    refuse(
        BadInput, rf"another version than the model of the run, got models:/{name}/1, which is the model", addresses[0]
    )
    refuse(ModelNotFound, "must name a version or an alias", f"models:/{name}@none")
    refuse(ModelNotFound, "has no model 'unknown'", "models:/unknown/1")
    refuse(BadInput, rf"given once, got models:/{name}/2 twice", addresses[1], f"models:/{name}/latest")
    refuse(BadInput, r"'prediction' of models:/refusals/1 is a number .*a class \(int64", classes)
    other = register_script("refusals-of-another-name", "pass")
    refuse(BadInput, r"must be versions of 'refusals' where promote_if is given", other, **labels)
    with pytest.raises(BadInput, match=r"The alias 'champion' of 'refusals' must name version 1.*it names none"):
        check_alias(resolved.pin, PromoteIf(metric="mae", by=0))
    destination = str(tmp_path / "scores")
    options = BatchOptions(challengers=(f"models:/{name}/latest",), segment_columns=("region",))
    request = make_request(resolved, contract, source, destination, options)

    # As after a promotion, when both aliases name one version.
    alone = BatchOptions(challengers=(f"models:/{name}@challenger",), segment_columns=("region",), **labels)
    same = make_request(resolved, contract, source, destination, alone)

    assert same == make_request(resolved, contract, source, destination, BatchOptions())
    assert any("is left out" in record.getMessage() for record in caplog.records)
    assert (f"models:/{name}/2",) == request.options.challengers
    assert [f"models:/{name}/2"] == [each.pin.uri for each in request.challengers]
    assert request.key != make_request(resolved, contract, source, destination, BatchOptions()).key


def test_an_alias_moves_once_and_only_where_nobody_has_moved_it(
    registry: Path, plan: Plan, destination: Storage
) -> None:
    client = mlflow.MlflowClient()
    for _ in range(3):
        register_script("rising", "pass")
    named = {"name": "rising", "version": "1"}
    options = OPTIONS.model_copy(update={"labels": Labels(column="label"), "challengers": ("models:/rising/2",)})
    plan = challenge(plan.model_copy(update={"options": options}), a_contract("a", "b"), kept=("label",))
    pins = [plan.model.model_copy(update={**named, "version": version}) for version in ("1", "2")]
    one = plan.challengers[0].model_copy(update={"model": pins[1]})
    plan = plan.model_copy(update={"model": pins[0], "challengers": (one,)})
    plan = plan.model_copy(update={"digest": digest_plan(plan)})
    publish_run(plan, destination, Formula(), Formula(1.25))
    rule = PromoteIf(metric="mae", by=1.0, min_rows=100)
    client.set_registered_model_alias("rising", "champion", "3")
    stays = compare_challengers(destination.url, promote_if=rule).promotion
    moved_by_others = client.get_model_version_by_alias("rising", "champion").version
    client.set_registered_model_alias("rising", "champion", "1")
    first = compare_published(destination, plan, rule)
    client.set_registered_model_alias("rising", "champion", "1")
    second = compare_published(destination, plan, rule)

    assert isinstance(stays, Promotion)
    assert ("not promoted", "3") == (stays.outcome, str(moved_by_others))
    assert "names version 3 by now" in stays.why
    assert first.promotion is not None
    assert ("promoted", "models:/rising/2") == (first.promotion.outcome, first.promotion.to)
    assert first == second
    assert "1" == str(client.get_model_version_by_alias("rising", "champion").version)


def test_a_later_comparison_says_what_it_lacks(plan: Plan, destination: Storage) -> None:
    publish_run(plan, destination, Formula())
    with pytest.raises(BadInput, match="must have challengers to be compared"):
        compare_challengers(destination.url)
