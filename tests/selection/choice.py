"""The choice of the tests with servers or machines that a change can reach, as a function of values."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tests.selection.reads import Declarations, is_named, is_test_file, list_conftests

# To leave out less than a tenth saves no time that one sees.
SHARE_MAX = 0.9
_RELEASE = re.compile(r"^## \[?\d+\.\d+.*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which tests run beside those of values.

    `reason` says why that is the whole suite; it is empty where it is not. `causes` has the chosen files of tests, each
    with a changed file that it reads. `share` is that of their seconds in the last whole run.
    """

    reason: str = ""
    causes: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0


def choose_tests(
    changed: Collection[str],
    unknown: Collection[str],
    readers: Mapping[str, Collection[str]],
    declarations: Declarations,
    seconds_by_file: Mapping[str, float],
) -> Choice:
    """Choose the files of tests that a change can reach, or the whole suite.

    Args:
        changed: The files that were changed, made or removed since the last whole run.
        unknown: Those of them that were made or removed. Who lists their folder reads them; who imports or opens a new
            one by its name is changed too.
        readers: Who read each file, and each folder that was listed, in that run.
        declarations: Which files reach every test, and which none.
        seconds_by_file: Seconds of the tests with servers or machines in that run.

    Returns:
        The whole suite where a file reaches everything, where no test is known to read one that was there, or where
        what is reached took more than 90 % of its seconds.
    """
    for path in sorted(changed):
        if is_named(path, declarations.everything):
            return Choice(reason=f"{path} reaches every test")
    causes: dict[str, str] = {}
    for path in sorted(changed):
        if path not in readers and path not in unknown and not is_named(path, declarations.nothing):
            return Choice(reason=f"no test is known to read {path}")
        found = {*readers.get(path, ())}
        if path in unknown:
            found |= {*readers.get(f"{PurePosixPath(path).parent}/", ())}
            found |= {test for test in seconds_by_file if path in list_conftests(test)}
        # A new file of tests may hold any kind of test.
        if is_test_file(path) and (path in seconds_by_file or path in unknown):
            found.add(path)
        for test in found:
            causes.setdefault(test, path)
    share = sum(seconds_by_file.get(path, 0.0) for path in causes) / max(sum(seconds_by_file.values()), 1e-9)
    if share > SHARE_MAX:
        return Choice(reason=f"the change reaches {share:.0%} of the suite's seconds, and {SHARE_MAX:.0%} is the most")
    return Choice(causes=causes, share=share)


def has_new_release(before: str, now: str) -> bool:
    """Return whether a changelog has a release that it did not have before."""
    return bool(set(_RELEASE.findall(now)) - set(_RELEASE.findall(before)))


def describe(choice: Choice, changed: Collection[str]) -> str:
    """Return the choice in words: for each file of tests a changed file that it reads."""
    if choice.reason:
        return f"The whole suite is run: {choice.reason}."
    told = (
        f"{len(changed)} files have changed since the last whole run. Beside all tests of values, {len(choice.causes)} "
        f"files of tests with servers or machines are run: {choice.share:.0%} of the suite's seconds."
    )
    return "\n".join([told, *(f"  {test} reads {path}" for test, path in sorted(choice.causes.items()))])


def narrow_paths(paths: Sequence[str], chosen: Collection[str]) -> list[str]:
    """Return what is left of a group's paths where only chosen files of tests are run.

    Args:
        paths: Files, folders and `--ignore=` of some of them, as pytest takes them.
        chosen: Files of tests.
    """
    ignored = [path.removeprefix("--ignore=") for path in paths if path.startswith("--ignore=")]
    asked = [path for path in paths if not path.startswith("--ignore=")]
    return [
        path
        for path in sorted(chosen)
        if any(_lies_in(path, each) for each in asked) and not any(_lies_in(path, each) for each in ignored)
    ]


def _lies_in(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place.rstrip('/')}/")
