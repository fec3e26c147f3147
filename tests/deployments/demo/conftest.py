"""The flights that the demo's tests share."""

from pathlib import Path

import pytest

from deployments.demo.flights import write_flights


@pytest.fixture(scope="session")
def flights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flights")
    write_flights(folder)
    return folder
