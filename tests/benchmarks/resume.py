"""`make bench-resume`: what a resume reads after SIGKILL at 99 %, as a table and one JSON object on the last line.

The synthetic customers in row groups of half a percent, the network 32-256-256-1, parts of one row group each. A
run kills itself once 99 % of its parts stand, then a new process resumes it: by the same call, or as the next attempt
of the same flow run. On the local disk every call of the kernel that opens or reads a file is counted (strace), on
S3 every request (a proxy on loopback). ROWS=... takes fewer rows. Ends with 1 where anything finished was opened.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import show
from tests.benchmarks.kills.board import Board
from tests.benchmarks.kills.command import with_board, worker_command
from tests.benchmarks.kills.proxy import counting_proxy
from tests.benchmarks.kills.reads import TRACED, Read, Tally, lay_out, tally, traced_reads
from tests.benchmarks.shared import (
    FEATURES,
    FOLDER,
    ROWS,
    clear,
    console,
    machine,
    make_customers,
    on_s3,
    open_registry,
    prefect,
    upload,
    use_experiment,
)

CHUNKS = 200
DONE = 0.99
SLOTS = 2
ROWS_PER_GROUP = ROWS // CHUNKS
# A quarter of a row group is whole batches too.
BATCH_SIZE = max(1, ROWS_PER_GROUP // 40)
SECONDS_MAX = 1800.0
WANTED = {
    "read_over_remaining": "at most 1.1",
    "finished_parts_opened": "0",
    "finished_files_opened": "0",
    "bytes_read_of_finished_rows": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kill and its resume: where, how it is resumed, and how many chunks a row group is cut into."""

    name: str
    source: str
    destination: str
    by_flow_run: bool = False
    slices: int = 1

    @property
    def on_s3(self) -> bool:
        """Whether it lies on S3, where requests are counted."""
        return self.source.startswith("s3://")


def main() -> None:
    """Kill and resume in each place in both ways, and print the table, then the figures as JSON."""
    if shutil.which("strace") is None:
        sys.exit("What a process reads is counted by strace, which is not here: apt-get install strace.")
    open_registry()
    use_experiment("chaos")
    from tests.support import register_mlp

    folder, model = make_customers(ROWS, rows_per_group=ROWS_PER_GROUP), register_mlp("resumed", FEATURES)
    with prefect(), on_s3() as server:
        disk, s3 = (str(folder), str(FOLDER / "chaos" / "resumed")), (upload(folder), "s3://lake/resumed")
        cases = [
            Case(name="disk, same call", source=disk[0], destination=disk[1]),
            Case(name="disk, same flow run", source=disk[0], destination=disk[1], by_flow_run=True),
            Case(name="S3, same call", source=s3[0], destination=s3[1]),
            Case(name="S3, same flow run", source=s3[0], destination=s3[1], by_flow_run=True),
            Case(name="disk, row groups in quarters", source=disk[0], destination=disk[1], slices=4),
        ]
        found = {case.name: resume(case, model, server) for case in cases}
    whole = [figures for case, figures in zip(cases, found.values(), strict=True) if case.slices == 1]
    figures = {
        "read_over_remaining": max(one["read_over_remaining"] for one in whole),
        "read_over_remaining_with_footers": max(one["read_over_remaining_with_footers"] for one in whole),
        **{name: sum(one[name] for one in whole) for name in ("finished_parts_opened", "finished_files_opened")},
        "bytes_read_of_finished_rows": sum(one["bytes_read_of_finished_rows"] for one in whole),
    }
    show(f"{ROWS:,} rows, killed at {DONE:.0%}, resumed; {machine()}", found, WANTED)
    print(json.dumps({"rows": ROWS, "machine": machine(), **figures, "cases": found}))
    if figures["finished_parts_opened"] or figures["finished_files_opened"] or figures["bytes_read_of_finished_rows"]:
        sys.exit("Nothing that is finished may be opened by a resume, but something was: see the table.")


