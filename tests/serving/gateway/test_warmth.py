from __future__ import annotations

import asyncio

import pytest

from serving.errors import Unanswered
from serving.gateway import warmth
from serving.gateway.route import Served, Sleep
from serving.gateway.warmth import Warmth
from tests.serving.gateway.support import served

SLEEP = Sleep(keep_warm_s=1, hold_s_max=10)
VERSIONS = (served("http://127.0.0.1:9"),)


class Silent:
    """A server that never answers what it is told, until it is mended."""

    mended = False

    async def loaded(self, _served: Served) -> bool:
        return False

    async def load(self, served: Served) -> None:
        await self.unload(served)

    async def unload(self, _served: Served) -> None:
        if not self.mended:
            await asyncio.get_running_loop().create_future()


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmth, "_LOAD_S_MAX", 0.05)
    monkeypatch.setattr(warmth, "_UNLOAD_S_MAX", 0.05)


def test_a_load_that_never_ends_is_given_up_and_the_next_request_tries_again() -> None:
    async def woken_twice() -> str:
        server = Silent()
        models = Warmth(server, lambda _seconds: None)
        with pytest.raises(Unanswered, match=r"must load the model within 0\.05 s, and did not"):
            await models.wake(SLEEP, VERSIONS)
        server.mended = True
        await models.wake(SLEEP, VERSIONS)
        return models.state

    assert "awake" == asyncio.run(asyncio.wait_for(woken_twice(), 10))


def test_an_unload_that_never_ends_holds_up_no_later_request() -> None:
    async def slept_and_woken() -> tuple[bool, str]:
        server = Silent()
        models = Warmth(server, lambda _seconds: None)
        slept = await models.sleep(VERSIONS, present=lambda: 0)
        server.mended = True
        await models.wake(SLEEP, VERSIONS)
        return slept, models.state

    assert (False, "awake") == asyncio.run(asyncio.wait_for(slept_and_woken(), 10))
