from __future__ import annotations

import pytest

from serving.errors import LatencyImpossible
from serving.model.batching import BatchingConfig, BatchingSetting
from serving.model.release import Scaling
from tasks.endpoint.batching import BatchingChoice, make_tag_name, read_settings, resolve_batching, save_settings
from tasks.endpoint.resolve import load_endpoint_model
from tests.tasks.endpoint.values import loaded, spec

BUDGET = {"latency_ms": 50, "rate": 200, "callers": 16}


def test_an_explicit_batching_is_taken_as_it_is() -> None:
    batching = BatchingConfig(batch_size_max=7, wait_ms_max=3)

    assert [BatchingChoice(batching=batching)] == [*resolve_batching(spec(batching=batching), loaded())]
    assert [BatchingChoice(batching=BatchingConfig())] == [*resolve_batching(spec(), loaded())]


def test_an_explicit_batching_beside_a_budget_is_the_only_one_that_is_tried() -> None:
    batching = BatchingConfig(batch_size_max=7, wait_ms_max=3)
    # No model takes a nanosecond: what is explicit is held against the budget under load, and nothing is chosen.
    given = spec(batching=batching, budget={**BUDGET, "latency_ms": 1e-6})

    assert [BatchingChoice(batching=batching)] == [*resolve_batching(given, loaded())]


def test_a_batching_is_chosen_on_the_real_model_and_remembered_by_its_version(linear: str) -> None:
    given = spec(name="remembers", model=linear, budget=BUDGET)
    found = load_endpoint_model(given)
    choices = [*resolve_batching(given, found)]
    chosen = choices[0]

    assert chosen.cost is not None
    assert chosen.setting is not None
    assert (1, chosen.batching) == (chosen.setting.replicas, chosen.setting.batching)
    assert all(1 <= each.batching.batch_size_max <= 8 for each in choices)
    assert [1, 2, 4] == [rows for rows, _ in chosen.passes[:3]]

    # A figure that is never measured here shows what was saved.
    kept = chosen.model_copy(update={"batching": BatchingConfig(batch_size_max=11, wait_ms_max=1.25)})
    assert save_settings(given, found.resolved.pin, kept)
    again = load_endpoint_model(given)

    # Should it not keep its budget any more, others follow.
    first, *others = resolve_batching(given, again)

    assert kept == first
    assert all(1 <= each.batching.batch_size_max <= 8 for each in others)
    assert others
    assert kept not in resolve_batching(spec(name="remembers", model=linear, budget={**BUDGET, "rate": 100}), again)
    assert kept not in resolve_batching(spec(name="another", model=linear, budget=BUDGET), again)
    assert len(again.resolved.tags[make_tag_name("remembers")]) < 4000


def test_what_an_earlier_release_chose_is_read_and_chosen_again(linear: str) -> None:
    given = spec(name="earlier", model=linear, budget=BUDGET)
    found = load_endpoint_model(given)
    # Releases before this one chose the largest batch that fits, and saved no setting.
    largest = BatchingConfig(batch_size_max=8, wait_ms_max=35.0)
    assert save_settings(given, found.resolved.pin, BatchingChoice(batching=largest))
    again = load_endpoint_model(given)
    settings = read_settings("earlier", again.resolved.tags)

    assert settings is not None
    assert largest == settings.chosen.batching
    assert largest != next(resolve_batching(given, again)).batching


@pytest.mark.parametrize(("replicas_min", "replicas", "expected"), [(1, 3, 3), (4, 3, 4), (0, 3, 0), (2, 1, 2)])
def test_there_are_as_many_replicas_as_the_rate_needs(replicas_min: int, replicas: int, expected: int) -> None:
    batching = BatchingConfig()
    setting = BatchingSetting(batching=batching, replicas=replicas, utilisation=0.5, p99_ms=1, burst_p99_ms=2)
    scaling = Scaling(replicas_min=replicas_min, replicas_max=8)

    assert expected == BatchingChoice(batching=batching, setting=setting).choose_scaling(scaling).replicas_min
    assert scaling == BatchingChoice(batching=batching).choose_scaling(scaling)


def test_a_budget_below_the_models_own_passes_is_an_error_with_what_is_needed(sleepy: str) -> None:
    given = spec(model=sleepy, budget={"latency_ms": 60, "rate": 5})
    with pytest.raises(LatencyImpossible, match=r"must be at least \d+ ms, twice the [\d.]+ ms that one row"):
        next(resolve_batching(given, load_endpoint_model(given)))


def test_what_is_no_setting_is_forgotten() -> None:
    assert read_settings("churn", {make_tag_name("churn"): '{"batching": 3}'}) is None
    assert read_settings("churn", {}) is None
