"""Imports point one way: deployments -> flows -> tasks -> serving; infra imports none of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "deployments": {"deployments", "flows", "tasks", "serving", "infra"},
    "flows": {"flows", "tasks", "serving"},
    "tasks": {"tasks", "serving"},
    "serving": {"serving"},
    "infra": {"infra"},
}
TOP_LEVEL = {
    *("flows", "tasks", "serving", "deployments", "infra", "tests", "pyproject.toml"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"),
}
BATCH_ORDER = (
    *(
        "options",
        "json_lines",
        "formats",
        "commit_log",
        "footer",
        "dataset",
        "plan",
        "batches",
        "parts",
        "staging",
        "delta",
        "share",
        "score",
        "publish",
        "source",
        "predictions",
    ),
    *("report", "tuning", "run", "lineage", "artifacts"),
)
STREAM_ORDER = (
    *("addresses", "options", "message", "microbatch", "decode", "score", "ends", "meter", "rows", "parts_sink"),
    *("in_hand", "nats_link", "nats_publish", "nats_consumer", "nats_source", "nats_sink", "nats_recall"),
    *(
        "kafka_link",
        "kafka_topic",
        "kafka_source",
        "kafka_sink",
        "opening",
        "peek",
        "intake",
        "pipeline",
        "tuning",
        "report",
    ),
)
ENDPOINT_ORDER = (
    *("spec", "access", "samples", "resolve", "tuning", "render", "deploy", "client", "closed_loop", "verify"),
    *("load", "route", "traffic", "change", "report"),
)
CONSUME_ORDER = (
    *("workload", "money", "decision", "trace", "arrivals", "availability", "problem", "server", "flow", "keep_warm"),
    *(
        "fit",
        "simulate_sleep",
        "simulate_online",
        "simulate_stream",
        "simulate_spot",
        "simulate_batch",
        "simulate_table",
    ),
    *("simulate", "choose", "impossible", "flips", "decide", "price_table", "aws_prices", "prices", "rows"),
    *("door_child", "door", "profile", "sweep", "report", "plot", "terms", "effect", "review", "artifacts"),
)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(str(node.module))
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_downstream_of_it(room: str) -> None:
    strangers = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / room).rglob("*.py")
        for name in imported(path)
        if name.split(".")[0] in MAY_IMPORT.keys() - MAY_IMPORT[room]
    }

    assert set() == strangers


def test_serving_never_imports_prefect() -> None:
    assert set() == {
        path for path in (ROOT / "serving").rglob("*.py") if "prefect" in {n.split(".")[0] for n in imported(path)}
    }


@pytest.mark.parametrize(
    ("room", "order"),
    [("batch", BATCH_ORDER), ("endpoint", ENDPOINT_ORDER), ("stream", STREAM_ORDER), ("consume", CONSUME_ORDER)],
)
def test_a_station_imports_only_stations_before_it(room: str, order: tuple[str, ...]) -> None:
    stations = {path.stem: path for path in (ROOT / "tasks" / room).glob("*.py") if path.stem != "__init__"}
    prefix = f"tasks.{room}."
    backward = {
        (name, module)
        for name, path in stations.items()
        for module in (found.removeprefix(prefix) for found in imported(path) if found.startswith(prefix))
        if order.index(module) >= order.index(name)
    }

    assert set(stations) == set(order)
    assert set() == backward


def test_finding_a_run_complete_imports_neither_prefect_nor_torch() -> None:
    code = (
        "import sys, tasks.batch.run, tasks.batch.report; print({'prefect', 'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert "set()" == done.stdout.strip()


def test_the_top_level_is_the_rooms_and_a_few_files() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("no git checkout here: the list of files comes from git")

    assert set() == {path.split("/")[0] for path in tracked if not path.startswith(".")} - TOP_LEVEL
