from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serving.gateway.route import Rollout, Route, Served, Shadow, Sleep, promoted, rolled_back
from tests.serving.gateway.support import route, served

URL = "http://127.0.0.1:9"


def weights(of: Route) -> dict[str, float]:
    return {each.version: each.weight for each in of.versions}


def test_a_trial_that_is_won_gives_the_version_every_request() -> None:
    trial = route(URL, ("1", 60), ("2", 30), ("3", 10), rollout=Rollout(version="3"))

    assert {"1": 0, "2": 0, "3": 100} == weights(promoted(trial))
    assert promoted(trial).rollout is None


def test_a_trial_that_is_lost_leaves_the_others_as_they_were() -> None:
    trial = route(URL, ("1", 60), ("2", 30), ("3", 10), rollout=Rollout(version="3"))

    assert {"1": 60, "2": 30, "3": 0} == weights(rolled_back(trial))
    assert rolled_back(trial).rollout is None


@pytest.mark.parametrize(
    ("versions", "options", "words"),
    [
        ((("1", 1.0), ("1", 1.0)), {}, "stand once"),
        ((("1", 0.0),), {}, "weight above 0"),
        ((("1", 1.0),), {"rollout": Rollout(version="2")}, "version of rollout"),
        ((("1", 1.0),), {"shadow": Shadow(version="2")}, "version of shadow"),
        ((("1", 1.0),), {"rollout": Rollout(version="1")}, "and another must have a weight"),
        ((("1", 1.0), ("2", 0.0)), {"rollout": Rollout(version="2")}, "and another must have a weight"),
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


def test_models_sleep_only_where_they_can_be_loaded_again() -> None:
    scoring = Served(version="1", url=URL, upstream_model="m", speaks="mlflow-tensors", weight=1)

    with pytest.raises(ValidationError, match="must have no sleep"):
        Route(versions=(scoring,), contract=route(URL).contract, sleep=Sleep(keep_warm_s=1))
