"""A night: one batch run that is sent from pool to pool, and what has been seen of it so far.

All times are seconds since the night began, by a clock that never jumps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from serving.errors import NightFailed
from tasks.spot.capacity import Capacity
from tasks.spot.dispatch import Seen
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    place: Place
    flow_run_id: UUID
    start: float
    rows_before: int

    @property
    def kind(self) -> Kind:
        return KINDS[self.place]


@dataclass(slots=True, kw_only=True)
class Night:
    """The run's whereabouts, its progress and its price; `look` and `go` are called in turn."""

    rows: int
    buying: Buying
    capacity: Capacity
    dispatcher: Dispatcher
    rows_done: Callable[[], int]
    stays: list[Stay] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    spot_up: bool = False
    # How long spot has been seen to be as it is.
    spell_seconds: float = 0.0
    finished: bool = False
    done: int = 0
    _attempt: _Attempt | None = None
    _working: bool = False
    _looked: float | None = None
    _changeovers: list[float] = field(default_factory=list)
    # Seconds at work, not by the clock: (seconds, rows done).
    _work: list[tuple[float, int]] = field(default_factory=list)

    @property
    def place(self) -> Place:
        """Where the run is."""
        return self._attempt.place if self._attempt else Place.IDLE

    @property
    def rate(self) -> float | None:
        """Rows a second of one machine: as measured, before that as stated, None where neither is known."""
        return working_rate(self._work) or self.buying.rows_per_second

    @property
    def work_seconds(self) -> float | None:
        """Seconds of work that are left, None while no rate is known; never none, until the run has ended.

        With its last part a run has yet to publish: taken off its machine then, it would never be complete.
        """
        return max((self.rows - self.done) / self.rate, _PUBLISH_SECONDS) if self.rate else None

    @property
    def changeover_seconds(self) -> float:
        """Seconds from sending the run until it goes on: the longest of this night, before any as stated."""
        return max(self._changeovers, default=self.buying.changeover_seconds)

    def situation(self, left: float) -> Situation | None:
        """Return what the next decision is made of, `left` seconds before the deadline; None while no rate is known."""
        if self.work_seconds is None:
            return None
        return Situation(
            work_seconds=self.work_seconds,
            left_seconds=left,
            place=self.place,
            booting_seconds=self._booting_seconds(),
            spot_up=self.spot_up,
            spell_seconds=self.spell_seconds,
        )

    @property
    def terms(self) -> Terms:
        """What holds for every decision of the night, as far as it is known by now."""
        return Terms(
            changeover_seconds=self.changeover_seconds,
            price_ratio=self.buying.price_ratio,
            interval_seconds=self.buying.interval_seconds,
        )

    def look(self, now: float) -> None:
        """See how far the run is, and whether spot machines are to be had. Raises NightFailed where the run failed."""
        passed = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        self._look_at_rows(now, passed)
        self._look_at_spot(passed)
        if self._attempt is None:
            return
        seen = self.dispatcher.look_at(self._attempt.flow_run_id)
        if seen.stage == "done":
            self.finished = True
            self._leave(now, lost=False)
        elif seen.stage == "failed":
            self._leave(now, lost=False)
            message = f"The batch run must end well, but failed: {seen.message} Mend what it says, and call again."
            raise NightFailed(message)
        elif seen.stage == "lost" or (self._attempt.place == Place.SPOT and not self.spot_up):
            self.dispatcher.drain(
                self._attempt.flow_run_id, "Its machine is gone; the night goes on elsewhere.", lost=True
            )
            self._leave(now, lost=True)

    def go(self, place: Place, now: float, why: str) -> None:
        """Send the run elsewhere, or take it off every machine: it drains first, and its parts stay."""
        if place == self.place:
            return
        if self._attempt is not None:
            self.dispatcher.drain(self._attempt.flow_run_id, why, lost=False)
            self._leave(now, lost=False)
        self.moves.append(Move(seconds=now, to=WORDS[place], rows_done=self.done, why=why))
        if place != Place.IDLE:
            sent = self.dispatcher.send(KINDS[place])
            self._attempt = _Attempt(place=place, flow_run_id=sent, start=now, rows_before=self.done)

    def abandon(self, why: str) -> None:
        """Take the run off its machine for good."""
        if self._attempt is not None:
            self.dispatcher.drain(self._attempt.flow_run_id, why, lost=False)

    def _look_at_rows(self, now: float, passed: float) -> None:
        done = self.rows_done()
        if self._attempt is not None:
            if self._working:
                self._work.append((self._work[-1][0] + passed, done))
            elif done > self._attempt.rows_before:
                self._working = True
                self._changeovers.append(now - self._attempt.start)
                self._work.append((self._work[-1][0] if self._work else 0.0, done))
        self.done = done
        self.samples.append((now, done))

    def _look_at_spot(self, passed: float) -> None:
        before, self.spot_up = self.spot_up, self.capacity.up()
        self.spell_seconds = self.spell_seconds + passed if self.spot_up == before else 0.0

    def _booting_seconds(self) -> float:
        """Return what is left of the changeover to the machine that the run was sent to."""
        if self._attempt is None or self._working or self._looked is None:
            return 0.0
        left = self.changeover_seconds - (self._looked - self._attempt.start)
        # One that takes longer than it should may take as long again.
        return left if left > 0 else self.changeover_seconds

    def _leave(self, now: float, *, lost: bool) -> None:
        if self._attempt is not None:
            self.stays.append(Stay(kind=self._attempt.kind, start=self._attempt.start, stop=now, lost=lost))
        self._attempt, self._working = None, False
