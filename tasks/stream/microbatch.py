"""The dial of a micro-batch, rows against wait, and when one is full: functions of values, without a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of what the freshness leaves beside the waiting, a batch may queue behind one and be passed itself.
_BATCHES_BEHIND = 2
_WAIT_SHARE = 0.25
# A larger batch that is no faster than this only makes its rows wait.
_GAIN_MIN = 1.03
_SECONDS_MIN = 0.05
# The largest of some batches over the smallest, from which on they tell how S(b) grows.
_SPREAD_MIN = 16
# From here on a message is no longer beyond suspicion of being what ended the scorers before.
_DELIVERIES_SUSPECT = 3
_COMPANY_MOST, _COMPANY_SHARE = 64, 4.0
_LAST_DELIVERIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """A micro-batch has at most so many rows, and waits at most so long for them."""

    rows: int
    wait_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a micro-batch of b rows takes: S(b) = fixed + per_row * b seconds."""

    fixed: float
    per_row: float

    def seconds(self, rows: int) -> float:
        """Return S(rows)."""
        return self.fixed + self.per_row * rows


def fit_service(points: Sequence[tuple[int, float]]) -> Service:
    """Fit S(b) to measured pairs of rows and seconds by least squares, neither term below zero.

    Needs at least one pair of more than no rows and no seconds.
    """
    mean_rows = sum(rows for rows, _ in points) / len(points)
    mean_seconds = sum(seconds for _, seconds in points) / len(points)
    spread = sum((rows - mean_rows) ** 2 for rows, _ in points)
    slope = sum((rows - mean_rows) * (seconds - mean_seconds) for rows, seconds in points) / spread if spread else 0.0
    fixed = mean_seconds - slope * mean_rows
    if slope <= 0:
        return Service(fixed=0.0, per_row=mean_seconds / mean_rows)
    if fixed < 0:
        # Through the origin: what is left when no time is spent on nothing.
        through = sum(rows * seconds for rows, seconds in points) / sum(rows * rows for rows, _ in points)
        return Service(fixed=0.0, per_row=through)
    return Service(fixed=fixed, per_row=slope)


def fit_seen(seen: Sequence[tuple[int, float]], measured: Sequence[tuple[int, float]]) -> Service:
    """Fit S(b) to the micro-batches of late, at least one, with the help of measured passes where they can't tell it.

    Batches of about one size do not tell what a much larger one would take: a line through them would be noise, and
    batches that are small because rows seemed to gain nothing together would stay so. There the passes tell how S(b)
    grows, and the batches how much they take beside; without passes a batch 16 times as large is taken for twice as
    long, until one has been seen.
    """
    sizes = [rows for rows, _ in seen]
    if max(sizes) >= _SPREAD_MIN * min(sizes):
        return fit_service(seen)
    mean_seconds = sum(seconds for _, seconds in seen) / len(seen)
    growing = Service(fixed=0.0, per_row=mean_seconds / (_SPREAD_MIN * max(sizes)))
    passes = fit_service(measured) if measured else growing
    beside = sum(seconds - passes.seconds(rows) for rows, seconds in seen) / len(seen)
    return Service(fixed=max(0.0, passes.fixed + beside), per_row=passes.per_row)


def choose_dial(
    service: Service, freshness_seconds: float, rows_max: int, *, rows: int | None, wait_seconds: float | None
) -> Dial:
    """Return the largest batch with w + 2 * S(b) <= L that is worth it, and its wait; what is given is kept.

    A message may come just behind a full batch: it waits for that one and for its own. A quarter of the freshness is
    for waiting, unless a wait is given. Where not even one row fits, the freshness is out of reach, and the dial is the
    fastest there is: with batches of one row the messages that wait would grow more on top of it.
    """
    wait = freshness_seconds * _WAIT_SHARE if wait_seconds is None else wait_seconds
    if rows is not None:
        return Dial(rows=rows, wait_seconds=wait)
    most = int(((freshness_seconds - wait) / _BATCHES_BEHIND - service.fixed) / max(service.per_row, 1e-12))
    return Dial(rows=_worth_it(service, min(most, rows_max) if most >= 1 else rows_max), wait_seconds=wait)


def _worth_it(service: Service, most: int) -> int:
    """Return the smallest of `most`, its half, its quarter ... that is as fast a row as `most`, within 3 %.

    None that takes less than 50 ms: nobody feels that, what a line through noise says of smaller ones is not to be
    believed, and a batch that is too small holds up all that come behind it.
    """
    rows = most
    while rows > 1 and _no_slower(service, rows // 2, most):
        rows //= 2
    return rows


def _no_slower(service: Service, rows: int, most: int) -> bool:
    took = service.seconds(rows)
    return took >= _SECONDS_MIN and rows / took * _GAIN_MIN >= most / service.seconds(most)


def seconds_to_wait(dial: Dial, rows: int, waited: float) -> float:
    """Return how long a batch of so many rows, the first of which has waited so long, is still to wait; 0 is over."""
    return 0.0 if rows >= dial.rows else max(0.0, dial.wait_seconds - waited)


def company(deliveries: int, max_deliver: int | None) -> int | None:
    """Return how many messages one that has come so often is scored with at most; None: as many as there are.

    From the fourth time on it may be what ends the scorer. It is then among fewer each time, 64, 16, 4, and alone at
    last: after a scorer and its server have been killed thousands may have come so often, and each alone they would
    come again before their turn. Alone at once where its last deliveries are near, and on the last whatever it was.
    """
    if max_deliver is not None and deliveries >= max_deliver:
        return 1
    if deliveries <= _DELIVERIES_SUSPECT:
        return None
    if max_deliver is not None and max_deliver - deliveries < _LAST_DELIVERIES:
        return 1
    return max(1, int(_COMPANY_MOST * _COMPANY_SHARE ** (_DELIVERIES_SUSPECT + 1 - deliveries)))
