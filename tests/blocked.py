"""Processes in which packages can't be imported, as where they are not installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def block_packages(folder: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the environment of processes that lack these packages, and so do those that they start.

    `folder` gets the module that Python imports at its start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = f"import sys\n\nsys.modules.update(dict.fromkeys({tuple(packages)!r}))\n"
    (folder / "sitecustomize.py").write_text(lines)
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}
