"""What a test has is what it asks for, whatever ran before it."""

from __future__ import annotations

import os
from pathlib import Path

import mlflow
import pytest


@pytest.mark.parametrize("turn", range(2))
class TestARegistry:
    def test_is_seen_by_a_test_that_asks_for_it(self, registry: Path, turn: int) -> None:
        assert f"sqlite:///{registry}/mlflow.db" == mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"]
        with mlflow.start_run() as run:
            assert "tests" == mlflow.get_experiment(run.info.experiment_id).name

    def test_is_not_seen_by_one_that_does_not(self, turn: int) -> None:
        assert not mlflow.is_tracking_uri_set()
        assert "MLFLOW_EXPERIMENT_ID" not in os.environ
