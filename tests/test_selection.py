"""Which tests a change can reach: none that it may break is left out, and the whole suite is run where that is open."""

from __future__ import annotations

import dataclasses
import subprocess
import sysconfig
import venv
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.child_environment import add_folder
from tests.selection.__main__ import choose_for_checkout
from tests.selection.choice import Choice, choose_tests, describe, has_new_release, narrow_paths
from tests.selection.observer import FOLDER, LOG
from tests.selection.reads import (
    Declarations,
    UnknownFileError,
    fold_reads,
    is_named,
    read_declarations,
    read_log,
    read_reads,
    write_reads,
)
from tests.selection.record import (
    NoWholeRunError,
    WholeRun,
    find_commit,
    list_changes,
    read_readers,
    read_whole_run,
    write_whole_run,
)
from tests.test_architecture import ROOT, list_tracked_files

NOW = datetime(2026, 12, 7, tzinfo=UTC)
A, B, C = "tests/test_a.py", "tests/test_b.py", "tests/test_c.py"
READERS = {
    A: [A],
    B: [B],
    C: [C],
    "flows/a.py": [A],
    "tasks/b.py": [A, B],
    "tasks/settings.yaml": [C],
    "tasks/": [B],
    "docs/values.md": [],
}
DECLARED = Declarations(reads=(), everything=("pyproject.toml",), nothing=("**.md",))
SECONDS = {A: 20.0, B: 10.0, C: 70.0}


def choose(*changed: str, unknown: tuple[str, ...] = ()) -> Choice:
    return choose_tests([*changed, *unknown], unknown, READERS, DECLARED, SECONDS)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["flows/a.py"], {A}),
        (["tasks/b.py"], {A, B}),
        (["tasks/settings.yaml"], {C}),
        (["docs/batch.md", "docs/values.md"], set()),
        ([], set()),
        ([B], {B}),
    ],
)
def test_the_tests_that_read_a_changed_file_are_chosen(changed: list[str], expected: set[str]) -> None:
    choice = choose(*changed)

    assert ("", expected) == (choice.reason, set(choice.causes))


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        # Nobody read it: who imports it is changed too.
        ("flows/new.py", set()),
        # Who lists a folder finds it there.
        ("tasks/new.py", {B}),
        # One that was removed was read.
        ("flows/a.py", {A}),
        ("tests/test_new.py", {"tests/test_new.py"}),
        ("tests/deep/conftest.py", {"tests/deep/test_d.py"}),
    ],
)
def test_a_new_file_reaches_who_lists_its_folder_and_a_removed_one_who_read_it(
    unknown: str, expected: set[str]
) -> None:
    choice = choose_tests([unknown], [unknown], READERS, DECLARED, {**SECONDS, "tests/deep/test_d.py": 1.0})

    assert ("", expected) == (choice.reason, set(choice.causes))


def test_a_changed_file_that_each_chosen_one_reads_is_told() -> None:
    choice = choose("tasks/b.py")

    assert {A: "tasks/b.py", B: "tasks/b.py"} == choice.causes
    assert f"  {B} reads tasks/b.py" in describe(choice, ["tasks/b.py"]).splitlines()
    assert 0.3 == pytest.approx(choice.share)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (["tasks/b.py", "pyproject.toml"], "pyproject.toml reaches every test"),
        (["tasks/b.py", "tasks/unread.py"], "no test is known to read tasks/unread.py"),
        (
            ["tasks/b.py", "tasks/settings.yaml"],
            "the change reaches 100% of the suite's seconds, and 90% is the most",
        ),
    ],
)
def test_the_whole_suite_is_run_with_the_reason(changed: list[str], reason: str) -> None:
    choice = choose(*changed)

    assert (reason, {}) == (choice.reason, choice.causes)
    assert f"The whole suite is run: {reason}." == describe(choice, changed)


def test_who_needs_a_file_is_found_through_modules_fixtures_conftests_and_declarations() -> None:
    noted = [
        (A, "flows/a.py"),
        ("flows/a.py", "tasks/b.py"),
        # Modules that import each other.
        ("tasks/b.py", "flows/a.py"),
        (B, "tests@server"),
        (C, "tests@server"),
        ("tests@server", "tasks/settings.yaml"),
        ("tests/conftest.py", "tests/servers.py"),
        (C, "tasks/"),
        (C, "tasks/written_by_a_test.txt"),
        # What pytest itself has read before it began with a file of tests.
        ("pytest", "flows/unread.py"),
    ]
    files = ["flows/a.py", "flows/unread.py", "tasks/b.py", "tasks/settings.yaml", "tasks/program.lua"]
    files += [A, B, C, "tests/conftest.py", "tests/servers.py"]
    declared = dataclasses.replace(DECLARED, reads=((("tasks/b.py",), ("tasks/*.lua",)),))

    assert {
        "flows/a.py": [A],
        "tasks/": [C],
        "tasks/b.py": [A],
        "tasks/program.lua": [A],
        "tasks/settings.yaml": [B, C],
        A: [A],
        B: [B],
        C: [C],
        "tests/conftest.py": [A, B, C],
        "tests/servers.py": [A, B, C],
    } == fold_reads(noted, [A, B, C], files, declared)


