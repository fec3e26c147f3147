"""A table of parts: exact by itself, whatever is emitted twice, cut otherwise, or by two at once."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.local.s3 import S3Server
from serving.errors import DestinationUnusable, RunDamaged, RunNameTaken, StorageFault
from serving.model.pin import ModelPin
from tasks.batch.manifest import open_predictions, open_rejects
from tasks.batch.parts import REJECT_REASON
from tasks.batch.plan import ROOT
from tasks.storage import Entry, LocalStorage, Storage, open_storage
from tasks.stream.decode import Decoder, Reason
from tasks.stream.message import Message, Position
from tasks.stream.options import ToParts
from tasks.stream.parts_sink import NUMBER, PARTITION, ROW, PartsSink, build_table_plan
from tests.overwriting_store import overwriting_store
from tests.tasks.stream.messages import CONTRACT, KEYS, arrow_rows, decoder, json_row, message, score

PIN = ModelPin(name="sum", version="1", model_id=None, source="", digest="0" * 64)


def opened(
    place: str | Storage, decode: Decoder | None = None, identity: str = "a stream", name: str = "t"
) -> PartsSink:
    storage = open_storage(place) if isinstance(place, str) else place
    plan = build_table_plan(
        ToParts(destination=storage.url, name=name), identity, model=PIN, contract=CONTRACT, keys=KEYS
    )
    return PartsSink(storage, plan, PIN, (decode or decoder()).key_types)


def emit(sink: PartsSink, messages: Sequence[Message], decode: Decoder | None = None) -> None:
    sink.emit([score(messages, decode)])


def numbers(place: str) -> list[int]:
    table = open_predictions(place).collect()
    return [int(number) for number in table[NUMBER]]


def test_a_table_has_a_row_for_every_message_as_batch_runs_have_it(place: str) -> None:
    sink = opened(place)
    emit(sink, [json_row(1), json_row(2, a=None), message(b"no", 3)])
    emit(sink, [json_row(4, a=1)])
    table = open_predictions(place).collect()

    assert [1, 2, 3, 4] == numbers(place)
    assert [PARTITION, NUMBER, ROW, "id", "score", "reject_column", REJECT_REASON] == table.columns
    assert [5.5, None, None, 5.0] == table["score"].to_list()
    assert ["1", "2", None, "4"] == table["id"].to_list()
    assert [None, "null", Reason.NOT_JSON, None] == table[REJECT_REASON].to_list()
    assert 2 == open_rejects(place).collect().height
    assert {0: 5} == sink.next_numbers


def test_what_is_emitted_twice_or_cut_otherwise_is_there_once(place: str) -> None:
    emit(opened(place), [json_row(number) for number in (1, 2, 3)])
    again = opened(place)
    emit(again, [json_row(number) for number in (2, 3)])
    emit(again, [json_row(number) for number in (3, 4, 5)])

    assert [1, 2, 3, 4, 5] == numbers(place)
    assert {0: 6} == opened(place).next_numbers


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_two_scorers_in_any_order_write_each_message_once(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = str(tmp_path_factory.mktemp("race"))
    rows = [json_row(number) for number in range(1, 30)]
    at = {0: 0, 1: 0}
    sinks = {who: opened(place) for who in at}
    while min(at.values()) < len(rows):
        who = data.draw(st.sampled_from([each for each in at if at[each] < len(rows)]))
        if data.draw(st.integers(0, 4)) == 0:
            # It was killed: the next one begins where the table ends.
            sinks[who] = opened(place)
            at[who] = max(0, sinks[who].next_numbers.get(0, 1) - 1)
        stop = min(len(rows), at[who] + data.draw(st.integers(1, 9)))
        emit(sinks[who], rows[at[who] : stop])
        at[who] = stop

    assert list(range(1, 30)) == numbers(place)


def test_two_at_once_leave_one_exact_table(tmp_path: Path) -> None:
    sinks = [opened(str(tmp_path)) for _ in range(2)]

    def write(sink: PartsSink, step: int) -> None:
        for start in range(1, 200, step):
            emit(sink, [json_row(number) for number in range(start, min(start + step, 200))])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, sinks, (7, 11)))

    assert list(range(1, 200)) == numbers(str(tmp_path))


class Interrupted(LocalStorage):
    """A folder where something happens right after commits were listed."""

    then: Callable[[], None] | None = None

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        found = super().entries(prefix, depth)
        if prefix == ROOT and self.then is not None:
            then, self.then = self.then, None
            then()
        return found


def test_a_commit_lists_what_another_scorer_has_committed_since_commits_were_listed(tmp_path: Path) -> None:
    storage = Interrupted(tmp_path)
    slow, quick = opened(storage), opened(str(tmp_path))
    storage.then = lambda: emit(quick, [json_row(number) for number in (1, 2, 3)])
    emit(slow, [json_row(1)])

    assert [1, 2, 3] == numbers(str(tmp_path))


class Forgetful(LocalStorage):
    """A folder that once says that it has written a part, and has not."""

    forgets: bool = True

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        if path.endswith(".parquet") and self.forgets:
            self.forgets = False
            return True
        return super().put_new(path, data)


def test_a_part_that_is_not_there_once_written_ends_the_stream_and_no_message_is_passed_over(tmp_path: Path) -> None:
    storage = Forgetful(tmp_path)
    sink = opened(storage)
    with pytest.raises(StorageFault, match="must be readable once written, but is gone"):
        emit(sink, [json_row(1), json_row(2)])
    emit(opened(storage), [json_row(1), json_row(2), json_row(3)])

    assert [1, 2, 3] == numbers(str(tmp_path))


def test_a_part_that_was_deleted_and_written_again_is_refused_by_a_scorer_that_read_the_first(tmp_path: Path) -> None:
    sink = opened(str(tmp_path))
    emit(sink, [json_row(number) for number in range(1, 10)])
    (part,) = (tmp_path / "run=t").glob("*.parquet")
    part.unlink()
    emit(opened(str(tmp_path)), [json_row(number) for number in range(1, 4)])

    with pytest.raises(RunDamaged, match="but is another by now: it was deleted, and written again"):
        emit(sink, [json_row(10)])


class Overtaken(LocalStorage):
    """A folder to which another scorer writes right before a part; a part that gets lost counts as written."""

    other: Callable[[], None] | None = None
    loses: bool = False

    def put_new(self, path: str, data: bytes | memoryview) -> bool:
        if path.endswith(".parquet") and self.other is not None:
            other, self.other = self.other, None
            other()
            if self.loses:
                return True
        return super().put_new(path, data)


def test_parts_that_overlap_after_one_was_written_again_are_refused_and_no_message_is_listed_twice(
    tmp_path: Path,
) -> None:
    def write_again() -> None:
        (tmp_path / "run=t" / "part-00000-0000.parquet").unlink()
        emit(opened(str(tmp_path)), [json_row(number) for number in range(1, 6)])

    storage = Overtaken(tmp_path)
    sink = opened(storage)
    emit(sink, [json_row(number) for number in (1, 2, 3)])
    storage.other = write_again
    with pytest.raises(RunDamaged, match="but is another by now"):
        emit(sink, [json_row(number) for number in (4, 5, 6)])

    message = r"part-00000-0004\.parquet begins at message 4 .* which has messages up to 5.*Delete"
    with pytest.raises(RunDamaged, match=message):
        opened(str(tmp_path))
    assert [1, 2, 3, 4, 5] == numbers(str(tmp_path))

    (tmp_path / "run=t" / "part-00000-0004.parquet").unlink()
    emit(opened(str(tmp_path)), [json_row(number) for number in (4, 5, 6)])
    assert [1, 2, 3, 4, 5, 6] == numbers(str(tmp_path))


def test_no_message_is_passed_over_where_a_part_that_was_lost_is_another_scorers_by_then(tmp_path: Path) -> None:
    storage = Overtaken(tmp_path)
    sink, quick = opened(storage), opened(str(tmp_path))
    storage.other, storage.loses = lambda: emit(quick, [json_row(1)]), True
    emit(sink, [json_row(1), json_row(2)])
    emit(sink, [json_row(3)])

    assert [1, 2, 3] == numbers(str(tmp_path))


def test_numbers_may_have_gaps_and_each_partition_has_its_own(place: str) -> None:
    sink = opened(place)
    emit(sink, [message(json_row(1).payload, position=Position(1, 7))])
    emit(sink, [json_row(10), message(json_row(2).payload, position=Position(1, 9)), json_row(20)])

    assert {0: 21, 1: 10} == sink.next_numbers == opened(place).next_numbers
    assert [10, 20, 7, 9] == numbers(place)


def test_rows_of_one_message_are_numbered_and_keys_keep_the_type_of_the_table(place: str) -> None:
    decode = decoder()
    emit(opened(place, decode), [arrow_rows(1, [1.0, 2.0]), arrow_rows(2, [3.0])], decode)
    decode = decoder()
    sink = opened(place, decode)
    emit(sink, [json_row(3), json_row(4)], decode)
    table = open_predictions(place).collect()

    assert [(1, 0), (1, 1), (2, 0), (3, 0), (4, 0)] == list(zip(table[NUMBER], table[ROW], strict=True))
    assert pl.Int64 == table.schema["id"]
    assert [0, 1, 0, 3, 4] == table["id"].to_list()


def test_a_reader_sees_the_last_commit_and_older_ones_are_deleted_in_the_end(tmp_path: Path) -> None:
    sink = opened(str(tmp_path))
    for number in range(1, 8):
        emit(sink, [json_row(number)])

    assert [1, 2, 3, 4, 5, 6, 7] == numbers(str(tmp_path))
    kept = ["t-00000005", "t-00000006", "t-00000007"]
    assert kept == sorted(p.parent.name for p in tmp_path.rglob("manifest.json"))
    assert kept == sorted(path.name for path in (tmp_path / "_overnight").glob("t-*"))


def test_a_part_without_its_commit_is_committed_when_the_table_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = opened(str(tmp_path))
    emit(sink, [json_row(1)])
    monkeypatch.setattr(PartsSink, "_commit", lambda _: None)
    emit(sink, [json_row(2)])
    before = numbers(str(tmp_path))
    monkeypatch.undo()
    opened(str(tmp_path))

    assert [1] == before
    assert [1, 2] == numbers(str(tmp_path))


def test_a_later_commit_is_the_newest_with_any_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emit(opened(str(tmp_path)), [json_row(1)])
    (manifest,) = tmp_path.rglob("manifest.json")
    manifest.write_text(manifest.read_text().replace('"planned_at":"20', '"planned_at":"21'))
    emit(opened(str(tmp_path)), [json_row(2)])

    assert [1, 2] == numbers(str(tmp_path))


def test_a_table_of_another_stream_is_refused(place: str) -> None:
    opened(place)

    with pytest.raises(RunNameTaken, match="'t' already holds a run of another plan"):
        opened(place, identity="another stream")
    opened(place, identity="another stream", name="other")


@pytest.mark.parametrize("deleted", ["_overnight", "_overnight/t"])
def test_parts_of_another_table_of_that_name_are_never_taken_for_its_own(tmp_path: Path, deleted: str) -> None:
    emit(opened(str(tmp_path)), [json_row(1), json_row(2)])
    shutil.rmtree(tmp_path / deleted)
    with pytest.raises(RunDamaged, match="got one of another table of that name, whose records below _overnight"):
        opened(str(tmp_path), identity="another stream")


def test_a_store_that_overwrites_is_refused_before_a_table_is_begun(s3: S3Server) -> None:
    place = f"s3://lake/{uuid.uuid4().hex}"
    with overwriting_store(s3) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(DestinationUnusable, match="ignores `If-None-Match"):
            opened(place)

        assert ["_overnight/create-only.json"] == [entry.path for entry in open_storage(place).entries()]


def test_a_scorer_whose_plan_was_deleted_and_planned_again_hides_no_commit(tmp_path: Path) -> None:
    first = opened(str(tmp_path))
    emit(first, [json_row(1)])
    shutil.rmtree(tmp_path / "_overnight" / "t")
    second = opened(str(tmp_path))
    emit(second, [json_row(2)])
    emit(first, [json_row(3)])

    assert [1, 2, 3] == numbers(str(tmp_path))


def test_a_clock_that_goes_back_hides_no_commit(tmp_path: Path) -> None:
    sink = opened(str(tmp_path))
    for number in (1, 2):
        emit(sink, [json_row(number)])
    commits = sorted((tmp_path / "_overnight").glob("t-*/manifest.json"))
    first = json.loads(commits[0].read_text())
    commits[0].write_text(json.dumps({**first, "planned_at": "2100-01-01T00:00:00Z"}))

    assert [1, 2] == numbers(str(tmp_path))


def test_a_part_that_was_deleted_or_damaged_is_named(tmp_path: Path) -> None:
    sink = opened(str(tmp_path))
    for number in (1, 2, 3):
        emit(sink, [json_row(number)])
    second = tmp_path / "run=t" / "part-00000-0002.parquet"
    data = second.read_bytes()

    second.unlink()
    with pytest.raises(RunDamaged, match=r"got none that begins at 2 of partition 0, but one at 3"):
        opened(str(tmp_path))
    second.write_bytes(data[:100])
    with pytest.raises(RunDamaged, match=r"part-00000-0002\.parquet must be a part of table t that can be read"):
        opened(str(tmp_path))


def test_a_stream_continues_after_no_part_whose_end_has_a_wrong_bit(tmp_path: Path) -> None:
    highest = 0x1122334455
    emit(opened(str(tmp_path)), [json_row(1), json_row(highest)])
    (part,) = (tmp_path / "run=t").glob("*.parquet")
    data = part.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    places = [at for at in range(footer, len(data)) if data.startswith(highest.to_bytes(8, "little"), at)]
    assert places

    for at in places:
        part.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(RunDamaged, match=r"part-00000-0000\.parquet .* that can be read, got: .* digest"):
            opened(str(tmp_path))
    part.write_bytes(data)
    assert {0: highest + 1} == opened(str(tmp_path)).next_numbers


def test_scores_are_those_that_the_model_gave(tmp_path: Path) -> None:
    values = np.linspace(-5, 5, 101, dtype=np.float32)
    emit(
        opened(LocalStorage(tmp_path)), [json_row(at, a=float(value), b=0) for at, value in enumerate(values, start=1)]
    )

    assert values.tolist() == open_predictions(str(tmp_path)).collect()["score"].to_list()
