"""Commits of a stream's table: each costs the same, has all parts, and stands whatever ends a scorer, and when."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from serving.errors import DestinationUnusable, NoCompleteRun
from tasks.batch.clean import clean
from tasks.batch.manifest import OTHER_REASONS, find_manifest, find_newest_run, open_predictions, open_rejects
from tasks.batch.plan import ROOT
from tasks.batch.runs import list_runs
from tasks.batch.verify import choose_runs, verify_run
from tasks.storage import Entry, LocalStorage, open_storage
from tasks.stream import table_commits
from tasks.stream.decode import Reason
from tasks.stream.message import Position
from tests.tasks.stream.messages import json_row, message
from tests.tasks.stream.test_parts_sink import emit, numbers, opened

FEW = 3


@pytest.fixture(autouse=True)
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_commits, "PARTS_PER_LIST", FEW)


def commit(place: str | LocalStorage, first: int, stop: int) -> None:
    """Emit each number as a commit of its own."""
    sink = opened(place)
    for number in range(first, stop):
        emit(sink, [json_row(number)])


def test_each_table_of_a_destination_is_opened_by_its_name(tmp_path: Path) -> None:
    for name, number in (("t", 1), ("u", 5), ("t", 2), ("t-u", 7)):
        emit(opened(str(tmp_path), name=name), [json_row(number)])

    found = {name: open_predictions(str(tmp_path), name).collect()["id"].to_list() for name in ("t", "u", "t-u")}

    assert {"t": ["1", "2"], "u": ["5"], "t-u": ["7"]} == found
    assert ["1"] == open_predictions(str(tmp_path), "t-00000001").collect()["id"].to_list()
    assert 0 == open_rejects(str(tmp_path), "u").collect().height
    with pytest.raises(NoCompleteRun, match=r"must hold run v that is complete, got none\. Call batch_inference first"):
        open_predictions(str(tmp_path), "v")


def list_lists(place: Path) -> list[Path]:
    return sorted(place.glob("_overnight_lists/t/*.json"))


class Metered(LocalStorage):
    """A folder that counts what is asked of it, the records in bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.cost = Counter[str]()

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        self.cost["bytes written"] += 0 if path.endswith(".parquet") else len(data)
        return super().put_new(path, data)

    def read(self, path: str) -> bytes | None:
        data = super().read(path)
        self.cost["bytes read"] += len(data or b"")
        return data

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        found = super().entries(prefix, depth)
        self.cost["listed"] += len(found)
        return found

    def open_pinned(self, entry: Entry) -> pa.NativeFile:
        self.cost["opened"] += 1
        return super().open_pinned(entry)


@pytest.mark.parametrize("scorers", [1, 2])
def test_a_commit_costs_the_same_however_many_were_before(tmp_path: Path, scorers: int) -> None:
    storage, costs = Metered(tmp_path), list[Counter[str]]()
    sinks = [opened(storage) for _ in range(scorers)]
    for number in range(100, 160):
        storage.cost.clear()
        partition = number % scorers
        emit(sinks[partition], [message(b"no", number, position=Position(partition, number))])
        costs.append(storage.cost.copy())
    early, late = costs[2 * FEW * FEW : 3 * FEW * FEW], costs[-FEW * FEW :]

    for what in ("bytes written", "bytes read", "listed", "opened"):
        # Numbers of more digits take a few bytes.
        assert sum(each[what] for each in late) <= 1.02 * sum(each[what] for each in early)


def test_rare_reasons_of_rejects_are_counted_together_and_no_commit_grows_by_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.batch.manifest._REASONS_MAX", 2)
    sink = opened(str(tmp_path))
    bad = [json_row(1, a=None), message(b"no", 2), json_row(3, a=None), json_row(4, b=None), json_row(5, b="x")]
    for each in (*bad, json_row(6, b=None)):
        emit(sink, [each])
    kept = find_newest_run(open_storage(str(tmp_path)))

    assert kept is not None
    assert [("", Reason.NOT_JSON, 1), ("a", "null", 2), ("", OTHER_REASONS, 3)] == [
        (count.column, count.reason, count.rows) for count in kept.rejects
    ]


def test_a_table_is_opened_by_its_last_parts_and_not_by_all(tmp_path: Path) -> None:
    commit(str(tmp_path), 1, 30)
    storage = Metered(tmp_path)
    sink = opened(storage)

    assert {0: 30} == sink.next_numbers
    # The last part, its footer and all of its bytes.
    assert storage.cost["opened"] == 2


