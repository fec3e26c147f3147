"""The gate of a run as a flow goes through it: judged, shown, and asked about in Prefect where it refuses the run."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import FlowPauseTimeout, Pause
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.states import Running
from prefect.utilities.urls import url_for
from pydantic import Field

from flows.runtime.steps import Steps, flow_run
from flows.runtime.tracing import end_span_paused
from serving.errors import BadInput
from serving.option_words import give_option
from tasks.batch.artifacts import publish_drift
from tasks.batch.column_statistics import TableStatistics
from tasks.batch.disclosure import shorten_finding
from tasks.batch.events import emit_findings
from tasks.batch.gate import describe_question
from tasks.batch.gate_records import (
    FoundBaseline,
    JudgedRun,
    NoBaseline,
    approve_run,
    check_approved,
    judge_run,
    name_refusal,
    open_baseline,
    save_statistics,
    sum_statistics,
)
from tasks.batch.gate_rules import Gate
from tasks.batch.manifest import Manifest
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import Audit
from tasks.common.artifacts import Logger
from tasks.common.prefect_server import is_server_named
from tasks.storage import Storage

_POLL_SECONDS = 2
_TEXT_MAX, _TEXT_SHOWN = 1_000, 300


class ApprovalForm(RunInput):
    """What Prefect asks a person who resumes a run that its gate has refused."""

    approve: bool = Field(default=False, description="Publish the run as it is.")
    approved_by: str = Field(default="", max_length=_TEXT_MAX, description="Who says so; kept beside the run.")
    reason: str = Field(default="", max_length=_TEXT_MAX, description="Why; kept beside the run.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunGate:
    """The gate of one run, and what finds its baseline once the run is scored."""

    gate: Gate
    plan: Plan
    storage: Storage
    options: BatchOptions
    find_baseline: Callable[[], FoundBaseline | NoBaseline]
    steps: Steps
    logger: Logger

    @property
    def may_ask(self) -> bool:
        """Whether a refused run asks for approval: of several flow runs on one run, the one that the others join."""
        return self.gate.on_refusal == "pause" and self.options.joins is None and flow_run() is not None

    def pass_run(self, parts: Audit | Manifest) -> tuple[str, ...]:
        """Hold a run against its gate before it is published; return what the gate says, in words.

        A run that is refused asks for approval, where it may. After the answer it is judged again, since another run
        may have been published meanwhile, or somebody may have approved this one by the command.

        Raises:
            ApprovalNeeded: It is refused, and not approved.
            Pause: It has asked, and Prefect runs the flow again once there is an answer.
        """
        if isinstance(parts, Manifest):
            # Another worker has published it.
            return ()
        judged = self.steps.run("gate", self._judge_scored)
        while judged.is_refused:
            denial = self._ask(judged)
            before, judged = judged, self._judge(judged.statistics)
            if judged.findings != before.findings:
                self._show(judged)
            if denial is not None:
                self._check(judged, denial)
        save_statistics(self.storage, self.plan.run, self.plan.digest, judged.statistics)
        return tuple(map(str, self._disclose(judged).findings))

    def _disclose(self, judged: JudgedRun) -> JudgedRun:
        """Return what a gate says as it may leave the destination."""
        if self.options.disclose == "values":
            return judged
        return replace(judged, findings=tuple(map(shorten_finding, judged.findings)))

    def _judge_scored(self) -> JudgedRun:
        """Judge the run by the statistics in its parts, and show what the gate says."""
        judged = self._judge(sum_statistics(self.storage, self.plan))
        self._show(judged)
        if not self.may_ask:
            joined = f"Flow run {self.options.joins}, which it has joined, may ask for approval."
            self._check(judged, joined if self.gate.on_refusal == "pause" and self.options.joins else None)
        return judged

    def _judge(self, statistics: TableStatistics) -> JudgedRun:
        return judge_run(
            *(self.storage, self.plan.run, self.plan.digest, self.gate.rules, self.find_baseline(), statistics)
        )

    def _show(self, judged: JudgedRun) -> None:
        judged = self._disclose(judged)
        for finding in judged.findings:
            self.logger.warning("The gate says of run %s beside %s: %s", self.plan.run, judged.title, finding)
        emit_findings(self.plan, self.storage.url, judged.title, judged.findings)
        publish_drift(judged, self.plan.run, self.logger, is_drawn=self.options.disclose == "values")

    def _check(self, judged: JudgedRun, answer: str | None) -> None:
        command = shlex.join(["overnight", "approve", self.storage.url, self.plan.run])
        check_approved(self.plan.run, self._disclose(judged), command, answer)

    def _ask(self, judged: JudgedRun) -> str | None:
        """Ask for approval in Prefect, and keep it; return why it is not approved, None where it is."""
        run, hours = flow_run(), self.gate.pause_hours
        assert run is not None, "only a flow run asks"  # noqa: S101 - `may_ask` has looked
        self.logger.warning(
            "Run %s asks for approval, for %g h at most. Resume its flow run in Prefect to answer: %s",
            *(self.plan.run, hours, url_for("flow-run", run.id) or run.id),
        )
        # It names exactly what is asked for: a flow run that was suspended asks the same again, and has the answer.
        name = name_refusal(self.plan.digest, judged.findings)
        question = describe_question(self._disclose(judged).findings, self.plan.run, judged.title)
        answer = _wait_for_answer(run, question, name, max(1, round(hours * 3600)))
        if answer is None:
            return f"It has asked for approval in Prefect, and had no answer within {hours:g} h."
        who, why = _shorten(" by ", answer.approved_by), _shorten(": ", answer.reason)
        if not answer.approve:
            return f"It has asked for approval in Prefect, and was declined{who}{why}."
        approve_run(self.storage, self.plan.run, answer.approved_by, answer.reason, name)
        self.logger.info("Run %s is approved%s%s.", self.plan.run, who, why)
        return None


def _shorten(begin: str, text: str) -> str:
    """Return what a person has written as the end of a sentence, on one line; nothing where it is empty."""
    line = " ".join(text.split())[:_TEXT_SHOWN].rstrip(".")
    return f"{begin}{line}" if line else ""


def open_gate(plan: Plan, storage: Storage, options: BatchOptions, steps: Steps, logger: Logger) -> RunGate | None:
    """Return the gate of a run, None where it has none. What can't work is refused here, before anything is scored.

    Raises:
        BadInput: The run is to ask in Prefect, and PREFECT_API_URL names no server.
        OvernightError: The baseline can't be used, as `open_baseline` says.
    """
    gate = options.gate
    if gate is None:
        return None
    if gate.on_refusal == "pause" and not is_server_named():
        message = (
            f"A run that asks for approval must have a Prefect server that people can reach, but PREFECT_API_URL names "
            f"none. Set PREFECT_API_URL, or leave {give_option('gate', {'on_refusal': 'pause'})} out and use "
            "`overnight approve`."
        )
        raise BadInput(message)
    find_baseline = steps.run("baseline", lambda: open_baseline(storage, gate.baseline, plan))
    return RunGate(
        gate=gate,
        plan=plan,
        storage=storage,
        options=options,
        find_baseline=find_baseline,
        steps=steps,
        logger=logger,
    )


def _wait_for_answer(run: FlowRun, question: str, name: str, seconds: int) -> ApprovalForm | None:
    """Return the answer that a person gives in Prefect, None where there is none in time.

    A run of a deployment is suspended: it leaves its worker, and Prefect runs it again once it is answered. Prefect
    suspends none that belongs to another flow run, and a call from Python has no worker that would run it again: these
    wait in this process.
    """
    form = ApprovalForm.with_initial_data(description=question)
    if run.deployment_id is not None and run.parent_task_run_id is None:
        try:
            return suspend_flow_run(wait_for_input=form, timeout=seconds, key=name)
        except Pause:
            end_span_paused("It asks for approval.")
            raise
    try:
        return pause_flow_run(wait_for_input=form, timeout=seconds, poll_interval=_POLL_SECONDS, key=name)
    except FlowPauseTimeout:
        # Prefect has it as failed, or will: it goes on to fail with what it was refused for.
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Running(), force=True)
        return None
