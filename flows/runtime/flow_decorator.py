"""A flow that returns at once when it is called from Python."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import Flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.types.entrypoint import EntrypointType
from pydantic import BaseModel

from flows.runtime.interruption import InterruptedExit, start_server_shielded
from flows.runtime.names import NameMaker, keep_chosen_name
from serving.errors import SecretExposed
from serving.redaction import hide_secrets_in_exception, hide_secrets_in_logs, holds_secret

hide_secrets_in_logs()

_INTERRUPTED = "Interrupted. The same call starts again, or resumes where it had begun to score."

_BY_MODULE = {"entrypoint_type": EntrypointType.MODULE_PATH}

P = ParamSpec("P")
R = TypeVar("R")


def adhoc_flow(name: str, *, run_name: NameMaker) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a function a Prefect flow that has no heartbeat where it is called as a function.

    Prefect ends a flow run by joining its heartbeat thread, which sleeps whole seconds: every call
    would take up to a second more. A heartbeat lets automations resume the runs of a deployment; those
    are not started by a call, and keep it. Ctrl-C comes out as a KeyboardInterrupt that says what to do next, a notice
    as Interrupted. Deployments name the flow by its module: it is installed wherever it runs.

    Args:
        name: The flow's name.
        run_name: Makes the name of a flow run of its parameters; see keep_chosen_name.
    """
    return lambda function: _AdHocFlow(
        function, name=name, flow_run_name=keep_chosen_name(run_name), persist_result=False
    )


class _AdHocFlow(Flow[P, R]):
    if not TYPE_CHECKING:

        def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
            refuse_secrets(parameters)
            try:
                return super().validate_parameters(parameters)
            except Exception as error:
                # Pydantic quotes the value that it refuses.
                hide_secrets_in_exception(error)
                raise

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # Before there is a flow run, which would keep them.
            refuse_secrets(dict(enumerate(args)) | kwargs)
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                try:
                    start_server_shielded()
                    return super().__call__(*args, **kwargs)
                except KeyboardInterrupt as interrupt:
                    # Without its cause: the frames of Prefect's engine say nothing to a person who pressed Ctrl-C.
                    raise KeyboardInterrupt(*interrupt.args or [_INTERRUPTED]) from None
                except InterruptedExit as left:
                    if left.notice.is_sigterm:
                        _pass_on_sigterm()
                    raise left.interrupted from None

        def __reduce_ex__(self, protocol: Any) -> Any:
            # A runner sends the flow to the process of a run. By value it would lack the types of its parameters.
            if getattr(sys.modules.get(self.__module__), self.__name__, None) is self:
                return self.__name__
            return super().__reduce_ex__(protocol)

        # By a path, which is Prefect's default, the folder of the flow would come first among those that are imported
        # from, and its module would be another one than the installed one.
        def to_deployment(self, *args: Any, **options: Any) -> Any:
            return super().to_deployment(*args, **_BY_MODULE | options)

        def serve(self, *args: Any, **options: Any) -> Any:
            return super().serve(*args, **_BY_MODULE | options)

        def deploy(self, *args: Any, **options: Any) -> Any:
            return super().deploy(*args, **_BY_MODULE | options)


def refuse_secrets(parameters: Mapping[Any, Any]) -> None:
    """Raise SecretExposed where a parameter holds a password or a token, however deep within it."""
    left = [(str(name), value) for name, value in parameters.items()]
    while left:
        name, value = left.pop()
        if isinstance(value, BaseModel):
            value = dict(value)
        if isinstance(value, Mapping):
            left += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            left += [(f"{name}.{at}", inner) for at, inner in enumerate(value)]
        elif isinstance(value, str | Path) and holds_secret(str(value)):
            message = (
                f"The parameter {name} must hold no password, token or key, got {value}: parameters are kept with the "
                "flow run, and shown to everyone who sees it. Give it in the environment, in a credentials file or "
                "in a Prefect Secret block. Where a deployment holds it, change the password too."
            )
            raise SecretExposed(message)


def _pass_on_sigterm() -> None:
    """Let the caller's own handler of SIGTERM, in its place again, hear the signal that was meant for it too."""
    if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGTERM)):
        signal.raise_signal(signal.SIGTERM)
