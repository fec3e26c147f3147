"""Each of many workers begins where no other is, and leaves the chunks of others to them."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import pytest

from tasks.batch.chunk_scheduler import MARKS, ChunkClaim, ChunkScheduler, ScoringMachine
from tasks.batch.options import BatchOptions
from tasks.batch.parts import list_parts, list_parts_from, part_path
from tasks.batch.plan import Plan, ReusedPart
from tasks.spot.drain import Drain
from tasks.storage import Entry, LocalStorage, open_storage
from tests.tasks.batch.small import a_plan, numbers, put, put_parts


def test_a_worker_begins_with_the_shards_that_nobody_has_begun(tmp_path: Path) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 400)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url, slots=4)
    shards = list(range(len(plan.shards)))
    put_parts(plan, storage, [(shard, 0) for shard in shards[:5]])
    orders = [ChunkScheduler(plan, storage, Drain()).begin() for _ in range(20)]

    assert len(shards) >= 8
    assert all(shards == sorted(order) for order in orders)
    assert all(set(shards[5:]) == set(order[: len(shards) - 5]) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_one_who_has_joined_takes_nothing_of_a_begun_shard_before_it_has_waited_for_the_other(tmp_path: Path) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 80)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url)
    put_parts(plan, storage, [(shard, 0) for shard in range(len(plan.shards))])
    found = []
    for joined in (False, True):
        scheduler = ChunkScheduler(plan, storage, Drain(), joined=joined)
        (shard, *_) = scheduler.begin()
        claims = scheduler.claim_chunks(shard, threading.Semaphore(1))
        found.append(next(claims).helping)
        claims.close()

    assert [False, True] == found


@pytest.mark.parametrize("reused", [(), (ReusedPart(shard=0, place=3, path="run=earlier/part.parquet"),)])
def test_a_part_that_is_set_aside_during_a_pass_is_scored_in_that_pass(
    tmp_path: Path, reused: tuple[ReusedPart, ...]
) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 80)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url).model_copy(update={"reused": reused})
    put_parts(plan, storage, [(0, 3)])
    scheduler, idle, taken = ChunkScheduler(plan, storage, Drain()), threading.Semaphore(1), []
    (shard,) = scheduler.begin()
    for entry in storage.entries(part_path(plan, (0, 3)).rpartition("/")[0]):
        storage.set_aside(entry)

    def work() -> None:
        for claim in scheduler.claim_chunks(shard, idle):
            taken.append(claim.chunk)
            put_parts(plan, storage, [claim.chunk])
            if claim.helping:
                idle.release()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    ended = not thread.is_alive()
    scheduler.stop.set()

    assert ended
    assert list(plan.chunks) == sorted(taken)


def test_of_many_helpers_no_two_take_one_chunk(tmp_path: Path) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 400)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url, BatchOptions(rows_per_chunk=1), batch_size=1)
    put_parts(plan, storage, [(shard, 0) for shard in range(len(plan.shards))])
    claims = []
    for seed in range(40):
        machine = ScoringMachine(random=random.Random(seed))
        scheduler = ChunkScheduler(plan, storage, Drain(), joined=True, machine=machine)
        shard = scheduler.begin()[0]
        for _ in scheduler.begin():
            scheduler.next_shard()
        claims.append(next(scheduler.claim_chunks(shard, threading.Semaphore(1))))

    assert all(claim.helping for claim in claims)
    assert len(claims) == len({claim.chunk for claim in claims})
    assert len(claims) == len(storage.entries(f"{plan.folder}/{MARKS}"))


def test_a_shard_that_another_worker_scores_is_passed_over_until_there_is_no_other(tmp_path: Path) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 400)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url, slots=4)
    scheduler = ChunkScheduler(plan, storage, Drain())
    shards = sorted(scheduler.begin())
    foreign = set(shards[::2])
    put_parts(plan, storage, [(shard, 0) for shard in foreign])
    given = [scheduler.next_shard() for _ in range(len(shards) - len(foreign))]
    helped = scheduler.next_shard()
    put_parts(plan, storage)

    assert set(shards) - foreign == set(given)
    assert helped in shards
    assert [] == list(scheduler.claim_chunks(shards[0], threading.Semaphore(1)))
    assert scheduler.next_shard() is None


def test_a_free_slot_begins_no_shard_whose_chunks_are_all_claimed(tmp_path: Path) -> None:
    plan, scheduler, given = _give_all(tmp_path)
    claims = [claim for shard in given if shard is not None for claim in _take_own(scheduler, plan, shard)]

    assert len(plan.chunks) == len(claims)
    assert scheduler.next_shard() is None


def test_a_shard_is_not_given_to_a_second_slot_before_the_first_has_begun_it(tmp_path: Path) -> None:
    _, scheduler, given = _give_all(tmp_path)
    none = scheduler.next_shard()
    next(scheduler.claim_chunks(given[0] or 0, threading.Semaphore(0)))

    assert none is None
    assert given[0] == scheduler.next_shard()


def _give_all(tmp_path: Path) -> tuple[Plan, ChunkScheduler, list[int | None]]:
    """Return a plan of small chunks, its scheduler, and the shards that it has given, which are all."""
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 400)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url, BatchOptions(rows_per_chunk=10), slots=2)
    scheduler = ChunkScheduler(plan, storage, Drain())
    return plan, scheduler, [scheduler.next_shard() for _ in scheduler.begin()]


def _take_own(scheduler: ChunkScheduler, plan: Plan, shard: int) -> list[ChunkClaim]:
    return list(itertools.islice(scheduler.claim_chunks(shard, threading.Semaphore(0)), len(plan.shards[shard])))


@pytest.mark.parametrize("large", [False, True])
def test_pages_of_a_listing_tell_the_same_as_a_whole_one(tmp_path: Path, *, large: bool) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 2400)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url, BatchOptions(rows_per_chunk=1), batch_size=1)
    if large:
        chunks = tuple(plan.chunks.values())
        plan = plan.model_copy(update={"shards": (chunks[:1700], chunks[1700:])})
    drawn = random.Random(7)
    for chunk in plan.chunks:
        if drawn.random() < 0.8:
            storage.put_new(part_path(plan, chunk), b"")
    for other in ("part-00001-0000.parquet", "part-00001-00001-abcdefabcdef.parquet", "part-9.parquet", "x"):
        storage.put_new(f"run={plan.run}/{other}", b"")
    whole = set(list_parts(storage, plan))

    assert len(whole) > 1500
    for first in range(len(plan.shards)):
        shards, parts = list_parts_from(storage, plan, first)
        assert first == shards.start
        assert {chunk for chunk in whole if chunk[0] in shards} == set(parts)


@pytest.mark.parametrize("joined", [False, True])
def test_a_worker_goes_on_in_its_own_shards_in_another_pass(tmp_path: Path, *, joined: bool) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 400)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url, BatchOptions(rows_per_chunk=10, workers=2), slots=4)
    scheduler = ChunkScheduler(plan, storage, Drain(), joined=joined)
    for _ in range(2):
        shards = scheduler.begin()
        first = scheduler.next_shard()

        assert first == shards[0]
        assert len(storage.entries(f"{plan.folder}/{MARKS}")) >= 1
        for _ in shards[1:]:
            scheduler.next_shard()
    assert len(plan.shards) == len(storage.entries(f"{plan.folder}/{MARKS}"))


class LateListing(LocalStorage):
    """A storage whose pages have nothing of what was just written."""

    def entries_after(self, folder: str, name: str, count: int) -> list[Entry]:
        return []


@pytest.mark.parametrize("open_destination", [LocalStorage, LateListing])
def test_of_two_workers_each_begins_the_shards_that_the_other_has_not_marked(
    tmp_path: Path, open_destination: type[LocalStorage]
) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 400)})
    destination = open_destination(tmp_path / "out")
    plan = a_plan(source, destination.url, BatchOptions(rows_per_chunk=10, workers=2), slots=4)
    workers = [ChunkScheduler(plan, destination, Drain(), joined=bool(at)) for at in range(2)]
    for each in workers:
        each.begin()
    given = [workers[at % 2].next_shard() for at in range(len(plan.shards))]
    helped = [each.next_shard() for each in workers]

    assert {*range(len(plan.shards))} == {*given}
    # There is none to begin any more, only some to help with.
    assert len(plan.shards) == len(destination.entries(f"{plan.folder}/{MARKS}"))
    assert {*helped} <= {*given}
    assert not {helped[0]} & {*given[::2]}
    assert not {helped[1]} & {*given[1::2]}