def resume(case: Case, model: str, server: str) -> dict[str, Any]:
    """Kill a run at 99 %, resume it, and return what the resume has read."""
    from tasks.batch.parts import list_parts, part_path
    from tasks.storage import open_storage

    clear(case.destination)
    logs = FOLDER / "chaos" / "resume"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    flow_run = [new_flow_run()] if case.by_flow_run else []
    command = worker(case, model, flow_run)
    console.print(f"{case.name}: until {DONE:.0%}")
    plan = killed(command, logs / "killed", case)
    storage = open_storage(case.destination)
    done = list_parts(storage, plan)
    if case.by_flow_run:
        rerun(flow_run[0])
    console.print(f"{case.name}: resume")
    reads, publishing, requests = resumed(command, logs / "resumed", case, server)
    layouts = lay_out(plan, open_storage(case.source), done)
    counted = tally(reads, layouts, [storage.address(part_path(plan, chunk)) for chunk in done], publishing)
    return {
        "chunks_left": len(plan.chunks) - len(done),
        "rows_left": sum(chunk.rows for chunk_id, chunk in plan.chunks.items() if chunk_id not in done),
        **told_of(counted),
        **requests,
    }


def told_of(counted: Tally) -> dict[str, Any]:
    """Return the figures of a tally."""
    figures = asdict(counted)
    return {
        "read_over_remaining": round(counted.read_over_remaining, 4),
        "read_over_remaining_with_footers": round(counted.bytes_read / counted.bytes_remaining, 4),
        "finished_parts_opened": figures.pop("finished_parts_opened_before_publishing"),
        "finished_files_opened": figures.pop("finished_files_opened"),
        **figures,
    }


def worker(case: Case, model: str, flow_run: Sequence[str]) -> list[str]:
    """Return the command line of a worker, without its board."""
    options = {
        "key_columns": ["customer"],
        "batch_size": BATCH_SIZE,
        "rows_per_chunk": ROWS_PER_GROUP // case.slices,
        "slots": SLOTS,
        "experiment": None,
    }
    return worker_command(model, case.source, case.destination, options, flow_run)


def killed(command: Sequence[str], log: Path, case: Case) -> Any:
    """Run a worker that kills itself once 99 % of the parts stand, and return the plan."""
    from tasks.batch.run_records import load_plan
    from tasks.storage import open_storage

    Board(log)
    environment = {**os.environ, "DIE_AFTER": str(math.ceil(DONE * CHUNKS * case.slices))}
    done = run(with_board(command, log), environment)
    if done.returncode != -9:
        message = f"The run must end by SIGKILL, got {done.returncode}: {done.stderr[-4000:]}"
        raise RuntimeError(message)
    storage = open_storage(case.destination)
    plans = [entry.path for entry in storage.entries("_overnight") if entry.path.endswith("/plan.json")]
    return load_plan(storage, plans[0].split("/")[1])


def resumed(
    command: Sequence[str], log: Path, case: Case, server: str
) -> tuple[list[Read], float, dict[str, dict[str, int]]]:
    """Run a worker to its end; return what it read, when it began to publish, and its requests where it made any."""
    board = Board(log)
    with ExitStack() as stack:
        environment = dict(os.environ)
        traces = log.with_suffix(".traces")
        traces.mkdir()
        tracer = ["strace", "-ff", "-y", "-ttt", "-s", "0", "-e", f"trace={TRACED}", "-o", str(traces / "of")]
        if case.on_s3:
            proxy = stack.enter_context(counting_proxy(server))
            environment["AWS_ENDPOINT_URL"] = proxy.url
            tracer = []
        done = run([*tracer, *with_board(command, log)], environment)
    if done.returncode:
        message = f"The resume must end with 0, got {done.returncode}: {done.stderr[-4000:]}"
        raise RuntimeError(message)
    publishing = board["publishing"] / 1e9 + time.time() - time.monotonic()
    if case.on_s3:
        return proxy.reads, publishing, {"requests": dict(sorted(proxy.requests.items()))}
    return traced_reads(traces), publishing, {}


def run(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a worker, and return what it said."""
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )


def new_flow_run() -> str:
    """Create a flow run for several attempts, and return its id."""
    from prefect.client.orchestration import get_client

    from flows.batch import batch_inference

    with get_client(sync_client=True) as client:
        return str(client.create_flow_run(batch_inference).id)


def rerun(flow_run_id: str) -> None:
    """Let a flow run that was killed begin again, as the automations for dead runs do."""
    from prefect.client.orchestration import get_client
    from prefect.states import AwaitingRetry

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, AwaitingRetry(), force=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
