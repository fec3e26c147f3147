from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import Unanswered
from serving.gateway.admission import Admission
from serving.gateway.route import Limits


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(0, 4), st.lists(st.integers(1, 5), max_size=20), st.integers(1, 4))
def test_never_more_than_the_limits_and_everybody_has_a_turn_or_is_sent_away(
    in_flight_max: int, queue_max: int, turns: list[int], resized: int
) -> None:
    limits = Limits(in_flight_max=in_flight_max, queue_max=queue_max)

    async def ask(admission: Admission, steps: int, seen: list[str]) -> None:
        try:
            with admission.place():
                async with admission.turn():
                    assert admission.running <= max(in_flight_max, resized)
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    if steps == 5:
                        raise asyncio.CancelledError
            seen.append("answered")
        except Unanswered as error:
            seen.append(f"sent away with {error.status}")

    async def all_of_them() -> list[str]:
        admission, seen = Admission(limits), []
        tasks = [asyncio.create_task(ask(admission, steps, seen)) for steps in turns]
        await asyncio.sleep(0)
        if tasks:
            # One gives up while it waits, or while it has its turn.
            tasks[-1].cancel()
        admission.resize(Limits(in_flight_max=resized, queue_max=queue_max))
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (0, 0, 0) == (admission.present, admission.running, admission.waiting)
        return seen

    seen = asyncio.run(all_of_them())

    assert max(0, len(turns) - in_flight_max - queue_max) == seen.count("sent away with 429")


def test_turns_are_given_in_the_order_of_arrival() -> None:
    async def all_of_them() -> list[int]:
        admission, order = Admission(Limits(in_flight_max=1, queue_max=9)), []

        async def ask(number: int) -> None:
            with admission.place():
                async with admission.turn():
                    order.append(number)
                    await asyncio.sleep(0)

        await asyncio.gather(*(ask(number) for number in range(9)))
        return order

    assert list(range(9)) == asyncio.run(all_of_them())


def test_one_who_gives_up_just_as_its_turn_comes_passes_it_on() -> None:
    async def all_of_them() -> int:
        admission = Admission(Limits(in_flight_max=1, queue_max=9))

        async def ask() -> None:
            async with admission.turn():
                pass

        async with admission.turn():
            second = asyncio.create_task(ask())
            await asyncio.sleep(0)
        second.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await second
        return admission.running

    assert 0 == asyncio.run(all_of_them())


def test_one_who_gives_up_waiting_is_not_counted_as_one_who_waits() -> None:
    async def all_of_them() -> int:
        admission = Admission(Limits(in_flight_max=1, queue_max=9))

        async def ask() -> None:
            async with admission.turn():
                pass

        async with admission.turn():
            second = asyncio.create_task(ask())
            await asyncio.sleep(0)
            second.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await second
            return admission.waiting

    assert 0 == asyncio.run(all_of_them())


def test_a_full_queue_says_when_to_come_again() -> None:
    admission = Admission(Limits(in_flight_max=1, queue_max=0))

    with admission.place(), pytest.raises(Unanswered, match="Retry after 1 s"), admission.place():
        pass
