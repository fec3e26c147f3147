"""Every row is scored once, whatever the partition, the slots, and the workers beside."""

from __future__ import annotations

import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import DependencyFault, ModelUnfit, SourceCorrupt, TooManyRejects
from serving.model.encoding import Encoded
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from tasks.batch.options import BatchOptions
from tasks.batch.parts import list_parts, part_path
from tasks.batch.plan import Plan
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult, check_rejects
from tasks.spot.drain import Notice, sigterm_notice
from tasks.storage import Storage, open_storage
from tests.eventually import eventually
from tests.support import register_script
from tests.tasks.batch.small import a_plan, numbers, parquet, put, put_parts


class OutOfInk(BaseException):
    """What is no error of a model's rows."""


class Adder:
    """A model that adds a and b, may take its time, and may have enough of it."""

    slots = 2

    def __init__(self, seconds: float = 0.0, fails_at: float | None = None) -> None:
        self.seconds, self.fails_at = seconds, fails_at
        self.rows = 0

    def prepare(self, encoded: Encoded) -> Encoded:
        return encoded

    @contextmanager
    def slot(self) -> Generator[None]:
        yield

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        x_NF = inputs["x"]
        if self.fails_at is not None and (x_NF[:, 0] == self.fails_at).any():
            message = "out of ink"
            raise OutOfInk(message)
        self.rows += len(x_NF)
        return {"score": x_NF.sum(axis=1)}


def score(plan: Plan, destination: Storage, model: Adder, slots: int = 2, fraction: float = 1.0) -> ScoringResult:
    scorer = Scorer(plan=plan, destination=destination, model=model, max_reject_fraction=fraction)
    done = ScoringResult()
    with ThreadPoolExecutor(slots) as pool:
        for scored in pool.map(scorer.score_shard, scorer.scheduler.begin()):
            done.add(scored)
    return done


def scored_rows(plan: Plan, destination: Storage) -> pl.DataFrame:
    parts = sorted(entry.path for entry in list_parts(destination, plan).values())
    return pl.concat([pl.read_parquet(destination.address(path)) for path in parts])


@settings(max_examples=25)
@given(
    groups=st.lists(st.lists(st.integers(0, 23), min_size=1, max_size=4), min_size=1, max_size=4).filter(
        lambda files: any(map(sum, files))
    ),
    rows_per_chunk=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    slots=st.integers(1, 4),
)
def test_any_partition_into_files_and_row_groups_scores_every_row_once(
    groups: list[list[int]], rows_per_chunk: int, batch_size: int, slots: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = sum(map(sum, groups))
        start = 0
        files: dict[str, bytes] = {}
        for at, file in enumerate(groups):
            files[f"{at}.parquet"] = grouped(start, file)
            start += sum(file)
        source = put(f"{folder}/source", files)
        options = BatchOptions(key_columns=("id",), rows_per_chunk=rows_per_chunk)
        plan = a_plan(source, f"{folder}/scores", options, batch_size=batch_size, slots=slots)
        model = Adder()
        done = score(plan, open_storage(f"{folder}/scores"), model, slots)

        table = scored_rows(plan, open_storage(f"{folder}/scores")).sort("id")
        assert list(range(rows)) == table["id"].to_list()
        assert [2.0 * row for row in range(rows)] == table["score"].to_list()
        assert (rows, 0, rows) == (done.rows, done.rows_recomputed, model.rows)


def grouped(start: int, groups: list[int]) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, numbers(0, 0).schema) as writer:
        for rows in groups:
            writer.write_table(numbers(start, start + rows))
            start += rows
    return sink.getvalue()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    source = put(str(tmp_path / "source"), {f"{at}.parquet": numbers(at * 100, at * 100 + 100) for at in range(4)})
    options = BatchOptions(key_columns=("id",), rows_per_chunk=10)
    return a_plan(source, str(tmp_path / "scores"), options, batch_size=5, slots=2)


@pytest.fixture
def destination(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "scores"))


def test_an_error_in_a_chunk_that_a_slot_helps_with_ends_the_slot(plan: Plan, destination: Storage) -> None:
    score(plan, destination, Adder())
    destination.delete([part_path(plan, (1, 0))])
    model = Adder(fails_at=float(sum(chunk.rows for chunk in plan.shards[0])))
    scorer = Scorer(plan=plan, destination=destination, model=model, max_reject_fraction=1.0)
    unfinished = scorer.scheduler.begin()
    taken = scorer.scheduler.next_shard()
    with pytest.raises(OutOfInk):
        scorer.score_shard(0)

    assert ([1], 1) == (unfinished, taken)
    assert scorer.scheduler.is_stopping()


