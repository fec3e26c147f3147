"""The scheduler's flows on a real Prefect server: what they decide, show, remember and recommend."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.local.prefect_server import PrefectServer
from serving.errors import BadInput, BadWorkload, ModelNotFound, PricesMissing
from tasks.batch.options import BatchOptions
from tasks.scheduler.profile import ProfileOptions, StatedFigures
from tasks.scheduler.review import Hysteresis
from tasks.scheduler.workload import ArrivalRate, Machine, Prices, Requests, Table, Workload

pytestmark = pytest.mark.usefixtures("serverless", "registry")

# test_calibration_run measures a model; here any figures do.
STATED = StatedFigures(batch_rows_per_second=100_000, start_seconds=10, cold_start_seconds=4, request_ms=2)
PROFILE_OPTIONS = ProfileOptions(batch_options=BatchOptions(batch_size=512, slots=2), stated_figures=STATED)
MACHINES = (Machine(prices=Prices(on_demand=0.1, spot=0.03)),)


def nightly(model: str, **changes: Any) -> Workload:
    values = {"name": "nightly", "model": model, "consumer": Table(rows=5_000_000, ready="01:00"), "machines": MACHINES}
    return Workload.model_validate(values | changes)


def artifact(prefect: PrefectServer, key: str) -> str:
    query = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
    found: list[dict[str, Any]] = httpx.post(f"{prefect.api_url}/artifacts/filter", json=query).json()
    return str(found[0]["data"])


def test_a_nightly_table_is_a_batch_and_the_artifacts_show_other_costs(
    prefect: PrefectServer, linear: str, tmp_path: Path
) -> None:
    from flows.scheduler import choose_mode

    png = tmp_path / "plots" / "nightly.png"
    decision = choose_mode(nightly(linear), profile_options=PROFILE_OPTIONS, plot_file=str(png))

    assert ("batch", True) == (decision.chosen.mode, decision.chosen.is_feasible)
    assert decision.waste_factor is not None
    assert decision.waste_factor > 5
    assert "# Workload nightly: batch" in artifact(prefect, "mode-decision")
    assert "always-on" in artifact(prefect, "mode-alternatives")
    assert artifact(prefect, "mode-plot").startswith("data:image/png")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_requests_with_a_short_latency_are_served_online(linear: str, tmp_path: Path) -> None:
    from flows.scheduler import choose_mode

    workload = nightly(
        linear, name="check", consumer=Requests(latency_ms=100), arrivals=ArrivalRate(per_second=5), horizon_days=0.5
    )
    decision = choose_mode(workload, profile_options=PROFILE_OPTIONS, plot_file=str(tmp_path / "check.png"))

    assert "online" == decision.chosen.mode


def test_a_decision_is_published_before_a_missing_configuration_is_refused(
    prefect: PrefectServer, linear: str, tmp_path: Path
) -> None:
    from flows.scheduler import choose_mode

    png = tmp_path / "nightly.png"
    with pytest.raises(BadInput, match="The configuration must have 'batch', since batch was chosen for nightly"):
        choose_mode(nightly(linear), apply=True, profile_options=PROFILE_OPTIONS, plot_file=str(png))

    assert png.exists()


def test_a_model_that_does_not_exist_is_named(linear: str) -> None:
    from flows.scheduler import choose_mode

    with pytest.raises(ModelNotFound, match="no-such-model"):
        choose_mode(nightly("models:/no-such-model@champion"), profile_options=PROFILE_OPTIONS)


def test_a_deadline_that_is_over_is_refused_before_anything_is_measured() -> None:
    from flows.scheduler import choose_mode

    late = nightly("models:/no-such-model@champion", consumer=Table(rows=1, once_by=datetime(2026, 1, 1, tzinfo=UTC)))
    with pytest.raises(BadWorkload, match="once_by must be after now"):
        choose_mode(late, profile_options=PROFILE_OPTIONS)


def test_a_machine_without_a_price_is_named_before_anything_is_measured(linear: str) -> None:
    from flows.scheduler import choose_mode

    with pytest.raises(PricesMissing, match="'this' must have prices"):
        choose_mode(nightly(linear, machines=(Machine(),)))


def test_reviews_recommend_a_first_deployment_and_keep_what_they_proposed(prefect: PrefectServer, linear: str) -> None:
    from flows.scheduler import review_modes

    workload = nightly(linear, name="reviewed")
    first, second = (
        review_modes(workload, hysteresis=Hysteresis(reviews_min=2), profile_options=PROFILE_OPTIONS) for _ in range(2)
    )

    assert ["change", "change"] == [first.verdict.outcome, second.verdict.outcome]
    assert [1, 2] == [first.verdict.reviews_in_a_row, second.verdict.reviews_in_a_row]
    assert not second.applied
    assert "a change is recommended" in artifact(prefect, "mode-review")
