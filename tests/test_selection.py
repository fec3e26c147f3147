"""Which tests a change can reach: none that it may break is left out, and the whole suite is run where that is open."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.selection.choice import Choice, choose_tests, describe, has_new_release, narrow_paths
from tests.selection.graph import (
    Declarations,
    Graph,
    UnknownEdgeError,
    build_graph,
    is_named,
    read_declarations,
)
from tests.selection.record import (
    NoWholeRunError,
    WholeRun,
    find_commit,
    list_changes,
    read_whole_run,
    write_whole_run,
)
from tests.test_architecture import ROOT, list_tracked_files

NOW = datetime(2026, 12, 7, tzinfo=UTC)
# A product of two modules and a file of settings, a child that a test starts, and three files of tests.
GRAPH = Graph(
    {
        "tests/test_a.py": frozenset({"flows/a.py"}),
        "tests/test_b.py": frozenset({"tests/child.py"}),
        "tests/test_c.py": frozenset({"tests/test_c.py::server"}),
        "tests/test_c.py::server": frozenset({"tasks/settings.yaml"}),
        "tests/child.py": frozenset({"tasks/b.py"}),
        "flows/a.py": frozenset({"tasks/b.py"}),
    }
)
DECLARED = Declarations(edges=(), everything=("pyproject.toml",), nothing=("**.md",))
SECONDS = {"tests/test_a.py": 30.0, "tests/test_b.py": 10.0, "tests/test_c.py": 60.0}


def choose(*changed: str) -> Choice:
    return choose_tests(changed, GRAPH, DECLARED, SECONDS)


@functools.cache
def graph_of_checkout() -> Graph:
    return build_graph(ROOT, list_tracked_files(), read_declarations())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["flows/a.py"], {"tests/test_a.py"}),
        (["tasks/b.py"], {"tests/test_a.py", "tests/test_b.py"}),
        (["tests/child.py", "README.md"], {"tests/test_b.py"}),
        (["tasks/settings.yaml"], {"tests/test_c.py"}),
        (["docs/batch.md"], set()),
        ([], set()),
        (["tests/test_new.py"], {"tests/test_new.py"}),
    ],
)
def test_the_tests_that_need_a_changed_file_are_chosen(changed: list[str], expected: set[str]) -> None:
    choice = choose_tests(changed, GRAPH, DECLARED, SECONDS)

    assert ("", expected) == (choice.reason, set(choice.chains))


def test_the_shortest_chain_to_each_file_of_tests_is_told() -> None:
    choice = choose("tasks/b.py")

    assert ("tasks/b.py", "flows/a.py", "tests/test_a.py") == choice.chains["tests/test_a.py"]
    assert "tests/test_b.py <- tests/child.py <- tasks/b.py" in describe(choice, ["tasks/b.py"])
    assert 0.4 == pytest.approx(choice.share)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (["tasks/b.py", "pyproject.toml"], "pyproject.toml reaches every test"),
        (["tasks/b.py", "tasks/unknown.py"], "no test is known to need tasks/unknown.py"),
        (
            ["tasks/b.py", "tasks/settings.yaml"],
            "the change reaches 100% of the suite's seconds, and 60% is the most",
        ),
    ],
)
def test_the_whole_suite_is_run_with_the_reason(changed: list[str], reason: str) -> None:
    choice = choose(*changed)

    assert (reason, {}) == (choice.reason, choice.chains)
    assert f"The whole suite is run: {reason}." == describe(choice, changed)


@pytest.mark.parametrize(
    ("changed", "test"),
    [
        # By imports, also of a name that `flows` imports when it is first used.
        ("tasks/batch/plan.py", "tests/flows/test_batch.py"),
        ("flows/stream.py", "tests/flows/test_stream.py"),
        # By a process that the test starts: a script beside it, and a program of a package.
        ("tests/flows/kill_child.py", "tests/flows/test_batch_kills.py"),
        ("serving/gateway/__main__.py", "tests/serving/gateway/test_main.py"),
        ("serving/model/process_program.py", "tests/flows/test_environments.py"),
        # Triton's Python backend, the files of Envoy, of Prefect and of the cloud.
        ("serving/targets/triton_model.py", "tests/serving/targets/test_triton.py"),
        ("serving/targets/triton_tensors.py", "tests/serving/targets/test_triton.py"),
        ("deployments/prefect.yaml", "tests/deployments/test_prefect_yaml.py"),
        ("infra/aws/template.yaml", "tests/infra/aws/test_template.py"),
        # By a fixture of a conftest.py, by an entry point, and by the wheel.
        ("infra/local/nats.py", "tests/flows/test_stream.py"),
        ("tasks/common/blocks.py", "tests/deployments/test_form.py"),
        ("infra/aws/capacity.py", "tests/deployments/test_nightly_machines.py"),
        ("serving/py.typed", "tests/deployments/command_line/test_wheel.py"),
        ("docs/recipes/tables.md", "tests/deployments/test_recipe_pages.py"),
        ("tests/flows/conftest.py", "tests/flows/test_batch_lakes.py"),
    ],
)
def test_what_a_test_needs_in_this_checkout_reaches_it(changed: str, test: str) -> None:
    assert test in graph_of_checkout().find_chains([changed])


@pytest.mark.parametrize(
    ("changed", "test"),
    [
        ("infra/local/nats.py", "tests/flows/test_gate.py"),
        ("serving/gateway/store.py", "tests/flows/test_stream_kills.py"),
        ("tasks/batch/gate.py", "tests/serving/gateway/test_main.py"),
        # Messages name pages that a user should read, and no test of a run reads them.
        ("docs/gate.md", "tests/flows/test_gate.py"),
    ],
)
def test_what_a_test_does_not_need_does_not_reach_it(changed: str, test: str) -> None:
    assert test not in graph_of_checkout().find_chains([changed])


def test_every_module_of_the_product_reaches_a_test_or_is_declared_to_reach_none() -> None:
    graph = graph_of_checkout()
    lost = [
        path
        for path in list_tracked_files()
        if not any("/test_" in node or node.startswith("tests/test_") for node in graph.find_chains([path]))
        and not is_named(path, [*read_declarations().everything, *read_declarations().nothing])
    ]

    assert [] == lost


@pytest.mark.parametrize(
    "edge", [(("tests/test_gone.py",), ("flows/batch.py",)), (("flows/batch.py",), ("infra/gone.yaml",))]
)
def test_a_declared_edge_that_names_no_file_is_refused(edge: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    declared = dataclasses.replace(DECLARED, edges=(edge,))

    with pytest.raises(UnknownEdgeError, match="gone"):
        build_graph(ROOT, ["flows/batch.py"], declared)


def test_a_declaration_without_a_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "edges.toml").write_text('[[nothing]]\nfiles = "LICENSE"\n')

    with pytest.raises(UnknownEdgeError, match="must have a reason"):
        read_declarations(tmp_path / "edges.toml")


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
    """A git checkout of one commit, with one file."""
    ask_git(tmp_path, "init", "--quiet")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("")
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
    group = {"tests": 2, "processor_seconds": 3.4}
    groups = [
        {**group, "group": "flows", "seconds_by_file": {"tests/test_a.py": 1.5}},
        {**group, "group": "targets", "seconds_by_file": {"tests/test_a.py": 2.0}},
        {**group, "group": "rest", "seconds_by_file": {"tests/test_values.py": 9.0}},
    ]
    write_whole_run(folder, groups, 12.3, NOW)
    return read_whole_run(folder)


def test_a_change_is_measured_against_the_ancestor_that_passed(checkout: Path) -> None:
    passed = ask_git(checkout, "rev-parse", "HEAD")
    run = record(checkout)
    (checkout / "new.py").write_text("")
    commit(checkout)
    (checkout / "tests/test_a.py").unlink()
    (checkout / "untracked.py").write_text("")

    assert ({"tests/test_a.py": 3.5}, 6, 10, 12) == (
        run.seconds_by_file,
        run.tests,
        run.processor_seconds,
        run.seconds,
    )
    assert passed == find_commit(checkout, run, NOW)
    assert ["new.py", "tests/test_a.py", "tests/whole_run.json", "untracked.py"] == list_changes(checkout, passed)


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
