"""Files of requirements that pin by hash, read as pip reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "infra/docker"
_HASH = re.compile(r"\s--hash=sha256:([0-9a-f]{64})(?=\s|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One requirement of a lock: what is left of its line without the hashes, and these."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(canonicalize_name(self.requirement.name))

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        assert "==" == specifier.operator, self.requirement
        return str(specifier.version)

    def holds_for(self, python: str) -> bool:
        """Whether it is installed on Linux with this version of Python, X.Y.Z."""
        here = {"python_full_version": python, "python_version": ".".join(python.split(".")[:2])}
        return self.requirement.marker is None or self.requirement.marker.evaluate(here)


def read_lock(path: Path) -> list[Pin]:
    """Return every requirement of a file; fails for a line that is none, such as an option of pip."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", path.read_text()))
    lines = [line for line in joined.splitlines() if line.strip()]
    assert [] == [line for line in lines if line.startswith("-")], f"{path} holds options"
    return [
        Pin(requirement=Requirement(_HASH.sub("", line).strip()), hashes=tuple(_HASH.findall(line))) for line in lines
    ]
