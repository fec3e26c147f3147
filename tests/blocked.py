"""Processes in which packages can't be imported, as where they are not installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SITECUSTOMIZE = """
from importlib.machinery import PathFinder

_find_spec = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name in {packages!r} else _find_spec(name, path, target)


PathFinder.find_spec = find_spec
"""


def block_packages(folder: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the environment of processes that lack these packages, and so do those that they start.

    `folder` gets the module that Python imports at its start. What looks for such a package finds none; an entry of
    None in sys.modules would not do, which scikit-learn takes for the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(packages=frozenset(packages)))
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}
