"""Targets: the model servers that a release is put on. One Protocol, five files; no model server is written here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # It imports MLflow, which takes seconds; the gateway starts without it.
    from serving.model.release import Release


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """What a server is given: files by their relative path, and folders that are copied as they are."""

    files: Mapping[str, bytes]
    trees: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a release answers: a base URL, and the model's name and version there, as /v2 takes them."""

    url: str
    model: str
    version: str | None


class Target(Protocol):
    """A model server, as files that a person could have written by hand."""

    def render(self, release: Release, model: Path) -> Rendered:
        """Return the files that have the server serve a release whose model's files lie in `model`."""
        ...


class Host(Protocol):
    """A running server, or what runs servers, that takes releases while others serve."""

    def deploy(self, release: Release, model: Path) -> Address:
        """Put a release up beside those that are there; returns once it answers, raises EndpointFailed with why not."""
        ...

    def remove(self, release: Release) -> None:
        """Take a release down. Idempotent; others serve on."""
        ...
