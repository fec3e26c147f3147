"""Kept environments: what uses them, which are listed, and which are removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serving.errors import EnvironmentUnusable
from serving.model.environment_use import list_environments, remove_environments

NAME, OTHER = "0123456789abcdef", "fedcba9876543210"
NOW = datetime.now(UTC)
TOMORROW = NOW + timedelta(days=1)
# Takes an environment from a folder of wheels, says where it is, and ends when its input does.
PROGRAM = """\
import sys; from pathlib import Path
from serving.model.environment import make_environment
from serving.model.requirements import ModelEnvironment
from serving.model.uv import PackageSource
packages = PackageSource(wheels=Path(sys.argv[1]), offline=True)
asked = ModelEnvironment(requirements=("tiny-model-lib==1.0",))
made = make_environment(asked, packages=packages, extra_requirements=(), folder=Path(sys.argv[2]), model=sys.argv[3])
print(made, flush=True)
sys.stdin.read()
"""


def put_environment(folder: Path, name: str, *, days_ago: float = 0.0, models: tuple[str, ...] = ()) -> Path:
    """Write what an environment leaves in its folder, as it was last used some days ago."""
    place = folder / name
    place.mkdir(parents=True)
    (place / "environment.json").write_text('{"python": "3.11.7", "packages": ["a-1.dist-info", "b-2.dist-info"]}')
    (place / "module.py").write_text("x" * 1000)
    use = folder / f".{name}.use"
    use.write_text("".join(f"{model}\n" for model in models))
    (folder / f".{name}.lock").touch()
    at = (NOW - timedelta(days=days_ago)).timestamp()
    for path in (use, place):
        os.utime(path, (at, at))
    return place


@contextmanager
def take(folder: Path, wheels: Path, model: str) -> Generator[tuple[subprocess.Popen[str], Path]]:
    """Have another process take an environment; yield the process and the environment's folder."""
    command = [sys.executable, "-c", PROGRAM, str(wheels), str(folder), model]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        yield child, Path(child.stdout.readline().strip()).parents[1]
        child.kill()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from tests.model_wheels import write_wheel

    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "tiny_model_lib", "1.0")
    return folder


def test_environments_are_listed_with_size_models_and_last_use_the_newest_first(tmp_path: Path) -> None:
    put_environment(tmp_path, NAME, days_ago=3, models=("models:/a/1 0a", "models:/b/7 1b", "models:/a/1 0a"))
    put_environment(tmp_path, OTHER, days_ago=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / f".unfinished-{'0' * 16}-abc").mkdir()
    unfinished, newest, oldest = list_environments(tmp_path)

    assert ["0" * 16, OTHER, NAME] == [unfinished.name, newest.name, oldest.name]
    assert ("models:/a/1 0a", "models:/b/7 1b") == oldest.models
    assert ("3.11.7", 2, False) == (oldest.python, oldest.packages, oldest.is_in_use)
    assert 1000 < oldest.bytes < 1200
    assert timedelta(seconds=1) > abs(oldest.last_used - (NOW - timedelta(days=3)))
    assert (None, 0) == (unfinished.python, unfinished.packages)


def test_those_that_nothing_has_used_for_long_go_and_before_that_they_are_only_shown(tmp_path: Path) -> None:
    put_environment(tmp_path, NAME, days_ago=31)
    kept = put_environment(tmp_path, OTHER, days_ago=29)
    (tmp_path / f".unfinished-{NAME}-killed").mkdir()
    (tmp_path / "notes").mkdir()
    since = NOW - timedelta(days=30)
    os.utime(tmp_path / f".unfinished-{NAME}-killed", (0, 0))
    shown = remove_environments(tmp_path, unused_since=since, delete=False)
    before = sorted(path.name for path in tmp_path.iterdir())
    gone = remove_environments(tmp_path, unused_since=since, delete=True)

    assert [NAME] == [each.name for each in shown] == [each.name for each in gone]
    assert NAME in before
    assert sorted([f".{OTHER}.lock", f".{OTHER}.use", "notes", kept.name]) == sorted(
        path.name for path in tmp_path.iterdir()
    )


def test_an_environment_of_an_earlier_release_goes_by_its_folder_s_own_time(tmp_path: Path) -> None:
    for name, days in ((NAME, 31), (OTHER, 29)):
        put_environment(tmp_path, name, days_ago=days)
        (tmp_path / f".{name}.use").unlink()

    assert [NAME] == [
        each.name for each in remove_environments(tmp_path, unused_since=NOW - timedelta(days=30), delete=True)
    ]
    assert not (tmp_path / NAME).exists()


def test_one_that_another_process_uses_stays_until_that_has_ended_however_it_ends(tmp_path: Path, wheels: Path) -> None:
    folder = tmp_path / "environments"
    with take(folder, wheels, "models:/a/1 0a") as (child, place):
        (used,) = list_environments(folder)
        removed = remove_environments(folder, unused_since=TOMORROW, delete=True)
        with take(folder, wheels, "models:/b/2 1b") as (_, same):
            pass
        child.kill()
        child.wait()
        (left,) = list_environments(folder)

    assert (True, False, place) == (used.is_in_use, left.is_in_use, same)
    assert [] == removed
    assert ("models:/a/1 0a", "models:/b/2 1b") == left.models
    assert [place.name] == [each.name for each in remove_environments(folder, unused_since=TOMORROW, delete=True)]
    assert [] == list(folder.iterdir())
    with take(folder, wheels, "models:/a/1 0a") as (_, again):
        assert place == again
        assert (place / "bin/python").exists()


def test_one_that_was_used_after_it_was_chosen_stays(tmp_path: Path) -> None:
    place = put_environment(tmp_path, NAME, days_ago=31)
    (chosen,) = remove_environments(tmp_path, unused_since=NOW - timedelta(days=30), delete=False)
    os.utime(tmp_path / f".{NAME}.use")

    assert [] == remove_environments(tmp_path, unused_since=NOW - timedelta(days=30), delete=True)
    assert place.exists()
    assert chosen.name == place.name


def test_a_folder_that_is_not_there_has_no_environments(tmp_path: Path) -> None:
    assert [] == list_environments(tmp_path / "nowhere")
    assert [] == remove_environments(tmp_path / "nowhere", unused_since=TOMORROW, delete=True)


def test_one_that_can_not_be_removed_is_told(tmp_path: Path) -> None:
    place = put_environment(tmp_path, NAME, days_ago=31)
    if subprocess.run(["mount", "--bind", str(place), str(place)], check=False).returncode:
        pytest.skip("a folder that can't be moved needs the right to mount: run as root")
    try:
        with pytest.raises(EnvironmentUnusable, match=r"must be readable and writable in .*, got OSError.*busy"):
            remove_environments(tmp_path, unused_since=NOW, delete=True)
    finally:
        subprocess.run(["umount", str(place)], check=True)

    assert (place / "module.py").exists()


def test_a_removal_that_was_killed_is_finished_by_the_next_one(tmp_path: Path) -> None:
    place = put_environment(tmp_path, NAME, days_ago=31)
    aside = tmp_path / f".unfinished-{NAME}-killed"
    aside.mkdir()
    place.rename(aside / "removed")
    os.utime(aside, (0, 0))
    (listed,) = list_environments(tmp_path)

    assert listed.bytes > 1000
    assert [NAME] == [each.name for each in remove_environments(tmp_path, unused_since=NOW, delete=True)]
    assert [] == list(tmp_path.iterdir())
    shutil.rmtree(tmp_path)
