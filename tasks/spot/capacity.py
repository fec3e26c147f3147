"""Capacity: which machines are to be had, as far as their workers' heartbeats tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Protocol

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import Worker
from prefect.exceptions import PrefectHTTPStatusError

from serving.errors import DeploymentMissing

# Prefect takes a worker for gone after as many heartbeats that did not come.
_HEARTBEATS_LOST = 3
_HEARTBEAT_SECONDS = 30.0


class Capacity(Protocol):
    """Machines of a kind that may be had, or not."""

    def living(self) -> frozenset[str]:
        """Return the names of those that are there now: work that is sent is begun by one of them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCapacity:
    """Machines whose workers take flow runs from one Prefect work pool."""

    pool: str

    def living(self) -> frozenset[str]:
        """Return the names of the pool's workers that live; raises DeploymentMissing where there is no such pool."""
        try:
            with get_client(sync_client=True) as client:
                workers = client.read_workers_for_work_pool(self.pool)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != HTTPStatus.NOT_FOUND:
                raise
            message = f"The work pool {self.pool} must exist, got none of that name. Create it: make deploy."
            raise DeploymentMissing(message) from error
        return names_living(workers, datetime.now(UTC))


def names_living(workers: Sequence[Worker], now: datetime) -> frozenset[str]:
    """Return the workers whose last heartbeat is recent enough: three in a row may not be missed."""
    return frozenset(
        worker.name
        for worker in workers
        if worker.last_heartbeat_time is not None
        and now - worker.last_heartbeat_time
        < timedelta(seconds=_HEARTBEATS_LOST * (worker.heartbeat_interval_seconds or _HEARTBEAT_SECONDS))
    )
