from __future__ import annotations

import platform
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serving.errors import BadInput
from serving.model.batching import BatchingConfig
from tasks.endpoint import spec as specs
from tasks.endpoint.spec import Access, Budget, Canary, EndpointSpec, Shadow, Step, read_admin_key, read_keys
from tasks.endpoint.targets import BentoML, External, KServe, RayServe, Seldon, Triton, default_target
from tests.tasks.endpoint.values import spec

OWN = (BentoML, KServe, Seldon)
EXTERNAL = {"kind": "external", "url": "http://127.0.0.1:8000"}


def test_the_default_target_is_triton_where_its_binaries_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert isinstance(spec().target, Triton)

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")

    assert isinstance(spec().target, RayServe)
    assert isinstance(default_target(), RayServe)


@pytest.mark.parametrize(
    "target",
    [Triton(), RayServe(), BentoML(folder="f", python="p"), KServe(folder="f", python="p"), External(url="http://a")],
)
def test_a_target_comes_back_from_json_by_its_kind(target: BaseModel) -> None:
    found = EndpointSpec.model_validate_json(spec(target=target).model_dump_json())

    assert target == found.target


def test_a_spec_of_0_1_is_read_under_its_field_name_of_then() -> None:
    assert spec(batching=BatchingConfig(batch_size_max=4)) == spec(dial={"batch_size_max": 4})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "No Spaces"}, "name"),
        ({"keep_warm": "auto"}, "only beside a budget"),
        ({"keep_warm": 0.1}, "from 1 second to a week, got 0.1"),
        (
            {"keep_warm": 60, "target": {"kind": "bentoml", "folder": "f", "python": "p"}},
            "left out on bentoml, which unloads no models as triton or ray-serve do",
        ),
        ({"keep_warm": "sometimes"}, "keep_warm"),
        ({"target": {"kind": "torchserve"}}, "torchserve"),
        ({"target": {"kind": "triton", "url": "http://user:word@host"}}, "url"),
        ({"gateway": "ftp://host"}, "gateway"),
        ({"rollout": {"kind": "canary", "percent": 90}}, "percent"),
        ({"rollout": {"kind": "canary", "percents": 9}}, "percents"),
        ({"scaling": {"replicas_max": 0}}, "replicas_max"),
        (
            {"batching": {"batch_size_max": 4}, "scaling": {"replicas_max": 2}, "target": EXTERNAL},
            "batching and scaling must be left out on external, whose server others run",
        ),
        ({"keep_warm": 60, "target": EXTERNAL}, "left out on external"),
        ({"environment": "model", "target": EXTERNAL}, "got external: others run the model's server"),
        ({"access": {"keys": ["a-secret"]}}, "keys"),
        ({"access": {"environment": ["A_KEY"], "anyone": True}}, "by keys or for anyone, got both: A_KEY"),
        ({"budget": {"latency_ms": 0, "rate": 9}}, "latency_ms"),
        ({"tolerance": 0}, "tolerance"),
        ({"model": None}, "a model, steps or an ensemble, and one of these three, got none"),
        ({"steps": ["models:/a/1", "models:/b/1"]}, "one of these three, got model and steps"),
        ({"model": None, "steps": ["models:/a/1"]}, "steps must name 2 or 3 models, got 1"),
        ({"model": None, "ensemble": ["models:/a/1"] * 4}, "ensemble must name 2 or 3 models, got 4"),
        ({"model": None, "steps": [{"model": "models:/a/1", "rows": 1}] * 2}, "rows"),
        (
            {"model": None, "steps": ["models:/a/1"] * 2, "target": {"kind": "bentoml", "folder": "f", "python": "p"}},
            "triton, ray-serve or seldon, got bentoml, which chains no models. Choose one of those",
        ),
        (
            {
                "model": None,
                "ensemble": ["models:/a/1"] * 2,
                "target": {"kind": "kserve", "folder": "f", "python": "p"},
            },
            "ensemble must be served by triton, ray-serve or seldon, got kserve",
        ),
        ({"model": None, "steps": ["models:/a/1"] * 2, "params": {"a": 1}}, r"of a step beside steps, got \['a'\]"),
    ],
)
def test_an_invalid_spec_is_refused_and_the_error_names_the_field(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec(**changes)


def test_the_address_of_a_model_is_a_step() -> None:
    found = spec(model=None, steps=["models:/a/1", {"model": "models:/b@best", "batching": {"batch_size_max": 4}}])

    assert (Step(model="models:/a/1"), Step(model="models:/b@best", batching=BatchingConfig(batch_size_max=4))) == (
        found.graph_steps
    )
    assert found == EndpointSpec.model_validate_json(found.model_dump_json())
    assert () == spec().graph_steps


@pytest.mark.parametrize(
    "model",
    [EndpointSpec, Step, Triton, RayServe, BentoML, KServe, Seldon, Budget, Canary, Shadow, Access, BatchingConfig],
)
def test_every_field_of_the_form_is_described(model: type[BaseModel]) -> None:
    assert [] == [name for name, field in model.model_fields.items() if not field.description]


KEY = "k" * 32


def test_keys_are_read_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_KEY", KEY)
    monkeypatch.setattr(specs, "read_secret", {"churn-key": KEY[::-1] + "2"}.get)

    access = Access(environment=("CHURN_KEY",), secrets=("churn-key",))

    assert {"CHURN_KEY": KEY, "churn-key": KEY[::-1] + "2"} == read_keys(access)


def test_a_key_that_is_missing_or_short_is_named_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHURN_KEY", raising=False)
    with pytest.raises(BadInput, match=r"'CHURN_KEY' must hold a key .*got nothing"):
        read_keys(Access(environment=("CHURN_KEY",)))

    monkeypatch.setenv("CHURN_KEY", "hunter2")
    with pytest.raises(BadInput, match="got 7 characters") as caught:
        read_keys(Access(environment=("CHURN_KEY",)))

    assert "hunter2" not in str(caught.value)


def test_the_administrators_key_is_that_of_the_environment_or_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERNIGHT_ADMIN_KEY", KEY)
    monkeypatch.setattr(specs, "read_secret", {"admin": KEY + "2"}.get)

    assert KEY == read_admin_key(None)
    assert KEY + "2" == read_admin_key("admin")
    with pytest.raises(BadInput, match="Prefect Secret block 'nobody' must hold"):
        read_admin_key("nobody")
