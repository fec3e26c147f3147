"""`make bench-start`: seconds until something happens, as a table and one JSON object on the last line.

Each figure is a process of its own, from its start to its exit. First without a Prefect server: commands of the command
line, right and wrong ones, over 10,000 rows of 32 features, by the network 32-256-256-1 and by a scikit-learn pipeline,
which is also scored where torch is not installed.
Then imports, and a script that scores the same rows through the network while a Prefect server runs. Beside these what
the libraries alone take: to find a version in the registry, and to load the network. Medians of ROUNDS (5) processes,
after one that is not counted: it fills the caches of the file system. ROWS=... takes other rows.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from tests.benchmarks.model_flavours import register_flavours
from tests.benchmarks.shared import FOLDER, machine, make_customers, make_models, open_registry, prefect, use_experiment
from tests.child_environment import block_packages

ROUNDS = int(os.environ.get("ROUNDS", "5"))
ROWS = int(os.environ.get("ROWS", "10000"))
SCRIPT = """
import sys
from flows import BatchOptions, batch_inference
batch_inference(*sys.argv[1:4], BatchOptions(key_columns=("customer",)))
"""
FIND_ALONE = """
import atexit, gc, sys
gc.disable()
atexit.register(gc.freeze)
import polars, prefect.flows, pyarrow
from mlflow import MlflowClient
name, version = sys.argv[1].removeprefix("models:/").split("/")
print(MlflowClient().get_model_version(name, version).source)
"""
LOAD_ALONE = f"""{FIND_ALONE}
import mlflow.pytorch
mlflow.pytorch.load_model(sys.argv[1])
"""
COMMAND_LINE = ("-m", "deployments.command_line")
WITHOUT_TORCH = "scikit_learn_without_torch"
WANTED = {
    "nothing_to_score": 2.0,
    "scikit_learn": 5.0,
    WITHOUT_TORCH: 5.0,
    "torch": 5.0,
    "help": 0.5,
    "runs": 1.0,
    "wrong_column": 3.0,
    "wrong_alias": 3.0,
    "wrong_path": 3.0,
    "import_flows": 0.3,
    "import_flows_batch": 4.0,
    "second_call": 6.0,
}
Programs = Mapping[str, Callable[[], list[str]]]


def main() -> None:
    """Time each process in turn, and print the table, then the figures as JSON."""
    open_registry()
    model, source = make_models()["mlp"], str(make_customers(ROWS))
    use_experiment("bench")
    (pipeline,) = register_flavours(("logistic_regression",)).values()
    shutil.rmtree(FOLDER / "start", ignore_errors=True)
    destinations = (str(FOLDER / "start" / f"out-{number}") for number in itertools.count())
    repeated, complete = str(FOLDER / "start" / "repeated"), str(FOLDER / "start" / "complete")

    def score(*arguments: str, key: str = "customer") -> list[str]:
        return [*COMMAND_LINE, "score", *arguments, "--key", key]

    serverless: Programs = {
        "nothing_to_score": lambda: score(model, source, complete),
        "scikit_learn": lambda: score(pipeline, source, next(destinations)),
        WITHOUT_TORCH: lambda: score(pipeline, source, next(destinations)),
        "torch": lambda: score(model, source, next(destinations)),
        "help": lambda: [*COMMAND_LINE, "--help"],
        "runs": lambda: [*COMMAND_LINE, "runs", complete],
        "wrong_column": lambda: score(model, source, next(destinations), key="custmer"),
        "wrong_alias": lambda: score("models:/mlp@nobody", source, next(destinations)),
        "wrong_path": lambda: score(model, f"{source}-nowhere", next(destinations)),
        "libraries_find_version": lambda: ["-c", FIND_ALONE, model],
        "libraries_load_torch": lambda: ["-c", LOAD_ALONE, model],
    }
    with_server: Programs = {
        "import_flows": lambda: ["-c", "import flows"],
        "import_flows_batch": lambda: ["-c", "import flows.batch"],
        "second_call": lambda: ["-c", SCRIPT, model, source, next(destinations)],
        "same_call_again": lambda: ["-c", SCRIPT, model, source, repeated],
    }
    seconds = time_programs(serverless)
    with prefect():
        seconds |= time_programs(with_server)
    figures = {name: round(statistics.median(each), 2) for name, each in seconds.items()}
    show(figures, seconds)
    print(json.dumps({"machine": machine(), "rows": ROWS, **figures}))


def time_programs(programs: Programs) -> dict[str, list[float]]:
    """Return the seconds of each program in each round but the first."""
    rounds = [{name: run_program(make(), name) for name, make in programs.items()} for _ in range(ROUNDS + 1)]
    return {name: [each[name] for each in rounds[1:]] for name in programs}


def run_program(arguments: list[str], name: str) -> float:
    """Return the seconds that Python takes for a program, from start to exit: one that must fail where it is wrong."""
    # A user's Python keeps what it has compiled.
    environment = block_packages(FOLDER / "start" / name, ["torch"] if name == WITHOUT_TORCH else [])
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != name.startswith("wrong"):
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
