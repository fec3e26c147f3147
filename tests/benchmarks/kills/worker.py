"""One worker: a call of batch_inference that shows on a board what it is at.

usage: python -m tests.benchmarks.kills.worker BOARD MODEL SOURCE DESTINATION OPTIONS_JSON [FLOW_RUN_ID]
With the id of a flow run it is an attempt of that, else a call by itself. With DIE_AFTER=n in the environment
it kills itself with SIGKILL once its n-th part stands. Prints the report as JSON.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import flows.batch
import serving.model.forward
import tasks.batch.chunk_reader
import tasks.batch.score
from tasks.batch.options import BatchOptions
from tasks.batch.report import BatchReport
from tests.benchmarks.kills.board import Board


def main() -> None:
    path, model, source, destination, options, *flow_run_ids = sys.argv[1:]
    board = Board(Path(path))
    show_on(board, die_after=int(os.environ.get("DIE_AFTER", "0")))
    call = {
        "model": model,
        "source": source,
        "destination": destination,
        "options": BatchOptions.model_validate_json(options),
    }
    report = attempt(flow_run_ids[0], call) if flow_run_ids else flows.batch.batch_inference(**call)
    board.mark("done")
    print(report.model_dump_json())


def attempt(flow_run_id: str, call: dict[str, Any]) -> BatchReport:
    """Run one more attempt of a flow run, as a worker of Prefect's does."""
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow_sync

    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(flow_run_id)  # type: ignore[arg-type]
    report = run_flow_sync(flows.batch.batch_inference, flow_run=flow_run, parameters=call)
    assert isinstance(report, BatchReport)
    return report


def show_on(board: Board, *, die_after: int = 0) -> None:
    """Let the steps of a run show on a board; they do what they did."""
    _within(board, "forward", tasks.batch.score.Forward, "score", first="begun")
    _within(board, "write", tasks.batch.score._Slot, "_write")
    for name in ("audit_parts", "save_page", "publish"):
        _within(board, "publish", flows.batch, name, first="publishing")
    _count_rows(board)
    _watch_reading(board)
    _count_parts(board, die_after)


def _within(board: Board, phase: str, owner: Any, name: str, first: str | None = None) -> None:
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if first is not None:
            board.mark(first)
        with board.within(phase):
            return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def _count_rows(board: Board) -> None:
    """Count the rows of each batch as it begins: those of a pass that is cut off are work lost too."""
    inner = serving.model.forward.Forward._begin_batch

    def begin(self: Any, batch: Any, *args: Any) -> Any:
        board.add("rows", batch.rows)
        return inner(self, batch, *args)

    serving.model.forward.Forward._begin_batch = begin  # type: ignore[method-assign]


def _watch_reading(board: Board) -> None:
    inner = tasks.batch.chunk_reader.Reader.blocks

    def blocks(self: Any, *args: Any) -> Generator[Any]:
        tables = inner(self, *args)
        while True:
            with board.within("read"):
                table = next(tables, None)
            if table is None:
                return
            yield table

    tasks.batch.chunk_reader.Reader.blocks = blocks  # type: ignore[method-assign]


def _count_parts(board: Board, die_after: int) -> None:
    inner = tasks.batch.score._Slot._write

    def write(self: Any, *args: Any) -> None:
        inner(self, *args)
        board.add("parts", 1)
        if board["parts"] == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    tasks.batch.score._Slot._write = write  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
