"""The scheduler: which mode serves a workload at the lowest cost, why in money, and that mode put into effect."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from prefect import get_run_logger
from prefect.variables import Variable

from flows.runtime.apply import apply_decision, find_standing
from flows.runtime.calibration_run import run_trial
from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.steps import Steps, flow_run
from tasks.common.artifacts import Logger
from tasks.endpoint.resolve import load_endpoint_model
from tasks.endpoint.spec import EndpointSpec
from tasks.scheduler.arrivals import read_arrivals
from tasks.scheduler.artifacts import publish_applied, publish_decision, publish_review
from tasks.scheduler.availability import read_availability
from tasks.scheduler.decision import Decision, Profile
from tasks.scheduler.effect import check_terms
from tasks.scheduler.plot import plot
from tasks.scheduler.prices import find_prices
from tasks.scheduler.profile import Measuring, measure_profile
from tasks.scheduler.report import markdown, summary
from tasks.scheduler.review import HISTORY_MAX, Hysteresis, Review, judge
from tasks.scheduler.sweep import Inputs, decide_by, sweep
from tasks.scheduler.terms import Terms
from tasks.scheduler.workload import Table, Workload

_MEASURING, _TERMS, _HYSTERESIS = Measuring(), Terms(), Hysteresis()


@adhoc_flow("choose-mode")
def choose_mode(
    workload: Workload,
    apply: bool = False,  # noqa: FBT001, FBT002 - a switch of a form
    terms: Terms = _TERMS,
    measuring: Measuring = _MEASURING,
    plot_file: str | None = None,
) -> Decision:
    """Decide how the predictions of a model are served at the lowest cost that keeps the promise, and say why.

    Args:
        workload: How the predictions are consumed, on which machines they may be made, and what those cost.
        apply: Whether the decision is put into effect: then the terms of the mode that is chosen are needed.
        terms: Where rows come from and go to, and who may ask, for each mode that may be chosen.
        measuring: The rows that the model is measured with, and figures that are stated instead.
        plot_file: Where the plot is written as a PNG. Without: where this is no run of a deployment, to
            overnight-NAME.png in the working folder.

    The model is measured once for a version and a kind of machine; the next call takes a second or two. Put into
    effect, the new mode is verified before what served the workload is retired, and a failure leaves that. Raises
    BadWorkload's kinds where nothing can be decided, PricesMissing, ModelNotFound, ProfileFailed, ApplyFailed.
    """
    logger = get_run_logger()
    stages = Steps()
    inputs = _read(stages, workload, measuring)
    decision = stages.run("decide", lambda: decide_by(inputs))
    _show(stages, inputs, decision, plot_file, logger)
    logger.info("%s", summary(decision))
    if apply:
        applied = apply_decision(stages, decision, terms, logger)
        publish_applied(applied, logger)
        logger.info("%s serves %s now: %s.", applied.mode, workload.name, applied.what)
    return decision


@adhoc_flow("review-modes")
def review_modes(
    workload: Workload,
    terms: Terms = _TERMS,
    hysteresis: Hysteresis = _HYSTERESIS,
    measuring: Measuring = _MEASURING,
) -> Review:
    """Decide anew how a workload is to be served, at the traffic of now, and change it only where that is worth it.

    Args:
        workload: As choose_mode takes it; its arrivals are those that the gateway has metered, or a trace that grows.
        terms: As choose_mode takes them; needed where changes are put into effect.
        hysteresis: What a change must save, how many reviews in a row must say so, and whether it is put into effect.
        measuring: As choose_mode takes it; what was measured before is not measured again.

    Meant for a schedule. What earlier reviews proposed is kept in the Prefect variable overnight-review-NAME. Raises
    what choose_mode raises.
    """
    logger = get_run_logger()
    stages = Steps()
    inputs = _read(stages, workload, measuring)
    decision = stages.run("decide", lambda: decide_by(inputs))
    standing = find_standing(workload.name)
    earlier = _recall(workload.name)
    verdict = judge(decision, standing, earlier, hysteresis)
    change = verdict.outcome == "change" and hysteresis.apply
    # Remembered first: a change that fails is tried again by the next review.
    _remember(workload.name, [*earlier, verdict.proposed])
    if change:
        check_terms(decision, terms)
        applied = apply_decision(stages, decision, terms, logger)
        publish_applied(applied, logger)
    review = Review(decision=decision, standing=standing.words if standing else None, verdict=verdict, applied=change)
    publish_review(review, logger)
    logger.info("%s: %s %s", workload.name, verdict.outcome, verdict.reason)
    return review


def profile_model(workload: Workload, measuring: Measuring = _MEASURING) -> Profile:
    """Return the profile of a workload's model on this machine, measured where it is not known yet."""
    spec = EndpointSpec(
        name=workload.name,
        model=workload.model,
        input_columns=measuring.options.input_columns,
        policies=measuring.options.policies,
        allow_pickle=measuring.options.allow_pickle,
    )
    return measure_profile(spec, load_endpoint_model(spec), measuring, run_trial)


def _read(stages: Steps, workload: Workload, measuring: Measuring) -> Inputs:
    """Return all that a decision is computed from; what is quick and may be refused comes first."""
    now = datetime.now(UTC)
    if isinstance(workload.consumer, Table):
        # Refuses a deadline that is over.
        workload.consumer.slack_seconds(now)
    priced = stages.run("price", lambda: find_prices(workload))
    arrivals = None if isinstance(workload.consumer, Table) else stages.run("arrivals", lambda: read_arrivals(workload))
    availability = read_availability(workload.spot)
    profile = stages.run("profile", lambda: profile_model(workload, measuring))
    return Inputs(
        workload=workload,
        profile=profile,
        arrivals=arrivals,
        priced=priced,
        availability=availability,
        now=now,
    )


def _show(stages: Steps, inputs: Inputs, decision: Decision, plot_file: str | None, logger: Logger) -> None:
    """Publish a decision as artifacts, and write its plot."""
    notes = inputs.arrivals.notes if inputs.arrivals else ()
    costs = stages.run("sweep", lambda: sweep(inputs, decision))
    png = plot(decision, inputs.arrivals.counts_T if inputs.arrivals else None, costs)
    publish_decision(decision, markdown(decision, notes), png, logger)
    this = flow_run()
    if plot_file is None and (this is None or this.deployment_id is None):
        plot_file = f"overnight-{decision.workload.name}.png"
    if plot_file is not None:
        path = Path(plot_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        logger.info("The plot is at %s.", path.absolute())


def _variable(workload: str) -> str:
    return f"overnight-review-{workload}"


def _recall(workload: str) -> list[str]:
    value = Variable.get(_variable(workload), default="[]")
    found = json.loads(value) if isinstance(value, str) else value
    return [str(each) for each in found] if isinstance(found, list) else []


def _remember(workload: str, proposed: list[str]) -> None:
    Variable.set(_variable(workload), json.dumps(proposed[-HISTORY_MAX:]), overwrite=True)
