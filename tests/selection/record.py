"""The last run of the whole suite that passed, which a change is measured against.

`make ci-whole` alone writes it. It counts only where its tree is that of an ancestor of what is tested.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

PATH = Path("tests/whole_run.json")
GROUPS_OF_SERVERS = ("deployments", "endpoints", "flows", "nights", "serving", "targets", "workers")
COMMITS_MAX = 15
DAYS_MAX = 7


class NoWholeRunError(Exception):
    """There is no record that a change can be measured against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """A run of the whole suite that passed.

    `tree` is what git calls the tree of the tested commit, `date` when it passed (UTC, ISO 8601). `seconds` are those
    of the clock, without the installation; `seconds_by_file` those of tests with servers or machines, by their file.
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


def list_changes(root: Path, commit: str) -> list[str]:
    """Return the files that differ between a commit and the work tree, new and removed ones among them."""
    changed = _ask_git(root, "diff", "--name-only", "--no-renames", commit)
    return sorted({*changed, *_ask_git(root, "ls-files", "--others", "--exclude-standard")})


def read_file_at(root: Path, commit: str, path: str) -> str:
    """Return the text of a file as a commit has it; nothing where it has none."""
    shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=root, capture_output=True, text=True, check=False)
    return shown.stdout


def write_whole_run(root: Path, groups: Sequence[Mapping[str, object]], seconds: float, now: datetime) -> Path:
    """Write the record of a whole run of HEAD, from what its groups of tests have left; return its path."""
    by_file: dict[str, float] = {}
    for group in groups:
        if group["group"] in GROUPS_OF_SERVERS:
            for path, spent in group["seconds_by_file"].items():  # type: ignore[attr-defined]
                by_file[path] = round(by_file.get(path, 0.0) + spent, 1)
    run = WholeRun(
        tree=_ask_git(root, "rev-parse", "HEAD^{tree}")[0],
        date=now.astimezone(UTC).isoformat(timespec="seconds"),
        processor=_name_processor(),
        seconds=round(seconds),
        processor_seconds=round(sum(float(str(group["processor_seconds"])) for group in groups)),
        tests=sum(int(str(group["tests"])) for group in groups),
        seconds_by_file=dict(sorted(by_file.items())),
    )
    (root / PATH).write_text(json.dumps(asdict(run), indent=1) + "\n")
    return root / PATH


def _ask_git(root: Path, *arguments: str) -> list[str]:
    asked = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if asked.returncode:
        message = f"git {arguments[0]} must answer here, got: {asked.stderr.strip()}"
        raise NoWholeRunError(message)
    return asked.stdout.splitlines()


def _name_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