def test_only_missing_chunks_are_scored(plan: Plan, destination: Storage) -> None:
    score(plan, destination, Adder())
    destination.delete([part_path(plan, (0, 3)), part_path(plan, (2, 1))])
    model = Adder()
    done = score(plan, destination, model)

    assert (20, 20, 2) == (done.rows, model.rows, done.chunks)
    assert 400 == scored_rows(plan, destination).height


def test_workers_on_one_plan_share_it_and_double_little(plan: Plan, destination: Storage) -> None:
    models = [Adder(seconds=0.02) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda model: score(plan, destination, model, slots=1), models))

    assert list(range(400)) == scored_rows(plan, destination).sort("id")["id"].to_list()
    assert all(one.rows >= 60 for one in done), [one.rows for one in done]
    assert sum(one.rows for one in done) - 400 <= 100
    assert sum(one.rows for one in done) - 400 == sum(one.rows_recomputed for one in done)


def test_a_chunk_whose_worker_died_is_scored_after_all(plan: Plan, destination: Storage) -> None:
    """Another worker wrote parts after this one began, and is never heard of again."""
    scorer = Scorer(plan=plan, destination=destination, model=Adder(), max_reject_fraction=1.0)
    shards = scorer.scheduler.begin()
    put_parts(plan, destination, [(0, 0), (0, 1), (1, 0)])
    for shard in shards:
        scorer.score_shard(shard)

    assert 400 == scored_rows(plan, destination).height


def test_a_file_that_can_not_be_decoded_costs_its_own_chunks_only(tmp_path: Path, destination: Storage) -> None:
    # Incompressible values in plain encoding: a cut page can't pass for a whole one.
    random = np.random.default_rng(0)
    table = pa.table({"id": np.arange(100), "a": random.random(100, "f"), "b": random.random(100, "f")})
    good, bad = parquet(table), bytearray(parquet(table, write_page_checksum=True))
    bad[60:90] = b"\xff" * 30
    source = put(str(tmp_path / "source"), {"0.parquet": good, "1.parquet": bytes(bad), "2.parquet": good})
    plan = a_plan(source, destination.url, BatchOptions(key_columns=("id",), rows_per_chunk=25), batch_size=5, slots=2)
    done = score(plan, destination, Adder())

    assert 200 == scored_rows(plan, destination).height
    assert {SourceCorrupt} == {type(fault) for fault in done.faults.values()}
    assert all("1.parquet" in str(fault) for fault in done.faults.values())
    assert 4 == len(done.faults)


def test_what_one_slot_raises_stops_the_others(plan: Plan, destination: Storage) -> None:
    with pytest.raises(OutOfInk, match="out of ink"):
        score(plan, destination, Adder(seconds=0.01, fails_at=5.0))

    assert len(list_parts(destination, plan)) < len(plan.chunks)


class Cut(Adder):
    """An adder whose calls of a service fail from one moment on, for some seconds."""

    slots = 1

    def __init__(self, after_rows: int, seconds: float) -> None:
        super().__init__()
        self.after_rows, self.away = after_rows, seconds
        self.since: float | None = None

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.rows >= self.after_rows:
            self.since = self.since or time.monotonic()
            if time.monotonic() - self.since < self.away:
                raise ConnectionError
        return super().predict(inputs)


@pytest.fixture
def large(tmp_path: Path) -> Callable[[str], Plan]:
    source = put(str(tmp_path / "source"), {"0.parquet": numbers(0, 20_000)})
    options = BatchOptions(key_columns=("id",), rows_per_chunk=1000)
    return lambda destination: a_plan(source, destination, options, batch_size=100)


def test_a_connection_that_is_away_for_a_while_leaves_no_row_without_its_prediction(
    large: Callable[[str], Plan], destination: Storage
) -> None:
    plan = large(destination.url)
    done = score(plan, destination, Cut(after_rows=9_950, seconds=0.4), slots=1)
    rows = scored_rows(plan, destination)

    assert {} == done.rejects
    assert list(range(20_000)) == rows["id"].sort().to_list()
    assert rows["score"].null_count() == 0
    assert (rows["score"] == 2.0 * rows["id"]).all()


class Picky(Adder):
    """An adder whose calls of a service fail for some rows, whenever they are made."""

    slots = 1

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if np.isin([3_500, 9_500, 9_999], inputs["x"][:, 0]).any():
            raise ConnectionError
        return super().predict(inputs)


