"""A flow that returns at once when it is called from Python, and ends with the message of its error."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from prefect import Flow
from prefect.exceptions import ParameterTypeError, SignatureMismatchError
from prefect.logging.configuration import ensure_logging_setup
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed, Failed
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.engine import capture_sigterm
from pydantic import ValidationError

from flows.runtime.error_output import log_failure, shows_frames
from flows.runtime.interruption import InterruptedExit
from flows.runtime.names import NameMaker, keep_chosen_name
from flows.runtime.own_process import prepare_call, prepare_flow_run, prepare_tracing
from flows.runtime.parameters import bind_parameters, explain_invalid, refuse_secrets
from flows.runtime.steps import find_logger, flow_run, name_call
from flows.runtime.tracing import note_error
from serving.errors import BadInput, OvernightError, describe_error
from serving.machine import freeze_objects
from serving.redaction import hide_secrets_in_exception
from tasks.common.prefect_server import has_prefect_server
from tasks.common.server_checks import check_servers, list_checks, list_prefect_checks

# Prefect's engine makes the span of a flow run before it asks the flow for anything.
prepare_tracing()

_INTERRUPTED = "Interrupted. The same call starts again, or resumes where it had begun to score."
_NOTHING_KEPT = (
    "PREFECT_API_URL names no Prefect server, so this call has no flow run, artifacts or events. `prefect server "
    "start` starts one."
)
# Set while a call from Python runs, whose servers were asked before there was a flow run.
_servers_checked: ContextVar[bool] = ContextVar("servers_checked", default=False)

# The processes that have made calls: this one, or those that it was forked from.
_callers = set[int]()

_BY_MODULE = {"entrypoint_type": EntrypointType.MODULE_PATH}

P = ParamSpec("P")
R = TypeVar("R")


def adhoc_flow(name: str, *, run_name: NameMaker, uses_registry: bool = True) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a function a Prefect flow that has no heartbeat where it is called as a function.

    Prefect ends a flow run by joining its heartbeat thread, which sleeps whole seconds: every call
    would take up to a second more. A heartbeat lets automations resume the runs of a deployment; those
    are not started by a call, and keep it. Ctrl-C comes out as a KeyboardInterrupt that says what to do next, a notice
    as Interrupted. Deployments name the flow by its module: it is installed wherever it runs.

    Without a Prefect server a call is one of a function: nothing of it is kept in Prefect, and no server is started.

    An OvernightError comes out as it is, without the frames of Prefect's engine. The flow run is Failed with its
    message. The servers that a call needs are asked for an answer before anything else.

    Args:
        name: The flow's name in Prefect.
        run_name: Makes the name of a flow run of its parameters; see keep_chosen_name.
        uses_registry: Whether the flow reads models from MLflow.
    """
    return lambda function: _AdHocFlow(
        _end_with_message(function, uses_registry=uses_registry),
        name=name,
        flow_run_name=keep_chosen_name(run_name),
        persist_result=False,
    )


def _end_with_message(function: Callable[P, R], *, uses_registry: bool) -> Callable[P, R]:
    """Return the function as a flow run calls it: an OvernightError becomes the state of the run, message and all."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if flow_run() is None:
            return function(*args, **kwargs)
        try:
            if not _servers_checked.get():
                check_servers(list_checks(bind_parameters(function, args, kwargs), uses_registry=uses_registry))
            return function(*args, **kwargs)
        except OvernightError as error:
            log_failure(error)
            note_error(error)
            # Prefect's engine would log the frames of an exception, and put words before its message.
            return cast("R", Failed(data=error, message=describe_error(error)))

    # Prefect resolves annotations that are texts by the names of the module that the wrapper lies in.
    run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]  # inspect reads it
    run.__annotations__ = typing.get_type_hints(function, include_extras=True)
    run.uses_registry = uses_registry  # type: ignore[attr-defined]  # the flow reads it, and its copies do
    return run


class _AdHocFlow(Flow[P, R]):
    if not TYPE_CHECKING:

        def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
            if not _servers_checked.get():
                # Prefect's engine asks: the flow was not called as a function.
                prepare_flow_run()
            refuse_secrets(parameters)
            try:
                return super().validate_parameters(parameters)
            except (ParameterTypeError, SignatureMismatchError) as error:
                if isinstance(error.__context__, ValidationError):
                    raise explain_invalid(self.fn, error.__context__) from None
                raise BadInput(str(error)) from None
            except Exception as error:
                # Pydantic quotes the value that it refuses.
                hide_secrets_in_exception(error)
                raise

        def __call__(self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any) -> Any:
            try:
                _refuse_fork(os.getpid())
                with prepare_call(), _end_as_asked():
                    # Before there is a flow run, which would keep them.
                    refuse_secrets(dict(enumerate(args)) | kwargs)
                    parameters = self.validate_parameters(bind_parameters(self.fn, args, kwargs))
                    checks = list_checks(parameters, uses_registry=self.fn.uses_registry)
                    check_servers([*list_prefect_checks(), *checks])
                    if not has_prefect_server():
                        return self._call_as_function(parameters, return_state=return_state)
                    with _pause_heartbeat():
                        return super().__call__(return_state=return_state, wait_for=wait_for, **parameters)
            except OvernightError as error:
                if shows_frames():
                    raise
                # The frames of Prefect's engine and what an error was caused by say nothing beside its message.
                raise error.with_traceback(None) from None

        def _call_as_function(self, parameters: dict[str, Any], *, return_state: bool) -> Any:
            """Call the flow without a Prefect server, which SIGTERM ends as it ends a flow run."""
            ensure_logging_setup()
            try:
                with name_call(self.name) as is_outermost, capture_sigterm():
                    if is_outermost:
                        find_logger().info(_NOTHING_KEPT)
                    result = self.fn(**parameters)
            except OvernightError as error:
                if return_state:
                    return Failed(data=error, message=describe_error(error))
                raise
            return Completed(data=result) if return_state else result

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


def _refuse_fork(process: int) -> None:
    """Raise BadInput in a process that was forked from one that has made calls: it would wait for ever."""
    _callers.add(process)
    if len(_callers) > 1:
        message = (
            "A call must be made in a process that was not forked from one that had made calls: it lacks the threads "
            'of Prefect, polars and the stores. Start it by multiprocessing.get_context("spawn"), or as a program of '
            "its own."
        )
        raise BadInput(message)


@contextmanager
def _end_as_asked() -> Generator[None]:
    """Let a call from Python end by Ctrl-C or by a notice with what its caller needs."""
    token = _servers_checked.set(True)
    try:
        with freeze_objects():
            yield
    except KeyboardInterrupt as interrupt:
        # Without its cause: the frames of Prefect's engine say nothing to a person who pressed Ctrl-C.
        # Polars raises it with an empty message.
        raise KeyboardInterrupt(str(interrupt) or _INTERRUPTED) from None
    except InterruptedExit as left:
        if left.notice.is_sigterm:
            _pass_on_sigterm()
        raise left.interrupted from None
    finally:
        _servers_checked.reset(token)


def _pause_heartbeat() -> AbstractContextManager[Any]:
    """Have flow runs that begin in the block send none. To change a setting, Prefect reads all of them: 30 ms."""
    if PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() is None:
        return nullcontext()
    return temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})


def _pass_on_sigterm() -> None:
    """Let the caller's own handler of SIGTERM, in its place again, hear the signal that was meant for it too."""
    if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGTERM)):
        signal.raise_signal(signal.SIGTERM)
