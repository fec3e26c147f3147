from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from infra.local.prefect_server import (
    DATABASE_FILE,
    PrefectServer,
    prefect_server,
    prefect_worker,
    restore_template,
    save_template,
    template_path,
)
from infra.local.process import ServerFailed
from infra.worker import list_process_tree

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


def test_everything_it_keeps_is_in_its_home_and_it_sends_no_telemetry(prefect: PrefectServer) -> None:
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


def database(path: Path, word: str) -> Path:
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("create table words (word text)")
        connection.execute("insert into words values (?)", (word,))
    return path


def words(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [word for (word,) in connection.execute("select word from words")]


def test_a_template_is_for_one_version_of_prefect(tmp_path: Path) -> None:
    assert template_path(tmp_path).name == f"prefect-{version('prefect')}.db"


def test_a_database_in_use_is_saved_whole_and_restored_into_a_new_home(tmp_path: Path) -> None:
    template = template_path(tmp_path / "templates")
    home = database(tmp_path / "home" / DATABASE_FILE, "first").parent
    (tmp_path / "new").mkdir()

    with closing(sqlite3.connect(home / DATABASE_FILE)) as user:
        user.execute("begin immediate")
        user.execute("insert into words values ('not committed')")
        save_template(template, home)
    restore_template(template, tmp_path / "new")

    assert words(tmp_path / "new" / DATABASE_FILE) == ["first"]
    assert list(template.parent.iterdir()) == [template]


def test_the_first_template_stays(tmp_path: Path) -> None:
    template = template_path(tmp_path / "templates")

    for word in ("first", "second"):
        save_template(template, database(tmp_path / word / DATABASE_FILE, word).parent)

    assert words(template) == ["first"]


def test_without_a_template_a_new_home_stays_empty(tmp_path: Path) -> None:
    restore_template(template_path(tmp_path / "templates"), tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pool(prefect: PrefectServer) -> str:
    created = httpx.post(f"{prefect.api_url}/work_pools/", json={"name": "here", "type": "process"})
    created.raise_for_status()
    return "here"


def test_a_worker_asks_for_work_and_nothing_of_it_is_left_when_it_is_stopped(
    prefect: PrefectServer, pool: str, tmp_path: Path
) -> None:
    with prefect_worker(prefect, pool, tmp_path / "one") as worker:
        pids = list_process_tree(worker.process.pid)
        online = httpx.post(f"{prefect.api_url}/work_pools/{pool}/workers/filter", json={}).json()

        assert "one" in {each["name"] for each in online}

    assert set() == set(list_process_tree(1)) & set(pids)


def test_a_worker_that_is_killed_leaves_nothing_either(prefect: PrefectServer, pool: str, tmp_path: Path) -> None:
    worker = prefect_worker(prefect, pool, tmp_path / "two")
    pids = list_process_tree(worker.process.pid)
    worker.kill()

    assert 2 <= len(pids)
    assert set() == set(list_process_tree(1)) & set(pids)


def test_a_missing_work_pool_is_named(prefect: PrefectServer, tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="no-such-pool"):
        prefect_worker(prefect, "no-such-pool", tmp_path / "three")
