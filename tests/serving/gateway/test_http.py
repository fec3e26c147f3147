from __future__ import annotations

import asyncio
import socket

import pytest

from serving.gateway import http
from serving.gateway.http import Http


async def healthy(url: str) -> bool:
    asking = Http()
    try:
        return await asking.healthy(url)
    finally:
        await asking.close()


def test_a_server_that_takes_a_connection_and_never_answers_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_HEALTH_S_MAX", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not asyncio.run(asyncio.wait_for(healthy(f"http://127.0.0.1:{silent.getsockname()[1]}/ready"), 10))
