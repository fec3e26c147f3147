"""Whether this process has a Prefect server. Without one, flows run as plain functions and keep nothing in Prefect."""

from __future__ import annotations

from prefect.client.base import ServerType, determine_server_type
from prefect.context import FlowRunContext, TaskRunContext

from serving.errors import ServerUnreachable


def is_in_prefect_run() -> bool:
    """Return whether this is called within a flow run or a task run of Prefect."""
    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def is_server_named() -> bool:
    """Return whether PREFECT_API_URL names a Prefect server, of one's own or in the cloud."""
    return determine_server_type() in (ServerType.SERVER, ServerType.CLOUD)


def has_prefect_server() -> bool:
    """Return whether there is a Prefect server: PREFECT_API_URL names one, or a run that Prefect keeps calls this.

    Prefect would start a temporary server for a client without one, which takes some 10 s.
    """
    return is_server_named() or is_in_prefect_run()


def require_prefect_server(what: str) -> None:
    """Raise ServerUnreachable where there is no Prefect server.

    Args:
        what: What needs one, as the beginning of a sentence.
    """
    if not has_prefect_server():
        message = (
            f"{what} needs a Prefect server, but PREFECT_API_URL names none. Start one (prefect server start), set "
            "PREFECT_API_URL=http://127.0.0.1:4200/api, and call again."
        )
        raise ServerUnreachable(message)