@pytest.mark.parametrize("commits", [1, FEW, FEW + 1, FEW * FEW, 2 * FEW * FEW + 1])
def test_readers_have_every_part_in_the_order_of_the_table(tmp_path: Path, commits: int) -> None:
    sink = opened(str(tmp_path))
    for number in range(1, commits + 1):
        emit(sink, [message(b"no", number, position=Position(1 + number % 2, number)), json_row(number)])
    storage = open_storage(str(tmp_path))
    manifest = find_newest_run(storage)
    assert manifest is not None
    (run,) = choose_runs(storage, None)
    verification = verify_run(storage, run)
    (summary,) = list_runs(storage)

    expected = [(partition, number) for number in range(1, commits + 1) for partition in (0, 1 + number % 2)]
    table = open_predictions(str(tmp_path)).collect()
    assert sorted(expected) == list(zip(table["source_partition"], table["source_number"], strict=True))
    assert (2 * commits, commits) == (manifest.rows, manifest.rows_rejected)
    assert manifest.parts == getattr(find_manifest(storage, manifest.run), "parts", None)
    assert ("complete", ()) == (verification.state, verification.damages)
    assert ("complete", 2 * commits, len(manifest.parts)) == (summary.state, summary.rows_done, summary.parts)
    assert not verification.notes


def test_a_cleaning_leaves_the_lists_of_a_table(tmp_path: Path) -> None:
    commit(str(tmp_path), 1, 20)
    lists = list_lists(tmp_path)
    assert lists
    clean(open_storage(str(tmp_path)), delete=True)

    assert lists == list_lists(tmp_path)
    assert list(range(1, 20)) == numbers(str(tmp_path))


def write_as_earlier_releases(place: Path) -> None:
    """Have the newest commit in the form of earlier releases: it lists every part, and says no more of them."""
    storage = open_storage(str(place))
    manifest = find_newest_run(storage)
    assert manifest is not None
    for path in [*place.glob(f"{ROOT}/t-*/manifest.json"), *list_lists(place)]:
        path.unlink()
    record = json.loads(manifest.model_dump_json())
    assert record.pop("ends")
    assert "lists" not in record
    (place / ROOT / manifest.run / "manifest.json").write_text(json.dumps(record))


@pytest.mark.parametrize("commits", [1, 2, FEW, 20])
def test_a_table_of_an_earlier_release_is_read_and_continued(tmp_path: Path, commits: int) -> None:
    commit(str(tmp_path), 1, commits + 1)
    write_as_earlier_releases(tmp_path)
    before = numbers(str(tmp_path))
    sink = opened(str(tmp_path))
    continued = sink.next_numbers
    emit(sink, [json_row(number) for number in range(1, commits + 4)])

    assert list(range(1, commits + 1)) == before
    assert {0: commits + 1} == continued
    assert list(range(1, commits + 4)) == numbers(str(tmp_path))
    manifest = find_newest_run(open_storage(str(tmp_path)))
    assert manifest is not None
    assert commits + 3 == manifest.rows


def test_a_scorer_goes_on_after_a_commit_of_an_earlier_release_that_came_meanwhile(tmp_path: Path) -> None:
    sink = opened(str(tmp_path))
    emit(sink, [json_row(1)])
    commit(str(tmp_path), 2, 9)
    write_as_earlier_releases(tmp_path)
    emit(sink, [json_row(number) for number in range(1, 12)])

    assert list(range(1, 12)) == numbers(str(tmp_path))


class Killed(BaseException):
    """A process ends."""


class Mortal(LocalStorage):
    """A folder that ends its process at one write or deletion: before it, or right after."""

    def __init__(self, root: Path, step: int, *, is_after: bool) -> None:
        super().__init__(root)
        self.steps, self.step, self.is_after = 0, step, is_after

    def _do(self, work: Callable[[], bool]) -> bool:
        self.steps += 1
        if self.steps == self.step and not self.is_after:
            raise Killed
        done = work()
        if self.steps == self.step:
            raise Killed
        return done

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        return self._do(lambda: super(Mortal, self).put_new(path, data))

    def delete(self, paths: list[str]) -> None:
        for path in paths:
            self._do(lambda path=path: super(Mortal, self).delete([path]) is None)  # type: ignore[misc]


