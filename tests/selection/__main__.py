"""Prints which tests CI would run for this checkout, and why.

python -m tests.selection [--whole] [--write FILE]
    the choice; with --whole it is all tests, and each process of these is observed from then on. FILE gets the chosen
    files, and is not made where all are run
python -m tests.selection --record SECONDS
    after a whole run that passed: writes tests/whole_run.json and tests/reads.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.selection.choice import Choice, choose_tests, describe, has_new_release
from tests.selection.observer import install
from tests.selection.reads import UnknownFileError, read_declarations
from tests.selection.record import (
    NoWholeRunError,
    find_commit,
    list_changes,
    read_file_at,
    read_readers,
    read_whole_run,
    write_whole_run,
)

ROOT = Path(__file__).parents[2]
CHANGELOG = "CHANGELOG.md"


def choose_for_checkout(root: Path, now: datetime) -> tuple[Choice, list[str]]:
    """Return the choice for a checkout, and the files that it has changed since the last whole run."""
    try:
        run = read_whole_run(root)
        commit = find_commit(root, run, now)
        changed, unknown = list_changes(root, commit)
        if has_new_release(read_file_at(root, commit, CHANGELOG), (root / CHANGELOG).read_text()):
            return Choice(reason=f"{CHANGELOG} has a new release"), changed
        readers, declarations = read_readers(root), read_declarations()
    except (NoWholeRunError, UnknownFileError) as error:
        return Choice(reason=str(error)), []
    return choose_tests(changed, unknown, readers, declarations, run.seconds_by_file), changed


def main(arguments: Sequence[str]) -> int:
    """Print the choice, or write the record of a whole run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--record", type=float, metavar="SECONDS")
    options = parser.parse_args(arguments)
    if options.record is not None:
        groups = [json.loads(path.read_text()) for path in sorted((ROOT / ".tests").glob("*.json"))]
        for path in write_whole_run(ROOT, groups, options.record, datetime.now(UTC), read_declarations()):
            print(f"No test has read {path}: a change of it has the whole suite run.")
        return 0
    if options.whole:
        install(str(ROOT))
        choice, changed = Choice(reason="it was asked for"), []
    else:
        choice, changed = choose_for_checkout(ROOT, datetime.now(UTC))
    print(describe(choice, changed), flush=True)
    if options.write is not None and not choice.reason:
        options.write.parent.mkdir(exist_ok=True)
        options.write.write_text("".join(f"{path}\n" for path in sorted(choice.causes)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