@pytest.mark.parametrize(
    "reads", [(("tests/test_gone.py",), ("flows/batch.py",)), (("flows/batch.py",), ("infra/gone.yaml",))]
)
def test_a_declaration_that_names_no_file_is_refused(reads: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    with pytest.raises(UnknownFileError, match="gone"):
        fold_reads([], [], ["flows/batch.py"], dataclasses.replace(DECLARED, reads=(reads,)))


def test_what_this_project_declares_names_its_files() -> None:
    assert {} == fold_reads([], [], list_tracked_files(), read_declarations())


@given(st.lists(st.integers(0, 30), unique=True))
def test_readers_are_written_and_read_back(tmp_path_factory: pytest.TempPathFactory, numbers: list[int]) -> None:
    tests = [f"tests/test_{number}.py" for number in range(31)]
    path = tmp_path_factory.mktemp("record") / "reads.json"
    readers = {"flows/a.py": [tests[number] for number in sorted(numbers)], "flows/b.py": ["tests/test_values.py"]}

    write_reads(path, readers, tests)

    assert {**readers, "flows/b.py": []} == read_reads(path)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment of its own, with the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin/python"


@pytest.fixture
def project(python: Path, tmp_path: Path) -> Path:
    """A folder whose processes are observed, where they are run by that Python."""
    files = {
        "data.txt": "",
        "given.txt": "",
        "folder/inside.txt": "",
        "flows/__init__.py": LAZY_PACKAGE,
        "flows/a.py": "",
        "flows/b.py": "import tasks.c\n",
        "flows/lazy.py": "def run(): pass\n",
        "tasks/__init__.py": "",
        "tasks/c.py": "",
        "tasks/kept.py": KEEPING_MODULE,
        "tests/conftest.py": CONFTEST,
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    code = f"from tests.selection.observer import install; install({str(tmp_path)!r})"
    subprocess.run([python, "-c", code], cwd=ROOT, check=True)
    return tmp_path


LAZY_PACKAGE = """
from importlib import import_module
_MODULE_BY_NAME = {"run": "flows.lazy"}
def __getattr__(name):
    if name not in _MODULE_BY_NAME:
        raise AttributeError(name)
    globals()[name] = getattr(import_module(_MODULE_BY_NAME[name]), name)
    return globals()[name]
"""
KEEPING_MODULE = """
import functools, pathlib
@functools.cache
def read(): return pathlib.Path("given.txt").read_text()
"""
CONFTEST = """
import pathlib, pytest
@pytest.fixture(scope="session")
def shared():
    import flows.a
    return pathlib.Path("data.txt").read_text()
"""
# In Python 3.11 a child without variables finds its packages by the path of its program.
CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], env={environment}, check=True)"


def run_observed(python: Path, project: Path, *arguments: str, environment: dict[str, str]) -> list[tuple[str, str]]:
    """Run Python in the project, and return what was noted of its files for a file of tests."""
    given = {"PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run([python, *arguments], cwd=project, env=given, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    return read_log(project / FOLDER / LOG)


def for_tests(project: Path) -> dict[str, str]:
    """The variables of a process that works for a file of tests."""
    return {"PYTHONPATH": f"{project / FOLDER}/{A}"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open('data.txt')", {"data.txt"}),
        ("import os; os.open('folder/../data.txt', os.O_RDONLY)", {"data.txt"}),
        ("import pathlib; list(pathlib.Path('folder').iterdir())", {"folder/"}),
        ("import os; os.symlink(os.path.abspath('data.txt'), f'folder/{os.getpid()}')", {"data.txt"}),
        # The first time from its source, which leaves the bytecode that the second process opens.
        ("import tasks.c", {"tasks/c.py"}),
        (CHILD.format(code="import tasks.c", environment="None"), {"tasks/c.py"}),
        ("import subprocess; subprocess.run(['cat', 'data.txt'])", {"data.txt"}),
        (CHILD.format(code="open('data.txt')", environment="None"), {"data.txt"}),
        (CHILD.format(code="open('data.txt')", environment="{}"), {"data.txt"}),
        # Files of other folders, and names that are none.
        ("open('given.txt'); open('/dev/null'); open(0)", {"given.txt"}),
        ("open('given.txt'); import subprocess; subprocess.run(['true', 'none.txt'])", {"given.txt"}),
    ],
)
def test_what_a_process_and_its_children_read_is_noted(
    code: str, expected: set[str], python: Path, project: Path
) -> None:
    (project / "tasks/__pycache__").mkdir()
    for _ in range(2):
        noted = run_observed(python, project, "-c", code, environment=for_tests(project))

    known = {"data.txt", "given.txt", "folder/", "tasks/c.py"}
    assert {(A, path) for path in expected} == {(reader, read) for reader, read in noted if read in known}


