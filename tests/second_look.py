"""Runs a group of tests, and each of those that fail once more, alone, in a new process with servers of its own.

    python -m tests.second_look GROUP [--chosen=FILE] [OPTIONS OF PYTEST] -- PATHS
    python -m tests.second_look --summary

With `--chosen`, a group runs those of its tests alone that lie in the files of tests which FILE lists.

A test that passes the second time is unstable: its group passes, and the summary names it. A group fails where a test
fails twice, where pytest ends by anything but failed tests, and where more tests fail than may be unstable. Tests of
the simulation have no second look: they use no clock, so a seed that fails once has found a defect.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from tests.selection.choice import narrow_paths

RECORDS = Path(".tests")
UNSTABLE_MAX = 5
_OPTION = "--test-report"
_CHOSEN = "--chosen="
_NO_TESTS = 5
_WITHOUT_SECOND_LOOK = "tests/simulation/"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """How a group of tests ended: by name the tests that failed once, and those that failed for good.

    `seconds` are those of the clock, `processor_seconds` those of its processes that have ended. `problem` says what
    ended the group where that was no failed test. `tests` is how many were run, and `seconds_by_file` how long those of
    each file took.
    """

    group: str
    seconds: float
    unstable: list[str]
    failed: list[str]
    problem: str = ""
    processor_seconds: float = 0.0
    tests: int = 0
    seconds_by_file: dict[str, float] = field(default_factory=dict)


def run_group(
    group: str, options: Sequence[str], paths: Sequence[str], chosen: Sequence[str] | None = None
) -> GroupRecord:
    """Run a group of tests in the current folder, and look twice at those that fail.

    Args:
        group: Its name.
        options: Those of pytest, for both looks.
        paths: What is collected: files, folders and `--ignore=` of some of them.
        chosen: The files of tests that are run, of those that are collected; by default all.

    Returns:
        What is kept of it in `.tests/GROUP.json` too.
    """
    RECORDS.mkdir(exist_ok=True)
    report, start = RECORDS / f"{group}.report", time.monotonic()
    report.unlink(missing_ok=True)
    if chosen is not None:
        paths = narrow_paths(paths, chosen)
    if not paths:
        return _keep(GroupRecord(group=group, seconds=0.0, unstable=[], failed=[]))
    code = _run_pytest([f"{_OPTION}={report}", *options, *paths])
    told = json.loads(report.read_text()) if report.exists() else None
    if chosen is not None and code == _NO_TESTS:
        # The files have other tests than those of this group.
        code = 0
    failed = told["failed"] if told else None
    problem = find_problem(code, failed)
    unstable = [] if problem else [test for test in failed or [] if _passes_alone(test, options)]
    record = GroupRecord(
        group=group,
        seconds=round(time.monotonic() - start, 1),
        unstable=unstable,
        failed=[test for test in failed or [] if test not in unstable],
        problem=problem,
        processor_seconds=_count_processor_seconds(),
        tests=told["tests"] if told else 0,
        seconds_by_file=told["seconds_by_file"] if told else {},
    )
    return _keep(record)


def _keep(record: GroupRecord) -> GroupRecord:
    (RECORDS / f"{record.group}.json").write_text(json.dumps(asdict(record), indent=1))
    return record


def find_problem(code: int, failed: Sequence[str] | None) -> str:
    """Return why a second look can't tell anything, in words; nothing where it can, or where all tests passed.

    Args:
        code: The exit code of pytest; negative where a signal has ended it.
        failed: The tests that failed; None where pytest did not come to its end.
    """
    if code not in (0, 1):
        return f"pytest must end with 0 or 1, got {code}: it crashed, was stopped or found no test"
    if failed is None or (code == 1 and not failed):
        return f"pytest must name the tests that failed, got none at exit code {code}: it did not come to its end"
    if len(failed) > UNSTABLE_MAX:
        return f"at most {UNSTABLE_MAX} tests may be unstable, got {len(failed)} that failed"
    return ""


def summarize(records: Sequence[GroupRecord]) -> tuple[str, bool]:
    """Return what is said of all groups at the end, and whether they pass."""
    unstable = [test for record in records for test in record.unstable]
    lines = ["", "seconds  of processor  unstable  failed  group"]
    lines += [
        f"{each.seconds:7.0f}{each.processor_seconds:14.0f}{len(each.unstable):10}{len(each.failed):8}  {each.group}"
        for each in records
    ]
    for record in records:
        lines += [f"{record.group}: {record.problem}."] if record.problem else []
        lines += [f"FAILED {test}" for test in record.failed]
    lines += [f"UNSTABLE {test} (failed, and passed alone)" for test in unstable]
    if len(unstable) > UNSTABLE_MAX:
        lines.append(f"At most {UNSTABLE_MAX} tests may be unstable, got {len(unstable)}. Find out why, each of them.")
    passed = bool(records) and len(unstable) <= UNSTABLE_MAX
    return "\n".join(lines), passed and not any(record.problem or record.failed for record in records)


@dataclass(slots=True)
class _Report:
    """What pytest's process tells at its end: the tests that failed, how many there were, and seconds by file."""

    failed: list[str] = field(default_factory=list)
    tests: int = 0
    seconds_by_file: dict[str, float] = field(default_factory=dict)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let pytest, which loads this module as a plugin, take the file for what it tells of the tests."""
    parser.addoption(_OPTION, type=Path, help="the file for what is told of the tests, written at the end")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a test and its seconds, and keep its name where it failed in its body, set-up or tear-down."""
    path = report.nodeid.partition("::")[0]
    _here.seconds_by_file[path] = round(_here.seconds_by_file.get(path, 0.0) + report.duration, 3)
    _here.tests += report.when == "call"
    if report.failed and report.nodeid not in _here.failed:
        _here.failed.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what is told of the tests: where there is no file, pytest did not come so far."""
    if path := session.config.getoption(_OPTION):
        path.write_text(json.dumps(asdict(_here), indent=1))


_here = _Report()


def _run_pytest(arguments: Sequence[str]) -> int:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.selection.plugin", "-p", "tests.second_look", *arguments],
        check=False,
    ).returncode


def _count_processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(used.ru_utime + used.ru_stime, 1)


def _passes_alone(test: str, options: Sequence[str]) -> bool:
    if test.startswith(_WITHOUT_SECOND_LOOK):
        return False
    print(f"A second look at {test}", flush=True)
    return _run_pytest([*options, test]) == 0


def main(arguments: Sequence[str]) -> int:
    """Run a group, or print the summary of all that were run; return the exit code."""
    if list(arguments) == ["--summary"]:
        records = [GroupRecord(**json.loads(path.read_text())) for path in sorted(RECORDS.glob("*.json"))]
        words, passed = summarize(records)
        print(words)
        unstable = [test for record in records for test in record.unstable]
        (RECORDS / "unstable.txt").write_text("".join(f"{test}\n" for test in unstable))
        return int(not passed)
    group, *rest = arguments
    split = rest.index("--")
    options, paths = rest[:split], rest[split + 1 :]
    chosen = next((each.removeprefix(_CHOSEN) for each in options if each.startswith(_CHOSEN)), None)
    record = run_group(
        group,
        [each for each in options if not each.startswith(_CHOSEN)],
        paths,
        None if chosen is None else Path(chosen).read_text().splitlines(),
    )
    words, passed = summarize([record])
    print(words, flush=True)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
