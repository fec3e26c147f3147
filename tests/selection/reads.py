"""What each file of tests read in the last whole run, in its own process and in those that it started.

A test can't depend on a file that none of these opens, until one that they do open is changed. What programs read that
are not observed is declared in `unseen.toml`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

_TEST_FILE = re.compile(r"tests/(?:.*/)?test_\w+\.py")
DECLARED = Path(__file__).with_name("unseen.toml")


class UnknownFileError(Exception):
    """A declaration in unseen.toml names no file, or lacks its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declarations:
    """What unseen.toml declares.

    `reads` are pairs of patterns: who reads, and what. `everything` are patterns of files that reach every test;
    `nothing` those of files that no test reads.
    """

    reads: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    everything: tuple[str, ...]
    nothing: tuple[str, ...]


def read_declarations(path: Path = DECLARED) -> Declarations:
    """Read unseen.toml.

    Raises:
        UnknownFileError: An entry has no reason.
    """
    content = tomllib.loads(path.read_text())
    for entry in [each for kind in ("reads", "everything", "nothing") for each in content.get(kind, [])]:
        if not entry.get("reason"):
            message = f"each entry of {path.name} must have a reason, got {entry}: say why it is there"
            raise UnknownFileError(message)
    return Declarations(
        reads=tuple((tuple(entry["reader"]), tuple(entry["reads"])) for entry in content.get("reads", [])),
        everything=tuple(entry["files"] for entry in content.get("everything", [])),
        nothing=tuple(entry["files"] for entry in content.get("nothing", [])),
    )


def fold_reads(
    noted: Iterable[tuple[str, str]], tests: Collection[str], files: Collection[str], declarations: Declarations
) -> dict[str, list[str]]:
    """Return for each file, and each folder that was listed, the files of tests that read it, in their order.

    Args:
        noted: Pairs of who reads and what: a file of tests, a fixture that several share, or a module that imports.
        tests: The files of tests.
        files: All files of the project. What else was read, such as what a test has written there, is left out.
        declarations: What unseen.toml declares.

    Raises:
        UnknownFileError: A declaration names no file.
    """
    needs: dict[str, set[str]] = {}
    for reader, read in noted:
        needs.setdefault(reader, set()).add(read)
    for path in tests:
        needs.setdefault(path, set()).update(list_conftests(path))
    for readers, reads in declarations.reads:
        found = {each for pattern in reads for each in _match_some(pattern, files)}
        for reader in {each for pattern in readers for each in _match_some(pattern, files)}:
            needs.setdefault(reader, set()).update(found)
    known = set(files)
    readers_by_path: dict[str, list[str]] = {}
    for path in sorted(tests):
        for read in _close(path, needs):
            if read in known or read.endswith("/"):
                readers_by_path.setdefault(read, []).append(path)
    return dict(sorted(readers_by_path.items()))


def _close(reader: str, needs: Mapping[str, Collection[str]]) -> set[str]:
    """Return all that a reader needs, itself among it."""
    found, waiting = {reader}, deque([reader])
    while waiting:
        new = set(needs.get(waiting.popleft(), ())) - found
        found |= new
        waiting.extend(new)
    return found


def is_test_file(path: str) -> bool:
    """Return whether pytest collects tests from a file."""
    return bool(_TEST_FILE.fullmatch(path))


def list_conftests(path: str) -> list[str]:
    """Return where pytest looks for a conftest.py of a test, from its folder up."""
    return [f"{folder}/conftest.py" for folder in PurePosixPath(path).parents if str(folder) != "."]


def read_log(path: Path) -> list[tuple[str, str]]:
    """Return the pairs that observers have noted."""
    pairs = (line.split("\t") for line in path.read_text().splitlines())
    return [(reader, read) for reader, read in pairs]


def write_reads(path: Path, readers: Mapping[str, Sequence[str]], tests: Sequence[str]) -> None:
    """Write who reads what, for some files of tests: those of others are run in any case."""
    number = {test: index for index, test in enumerate(tests)}
    lines = {
        file: _write_numbers([number[test] for test in found if test in number]) for file, found in readers.items()
    }
    path.write_text(json.dumps({"tests": list(tests), "readers": lines}, indent=0) + "\n")


def read_reads(path: Path) -> dict[str, list[str]]:
    """Return for each file that any test has read those files of tests, of the ones that were kept, which read it.

    Raises:
        FileNotFoundError, ValueError, KeyError, IndexError: There is none, or it can't be read.
    """
    content = json.loads(path.read_text())
    tests: list[str] = content["tests"]
    return {file: [tests[index] for index in _read_numbers(text)] for file, text in content["readers"].items()}


def _write_numbers(numbers: Sequence[int]) -> str:
    """Return numbers as text, those that follow each other as a range: `0-3 7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return " ".join("-".join(map(str, part)) for part in parts)


def _read_numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split():
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def is_named(path: str, patterns: Iterable[str]) -> bool:
    """Return whether one of some patterns names a path: `*` stands for no `/`, and `**` for any text."""
    return any(_compile_pattern(pattern).fullmatch(path) for pattern in patterns)


@cache
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    parts = [re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("**")]
    return re.compile(".*".join(parts))


def _match_some(pattern: str, files: Iterable[str]) -> list[str]:
    """Return the files that a pattern of unseen.toml names, of which there must be one."""
    found = [path for path in files if is_named(path, [pattern])]
    if not found:
        message = (
            f"each side of a declaration must name a file, got {pattern}, which names none: correct {DECLARED.name}"
        )
        raise UnknownFileError(message)
    return found
