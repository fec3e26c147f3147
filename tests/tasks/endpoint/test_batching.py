from __future__ import annotations

import pytest

from serving.errors import LatencyImpossible
from serving.model.batching import BatchingConfig
from tasks.endpoint.batching import BatchingChoice, make_tag_name, read_settings, resolve_batching, save_settings
from tasks.endpoint.resolve import load_endpoint_model
from tests.tasks.endpoint.values import loaded, spec

BUDGET = {"latency_ms": 50, "rate": 200, "callers": 16}


def test_an_explicit_batching_is_taken_as_it_is() -> None:
    batching = BatchingConfig(batch_size_max=7, wait_ms_max=3)

    assert BatchingChoice(batching=batching) == resolve_batching(spec(batching=batching), loaded())
    assert BatchingChoice(batching=BatchingConfig()) == resolve_batching(spec(), loaded())


def test_a_batching_is_chosen_on_the_real_model_and_remembered_by_its_version(linear: str) -> None:
    given = spec(name="remembers", model=linear, budget=BUDGET)
    found = load_endpoint_model(given)
    chosen = resolve_batching(given, found)

    assert chosen.cost is not None
    assert 1 < chosen.batching.batch_size_max <= 8
    assert [1, 2, 4] == [rows for rows, _ in chosen.passes[:3]]

    # A figure that is never measured here shows what was saved.
    kept = chosen.model_copy(update={"batching": BatchingConfig(batch_size_max=11, wait_ms_max=1.25)})
    assert save_settings(given, found.resolved.pin, kept)
    again = load_endpoint_model(given)

    assert kept == resolve_batching(given, again)
    assert kept != resolve_batching(spec(name="remembers", model=linear, budget={**BUDGET, "rate": 100}), again)
    assert kept != resolve_batching(spec(name="another", model=linear, budget=BUDGET), again)
    assert len(again.resolved.tags[make_tag_name("remembers")]) < 4000


def test_a_budget_below_the_models_own_passes_is_an_error_with_what_is_needed(sleepy: str) -> None:
    given = spec(model=sleepy, budget={"latency_ms": 60, "rate": 5})
    with pytest.raises(LatencyImpossible, match=r"must be at least \d+ ms, twice the [\d.]+ ms that one row"):
        resolve_batching(given, load_endpoint_model(given))


def test_what_is_no_setting_is_forgotten() -> None:
    assert read_settings("churn", {make_tag_name("churn"): '{"batching": 3}'}) is None
    assert read_settings("churn", {}) is None
