"""Prefect artifacts and log lines: what the flows share to show how they go. A server that fails never ends a run."""

from __future__ import annotations

import contextvars
import json
import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.exceptions import PrefectHTTPStatusError
from prefect.utilities.context import get_task_and_flow_run_ids

from tasks.common.formatting import data_uri
from tasks.common.prefect_server import has_prefect_server

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]

# What httpx and Prefect say, without types of their own, of a client that the flow's end closed under a late thread.
_CLOSED = ("client has been closed", "cannot be started again after closing")


@contextmanager
def server_may_fail(logger: Logger, what: str = "artifacts") -> Generator[None]:
    """Let the block pass over a Prefect server that does not answer: `what` it was to be sent is logged as lost."""
    try:
        yield
    except (PrefectHTTPStatusError, httpx.HTTPError) as error:
        logger.warning("The Prefect server must take the run's %s, got: %s. The run goes on without.", what, error)
    except RuntimeError as error:
        if not any(reason in str(error) for reason in _CLOSED):
            raise


def make_markdown(key: str, markdown: str, description: str) -> ArtifactCreate:
    """Return an artifact of Markdown."""
    return ArtifactCreate(type="markdown", key=key, data=markdown, description=description)


def make_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> ArtifactCreate:
    """Return an artifact that is a table; the values of its rows must be ones that JSON has."""
    return ArtifactCreate(type="table", key=key, data=json.dumps(rows, allow_nan=False), description=description)


def make_image(key: str, picture: bytes, description: str) -> ArtifactCreate:
    """Return an artifact that is a picture, a PNG or an SVG."""
    return ArtifactCreate(type="image", key=key, data=data_uri(picture), description=description)


def put_artifacts(artifacts: Sequence[ArtifactCreate], logger: Logger) -> None:
    """Put artifacts on the flow run: each replaces the one of its key that an earlier attempt of the run has put.

    Without a Prefect server nothing is put.
    """
    if not has_prefect_server():
        return
    with server_may_fail(logger), get_client(sync_client=True) as client:
        for artifact in artifacts:
            _put_artifact(client, artifact)


def read_artifact(key: str, logger: Logger) -> str | None:
    """Return what an artifact of this flow run holds that an earlier attempt of it has put, None without one."""
    _, flow_run_id = get_task_and_flow_run_ids()
    found = None
    if flow_run_id is None:
        return None
    with server_may_fail(logger), get_client(sync_client=True) as client:
        found = _find_artifact(client, key, flow_run_id)
    return None if found is None else str(found.data)


def _put_artifact(client: SyncPrefectClient, artifact: ArtifactCreate) -> UUID:
    task_run_id, flow_run_id = get_task_and_flow_run_ids()
    ids = {"flow_run_id": flow_run_id, "task_run_id": task_run_id}
    earlier = _find_artifact(client, artifact.key, flow_run_id)
    if earlier is None:
        return client.create_artifact(artifact.model_copy(update={k: v for k, v in ids.items() if v})).id
    client.update_artifact(earlier.id, ArtifactUpdate(data=artifact.data, description=artifact.description))
    return earlier.id


def _find_artifact(client: SyncPrefectClient, key: str | None, flow_run_id: UUID | None) -> Artifact | None:
    """Return the artifact of this key that the flow run has already, None outside of one."""
    if flow_run_id is None or key is None:
        return None
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]), key=ArtifactFilterKey(any_=[key]))
    return next((each for each in client.read_artifacts(artifact_filter=wanted)), None)


class ProgressArtifact:
    """A progress bar among the flow run's artifacts: created by the first `show`, updated by later ones."""

    def __init__(self, key: str, description: str, logger: Logger) -> None:
        self._key, self._description, self._logger = key, description, logger
        self._id: UUID | None = None

    def show(self, percent: float) -> None:
        """Set the bar to a percentage, where there is a Prefect server."""
        if not has_prefect_server():
            return
        with server_may_fail(self._logger), get_client(sync_client=True) as client:
            if self._id is None:
                bar = ArtifactCreate(type="progress", key=self._key, data=percent, description=self._description)
                self._id = _put_artifact(client, bar)
            else:
                client.update_artifact(self._id, ArtifactUpdate(data=percent))


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread that knows the flow run, which artifacts and log lines find in the context."""
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(work,), name=name, daemon=True)
    thread.start()
    return thread
