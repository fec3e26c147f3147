"""A notice: word that this process, or the machine under it, is about to go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

SIGTERM = "SIGTERM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Who says so, what is going to happen, and the seconds from when it was read until it does.

    One that is not certain is a forecast: the machine may as well stay.
    """

    source: str
    action: str
    seconds_left: float
    certain: bool = True

    @property
    def of_process(self) -> bool:
        """Whether only this process is to end, and its machine stays as far as anyone has said."""
        return self.source == SIGTERM

    @property
    def cause(self) -> str:
        """The notice in a word or two."""
        return self.source if self.of_process else f"{self.source} ({self.action})"

    @property
    def words(self) -> str:
        """The notice as the beginning of a sentence."""
        if self.of_process:
            return f"SIGTERM: this process is to end within {self.seconds_left:.0f} s"
        if not self.certain:
            return f"{self.source} sees this machine at risk ({self.action})"
        return f"{self.source} is going to {self.action} this machine in {self.seconds_left:.0f} s"


class NoticeSource(Protocol):
    """Where notices about this machine can be read, time and again."""

    name: str
    every_seconds: float

    def look(self) -> Notice | None:
        """Return the notice that stands now, None where there is none or it was withdrawn.

        Raises httpx.HTTPError or ValueError where that is not known for now: what was known before still holds.
        """
        ...


def sigterm(seconds: float) -> Notice:
    """Return the notice that SIGTERM is; the signal does not say how long it leaves, so its sender's rule does."""
    return Notice(source=SIGTERM, action="end", seconds_left=seconds)
