"""How long a request's body holds up the event loop of the gateway and of the protocol's server, by its shape.

Measured is the processor time of the whole process between two turns of the loop: a thread that holds Python's lock
counts, a machine that is busy with something else does not. Prints the ten longest pauses, then all as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

from tests.serving.protocol.test_large_bodies import APPS, BINARY, SHAPES, SIZES, Answered

ROUNDS = 3


def main() -> None:
    bodies = {
        f"{name}, {size}": (SHAPES[name](count), None) if name in SHAPES else BINARY[name](count - 300)
        for name in (*SHAPES, *BINARY)
        for size, count in SIZES.items()
    }
    pauses: dict[str, float] = {}
    # The collector would look through all of it, again and again.
    gc.freeze()
    for app in APPS:
        for name, (body, header_length) in bodies.items():
            pauses[f"{app}: {name}"] = min(measure_pause(app, body, header_length) for _ in range(ROUNDS))
    for name, seconds in sorted(pauses.items(), key=lambda each: -each[1])[:10]:
        print(f"{1000 * seconds:6.1f} ms  {name}")
    print(json.dumps({name: round(seconds, 4) for name, seconds in pauses.items()}))


def measure_pause(app: str, body: bytes, header_length: str | None) -> float:
    """Return the longest pause in seconds."""
    pauses: list[float] = []

    async def tick() -> None:
        last = time.process_time()
        while True:
            await asyncio.sleep(0.0005)
            now = time.process_time()
            pauses.append(now - last)
            last = now

    async def run(work: Awaitable[Answered]) -> Answered:
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        answered = await work
        await asyncio.sleep(0.01)
        ticking.cancel()
        return answered

    with tempfile.TemporaryDirectory() as folder:
        APPS[app](Path(folder), body, header_length, run)
    return max(pauses)


if __name__ == "__main__":
    main()
