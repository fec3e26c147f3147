"""Each of many workers begins where no other is, and leaves the chunks of others to them."""

from __future__ import annotations

import threading
from pathlib import Path

from tasks.batch.chunk_scheduler import ChunkScheduler
from tasks.spot.drain import Drain
from tasks.storage import open_storage
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


def test_a_part_that_is_set_aside_during_a_pass_is_scored_in_that_pass(tmp_path: Path) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 80)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url)
    put_parts(plan, storage, [(0, 3)])
    scheduler, idle, taken = ChunkScheduler(plan, storage, Drain()), threading.Semaphore(1), []
    (shard,) = scheduler.begin()
    for entry in storage.entries(f"run={plan.run}"):
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
