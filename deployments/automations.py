"""Automations: how runs whose machine was lost go on, without anybody looking.

Prefect runs a failed task again, but nothing that died with its process: a flow run that is lost with its
machine stays Running for ever, and one that a worker saw die stays Crashed.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture, ResourceSpecification
from prefect.client.schemas.objects import StateType

# Runs of deployments with this tag are resumed: those of prefect.yaml, whose job variables make them send heartbeats.
TAG = "resumes"
# Of heartbeats that come every 30 s one may be lost, and the next be late.
SILENT_SECONDS = 75.0
# A worker that lives reports a death twice, about a second apart: a run that was resumed in between would run twice.
SETTLED_SECONDS = 15.0
# From the worker's word to the first line of the flow; machines that are slow to start need more.
STARTING_SECONDS = 300.0
# Enough for a night of spot machines; a run that itself kills its machine must come to an end.
ATTEMPTS_MAX = 20

_FINAL = ("Completed", "Failed", "Crashed", "Cancelled")


def automations(
    *,
    silent_seconds: float = SILENT_SECONDS,
    settled_seconds: float = SETTLED_SECONDS,
    starting_seconds: float = STARTING_SECONDS,
    attempts_max: int = ATTEMPTS_MAX,
) -> list[AutomationCore]:
    """Return the automations that resume the flow runs of deployments with the tag.

    A machine that is lost costs at most `silent_seconds` + `settled_seconds`, the server's look at its
    clock (5 s) and the worker's at its queue (10 s). Prefect takes no time below 10 s.
    """
    return [
        report_lost(silent_seconds=silent_seconds),
        resume_crashed(settled_seconds=settled_seconds, attempts_max=attempts_max),
        start_again(starting_seconds=starting_seconds),
    ]


def report_lost(*, silent_seconds: float = SILENT_SECONDS) -> AutomationCore:
    """Return the automation that makes a run Crashed once it has been silent: its machine is gone.

    It watches every run that has begun, until it ends or is about to be run again.
    """
    return AutomationCore(
        name="overnight: report lost runs",
        description=f"A run without a heartbeat for {silent_seconds:g} s has lost its machine: it is Crashed.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=_tagged(),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.Running", "prefect.flow-run.heartbeat"},
            expect={
                *("prefect.flow-run.heartbeat", "prefect.flow-run.AwaitingRetry", "prefect.flow-run.Cancelling"),
                *(f"prefect.flow-run.{state}" for state in _FINAL),
            },
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silent_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"No heartbeat for {silent_seconds:g} s.",
                force=False,
            )
        ],
    )


def resume_crashed(*, settled_seconds: float = SETTLED_SECONDS, attempts_max: int = ATTEMPTS_MAX) -> AutomationCore:
    """Return the automation that has a Crashed run run again, `attempts_max` times in all at most.

    It waits until nothing has been heard of the run for `settled_seconds`. A run that crashed before it
    began, as with parameters that it can't take, has made no attempt, and is left as it is.
    """
    counts = [str(count) for count in range(1, attempts_max)]
    return AutomationCore(
        name="overnight: resume crashed runs",
        description=f"A run that crashed is run again, {attempts_max} times in all at most.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*", "prefect.run-count": counts}),
            match_related=_tagged(),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.Crashed"},
            expect={"prefect.flow-run.*"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=settled_seconds),
        ),
        actions=[_run_again("It crashed, and runs again.")],
    )


def start_again(*, starting_seconds: float = STARTING_SECONDS) -> AutomationCore:
    """Return the automation for runs whose machine was lost between taking them up and their first line.

    Such a run is Pending, sends nothing, and is offered to no other worker.
    """
    return AutomationCore(
        name="overnight: start again what did not begin",
        description=f"A run that a worker took up, but that has not begun {starting_seconds:g} s later, is run again.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=_tagged(),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.Pending"},
            expect={"prefect.flow-run.*"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=starting_seconds),
        ),
        actions=[_run_again(f"It had not begun {starting_seconds:g} s after a worker took it up.")],
    )


def _run_again(message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message, force=False)


def _tagged() -> list[ResourceSpecification | dict[str, str | list[str]]]:
    """Match flow runs that a worker may take up again: one that was called from Python has no deployment."""
    return [
        ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}),
        ResourceSpecification({"prefect.resource.role": "deployment"}),
    ]
