"""The demo: score every flight that left New York in 2013 with a model that was trained on them.

`python -m deployments.demo` trains and registers the model, scores all flights, and shows the report. Called again, it
finds the run complete. `--kill` kills a run twice with SIGKILL, resumes it, and compares its bytes with those of an
undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from deployments.demo.flights import KEY
from deployments.demo.prepare import console, prepare_data, use_registry

if TYPE_CHECKING:
    from tasks.batch.report import BatchReport

MODEL = "models:/flight-delay@champion"
ROWS_PER_CHUNK_KILL = 1_024
KILLS = 2
_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.002


def main() -> None:
    """Run the demo in the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m deployments.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything is kept")
    parser.add_argument("--kill", action="store_true", help="kill a run twice and compare it with an undisturbed one")
    parser.add_argument("--score-into", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    use_registry(folder)
    if arguments.score_into:
        _score(folder, arguments.score_into, rows_per_chunk=ROWS_PER_CHUNK_KILL)
        return
    prepare_data(folder)
    if arguments.kill:
        _run_with_kills(folder)
    elif not _show_if_complete(folder):
        _run(folder)


def _show_if_complete(folder: Path) -> bool:
    """Show the report if the manifest has the run as complete, before Prefect is imported."""
    from tasks.batch.options import BatchOptions  # noqa: PLC0415 - imports MLflow
    from tasks.batch.report import report_complete  # noqa: PLC0415
    from tasks.batch.resolve import find_complete_run  # noqa: PLC0415
    from tasks.batch.run_records import load_plan  # noqa: PLC0415
    from tasks.batch.run_request import resolve_request  # noqa: PLC0415
    from tasks.storage import open_storage  # noqa: PLC0415

    start = time.perf_counter()
    destination = str(folder / "predictions")
    storage = open_storage(destination)
    call = resolve_request(MODEL, str(folder / "flights"), destination, BatchOptions(key_columns=(KEY,)))
    manifest = find_complete_run(storage, call)
    plan = load_plan(storage, call.run) if manifest is not None else None
    if manifest is None or plan is None:
        return False
    console.print(f"[bold green]This run is complete:[/] {manifest.rows:,} rows, nothing to score.")
    _show_report(report_complete(manifest, plan, storage, {"look": time.perf_counter() - start}))
    return True


def _run(folder: Path) -> None:
    from infra.local.prefect_server import prefect_server  # noqa: PLC0415

    console.print("Starting a Prefect server on loopback")
    with prefect_server(folder / "prefect") as server:
        os.environ.update(server.environment)
        console.print(f"Scoring; watch it at {server.ui_url} while it lasts")
        report = _score(folder, str(folder / "predictions"))
    _show_report(report)


def _score(folder: Path, destination: str, rows_per_chunk: int | None = None) -> BatchReport:
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    from flows.batch import batch_inference  # noqa: PLC0415 - the server's address must be set before
    from tasks.batch.options import BatchOptions  # noqa: PLC0415

    options = BatchOptions(key_columns=(KEY,), rows_per_chunk=rows_per_chunk)
    return batch_inference(MODEL, str(folder / "flights"), destination, options)


def _run_with_kills(folder: Path) -> None:
    """Kill a run twice, resume it, and show that its parts are those of an undisturbed run."""
    from infra.local.prefect_server import prefect_server  # noqa: PLC0415

    undisturbed, killed = folder / "undisturbed", folder / "killed"
    for destination in (undisturbed, killed):
        shutil.rmtree(destination, ignore_errors=True)
    console.print("Starting a Prefect server on loopback")
    with prefect_server(folder / "prefect") as server:
        os.environ.update(server.environment)
        console.print("Scoring, undisturbed")
        report = _score(folder, str(undisturbed), rows_per_chunk=ROWS_PER_CHUNK_KILL)
        command = [sys.executable, "-m", "deployments.demo", "--folder", str(folder), "--score-into", str(killed)]
        kills = _kill_and_resume(command, killed, report.run, report.parts)
    same = _count_equal_parts(undisturbed, killed, report.run)
    table = Table(title="Killed twice with SIGKILL, resumed, and compared byte for byte", title_justify="left")
    for name in ("", "parts", "of"):
        table.add_column(name)
    for at, parts in enumerate(kills, start=1):
        table.add_row(f"after kill {at}", str(parts), str(report.parts))
    table.add_row("after the resume, equal to the undisturbed run's", str(same), str(report.parts))
    console.print(table)
    if same != report.parts:
        console.print("[bold red]The killed run differs from the undisturbed one.[/]")
        sys.exit(1)
    console.print(f"[bold green]Equal byte for byte:[/] {report.rows:,} rows in {report.parts} parts.")


def _kill_and_resume(command: Sequence[str], destination: Path, run: str, parts: int) -> list[int]:
    """Start the command, kill it with SIGKILL each time another third of its parts exists, then let it end.

    Returns the number of parts after each kill. Raises RuntimeError where a process ended before its kill, or the last
    one failed.
    """
    folder = destination / f"run={run}"
    parts_after_kills = []
    for kill in range(1, KILLS + 1):
        console.print(f"Scoring again, into another folder, until about part {parts * kill // (KILLS + 1)} of {parts}")
        _kill_after_parts(command, folder, parts * kill // (KILLS + 1))
        parts_after_kills.append(len(list(folder.glob("part-*.parquet"))))
        console.print(f"Killed with SIGKILL: {parts_after_kills[-1]} parts exist")
    console.print("Calling it once more: it resumes")
    subprocess.run(command, check=True, timeout=_PATIENCE_SECONDS)
    return parts_after_kills


def _kill_after_parts(command: Sequence[str], folder: Path, parts: int) -> None:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + _PATIENCE_SECONDS
        try:
            while len(list(folder.glob("part-*.parquet"))) < parts:
                if process.poll() is not None or time.monotonic() > until:
                    message = f"The run must be alive until part {parts}, but it ended with {process.poll()}."
                    raise RuntimeError(message)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
    if process.returncode != -signal.SIGKILL:
        message = f"The run must end by SIGKILL, but it ended with {process.returncode} before."
        raise RuntimeError(message)


def _count_equal_parts(undisturbed: Path, killed: Path, run: str) -> int:
    """Return how many parts of a run are the same bytes in both folders; raises ValueError where the files differ."""
    names = {path.name for path in (undisturbed / f"run={run}").iterdir()}
    others = {path.name for path in (killed / f"run={run}").iterdir()}
    if names != others:
        message = f"Both runs must hold the same files, but these differ: {sorted(names ^ others)[:10]}."
        raise ValueError(message)
    return sum(
        (undisturbed / f"run={run}" / name).read_bytes() == (killed / f"run={run}" / name).read_bytes()
        for name in names
    )


def _show_report(report: BatchReport) -> None:
    table = Table(show_header=False, title=f"Run {report.run}", title_justify="left")
    for row in report.table():
        table.add_row(row[""], row["value"])
    console.print(table)
    console.print(f"Read the predictions:  [bold]{report.read_with}[/]", soft_wrap=True)
    console.print(f"The report with its plot:  [bold]{report.report}[/]", soft_wrap=True)


if __name__ == "__main__":
    main()