@pytest.mark.parametrize("is_after", [False, True])
def test_a_scorer_that_is_killed_at_any_write_loses_nothing_and_shows_nothing_half(
    tmp_path: Path, *, is_after: bool
) -> None:
    commits, step = FEW * FEW + 2, 0
    while True:
        step += 1
        place = tmp_path / str(step)
        storage, done = Mortal(place, step, is_after=is_after), 0
        try:
            sink = opened(storage)
            for number in range(1, commits + 1):
                emit(sink, [json_row(number)])
                done = number
        except Killed:
            pass
        else:
            break
        shown = numbers(str(place)) if done else []
        assert shown in (list(range(1, done + 1)), list(range(1, done + 2)))
        commit(str(place), 1, commits + 1)
        assert list(range(1, commits + 1)) == numbers(str(place))

    assert step > 3 * commits


class Lossy(LocalStorage):
    """A folder that says it has written a list of parts, and has not, or has half of it."""

    half: bool = False
    lists: int = 0

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        if "_lists/" not in path:
            return super().put_new(path, data)
        self.lists += 1
        return super().put_new(path, data[: len(data) // 2]) if self.half else True


@pytest.mark.parametrize("half", [False, True])
def test_no_commit_refers_to_a_list_that_is_not_there_as_it_was_written(tmp_path: Path, *, half: bool) -> None:
    storage = Lossy(tmp_path)
    storage.half = half
    commit(storage, 1, 9)
    assert storage.lists
    lossy = numbers(str(tmp_path))
    commit(str(tmp_path), 9, 19)

    assert list(range(1, 9)) == lossy
    assert list(range(1, 19)) == numbers(str(tmp_path))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_list_that_is_gone_or_another_is_named_and_the_next_commit_does_without(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    commit(str(tmp_path), 1, 20)
    run = choose_runs(open_storage(str(tmp_path)), None)[0]
    for path in list_lists(tmp_path):
        damage(path)
    with pytest.raises(DestinationUnusable, match=r"_lists/t/\w+\.json must be the list of parts as it was written"):
        numbers(str(tmp_path))
    verification = verify_run(open_storage(str(tmp_path)), run)
    (summary, *_) = list_runs(open_storage(str(tmp_path)))
    emit(opened(str(tmp_path)), [json_row(20)])

    assert "manifest" == verification.damages[0].kind
    assert "damaged" == summary.state
    assert list(range(1, 21)) == numbers(str(tmp_path))


class Slow(LocalStorage):
    """A folder where something happens between the reading of the newest commit and the writing of the next one."""

    then: Callable[[], None] | None = None

    def read(self, path: str) -> bytes | None:
        data = super().read(path)
        if path.endswith("manifest.json") and self.then is not None:
            then, self.then = self.then, None
            then()
        return data


@pytest.mark.parametrize("others", [1, FEW, 3 * FEW + 1])
def test_a_commit_counts_where_others_have_made_and_deleted_one_of_its_number(tmp_path: Path, others: int) -> None:
    def write_other_partition() -> None:
        for number in range(1, others + 1):
            emit(other, [message(b"no", number, position=Position(1, number))])

    emit(opened(str(tmp_path)), [json_row(1)])
    storage = Slow(tmp_path)
    sink, other = opened(storage), opened(str(tmp_path))
    storage.then = write_other_partition
    emit(sink, [json_row(2)])

    assert [1, 2, *range(1, others + 1)] == numbers(str(tmp_path))


@pytest.mark.parametrize("others", [1, FEW, 3 * FEW + 1])
def test_a_scorer_continues_after_all_that_another_has_written_and_put_into_lists(tmp_path: Path, others: int) -> None:
    slow = opened(str(tmp_path))
    emit(slow, [json_row(1)])
    commit(str(tmp_path), 2, others + 2)
    emit(slow, [message(b"no", 1, position=Position(1, 1))])
    continued = slow.next_numbers
    emit(slow, [json_row(number) for number in range(1, others + 4)])

    assert {0: others + 2, 1: 2} == continued
    assert [*range(1, others + 4), 1] == numbers(str(tmp_path))


def test_a_scorer_goes_on_where_all_commits_were_deleted(tmp_path: Path) -> None:
    sink = opened(str(tmp_path))
    for number in range(1, 20):
        emit(sink, [json_row(number)])
    for path in tmp_path.glob(f"{ROOT}/t-*/manifest.json"):
        path.unlink()
    emit(sink, [json_row(20)])

    assert list(range(1, 21)) == numbers(str(tmp_path))
