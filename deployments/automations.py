"""Automations that resume the flow runs whose machine was lost.

Prefect runs a failed task again, but nothing that died with its process: a flow run that is lost with its machine stays
Running for ever, and one whose death a worker has seen stays Crashed.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture, ResourceSpecification
from prefect.client.schemas.objects import StateType

# Flow runs of deployments with this tag are resumed: those of prefect.yaml, whose job variables enable heartbeats.
RESUMES_TAG = "resumes"
# Heartbeats come every 30 s: one may be lost, and the next one late.
SILENT_SECONDS = 75.0
# A live worker reports a death twice, about a second apart: a run that was resumed in between would run twice.
SETTLE_SECONDS = 15.0
# From Pending to the first line of the flow; machines that are slow to start need more.
START_SECONDS = 300.0
# Enough for a night of spot machines; a run that kills its own machine must come to an end.
ATTEMPTS_MAX = 20

_FINAL = ("Completed", "Failed", "Crashed", "Cancelled")
# A worker has taken the run up: Prefect's two names for it, in this order.
_TAKEN_UP = ("Pending", "Submitting")


def make_automations(
    *,
    silent_seconds: float = SILENT_SECONDS,
    settle_seconds: float = SETTLE_SECONDS,
    start_seconds: float = START_SECONDS,
    attempts_max: int = ATTEMPTS_MAX,
) -> list[AutomationCore]:
    """Return the automations that resume the flow runs of deployments with the tag.

    A lost machine costs at most `silent_seconds` + `settle_seconds`, and the polling intervals of the server (5 s) and
    the worker (10 s). Prefect accepts no time below 10 s.
    """
    return [
        report_lost_runs(silent_seconds=silent_seconds),
        resume_crashed_runs(settle_seconds=settle_seconds, attempts_max=attempts_max),
        restart_unstarted_runs(start_seconds=start_seconds),
    ]


def report_lost_runs(*, silent_seconds: float = SILENT_SECONDS) -> AutomationCore:
    """Return the automation that makes a run Crashed once it has been silent: its machine is gone.

    It watches every run that has begun, until it ends, is suspended or is scheduled again.
    """
    return AutomationCore(
        name="overnight: report lost runs",
        description=f"A run without a heartbeat for {silent_seconds:g} s has lost its machine: it is Crashed.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=_match_tagged_runs(),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.Running", "prefect.flow-run.heartbeat"},
            expect={
                *("prefect.flow-run.heartbeat", "prefect.flow-run.AwaitingRetry", "prefect.flow-run.Cancelling"),
                # It has left its worker to wait for a person.
                "prefect.flow-run.Suspended",
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


def resume_crashed_runs(*, settle_seconds: float = SETTLE_SECONDS, attempts_max: int = ATTEMPTS_MAX) -> AutomationCore:
    """Return the automation that schedules a Crashed run again, for at most `attempts_max` attempts in all.

    It waits until no event of the run has come for `settle_seconds`. A run that crashed before it began, as with
    invalid parameters, has made no attempt, and stays as it is.
    """
    counts = [str(count) for count in range(1, attempts_max)]
    return AutomationCore(
        name="overnight: resume crashed runs",
        description=f"A run that crashed is run again, {attempts_max} times in all at most.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*", "prefect.run-count": counts}),
            match_related=_match_tagged_runs(),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.Crashed"},
            expect=_expect_anything_but_scheduling(),
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=settle_seconds),
        ),
        actions=[_reschedule("It crashed, and runs again.")],
    )


def restart_unstarted_runs(*, start_seconds: float = START_SECONDS) -> AutomationCore:
    """Return the automation for runs whose machine was lost between taking them up and the first line of the flow.

    Such a run sends no events, and is offered to no other worker. One whose pod waits for a node is left alone: Prefect
    says so of it (InfrastructurePending), and reports a pod that is lost.
    """
    return AutomationCore(
        name="overnight: start again what did not begin",
        description=f"A run that a worker took up, but that has not begun {start_seconds:g} s later, is run again.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=_match_tagged_runs(),
            for_each={"prefect.resource.id"},
            after={f"prefect.flow-run.{state}" for state in _TAKEN_UP},
            expect=_expect_anything_but_scheduling(),
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=start_seconds),
        ),
        actions=[_reschedule(f"It had not begun {start_seconds:g} s after a worker took it up.")],
    )


def _expect_anything_but_scheduling() -> set[str]:
    """Return the events that keep a run from being scheduled again: it is on its way, runs or has come to an end.

    That it was scheduled is not one of them. It is what the automation does, and Prefect may look at the event while
    the window that has just ended still stands; the event would set off the automation a second time.
    """
    begun = ("InfrastructurePending", "Running", "Retrying", "heartbeat", "Cancelling", "Paused", "Suspended")
    return {f"prefect.flow-run.{name}" for name in (*_TAKEN_UP, *begun, *_FINAL)}


def _reschedule(message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message, force=False)


def _match_tagged_runs() -> list[ResourceSpecification | dict[str, str | list[str]]]:
    """Match flow runs that a worker may take up again: a flow that was called from Python has no deployment."""
    return [
        ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{RESUMES_TAG}"}),
        ResourceSpecification({"prefect.resource.role": "deployment"}),
    ]
