"""Packages that not every run needs: imported where they are used, and named by their extra where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from serving.errors import BadInput

# Modules of the extras, by which a missing one is told from an error inside of a module that is there.
_PACKAGES = {
    "avro": ("fastavro",),
    "delta": ("deltalake", "duckdb"),
    "environments": ("uv",),
    "iceberg": ("duckdb", "pyiceberg", "sqlalchemy"),
    "serve": ("aiohttp", "fastapi", "fastapi_offline", "grpc", "httptools", "prometheus_client", "uvicorn"),
    "stream": ("confluent_kafka", "nats", "prometheus_client"),
    "torch": ("torch",),
}


def import_extra(module: str, extra: str) -> Any:
    """Import a module that needs the packages of an extra.

    Args:
        module: The full name of the module.
        extra: The extra of this project that brings what it needs.

    Returns:
        The module.

    Raises:
        BadInput: A package of the extra is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES[extra]:
            raise
        message = f"This call must find the package {package}, got none. Run: pip install 'overnight[{extra}]'"
        raise BadInput(message) from error
