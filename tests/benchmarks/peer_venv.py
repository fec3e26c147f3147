"""One virtual environment a peer, cached, since peers pin each other's dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.shared import FOLDER, console

CHILDREN = Path(__file__).parent / "peer_children"


def make_venv(name: str, module: str) -> Path:
    """Return the environment of a peer, built anew where its requirements changed; raises RuntimeError."""
    venv, wanted = FOLDER / "peers" / name, (CHILDREN / f"{module}.txt").read_text()
    stamp = venv / "requirements.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return venv
    shutil.rmtree(venv, ignore_errors=True)
    pip = (str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    with console.status(f"installing {name}"):
        _run(sys.executable, "-m", "venv", str(venv))
        _run(*pip, "-r", str(CHILDREN / f"{module}.txt"))
    stamp.write_text(wanted)
    return venv


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or done.stdout)


def peer_environment() -> dict[str, str]:
    """Return what a peer's process needs: this project's children, no telemetry, no network."""
    return {
        "DAFT_ANALYTICS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "SCARF_NO_ANALYTICS": "true",
        "TOKENIZERS_PARALLELISM": "true",
    }
