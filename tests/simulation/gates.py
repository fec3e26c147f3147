"""Gates before the manifest: what they must refuse is known from the rows asked for, and from who approved what."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from serving.errors import ApprovalNeeded
from tasks.batch.gate_records import (
    FoundBaseline,
    JudgedRun,
    Refusal,
    approve_run,
    check_approved,
    judge_run,
    open_baseline,
    save_statistics,
    sum_statistics,
)
from tasks.batch.gate_rules import Gate, RejectRateRule, RowCountRule
from tasks.batch.manifest import Manifest
from tasks.batch.plan import Plan
from tasks.storage import Storage
from tests.simulation.data import Answered
from tests.simulation.oracle import Oracle
from tests.simulation.storage import SimulatedStorage

_ANSWER = re.compile(r"_overnight/([^/]+)/(refused|approved)-([0-9a-f]+)\.json")
_MANIFEST = re.compile(r"_overnight/([^/]+)/manifest\.json")


@dataclass(kw_only=True)
class GateWorld:
    """The gate of all runs of a destination, None where they have none; sees what is refused, approved and published.

    A bound of a rule's own says by the rows alone whether a run is refused. One that a baseline decides may be refused
    or not, by which run is the newest at that moment.
    """

    gate: Gate | None
    storage: SimulatedStorage
    oracle: Oracle
    refused: set[str] = field(default_factory=set)
    _refusals: dict[tuple[str, str], str] = field(default_factory=dict)
    _approved: set[tuple[str, str]] = field(default_factory=set)

    def open_baseline(self, storage: Storage, plan: Plan) -> None:
        """Look for the baseline before anything is scored, as flows.runtime.run_gate does it."""
        if self.gate is not None:
            open_baseline(storage, self.gate.baseline, plan)

    def pass_run(self, storage: Storage, plan: Plan, began: float) -> None:
        """Hold a scored run against its gate, in the order of flows.runtime.run_gate. Raises ApprovalNeeded."""
        if self.gate is None:
            return
        find_baseline = open_baseline(storage, self.gate.baseline, plan)
        statistics = sum_statistics(storage, plan)
        rules = self.gate.rules
        judged = judge_run(storage, plan.run, plan.digest, rules, find_baseline(), statistics)
        self._check_judged(plan, judged, began)
        try:
            check_approved(plan.run, judged, "approve it")
        except ApprovalNeeded:
            self.refused.add(plan.run)
            raise
        save_statistics(storage, plan.run, plan.digest, judged.statistics)

    def approve(self, storage: Storage, run: str) -> None:
        """Approve what a run was refused for. Raises OvernightError."""
        approve_run(storage, run, "somebody", "it is meant")

    def see_put(self, path: str) -> None:
        """Take note of refusals and approvals; check that a run which is published was to be."""
        data = self.storage.objects[path][0]
        if match := _ANSWER.fullmatch(path):
            run, kind, name = match.groups()
            if kind == "approved":
                self._approved.add((run, self._refusals.get((run, name), "")))
            elif digest := _read_digest(data):
                self._refusals[run, name] = digest
        elif (match := _MANIFEST.fullmatch(path)) and self.gate is not None:
            try:
                manifest = Manifest.model_validate_json(data)
            except ValueError:
                return
            if self._is_broken(manifest.key) and (match[1], manifest.plan_digest) not in self._approved:
                self._violate(f"run {match[1]} is published, which breaks its rules, and nobody has approved it")

    def check_committed(self, keys: list[str]) -> None:
        """Check that the runs in a table were to be committed; they are called by their keys."""
        approved = {run for run, _ in self._approved}
        for key in keys:
            if self._is_broken(key) and key not in approved:
                self._violate(f"run {key} is in the table, breaks its rules, and nobody has approved it")

    def _is_broken(self, key: str) -> bool:
        """Whether a run breaks a bound of a rule's own, by the rows that were asked for."""
        wanted = self.oracle.wanted.get(key, [])
        rows, rejects = len(wanted), _count_rejects(wanted)
        for rule in self.gate.rules if self.gate else ():
            if isinstance(rule, RejectRateRule) and rule.max_rate is not None and rejects > rule.max_rate * rows:
                return True
            if isinstance(rule, RowCountRule) and rule.min_rows is not None and rows < rule.min_rows:
                return True
        return False

    def _check_judged(self, plan: Plan, judged: JudgedRun, began: float) -> None:
        """Check the statistics that a run and its baseline were judged by, and what came of it."""
        if self._is_broken(plan.key) and not (judged.is_refused or judged.approved):
            self._violate(f"run {plan.run} breaks its rules, and is not refused")
        wanted = self.oracle.wanted[plan.key]
        found = judged.statistics.rows, judged.statistics.rejects
        if (len(wanted), _count_rejects(wanted)) != found:
            self._violate(f"run {plan.run} is judged by {found} rows and rejects, and has {len(wanted)} rows")
        if not isinstance(judged.baseline, FoundBaseline) or began <= self.oracle.damaged_at:
            return
        run = judged.baseline.title.removeprefix("run ")
        data = self.storage.objects.get(f"_overnight/{run}/manifest.json")
        if data is None:
            return
        before = self.oracle.wanted[Manifest.model_validate_json(data[0]).key]
        beside = judged.baseline.statistics.rows, judged.baseline.statistics.rejects
        if (len(before), _count_rejects(before)) != beside:
            self._violate(f"run {run} stands for {beside} rows and rejects as a baseline, and has {len(before)} rows")

    def _violate(self, text: str) -> None:
        self.oracle.violations.append(f"gate: {text}")


def make_gate(chance: random.Random) -> Gate:
    """Return a gate that some runs break: by bounds of its own, or by what the run has that was published last."""
    rejects = RejectRateRule(severity="refuse", max_change=None, max_rate=chance.choice([0.02, 0.06]))
    few = RowCountRule(severity="refuse", max_change=None, min_rows=chance.choice([10, 30]))
    change = RowCountRule(severity="refuse", max_change=chance.choice([0.1, 0.4]))
    return Gate(rules=tuple(chance.choice([[rejects], [few], [change], [few, change], [rejects, change]])))


def _count_rejects(wanted: list[Answered]) -> int:
    return sum(is_reject for _, _, is_reject in wanted)


def _read_digest(data: bytes) -> str:
    try:
        return Refusal.model_validate_json(data).plan_digest
    except ValueError:
        return ""
