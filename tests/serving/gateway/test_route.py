from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serving.gateway.route import Rollout, Route, ServedVersion, Shadow, SleepRule, promote_canary, roll_back_canary
from tests.serving.gateway.support import route, served

URL = "http://127.0.0.1:9"


def read_weights(route: Route) -> dict[str, float]:
    return {served.version: served.weight for served in route.versions}


def test_a_promoted_canary_gets_every_request() -> None:
    canary = route(URL, ("1", 60), ("2", 30), ("3", 10), rollout=Rollout(version="3"))

    assert {"1": 0, "2": 0, "3": 100} == read_weights(promote_canary(canary))
    assert promote_canary(canary).rollout is None


def test_rolling_back_a_canary_leaves_the_other_weights() -> None:
    canary = route(URL, ("1", 60), ("2", 30), ("3", 10), rollout=Rollout(version="3"))

    assert {"1": 60, "2": 30, "3": 0} == read_weights(roll_back_canary(canary))
    assert roll_back_canary(canary).rollout is None


@pytest.mark.parametrize(
    ("versions", "options", "words"),
    [
        ((("1", 1.0), ("1", 1.0)), {}, "different names"),
        ((("1", 0.0),), {}, "weight above 0"),
        ((("1", 1.0),), {"rollout": Rollout(version="2")}, "version of rollout"),
        ((("1", 1.0),), {"shadow": Shadow(version="2")}, "version of shadow"),
        ((("1", 1.0),), {"rollout": Rollout(version="1")}, "and another version must have a weight"),
        ((("1", 1.0), ("2", 0.0)), {"rollout": Rollout(version="2")}, "and another version must have a weight"),
        ((("1", 1.0),), {"kes": ("a",)}, "Extra inputs are not permitted"),
    ],
)
def test_a_route_that_contradicts_itself_is_refused(
    versions: tuple[tuple[str, float], ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        route(URL, *versions, **options)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://user:secret@host", "http://a/b?c=d", "http://a b", ""]
)
def test_a_version_must_answer_at_a_plain_url(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        served(url)


def test_models_may_be_unloaded_only_where_every_version_speaks_v2() -> None:
    scoring = ServedVersion(version="1", url=URL, upstream_model="m", speaks="mlflow-tensors", weight=1)

    with pytest.raises(ValidationError, match="must speak v2"):
        Route(versions=(scoring,), contract=route(URL).contract, sleep=SleepRule(keep_warm_s=1))
