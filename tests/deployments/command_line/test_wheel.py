"""The wheel: what is in it, and that the program works where it alone is installed, in any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infra.local.prefect_server import PrefectServer

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without a network."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("flows", "tasks", "serving", "deployments", "infra"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(built),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    (found,) = built.glob("overnight-*.whl")
    return found


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """The program out of the installed wheel, and the variables with which no checkout is found before it."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    return str(target / "bin/overnight"), {"PYTHONPATH": str(target)}


def run(program: tuple[str, dict[str, str]], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path, environment = program
    env = {**os.environ, **environment}
    return subprocess.run([path, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_wheel_has_files_for_other_programs_and_no_demo_or_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {
        "deployments/prefect.yaml",
        "infra/systemd/overnight-worker@.service",
        "infra/kubernetes/work-pool.json",
        "infra/kubernetes/base/kustomization.yaml",
        "infra/kubernetes/base/pools/overnight-spot.yaml",
        "infra/kubernetes/overlays/gpu-spot/kustomization.yaml",
        "infra/kubernetes/components/endpoints/kustomization.yaml",
        "infra/local/wheels.txt",
        "infra/local/stack.py",
        "flows/py.typed",
    } <= names
    assert set() == {name for name in names if "demo" in name or name.startswith("tests/")}


def test_help_runs_and_files_and_verify_work_from_another_folder(
    program: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    # Of the same names as those of the project: they must not hide these.
    (tmp_path / "tasks.py").write_text("raise RuntimeError('not mine')")
    (tmp_path / "flows").mkdir()
    helped = run(program, tmp_path, "--help")
    listed = run(program, tmp_path, "runs", "scores", "--json")
    verified = run(program, tmp_path, "verify", "scores")
    shown = run(program, tmp_path, "deploy", "--show", "work-pool.json")

    assert 0 == helped.returncode, helped.stderr
    assert "overnight score" in helped.stdout
    assert {"destination": f"{tmp_path}/scores", "runs": []} == json.loads(listed.stdout)
    assert 1 == verified.returncode
    assert "must hold a run that was published" in verified.stderr
    assert "job_configuration" in json.loads(shown.stdout)
    where = subprocess.run(
        [sys.executable, "-c", "import deployments; print(deployments.__file__)"],
        env={**os.environ, **program[1]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert program[1]["PYTHONPATH"] in where.stdout


def test_score_from_another_folder_makes_a_run_that_is_whole(
    program: tuple[str, dict[str, str]], server: PrefectServer, doubling: str, customers: Path, tmp_path: Path
) -> None:
    scored = run(program, tmp_path, "score", doubling, str(customers), "scores", "-k", "customer", "--json")
    assert 0 == scored.returncode, scored.stderr
    verified = run(program, tmp_path, "verify", "scores", "--json")

    assert (10_000, f"{tmp_path}/scores") == tuple(json.loads(scored.stdout)[name] for name in ("rows", "destination"))
    assert 0 == verified.returncode, verified.stderr
    assert ["complete"] == [each["state"] for each in json.loads(verified.stdout)["runs"]]
