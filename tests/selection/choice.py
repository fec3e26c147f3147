"""The choice of the tests with servers or machines that a change can reach, as a function of values."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tests.selection.graph import Declarations, Graph, is_named

SHARE_MAX = 0.6
_TEST_FILE = re.compile(r"tests/(?:.*/)?test_\w+\.py")
_RELEASE = re.compile(r"^## \[?\d+\.\d+.*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which tests run beside those of values.

    `reason` says why that is the whole suite; it is empty where it is not. `chains` lead from a changed file to each
    chosen file of tests. `share` is that of their seconds in the last whole run.
    """

    reason: str = ""
    chains: Mapping[str, Sequence[str]] = field(default_factory=dict)
    share: float = 1.0


def choose_tests(
    changed: Collection[str],
    graph: Graph,
    declarations: Declarations,
    seconds_by_file: Mapping[str, float],
) -> Choice:
    """Choose the files of tests that a change can reach, or the whole suite.

    Args:
        changed: The files that were changed, made or removed since the last whole run.
        graph: What each file needs.
        declarations: Which files reach every test, and which none.
        seconds_by_file: Seconds of the tests with servers or machines in the last whole run.

    Returns:
        The whole suite where a file reaches everything, where no test is known to need one, or where what is reached
        took more than 60 % of its seconds.
    """
    for path in sorted(changed):
        if is_named(path, declarations.everything):
            return Choice(reason=f"{path} reaches every test")
    for path in sorted(changed):
        reached = any(_TEST_FILE.fullmatch(node) for node in graph.find_chains([path]))
        if not reached and not is_named(path, declarations.nothing):
            return Choice(reason=f"no test is known to need {path}")
    chains = {
        path: chain
        for path, chain in graph.find_chains(changed).items()
        # A file that the last whole run did not have may hold any kind of test.
        if _TEST_FILE.fullmatch(path) and (path in seconds_by_file or path in changed)
    }
    share = sum(seconds_by_file.get(path, 0.0) for path in chains) / max(sum(seconds_by_file.values()), 1e-9)
    if share > SHARE_MAX:
        return Choice(reason=f"the change reaches {share:.0%} of the suite's seconds, and {SHARE_MAX:.0%} is the most")
    return Choice(chains=chains, share=share)


def has_new_release(before: str, now: str) -> bool:
    """Return whether a changelog has a release that it did not have before."""
    return bool(set(_RELEASE.findall(now)) - set(_RELEASE.findall(before)))


def describe(choice: Choice, changed: Collection[str]) -> str:
    """Return the choice in words: for each file of tests the shortest chain from a changed file to it."""
    if choice.reason:
        return f"The whole suite is run: {choice.reason}."
    told = (
        f"{len(changed)} files have changed since the last whole run. Beside all tests of values, {len(choice.chains)} "
        f"files of tests with servers or machines are run: {choice.share:.0%} of the suite's seconds."
    )
    lines = [f"  {path}\n      {' <- '.join(reversed(chain))}" for path, chain in sorted(choice.chains.items())]
    return "\n".join([told, *lines])


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
