"""A night: one batch run that is sent from pool to pool, and what has been seen of it so far.

It may be on several machines at once. Each of them is decided on by itself, with its share of the work that is left, so
that all make up for what one of them loses. All times are seconds since the night began, by a clock that never jumps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from serving.errors import NightFailed
from tasks.spot import policy
from tasks.spot.capacity import Capacity
from tasks.spot.dispatch import Seen
from tasks.spot.machine import Machine
from tasks.spot.purchase import Buying, Kind, Move, Stay, Whereabouts, working_rate
from tasks.spot.situation import Place, Situation, Terms

KINDS: dict[Place, Kind] = {Place.SPOT: "spot", Place.ON_DEMAND: "on-demand"}
WORDS: dict[Place, Whereabouts] = {Place.IDLE: "nowhere", Place.SPOT: "spot", Place.ON_DEMAND: "on-demand"}

# To read the footers of the parts and to write the manifest; a second or two for ten thousand of them.
_PUBLISH_SECONDS = 2.0


class Dispatcher(Protocol):
    """Sends a batch run to machines of a kind, and takes it back."""

    def send(self, kind: Kind) -> UUID:
        """Start a flow run that goes on with the work; returns its id."""
        ...

    def look_at(self, flow_run_id: UUID) -> Seen:
        """Return how far a flow run is."""
        ...

    def drain(self, flow_run_id: UUID, why: str, *, lost: bool) -> None:
        """Tell a flow run to end, so that nothing resumes it; `lost` where no worker is left to tell it."""
        ...


@dataclass(slots=True, kw_only=True)
class Night:
    """The run's whereabouts, its progress and its price; `look` and `go` are called in turn."""

    rows: int
    buying: Buying
    capacity: Capacity
    dispatcher: Dispatcher
    rows_done: Callable[[], int]
    workers: int = 1
    stays: list[Stay] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    # Seconds from sending the run until it went on, each time that it was measured.
    changeovers: list[float] = field(default_factory=list)
    finished: bool = False
    done: int = 0
    machines: tuple[Machine, ...] = field(init=False)
    _living: frozenset[str] = frozenset()
    _looked: float | None = None
    # Seconds at work, of all machines together and not by the clock: (seconds, rows done).
    _work: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machines = tuple(Machine(number=at + 1) for at in range(self.workers))

    @property
    def rate(self) -> float | None:
        """Rows a second of one machine: as measured, before that as stated, None where neither is known."""
        return working_rate(self._work) or self.buying.rows_per_second

    @property
    def work_seconds(self) -> float | None:
        """Seconds of work that are left for each machine, None while no rate is known; never none until the run ended.

        With its last part a run has yet to publish.
        """
        return max((self.rows - self.done) / self.rate / self.workers, _PUBLISH_SECONDS) if self.rate else None

    @property
    def changeover_seconds(self) -> float:
        """Seconds from sending the run until it goes on: the longest of this night, before any as stated."""
        return max(self.changeovers, default=self.buying.changeover_seconds)

    @property
    def terms(self) -> Terms:
        """What holds for every decision of the night, as far as it is known by now."""
        return Terms(
            changeover_seconds=self.changeover_seconds,
            price_ratio=self.buying.price_ratio,
            interval_seconds=self.buying.interval_seconds,
        )

    def decide(self, machine: Machine, left: float) -> tuple[Place, str]:
        """Return where a machine's part of the run goes, `left` seconds before the deadline, and why.

        By the policy; before the run's speed is known, where a machine is to be had. Once all rows are done it stays
        where it is: taken off its machine as it publishes, it would never be complete.
        """
        if self.done >= self.rows and machine.place:
            return machine.place, "All rows are done, and the run publishes."
        situation = self.situation(machine, left)
        if situation is None:
            found = Place.SPOT if self.spot_up(machine) else Place.ON_DEMAND
            return machine.place or found, "Nothing is known of its speed yet."
        decision = policy.decide(situation, self.terms)
        return decision.place, decision.reason

    def situation(self, machine: Machine, left: float) -> Situation | None:
        """Return what a machine's next decision is made of, `left` seconds before the deadline.

        None while no rate is known.
        """
        if self.work_seconds is None:
            return None
        return Situation(
            work_seconds=self.work_seconds,
            left_seconds=left,
            place=machine.place,
            booting_seconds=machine.booting_seconds(self._looked, self.changeover_seconds),
            spot_up=self.spot_up(machine),
            spell_seconds=machine.spell_seconds,
        )

    def spot_up(self, machine: Machine) -> bool:
        """Return whether a spot machine is to be had: its own, or one that the run is not on."""
        return machine.place == Place.SPOT or len(self._living) > len(self._on(Place.SPOT))

    def look(self, now: float) -> None:
        """See how far the run is, and whether spot machines are to be had. Raises NightFailed where the run failed."""
        passed = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        rows_before, self.done = self.done, self.rows_done()
        self.samples.append((now, self.done))
        if at_work := sum(machine.working for machine in self.machines):
            self._work.append((self._work[-1][0] + passed * at_work, self.done))
        self._living = self.capacity.living()
        for machine in [*self._on(Place.SPOT), *self._on(Place.ON_DEMAND)]:
            self._look_at(machine, now, rows_before)
        self._leave_what_none_will_begin(now)
        for machine in self.machines:
            machine.see_spot(up=self.spot_up(machine), passed=passed)
        if self.finished:
            self._end(now)

    def go(self, machine: Machine, place: Place, now: float, why: str) -> None:
        """Send a machine's part of the run elsewhere, or nowhere: it drains first, and its parts stay."""
        if place == machine.place:
            return
        if machine.flow_run_id is not None:
            self.dispatcher.drain(machine.flow_run_id, why, lost=False)
            self._leave(machine, now, lost=False)
        self.moves.append(
            Move(machine=machine.number, seconds=now, to=WORDS[place], rows_done=self.done, why=why),
        )
        if place != Place.IDLE:
            machine.begin(place, self.dispatcher.send(KINDS[place]), now)

    def abandon(self, why: str) -> None:
        """Take the run off its machines for good."""
        for machine in self.machines:
            if machine.flow_run_id is not None:
                self.dispatcher.drain(machine.flow_run_id, why, lost=False)

    def _look_at(self, machine: Machine, now: float, rows_before: int) -> None:
        assert machine.flow_run_id is not None, machine  # noqa: S101 - a machine that is somewhere has a flow run
        seen = self.dispatcher.look_at(machine.flow_run_id)
        machine.name = seen.machine
        taken = machine.place == Place.SPOT and seen.machine is not None and seen.machine not in self._living
        if seen.stage == "done":
            self.finished = True
            self._leave(machine, now, lost=False)
        elif seen.stage == "failed":
            self._leave(machine, now, lost=False)
            message = f"The batch run must end well, but failed: {seen.message} Mend what it says, and call again."
            raise NightFailed(message)
        elif seen.stage == "lost" or taken:
            self._lose(machine, now)
        elif seen.stage == "running":
            self._look_at_work(machine, now, rows_before)

    def _look_at_work(self, machine: Machine, now: float, rows_before: int) -> None:
        """Note when a machine begins to put out rows; beside others it is not told whose rows are whose."""
        alone = not any(each.working for each in self.machines)
        if machine.sees_work(self.done, rows_before if alone else self.done) and alone:
            self.changeovers.append(now - machine.start)
            self._work.append((self._work[-1][0] if self._work else 0.0, self.done))

    def _leave_what_none_will_begin(self, now: float) -> None:
        """Take back flow runs that wait for a spot machine where fewer are left than the run is on."""
        too_many = max(len(self._on(Place.SPOT)) - len(self._living), 0)
        waiting = [machine for machine in self._on(Place.SPOT) if machine.name is None]
        for machine in waiting[::-1][:too_many]:
            self._lose(machine, now)

    def _on(self, place: Place) -> list[Machine]:
        return [machine for machine in self.machines if machine.place == place]

    def _end(self, now: float) -> None:
        """Take back the other machines once one of them has published the run."""
        for machine in self.machines:
            if machine.flow_run_id is not None:
                self.dispatcher.drain(machine.flow_run_id, "The run is complete.", lost=False)
                self._leave(machine, now, lost=False)

    def _lose(self, machine: Machine, now: float) -> None:
        assert machine.flow_run_id is not None, machine  # noqa: S101 - a machine that is somewhere has a flow run
        self.dispatcher.drain(machine.flow_run_id, "Its machine is gone; the night goes on elsewhere.", lost=True)
        self._leave(machine, now, lost=True)
        # Another one may be up, of which nothing has been seen yet.
        machine.forget_spot()

    def _leave(self, machine: Machine, now: float, *, lost: bool) -> None:
        kind, number = KINDS[machine.place], machine.number
        self.stays.append(Stay(kind=kind, start=machine.start, stop=now, lost=lost, machine=number))
        machine.end()
