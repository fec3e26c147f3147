"""How many machines there are: a night asks for them, keeps count of what it gets, and gives them back.

What starts the machines satisfies `Capacity`, and is installed as an entry point of the group `overnight.capacity`:
`aws` (infra.aws) and `local` (infra.local), whose modules this package never imports. Where machines are there by
themselves, there is none, and a night only looks at the workers of two work pools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import entry_points
from typing import Protocol, cast

from serving.errors import CapacityUnusable
from serving.machine import find_release, utc_now
from tasks.common.artifacts import Logger
from tasks.spot.night import MACHINE_KINDS, Night
from tasks.spot.purchase import MachineKind, Purchase, PurchaseOptions, StandingMachines

ENTRY_POINTS = "overnight.capacity"


class Capacity(Protocol):
    """Machines of the two kinds, as many as are asked for, as far as they are to be had.

    Its methods raise RuntimeError, with what to do, where the machines are refused.
    """

    def set_workers(self, kind: MachineKind, count: int, busy: frozenset[str] = frozenset()) -> None:
        """Ask for this many machines of a kind. Idempotent, and called again at every decision of a night.

        Where fewer are asked for than there are, those whose workers have one of the names in `busy` end last.
        """
        ...

    def count_workers(self, kind: MachineKind) -> int:
        """Return how many machines of a kind there are, those that start up included."""
        ...

    def find_problem(self, kind: MachineKind) -> str | None:
        """Return why there are fewer than asked for, None where nothing is known against it."""
        ...

    def close(self) -> None:
        """Give every machine back. Idempotent."""
        ...


class CapacityOpener(Protocol):
    """What an entry point of `overnight.capacity` names."""

    def __call__(
        self, options: Mapping[str, object], *, owner: str, release: str, pools: Mapping[MachineKind, str], workers: int
    ) -> Capacity:
        """Return machines for one night; raises RuntimeError where they can't be had.

        Args:
            options: The fields of the night's `machines`.
            owner: The id of the night.
            release: The release of Overnight that the machines must have.
            pools: The work pools that the machines of each kind serve.
            workers: The most machines of a kind that the night asks for.
        """
        ...


def open_capacity(
    buying: PurchaseOptions, *, owner: str, pools: Mapping[MachineKind, str], workers: int
) -> Capacity | None:
    """Return the machines that a night is to start, None where they are there by themselves. Nothing is bought yet.

    Args:
        buying: Says who starts them.
        owner: The id of the night.
        pools: The work pools that the machines of each kind serve.
        workers: The most machines of a kind that the night asks for.

    Raises:
        CapacityUnusable: They can't be had, or the entry point for their kind is not installed.
    """
    kind = buying.machines.kind
    if isinstance(buying.machines, StandingMachines):
        return None
    found = entry_points(group=ENTRY_POINTS, name=kind)
    if not found:
        known = ", ".join(sorted(entry_points(group=ENTRY_POINTS).names)) or "none"
        message = (
            f"Machines of the kind {kind!r} need an entry point {kind} of {ENTRY_POINTS}, got {known}. Install "
            "Overnight again, since those come with it."
        )
        raise CapacityUnusable(message)
    opener = cast("CapacityOpener", next(iter(found)).load())
    try:
        return opener(buying.machines.model_dump(), owner=owner, release=find_release(), pools=pools, workers=workers)
    except RuntimeError as error:
        raise CapacityUnusable(str(error)) from None


@dataclass(slots=True, kw_only=True)
class Buyer:
    """Asks for the machines that a night wants, and keeps a record of what was bought and when."""

    capacity: Capacity
    logger: Logger
    now: Callable[[], datetime] = utc_now
    purchases: list[Purchase] = field(default_factory=list)
    # Seconds of all machines that there were, as they were counted.
    seconds: dict[MachineKind, float] = field(default_factory=lambda: dict.fromkeys(MACHINE_KINDS.values(), 0.0))
    _last: dict[MachineKind, tuple[int, int]] = field(default_factory=dict)
    _counted_at: float = 0.0
    _problems: dict[MachineKind, str | None] = field(default_factory=dict)

    def buy(self, night: Night, elapsed: float, left: float) -> None:
        """Ask for as many machines as the night wants now, and count those that are there.

        Where that fails, the night goes on with the machines that it has, and asks again at its next decision.
        """
        passed, self._counted_at = elapsed - self._counted_at, elapsed
        for kind, wanted in night.count_wanted(left).items():
            try:
                self.capacity.set_workers(kind, wanted, night.list_busy_workers())
                standing = self.capacity.count_workers(kind)
                problem = self.capacity.find_problem(kind) if standing < wanted else None
            except RuntimeError as error:
                self.logger.warning("%s machines can't be set: %s The night goes on without.", kind, error)
                continue
            before = self._last.get(kind, (0, 0))
            self.seconds[kind] += before[1] * passed
            if problem and problem != self._problems.get(kind):
                self.logger.warning("%s of %s %s machines are there: %s", standing, wanted, kind, problem)
            self._problems[kind] = problem
            if (wanted, standing) != before:
                self._note(kind, elapsed, wanted, standing, problem)

    def close(self, elapsed: float) -> None:
        """Give all machines back, whatever became of the night. A failure is logged, with what to do."""
        try:
            self.capacity.close()
        except RuntimeError as error:
            self.logger.error("The machines can't be given back: %s Look at what there is, and end it by hand.", error)  # noqa: TRY400 - the message says all
            return
        for kind, (wanted, standing) in list(self._last.items()):
            self.seconds[kind] += standing * (elapsed - self._counted_at)
            if (wanted, standing) != (0, 0):
                self._note(kind, elapsed, 0, 0, None)

    def _note(self, kind: MachineKind, elapsed: float, wanted: int, standing: int, problem: str | None) -> None:
        self._last[kind] = (wanted, standing)
        self.purchases.append(
            Purchase(at=self.now(), seconds=elapsed, kind=kind, wanted=wanted, standing=standing, problem=problem)
        )
