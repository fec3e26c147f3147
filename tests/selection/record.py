"""The last run of the whole suite that passed, which a change is measured against.

`make ci-whole` alone writes it. It counts only where its tree is that of an ancestor of what is tested.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from serving.machine import describe_machine
from tests.selection.observer import FOLDER, LOG
from tests.selection.reads import Declarations, fold_reads, is_named, is_test_file, read_log, read_reads, write_reads

PATH = Path("tests/whole_run.json")
READS = Path("tests/reads.json")
GROUPS_OF_SERVERS = ("deployments", "endpoints", "flows", "nights", "serving", "targets", "workers")
COMMITS_MAX = 15
DAYS_MAX = 7


class NoWholeRunError(Exception):
    """There is no record that a change can be measured against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """A run of the whole suite that passed.

    `tree` is what git calls the tree of the tested commit, `date` when it passed (UTC, ISO 8601). `seconds` are those
    of the clock, with the installation; `seconds_by_file` those of tests with servers or machines, by their file.
    """

    tree: str
    date: str
    processor: str
    seconds: float
    processor_seconds: float
    tests: int
    seconds_by_file: Mapping[str, float]


def read_whole_run(root: Path) -> WholeRun:
    """Read the record of a checkout.

    Raises:
        NoWholeRunError: There is none, or it can't be read.
    """
    try:
        return WholeRun(**json.loads((root / PATH).read_text()))
    except FileNotFoundError:
        message = f"there is no {PATH} yet"
    except (ValueError, TypeError) as error:
        message = f"{PATH} can't be read ({error})"
    raise NoWholeRunError(message)


def read_readers(root: Path) -> dict[str, list[str]]:
    """Return for each file those files of tests with servers or machines that read it in that run.

    A file that only tests of values have read has none.

    Raises:
        NoWholeRunError: There is no record, or it can't be read.
    """
    try:
        return read_reads(root / READS)
    except FileNotFoundError:
        message = f"there is no {READS} yet"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        message = f"{READS} can't be read ({error!r})"
    raise NoWholeRunError(message)


def find_commit(root: Path, run: WholeRun, now: datetime) -> str:
    """Return the newest ancestor of HEAD, or HEAD itself, whose tree passed.

    Raises:
        NoWholeRunError: No ancestor has that tree, or the run is too old: more than 15 commits, or 7 days.
    """
    listed = _ask_git(root, "log", "--format=%H %T", f"--max-count={COMMITS_MAX + 1}", "HEAD")
    commits = [line.split()[0] for line in listed if line.split()[1] == run.tree]
    if not commits:
        message = f"the tree of {PATH}, {run.tree[:12]}, is that of none of the last {COMMITS_MAX} commits"
        raise NoWholeRunError(message)
    if (age := now - datetime.fromisoformat(run.date)).days >= DAYS_MAX:
        message = f"the last whole run was {age.days} days ago, and {DAYS_MAX} is the most"
        raise NoWholeRunError(message)
    return commits[0]


def list_changes(root: Path, commit: str) -> tuple[list[str], list[str]]:
    """Return the files that differ between a commit and the work tree, and which of them are new or removed."""
    kinds = [line.split("\t") for line in _ask_git(root, "diff", "--name-status", "--no-renames", commit)]
    unknown = _ask_git(root, "ls-files", "--others", "--exclude-standard")
    changed = {*unknown, *(path for _, path in kinds)}
    return sorted(changed), sorted({*unknown, *(path for kind, path in kinds if kind in ("A", "D"))})


def list_files(root: Path) -> list[str]:
    """Return the files of a checkout that git knows, by their paths from its root."""
    return [path for path in _ask_git(root, "ls-files") if (root / path).is_file()]


def read_file_at(root: Path, commit: str, path: str) -> str:
    """Return the text of a file as a commit has it; nothing where it has none."""
    shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=root, capture_output=True, text=True, check=False)
    return shown.stdout


def write_whole_run(
    root: Path, groups: Sequence[Mapping[str, object]], seconds: float, now: datetime, declarations: Declarations
) -> list[str]:
    """Write the record of a whole run of HEAD, from what its groups of tests and their observers have left.

    Returns:
        Files of the product and its tests that no test has read, and that are not declared: a change of one has the
        whole suite run.

    Raises:
        UnknownFileError: A declaration names no file.
    """
    by_file: dict[str, float] = {}
    for group in groups:
        if group["group"] in GROUPS_OF_SERVERS:
            for path, spent in group["seconds_by_file"].items():  # type: ignore[attr-defined]
                by_file[path] = round(by_file.get(path, 0.0) + spent, 1)
    run = WholeRun(
        tree=_ask_git(root, "rev-parse", "HEAD^{tree}")[0],
        date=now.astimezone(UTC).isoformat(timespec="seconds"),
        processor=describe_machine(),
        seconds=round(seconds),
        processor_seconds=round(sum(float(str(group["processor_seconds"])) for group in groups)),
        tests=sum(int(str(group["tests"])) for group in groups),
        seconds_by_file=dict(sorted(by_file.items())),
    )
    files = list_files(root)
    tests = [path for path in files if is_test_file(path)]
    readers = fold_reads(read_log(root / FOLDER / LOG), tests, files, declarations)
    (root / PATH).write_text(json.dumps(asdict(run), indent=1) + "\n")
    write_reads(root / READS, readers, list(run.seconds_by_file))
    declared = [*declarations.everything, *declarations.nothing]
    return [path for path in files if path not in readers and not is_named(path, declared)]


def _ask_git(root: Path, *arguments: str) -> list[str]:
    asked = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if asked.returncode:
        message = f"git {arguments[0]} must answer here, got: {asked.stderr.strip()}"
        raise NoWholeRunError(message)
    return asked.stdout.splitlines()
