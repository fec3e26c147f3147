"""One of the machines that a night has at a time: where it is, and what has been seen of its work."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from tasks.spot.situation import Place


@dataclass(slots=True, kw_only=True)
class Machine:
    """A machine, or the want of one: its number from 1, its place, and the flow run that is there for it.

    Times are seconds since the night began. `name` is that of the worker that has taken the flow run up, None while it
    waits for one. `spell_seconds` is how long spot has been seen to be as it is for this machine, up or gone.
    """

    number: int
    place: Place = Place.IDLE
    flow_run_id: UUID | None = None
    start: float = 0.0
    name: str | None = None
    working: bool = False
    spell_seconds: float = 0.0
    _spot_up: bool | None = None
    _rows_at_start: int | None = None

    def begin(self, place: Place, flow_run_id: UUID, now: float) -> None:
        """Be at a place from now on, with a flow run that has yet to begin."""
        self.place, self.flow_run_id, self.start = place, flow_run_id, now

    def end(self) -> None:
        """Be nowhere."""
        self.place, self.flow_run_id, self.name = Place.IDLE, None, None
        self.working, self._rows_at_start = False, None

    def forget_spot(self) -> None:
        """Begin a new spell with the next look, whatever that sees."""
        self._spot_up = None

    def see_spot(self, *, up: bool, passed: float) -> None:
        """Take note of whether spot is up for this machine, `passed` seconds after the last time."""
        self.spell_seconds = self.spell_seconds + passed if up == self._spot_up else 0.0
        self._spot_up = up

    def sees_work(self, rows: int, rows_before: int) -> bool:
        """Take note of rows while the flow run runs; return whether the machine is seen at work for the first time.

        It works once there are more rows than the `rows_before` with which it was first seen to run.
        """
        if self._rows_at_start is None:
            self._rows_at_start = rows_before
        first = not self.working and rows > self._rows_at_start
        self.working |= first
        return first

    def booting_seconds(self, now: float | None, changeover_seconds: float) -> float:
        """Return what is left of the changeover to where it was sent; none once it works, or where it is nowhere."""
        if self.flow_run_id is None or self.working or now is None:
            return 0.0
        left = changeover_seconds - (now - self.start)
        # One that takes longer than it should may take as long again.
        return left if left > 0 else changeover_seconds
