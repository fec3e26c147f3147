"""What a slot takes of its shard, helps with and waits for, and when it goes on with a chunk, on a clock of its own."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import pytest

from tasks.batch import chunk_scheduler
from tasks.batch.chunk_scheduler import MARKS, ChunkClaim, ChunkScheduler, ScoringMachine
from tasks.batch.options import BatchOptions
from tasks.batch.parts import ChunkId, list_parts_from, part_path
from tasks.batch.plan import Challenger, Plan
from tasks.spot.drain import Drain, Notice
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import PIN, a_plan, numbers, put, put_parts
from tests.tasks.batch.waiting import Time


@pytest.fixture
def destination(tmp_path: Path) -> Storage:
    return open_storage(f"{tmp_path}/out")


@pytest.fixture
def eight(tmp_path: Path, destination: Storage) -> Plan:
    """A plan of one shard of eight chunks."""
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 64)})
    return a_plan(source, destination.url, BatchOptions(rows_per_chunk=8))


@pytest.fixture
def shared(eight: Plan) -> Plan:
    """The same of a run of two workers."""
    return eight.model_copy(update={"options": eight.options.model_copy(update={"workers": 2})})


def make_machine(time: Time, seed: int = 0) -> ScoringMachine:
    return ScoringMachine(clock=time.clock, wait=time.wait, random=random.Random(seed))


def begin(
    plan: Plan, destination: Storage, time: Time | None = None, *, seed: int = 0, joined: bool = False
) -> ChunkScheduler:
    """Return a scheduler that has begun its pass."""
    machine = make_machine(time or Time(), seed)
    scheduler = ChunkScheduler(plan, destination, Drain(), joined=joined, machine=machine)
    scheduler.begin()
    return scheduler


def begin_last(plan: Plan, destination: Storage, time: Time, *, seed: int = 0) -> ChunkScheduler:
    """Return a scheduler of a shard of which another worker scores all but the last two chunks, once it has begun."""
    delete_all(destination, plan.parts_folder)
    scheduler = ChunkScheduler(plan, destination, Drain(), machine=make_machine(time, seed))
    assert [0] == scheduler.begin()
    put_parts(plan, destination, [(0, place) for place in range(6)])
    return scheduler


def delete_all(destination: Storage, folder: str) -> None:
    destination.delete([entry.path for entry in destination.entries(folder)])


@pytest.mark.parametrize(("taken", "longest"), [(None, 0.4), (4.0, 1.6), (20.0, 2.0)])
def test_a_chunk_in_progress_elsewhere_is_taken_after_some_times_of_what_one_takes(
    eight: Plan, destination: Storage, taken: float | None, longest: float
) -> None:
    waited = []
    for seed in range(30):
        time = Time()
        scheduler = begin_last(eight, destination, time, seed=seed)
        if taken is not None:
            scheduler.note_scored((0, 0), taken, won=False)
        claim = next(scheduler.claim_chunks(0, threading.Semaphore(1)))
        assert claim.helping
        assert claim.chunk in [(0, 6), (0, 7)]
        assert max(time.waits) <= longest
        waited.append(time.now / (taken or 1.0))
        delete_all(destination, f"{eight.folder}/{MARKS}")

    # Drawn from 1.5 to 4 times, and waited for in steps of a tenth or of 2 s.
    assert 1.5 <= min(waited) < 2.0
    assert 3.5 < max(waited) <= 4.4


@pytest.mark.parametrize("end", ["its part comes", "the process stops"])
def test_a_chunk_is_waited_for_until_its_part_comes_or_the_process_stops(
    eight: Plan, destination: Storage, end: str
) -> None:
    def end_third_wait() -> None:
        if len(time.waits) == 3:
            put_parts(eight, destination) if end == "its part comes" else scheduler.stop.set()

    time = Time(end_third_wait)
    scheduler = begin_last(eight, destination, time)

    assert [] == list(scheduler.claim_chunks(0, threading.Semaphore(1)))
    assert 3 == len(time.waits)
    assert scheduler.next_shard() is None


def test_what_a_chunk_takes_is_told_by_its_rows_and_the_median_of_those_done(tmp_path: Path) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 12)})
    plan = a_plan(source, f"{tmp_path}/out", BatchOptions(rows_per_chunk=8))
    scheduler = ChunkScheduler(plan, open_storage(f"{tmp_path}/out"), Drain())
    nothing = scheduler.chunk_seconds((0, 0))
    for seconds in (60.0, 4.0, 70.0, 3.0, 1.0):
        scheduler.note_scored((0, 0), seconds, won=True)

    assert nothing is None
    assert [8, 4] == [chunk.rows for chunk in plan.chunks.values()]
    assert [4.0, 2.0] == [scheduler.chunk_seconds(chunk) for chunk in plan.chunks]


@pytest.mark.parametrize(("taken", "goes_on"), [(0.0, False), (3.9, False), (4.0, True), (60.0, True)])
def test_a_chunk_goes_on_after_a_notice_where_the_time_left_is_enough(
    eight: Plan, destination: Storage, taken: float, *, goes_on: bool
) -> None:
    time = Time()
    drain = Drain(time.clock)
    scheduler = ChunkScheduler(eight, destination, drain, machine=make_machine(time))
    claim = ChunkClaim(chunk=(0, 1), helping=False)
    scheduler.note_scored((0, 0), 20.0, won=True)
    before = scheduler.may_continue(claim, taken), scheduler.is_stopping()
    # A fifth of it is for the end of the process.
    drain.add_notice(Notice(source="aws", action="terminate", seconds_left=20.0))

    assert (True, False) == before
    assert goes_on is scheduler.may_continue(claim, taken)
    assert scheduler.is_stopping()
    drain.withdraw_notice("aws")
    # Nothing new is begun in this pass, even so.
    assert scheduler.is_stopping()
    assert scheduler.may_continue(claim, taken)
    scheduler.stop.set()
    assert not scheduler.may_continue(claim, taken)


def test_after_a_notice_that_the_process_stops_at_no_chunk_goes_on(eight: Plan, destination: Storage) -> None:
    drain = Drain()
    scheduler = ChunkScheduler(eight, destination, drain)
    drain.add_notice(Notice(source="aws", action="terminate", seconds_left=1000.0))
    scheduler.stop.set()

    assert not scheduler.may_continue(ChunkClaim(chunk=(0, 1), helping=False), 0.0)


def test_a_chunk_that_cannot_be_read_is_tried_no_more_in_a_call(eight: Plan, destination: Storage) -> None:
    scheduler = begin(eight, destination)
    scheduler.note_fault((0, 3))
    put_parts(eight, destination, [chunk for chunk in eight.chunks if chunk not in {(0, 3), (0, 5)}])
    taken = []
    idle = threading.Semaphore(1)
    for claim in scheduler.claim_chunks(0, idle):
        taken.append(claim.chunk)
        put_parts(eight, destination, [claim.chunk])
        idle.release()

    assert [(0, 5)] == taken
    assert [] == scheduler.begin()


def test_a_chunk_read_ahead_is_given_back_where_its_shard_was_lost_or_its_part_has_come(
    eight: Plan, destination: Storage
) -> None:
    scheduler = begin(eight, destination, seed=2)
    claims = scheduler.claim_chunks(0, threading.Semaphore(2))
    first, second, third = itertools.islice(claims, 3)
    assert third.chunk[1]
    put_parts(eight, destination, [second.chunk])
    before = scheduler.is_still_missing(first), scheduler.is_still_missing(second)
    scheduler.note_scored(first.chunk, 1.0, won=False)
    lost = scheduler.is_still_missing(third)
    helping = scheduler.is_still_missing(ChunkClaim(chunk=third.chunk, helping=True))
    # It was given back, so that a slot may help with it as with the one after it.
    left = {third.chunk, (0, (third.chunk[1] + 1) % 8)}
    put_parts(eight, destination, [chunk for chunk in eight.chunks if chunk not in left])

    assert ((True, False), False, True) == (before, lost, helping)
    assert left == {claim.chunk for claim in itertools.islice(claims, 2)}


def test_a_slot_takes_the_chunks_of_its_shard_in_order_from_any_one_on(eight: Plan, destination: Storage) -> None:
    firsts = set()
    for seed in range(20):
        scheduler = begin(eight, destination, seed=seed)
        places = [claim.chunk[1] for claim in itertools.islice(scheduler.claim_chunks(0, threading.Semaphore(0)), 8)]
        assert [(places[0] + at) % 8 for at in range(8)] == places
        firsts.add(places[0])

    assert len(firsts) > 4


def test_helpers_that_died_are_followed_by_others_each_with_a_mark_of_its_own(
    eight: Plan, destination: Storage
) -> None:
    put_parts(eight, destination, [(0, place) for place in range(6)])
    for helper in range(3):
        scheduler = begin(eight, destination, seed=helper, joined=True)
        claims = scheduler.claim_chunks(0, threading.Semaphore(2))
        assert {(0, 6), (0, 7)} == {claim.chunk for claim in itertools.islice(claims, 2)}

    marks = [entry.path.rpartition("/")[2] for entry in destination.entries(f"{eight.folder}/{MARKS}")]
    assert [f"00000-000{place}-00{at}" for place in (6, 7) for at in (1, 2, 3)] == sorted(marks)


def test_a_chunk_that_another_helper_marks_first_is_waited_for_once_more(shared: Plan, destination: Storage) -> None:
    def mark() -> None:
        if len(time.waits) == 1:
            for place in (6, 7):
                destination.put_new(f"{shared.folder}/{MARKS}/00000-000{place}-001", b"{}")

    time = Time(mark)
    scheduler = begin_last(shared, destination, time)
    scheduler.note_scored((0, 0), 1.0, won=False)
    claims = list(itertools.islice(scheduler.claim_chunks(0, threading.Semaphore(2)), 2))

    assert {(0, 6), (0, 7)} == {claim.chunk for claim in claims}
    assert time.now >= 2 * 1.5
    assert 4 == len(destination.entries(f"{shared.folder}/{MARKS}"))


@pytest.mark.parametrize(
    ("finished", "in_progress"),
    [((0, 1, 2), {3, 4, 5}), ((6, 7), {0, 1, 2}), ((1, 4), {2, 3, 5, 6, 7}), ((7,), {0, 1, 2})],
)
def test_a_helper_takes_last_the_three_chunks_that_follow_each_that_another_worker_has_finished(
    eight: Plan, destination: Storage, finished: tuple[int, ...], in_progress: set[int]
) -> None:
    for seed in range(10):
        time = Time()
        delete_all(destination, eight.parts_folder)
        scheduler = begin(eight, destination, time, seed=seed)
        put_parts(eight, destination, [(0, place) for place in finished])
        places = list[int]()
        waited = list[int]()
        for claim in itertools.islice(scheduler.claim_chunks(0, threading.Semaphore(8)), 8 - len(finished)):
            assert claim.helping
            if places and (after := (places[-1] + 1) % 8) not in {*places, *finished}:
                assert after == claim.chunk[1]
            places.append(claim.chunk[1])
            waited += [claim.chunk[1]] if time.waits else []

        assert {*range(8)} - {*finished} == {*places}
        assert {*waited} <= in_progress
        assert {*places[: 8 - len(finished) - len(in_progress)]} == {*range(8)} - {*finished} - in_progress


def test_a_helper_goes_where_at_least_half_as_much_is_left_as_where_most_is(
    tmp_path: Path, destination: Storage
) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 256)})
    plan = a_plan(source, destination.url, BatchOptions(rows_per_chunk=8), slots=2)
    assert [8, 8, 8, 8] == [len(shard) for shard in plan.shards]
    # A page of the listing tells of the shards that follow, too.
    left = {0: 0, 1: 3, 2: 4, 3: 8}
    put_parts(plan, destination, [(shard, at) for shard, places in left.items() for at in range(places, 8)])
    helped = set()
    for seed in range(30):
        scheduler = ChunkScheduler(plan, destination, Drain(), machine=make_machine(Time(), seed))
        assert 3 == len([scheduler.next_shard() for _ in scheduler.begin()])
        claim = next(scheduler.claim_chunks(0, threading.Semaphore(1)))
        helped.add(claim.chunk[0])

    assert {2, 3} == helped


def test_marks_are_counted_over_all_pages_of_their_listing(shared: Plan, destination: Storage) -> None:
    scheduler = begin_last(shared, destination, Time())
    for place, marks in ((6, 600), (7, 650)):
        for at in range(1, marks + 1):
            destination.put_new(f"{shared.folder}/{MARKS}/00000-{place:04d}-{at:03d}", b"{}")
    scheduler.note_scored((0, 0), 1.0, won=False)
    claims = list(itertools.islice(scheduler.claim_chunks(0, threading.Semaphore(2)), 2))
    there = {entry.path.rpartition("/")[2] for entry in destination.entries(f"{shared.folder}/{MARKS}")}

    assert {(0, 6), (0, 7)} == {claim.chunk for claim in claims}
    assert 1252 == len(there)
    assert {"00000-0006-601", "00000-0007-651"} <= there


class Refusing(threading.Semaphore):
    """What no slot gets, until it has asked three times."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(0)
        self.asked, self._stop = list[float | None](), stop

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:  # noqa: FBT001, FBT002 - Python's
        self.asked.append(timeout)
        if len(self.asked) == 3:
            self._stop.set()
        return False


