"""`make simulate SEEDS=2000`: seeds, steps, calls by how they ended, and one JSON object as the last line.

SEED=123 replays one seed alone and prints its steps, FIRST=5000 begins with another seed than 0. Ends with 1 where
anything was violated.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.simulation.outcome import Outcome, simulate_briefly, simulate_seed


def main() -> int:
    """Simulate the seeds that the environment asks for; return how the process ends."""
    if seed := os.environ.get("SEED"):
        outcome = simulate_seed(int(seed))
        print("\n".join(outcome.trace))
        return show([outcome])
    first, seeds = int(os.environ.get("FIRST", "0")), int(os.environ.get("SEEDS", "200"))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return show(list(pool.map(simulate_briefly, range(first, first + seeds), chunksize=10)))


def show(outcomes: list[Outcome]) -> int:
    """Print what came of seeds."""
    refusals = sum((outcome.refusals for outcome in outcomes), Counter[str]())
    violations = [(outcome.seed, each) for outcome in outcomes for each in outcome.violations]
    for seed, each in violations:
        print(f"seed {seed}: {each}")
    steps = sum(outcome.steps for outcome in outcomes)
    print(f"{len(outcomes)} seeds, {steps:,} steps; calls by how they ended: {dict(refusals.most_common())}")
    told = {"seeds": len(outcomes), "steps": steps, "calls": dict(refusals), "violations": len(violations)}
    print(json.dumps(told | {"failing_seeds": sorted({seed for seed, _ in violations})}))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
