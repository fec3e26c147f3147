"""Of many workers each begins where no other is."""

from __future__ import annotations

from pathlib import Path

from tasks.batch.share import Share
from tasks.spot.drain import Drain
from tasks.storage import open_storage
from tests.tasks.batch.small import a_plan, numbers, put, put_parts


def test_a_worker_begins_with_the_shards_that_nobody_has_begun(tmp_path: Path) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 400)})
    storage = open_storage(f"{tmp_path}/out")
    plan = a_plan(source, storage.url, slots=4)
    shards = list(range(len(plan.shards)))
    put_parts(plan, storage, [(shard, 0) for shard in shards[:5]])
    orders = [Share(plan, storage, Drain()).begin() for _ in range(20)]

    assert len(shards) >= 8
    assert all(shards == sorted(order) for order in orders)
    assert all(set(shards[5:]) == set(order[: len(shards) - 5]) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
