"""What a scorer has in hand of a stream, so that its server may be told that it is worked on: no clock in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from tasks.stream.message import Message


class InHand:
    """Messages that are neither acknowledged nor given back, by number: the server is told that they are worked on.

    Else it would send them again where there is more in hand than is scored within `ack_wait_seconds`.
    """

    def __init__(self, ack_wait_seconds: float) -> None:
        self._half = ack_wait_seconds / 2
        # The one that the server was told of longest ago stands first.
        self._told: OrderedDict[int, tuple[str, float]] = OrderedDict()

    def take(self, number: int, receipt: str, now: float) -> bool:
        """Take note of a delivery; False where the message is in hand already, and this is a copy of it."""
        new = number not in self._told
        self._told[number] = receipt, now
        self._told.move_to_end(number)
        return new

    def drop(self, messages: Iterable[Message]) -> None:
        """Forget messages."""
        for message in messages:
            self._told.pop(message.place.number, None)

    def due(self, now: float) -> list[str]:
        """Return the receipts of those for whose acknowledgement the server has waited half of its time."""
        found = []
        while self._told:
            number, (receipt, told) = next(iter(self._told.items()))
            if now - told < self._half:
                break
            self.take(number, receipt, now)
            found.append(receipt)
        return found
