"""What a peer's process is given: peers pin each other's dependencies, so each has an environment of its own."""

from __future__ import annotations

from pathlib import Path

from tests.child_environment import add_project

CHILDREN = Path(__file__).parent / "peer_children"


def peer_environment() -> dict[str, str]:
    """Return what a peer's process needs: this project's children, no telemetry, no network."""
    return {
        "DAFT_ANALYTICS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": add_project()["PYTHONPATH"],
        "RAY_USAGE_STATS_ENABLED": "0",
        "SCARF_NO_ANALYTICS": "true",
        "TOKENIZERS_PARALLELISM": "true",
    }
