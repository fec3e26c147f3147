import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from infra.local.prefect_server import PrefectServer, prefect_server

FLOW = """
from prefect import flow, task

@task
def double(x: int) -> int:
    return 2 * x

@flow
def check(x: int) -> int:
    return double(x)

assert check(21) == 42
"""


def test_the_api_and_the_pages_answer(prefect: PrefectServer) -> None:
    assert httpx.get(f"{prefect.api_url}/health").json() is True
    assert "<html" in httpx.get(prefect.ui_url, follow_redirects=True).text
    assert httpx.get(f"{prefect.ui_url}/ui-settings").json()["api_url"] == prefect.api_url


def test_a_flow_run_with_the_environment_is_on_the_server(prefect: PrefectServer, tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(FLOW)

    subprocess.run([sys.executable, "check.py"], cwd=tmp_path, env={**os.environ, **prefect.environment}, check=True)

    (flow_run,) = httpx.post(f"{prefect.api_url}/flow_runs/filter", json={"sort": "START_TIME_DESC", "limit": 1}).json()
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["parameters"] == {"x": 21}


def test_everything_it_keeps_is_in_its_home_and_it_says_nothing_to_the_outside(prefect: PrefectServer) -> None:
    settings = httpx.get(f"{prefect.api_url}/admin/settings").json()

    assert settings["home"] == str(prefect.home)
    assert settings["server"]["analytics_enabled"] is False
    assert (prefect.home / "prefect.db").exists()


def test_a_catalogue_from_the_web_comes_from_the_copy_that_prefect_ships(prefect: PrefectServer) -> None:
    catalogue = httpx.get(f"{prefect.api_url}/collections/views/aggregate-worker-metadata", timeout=2)

    assert "process" in catalogue.json()["prefect"]


def test_a_new_home_starts_from_the_template_without_services_and_a_second_stop_does_nothing(
    prefect: PrefectServer, template_folder: Path, tmp_path: Path
) -> None:
    assert len(list(template_folder.iterdir())) == 1

    with prefect_server(tmp_path / "new", services=False, template_folder=template_folder) as other:
        assert other.api_url != prefect.api_url
        assert httpx.post(f"{other.api_url}/flow_runs/filter", json={}).json() == []

        other.stop()

        with pytest.raises(httpx.ConnectError):
            httpx.get(other.api_url)
