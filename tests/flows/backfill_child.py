"""Runs backfill_inference in a process of its own, and kills it with SIGKILL once so many pieces are published.

usage: backfill_child.py PIECES MODEL SOURCE DESTINATION PIECES_JSON OPTIONS_JSON
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import flows.backfill
from tasks.batch.backfill import Partitions
from tasks.batch.options import BatchOptions


def main() -> None:
    left, model, source, destination, pieces, options = sys.argv[1:]
    inner = flows.backfill.batch_inference
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > int(left):
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args)

    flows.backfill.batch_inference = call  # type: ignore[assignment]  # it is called as the flow is
    flows.backfill.backfill_inference(
        model,
        source,
        destination,
        Partitions.model_validate_json(pieces),
        options=BatchOptions.model_validate_json(options),
    )


if __name__ == "__main__":
    main()
