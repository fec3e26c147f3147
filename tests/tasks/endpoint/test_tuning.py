from __future__ import annotations

import pytest

from serving.errors import LatencyImpossible
from serving.model.release import Dial
from tasks.endpoint.resolve import resolve
from tasks.endpoint.tuning import Chosen, remember, remembered, settle_dial, tag_of
from tests.tasks.endpoint.values import spec, subject

BUDGET = {"latency_ms": 50, "rate": 200, "callers": 16}


def test_an_explicit_dial_is_taken_as_it_is() -> None:
    dial = Dial(batch_size_max=7, wait_ms_max=3)

    assert Chosen(dial=dial) == settle_dial(spec(dial=dial), subject())
    assert Chosen(dial=Dial()) == settle_dial(spec(), subject())


def test_a_dial_is_chosen_on_the_real_model_and_remembered_by_its_version(linear: str) -> None:
    wanted = spec(name="remembers", model=linear, budget=BUDGET)
    found = resolve(wanted)
    chosen = settle_dial(wanted, found)

    assert chosen.time is not None
    assert 1 < chosen.dial.batch_size_max <= 8
    assert [1, 2, 4] == [rows for rows, _ in chosen.passes[:3]]

    # A figure that nothing here would measure tells what was remembered.
    kept = chosen.model_copy(update={"dial": Dial(batch_size_max=11, wait_ms_max=1.25)})
    assert remember(wanted, found.resolved.pin, kept)
    again = resolve(wanted)

    assert kept == settle_dial(wanted, again)
    assert kept != settle_dial(spec(name="remembers", model=linear, budget={**BUDGET, "rate": 100}), again)
    assert kept != settle_dial(spec(name="another", model=linear, budget=BUDGET), again)
    assert len(again.resolved.tags[tag_of("remembers")]) < 4000


def test_a_budget_below_the_models_own_passes_says_what_is_needed(sleepy: str) -> None:
    wanted = spec(model=sleepy, budget={"latency_ms": 60, "rate": 5})
    with pytest.raises(LatencyImpossible, match=r"must be at least \d+ ms, twice the [\d.]+ ms that one row"):
        settle_dial(wanted, resolve(wanted))


def test_what_is_no_setting_is_forgotten() -> None:
    assert remembered("churn", {tag_of("churn"): '{"dial": 3}'}) is None
    assert remembered("churn", {}) is None