def test_a_chunk_that_a_connection_fails_is_left_out_and_the_others_are_scored(
    large: Callable[[str], Plan], destination: Storage
) -> None:
    plan = large(destination.url)
    scorer = Scorer(plan=plan, destination=destination, model=Picky(), max_reject_fraction=1.0, pauses=lambda: iter(()))
    done = ScoringResult()
    for shard in scorer.scheduler.begin():
        done.add(scorer.score_shard(shard))

    assert (2, 18, 18_000) == (len(done.faults), done.chunks, scored_rows(plan, destination).height)
    with pytest.raises(DependencyFault, match=r"must answer; 2 chunks could not be scored:\n.*ConnectionError"):
        raise done.faults_error()
    assert 2_000 == score(plan, destination, Adder(), slots=1).rows


def test_a_connection_that_stays_away_ends_the_run_without_a_reject_and_the_next_call_resumes(
    large: Callable[[str], Plan], destination: Storage
) -> None:
    plan = large(destination.url)
    cut = Cut(after_rows=9_950, seconds=3600)
    scorer = Scorer(
        plan=plan, destination=destination, model=cut, max_reject_fraction=1.0, pauses=lambda: iter([0.01, 0.01])
    )
    with pytest.raises(DependencyFault, match=r"got ConnectionError: *\(tries: 3\)"):
        list(map(scorer.score_shard, scorer.scheduler.begin()))
    kept = scored_rows(plan, destination)

    assert 0 < kept.height < 20_000
    assert kept["score"].null_count() == 0
    resumed = score(plan, destination, Adder(), slots=1)
    assert 20_000 - kept.height == resumed.rows
    assert (scored_rows(plan, destination)["score"] == 2.0 * scored_rows(plan, destination)["id"]).all()


def test_a_slot_that_waits_for_a_connection_leaves_at_once_where_it_is_told_to(
    large: Callable[[str], Plan], destination: Storage
) -> None:
    plan = large(destination.url)
    cut = Cut(after_rows=9_950, seconds=3600)
    scorer = Scorer(
        plan=plan, destination=destination, model=cut, max_reject_fraction=1.0, pauses=lambda: iter([3600.0])
    )
    shards = scorer.scheduler.begin()
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(lambda: [scorer.score_shard(shard) for shard in shards])
        eventually(lambda: cut.since)
        scorer.scheduler.stop.set()
        # Were it to wait, it would for an hour.
        done = scoring.result()

    assert 1 == sum(each.chunks_dropped for each in done)
    assert {} == sum((each.rejects for each in done), done[0].rejects)


class Told(Adder):
    """An adder that calls a function before the batch that holds the row given."""

    def __init__(self, row: float, call: Callable[[], None]) -> None:
        super().__init__()
        self.row, self.call = row, call

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if (inputs["x"][:, 0] == self.row).any():
            self.call()
        return super().predict(inputs)


@pytest.fixture
def told(plan: Plan, destination: Storage) -> Callable[[Callable[[Scorer], None]], Scorer]:
    """Return a maker of scorers in which a function is called in the first of the two batches of a chunk."""

    def make(call: Callable[[Scorer], None]) -> Scorer:
        model = Told(202.0, lambda: call(scorer))
        scorer = Scorer(plan=plan, destination=destination, model=model, max_reject_fraction=1.0)
        scorer.scheduler.begin()
        return scorer

    return make


def test_after_a_notice_the_chunk_in_hand_is_finished_and_no_other_begun(
    told: Callable[..., Scorer], destination: Storage
) -> None:
    scorer = told(lambda scorer: scorer.drain.add_notice(sigterm_notice(30)))
    before = 0
    for shard in range(len(scorer.plan.shards)):
        done = scorer.score_shard(shard)
        if scorer.drain.notice is None:
            before += done.chunks
            continue
        break
    parts = list_parts(destination, scorer.plan)

    assert 0 == done.chunks_dropped
    assert 202 in scored_rows(scorer.plan, destination)["id"].to_list()
    assert before + done.chunks == len(parts) < len(scorer.plan.chunks)
    assert 0 == sum(scorer.score_shard(shard).chunks for shard in range(len(scorer.plan.shards)))


