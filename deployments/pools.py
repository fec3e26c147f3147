"""Work pools: where flow runs wait for a machine that has a worker."""

from __future__ import annotations

from prefect.client.schemas.actions import WorkPoolCreate
from prefect.workers.process import ProcessWorker

# A mistyped number of workers must not take, or buy, any number of machines.
FLOW_RUNS_MAX = 64


def pools() -> list[WorkPoolCreate]:
    """Return every pool that prefect.yaml names."""
    return [process_pool(), spot_pool(), on_demand_pool()]


def process_pool() -> WorkPoolCreate:
    """Return the pool of machines that are there anyway: the worker of each starts flow runs as processes."""
    return WorkPoolCreate(
        name="overnight",
        description=_describe("Machines that are there anyway", "overnight"),
        type=ProcessWorker.type,
        base_job_template=ProcessWorker.get_default_base_job_template(),
        concurrency_limit=FLOW_RUNS_MAX,
    )


def spot_pool() -> WorkPoolCreate:
    """Return the pool of machines that are cheap, and may vanish at any moment."""
    name = "overnight-spot"
    describe = _describe("Cheap machines, which may vanish at any moment", name)
    return process_pool().model_copy(update={"name": name, "description": describe})


def on_demand_pool() -> WorkPoolCreate:
    """Return the pool of machines that are bought at the full price, and stay."""
    name = "overnight-on-demand"
    describe = _describe("Machines at the full price, which stay", name)
    return process_pool().model_copy(update={"name": name, "description": describe})


def _describe(what: str, name: str) -> str:
    return f"{what}. On each runs: python -m infra.worker --pool {name}"
