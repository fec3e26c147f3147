"""Processes that make one call of batch_inference, to be ended by a test, and what the call puts out undisturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.batch.options import BatchOptions
from tests.support import digests

ROOT = Path(__file__).parents[2]


def start_child(
    script: str, *arguments: str, environment: Mapping[str, str] | None = None, **how: Any
) -> subprocess.Popen[str]:
    """Start a script of this folder with the project on its path; its stderr is a pipe."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        env={**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def call(model: str, source: Path, destination: Path, options: BatchOptions) -> tuple[str, str, str, str]:
    """The call as the last four arguments of a child."""
    return model, str(source), str(destination), options.model_dump_json()


def score(model: str, source: Path, destination: Path, options: BatchOptions) -> dict[str, str]:
    """Make the call in this process, and return every file of the run by its digest."""
    from flows.batch import batch_inference

    batch_inference(model, str(source), str(destination), options)
    return digests(destination)
