"""Spot, on-demand or wait: the cheapest way to meet a deadline, as a function of values.

Every `interval_seconds` one decision is made for one machine, from what is observed at that moment. The policy keeps no
state and reads no clock: a clock that jumps only changes `left_seconds`. With n workers one decision is made for each,
and `work_seconds` is the rest of the whole run over n, so that all of them make up for what one loses.

Slack is the time left that need not be worked. A changeover is the whole cost of a move to another machine: to notice
that it is needed, boot, load, and repeat the lost work. The first rule that holds decides:

1. Nothing is left to do: no machine.
2. On spot: stay until it is taken. While it boots: stay as long as on-demand would be in time if it were taken.
3. Spot is not cheaper: on-demand.
4. Spot is up, slack is at least two changeovers, and the spell is expected to last long enough to pay for the move
   (`Situation.break_even_seconds`): spot.
5. On on-demand: stay. It is left for spot only, since to wait and come back would cost a changeover.
6. Slack is less than two changeovers and an interval: on-demand. This rule keeps the promise.
7. Slack, less a changeover, is at least a fifth of the time left: wait.
8. It is at least a twentieth, and spot has been gone for less than a changeover: wait, since most gaps are short.
9. On-demand.

Where on-demand is chosen but refused, spot is taken if it is up.

The promise: the run is done by the deadline whatever spot does, as long as changeovers and work take no longer than
stated and on-demand is available. A reserve of a changeover and the longest refusal of on-demand keeps the promise
through one refusal.

Rules 2, 4 and 6 began as those of "Can't Be Late" (Wu et al., NSDI 2024). The others and their constants come from a
stochastic dynamic program over the spells of its 240 traces of six zones, then from a random search, and are rounded.
Chosen on five zones and judged on the sixth, in turn, the search reached 0.936 of greedy's cost; on all six, 0.934;
the rounded constants reach 0.934. A quarter more or less of any one costs at most 0.004 more.

Figures are in seconds, of one machine or of many at once: each may be a number or an array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from serving.errors import DeadlineImpossible
from tasks.common.formatting import in_words

Reals = float | NDArray[np.float64]
Flags = bool | NDArray[np.bool_]
Placements = int | NDArray[np.int64]

SPELL_SECONDS = 3600.0
# A spell of spot is expected to last SPELL_SECONDS more, and this many times as long as it has lasted.
_SPELL_GROWTH = 2.0
# What slack is worth, in hours of a spell for each hour within which the slack of one more changeover falls due.
_SLACK_PRICE = 0.4
SLACK_TO_WAIT = 0.20
SLACK_TO_WAIT_BRIEFLY = 0.05
# Where no more than this share of the time is planned for work and two changeovers, there is slack to wait for spot.
_WORK_SHARE_MAX = 0.8
# Rounding errors of sums are far below this.
_SECONDS_MIN = 1e-6


class Placement(IntEnum):
    """Where the work runs."""

    IDLE = 0
    SPOT = 1
    ON_DEMAND = 2


class Rule(IntEnum):
    """The rule that a decision was made by."""

    DONE = 0
    SPOT_KEPT = 1
    SPOT_BOOTS_TOO_LONG = 2
    SPOT_NOT_CHEAPER = 3
    SPOT_PAYS = 4
    ON_DEMAND_KEPT = 5
    LAST_MOMENT = 6
    SLACK_ENOUGH = 7
    SHORT_GAP = 8
    SHORT_OF_SLACK = 9
    REFUSED_BUT_SPOT = 10
    REFUSED = 11


_PLACEMENTS = {
    Rule.DONE: Placement.IDLE,
    Rule.SPOT_KEPT: Placement.SPOT,
    Rule.SPOT_BOOTS_TOO_LONG: Placement.ON_DEMAND,
    Rule.SPOT_NOT_CHEAPER: Placement.ON_DEMAND,
    Rule.SPOT_PAYS: Placement.SPOT,
    Rule.ON_DEMAND_KEPT: Placement.ON_DEMAND,
    Rule.LAST_MOMENT: Placement.ON_DEMAND,
    Rule.SLACK_ENOUGH: Placement.IDLE,
    Rule.SHORT_GAP: Placement.IDLE,
    Rule.SHORT_OF_SLACK: Placement.ON_DEMAND,
    Rule.REFUSED_BUT_SPOT: Placement.SPOT,
    Rule.REFUSED: Placement.IDLE,
}
_PLACEMENTS_BY_RULE = np.array([_PLACEMENTS[rule] for rule in Rule])


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyParameters:
    """What holds for every decision of a run, as far as it is known or measured by now.

    Args:
        changeover_seconds: The whole cost of a move to another machine.
        price_ratio: The price of on-demand over that of spot.
        interval_seconds: From one decision to the next.
        spell_seconds: How long a spell of spot is expected to last when it begins.
        reserve_seconds: What is kept free before the deadline.

    Raises:
        ValueError: A figure is negative or not finite.
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
    """What is observed at the moment of a decision.

    Args:
        work_seconds: The work left, at the rate of one machine.
        left_seconds: To the deadline; negative past it.
        placement: Where the work runs; spot that was taken counts as idle.
        spot_up: Whether spot is available.
        spell_seconds: How long spot has been up, or gone. A clock that went back makes it negative, which counts as 0.
        booting_seconds: What is left of the changeover to the machine, 0 once it works. A boot that takes longer than
            stated counts as the whole changeover.
        on_demand_up: Whether on-demand is available.

    Raises:
        ValueError: A figure is not finite.
    """

    work_seconds: Reals
    left_seconds: Reals
    placement: Placements
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
    def current_placement(self) -> Placements:
        """Where the work runs, after a spot machine may have been taken."""
        is_taken = np.equal(self.placement, Placement.SPOT) & np.logical_not(self.spot_up)
        return np.where(is_taken, Placement.IDLE, self.placement)

    def usable_seconds(self, parameters: PolicyParameters) -> Reals:
        """Return the time left, less the reserve."""
        return self.left_seconds - parameters.reserve_seconds

    def slack_seconds(self, parameters: PolicyParameters) -> Reals:
        """Return the usable time that need not be worked."""
        return self.usable_seconds(parameters) - self.work_seconds

    def gap_seconds(self) -> Reals:
        """Return how long spot has been gone."""
        return np.where(self.spot_up, 0.0, np.maximum(self.spell_seconds, 0.0))

    def expected_spell_seconds(self, parameters: PolicyParameters) -> Reals:
        """Return how long the spell of spot is expected to last from now: the longer it has lasted, the longer."""
        lasted = np.where(self.spot_up, np.maximum(self.spell_seconds, 0.0), 0.0)
        return parameters.spell_seconds + _SPELL_GROWTH * lasted

    def break_even_seconds(self, parameters: PolicyParameters) -> Reals:
        """Return how long a spell must last for a move to spot to pay: k/(k-1) times what the move costs.

        A move from idle costs a changeover. One from on-demand costs two, and the slack of them, which is worth more
        the longer it takes until another changeover's worth falls due: d * left / (slack - 2d). Infinite where spot
        is not cheaper.
        """
        if parameters.price_ratio <= 1:
            return math.inf
        d = parameters.changeover_seconds
        spare = np.maximum(self.slack_seconds(parameters) - 2 * d, _SECONDS_MIN)
        pace = d * np.maximum(self.usable_seconds(parameters), 0.0) / spare
        cost = np.where(np.equal(self.current_placement, Placement.ON_DEMAND), 2 * d + _SLACK_PRICE * pace, d)
        return parameters.price_ratio / (parameters.price_ratio - 1) * cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where the work runs until the next decision, by which rule, and why in words and figures."""

    placement: Placement
    rule: Rule
    reason: str


def decide(situation: Situation, parameters: PolicyParameters) -> Decision:
    """Return where the work of one machine runs until the next decision, and why; the module states the rules."""
    rule = Rule(int(find_rules(situation, parameters)))
    return Decision(placement=_PLACEMENTS[rule], rule=rule, reason=_explain(rule, situation, parameters))


def decide_placements(situation: Situation, parameters: PolicyParameters) -> NDArray[np.int64]:
    """Return where the work of each of many machines runs until the next decision."""
    return np.asarray(_PLACEMENTS_BY_RULE[find_rules(situation, parameters)])


def find_rules(situation: Situation, parameters: PolicyParameters) -> NDArray[np.int64]:
    """Return the first rule that holds, for each machine."""
    d, e = parameters.changeover_seconds, parameters.interval_seconds
    slack, usable = situation.slack_seconds(parameters), situation.usable_seconds(parameters)
    placement, booting = situation.current_placement, situation.booting_seconds
    on_spot, on_demand = np.equal(placement, Placement.SPOT), np.equal(placement, Placement.ON_DEMAND)
    refused = np.logical_not(situation.on_demand_up) & ~on_demand
    safe_if_taken = np.less_equal(booting, 0) | is_at_least(slack, d + np.minimum(booting, e))
    lasts = is_at_least(situation.expected_spell_seconds(parameters), situation.break_even_seconds(parameters))
    gap_is_short = is_at_least(max(d, e), situation.gap_seconds() + e)
    ordered = {
        Rule.DONE: np.less_equal(situation.work_seconds, 0),
        Rule.SPOT_KEPT: on_spot & (safe_if_taken | refused),
        Rule.SPOT_BOOTS_TOO_LONG: on_spot,
        Rule.SPOT_NOT_CHEAPER: np.asarray(parameters.price_ratio <= 1),
        Rule.SPOT_PAYS: np.asarray(situation.spot_up) & is_at_least(slack, 2 * d) & lasts,
        Rule.ON_DEMAND_KEPT: on_demand,
        Rule.LAST_MOMENT: ~is_at_least(slack, 2 * d + e),
        Rule.SLACK_ENOUGH: is_at_least(slack, SLACK_TO_WAIT * usable + d),
        Rule.SHORT_GAP: is_at_least(slack, SLACK_TO_WAIT_BRIEFLY * usable + d) & gap_is_short,
    }
    first = np.select(list(ordered.values()), list(ordered), Rule.SHORT_OF_SLACK)
    refused &= np.equal(_PLACEMENTS_BY_RULE[first], Placement.ON_DEMAND)
    return np.where(refused, np.where(situation.spot_up, Rule.REFUSED_BUT_SPOT, Rule.REFUSED), first)


def _explain(rule: Rule, situation: Situation, parameters: PolicyParameters) -> str:
    slack, usable = float(situation.slack_seconds(parameters)), float(situation.usable_seconds(parameters))
    d, e = parameters.changeover_seconds, parameters.interval_seconds
    idle = f"{in_words(slack)} of the {in_words(usable)} left need not be worked"
    expected = in_words(float(situation.expected_spell_seconds(parameters)))
    pays_from = in_words(float(situation.break_even_seconds(parameters)))
    lasted = in_words(max(float(situation.spell_seconds), 0.0))
    gap = in_words(float(situation.gap_seconds()))
    spell = f"is up for {lasted}, likely to last {expected} more; a move pays from {pays_from}"
    spot = f"spot {spell}" if situation.spot_up else "spot is gone"
    two = f"{in_words(slack)} of slack, and two changeovers take {in_words(2 * d)}"
    why_kept = two if situation.spot_up and not is_at_least(slack, 2 * d) else spot
    return {
        Rule.DONE: "The work is done.",
        Rule.SPOT_KEPT: "Spot is kept until it is taken.",
        Rule.SPOT_BOOTS_TOO_LONG: f"Spot is still not at work, and {idle}: on-demand while it is in time.",
        Rule.SPOT_NOT_CHEAPER: f"Spot is not cheaper: on-demand costs {parameters.price_ratio:g} times as much.",
        Rule.SPOT_PAYS: f"Spot {spell}.",
        Rule.ON_DEMAND_KEPT: f"On-demand is kept: {why_kept}.",
        Rule.LAST_MOMENT: f"On-demand to the end: {two}, with {in_words(e)} to the next decision.",
        Rule.SLACK_ENOUGH: f"Waiting for spot: {idle}, {SLACK_TO_WAIT:.0%} and a changeover are enough ({spot}).",
        Rule.SHORT_GAP: f"Waiting: spot is gone for {gap}, a changeover takes {in_words(d)}.",
        Rule.SHORT_OF_SLACK: f"On-demand: {idle}, too little to wait ({spot}).",
        Rule.REFUSED_BUT_SPOT: "On-demand is not available: spot meanwhile.",
        Rule.REFUSED: "On-demand is not available, and spot is gone: waiting for either.",
    }[rule]


def is_at_least(have: Reals, need: Reals) -> NDArray[np.bool_]:
    """Return where one span is at least another, up to rounding errors."""
    return np.asarray(np.greater_equal(have, np.subtract(need, _SECONDS_MIN)))


def count_workers_needed(
    work_seconds: float, left_seconds: float, changeover_seconds: float, *, workers_max: int, reserve_seconds: float = 0
) -> int:
    """Return the smallest n with (work / n + 2 changeovers) / time left <= 0.8, or all that are allowed.

    `work_seconds` is the work at the rate of one worker.

    Raises:
        DeadlineImpossible: All that are allowed would be late on on-demand machines alone.
        ValueError: No worker is allowed.
    """
    if workers_max < 1:
        msg = f"workers_max must be at least 1, got {workers_max}."
        raise ValueError(msg)
    check_deadline_feasible(
        work_seconds, left_seconds, changeover_seconds, workers=workers_max, reserve_seconds=reserve_seconds
    )
    for_work = _WORK_SHARE_MAX * (left_seconds - reserve_seconds) - 2 * changeover_seconds
    if work_seconds <= 0 or for_work <= 0:
        return 1 if work_seconds <= 0 else workers_max
    # Rounding errors must not cost a worker.
    return min(max(math.ceil(work_seconds / for_work - 1e-9), 1), workers_max)


def check_deadline_feasible(
    work_seconds: float, left_seconds: float, changeover_seconds: float, *, workers: int = 1, reserve_seconds: float = 0
) -> None:
    """Raise DeadlineImpossible, with the arithmetic, where on-demand from now on is late."""
    each = work_seconds / workers
    takes = each + changeover_seconds + reserve_seconds if work_seconds > 0 else 0.0
    if takes <= left_seconds + _SECONDS_MIN:
        return
    reserve = f" and {in_words(reserve_seconds)} of reserve" if reserve_seconds else ""
    after = left_seconds - changeover_seconds - reserve_seconds
    more = f", or allow {math.ceil(work_seconds / after - 1e-9)} workers" if after > 0 else ""
    msg = (
        f"On-demand from now on must be done by the deadline: {in_words(work_seconds)} of work over {workers} worker(s)"
        f" take {in_words(each)}, with {in_words(changeover_seconds)} of changeover{reserve} {in_words(takes)},"
        f" got {in_words(left_seconds)}. Move the deadline by at least {in_words(takes - left_seconds)}{more}."
    )
    raise DeadlineImpossible(msg)
