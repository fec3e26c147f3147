"""Shards on a Ray cluster: each slot is a process of Ray's, which loads plan and model itself.

Ray runs a task again whose process or node died. That is safe, since a part is created once.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prefect import Task
from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.runtime.interruption import ignore_repeated_sigint, take_sigterm_as_notice
from flows.runtime.shard_task import ShardTask
from flows.runtime.tracing import send_trace_along
from serving.errors import RunnerUnusable
from serving.machine import count_cores, set_variable
from tasks.batch.options import Ray
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.common.prefect_server import require_prefect_server

if TYPE_CHECKING:
    from prefect_ray.task_runners import PrefectRayFuture

    from flows.runtime.traced_ray import TracedRayTaskRunner


_POLL_SECONDS = 0.2
_CANCEL_SECONDS = 5.0
_REACH_SECONDS = 10.0
# Nothing but a shard's figures travels through it; a quarter of the memory would be set aside for it otherwise.
_OBJECT_STORE_BYTES = 128 << 20


def check_usable(where: Ray) -> None:
    """Raise RunnerUnusable where Ray is not installed, or nothing listens at the address of the cluster."""
    if missing := [name for name in ("ray", "prefect_ray") if find_spec(name) is None]:
        message = f"runner=Ray() must find {' and '.join(missing)}, got none. Run: pip install 'overnight[ray]'"
        raise RunnerUnusable(message)
    require_prefect_server("runner=Ray()")
    host, _, port = (where.address or "").removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        # Ray itself would try for minutes.
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except OSError as error:
        message = f"A Ray cluster must answer at {where.address}, got: {error}. Start it, or correct runner.address."
        raise RunnerUnusable(message) from error


def score_shards(
    where: Ray,
    slots: int,
    task: Task[..., Any],
    shard_task: ShardTask,
    shards: list[int],
    scorer: Scorer,
    notice_seconds: float,
) -> ScoringResult:
    """Score shards, at most `slots` of them at once; return their results, added up.

    A notice to this process stops them all: slots are elsewhere, and their unfinished chunks are dropped. Raises what
    the first failing shard raised, and RunnerUnusable where the cluster fails.
    """
    scored = ScoringResult()
    pending: dict[Any, PrefectRayFuture[Any]] = {}
    send_trace_along()
    with _connect(where, slots) as runner:
        try:
            for shard in shards:
                if len(pending) == slots:
                    _add_next(pending, scored, scorer)
                if scorer.scheduler.is_stopping():
                    break
                future = runner.submit(task, {"shard_task": shard_task, "shard": shard})
                pending[future.wrapped_future] = future
            while pending and not scorer.scheduler.is_stopping():
                _add_next(pending, scored, scorer)
        except TerminationSignal:
            take_sigterm_as_notice(scorer.drain, notice_seconds)
        except BaseException as error:
            ignore_repeated_sigint(error)
            _cancel_tasks(list(pending), _CANCEL_SECONDS)
            raise
        scored.chunks_dropped += len(pending)
        _cancel_tasks(list(pending), min(_CANCEL_SECONDS, scorer.drain.seconds_left / 4))
    return scored


def _add_next(pending: dict[Any, PrefectRayFuture[Any]], scored: ScoringResult, scorer: Scorer) -> None:
    """Wait for one shard and add its result, or for a notice."""
    import ray  # noqa: PLC0415 - an extra that most installations do without

    done: list[Any] = []
    while not done and not scorer.scheduler.is_stopping():
        done, _ = ray.wait(list(pending), timeout=_POLL_SECONDS)
    if done:
        result = _get_result(pending.pop(done[0]))
        scored.add(result)
        scorer.observe(result)
        scorer.count_rejects(result.rejects)


def _get_result(future: PrefectRayFuture[Any]) -> Any:
    """Return the result of a shard, or raise what it raised."""
    from ray.exceptions import RayError  # noqa: PLC0415

    try:
        result = future.result(raise_on_failure=False)
    except RayError as error:
        raise _runner_unusable(error) from error
    if isinstance(result, BaseException):
        raise result
    return result


def _runner_unusable(error: Exception) -> RunnerUnusable:
    reason = str(error).strip()
    if "ModuleNotFoundError" in reason or "ImportError" in reason:
        return RunnerUnusable(
            "Every process of Ray must import the packages flows, tasks and serving of this very version, got: "
            f"{reason.splitlines()[-1]}. Install the same wheel on every node, and call from a folder that has no "
            "tasks.py, flows.py or serving.py: Ray puts the caller's folder before what is installed."
        )
    return RunnerUnusable(
        f"Ray must carry each shard to its end, got {type(error).__name__}: {reason} Call again, with fewer slots if "
        "memory ran out."
    )


def _cancel_tasks(refs: list[Any], wait_seconds: float) -> None:
    """Cancel tasks: gently, so that Prefect gets their states, then by ending their processes."""
    import ray  # noqa: PLC0415

    for ref in refs:
        ray.cancel(ref)
    _, left = ray.wait(refs, num_returns=len(refs), timeout=wait_seconds) if refs else ([], [])
    for ref in left:
        ray.cancel(ref, force=True)


@contextmanager
def _connect(where: Ray, slots: int) -> Generator[TracedRayTaskRunner]:
    """Start or reach the cluster, and have tasks sent out as the options say."""
    from prefect_ray.context import remote_options  # noqa: PLC0415

    from flows.runtime.traced_ray import TracedRayTaskRunner  # noqa: PLC0415

    here = count_cores()
    cpus = where.cpus_per_slot or (1 if where.address else max(1, here // slots))
    runner = TracedRayTaskRunner(init_kwargs=_ray_arguments(where, max(here, cpus * slots)))
    # A temporary server of the caller's own flow has no address in the settings: each process would start another.
    server = {PREFECT_API_URL: str(get_client(sync_client=True).api_url)}
    with ExitStack() as stack:
        try:
            # A cluster that starts here reports nothing to Ray's makers.
            with set_variable("RAY_USAGE_STATS_ENABLED", "0"), _keep_sigterm_handler():
                stack.enter_context(runner)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            must = f"answer at {where.address}" if where.address else "start on this machine"
            message = f"A Ray cluster must {must}, got {type(error).__name__}: {error}. Check runner, and call again."
            raise RunnerUnusable(message) from error
        _check_cpus(cpus)
        with temporary_settings(server), remote_options(num_cpus=cpus):
            yield runner


def _check_cpus(cpus: int) -> None:
    """Raise RunnerUnusable where no node could ever run a slot: Ray would wait for one in silence."""
    import ray  # noqa: PLC0415

    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it without types
    largest = max((node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]), default=0)
    if cpus > largest:
        message = (
            f"A node of the Ray cluster must have the {cpus} CPUs of a slot, but the largest has {largest:g}. Lower "
            "cpus_per_slot, or call once such a node is up."
        )
        raise RunnerUnusable(message)


def _ray_arguments(where: Ray, cpus: int) -> dict[str, Any]:
    """Return the arguments of ray.init: quiet, and on this machine without its dashboard."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if where.address:
        return {"address": where.address, **quiet}
    here = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    return {**here, "object_store_memory": _OBJECT_STORE_BYTES, **quiet}


@contextmanager
def _keep_sigterm_handler() -> Generator[None]:
    """Put the handler of SIGTERM back: Ray sets one of its own, and Prefect would not learn how the run ended."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
