"""The command line of a worker that shows on a board what it is at, and the report that it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def worker_command(
    model: str, source: str, destination: str, options: Mapping[str, Any], flow_run: Sequence[str] = ()
) -> list[str]:
    """Return the command line of a worker, without its board."""
    return [
        *(sys.executable, "-m", "tests.benchmarks.kills.worker"),
        *(model, source, destination, json.dumps(options), *flow_run),
    ]


def with_board(command: Sequence[str], board: Path) -> list[str]:
    """Return a command of the kind PYTHON -m MODULE ... with its board as the module's first argument."""
    return [*command[:3], str(board), *command[3:]]


def report_in(output: str) -> dict[str, Any]:
    """Return the report that a worker has printed among other things."""
    return dict(json.loads([line for line in output.splitlines() if line.startswith("{")][-1]))
