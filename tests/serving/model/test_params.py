"""Params of a signature: held against it, given to the model, and refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.errors import BadInput, ModelUnfit
from serving.model.contract import Contract
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from tasks.batch.options import BatchOptions
from tests.support import PARAMS, register_script, register_with_params


@pytest.fixture(scope="module")
def weighted(registry: Path) -> str:
    return register_with_params("weighted")


def predict(model: str, **params: Any) -> list[float]:
    resolved = resolve_model(model)
    contract = resolved.contract({}, {}, params)
    loaded = load_model(resolved, contract)
    first, second = (loaded.predict({"a": np.ones(2, np.float32)})["prediction"] for _ in range(2))

    np.testing.assert_array_equal(first, second)
    values: list[float] = first.tolist()
    return values


def test_params_reach_the_model_and_those_not_given_have_their_defaults(weighted: str) -> None:
    assert [2.0, 2.0] == predict(weighted)
    assert [3.0, 3.0] == predict(weighted, weight=3)
    assert [13.5, 13.5] == predict(weighted, weight=3.0, steps=4, offsets=[1.0, 0.5])


def test_a_whole_number_for_a_float_is_that_float(weighted: str) -> None:
    resolved = resolve_model(weighted)

    whole, point = (resolved.contract({}, {}, {"weight": each}) for each in (3, 3.0))

    assert '"params":{"weight":3.0}' in whole.model_dump_json()
    assert point.model_dump_json() == whole.model_dump_json()
    assert point == Contract.model_validate_json(point.model_dump_json())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"wieght": 3.0}, "got 'wieght'"),
        ({"weight": "3"}, "got weight='3'"),
        ({"steps": 1.5}, "got steps=1.5"),
        ({"offsets": 1.0}, "got offsets=1.0"),
        ({"label": ["x"], "other": 1}, r"got 'other', label=\['x'\]"),
    ],
)
def test_params_that_are_not_the_signatures_are_refused_with_those_that_are(
    weighted: str, given: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadInput, match=named) as refusal:
        resolve_model(weighted).contract({}, {}, given)

    for name in PARAMS:
        assert f"{name} (" in str(refusal.value)
    assert "offsets (a list of double, by default [0.0])" in str(refusal.value)


def test_a_model_without_params_refuses_them(linear: str) -> None:
    plain = register_script("without-params", "pass")

    with pytest.raises(BadInput, match=r"for a model whose signature has none, got \['weight'\]"):
        resolve_model(plain).contract({}, {}, {"weight": 3.0})
    with pytest.raises(BadInput, match=r"for a model that runs as a torch module, got \['weight'\]"):
        resolve_model(linear).contract({}, {}, {"weight": 3.0})


def test_a_model_whose_predict_would_not_get_them_refuses_them(registry: Path) -> None:
    deaf = register_with_params("deaf")
    ignoring = register_with_params("ignoring", takes_them=False)

    assert [2.0, 2.0] == predict(deaf)
    assert [2.0, 2.0] == predict(ignoring)
    with pytest.raises(ModelUnfit, match=r"must take an argument `params` to be given \['weight'\]"):
        predict(ignoring, weight=3.0)


def test_without_params_contract_and_run_key_are_as_before_there_were_any(weighted: str) -> None:
    contract = resolve_model(weighted).contract({}, {})

    assert {"inputs", "outputs"} == set(contract.model_dump())
    assert "params" not in contract.model_dump_json()
    assert "params" not in BatchOptions().key_fields()
    assert {"weight": 3.0} == BatchOptions(params={"weight": 3.0}).key_fields()["params"]


def test_a_contract_with_params_can_be_a_key() -> None:
    contract = Contract(inputs=(), outputs=(), params={"sizes": [1, 2]})

    assert {contract: 1} == {contract.model_copy(): 1}
