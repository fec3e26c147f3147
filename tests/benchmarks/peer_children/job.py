"""What the process of a peer is told, and what it tells: one JSON object each way."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One measurement: a Parquet folder to score, a folder to write, a model and its batch size."""

    source: str
    warm_up: str
    destination: str
    model: str
    columns: list[str]
    batch_size: int


def read_job() -> Job:
    """Take the job from the command line."""
    return Job(**json.loads(sys.argv[1]))


def measure(run: Callable[[str, str], float | None], job: Job, version: str) -> None:
    """Time a run from its start to the end of its write, and print the seconds.

    A run over a few rows comes first: what a peer imports, starts and loads once is not counted. One that
    starts workers for each run returns the time at which the first stood, and is timed from then.
    """
    run(job.warm_up, f"{job.destination}-warm-up")
    start = time.time()
    start = run(job.source, job.destination) or start
    print(json.dumps({"seconds": time.time() - start, "version": version}))