def test_a_slot_helps_only_once_it_is_idle_and_looks_again_whether_to_stop(eight: Plan, destination: Storage) -> None:
    scheduler = begin_last(eight, destination, Time())
    idle = Refusing(scheduler.stop)

    assert [] == list(scheduler.claim_chunks(0, idle))
    assert [0.1] * 3 == idle.asked


def test_a_slot_does_not_help_as_long_as_there_are_shards_to_begin(tmp_path: Path, destination: Storage) -> None:
    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 256)})
    plan = a_plan(source, destination.url, BatchOptions(rows_per_chunk=8), slots=2)
    scheduler = begin(plan, destination)
    first = scheduler.next_shard() or 0
    claims = list(scheduler.claim_chunks(first, threading.Semaphore(8)))

    assert [(first, False)] * 8 == [(claim.chunk[0], claim.helping) for claim in claims]
    assert scheduler.next_shard() not in {first, None}


def test_a_slot_passes_over_the_parts_that_were_there_when_it_began(eight: Plan, destination: Storage) -> None:
    put_parts(eight, destination, [(0, 3), (0, 4)])
    scheduler = begin(eight, destination)
    claims = list(itertools.islice(scheduler.claim_chunks(0, threading.Semaphore(0)), 6))

    assert {*range(8)} - {3, 4} == {claim.chunk[1] for claim in claims}
    assert not any(claim.helping for claim in claims)


