"""Metadata services on loopback, one of each kind."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.metadata import AzureMetadata, GcpMetadata, Imds, serving


@pytest.fixture
def imds() -> Generator[Imds]:
    service = Imds()
    with serving(service):
        yield service


@pytest.fixture
def gcp() -> Generator[GcpMetadata]:
    service = GcpMetadata()
    with serving(service):
        yield service


@pytest.fixture
def azure() -> Generator[AzureMetadata]:
    service = AzureMetadata()
    with serving(service):
        yield service
