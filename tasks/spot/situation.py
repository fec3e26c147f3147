"""What a decision between spot, on-demand and waiting is made from, and the figures that follow from it.

All of it is in seconds, of one machine or of many at once: a figure may be a number or an array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Reals = float | NDArray[np.float64]
Flags = bool | NDArray[np.bool_]
Places = int | NDArray[np.int64]

SPELL_SECONDS = 3600.0
# A spell of spot that has lasted a while is expected to last this many times as long again, and SPELL_SECONDS more.
_SPELL_GROWTH = 2.0
# What slack is worth, in hours of a spell for each hour within which the slack of one more changeover falls due.
_SLACK_PRICE = 0.4
# Sums of floating point are further off than zero, and by far less than this.
_SECONDS_MIN = 1e-6


class Place(IntEnum):
    """Where the work is."""

    IDLE = 0
    SPOT = 1
    ON_DEMAND = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds for a whole run, or is measured anew as it goes.

    changeover_seconds: what a move to another machine costs, all of it. price_ratio: on-demand's price over spot's.
    interval_seconds: from one decision to the next. spell_seconds: what a spell of spot is expected to last when it
    begins. reserve_seconds: what is kept free before the deadline. Raises ValueError where one is negative or not
    finite.
    """

    changeover_seconds: float
    price_ratio: float
    interval_seconds: float
    spell_seconds: float = SPELL_SECONDS
    reserve_seconds: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                msg = f"{field.name} must be finite and not negative, got {value}."
                raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is seen at the moment of a decision.

    work_seconds: the work left, at the rate of one machine. left_seconds: to the deadline; negative past it. place:
    where the work is; on spot that was taken counts as nowhere. spot_up, on_demand_up: what is to be had.
    spell_seconds: how long spot has been seen to be as it is, up or gone; a clock that went back makes it negative,
    which counts as zero. booting_seconds: what is left of the changeover to the machine, none once it works; where a
    boot takes longer than it should, the whole changeover. Raises ValueError where a figure is not finite.
    """

    work_seconds: Reals
    left_seconds: Reals
    place: Places
    spot_up: Flags
    spell_seconds: Reals
    booting_seconds: Reals = 0.0
    on_demand_up: Flags = True

    def __post_init__(self) -> None:
        for name in ("work_seconds", "left_seconds", "spell_seconds", "booting_seconds"):
            if not np.all(np.isfinite(getattr(self, name))):
                msg = f"{name} must be finite, got {getattr(self, name)}."
                raise ValueError(msg)

    @property
    def now_on(self) -> Places:
        """Where the work is now that a spot machine may have been taken."""
        return np.where(np.equal(self.place, Place.SPOT) & np.logical_not(self.spot_up), Place.IDLE, self.place)

    def left(self, terms: Terms) -> Reals:
        """Return the time left, but for the reserve."""
        return self.left_seconds - terms.reserve_seconds

    def slack(self, terms: Terms) -> Reals:
        """Return the time left that need not be worked."""
        return self.left(terms) - self.work_seconds

    def gone(self) -> Reals:
        """Return how long spot has been gone."""
        return np.where(self.spot_up, 0.0, np.maximum(self.spell_seconds, 0.0))

    def life(self, terms: Terms) -> Reals:
        """Return how long the spell of spot is expected to last from now: the longer it has lived, the longer."""
        return terms.spell_seconds + _SPELL_GROWTH * np.where(self.spot_up, np.maximum(self.spell_seconds, 0.0), 0.0)

    def life_to_pay(self, terms: Terms) -> Reals:
        """Return how long a spell must last for a move to spot to pay, k/(k-1) times what the move costs.

        A move from nowhere costs a changeover. One from on-demand costs two, and the slack of them, which is the dearer
        the longer it takes until another changeover's worth falls due: d * left / (slack - 2d). Infinite where spot
        is not cheaper.
        """
        if terms.price_ratio <= 1:
            return math.inf
        d = terms.changeover_seconds
        spare = np.maximum(self.slack(terms) - 2 * d, _SECONDS_MIN)
        pace = d * np.maximum(self.left(terms), 0.0) / spare
        cost = np.where(np.equal(self.now_on, Place.ON_DEMAND), 2 * d + _SLACK_PRICE * pace, d)
        return terms.price_ratio / (terms.price_ratio - 1) * cost


def reach(have: Reals, need: Reals) -> NDArray[np.bool_]:
    """Return where one span is at least another, but for what floating point adds and drops."""
    return np.asarray(np.greater_equal(have, np.subtract(need, _SECONDS_MIN)))
