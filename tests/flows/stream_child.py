"""One scorer of a stream, as a process that tests and benchmarks may kill: python stream_child.py PARAMETERS."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

# What takes seconds to import, and is imported once for all scorers that are forked.
PRELOADED = [
    "flows.stream",
    "mlflow.pyfunc",
    "mlflow.pytorch",
    "torch",
    "tasks.stream.opening",
    "tests.flows.stream_child",
]


def main(parameters: str) -> None:
    """Call the flow with these parameters, and print its report as the last line."""
    from flows.stream import stream_inference

    report = stream_inference(**json.loads(parameters))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_rss_mb": peak, **report.model_dump(mode="json")}), flush=True)


def forked(parameters: str, environment: Mapping[str, str], log: str) -> None:
    """The same in a process that was forked with everything imported: in this environment, writing to a log."""
    os.environ.clear()
    os.environ.update(environment)
    with Path(log).open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    main(parameters)


if __name__ == "__main__":
    main(sys.argv[1])
