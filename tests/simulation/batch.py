"""Batch calls over a simulated storage: the steps of flows/batch.py in its order, and whatever may happen meanwhile."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from serving.errors import BadInput, OvernightError
from tasks.batch.comparison_records import save_challenger_parts
from tasks.batch.key_check import check_run_keys
from tasks.batch.manifest import Manifest
from tasks.batch.options import BatchOptions
from tasks.batch.plan import Plan
from tasks.batch.publish import Audit, publish
from tasks.batch.resolve import CompleteRun, ResumedRun, find_run, restage_plan
from tasks.batch.run_records import RunStart, confirm_plan, load_start, save_start
from tasks.batch.run_request import RunRequest, make_request
from tasks.spot.drain import Drain, sigterm_notice
from tasks.storage import Storage, check_create_only, open_storage
from tests.simulation.bits import BitWorld
from tests.simulation.challengers import ChallengerOracle
from tests.simulation.claims import ClaimOracle
from tests.simulation.cleaning import CleaningWorld
from tests.simulation.data import Source, ToyResolved, expected, load_toy
from tests.simulation.delta import DeltaOracle
from tests.simulation.features import Features, choose_contract
from tests.simulation.gates import GateWorld
from tests.simulation.oracle import Oracle
from tests.simulation.scheduler import Actor, Killed, Process, Scheduler, Stuck
from tests.simulation.scoring import score_plan
from tests.simulation.storage import SimulatedStorage

SOURCE, OTHER_SOURCE, FEATURES = "sim://source", "sim://other", "sim://features"
DESTINATION, OTHER_DESTINATION = "sim://destination", "sim://table"
_PAUSE_SECONDS = 2.0
_RESUMES, _JOINS, _APPROVALS = 0.5, 0.2, 0.3


@dataclass(kw_only=True)
class FlowRun:
    """A flow run: what it was called with, which one it joins, and the keys that its attempts have asked for."""

    id: str
    options: BatchOptions
    source: str = SOURCE
    joins: str | None = None
    keys: list[str] = field(default_factory=list)
    error: OvernightError | None = None


@dataclass(kw_only=True)
class BatchWorld:
    """One destination and all that happens to it."""

    scheduler: Scheduler
    chance: random.Random
    # By their addresses.
    sources: dict[str, Source]
    features: Features | None
    # What runs read, by their addresses.
    inputs: dict[str, SimulatedStorage]
    destination: SimulatedStorage
    oracle: Oracle
    delta: DeltaOracle | None
    cleaning: CleaningWorld
    gates: GateWorld
    challengers: ChallengerOracle
    bits: BitWorld
    claims: ClaimOracle
    menu: list[BatchOptions]
    mischief: list[str]
    mischief_seconds: float
    callers: int
    calls: int
    refusals: Counter[str] = field(default_factory=Counter)
    version: int = 1
    clocks_differ: bool = False
    began: dict[Process, int] = field(default_factory=dict)
    is_over: bool = False
    unfinished: list[FlowRun] = field(default_factory=list)
    drains: list[Drain] = field(default_factory=list)
    _ids: int = 0

    @property
    def violations(self) -> list[str]:
        """What must never be."""
        return self.oracle.violations

    def run(self) -> None:
        """Let callers call while things go wrong; on a calm day make each call once more, and end what was begun."""
        self.destination.on_put = self._see_put
        self.destination.on_list = self.cleaning.see_list
        self.destination.on_delete = self.cleaning.see_delete
        for source in self.sources.values():
            source.write_some()
        if self.features is not None:
            self.features.write_some()
        self.scheduler.kill_rate = self.destination.weather.kill
        actors = [self._spawn(f"caller-{at}", self._call_often) for at in range(self.callers)]
        fiend = self._spawn("fiend", self._do_mischief)
        for actor in actors:
            self.scheduler.join(actor).value()
        self.is_over = True
        self.scheduler.join(fiend).value()
        self.bits.restore_source()
        self.cleaning.wait()
        self.scheduler.kill_rate = 0.0
        for storage in (*self.inputs.values(), self.destination):
            storage.weather = storage.weather.without_faults()
        # Then come those that were left, behind runs that are newer by now.
        begun_last = [self._new_flow_run(options) for options in self.menu]
        for flow_run in begun_last + self.unfinished:
            self.gates.refused.clear()
            self._attempt_apart(flow_run)
            self._approve_at_last(flow_run)
        self.bits.check_restored(flow_run.error for flow_run in begun_last)
        while self.destination.has_late:
            self.destination.deliver()
        self.oracle.check_newest(self.scheduler.steps)
        self.bits.check_verified()
        self._clean_at_last()

    def _clean_at_last(self) -> None:
        """Mend what a cleaning has taken, and drop older runs; a call that finds its run dropped scores it again."""
        for plan in self.cleaning.list_mendable(self.inputs):
            start = RunStart(run=plan.run, key=plan.key)
            self.destination.write(f"_overnight/starts/mend-{plan.run}.json", start.model_dump_json().encode())
            mended = self._attempt_apart(FlowRun(id=f"mend-{plan.run}", options=self.menu[0], keys=[plan.key]))
            self.cleaning.check_mended(plan.run, mended=mended)
        self.cleaning.clean_at_last(self.chance.randint(1, 3))
        self.oracle.check_newest(self.scheduler.steps)
        self._attempt_apart(self._new_flow_run(self.menu[-1]))

    def _spawn(self, name: str, run: Callable[[], Any]) -> Actor:
        return self.scheduler.spawn(Process(name), name, run)

    def _see_put(self, path: str, is_late: bool) -> None:  # noqa: FBT001 - as the storage calls it
        began = float("-inf") if is_late else self.began.get(self.scheduler.process, float("-inf"))
        self.bits.see_put(path)
        self.cleaning.see_put(path)
        self.gates.see_put(path)
        self.challengers.see_put(path, began)
        self.claims.see_put(path, is_late=is_late)
        self.oracle.see_put(path, self.scheduler.steps, began)

    def _call_often(self) -> None:
        for _ in range(self.calls):
            resumes = self.unfinished and self.chance.random() < _RESUMES
            flow_run = self.chance.choice(self.unfinished) if resumes else self._new_flow_run()
            if not resumes:
                self.unfinished.append(flow_run)
            if self._attempt_apart(flow_run) and flow_run in self.unfinished:
                self.unfinished.remove(flow_run)
            if self.gates.refused and self.chance.random() < _APPROVALS:
                self._approve_apart(self.chance.choice(sorted(self.gates.refused)))
            self.scheduler.sleep(self.chance.expovariate(1 / _PAUSE_SECONDS))

    def _new_flow_run(self, options: BatchOptions | None = None) -> FlowRun:
        self._ids += 1
        name = f"flow-{self._ids}"
        if options is None and self.unfinished and self.chance.random() < _JOINS:
            other = self.chance.choice(self.unfinished)
            return FlowRun(id=name, options=other.options, source=other.source, joins=other.id, keys=other.keys)
        return FlowRun(id=name, options=options or self.chance.choice(self.menu), source=self._choose_source())

    def _choose_source(self) -> str:
        """Return the address of a source; nothing is drawn where there is one alone."""
        return SOURCE if len(self.sources) == 1 else self.chance.choice(sorted(self.sources))

    def _approve_apart(self, run: str) -> bool:
        """Approve a run in a process of its own; return whether that is done."""
        process = Process(f"approver.{self.scheduler.steps}")

        def approve() -> bool:
            try:
                self.gates.approve(open_storage(DESTINATION), run)
            except OvernightError as error:
                self.scheduler.tell(f"the approval is refused: {type(error).__name__}: {error}")
                return False
            return True

        actor = self.scheduler.spawn(process, process.name, approve)
        self.scheduler.join(actor)
        return not isinstance(actor.error, Killed) and bool(actor.value())

    def _approve_at_last(self, flow_run: FlowRun) -> None:
        """Approve what was refused when nobody else calls: the same call then publishes it."""
        for run in sorted(self.gates.refused):
            approved = self._approve_apart(run)
            self.gates.refused.clear()
            self._attempt_apart(flow_run)
            if approved and self.gates.refused:
                self.oracle.violations.append(f"gate: run {run} is refused again, though it was approved")

    def _attempt_apart(self, flow_run: FlowRun) -> bool:
        """Make an attempt in a process of its own; return whether it came to its end."""
        process = Process(f"{flow_run.id}.{self.scheduler.steps}")
        if self.clocks_differ:
            process.clock_error = timedelta(minutes=self.chance.uniform(-600, 600))
        self.began[process] = self.scheduler.steps
        actor = self.scheduler.spawn(process, process.name, lambda: self._attempt(flow_run, process))
        self.scheduler.join(actor)
        # Whatever it had running besides ends with it.
        process.alive = False
        if self.delta is not None:
            self.gates.check_committed(self.delta.check())
        try:
            actor.value()
        except Killed:
            self.refusals["killed"] += 1
        except OvernightError as error:
            flow_run.error = error
            self.refusals[type(error).__name__] += 1
            self.bits.check_refusal(flow_run.keys, error)
            self.claims.check_refusal(flow_run.options, error)
            self.scheduler.tell(f"{flow_run.id} is refused: {type(error).__name__}: {error}")
        except Stuck:
            raise
        except BaseException as error:  # noqa: BLE001 - nobody else's error may come out of a call, no panic of polars
            self.oracle.violations.append(f"a call ended in {type(error).__name__}: {error}")
        else:
            self.refusals["none"] += 1
            return True
        return False

    def _attempt(self, flow_run: FlowRun, process: Process) -> None:
        storage = open_storage(DESTINATION)
        load: Any = load_toy
        request = self._find_start(flow_run, storage) or self._resolve_request(flow_run)
        run = find_run(request, storage, flow_run.id, load=load, clock=self.scheduler.wall_clock)
        plan = run.plan
        if isinstance(run, CompleteRun):
            manifest = run.manifest
        else:
            check_create_only(storage)
            plan = restage_plan(plan, storage) if isinstance(run, ResumedRun) and run.damaged else plan
            self.gates.open_baseline(storage, plan)
            audit, others = score_plan(self.scheduler, process, plan, storage, flow_run.options, self.drains)
            self._check_keys(storage, plan, audit)
            self.gates.pass_run(storage, plan, self.began[process])
            self.claims.claim(storage, plan, flow_run.options)
            confirmed = confirm_plan(storage, plan)
            save_challenger_parts(storage, plan, others)
            manifest = publish(storage, confirmed, audit)
        self._check(flow_run, plan, manifest, process)

    def _check_keys(self, storage: Storage, plan: Plan, audit: Audit) -> None:
        """Look for doubled keys, as flows.batch does it. Raises KeysUnfit."""
        if not plan.options.key_columns:
            return
        found = check_run_keys(storage, plan, audit.footers)
        if self.oracle.wrong_parts:
            return
        times = Counter(key for key, _, _ in self.oracle.wanted[plan.key])
        doubled = sum(rows > 1 for rows in times.values())
        if (times.total(), doubled) != (found.rows, found.doubled):
            self.oracle.violations.append(f"run {plan.run} has {doubled} doubled keys, and the check says {found}")

    def _check(self, flow_run: FlowRun, plan: Plan, manifest: Manifest, process: Process) -> None:
        self.scheduler.tell(f"{flow_run.id} returns run {manifest.run}")
        if plan.key != manifest.key:
            self.oracle.violations.append(f"a call returned a manifest of key {manifest.key} for plan {plan.key}")
        if self.delta is not None:
            self.delta.check(manifest.key)
        self.oracle.check_returned(manifest.run, manifest.key, flow_run.keys, self.began[process])
        self.challengers.check_returned(manifest, self.began[process])

    def _find_start(self, flow_run: FlowRun, storage: Storage) -> RunStart | None:
        """Return what a flow run is tied to, as flows.runtime.joining does it, but for the wait."""
        start = load_start(storage, flow_run.id)
        if start is not None or flow_run.joins is None:
            return start
        joined = load_start(storage, flow_run.joins)
        if joined is None:
            message = f"Flow run {flow_run.joins} must have begun a run for this one to join, but has not."
            raise BadInput(message)
        return save_start(storage, flow_run.id, joined)

    def _resolve_request(self, flow_run: FlowRun) -> RunRequest:
        resolved: Any = ToyResolved(self.version)
        options, keys = flow_run.options, flow_run.options.key_columns
        request = make_request(resolved, choose_contract(options.features), flow_run.source, DESTINATION, options)
        source = self.sources[flow_run.source]
        rows = {file.path: source.rows_of(file.entry) for file in request.snapshot.files}
        is_joined = self.features is not None and options.features
        own = self.features.join(rows, request.features[0], options.features[0]) if is_joined else rows
        self.oracle.ask(request.key, expected(own, resolved.version, keys))
        versions = [int(each.pin.version) for each in request.challengers]
        self.challengers.ask(request.key, {version: expected(rows, version, keys) for version in versions})
        self.bits.ask(request.key, request.snapshot)
        flow_run.keys.append(request.key)
        return request

    def _do_mischief(self) -> None:
        while not self.is_over:
            self.scheduler.sleep(self.chance.expovariate(1 / self.mischief_seconds))
            if self.mischief:
                what = self.chance.choice(self.mischief)
                self.scheduler.tell(f"mischief: {what}")
                getattr(self, f"_{what}")()

    def _change_source(self) -> None:
        self.sources[self._choose_source()].change()

    def _change_features(self) -> None:
        if self.features is not None:
            self.features.change()

    def _promote_model(self) -> None:
        self.version = self.chance.randint(1, 4)

    def _delete_everything(self) -> None:
        self._erase(r"_overnight/.*")
        self.oracle.forget_order()

    def _delete_run(self) -> None:
        if runs := sorted(self.oracle.planned):
            self._erase(rf"_overnight/{re.escape(self.chance.choice(runs))}/.*")

    def _delete_plan(self) -> None:
        if runs := sorted(self.oracle.planned):
            self._erase(rf"_overnight/{re.escape(self.chance.choice(runs))}/plan\.json")

    def _delete_starts(self) -> None:
        self._erase(r"_overnight/starts/.*")

    def _damage_part(self) -> None:
        if parts := sorted(path for path in self.destination.objects if re.match(r"run=.*\.parquet$", path)):
            path = self.chance.choice(parts)
            if self.chance.random() < 0.5:
                self.destination.erase([path])
            else:
                data = self.destination.objects[path][0]
                self.destination.write(path, data[: len(data) // 2])
            self.oracle.damaged_at = self.scheduler.steps

    def _move_clocks(self) -> None:
        self.clocks_differ = True
        for process in self.began:
            process.clock_error = timedelta(minutes=self.chance.uniform(-600, 600))

    def _give_notice(self) -> None:
        if self.drains:
            self.chance.choice(self.drains).add_notice(sigterm_notice(self.chance.uniform(0.1, 5)))

    def _flip_part(self) -> None:
        self.bits.flip_part()

    def _flip_source(self) -> None:
        self.bits.flip_source()

    def _clean(self) -> None:
        self.cleaning.start()

    def _erase(self, pattern: str) -> None:
        paths = [path for path in self.destination.objects if re.fullmatch(pattern, path)]
        self.destination.erase(paths)
        self.oracle.damaged_at = self.scheduler.steps
