from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from serving.errors import EndpointFailed
from serving.gateway.route import CanaryTally, Rollout, SavedEndpoint, Trial
from serving.gateway.store import Store
from tests.serving.gateway.support import route

SAVED = SavedEndpoint(
    route=route("http://127.0.0.1:9", ("1", 90), ("2", 10), rollout=Rollout(version="2", p99_ms_max=5)),
    trial=Trial(began=datetime.now(UTC), tally=CanaryTally(requests=7, errors=1, slow=2)),
)


def test_routes_are_there_after_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put("churn", SAVED)
        store.put("fraud", SAVED)
        store.delete("fraud")
        store.delete("fraud")

    with Store(tmp_path) as store:
        assert {"churn": SAVED} == store.load_all()


def test_an_interrupted_write_leaves_the_old_route(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put("churn", SAVED)
        (tmp_path / "routes/.churn.json.0a1b").write_text('{"route":')

        assert {"churn": SAVED} == store.load_all()


def test_only_one_gateway_uses_a_folder(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(EndpointFailed, match="Only one gateway may use"):
        Store(tmp_path)


def test_a_route_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        (tmp_path / "routes/churn.json").write_text("{}")

        with pytest.raises(EndpointFailed, match=r"churn\.json must hold a route"):
            store.load_all()
