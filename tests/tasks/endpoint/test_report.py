from __future__ import annotations

from typing import Any

import pytest

from serving.model.batching import BatchingConfig, BatchingSetting, CostModel
from tasks.endpoint.batching import BatchingChoice
from tasks.endpoint.budget import BudgetCheck
from tasks.endpoint.load import Latency
from tasks.endpoint.report import Endpoint, draw_plot
from tasks.endpoint.spec import Budget
from tasks.endpoint.verify import Verification

BUDGET = Budget(latency_ms=20, rate=200)
COST = CostModel(fixed_seconds=0.2e-3, row_seconds=0.05e-3)
CHOSEN = BatchingChoice(
    batching=BatchingConfig(batch_size_max=12, wait_ms_max=5.5),
    passes=tuple((n, 1000 * COST.seconds(n)) for n in (1, 2, 4, 8)),
    cost=COST,
    setting=BatchingSetting(
        batching=BatchingConfig(batch_size_max=12, wait_ms_max=5.5),
        replicas=2,
        utilisation=0.3,
        p99_ms=2.5,
        burst_p99_ms=4.25,
    ),
)


def latency(scale: float) -> Latency:
    samples = tuple(scale * (1 + at / 50) for at in range(100))
    return Latency(rate=200, requests=100, errors=0, p50_ms=2 * scale, p99_ms=3 * scale, samples_ms=samples)


def checked(scale: float) -> BudgetCheck:
    return BudgetCheck(budget=BUDGET, steady=latency(scale), burst=latency(2 * scale))


def endpoint(**changes: Any) -> Endpoint:
    given = {
        "name": "churn",
        "url": "http://127.0.0.1:8080/v2/models/churn/infer",
        "model": "models:/churn/2",
        "model_digest": "0" * 64,
        "version": "2",
        "target": "triton",
        "server": "http://127.0.0.1:8000",
        "rollout": "version 2 has all traffic",
        "callers": "Callers need the key CHURN_KEY.",
        "chosen": CHOSEN,
        "budget": BUDGET,
        "verification": Verification(rows_example=2, rows_random=32, difference_max=1e-7, tolerance=1e-5),
        "before": latency(1.0),
        "checked": checked(3.0),
        "seconds": {"deploy": 3.25},
    }
    return Endpoint(**{**given, **changes})


def test_the_report_has_what_was_chosen_verified_and_measured() -> None:
    markdown = endpoint(removed=("1",), keep_warm_seconds=60).markdown()

    for said in (
        "churn serves models:/churn/2 on triton at http://127.0.0.1:8080/v2/models/churn/infer",
        "2 replicas, up to 12 rows a pass, waiting 5.5 ms at most",
        "30% of what full passes take; p99 2.5 ms, in a burst of twice the rate 4.25 ms, by simulation",
        "0.2 ms + b x 0.05 ms",
        "20 ms at 200 rows a second, kept",
        "p50 2 ms, p99 3 ms at 200 requests/s",
        "p50 6 ms, p99 9 ms",
        "p50 12 ms, p99 18 ms",
        "version 1",
        "after 60 s without a request",
        "2 rows of the model's example, 32 random rows",
        "1e-07 off, of 1e-05 allowed",
    ):
        assert said in markdown


def test_a_budget_that_is_not_kept_is_reported() -> None:
    assert "NOT kept by p99" in endpoint(checked=checked(4.0)).markdown()


def test_a_budget_that_nothing_was_measured_for_is_not_passed_off_as_kept() -> None:
    assert "20 ms at 200 rows a second, not measured this time" in endpoint(checked=None).markdown()


@pytest.mark.parametrize(
    "changes",
    [{}, {"before": None}, {"checked": None}, {"budget": None, "chosen": BatchingChoice(batching=BatchingConfig())}],
)
def test_whatever_was_measured_is_drawn(changes: dict[str, Any]) -> None:
    assert draw_plot(endpoint(**changes)).startswith(b"\x89PNG")


def test_the_report_comes_back_from_json() -> None:
    assert endpoint() == Endpoint.model_validate_json(endpoint().model_dump_json())