def test_nothing_is_noted_where_no_reads_are_asked_for(python: Path, project: Path) -> None:
    (project / FOLDER).rmdir()

    subprocess.run([python, "-c", "open('data.txt')"], cwd=project, env=for_tests(project), check=True)

    assert not (project / ".tests/reads").exists()


def test_each_file_of_tests_has_what_it_imports_uses_and_starts(python: Path, project: Path) -> None:
    (project / A).write_text("""
import tasks.kept, flows
def test(shared): tasks.kept.read(); flows.run()
""")
    (project / B).write_text("""
import subprocess, sys, flows.b
def test(shared): subprocess.run([sys.executable, "-c", "open('folder/inside.txt')"], check=True)
""")
    (project / C).write_text("""
def test():
    import tasks.kept, flows
    tasks.kept.read(), flows.run()
""")
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.selection.plugin", "tests"]
    noted = run_observed(python, project, *arguments, environment=add_folder(project, {"PYTHONPATH": str(ROOT)}))
    files = ["data.txt", "given.txt", "folder/inside.txt"]
    files += ["flows/a.py", "flows/b.py", "flows/lazy.py", "tasks/c.py", "tasks/kept.py"]

    assert {
        # By a fixture that two share, which was set up for the first.
        "data.txt": [A, B],
        "flows/a.py": [A, B],
        # At the top of a file, and of a module that it imports.
        "flows/b.py": [B],
        "tasks/c.py": [B],
        # By a process.
        "folder/inside.txt": [B],
        # Within a test, where the modules are there already; and what the first of them keeps.
        "tasks/kept.py": [A, C],
        "flows/lazy.py": [A, C],
        "given.txt": [A, C],
    } == fold_reads(noted, [A, B, C], files, DECLARED)


def test_a_declaration_without_a_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unseen.toml").write_text('[[nothing]]\nfiles = "LICENSE"\n')

    with pytest.raises(UnknownFileError, match="must have a reason"):
        read_declarations(tmp_path / "unseen.toml")


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("serving/*.py", "serving/errors.py", True),
        ("serving/*.py", "serving/model/pin.py", False),
        ("serving/**", "serving/model/pin.py", True),
        ("**.md", "docs/batch.md", True),
        ("Makefile", "docs/Makefile", False),
    ],
)
def test_one_star_stands_for_no_slash(pattern: str, path: str, expected: bool) -> None:  # noqa: FBT001 - a case
    assert expected == is_named(path, [pattern])


