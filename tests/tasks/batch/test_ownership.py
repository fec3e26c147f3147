"""One call at a time owns a destination, a live owner is left alone, and a dead one blocks nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.errors import AlreadyRunning
from tasks.batch.ownership import Owner, Ownership, find_owner, name_machine, own_destination
from tasks.storage import LocalStorage
from tests.tasks.batch.waiting import Time


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def an_owner(name: str, *, machine: str = "elsewhere/1", process: int = 1) -> Owner:
    return Owner(owner=name, machine=machine, process=process, model="models:/churn/3")


def test_an_owner_that_has_ended_is_followed_at_once_and_leaves_one_record(storage: LocalStorage) -> None:
    time = Time()
    for name in ("first", "second", "third"):
        with own_destination(storage, "backfill", an_owner(name), clock=time.clock, sleep=time.sleep) as ownership:
            ownership.beat()
            ownership.check()

    assert 0.0 == time.now
    assert "third" == (owner.owner if (owner := find_owner(storage, "backfill")) else None)
    assert ["ended-00000003.json", "owner-00000003.json"] == sorted(
        path.name for path in (storage.root / "_overnight/backfill").iterdir()
    )


def test_an_owner_whose_heartbeat_changes_is_left_alone(storage: LocalStorage) -> None:
    with own_destination(storage, "backfill", an_owner("first"), beat_seconds=1000) as ownership:
        time = Time(ownership.beat)
        with (
            pytest.raises(AlreadyRunning, match="got this one while flow run first"),
            own_destination(storage, "backfill", an_owner("second"), clock=time.clock, sleep=time.sleep),
        ):
            pass

        ownership.check()


def test_an_owner_that_is_silent_is_taken_over_and_finds_that_out(storage: LocalStorage) -> None:
    time = Time()
    with own_destination(storage, "backfill", an_owner("first"), beat_seconds=1000) as slow:
        slow.beat()
        with own_destination(
            storage, "backfill", an_owner("second"), silent_seconds=30, clock=time.clock, sleep=time.sleep
        ) as next_one:
            slow.beat()
            with pytest.raises(AlreadyRunning, match="another has taken over"):
                slow.check()
            next_one.beat()
            next_one.check()

    assert 30 <= time.now < 40


def test_another_purpose_has_an_owner_of_its_own(storage: LocalStorage) -> None:
    with (
        own_destination(storage, "backfill", an_owner("first")),
        own_destination(storage, "cleaning", an_owner("second")),
    ):
        assert "first" == (owner.owner if (owner := find_owner(storage, "backfill")) else None)


def test_an_earlier_attempt_of_the_same_flow_run_is_taken_over_at_once(storage: LocalStorage) -> None:
    time = Time()
    with (
        own_destination(storage, "backfill", an_owner("mine")) as before,
        own_destination(storage, "backfill", an_owner("mine"), clock=time.clock, sleep=time.sleep),
    ):
        before.beat()
        with pytest.raises(AlreadyRunning):
            before.check()

    assert 0.0 == time.now


def test_a_process_of_this_machine_that_is_gone_is_followed_at_once(storage: LocalStorage) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    storage.put_new(
        "_overnight/backfill/owner-00000001.json",
        an_owner("killed", machine=name_machine(), process=gone.pid).model_dump_json().encode(),
    )
    time, here = Time(), an_owner("next", machine=name_machine())
    with own_destination(storage, "backfill", here, clock=time.clock, sleep=time.sleep):
        pass

    assert 0.0 == time.now


def test_a_process_of_this_machine_that_is_alive_is_watched(storage: LocalStorage) -> None:
    record = an_owner("slow", machine=name_machine(), process=os.getpid())
    storage.put_new("_overnight/backfill/owner-00000001.json", record.model_dump_json().encode())
    time, here = Time(), an_owner("next", machine=name_machine())
    with own_destination(storage, "backfill", here, clock=time.clock, sleep=time.sleep):
        pass

    assert time.now >= 30


def test_of_many_that_begin_at_once_one_owns_the_destination(storage: LocalStorage) -> None:
    begin = threading.Barrier(6)
    refused = threading.Semaphore(0)

    def own(name: str) -> bool:
        begin.wait()
        try:
            with own_destination(storage, "backfill", an_owner(name), beat_seconds=0.02, silent_seconds=4.0):
                for _ in range(5):
                    refused.acquire(timeout=20)
        except AlreadyRunning:
            refused.release()
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(own, [f"call {at}" for at in range(6)]))

    assert 1 == sum(results)


def test_the_heart_beats_on_after_any_error(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = iter([KeyError("no such key"), None, None])
    has_gone_on = threading.Event()

    def beat(_ownership: Ownership) -> None:
        error = next(beats, None)
        if error is not None:
            raise error
        has_gone_on.set()

    monkeypatch.setattr(Ownership, "beat", beat)
    with own_destination(storage, "backfill", an_owner("first"), beat_seconds=0.001):
        assert has_gone_on.wait(60)