@pytest.mark.parametrize("is_seen_first", [False, True])
def test_a_slot_helps_in_its_own_shard_once_another_worker_scores_it(
    eight: Plan, destination: Storage, *, is_seen_first: bool
) -> None:
    scheduler = begin(eight, destination)
    claims = scheduler.claim_chunks(0, threading.Semaphore(1))
    first = next(claims)
    follower = (0, (first.chunk[1] + 1) % 8)
    if is_seen_first:
        scheduler.note_scored(first.chunk, 1.0, won=False)
    else:
        put_parts(eight, destination, [follower])
    second = next(claims)

    assert (False, True) == (first.helping, second.helping)
    assert is_seen_first or second.chunk != follower


def test_a_second_slot_helps_too_where_another_worker_scores_the_shard_that_the_first_was_given(
    eight: Plan, destination: Storage
) -> None:
    scheduler = begin(eight, destination)
    given = scheduler.next_shard()
    put_parts(eight, destination, [(0, place) for place in range(6)])
    claim = next(scheduler.claim_chunks(0, threading.Semaphore(1)))

    assert claim.helping
    assert 0 == given == scheduler.next_shard()


def test_of_two_slots_of_a_process_each_takes_other_chunks(eight: Plan, destination: Storage) -> None:
    scheduler = begin(eight, destination)
    slots = [scheduler.claim_chunks(0, threading.Semaphore(8)) for _ in range(2)]
    claims = [next(slots[at % 2]) for at in range(8)]

    assert 8 == len({claim.chunk for claim in claims})


