"""A night: one batch run that is sent from work pool to work pool, and what is known of its progress.

It may be on several machines at once. Each has its own decision, with its share of the work that is left, so that all
make up for what one of them loses. All times are seconds since the night began, by a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol
from uuid import UUID

from serving.errors import NightFailed
from tasks.spot import policy
from tasks.spot.policy import Placement, PolicyParameters, Situation
from tasks.spot.purchase import MachineKind, MachineStay, Move, PlacementName, PurchaseOptions, median_rate
from tasks.spot.work_pools import FlowRunStatus, WorkerPool

MACHINE_KINDS: dict[Placement, MachineKind] = {Placement.SPOT: "spot", Placement.ON_DEMAND: "on-demand"}
PLACEMENT_NAMES: dict[Placement, PlacementName] = {Placement.IDLE: "nowhere", **MACHINE_KINDS}

# To read the footers of the parts and to write the manifest; a second or two for ten thousand of them.
_PUBLISH_SECONDS = 2.0


class Dispatcher(Protocol):
    """Sends flow runs of a batch run to machines of a kind, and ends them."""

    def submit(self, kind: MachineKind) -> UUID:
        """Start a flow run that goes on with the work; returns its id."""
        ...

    def read_status(self, flow_run_id: UUID) -> FlowRunStatus:
        """Return the status of a flow run."""
        ...

    def end(self, flow_run_id: UUID, why: str, *, lost: bool) -> None:
        """End a flow run, so that nothing resumes it; `lost` where no worker is left to pass that on."""
        ...


@dataclass(slots=True, kw_only=True)
class Machine:
    """One of the machines that a night uses at a time, which may have none yet: its placement, and its flow run.

    Args:
        number: From 1.
        placement: Where it is.
        flow_run_id: The flow run that does its part of the work.
        start: When the flow run was sent.
        worker: The worker that has taken the flow run up, None while it waits for one.
        working: Whether the flow run has put out rows.
        spell_seconds: How long spot has been up, or gone, for this machine.
    """

    number: int
    placement: Placement = Placement.IDLE
    flow_run_id: UUID | None = None
    start: float = 0.0
    worker: str | None = None
    working: bool = False
    spell_seconds: float = 0.0
    _spot_up: bool | None = None
    _rows_at_start: int | None = None

    def begin(self, placement: Placement, flow_run_id: UUID, now: float) -> None:
        """Set the placement, with a flow run that has yet to begin."""
        self.placement, self.flow_run_id, self.start = placement, flow_run_id, now

    def end(self) -> None:
        """Be idle."""
        self.placement, self.flow_run_id, self.worker = Placement.IDLE, None, None
        self.working, self._rows_at_start = False, None

    def forget_spot(self) -> None:
        """Begin a new spell with the next observation, whatever it is."""
        self._spot_up = None

    def note_spot(self, *, up: bool, passed: float) -> None:
        """Record whether spot is up for this machine, `passed` seconds after the last time."""
        self.spell_seconds = self.spell_seconds + passed if up == self._spot_up else 0.0
        self._spot_up = up

    def note_progress(self, rows: int, rows_before: int) -> bool:
        """Record the rows done while the flow run runs; return whether this shows for the first time that it works.

        It works once there are more rows than the `rows_before` of its first observation.
        """
        if self._rows_at_start is None:
            self._rows_at_start = rows_before
        first = not self.working and rows > self._rows_at_start
        self.working |= first
        return first

    def booting_seconds(self, now: float | None, changeover_seconds: float) -> float:
        """Return what is left of the changeover to its placement; 0 once it works, and while it is idle."""
        if self.flow_run_id is None or self.working or now is None:
            return 0.0
        left = changeover_seconds - (now - self.start)
        # One that takes longer than stated may take as long again.
        return left if left > 0 else changeover_seconds


@dataclass(slots=True, kw_only=True)
class Night:
    """The machines of the run, its progress and its cost; `observe` and `move` are called in turn."""

    rows: int
    buying: PurchaseOptions
    spot_pool: WorkerPool
    dispatcher: Dispatcher
    count_rows_done: Callable[[], int]
    workers: int = 1
    # How long spot machines that have been asked for may take to come, before the speed of the run is known.
    spot_wait_seconds: float = 0.0
    stays: list[MachineStay] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    # The machines that were lost: the number, when, and why.
    losses: list[tuple[int, float, str]] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    # Seconds from sending the run until it went on, each time that it was measured.
    changeovers: list[float] = field(default_factory=list)
    finished: bool = False
    rows_done: int = 0
    machines: tuple[Machine, ...] = field(init=False)
    _live_workers: frozenset[str] = frozenset()
    _observed_at: float | None = None
    # Seconds at work, of all machines together and not by the clock: (seconds, rows done).
    _work: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machines = tuple(Machine(number=index + 1) for index in range(self.workers))

    @property
    def rate(self) -> float | None:
        """Rows a second of one machine: as measured, before that as stated, None where neither is known."""
        return median_rate(self._work) or self.buying.rows_per_second

    @property
    def work_seconds(self) -> float | None:
        """Seconds of work that are left for each machine, None while no rate is known.

        It stays above 0 until the run has ended: after its last part a run has yet to publish.
        """
        rows_left = self.rows - self.rows_done
        return max(rows_left / self.rate / self.workers, _PUBLISH_SECONDS) if self.rate else None

    @property
    def changeover_seconds(self) -> float:
        """Seconds from sending the run until it goes on: the longest of this night, before any as stated."""
        return max(self.changeovers, default=self.buying.changeover_seconds)

    @property
    def parameters(self) -> PolicyParameters:
        """The parameters of the policy, as far as they are measured by now."""
        return PolicyParameters(
            changeover_seconds=self.changeover_seconds,
            price_ratio=self.buying.price_ratio,
            interval_seconds=self.buying.interval_seconds,
        )

    def decide(self, machine: Machine, left: float) -> tuple[Placement, str]:
        """Return where a machine's part of the run goes, `left` seconds before the deadline, and why.

        The policy decides; before the run's speed is known, the run goes where a machine is available. Once all rows
        are done it stays where it is: taken off its machine as it publishes, it would never be complete.
        """
        if self.rows_done >= self.rows and machine.placement:
            return machine.placement, "All rows are done, and the run publishes."
        situation = self.describe_situation(machine, left)
        if situation is None:
            if machine.placement == Placement.IDLE and self._waits_for_first_spot(machine, left):
                return Placement.IDLE, "Spot machines have been asked for, and are on their way."
            available = Placement.SPOT if self.is_spot_up(machine) else Placement.ON_DEMAND
            return machine.placement or available, "Nothing is known of its speed yet."
        decision = policy.decide(situation, self.parameters)
        return decision.placement, decision.reason

    def describe_situation(self, machine: Machine, left: float) -> Situation | None:
        """Return what a machine's next decision is made from, `left` seconds before the deadline.

        None while no rate is known.
        """
        if self.work_seconds is None:
            return None
        return Situation(
            work_seconds=self.work_seconds,
            left_seconds=left,
            placement=machine.placement,
            booting_seconds=machine.booting_seconds(self._observed_at, self.changeover_seconds),
            spot_up=self.is_spot_up(machine),
            spell_seconds=machine.spell_seconds,
        )

    def is_spot_up(self, machine: Machine) -> bool:
        """Return whether a spot machine is available: its own, or one that the run does not use."""
        return machine.placement == Placement.SPOT or len(self._live_workers) > len(self._find_machines(Placement.SPOT))

    def count_wanted(self, left: float) -> dict[MachineKind, int]:
        """Return how many machines of each kind are to be there, `left` seconds before the deadline.

        A spot machine for each that is on spot, or would go there if one were up now; an on-demand machine for each
        that is on one. None once the run is complete.
        """
        if self.finished:
            return dict.fromkeys(MACHINE_KINDS.values(), 0)
        return {
            "spot": sum(self._wants_spot(machine, left) for machine in self.machines),
            "on-demand": len(self._find_machines(Placement.ON_DEMAND)),
        }

    def list_busy_workers(self) -> frozenset[str]:
        """Return the names of the workers that have a flow run of this night."""
        return frozenset(machine.worker for machine in self.machines if machine.worker is not None)

    def observe(self, now: float) -> None:
        """Read how far the run is, and which spot machines are available. Raises NightFailed where the run failed."""
        passed = now - self._observed_at if self._observed_at is not None else 0.0
        self._observed_at = now
        rows_before, self.rows_done = self.rows_done, self.count_rows_done()
        self.samples.append((now, self.rows_done))
        if working := sum(machine.working for machine in self.machines):
            self._work.append((self._work[-1][0] + passed * working, self.rows_done))
        self._live_workers = self.spot_pool.list_live_workers()
        for machine in [*self._find_machines(Placement.SPOT), *self._find_machines(Placement.ON_DEMAND)]:
            self._observe_machine(machine, now, rows_before)
        self._end_unstartable_runs(now)
        for machine in self.machines:
            machine.note_spot(up=self.is_spot_up(machine), passed=passed)
        if self.finished:
            self._end_others(now)

    def move(self, machine: Machine, placement: Placement, now: float, why: str) -> None:
        """Send a machine's part of the run elsewhere, or nowhere: it drains first, and its parts stay."""
        if placement == machine.placement:
            return
        if machine.flow_run_id is not None:
            self.dispatcher.end(machine.flow_run_id, why, lost=False)
            self._close_stay(machine, now, lost=False)
        to = PLACEMENT_NAMES[placement]
        self.moves.append(Move(machine=machine.number, seconds=now, to=to, rows_done=self.rows_done, why=why))
        if placement != Placement.IDLE:
            machine.begin(placement, self.dispatcher.submit(MACHINE_KINDS[placement]), now)

    def end_runs(self, why: str) -> None:
        """Take the run off its machines for good."""
        for machine in self.machines:
            if machine.flow_run_id is not None:
                self.dispatcher.end(machine.flow_run_id, why, lost=False)

    def _wants_spot(self, machine: Machine, left: float) -> bool:
        if machine.placement == Placement.SPOT:
            return True
        if self.rows_done >= self.rows and machine.placement:
            return False
        situation = self.describe_situation(machine, left)
        if situation is None:
            return machine.placement == Placement.IDLE
        if_up = replace(situation, spot_up=True, spell_seconds=0.0)
        return policy.decide(if_up, self.parameters).placement == Placement.SPOT

    def _waits_for_first_spot(self, machine: Machine, left: float) -> bool:
        """Return whether a run of unknown speed waits for the first spot machines: while little time is gone."""
        waited = self._observed_at or 0.0
        return (
            not self.is_spot_up(machine)
            and waited < self.spot_wait_seconds
            and left > 2 * (self.changeover_seconds + self.spot_wait_seconds)
        )

    def _observe_machine(self, machine: Machine, now: float, rows_before: int) -> None:
        assert machine.flow_run_id is not None, machine  # noqa: S101 - a machine that is not idle has a flow run
        status = self.dispatcher.read_status(machine.flow_run_id)
        machine.worker = status.worker
        on_spot = machine.placement == Placement.SPOT
        taken = on_spot and status.worker is not None and status.worker not in self._live_workers
        if status.stage == "done":
            self.finished = True
            self._close_stay(machine, now, lost=False)
        elif status.stage == "failed":
            self._close_stay(machine, now, lost=False)
            message = f"The batch run must end well, but failed: {status.message} Fix the cause, and call again."
            raise NightFailed(message)
        elif status.stage == "lost" or taken:
            self._lose_machine(machine, now, f"worker {status.worker} is silent" if taken else "its flow run was lost")
        elif status.stage == "running":
            self._observe_progress(machine, now, rows_before)

    def _observe_progress(self, machine: Machine, now: float, rows_before: int) -> None:
        """Note when a machine begins to put out rows; beside others it is not known whose rows they are."""
        alone = not any(other.working for other in self.machines)
        if machine.note_progress(self.rows_done, rows_before if alone else self.rows_done) and alone:
            self.changeovers.append(now - machine.start)
            self._work.append((self._work[-1][0] if self._work else 0.0, self.rows_done))

    def _end_unstartable_runs(self, now: float) -> None:
        """End flow runs that wait for a spot machine where fewer machines are left than the run uses."""
        too_many = max(len(self._find_machines(Placement.SPOT)) - len(self._live_workers), 0)
        waiting = [machine for machine in self._find_machines(Placement.SPOT) if machine.worker is None]
        for machine in waiting[::-1][:too_many]:
            self._lose_machine(machine, now, "no worker is left to take its flow run up")

    def _find_machines(self, placement: Placement) -> list[Machine]:
        return [machine for machine in self.machines if machine.placement == placement]

    def _end_others(self, now: float) -> None:
        """End the flow runs of the other machines once one of them has published the run."""
        for machine in self.machines:
            if machine.flow_run_id is not None:
                self.dispatcher.end(machine.flow_run_id, "The run is complete.", lost=False)
                self._close_stay(machine, now, lost=False)

    def _lose_machine(self, machine: Machine, now: float, why: str) -> None:
        assert machine.flow_run_id is not None, machine  # noqa: S101 - a machine that is not idle has a flow run
        self.losses.append((machine.number, now, why))
        self.dispatcher.end(machine.flow_run_id, f"Its machine is gone, since {why}: the night goes on.", lost=True)
        self._close_stay(machine, now, lost=True)
        # Another one may be up, which has not been observed yet.
        machine.forget_spot()

    def _close_stay(self, machine: Machine, now: float, *, lost: bool) -> None:
        kind, number = MACHINE_KINDS[machine.placement], machine.number
        self.stays.append(MachineStay(kind=kind, start=machine.start, stop=now, lost=lost, machine=number))
        machine.end()
