"""The destination of a run, and the tables that runs are added to."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyiceberg.catalog import Catalog

from tasks.storage import Storage, open_storage
from tests.tasks.batch.iceberg_tables import configure, open_lake
from tests.tasks.batch.tables import DeltaOutput, IcebergOutput, TableOutput


@pytest.fixture
def destination(place: str) -> Storage:
    return open_storage(f"{place}/out")


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    configure(monkeypatch, str(tmp_path))
    return open_lake(str(tmp_path))


@pytest.fixture(params=["delta", "iceberg"])
def table(request: pytest.FixtureRequest) -> TableOutput:
    return DeltaOutput() if request.param == "delta" else IcebergOutput(request.getfixturevalue("lake"))
