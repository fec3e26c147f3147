"""The plan: every row once, whatever the files; one plan a key, whichever worker writes it first."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import DestinationUnusable, OvernightError, PlanTooLarge, PublishRefused, RunNameTaken
from serving.model.contract import ColumnPolicy, Output
from serving.model.interface import Engine
from tasks.batch.chunk_layout import (
    CHUNK_BYTES_MAX,
    Chunk,
    Piece,
    Sizes,
    block_rows,
    choose_chunk_rows,
    cut_chunks,
    cut_shards,
)
from tasks.batch.dataset import Dataset, Snapshot, SourceFile
from tasks.batch.footer import GroupBytes
from tasks.batch.memory import check_fits, memory_bytes
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan, digest_chunk, digest_plan, make_plan, run_key, used_columns
from tasks.batch.run_records import (
    RunStart,
    check_plan_key,
    confirm_plan,
    load_plan,
    load_start,
    load_started_plan,
    save_plan,
    save_start,
)
from tasks.storage import Storage
from tests.tasks.batch.small import PIN, a_contract, a_plan, numbers, parquet, put

FILES = st.lists(
    st.lists(st.integers(0, 70), max_size=4).map(
        lambda groups: SourceFile(path="x", size=1, tag="1", row_groups=tuple(groups))
    ),
    max_size=6,
)
SIZES = st.builds(
    Sizes,
    batch_size=st.integers(1, 40),
    slots=st.integers(1, 8),
    row_bytes=st.floats(0, 1e8),
    rows_per_second=st.none() | st.floats(1e-3, 1e6),
    batch_unit=st.sampled_from(["rows", "tokens"]),
)


def row_ids(files: list[SourceFile], chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    assert all(chunk.rows == sum(piece.rows for piece in chunk.pieces) for chunk in chunks)
    assert files or not chunks
    return [
        (piece.file, piece.row_group, row)
        for chunk in chunks
        for piece in chunk.pieces
        for row in range(piece.row_start, piece.row_stop)
    ]


@given(files=FILES, rows_per_chunk=st.integers(1, 100), batch_size=st.integers(1, 40))
def test_every_row_is_in_one_chunk_in_order_and_a_row_group_is_whole_or_cut_on_multiples_of_the_batch(
    files: list[SourceFile], rows_per_chunk: int, batch_size: int
) -> None:
    chunks = cut_chunks(files, rows_per_chunk, batch_size)
    expected = [
        (at, group, row)
        for at, file in enumerate(files)
        for group, rows in enumerate(file.row_groups)
        for row in range(rows)
    ]

    assert expected == row_ids(files, chunks)
    assert chunks == cut_chunks(files, rows_per_chunk, batch_size)
    assert all(0 < chunk.rows <= rows_per_chunk for chunk in chunks)
    # A chunk smaller than a batch is cut where it must be.
    step = min(batch_size, rows_per_chunk)
    for chunk in chunks:
        for piece in chunk.pieces:
            rows = files[piece.file].row_groups[piece.row_group]
            sliced = rows > rows_per_chunk

            assert piece.rows > 0
            assert not sliced or len(chunk.pieces) == 1
            assert sliced or (0, rows) == (piece.row_start, piece.row_stop)
            assert piece.row_start % step == 0


def test_small_files_share_a_chunk_and_a_large_row_group_is_cut_evenly() -> None:
    files = [SourceFile(path=str(at), size=1, tag="1", row_groups=(rows,)) for at, rows in enumerate((3, 4, 2, 21))]
    chunks = cut_chunks(files, 10, 2)

    assert [9, 8, 8, 5] == [chunk.rows for chunk in chunks]
    assert Piece(file=3, row_group=0, row_start=8, row_stop=16) == chunks[2].pieces[0]


@given(count=st.integers(1, 300), sizes=SIZES)
def test_shards_are_consecutive_and_cover_all_chunks(count: int, sizes: Sizes) -> None:
    chunks = chunks_of_five(count)
    shards = cut_shards(chunks, 5 * count, sizes)

    assert chunks == [chunk for shard in shards for chunk in shard]
    assert all(shards)
    assert len(shards) <= 1000
    assert len(shards) >= min(count, 2 * sizes.slots if sizes.slots > 1 else 1)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert shards == cut_shards(chunks, 5 * count, sizes)


@pytest.mark.parametrize(
    ("count", "slots", "rows_per_second", "shards"),
    [(3000, 2, 15_000 / 86_400, 1000), (3000, 2, 15_000 / 3600, 60), (10_000, 2000, 0.001, 4000)],
    ids=["a day", "an hour", "two for each of many slots"],
)
def test_a_run_has_shards_of_a_minute_at_most_a_thousand_or_two_for_each_slot(
    count: int, slots: int, rows_per_second: float, shards: int
) -> None:
    sizes = Sizes(batch_size=1, slots=slots, row_bytes=8, rows_per_second=rows_per_second)

    assert shards == len(cut_shards(chunks_of_five(count), 5 * count, sizes))


def chunks_of_five(count: int) -> list[Chunk]:
    return [Chunk(pieces=(Piece(file=0, row_group=at, row_start=0, row_stop=5),)) for at in range(count)]


@given(rows=st.integers(1, 10**10), sizes=SIZES)
def test_a_chunk_is_a_batch_times_a_power_of_two_within_its_limits(rows: int, sizes: Sizes) -> None:
    most = choose_chunk_rows(rows, sizes)
    batches, rest = divmod(most, sizes.step)

    assert rest == 0
    assert batches & (batches - 1) == 0
    if batches > 1:
        assert most * sizes.row_bytes <= 64 << 20
        assert most * sizes.slots * 8 <= rows
        is_of_time = sizes.rows_per_second is None or most <= 10 * sizes.rows_per_second
        assert is_of_time or rows > 100_000 * most / 2


def test_a_large_run_has_chunks_that_take_longer_rather_than_more_than_a_hundred_thousand() -> None:
    sizes = Sizes(batch_size=512, slots=1000, row_bytes=256, rows_per_second=3000)
    wide = Sizes(batch_size=512, slots=1000, row_bytes=1024, rows_per_second=3000)

    assert 16_384 == choose_chunk_rows(10**9, sizes)
    assert 131_072 == choose_chunk_rows(10**10, sizes)
    # 64 MiB of rows are not exceeded.
    assert 65_536 == choose_chunk_rows(10**10, wide)


@pytest.mark.parametrize(
    ("rows", "batch", "rows_per_second", "rows_per_pass", "expected"),
    [
        *((1_500_000, 1024, rate, 0.0, rows) for rate, rows in ((400.0, 2048), (5.0, 32), (0.01, 1), (None, 65_536))),
        # A batch of tokens that takes longer, where a slot has rows enough.
        *((rows, 8192, 0.8, 50.3, expected) for rows, expected in ((1_500_000, 64), (400, 16))),
    ],
)
def test_a_chunk_of_texts_is_ten_seconds_of_work_or_a_batch_of_tokens(
    rows: int, batch: int, rows_per_second: float | None, rows_per_pass: float, expected: int
) -> None:
    rates = {"rows_per_second": rows_per_second, "rows_per_pass": rows_per_pass}
    sizes = Sizes(batch_size=batch, slots=2, row_bytes=100, batch_unit="tokens", **rates)

    assert expected == choose_chunk_rows(rows, sizes)


def test_a_plan_holds_what_it_was_made_of(place: str) -> None:
    put(f"{place}/in", {"p=1/a.parquet": parquet(numbers(0, 25), row_group_size=20), "p=2/b.parquet": numbers(25, 30)})
    plan = a_plan(f"{place}/in", f"{place}/out", BatchOptions(rows_per_chunk=10, key_columns=("p", "id")), slots=2)

    assert plan.rows == 30
    assert ("a", "b", "p", "id") == plan.columns
    assert plan.partitions == {"p": "string"}
    assert [8, 8, 4, 10] == [chunk.rows for chunk in plan.chunks.values()]
    assert plan.source.files[0].row_groups == ()
    assert plan.snapshot.files[0].row_groups == (20, 5)
    assert plan.folder == f"_overnight/{plan.run}" == f"_overnight/{plan.key}"


@pytest.fixture
def made(tmp_path: object) -> Plan:
    return a_plan(put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)}), f"{tmp_path}/out")


def test_a_plan_comes_back_from_json_as_it_was(tmp_path: object) -> None:
    put(f"{tmp_path}/in", {"ü=x%20y/a b.parquet": numbers(0, 25)})
    options = BatchOptions(
        key_columns=("id",),
        input_columns={"x": ("a", "b")},
        policies={
            "*": ColumnPolicy(cast="round", null="keep"),
            "a": ColumnPolicy(null=0.1),
            "b": ColumnPolicy(null="-1"),
        },
        rows_per_chunk=7,
        name="nightly",
    )
    contract = a_contract(
        "a", "b", outputs=(Output(name="y", dtype="float32", shape=(3,)), Output(name="t", dtype="str"))
    )
    plan = a_plan(f"{tmp_path}/in", f"{tmp_path}/out", options, contract=contract)

    assert plan == Plan.model_validate_json(plan.model_dump_json())


@pytest.mark.parametrize("null", ["reject", "keep", "", "5", "nan", 0.0, -1.5, 1e300])
def test_a_null_policy_comes_back_from_json_as_it_was(null: float | str) -> None:
    options = BatchOptions(policies={"a": ColumnPolicy(null=null)})
    back = BatchOptions.model_validate_json(options.model_dump_json())

    assert options == back
    assert type(options.policies["a"].null) is type(back.policies["a"].null)


SNAPSHOT = Snapshot(root="/in", format="parquet", files=(SourceFile(path="a", size=1, tag="1"),))


def key(*, digest: str = "d" * 64, snapshot: Snapshot = SNAPSHOT, score: str = "score", **options: object) -> str:
    contract = a_contract("a", outputs=(Output(name=score, dtype="float32"),))
    return run_key(PIN.model_copy(update={"digest": digest}), snapshot, contract, BatchOptions(**options))  # type: ignore[arg-type]


def moved(**change: object) -> Snapshot:
    return SNAPSHOT.model_copy(update={"files": (SNAPSHOT.files[0].model_copy(update=change),)})


def test_the_same_call_has_the_same_key() -> None:
    assert key() == key()
    assert len(key()) == 32
    assert key(policies={"a": ColumnPolicy(), "b": ColumnPolicy(null=0.0)}) == key(
        policies={"b": ColumnPolicy(null=0.0), "a": ColumnPolicy()}
    )
    assert key(rescore="first") == key(rescore="first") != key(rescore="second")


@pytest.mark.parametrize(
    "other",
    [
        lambda: key(digest="e" * 64),
        lambda: key(snapshot=moved(path="b")),
        lambda: key(snapshot=moved(size=2)),
        lambda: key(snapshot=moved(tag="2")),
        lambda: key(snapshot=SNAPSHOT.model_copy(update={"root": "/other"})),
        lambda: key(snapshot=SNAPSHOT.model_copy(update={"files": (*SNAPSHOT.files, *SNAPSHOT.files)})),
        lambda: key(score="other"),
        lambda: key(key_columns=("id",)),
        lambda: key(policies={"a": ColumnPolicy(null="keep")}),
        lambda: key(output="delta"),
        lambda: key(output="delta", delta_mode="replace"),
        lambda: key(batch_size=512),
        lambda: key(rows_per_chunk=512),
        lambda: key(rescore="after-the-outage"),
    ],
)
def test_whatever_changes_the_output_changes_the_key(other: Callable[[], str]) -> None:
    assert key() != other()


@pytest.mark.parametrize(
    "option",
    [
        {"slots": 7},
        {"memory_mb": 7},
        {"max_reject_fraction": 0.7},
        {"name": "seven"},
        {"experiment": "seven"},
        {"experiment": None},
        {"allow_pickle": True},
    ],
)
def test_what_only_carries_a_run_out_does_not_change_the_key(option: dict[str, object]) -> None:
    assert key() == key(**option)


def test_a_model_promoted_under_another_name_is_the_same_run() -> None:
    renamed = PIN.model_copy(update={"name": "other", "version": "9", "source": "elsewhere"})

    assert run_key(PIN, SNAPSHOT, a_contract("a"), BatchOptions()) == run_key(
        renamed, SNAPSHOT, a_contract("a"), BatchOptions()
    )


def test_a_plan_is_saved_once_and_read_back(storage: Storage, made: Plan) -> None:
    assert load_plan(storage, made.run) is None
    assert made == save_plan(storage, made)
    assert made == load_plan(storage, made.run)


def test_of_racing_plans_every_loser_reads_the_winners(storage: Storage, made: Plan) -> None:
    plans = [
        made.model_copy(update={"planned_at": made.planned_at + timedelta(at), "batch_size": at + 1}) for at in range(8)
    ]
    plans = [plan.model_copy(update={"digest": digest_plan(plan)}) for plan in plans]
    barrier = threading.Barrier(len(plans))

    def race(plan: Plan) -> Plan:
        barrier.wait()
        return save_plan(storage, plan)

    with ThreadPoolExecutor(len(plans)) as pool:
        saved = list(pool.map(race, plans))

    assert saved[0] in plans
    assert [saved[0]] * len(plans) == saved
    assert saved[0] == load_plan(storage, made.run)


def test_a_plans_digest_tells_what_shapes_its_parts_and_nothing_of_the_attempt(made: Plan) -> None:
    chunks = made.shards[0]
    shaped = {"batch_size": 5, "shards": (chunks[1:], chunks[:1]), "engine": Engine(linear="onednn"), "key": "0" * 32}
    told = {"planned_at": made.planned_at + timedelta(1), "order": 7, "row_bytes": 1.0, "run": "nightly"}

    assert made.digest == digest_plan(made)
    assert {made.digest} == {digest_plan(made.model_copy(update={name: value})) for name, value in told.items()}
    assert len(shaped) + 1 == len(
        {made.digest} | {digest_plan(made.model_copy(update={name: value})) for name, value in shaped.items()}
    )


def test_a_chunks_digest_tells_file_rows_batches_and_engine(made: Plan) -> None:
    updates = ({}, {"batch_size": 5}, {"engine": Engine(threads=2)}, {"shape": "0"}, {"made_with": ("numpy 1",)})
    plans = [made.model_copy(update=update) for update in updates]
    digests = {digest_chunk(plan, chunk) for plan in plans for chunk in plan.chunks.values()}

    assert len(plans) * len(made.chunks) == len(digests)


def test_a_plan_of_an_earlier_release_gets_its_digest_when_it_is_read(storage: Storage, made: Plan) -> None:
    storage.put_new(f"{made.folder}/plan.json", made.model_dump_json(exclude={"digest", "order"}).encode())

    assert made == load_plan(storage, made.run)


def test_a_name_that_holds_another_plan_is_taken(storage: Storage, made: Plan) -> None:
    named = made.model_copy(update={"run": "nightly"})
    other = named.model_copy(update={"key": "0" * 32})
    save_plan(storage, named)

    assert named == save_plan(storage, named)
    told = rf"'nightly' already holds .*that of models:/churn/3 over {re.escape(made.source.root)}, made 2.* UTC"
    with pytest.raises(RunNameTaken, match=told):
        save_plan(storage, other)
    with pytest.raises(RunNameTaken):
        check_plan_key(named, other.key)


def test_a_plan_that_vanishes_is_told(local: Storage, made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "read", lambda _: None, raising=True)
    with pytest.raises(OvernightError, match="must be readable once written, but is gone"):
        save_plan(local, made)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"key": 1}', b"\xff", b'{"later": "field"}', None])
def test_a_plan_of_another_version_or_one_that_was_edited_is_told_by_its_address(
    storage: Storage, made: Plan, data: bytes | None
) -> None:
    edited = made.model_copy(update={"batch_size": made.batch_size + 1}).model_dump_json().encode()
    storage.put_new(f"{made.folder}/plan.json", edited if data is None else data)
    told = "must be as it was written, with the digest" if data is None else "must be a plan that this version"
    with pytest.raises(DestinationUnusable, match=rf"{made.folder}/plan\.json {told}"):
        load_plan(storage, made.run)


def test_the_attempts_of_a_flow_run_are_tied_to_the_first_ones_run(storage: Storage) -> None:
    assert load_start(storage, "flow") is None
    first, second = RunStart(run="first", key="1"), RunStart(run="second", key="2")
    assert save_start(storage, "flow", first) == first
    assert save_start(storage, "flow", second) == first
    assert load_start(storage, "flow") == first
    assert load_start(storage, "other") is None


def test_a_flow_run_goes_on_with_what_it_began_or_is_told_why_not(storage: Storage, made: Plan) -> None:
    start = RunStart(run=made.run, key=made.key)
    with pytest.raises(OvernightError, match="must be there, since this flow run began it, but is gone"):
        load_started_plan(storage, start)
    save_plan(storage, made)

    assert made == load_started_plan(storage, start) == load_started_plan(storage, RunStart(run=made.run))
    with pytest.raises(RunNameTaken, match="already holds a run of another plan"):
        load_started_plan(storage, start.model_copy(update={"key": "of a call that another took the name of"}))


def test_a_plan_is_confirmed_with_its_number_or_told_to_be_gone_or_another(storage: Storage, made: Plan) -> None:
    with pytest.raises(PublishRefused, match=r"plan\.json must stand until run .* is published, but is gone"):
        confirm_plan(storage, made)
    save_plan(storage, made.model_copy(update={"order": 7}))
    told = r"order/00000007\.json must hold run .*, but is gone: records were deleted"
    with pytest.raises(PublishRefused, match=told):
        confirm_plan(storage, made)
    storage.put_new("_overnight/order/00000007.json", b'{"run": "another"}')
    with pytest.raises(PublishRefused, match="but holds run another"):
        confirm_plan(storage, made)
    storage.delete(["_overnight/order/00000007.json"])
    storage.put_new("_overnight/order/00000007.json", json.dumps({"run": made.run}).encode())

    assert made.model_copy(update={"order": 7}) == confirm_plan(storage, made)
    with pytest.raises(PublishRefused, match="but is another by now"):
        confirm_plan(storage, made.model_copy(update={"digest": "0" * 64}))


def test_a_plan_that_does_not_fit_says_what_would(made: Plan) -> None:
    needed = memory_bytes(made, 2)
    check_fits(needed, needed, made, 2)
    told = r"must fit in 100 MiB, but 2 slots over chunks of 8 rows need 300 MiB\. Lower rows_per_chunk or slots"
    with pytest.raises(PlanTooLarge, match=told):
        check_fits(300 << 20, 100 << 20, made, 2)


def test_memory_grows_with_slots_blocks_and_chunks(tmp_path: object) -> None:
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 1000)})
    small, large = (
        a_plan(f"{tmp_path}/in", f"{tmp_path}/out", BatchOptions(rows_per_chunk=rows)) for rows in (10, 1000)
    )

    assert memory_bytes(small, 1) < memory_bytes(small, 2) < memory_bytes(small, 3)
    assert memory_bytes(small, 1) < memory_bytes(large, 1)


def sized(*groups: tuple[int, int]) -> SourceFile:
    """Return a file of row groups of so many rows, each of so many bytes, all of them of keys."""
    return SourceFile(
        path="a.parquet",
        size=1,
        tag="t",
        row_groups=tuple(rows for rows, _ in groups),
        group_bytes=tuple(GroupBytes(rows * size, rows * size, rows * size, 0) for rows, size in groups),
    )


def planned(*files: SourceFile, row_bytes: float = 20.0, sizes: Sizes | None = None, **options: object) -> Plan:
    snapshot = Snapshot(root="/in", format="parquet", files=files)
    return make_plan(
        key="k",
        model=PIN,
        contract=a_contract("a"),
        options=BatchOptions(**{"key_columns": ("id",), **options}),  # type: ignore[arg-type]
        source=snapshot,
        dataset=Dataset(snapshot=snapshot, schema=pa.schema([("a", pa.float32()), ("id", pa.string())]), hive=()),
        sizes=sizes or Sizes(batch_size=1024, slots=2, row_bytes=row_bytes, rows_per_second=None),
    )


def test_rows_that_get_larger_are_cut_by_their_own_bytes_and_the_others_as_before() -> None:
    small, large = (1 << 20, 20), (10_000, 100_000)
    plan = planned(sized(small, large), row_bytes=20.0)
    alone = planned(sized(small), row_bytes=20.0)
    in_group = {group: [c for c in plan.chunks.values() if c.pieces[0].row_group == group] for group in (0, 1)}

    assert {chunk.rows for chunk in alone.chunks.values()} == {chunk.rows for chunk in in_group[0]}
    assert all(plan.block_rows(chunk) == min(block_rows(1024, 20.0), chunk.rows) for chunk in in_group[0])
    assert all(chunk.rows * 100_000 <= CHUNK_BYTES_MAX for chunk in in_group[1])
    assert 10_000 == sum(chunk.rows for chunk in in_group[1])
    assert plan.rows == sum(chunk.rows for chunk in plan.chunks.values())


@pytest.mark.parametrize(
    ("groups", "rows"), [([(100, 400_000)] * 7, [100] * 7), ([(3, 1 << 28)], [1, 1, 1])], ids=["groups", "a row"]
)
def test_row_groups_or_rows_that_fill_a_chunk_do_not_share_one(groups: list[tuple[int, int]], rows: list[int]) -> None:
    assert rows == [chunk.rows for chunk in planned(sized(*groups)).chunks.values()]


@pytest.mark.parametrize("rows", [1, 1000, 70_000, 1 << 20, 5_000_000])
@pytest.mark.parametrize("size", [4, 20, 128, 1000, 12_000])
def test_a_table_of_even_rows_is_cut_as_by_rows_alone(rows: int, size: int) -> None:
    files = (sized((rows, size), (rows, size), (7, size)), sized((rows, size)))
    bare = [file.model_copy(update={"group_bytes": ()}) for file in files]

    assert [c.rows for c in planned(*bare, row_bytes=size).chunks.values()] == [
        c.rows for c in planned(*files, row_bytes=size).chunks.values()
    ]


def test_what_is_stated_grows_with_the_largest_rows_wherever_they_are() -> None:
    even = planned(sized((10_000, 20), (10_000, 20)))
    late = planned(sized((10_000, 20), (10_000, 100_000)))

    assert memory_bytes(late, 2) > memory_bytes(even, 2) + 2 * CHUNK_BYTES_MAX


def test_a_plan_that_was_made_without_the_bytes_of_row_groups_is_held_to_what_was_measured() -> None:
    plan = planned(SourceFile(path="a.parquet", size=1, tag="t", row_groups=(5000,)), row_bytes=1000.0)

    assert all(plan.block_rows(chunk) == min(block_rows(1024, 1000.0), chunk.rows) for chunk in plan.chunks.values())
    assert memory_bytes(plan, 1) > 0


def test_a_piece_takes_its_share_of_a_row_group_and_where_rows_have_no_keys_the_names_of_their_file() -> None:
    sizes = (GroupBytes(1, 1, 1, 1), GroupBytes(4000, 800, 300, 70))
    file = SourceFile(path="staged.parquet", size=1, tag="t", row_groups=(1, 100), group_bytes=sizes)
    of_csv = file.model_copy(update={"origin": "ü.csv"})
    piece = Piece(file=0, row_group=1, row_start=25, row_stop=50)
    # A row without keys has the name of its file, where that begins, and its number; encoded, 8 bytes of the number.
    in_file, in_csv = 25 * (14 + 12), 25 * (6 + 12)

    assert GroupBytes(1000, 200, 75, 70) == planned(file).piece_bytes(piece)
    assert GroupBytes(1000 + in_file, 200 + in_file, 75 + 200, 70) == planned(file, key_columns=()).piece_bytes(piece)
    assert GroupBytes(1000 + in_csv, 200 + in_csv, 75 + 200, 70) == planned(of_csv, key_columns=()).piece_bytes(piece)


@pytest.mark.parametrize(("key_columns", "of_keys"), [((), 32), (("id",), 32), (("id", "a"), 64)])
def test_a_piece_of_a_plan_that_was_made_without_bytes_takes_what_was_measured(
    key_columns: tuple[str, ...], of_keys: int
) -> None:
    plan = planned(SourceFile(path="a.parquet", size=1, tag="t", row_groups=(100,)), key_columns=key_columns)
    piece = Piece(file=0, row_group=0, row_start=25, row_stop=50)

    assert GroupBytes(25 * 20, 25 * of_keys, 25 * of_keys, 0) == plan.piece_bytes(piece)


@pytest.mark.parametrize(("size", "rows"), [(1000, 8192), (1250, 8192), (1251, 6144), (800, 8192)])
def test_blocks_have_fewer_rows_where_those_are_larger_by_more_than_a_quarter(size: int, rows: int) -> None:
    plan = planned(sized((10_000, size)), row_bytes=1000.0, rows_per_chunk=10_000)

    assert [rows] == [plan.block_rows(chunk) for chunk in plan.chunks.values()]


def test_used_columns_are_the_models_then_the_keys_each_once() -> None:
    schema = pa.schema([(name, pa.int64()) for name in ("id", "b", "a", "unused")])

    assert ["a", "b", "id"] == used_columns(
        a_contract("a", "b", "absent"), BatchOptions(key_columns=("b", "id")), schema
    )


@given(files=FILES.filter(lambda files: any(sum(file.row_groups) for file in files)), sizes=SIZES)
def test_a_plan_depends_on_nothing_but_its_arguments(files: list[SourceFile], sizes: Sizes) -> None:
    first, second = (planned(*files, sizes=sizes, key_columns=()) for _ in range(2))

    assert first.shards == second.shards
    assert sum(sum(file.row_groups) for file in files) == first.rows == sum(c.rows for c in first.chunks.values())
    assert first == Plan.model_validate_json(first.model_dump_json())


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_slot_of_every_flow_run_has_chunks_enough(workers: int) -> None:
    sizes = Sizes(batch_size=10, slots=2, row_bytes=4, rows_per_second=None)
    plan = planned(SourceFile(path="a.parquet", size=1, tag="t", row_groups=(16_000,)), sizes=sizes, workers=workers)

    assert len(plan.chunks) >= 8 * 2 * workers
    assert len(plan.shards) >= 2 * 2 * workers
