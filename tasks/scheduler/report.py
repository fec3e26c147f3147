"""What a person sees of a decision: what was chosen and why in money, what lost, and what would change it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC

from tasks.scheduler.decision import Alternative, Decision, Flip, Policy, Profile
from tasks.scheduler.money import usd
from tasks.scheduler.workload import Events, Requests, Table, Workload

_POLICIES: dict[Policy, str] = {
    "always-on": "always on",
    "autoscaled": "autoscaled",
    "keep-warm": "asleep when idle, kept warm as long as a cold start is worth",
    "keep-warm-10-minutes": "asleep when idle, kept warm 10 minutes",
    "keep-warm-histogram": "asleep when idle, kept warm by a histogram of idle times",
    "on-demand": "on-demand machines",
    "spot": "spot machines, on-demand where the deadline needs it",
    "micro-batches": "micro-batches",
}
_ROWS_MAX = 40


def in_words(alternative: Alternative) -> str:
    """Return mode and policy as a person says them."""
    return f"{alternative.mode}, {_POLICIES[alternative.policy]}"


def summary(decision: Decision) -> str:
    """Return the decision in a sentence or two."""
    chosen, workload = decision.chosen, decision.workload
    first = (
        f"{workload.name} is best served by {in_words(chosen)}: {usd(chosen.usd)} for {workload.horizon} on "
        f"{_machines(chosen)}."
    )
    return f"{first} {waste(decision)}"


def waste(decision: Decision) -> str:
    """Say what an always-on endpoint would cost more."""
    if decision.chosen.policy == "always-on":
        return "That is the always-on endpoint itself: nothing is wasted."
    times = factor(decision)
    words = f", {times} times as much" if times else ""
    return f"An endpoint that is always on would cost {usd(decision.waste_usd)} more{words}."


def factor(decision: Decision) -> str:
    """Return how many times the choice's cost an always-on endpoint costs; nothing where the choice costs nothing."""
    times = decision.waste_factor
    return "" if times is None else f"{times:,.0f}" if times >= 100 else f"{times:.3g}"  # noqa: PLR2004


def promise(workload: Workload) -> str:
    """Say what the consumer was promised."""
    consumer = workload.consumer
    match consumer:
        case Requests():
            return f"{consumer.kept:.4g} of the requests are answered within {consumer.latency_ms:g} ms"
        case Table(once_by=by) if by is not None:
            return f"{consumer.rows:,} rows are scored once, by {by.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        case Table():
            days = "every day" if consumer.every_days == 1 else f"every {consumer.every_days} days"
            return f"{consumer.rows:,} rows that are there at {consumer.ready} UTC are scored by {consumer.due}, {days}"
        case Events():
            return f"{consumer.kept:.4g} of the events are scored within {span(consumer.within_seconds)}"


def markdown(decision: Decision, notes: Sequence[str] = ()) -> str:
    """Return the decision as Markdown; `notes` say what was made of its sources."""
    workload, chosen = decision.workload, decision.chosen
    sections = [
        f"# Workload {workload.name}: {chosen.mode}",
        summary(decision),
        f"**Why:** {chosen.reason}",
        f"**Promised:** {promise(workload)}. {decision.rows:,} rows in {workload.horizon}.",
        "## What else was simulated",
        _grid(alternatives_table(decision)),
        "## What would change the choice",
        _bullets([flip(each) for each in decision.flips] or ["Nothing that was tried, within a hundredfold."]),
        "## What it is computed from",
        _grid([{"": name, "value": value} for name, value in (measured(decision.profile) | _prices(decision)).items()]),
    ]
    if notes:
        sections += ["## Notes", _bullets(notes)]
    return "\n\n".join(sections) + "\n"


def alternatives_table(decision: Decision) -> list[dict[str, str]]:
    """Return the best of each mode, policy and kind of machine as rows, in the decision's order, at most forty."""
    best: dict[tuple[str, str, str], Alternative] = {}
    for each in decision.alternatives:
        best.setdefault((each.mode, each.policy, each.machine), each)
    return [_row(each, decision) for each in list(best.values())[:_ROWS_MAX]]


def _row(each: Alternative, decision: Decision) -> dict[str, str]:
    base = decision.chosen.usd
    times = f" ({each.usd / base:.3g} x)" if base > 0 else ""
    return {
        "mode": each.mode,
        "policy": each.policy,
        "machines": _machines(each),
        "cost": f"{usd(each.usd)}{times}",
        "p50": span(each.age_seconds_p50),
        "p99": span(each.age_seconds_p99),
        "late": f"{each.late:.2%}",
        "cold starts": f"{each.cold_starts:,}",
        "busy": f"{each.utilisation:.0%}",
        "": "chosen" if each == decision.chosen else "stands" if each.stands else "out",
        "reason": each.reason,
    }


def measured(profile: Profile) -> dict[str, str]:
    """Return the figures of a profile by their names."""
    return {
        "model": f"{profile.model}, measured {profile.measured_at:%Y-%m-%d %H:%M} UTC",
        "measured on": profile.machine,
        "a pass of b rows": f"{profile.pass_time.describe()}, {profile.slots} side by side",
        "a batch run": f"{profile.batch_rows_per_second:,.0f} rows/s, begins after {profile.start_seconds:.3g} s",
        "an endpoint": f"first answer after {profile.cold_start_seconds:.3g} s, a request costs "
        f"{profile.request_ms:.3g} ms beside its pass",
    } | _served(profile)


def _served(profile: Profile) -> dict[str, str]:
    served = profile.served
    if served is None:
        return {}
    told = f"{served.describe('n')} in a slot, give or take {profile.jitter:.0%}"
    return {"n requests together": told}


def _prices(decision: Decision) -> dict[str, str]:
    told = {
        f"an hour of {kind}": f"{usd(each.on_demand)} on-demand"
        + (f", {usd(each.spot)} spot" if each.spot is not None else "")
        for kind, each in decision.prices.items()
    }
    return told | {"prices from": decision.priced_at}


def flip(each: Flip) -> str:
    """Say what change of an input would change the choice."""
    return f"{each.input} times {each.factor:.3g}: then {each.to}"


def _machines(alternative: Alternative) -> str:
    return f"{alternative.machines} x {alternative.machine}"


def span(seconds: float) -> str:
    """Return a length of time in its own unit."""
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def _grid(rows: Sequence[dict[str, str]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name].replace("|", "\\|") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
