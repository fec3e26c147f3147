"""Groups of tests whose failures are looked at twice: what passes then, and what ends a group at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.child_environment import add_project
from tests.second_look import UNSTABLE_MAX, GroupRecord, find_problem, summarize

pytestmark = pytest.mark.servers

# It passes from its second run on, in any process.
FAILS_ONCE = """
import pathlib

def test_fails_once():
    seen = pathlib.Path("seen")
    is_first = not seen.exists()
    seen.touch()
    assert not is_first
"""
LEFT_BY_ANOTHER = """
import os

def test_leaves_something():
    os.environ["LEFT"] = "something"

def test_wants_a_clean_process():
    assert "LEFT" not in os.environ
"""
FAILS_TWICE = "def test_fails():\n    assert False\n"
PASSES = "def test_passes():\n    pass\n"
FIXTURE_FAILS = """
import pytest

@pytest.fixture
def broken():
    yield
    raise OSError("it can't be taken down")

def test_is_torn_down(broken):
    pass
"""
TEST_OF_SIMULATION = "tests/simulation/test_seeds.py"


def run_second_look(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.second_look", *arguments],
        cwd=folder,
        env={**add_project(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def run_tests(folder: Path, files: dict[str, str]) -> tuple[int, GroupRecord]:
    """Run files of tests as one group, in a folder of their own."""
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    code = run_second_look(folder, "group", "-q", "--", *files).returncode
    return code, GroupRecord(**json.loads((folder / ".tests/group.json").read_text()))


def test_a_group_that_passes_has_no_second_look(tmp_path: Path) -> None:
    code, record = run_tests(tmp_path, {"test_a.py": PASSES})

    assert (0, [], [], "") == (code, record.unstable, record.failed, record.problem)


def test_a_test_that_passes_in_a_new_process_is_unstable_and_its_group_passes(tmp_path: Path) -> None:
    code, record = run_tests(tmp_path, {"test_a.py": FAILS_ONCE, "test_b.py": LEFT_BY_ANOTHER, "test_c.py": PASSES})

    assert 0 == code
    assert ["test_a.py::test_fails_once", "test_b.py::test_wants_a_clean_process"] == record.unstable
    assert ([], "") == (record.failed, record.problem)


@pytest.mark.parametrize("text", [FAILS_TWICE, FIXTURE_FAILS])
def test_a_test_that_fails_twice_fails_its_group(text: str, tmp_path: Path) -> None:
    code, record = run_tests(tmp_path, {"test_a.py": FAILS_ONCE, "test_b.py": text})

    assert 1 == code
    assert ["test_a.py::test_fails_once"] == record.unstable
    assert 1 == len(record.failed)


def test_a_group_runs_the_chosen_files_alone(tmp_path: Path) -> None:
    run_tests(tmp_path, {"test_a.py": PASSES, "test_b.py": FAILS_TWICE})
    (tmp_path / "chosen").write_text("test_a.py\n")
    (tmp_path / "none").write_text("")
    paths = ["test_a.py", "test_b.py"]
    chosen = run_second_look(tmp_path, "chosen", "--chosen=chosen", "-q", "--", *paths)
    nothing = run_second_look(tmp_path, "nothing", "--chosen=none", "-q", "--", *paths)
    other = run_second_look(tmp_path, "other", "--chosen=chosen", "-q", "-k", "another", "--", *paths)
    records = [json.loads((tmp_path / f".tests/{group}.json").read_text()) for group in ("chosen", "nothing", "other")]

    assert [0, 0, 0] == [chosen.returncode, nothing.returncode, other.returncode]
    assert [1, 0, 0] == [record["tests"] for record in records]
    assert ["test_a.py"] == list(records[0]["seconds_by_file"])


def test_the_simulation_has_no_second_look(tmp_path: Path) -> None:
    code, record = run_tests(tmp_path, {TEST_OF_SIMULATION: FAILS_ONCE})

    assert 1 == code
    assert [f"{TEST_OF_SIMULATION}::test_fails_once"] == record.failed


@pytest.mark.parametrize(
    "text",
    [
        "import os\n\ndef test_crashes():\n    os.kill(os.getpid(), 11)\n",
        "import os\n\ndef test_leaves():\n    os._exit(1)\n",
        "import os\n\ndef test_leaves_well():\n    os._exit(0)\n",
        "def test_is_stopped():\n    raise KeyboardInterrupt\n",
        "VALUE = 1\n",
        "this is no Python\n",
    ],
    ids=["crashed", "left with 1", "left with 0", "stopped", "no test", "no module"],
)
def test_a_process_that_does_not_come_to_its_end_fails_its_group_without_a_second_look(
    text: str, tmp_path: Path
) -> None:
    code, record = run_tests(tmp_path, {"test_a.py": text})

    assert 1 == code
    assert record.problem
    assert [] == record.unstable


def test_more_failed_tests_than_may_be_unstable_have_no_second_look() -> None:
    most = [f"test_a.py::test_{number}" for number in range(UNSTABLE_MAX)]

    assert "" == find_problem(1, most)
    assert "at most 5 tests may be unstable, got 6 that failed" == find_problem(1, [*most, "test_a.py::test_more"])


@pytest.mark.parametrize(("each", "passes"), [(2, True), (3, False)])
def test_unstable_tests_of_all_groups_together_are_bounded(each: int, passes: bool) -> None:  # noqa: FBT001 - a case
    records = [
        GroupRecord(group=group, seconds=1, unstable=[f"{group}::test_{at}" for at in range(each)], failed=[])
        for group in ("one", "two")
    ]
    words, passed = summarize(records)

    assert passes == passed
    assert "UNSTABLE two::test_0 (failed, and passed alone)" in words


def test_a_summary_of_no_group_does_not_pass() -> None:
    assert not summarize([])[1]


def test_the_summary_names_unstable_tests_in_its_last_lines_and_in_a_file(tmp_path: Path) -> None:
    run_tests(tmp_path, {"test_a.py": FAILS_ONCE, "test_b.py": PASSES})
    done = run_second_look(tmp_path, "--summary")

    assert 0 == done.returncode
    assert "UNSTABLE test_a.py::test_fails_once (failed, and passed alone)" == done.stdout.splitlines()[-1]
    assert "test_a.py::test_fails_once\n" == (tmp_path / ".tests/unstable.txt").read_text()
