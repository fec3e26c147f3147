"""`make bench-start`: seconds until something happens, as a table and one JSON object on the last line.

Each figure is a process of its own, from its start to its exit: imports, the help of the command line, and a script
that scores 10,000 rows of 32 features through the network 32-256-256-1 while a Prefect server runs. Medians of
ROUNDS (5) processes, after one that is not counted: it fills the caches of the file system. ROWS=... takes other rows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.shared import FOLDER, clear, machine, make_customers, make_models, open_registry, prefect

ROUNDS = int(os.environ.get("ROUNDS", "5"))
ROWS = int(os.environ.get("ROWS", "10000"))
SCRIPT = """
import sys
from flows import BatchOptions, batch_inference
batch_inference(*sys.argv[1:4], BatchOptions(key_columns=("customer",)))
"""
WANTED = {"import_flows": 0.3, "import_flows_batch": 4.0, "second_call": 6.0}


def main() -> None:
    """Time each process in turn, and print the table, then the figures as JSON."""
    open_registry()
    model, source = make_models()["mlp"], str(make_customers(ROWS))
    destinations = (str(FOLDER / "start" / f"out-{number}") for number in range(1000))
    repeated = str(FOLDER / "start" / "repeated")
    for destination in (*(str(FOLDER / "start" / f"out-{number}") for number in range(2 * ROUNDS + 2)), repeated):
        clear(destination)
    programs: dict[str, Callable[[], list[str]]] = {
        "import_flows": lambda: ["-c", "import flows"],
        "import_flows_batch": lambda: ["-c", "import flows.batch"],
        "help_of_command_line": lambda: ["-m", "deployments.command_line", "--help"],
        "second_call": lambda: ["-c", SCRIPT, model, source, next(destinations)],
        "same_call_again": lambda: ["-c", SCRIPT, model, source, repeated],
    }
    with prefect():
        seconds = {name: [run_program(make()) for _ in range(ROUNDS + 1)][1:] for name, make in programs.items()}
    figures = {name: round(statistics.median(each), 2) for name, each in seconds.items()}
    show(figures, seconds)
    print(json.dumps({"machine": machine(), "rows": ROWS, **figures}))


def run_program(arguments: list[str]) -> float:
    """Return the seconds that Python takes for a program, from start to exit."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return seconds


def show(figures: dict[str, float], seconds: dict[str, list[float]]) -> None:
    table = Table("figure", "seconds", "from", "to", "wanted", title=machine(), title_justify="left")
    for name, median in figures.items():
        wanted = f"at most {WANTED[name]:g}" if name in WANTED else ""
        table.add_row(name, f"{median:.2f}", f"{min(seconds[name]):.2f}", f"{max(seconds[name]):.2f}", wanted)
    Console().print(table)


if __name__ == "__main__":
    main()
