"""Every way to serve a problem on a kind of machine, each with the parameters by which it is cheapest."""

from __future__ import annotations

from tasks.scheduler.fit import fits
from tasks.scheduler.problem import Candidate, Kind, Problem
from tasks.scheduler.simulate_batch import batch, batch_on_spot
from tasks.scheduler.simulate_online import online
from tasks.scheduler.simulate_sleep import keep_warm_beside
from tasks.scheduler.simulate_stream import stream
from tasks.scheduler.simulate_table import batch_on_spot as table_on_spot
from tasks.scheduler.simulate_table import table


def simulate(problem: Problem, kind: Kind, *, beside: bool = True) -> list[Candidate]:
    """Return every mode and policy on a kind of machine; spot only where there is a price and a trace of it.

    `beside`: with those that others are only held against.
    """
    found = simulate_on_demand(problem, kind, beside=beside)
    return [*found, *simulate_spot(problem, kind, found)]


def simulate_on_demand(problem: Problem, kind: Kind, *, beside: bool = True) -> list[Candidate]:
    """Return those that buy no spot: what they pay for does not depend on the prices."""
    if problem.consumer == "table":
        return table(problem, kind)
    fit = fits(problem, kind)[0]
    endpoints = online(problem, fit)
    others = keep_warm_beside(problem, fit, endpoints[0].machines) if beside else []
    if problem.quick and problem.consumer == "requests":
        return endpoints
    return [batch(problem, kind), *endpoints, *others, *stream(problem, kind)]


def simulate_spot(problem: Problem, kind: Kind, on_demand: list[Candidate]) -> list[Candidate]:
    """Return those that buy spot."""
    if problem.consumer == "table":
        found = table_on_spot(problem, kind)
    elif problem.consumer == "requests":
        return []
    else:
        found = batch_on_spot(problem, kind, next(each for each in on_demand if each.mode == "batch"))
    return [] if found is None else [found]
