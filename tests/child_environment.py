"""Environments of processes that tests start: with the project on their path, or without some packages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Has the module that Python imports at its start.
STARTUP = Path(__file__).with_name("startup")
_SITECUSTOMIZE = """
from importlib.machinery import PathFinder

_find_spec = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name in {packages!r} else _find_spec(name, path, target)


PathFinder.find_spec = find_spec
"""


def add_folder(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Python imports from a folder before all others."""
    path = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}


def add_project(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment, by default that of this process, in which the project and its tests can be imported."""
    return add_folder(ROOT, os.environ if environment is None else environment)


def block_packages(folder: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the environment of processes that lack these packages, and so do those that they start.

    `folder` gets the module that Python imports at its start. What looks for such a package finds none; an entry of
    None in sys.modules would not do, which scikit-learn takes for the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(packages=frozenset(packages)))
    return add_folder(folder, add_project())
