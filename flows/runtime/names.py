"""Names of flow runs: what each does, instead of the two random words that Prefect gives it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

from coolname.data import config as word_lists
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from flows.runtime.steps import flow_run
from tasks.common.artifacts import Logger, server_may_fail

NameMaker = Callable[[Mapping[str, Any]], str]


def keep_chosen_name(make_name: NameMaker) -> Callable[[], str]:
    """Return what Prefect asks for the name of a flow run as it begins.

    A flow run that a person, a schedule or another flow has named keeps its name, and so does a later attempt. One
    that has the two random words of Prefect gets what `make_name` makes of its parameters.
    """

    def choose_name() -> str:
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return ""
        name = context.flow_run.name
        return make_name(context.parameters or {}) if is_random_name(name) else name

    return choose_name


def is_random_name(name: str) -> bool:
    """Return whether a name is two words of the lists that Prefect takes its random names from."""
    words = name.split("-")
    return len(words) == 2 and _list_words().issuperset(words)  # noqa: PLR2004 - an adjective and an animal


@functools.cache
def _list_words() -> frozenset[str]:
    lists = cast("dict[str, dict[str, Any]]", word_lists)
    return frozenset(word for each in lists.values() for word in each.get("words", ()))


def rename_flow_run(name: str, provisional: str, logger: Logger) -> None:
    """Rename the flow run where it still has the provisional name. Where the server fails, that name stays."""
    run = flow_run()
    if run is None or name == provisional or run.name != provisional:
        return
    with server_may_fail(logger, "name"), get_client(sync_client=True) as client:
        client.set_flow_run_name(run.id, name)
        # Later steps and other workers are named after it.
        run.name = name
