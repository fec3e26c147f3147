"""Simulate seeds on a mutated copy of the project until one is violated: does the simulation see a defect?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_COPIED = ("serving", "tasks", "tests/simulation")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One text in one file, and what takes its place."""

    file: str
    old: str
    new: str


def find_violation(edits: tuple[Edit, ...], scratch: Path, *, seeds: int, first: int = 0) -> dict[str, object]:
    """Return what the simulation says of a copy that has been edited: the seed that failed, and its violations.

    Raises AssertionError where a text to replace is not there, once, and where no seed fails.
    """
    for folder in _COPIED:
        shutil.copytree(_ROOT / folder, scratch / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        file = scratch / edit.file
        text = file.read_text()
        assert 1 == text.count(edit.old), f"{edit.file} must hold {edit.old!r} once, to be mutated"
        file.write_text(text.replace(edit.old, edit.new))
    environment = {**os.environ, "PYTHONPATH": str(scratch)}
    command = [sys.executable, "-m", "tests.simulation.mutations", str(first), str(seeds)]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert found["violations"], f"no seed of {seeds} sees {edits}"
    return found


def main() -> None:
    """Print the first seed that is violated, as JSON."""
    from tests.simulation.simulate import simulate

    first, seeds = (int(argument) for argument in sys.argv[1:])
    for seed in range(first, first + seeds):
        outcome = simulate(seed)
        if outcome.violations:
            break
    print(json.dumps({"seed": seed, "violations": outcome.violations}))


if __name__ == "__main__":
    main()
