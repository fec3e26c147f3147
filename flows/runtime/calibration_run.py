"""A batch run in a process of its own, measured as a worker would run it: `python -m flows.runtime.calibration_run`.

The process takes its call as JSON from stdin, and its last line on stdout says how its scoring went. It makes the call
twice, since the first passes of a process take longer than all that follow: what they cost more has nothing to do with
the rows, and counts among what a run takes to begin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from prefect.client.orchestration import get_client

from serving.errors import OvernightError
from tasks.batch.options import BatchOptions
from tasks.scheduler.profile import Trial, trial_failed

_SECONDS_MAX = 3600.0
_TAIL = 1500


def run_trial(model: str, source: Path, destination: Path, options: BatchOptions) -> Trial:
    """Score a dataset in a new process, and return how long a run takes to begin, and how fast it goes from then on.

    The run is one of this Prefect server, and leaves no lineage. Raises ProfileFailed with what the process said.
    """
    options = options.model_copy(update={"experiment": None, "workers": 1, "joins": None, "name": None})
    call = {"model": model, "source": str(source), "destination": str(destination)}
    server = {"PREFECT_API_URL": str(get_client(sync_client=True).api_url)}
    begun = time.time()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flows.runtime.calibration_run"],
            input=json.dumps({**call, "options": options.model_dump(mode="json")}),
            env={**os.environ, **server, "PREFECT_LOGGING_LEVEL": "CRITICAL"},
            capture_output=True,
            text=True,
            timeout=_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise trial_failed(model, f"nothing within {_SECONDS_MAX:g} s") from error
    if done.returncode:
        raise trial_failed(model, done.stderr.strip()[-_TAIL:] or f"exit status {done.returncode}")
    told = json.loads(done.stdout.splitlines()[-1])
    first, second = told["score"]
    return Trial(
        start_seconds=max(0.0, told["scoring_from"] - begun) + max(0.0, first - second),
        rows_per_second=told["rows"] / second,
    )


def main() -> None:
    """Make the call that stdin holds."""
    from flows.batch import batch_inference  # noqa: PLC0415 - the process that starts this one has it already

    call = json.load(sys.stdin)
    options = BatchOptions.model_validate(call["options"])
    destination = Path(call["destination"])
    try:
        first = batch_inference(call["model"], call["source"], str(destination / "first"), options)
        ended = time.time()
        second = batch_inference(call["model"], call["source"], str(destination / "second"), options)
    except OvernightError as error:
        sys.exit(str(error))
    told = {
        "scoring_from": ended - sum(first.seconds.get(stage, 0.0) for stage in ("score", "report", "publish")),
        "score": [report.seconds["score"] for report in (first, second)],
        "rows": second.rows_scored,
    }
    sys.stdout.write(f"\n{json.dumps(told)}\n")


if __name__ == "__main__":
    main()
