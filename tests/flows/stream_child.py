"""One scorer of a stream, as a process that tests and benchmarks may kill: python stream_child.py PARAMETERS."""

from __future__ import annotations

import json
import resource
import sys


def main() -> None:
    """Call the flow with the parameters of the command line, and print its report as the last line."""
    from flows.stream import stream_inference

    report = stream_inference(**json.loads(sys.argv[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_rss_mb": peak, **report.model_dump(mode="json")}), flush=True)


if __name__ == "__main__":
    main()
