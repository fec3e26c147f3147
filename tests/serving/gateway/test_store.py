from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from serving.errors import EndpointFailed
from serving.gateway.route import Rollout
from serving.gateway.state import Kept
from serving.gateway.store import Store
from serving.gateway.trial import Tally, Trial
from tests.serving.gateway.support import route

KEPT = Kept(
    route=route("http://127.0.0.1:9", ("1", 90), ("2", 10), rollout=Rollout(version="2", p99_ms_max=5)),
    trial=Trial(began=datetime.now(UTC), tally=Tally(requests=7, errors=1, slow=2)),
)


def test_what_is_put_is_there_after_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put("churn", KEPT)
        store.put("fraud", KEPT)
        store.delete("fraud")
        store.delete("fraud")

    with Store(tmp_path) as store:
        assert {"churn": KEPT} == store.load()


def test_a_torn_write_leaves_the_route_as_it_was(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put("churn", KEPT)
        (tmp_path / "routes/.churn.json.0a1b").write_text('{"route":')

        assert {"churn": KEPT} == store.load()


def test_a_folder_has_one_gateway(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(EndpointFailed, match="must have one gateway"):
        Store(tmp_path)


def test_a_route_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        (tmp_path / "routes/churn.json").write_text("{}")

        with pytest.raises(EndpointFailed, match=r"churn\.json must hold a route"):
            store.load()
