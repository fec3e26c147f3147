from __future__ import annotations

import pytest

from serving.errors import LatencyImpossible
from serving.model.batching import BatchingConfig
from tasks.endpoint.resolve import resolve
from tasks.endpoint.tuning import Chosen, remember, remembered, resolve_batching, tag_of
from tests.tasks.endpoint.values import spec, subject

BUDGET = {"latency_ms": 50, "rate": 200, "callers": 16}


def test_an_explicit_batching_is_taken_as_it_is() -> None:
    batching = BatchingConfig(batch_size_max=7, wait_ms_max=3)

    assert Chosen(batching=batching) == resolve_batching(spec(batching=batching), subject())
    assert Chosen(batching=BatchingConfig()) == resolve_batching(spec(), subject())


def test_a_batching_is_chosen_on_the_real_model_and_remembered_by_its_version(linear: str) -> None:
    wanted = spec(name="remembers", model=linear, budget=BUDGET)
    found = resolve(wanted)
    chosen = resolve_batching(wanted, found)

    assert chosen.cost is not None
    assert 1 < chosen.batching.batch_size_max <= 8
    assert [1, 2, 4] == [rows for rows, _ in chosen.passes[:3]]

    # A figure that nothing here would measure tells what was remembered.
    kept = chosen.model_copy(update={"batching": BatchingConfig(batch_size_max=11, wait_ms_max=1.25)})
    assert remember(wanted, found.resolved.pin, kept)
    again = resolve(wanted)

    assert kept == resolve_batching(wanted, again)
    assert kept != resolve_batching(spec(name="remembers", model=linear, budget={**BUDGET, "rate": 100}), again)
    assert kept != resolve_batching(spec(name="another", model=linear, budget=BUDGET), again)
    assert len(again.resolved.tags[tag_of("remembers")]) < 4000


def test_a_budget_below_the_models_own_passes_says_what_is_needed(sleepy: str) -> None:
    wanted = spec(model=sleepy, budget={"latency_ms": 60, "rate": 5})
    with pytest.raises(LatencyImpossible, match=r"must be at least \d+ ms, twice the [\d.]+ ms that one row"):
        resolve_batching(wanted, resolve(wanted))


def test_what_is_no_setting_is_forgotten() -> None:
    assert remembered("churn", {tag_of("churn"): '{"batching": 3}'}) is None
    assert remembered("churn", {}) is None
