"""Many workers on one run: each is a flow run of one deployment, and all of them score one plan.

No worker leads. The one whose options ask for more starts them, as flow runs that join its own, and then scores.
Any worker that finds every part there publishes. A worker that fails does not affect the others.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import cast
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from flows.runtime.steps import flow_run
from serving.errors import BadInput, ReleaseMismatch, RunnerUnusable
from serving.machine import find_release
from tasks.batch.options import BatchOptions
from tasks.batch.run_records import RunStart, load_start, save_start
from tasks.batch.source import ICEBERG_SCHEME
from tasks.common.artifacts import Logger
from tasks.common.prefect_server import require_prefect_server
from tasks.storage import Storage

_START_SECONDS_MAX = 120.0
_POLL_SECONDS = 1.0


def check_workers(source: str | Sequence[str], destination: str, options: BatchOptions) -> None:
    """Raise RunnerUnusable where there is no deployment that more workers could be started of.

    Raises BadInput where a run of a deployment is given a path that means another folder on every machine, and
    ServerUnreachable where a flow run is to be joined without a Prefect server.
    """
    if options.joins is not None:
        require_prefect_server("A call that joins a flow run")
    this = flow_run()
    if this is not None and this.deployment_id is not None:
        sources = (source,) if isinstance(source, str) else source
        tables = [("feature table", table.source) for table in options.features]
        for name, path in (*(("source", each) for each in sources), *tables, ("destination", destination)):
            if not path.startswith(("/", ICEBERG_SCHEME)) and "://" not in path:
                message = (
                    f"The {name} of a deployment's run must be an absolute path or an address, got {path!r}: each "
                    "worker runs in a folder of its own. Say where it is, from / or s3:// on."
                )
                raise BadInput(message)
    elif options.workers > 1:
        message = (
            f"Several workers are flow runs of one deployment, but this call, for {options.workers} workers, is of "
            "none. Run a deployment (`overnight deploy` makes some), or make this same call in each of several "
            "processes, with one worker each: they share the run."
        )
        raise RunnerUnusable(message)


def find_start(storage: Storage, flow_run_id: str, joins: UUID | None) -> RunStart | None:
    """Return the run that a flow run is tied to: by its earlier attempt, or by the flow run that it joins.

    None where it begins a run itself. Waits for the one that it joins to have resolved its call.

    Raises:
        BadInput: That one has begun no run at this destination by then.
        ReleaseMismatch: It was begun by another release of Overnight than runs here.
    """
    start = load_start(storage, flow_run_id)
    if joins is None:
        return start
    if start is not None:
        return _check_release(start)
    until = time.monotonic() + _START_SECONDS_MAX
    while (joined := load_start(storage, str(joins))) is None:
        if time.monotonic() > until:
            message = (
                f"Flow run {joins} must have begun a run at {storage.url} for this one to join, but has not after "
                f"{_START_SECONDS_MAX:g} s. Give the id and the destination of a flow run that scores, or no `joins`."
            )
            raise BadInput(message)
        time.sleep(_POLL_SECONDS)
    return save_start(storage, flow_run_id, _check_release(joined))


def _check_release(start: RunStart) -> RunStart:
    """Return the start of a run that this release may join: two of them need not give the same bytes."""
    release = find_release()
    if start.release and start.release != release:
        message = (
            f"A worker must be of the release of Overnight that began the run which it joins, {start.release}, but the "
            f"one on {socket.gethostname()} is of {release}. Install {start.release} there, or have all of them on one "
            "release and call again. What is scored stays."
        )
        raise ReleaseMismatch(message)
    return start


def start_workers(options: BatchOptions, logger: Logger) -> list[FlowRun]:
    """Start the other workers that the options ask for, as flow runs of this one's deployment; return them.

    A retry finds those that its earlier attempt has started, and starts none again. Raises RunnerUnusable where the
    deployment has no work pool that could run them.
    """
    this = flow_run()
    if options.workers == 1 or this is None or this.deployment_id is None:
        return []
    _check_pool(this.deployment_id)
    joins = str(options.joins or this.id)
    asked = dict(this.parameters.get("options") or {})
    parameters = {**this.parameters, "options": {**asked, "workers": 1, "joins": joins}}
    started = [
        cast(
            "FlowRun",
            run_deployment(
                this.deployment_id,
                parameters=parameters,
                flow_run_name=f"{this.name} (worker {at})",
                # It is not waited for: it may outlive this flow run, or start when all is done.
                timeout=0,
                idempotency_key=f"{this.id}/worker-{at}",
            ),
        )
        for at in range(2, options.workers + 1)
    ]
    logger.info("More workers score this run: %s.", ", ".join(each.name for each in started))
    return started


def is_beside_another(options: BatchOptions) -> bool:
    """Return whether the flow run that this one joins runs now, as far as Prefect knows."""
    if options.joins is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(options.joins).state
    except (ObjectNotFound, PrefectHTTPStatusError, httpx.HTTPError):
        return False
    return state is not None and state.is_running()


def _check_pool(deployment_id: UUID) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment(deployment_id)
    if deployment.work_pool_name is None:
        message = (
            f"Deployment {deployment.name!r} must have a work pool for its workers to run in, but has none: it was "
            "deleted since, or never given. Create it, deploy again, and call again: the run resumes."
        )
        raise RunnerUnusable(message)