def test_a_slot_looks_at_eight_pages_before_it_waits_for_a_chunk_in_progress(
    tmp_path: Path, destination: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = list[int]()
    before_waits = list[int]()

    def list_one_shard(storage: Storage, plan: Plan, first: int) -> tuple[range, list[ChunkId]]:
        looked_at.append(first)
        _, parts = list_parts_from(storage, plan, first)
        return range(first, first + 1), [chunk for chunk in parts if chunk[0] == first]

    source = put(f"{tmp_path}/in", {"a.parquet": numbers(0, 192)})
    plan = a_plan(source, destination.url, BatchOptions(rows_per_chunk=8), slots=6)
    time = Time(lambda: before_waits.append(len(looked_at)))
    scheduler = ChunkScheduler(plan, destination, Drain(), machine=make_machine(time))
    shards = scheduler.begin()
    assert [2] * 12 == [len(shard) for shard in plan.shards]
    put_parts(plan, destination, [(shard, 0) for shard in shards])
    monkeypatch.setattr(chunk_scheduler, "list_parts_from", list_one_shard)
    # Another worker has begun each of them.
    helped = scheduler.next_shard() or 0
    looked_at.clear()
    claim = next(scheduler.claim_chunks(helped, threading.Semaphore(1)))

    assert claim.helping
    assert 8 == before_waits[0] == len({*looked_at[:8]})
    assert claim.chunk[0] in looked_at[:8]


def test_a_chunk_is_done_once_each_model_has_its_part_but_for_challengers_that_were_given_up(
    eight: Plan, destination: Storage
) -> None:
    challenger = Challenger(
        model=PIN, contract=eight.contract, columns=eight.columns, batch_size=4, batch_unit="rows", engine=eight.engine
    )
    plan = eight.model_copy(update={"challengers": (challenger, challenger)})
    first, second = plan.challenger_plans
    for each, places in ((plan, range(8)), (first, range(6)), (second, range(1, 8))):
        for place in places:
            destination.put_new(part_path(each, (0, place)), b"")
    scheduler = ChunkScheduler(plan, destination, Drain(), machine=make_machine(Time()))
    begun = scheduler.begin()
    claims = list(itertools.islice(scheduler.claim_chunks(0, threading.Semaphore(0)), 3))
    missing = [scheduler.list_missing((0, place)) for place in (0, 1, 6)]
    scheduler.follow_no_longer(first)

    assert [0] == begun
    assert {(0, 0), (0, 6), (0, 7)} == {claim.chunk for claim in claims}
    assert [(2,), (), (1,)] == missing
    assert [(2,), ()] == [scheduler.list_missing((0, place)) for place in (0, 6)]
    scheduler.follow_no_longer(second)
    # Without challengers a claim tells that the part of the run's own model is missing.
    assert (0,) == scheduler.list_missing((0, 6))
