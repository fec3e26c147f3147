"""Real servers that tests start, or skip where they are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.local.triton import TritonServer, triton_server


def triton_or_skip(folder: Path) -> TritonServer:
    """Start a real Triton below a folder, or skip; what is raised names the command that brings the wheel."""
    try:
        return triton_server(folder / "repository", folder / "server")
    except FileNotFoundError as error:
        pytest.skip(str(error))
