"""The scheduler: chooses the mode that serves a workload at the lowest cost, and puts it into effect."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from prefect.variables import Variable

from flows.runtime.apply import apply_decision, find_current_deployment
from flows.runtime.calibration_run import run_calibration
from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.steps import Steps, find_logger, flow_run
from tasks.common.artifacts import Logger
from tasks.common.prefect_server import require_prefect_server
from tasks.endpoint.resolve import load_endpoint_model
from tasks.endpoint.spec import EndpointSpec
from tasks.scheduler.arrivals import read_arrivals
from tasks.scheduler.decide import decide
from tasks.scheduler.decision import Decision, Profile
from tasks.scheduler.deployment_plan import ApplyConfig
from tasks.scheduler.prices import find_prices
from tasks.scheduler.profile import ProfileOptions, measure_profile
from tasks.scheduler.report import (
    draw_decision,
    publish_applied,
    publish_decision,
    publish_review,
    render_decision,
    summarize_decision,
)
from tasks.scheduler.review import HISTORY_MAX, Hysteresis, Review, judge_change
from tasks.scheduler.scenario import DecisionInputs
from tasks.scheduler.sensitivity import compute_cost_curves
from tasks.scheduler.spot_simulation import read_availability
from tasks.scheduler.workload import Table, Workload

_PROFILE_OPTIONS, _APPLY_CONFIG, _HYSTERESIS = ProfileOptions(), ApplyConfig(), Hysteresis()


@adhoc_flow("choose-mode", run_name=lambda parameters: f"choose {parameters['workload'].name}")
def choose_mode(
    workload: Workload,
    apply: bool = False,  # noqa: FBT001, FBT002 - a switch of a form
    apply_config: ApplyConfig = _APPLY_CONFIG,
    profile_options: ProfileOptions = _PROFILE_OPTIONS,
    plot_file: str | None = None,
) -> Decision:
    """Decide how the predictions of a model are served at the lowest cost that keeps the promise, and say why.

    The model is measured once for a version and a kind of machine; the next call takes a second or two. Where the
    decision is put into effect, the new mode is verified before what served the workload is retired. Where that fails,
    what served it before serves on.

    Args:
        workload: How the predictions are consumed, on which machines they may be made, and what those cost.
        apply: Whether the decision is put into effect. Then `apply_config` must have the chosen mode.
        apply_config: Where rows come from and go to, and who may send requests, for each mode that may be chosen.
        profile_options: The rows that the model is measured with, and figures that are stated instead.
        plot_file: Where the plot is written as a PNG. Without, and outside of a deployment's run: overnight-NAME.png in
            the working folder.

    Raises:
        BadWorkload: The workload can't be decided on. NoFeasibleMode and PricesMissing are kinds of it.
        ModelNotFound: There is no such model.
        ProfileFailed: The model could not be measured.
        ApplyFailed: The decision could not be put into effect.
        BudgetBroken: The endpoint that was chosen breaks the promise under load. What served before serves on.
    """
    if apply:
        require_prefect_server("A decision that is put into effect")
    logger, steps = find_logger(), Steps()
    inputs = _read_inputs(steps, workload, profile_options)
    decision = steps.run("decide", lambda: decide(inputs))
    costs = steps.run("sweep", lambda: compute_cost_curves(inputs, decision))
    arrivals = inputs.arrivals
    png = draw_decision(decision, arrivals.counts_T if arrivals else None, costs)
    publish_decision(decision, render_decision(decision, arrivals.notes if arrivals else ()), png, logger)
    _write_plot(png, workload, plot_file, logger)
    logger.info("%s", summarize_decision(decision))
    if apply:
        applied = apply_decision(steps, decision, apply_config, logger)
        publish_applied(applied, logger)
        logger.info("%s serves %s now: %s.", applied.mode, workload.name, applied.summary)
    return decision


@adhoc_flow("review-modes", run_name=lambda parameters: f"review {parameters['workload'].name}")
def review_modes(
    workload: Workload,
    apply_config: ApplyConfig = _APPLY_CONFIG,
    hysteresis: Hysteresis = _HYSTERESIS,
    profile_options: ProfileOptions = _PROFILE_OPTIONS,
) -> Review:
    """Decide again how a workload is served, at its current traffic, and change it only where that is worth it.

    It is meant for a schedule. What earlier reviews proposed is kept in the Prefect variable overnight-review-NAME.

    Args:
        workload: As choose_mode takes it. Its arrivals are those that the gateway has metered, or a trace that grows.
        apply_config: As choose_mode takes it; needed where changes are put into effect.
        hysteresis: What a change must save, how many reviews in a row must propose it, and whether it is put into
            effect.
        profile_options: As choose_mode takes them. What was measured before is not measured again.

    Raises:
        OvernightError: The same kinds as choose_mode.
    """
    require_prefect_server("A review, which keeps what it proposes,")
    logger, steps = find_logger(), Steps()
    inputs = _read_inputs(steps, workload, profile_options)
    decision = steps.run("decide", lambda: decide(inputs))
    current = find_current_deployment(workload.name)
    earlier = _read_proposals(workload.name)
    verdict = judge_change(decision, current, earlier, hysteresis)
    # Saved first, so that the next review tries a change again that fails.
    _save_proposals(workload.name, [*earlier, verdict.proposed])
    must_change = verdict.outcome == "change" and hysteresis.apply
    if must_change:
        publish_applied(apply_decision(steps, decision, apply_config, logger), logger)
    review = Review(
        decision=decision, current=current.summary if current else None, verdict=verdict, applied=must_change
    )
    publish_review(review, logger)
    logger.info("%s: %s %s", workload.name, verdict.outcome, verdict.reason)
    return review


def _read_inputs(steps: Steps, workload: Workload, profile_options: ProfileOptions) -> DecisionInputs:
    """Return everything that a decision is computed from. What may be refused comes before what takes long."""
    now = datetime.now(UTC)
    consumer = workload.consumer
    if isinstance(consumer, Table):
        # Raises where the deadline is over.
        consumer.slack_seconds(now)
    quote = steps.run("price", lambda: find_prices(workload))
    arrivals = None if isinstance(consumer, Table) else steps.run("arrivals", lambda: read_arrivals(workload))
    availability = read_availability(workload.spot)
    profile = steps.run("profile", lambda: _profile_model(workload, profile_options))
    return DecisionInputs(
        workload=workload, profile=profile, arrivals=arrivals, quote=quote, availability=availability, now=now
    )


def _profile_model(workload: Workload, options: ProfileOptions) -> Profile:
    spec = EndpointSpec(
        name=workload.name,
        model=workload.model,
        input_columns=options.batch_options.input_columns,
        policies=options.batch_options.policies,
        allow_pickle=options.batch_options.allow_pickle,
    )
    return measure_profile(spec, load_endpoint_model(spec), options, run_calibration)


def _write_plot(png: bytes, workload: Workload, plot_file: str | None, logger: Logger) -> None:
    run = flow_run()
    if plot_file is None and (run is None or run.deployment_id is None):
        plot_file = f"overnight-{workload.name}.png"
    if plot_file is not None:
        path = Path(plot_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        logger.info("The plot is at %s.", path.absolute())


def _read_proposals(workload: str) -> list[str]:
    value = Variable.get(_variable_name(workload), default="[]")
    proposals = json.loads(value) if isinstance(value, str) else value
    return [str(each) for each in proposals] if isinstance(proposals, list) else []


def _save_proposals(workload: str, proposals: list[str]) -> None:
    Variable.set(_variable_name(workload), json.dumps(proposals[-HISTORY_MAX:]), overwrite=True)


def _variable_name(workload: str) -> str:
    return f"overnight-review-{workload}"