def test_after_a_notice_that_leaves_no_time_the_chunk_in_hand_is_dropped_between_two_batches(
    told: Callable[..., Scorer], destination: Storage
) -> None:
    hibernation = Notice(source="AWS", action="hibernate", seconds_left=0)
    scorer = told(lambda scorer: scorer.drain.add_notice(hibernation))
    dropped = sum(scorer.score_shard(shard).chunks_dropped for shard in range(len(scorer.plan.shards)))
    ids = scored_rows(scorer.plan, destination)["id"].to_list() if list_parts(destination, scorer.plan) else []

    assert 1 == dropped
    assert 202 not in ids
    assert scorer.model.rows == len(ids) + 5


def test_after_a_notice_that_is_withdrawn_the_next_pass_scores_what_the_last_left(
    told: Callable[..., Scorer], destination: Storage
) -> None:
    def call(scorer: Scorer) -> None:
        scorer.drain.add_notice(sigterm_notice(30))
        assert scorer.scheduler.is_stopping()
        scorer.drain.withdraw_notice("SIGTERM")

    scorer = told(call)
    first = sum(scorer.score_shard(shard).rows for shard in range(len(scorer.plan.shards)))
    assert scorer.scheduler.cut_short
    scorer.model.call = lambda: None
    second = sum(scorer.score_shard(shard).rows for shard in scorer.scheduler.begin())

    assert not scorer.scheduler.cut_short
    assert first < 400
    assert 400 == first + second == scored_rows(scorer.plan, destination).height


def test_too_many_rejects_stop_the_run_as_it_goes(tmp_path: Path, destination: Storage) -> None:
    nulls = pa.table({"id": list(range(400)), "a": pa.nulls(400, pa.float32()), "b": np.zeros(400, "f")})
    source = put(str(tmp_path / "source"), {"0.parquet": nulls})
    plan = a_plan(source, destination.url, BatchOptions(rows_per_chunk=10), batch_size=5, slots=1)

    with pytest.raises(TooManyRejects, match="may be rejects"):
        score(plan, destination, Adder(), slots=1, fraction=0.1)
    assert len(list_parts(destination, plan)) <= 7


@pytest.mark.parametrize(("rejects", "refused"), [(0, False), (10, False), (11, True)])
def test_a_fraction_of_rejects_is_of_all_rows(plan: Plan, rejects: int, refused: bool) -> None:  # noqa: FBT001
    plan = plan.model_copy(update={"rows": 100})
    if refused:
        with pytest.raises(TooManyRejects, match=r"At most 0\.1 of 100 rows"):
            check_rejects(Counter({("a", "null"): rejects}), plan, 0.1)
    else:
        check_rejects(Counter({("a", "null"): rejects}), plan, 0.1)


def test_too_many_rejects_name_the_run_that_shows_them(plan: Plan) -> None:
    rejects = Counter({("a", "null"): 1, ("b", "text that does not parse as float32"): plan.rows, ("", "no"): 2})
    with pytest.raises(TooManyRejects, match=rf"See all with open_rejects\(destination, run='{plan.run}'\)") as refused:
        check_rejects(rejects, plan, 0.1, {("b", "text that does not parse as float32"): "'n/a'"})

    assert [
        f"  - b: text that does not parse as float32 ({plan.rows} rows, such as 'n/a')",
        "  - no (2 rows)",
        "  - a: null (1 rows)",
    ] == str(refused.value).split("\n")[1:4]


def test_too_many_rejects_show_a_value_that_was_refused(tmp_path: Path) -> None:
    table = pa.table({"id": list(range(20)), "a": ["1"] * 5 + ["n/a"] * 10 + ["unknown " * 20] * 5, "b": ["2"] * 20})
    put(f"{tmp_path}/in", {"a.parquet": table})
    plan, destination = a_plan(f"{tmp_path}/in", f"{tmp_path}/out"), open_storage(f"{tmp_path}/out")

    with pytest.raises(TooManyRejects, match=r"a: text that does not parse as \w+ \(\d+ rows, such as '(n/a|unknown)"):
        score(plan, destination, Adder(), slots=1, fraction=0.1)


def test_no_part_is_written_once_the_files_of_a_model_that_reads_them_later_were_changed(
    registry: Path, tmp_path: Path
) -> None:
    uri = register_script("reads-later", "pass")
    resolved = resolve_model(uri)
    load_model(resolved, resolved.contract({}, {}))
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)})
    plan = a_plan(f"{tmp_path}/in", f"{tmp_path}/out", pin=resolved.pin)
    (resolved.folder / "scripted.py").write_text("other = 1")
    destination = open_storage(f"{tmp_path}/out")

    with pytest.raises(ModelUnfit, match="must stay as they were when they were hashed"):
        score(plan, destination, Adder())
    assert {} == list_parts(destination, plan)