@pytest.mark.parametrize(
    ("now", "expected"),
    [("## Unreleased\n", False), ("## Unreleased\n## 0.2.0 (2026)\n## 0.1.0\n", True), ("## 0.1.0\n", False)],
)
def test_a_new_release_of_the_changelog_is_seen(now: str, expected: bool) -> None:  # noqa: FBT001 - a case
    assert expected == has_new_release("## Unreleased\n## 0.1.0\n", now)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["tests"], ["tests/flows/test_a.py", "tests/test_b.py"]),
        (["tests", "--ignore=tests/flows"], ["tests/test_b.py"]),
        (["tests/flows", "tests/test_c.py"], ["tests/flows/test_a.py"]),
        (["tests/infra"], []),
    ],
)
def test_a_group_is_narrowed_to_chosen_files(paths: list[str], expected: list[str]) -> None:
    assert expected == narrow_paths(paths, ["tests/test_b.py", "tests/flows/test_a.py"])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout of one commit, with a file of tests and what this has read, and a file that no test has."""
    ask_git(tmp_path, "init", "--quiet")
    for path in (A, B, "flows/a.py", "flows/unread.py", "CHANGELOG.md", ".gitignore"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(".tests/\n" if path == ".gitignore" else "")
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / LOG).write_text(f"{A}\tflows/a.py\n")
    commit(tmp_path)
    return tmp_path


def ask_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(folder: Path) -> str:
    ask_git(folder, "add", "--all")
    ask_git(folder, "commit", "--quiet", "--allow-empty", "--message", "A change")
    return ask_git(folder, "rev-parse", "HEAD")


def record(folder: Path) -> WholeRun:
    """Write the record of a whole run of HEAD, and read it."""
    declared = dataclasses.replace(read_declarations(), reads=())
    group = {"tests": 2, "processor_seconds": 3.4}
    groups = [
        {**group, "group": "flows", "seconds_by_file": {A: 1.5}},
        {**group, "group": "targets", "seconds_by_file": {A: 2.0, B: 4.0}},
        {**group, "group": "rest", "seconds_by_file": {"tests/test_values.py": 9.0}},
    ]
    assert ["flows/unread.py"] == write_whole_run(folder, groups, 12.3, NOW, declared)
    return read_whole_run(folder)


def test_a_change_is_measured_against_the_ancestor_that_passed(checkout: Path) -> None:
    passed = ask_git(checkout, "rev-parse", "HEAD")
    run = record(checkout)
    (checkout / "new.py").write_text("")
    commit(checkout)
    (checkout / A).unlink()
    (checkout / "flows/a.py").write_text("changed = True")
    (checkout / "untracked.py").write_text("")

    assert ({A: 3.5, B: 4.0}, 6, 10, 12) == (
        run.seconds_by_file,
        run.tests,
        run.processor_seconds,
        run.seconds,
    )
    assert passed == find_commit(checkout, run, NOW)
    changed, unknown = list_changes(checkout, passed)
    assert ["flows/a.py", "new.py", "tests/reads.json", A, "tests/whole_run.json", "untracked.py"] == changed
    assert ["new.py", "tests/reads.json", A, "tests/whole_run.json", "untracked.py"] == unknown


def test_a_record_of_another_tree_counts_for_nothing(checkout: Path) -> None:
    run = dataclasses.replace(record(checkout), tree="0" * 40)

    with pytest.raises(NoWholeRunError, match=r"the tree of tests/whole_run.json, 0+, is that of none"):
        find_commit(checkout, run, NOW)


def test_a_record_counts_for_15_commits_and_7_days(checkout: Path) -> None:
    run = record(checkout)
    for _ in range(15):
        commit(checkout)
    find_commit(checkout, run, NOW + timedelta(days=6, hours=23))

    with pytest.raises(NoWholeRunError, match="the last whole run was 7 days ago"):
        find_commit(checkout, run, NOW + timedelta(days=7))
    commit(checkout)
    with pytest.raises(NoWholeRunError, match="none of the last 15 commits"):
        find_commit(checkout, run, NOW)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("flows/a.py", "changed = True", {A}),
        ("flows/new.py", "", set()),
        ("flows/unread.py", "changed = True", "no test is known to read flows/unread.py"),
        ("CHANGELOG.md", "## 0.1.0\n", "CHANGELOG.md has a new release"),
        ("tests/whole_run.json", "no JSON", "tests/whole_run.json can't be read"),
        ("tests/reads.json", None, "there is no tests/reads.json yet"),
    ],
)
def test_a_checkout_has_its_choice(path: str, text: str | None, expected: set[str] | str, checkout: Path) -> None:
    record(checkout)
    commit(checkout)
    if text is None:
        (checkout / path).unlink()
    else:
        (checkout / path).write_text(text)

    choice, _ = choose_for_checkout(checkout, NOW)

    assert choice.reason.startswith(expected) if isinstance(expected, str) else expected == set(choice.causes)


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"tests": [], "readers": {"flows/a.py": "0"}}'])
def test_reads_that_are_missing_or_damaged_are_none(text: str | None, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    if text is not None:
        (tmp_path / "tests/reads.json").write_text(text)

    with pytest.raises(NoWholeRunError, match=r"tests/reads.json"):
        read_readers(tmp_path)


@pytest.mark.parametrize("text", [None, "no JSON", '{"tree": "0"}'])
def test_a_record_that_is_missing_or_damaged_is_none(text: str | None, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    if text is not None:
        (tmp_path / "tests/whole_run.json").write_text(text)

    with pytest.raises(NoWholeRunError, match=r"tests/whole_run.json"):
        read_whole_run(tmp_path)


def test_without_git_there_is_nothing_to_measure_against(tmp_path: Path) -> None:
    run = WholeRun(
        tree="0", date=NOW.isoformat(), processor="", seconds=1, processor_seconds=1, tests=1, seconds_by_file={}
    )

    with pytest.raises(NoWholeRunError, match="git log must answer here"):
        find_commit(tmp_path, run, NOW)
