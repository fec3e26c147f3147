"""A batch run in a process of its own, measured as a worker would run it: `python -m flows.runtime.calibration_run`.

The process reads its call as JSON from stdin, and its last line on stdout has the figures. It makes the call twice,
since the first passes of a process take longer than all others. Their extra time does not depend on the rows, and
counts as part of the start. Nobody waits for these runs, so that it sends no events of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker

from serving.errors import OvernightError
from tasks.batch.options import BatchOptions
from tasks.common.prefect_server import has_prefect_server
from tasks.scheduler.profile import Calibration, calibration_failure

_SECONDS_MAX = 3600.0
_TAIL = 1500


def run_calibration(model: str, source: Path, destination: Path, options: BatchOptions) -> Calibration:
    """Score a dataset in a new process, and return how long a run takes to start, and its speed from then on.

    It is a run of this Prefect server, where there is one, without lineage. Raises ProfileFailed with the output of the
    process.
    """
    options = options.model_copy(update={"experiment": None, "workers": 1, "joins": None, "name": None})
    call = {"model": model, "source": str(source), "destination": str(destination)}
    server = {"PREFECT_API_URL": str(get_client(sync_client=True).api_url)} if has_prefect_server() else {}
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
        raise calibration_failure(model, f"nothing within {_SECONDS_MAX:g} s") from error
    if done.returncode:
        raise calibration_failure(model, done.stderr.strip()[-_TAIL:] or f"exit status {done.returncode}")
    figures = json.loads(done.stdout.splitlines()[-1])
    first, second = figures["score"]
    return Calibration(
        start_seconds=max(0.0, figures["scoring_from"] - begun) + max(0.0, first - second),
        rows_per_second=figures["rows"] / second,
    )


def main() -> None:
    """Make the call that stdin holds."""
    from flows.batch import batch_inference  # noqa: PLC0415 - the parent of this process needs no flow

    EventsWorker.set_client_override(NullEventsClient)
    call = json.load(sys.stdin)
    options = BatchOptions.model_validate(call["options"])
    destination = Path(call["destination"])
    try:
        first = batch_inference(call["model"], call["source"], str(destination / "first"), options)
        ended = time.time()
        second = batch_inference(call["model"], call["source"], str(destination / "second"), options)
    except OvernightError as error:
        sys.exit(str(error))
    figures = {
        "scoring_from": ended - sum(first.seconds.get(stage, 0.0) for stage in ("score", "report", "publish")),
        "score": [report.seconds["score"] for report in (first, second)],
        "rows": second.rows_scored,
    }
    sys.stdout.write(f"\n{json.dumps(figures)}\n")


if __name__ == "__main__":
    main()
