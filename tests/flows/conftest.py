"""A real Prefect server for the flows, and small datasets for them."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from infra.local.prefect_server import PrefectServer
from tests.servers import use_prefect
from tests.support import write_customers


@pytest.fixture(scope="session")
def prefect(
    prefect_logging: None, tmp_path_factory: pytest.TempPathFactory, prefect_templates: Path
) -> Generator[PrefectServer]:
    """A real Prefect server that this process and its children talk to."""
    with use_prefect(tmp_path_factory.mktemp("prefect"), prefect_templates) as server:
        yield server


@pytest.fixture
def customers(tmp_path: Path) -> Path:
    """A dataset of 10,000 customers in four Parquet files of several row groups each."""
    return write_customers(tmp_path / "customers", rows=10_000, files=4, rows_per_group=700)
