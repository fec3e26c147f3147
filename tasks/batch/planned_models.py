"""The models of a planned run: which Python they run in, how many slots they get, and how they are loaded."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

from serving.errors import ModelUnfit, OvernightError
from serving.model.environment_choice import (
    Environment,
    MadeEnvironment,
    choose_model_environment,
    make_own_environment,
)
from serving.model.interface import Model
from serving.model.loading import load_model
from serving.model.process_handle import FIRST_PROCESSES
from serving.model.processes import ProcessOptions
from serving.model.registry import Resolved, open_model
from serving.model.requirements import list_libraries
from tasks.batch.options import BatchOptions
from tasks.batch.parts import give_up_challenger, read_given_up
from tasks.batch.plan import Plan
from tasks.storage import Storage

_log = logging.getLogger(__name__)


def prepare_model_process(resolved: Resolved, options: BatchOptions) -> None:
    """Start the process that those of a model are copied from, where it has any: it imports while others work."""
    if not resolved.needs_torch and options.environment != "model":
        libraries = list_libraries(resolved.folder)
        FIRST_PROCESSES.prepare(sys.executable, libraries)


def choose_slots(options: BatchOptions, model: Model) -> int:
    """Return how many slots a run has: what the options say, or what suits the model on this machine."""
    return options.slots or model.slots


def choose_environment(resolved: Resolved, options: BatchOptions) -> tuple[Environment, ProcessOptions]:
    """Return the Python environment that a model runs in, and how its processes run there; the plan keeps which.

    Raises BadInput as `choose_model_environment` does.
    """
    made = choose_model_environment(resolved, options.environment, options.packages)
    return ("caller" if made is None else "model"), _make_process_options(made, options)


def _make_process_options(made: MadeEnvironment | None, options: BatchOptions) -> ProcessOptions:
    memory = options.pass_memory_mb
    passes = ProcessOptions(seconds_max=options.pass_seconds_max, bytes_max=memory << 20 if memory else None)
    return passes if made is None else replace(passes, python=made.interpreter)


def load_planned_model(plan: Plan, resolved: Resolved | None, options: BatchOptions) -> Model:
    """Load the model of a plan on the engine that the plan is tied to, from its files if they are open already.

    Raises ModelUnfit and EnvironmentUnusable where the environment that the plan has can't be made here.
    """
    resolved = resolved or open_planned_model(plan)
    made = None if plan.environment == "caller" else make_own_environment(resolved, options.packages)
    processes = _make_process_options(made, options)
    model = load_model(resolved, plan.contract, allow_pickle=options.allow_pickle, processes=processes)
    return model.with_engine(plan.engine)


def load_planned_challengers(plan: Plan, options: BatchOptions, storage: Storage) -> list[Model | None]:
    """Load the challengers of a plan, None in the place of one that was given up.

    One that loaded when the run was planned, and does not now, is given up: the run goes on without it.
    """
    found: list[Model | None] = []
    for each in plan.challenger_plans:
        if read_given_up(storage, each) is not None:
            found.append(None)
            continue
        try:
            found.append(load_planned_model(each, None, options))
        except OvernightError as error:
            _log.warning("The challenger %s is given up, and the run goes on: %s", each.model.uri, error)
            give_up_challenger(storage, each, str(error))
            found.append(None)
    return found


def open_planned_model(plan: Plan) -> Resolved:
    """Open the very model version that a plan was made for; raises ModelUnfit where its files are others."""
    pin = plan.model
    resolved = open_model(name=pin.name, version=pin.version, source=pin.source)
    if resolved.pin.digest != pin.digest:
        message = (
            f"The files of {pin.uri} must be those that run {plan.run} was planned for (digest {pin.digest[:12]}), "
            f"got digest {resolved.pin.digest[:12]}. Put them back, or start a new run."
        )
        raise ModelUnfit(message)
    return resolved
