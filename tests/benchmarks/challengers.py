"""`make bench-challengers`: what a challenger costs in a run, over its forward passes alone.

A table of customers x 32 float32 features is scored by the network 32-256-256-1, a thread a core, without a Prefect
server: in turn by the model alone, with one challenger of the same size, and by forward passes of the challenger alone
over rows that are in memory. Seconds are those of the clock, and those of the processor, which others on the machine
change less. Then the comparison of both models is timed. ROWS=10000000 for more than 2,000,000, ROUNDS=... for other
than 3. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track

from serving.model.encoding import Encoded, encode
from serving.model.forward import Forward
from serving.model.interface import Model
from serving.model.registry import resolve_model
from tasks.batch.chunk_reader import open_reader
from tasks.batch.compare import compare_challenger
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.planned_models import load_planned_challengers, load_planned_model
from tasks.batch.resolve import CompleteRun, find_run
from tasks.batch.run_request import make_request
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.storage import Storage, open_storage
from tests.benchmarks.figures import show
from tests.benchmarks.shared import (
    FEATURES,
    FOLDER,
    ROUNDS,
    console,
    machine,
    make_customers,
    open_registry,
    use_experiment,
)
from tests.support import register_mlp

ROWS = int(os.environ.get("ROWS", "2000000"))
BATCH_SIZE = 1024
CORES = os.cpu_count() or 1
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=BATCH_SIZE, rows_per_chunk=128 * BATCH_SIZE, slots=CORES)
WANTED = {"over_its_passes": "1.05 or less", "same_bytes": "True"}


def main() -> None:
    """Measure in turn, and print the table, then the figures as JSON."""
    open_registry()
    use_experiment("bench")
    champion, challenger = (register_mlp("challenged", FEATURES) for _ in range(2))
    source, challenged = make_customers(ROWS), OPTIONS.model_copy(update={"challengers": (challenger,)})
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "without": lambda: run(champion, source, OPTIONS, FOLDER / "plain"),
        "with": lambda: run(champion, source, challenged, FOLDER / "both"),
        "passes": lambda: pass_rows(challenger, source),
    }
    for case in cases.values():
        case()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in track(range(ROUNDS), "challengers", console=console):
        for name, case in cases.items():
            found[name].append(case())
    figures = {kind: summarize(found, kind) for kind in ("clock", "processor")}
    plan, storage = plan_run(champion, source, challenged, FOLDER / "both")
    compared = measure(lambda: compare_challenger(storage, plan, plan.challenger_plans[0]))
    same = read_parts(FOLDER / "plain") == read_parts(FOLDER / "both")
    for each in figures.values():
        each["same_bytes"] = same
    show(f"{ROWS:,} rows, medians of {ROUNDS}; {machine()}", figures, WANTED)
    told = {
        "over_its_passes": {kind: each["over_its_passes"] for kind, each in figures.items()},
        "same_bytes": same,
        "comparison_seconds": {kind: round(value, 2) for kind, value in compared.items()},
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print(json.dumps({"rows": ROWS, "machine": machine(), **told, "figures": figures, "rounds": found}))


def summarize(found: dict[str, list[dict[str, float]]], kind: str) -> dict[str, Any]:
    """Return the medians of one kind of seconds, and what a challenger adds over its passes, round by round."""
    seconds = {name: statistics.median(each[kind] for each in rounds) for name, rounds in found.items()}
    rounds = zip(found["with"], found["without"], found["passes"], strict=True)
    ratios = [(both[kind] - one[kind]) / passes[kind] for both, one, passes in rounds]
    return {
        **{f"seconds_{name}": round(value, 3) for name, value in seconds.items()},
        "over_its_passes": round(statistics.median(ratios), 3),
        "over_its_passes_by_round": [round(each, 3) for each in ratios],
    }


def measure(work: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of work, of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}


def plan_run(model: str, source: Path, options: BatchOptions, destination: Path) -> tuple[Plan, Storage]:
    """Plan a run, or find it planned."""
    storage = open_storage(str(destination))
    resolved = resolve_model(model)
    contract = resolved.contract(options.input_columns, options.policies, options.params)
    request = make_request(resolved, contract, str(source), storage.url, options)
    found = find_run(request, storage, f"bench-{request.key}")
    assert not isinstance(found, CompleteRun)
    return found.plan, storage


def run(model: str, source: Path, options: BatchOptions, destination: Path) -> dict[str, float]:
    """Score all rows once more, and return the seconds of that."""
    shutil.rmtree(destination, ignore_errors=True)
    plan, storage = plan_run(model, source, options, destination)
    scorer = Scorer(
        plan=plan,
        destination=storage,
        model=load_planned_model(plan, None, options),
        challengers=load_planned_challengers(plan, options, storage),
        max_reject_fraction=1.0,
    )

    def score() -> None:
        done = ScoringResult()
        with ThreadPoolExecutor(CORES) as pool:
            for scored in pool.map(scorer.score_shard, scorer.scheduler.begin()):
                done.add(scored)
        assert done.rows == ROWS

    return measure(score)


def pass_rows(model: str, source: Path) -> dict[str, float]:
    """Pass as many rows through a model as the table has, a block that is in memory again and again."""
    plan, _ = plan_run(model, source, OPTIONS, FOLDER / "passes")
    loaded = load_planned_model(plan, None, OPTIONS)
    table = next(open_reader(plan).blocks(next(iter(plan.chunks.values()))))
    encoded = encode(plan.contract, table)
    return measure(lambda: pass_in_threads(loaded, plan, encoded))


def pass_in_threads(model: Model, plan: Plan, encoded: Encoded) -> None:
    """Make the passes in a thread for each core."""

    def work(rows: int) -> None:
        forward = Forward(model, plan.contract, plan.batch_size)
        with model.slot():
            while rows > 0:
                forward.score(encoded.slice_rows(0, min(rows, encoded.rows)))
                rows -= encoded.rows

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(work, [ROWS // CORES] * CORES))


def read_parts(destination: Path) -> list[bytes]:
    """Return the parts of the model of a run, by their names without what names the plan."""
    return [path.read_bytes() for path in sorted(destination.glob("run=*/part-*"))]


if __name__ == "__main__":
    main()
