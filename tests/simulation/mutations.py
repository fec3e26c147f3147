"""Simulate seeds on a mutated copy of the project until one is violated: does the simulation see a defect?"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_TRIED_FIRST = 3
_COPIED = ("serving", "tasks", "tests/simulation")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One text in one file, and what takes its place."""

    file: str
    old: str
    new: str


def mutate(edits: tuple[Edit, ...], scratch: Path) -> None:
    """Copy the project to a folder, and edit the copy; raises AssertionError where a text is not there, once."""
    for folder in _COPIED:
        shutil.copytree(_ROOT / folder, scratch / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        file = scratch / edit.file
        text = file.read_text()
        assert 1 == text.count(edit.old), f"{edit.file} must hold {edit.old!r} once, to be mutated"
        file.write_text(text.replace(edit.old, edit.new))


def find_violation(edits: tuple[Edit, ...], scratch: Path, *, first: int, seeds: int, seen: str) -> str:
    """Return a violation with a text in it, of a copy that has been edited.

    A few seeds from the first on are tried, then all from 0 on: the first spares time, and decides nothing.

    Raises AssertionError where a text to replace is not there, and where no seed has such a violation.
    """
    mutate(edits, scratch)
    environment = {**os.environ, "PYTHONPATH": str(scratch)}
    command = [sys.executable, "-m", "tests.simulation.mutations", str(first), str(seeds), seen]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, f"no seed of {seeds} sees {edits}: {done.stdout} {done.stderr}"
    return done.stdout


def main() -> int:
    """Print the first violation that is looked for, and its seed; return 1 where there is none."""
    from tests.simulation.simulate import simulate

    first, seeds, seen = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for seed in itertools.chain(range(first, first + _TRIED_FIRST), range(seeds)):
        for violation in simulate(seed).violations:
            if seen in violation:
                print(f"seed {seed}: {violation}")
                return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
