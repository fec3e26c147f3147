"""The stations that a run has passed, each a task run of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

T = TypeVar("T")


@dataclass(slots=True)
class StepTimer:
    """The stations that a run has passed, and the seconds that they took."""

    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Do the work of a station. It takes no arguments, since Prefect looks into those of a task."""
        start = time.perf_counter()
        try:
            return task(name=name, cache_policy=NO_CACHE, persist_result=False)(work)()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
