"""Authentication: API keys by name, of which only digests are kept, and the administrator's key.

A key is a random secret of at least 16 characters, so that its SHA-256 does not reveal it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from serving.errors import BadRequest, EndpointFailed
from serving.gateway.route import KeyName
from serving.gateway.store import write_atomically

ADMIN_KEY = "OVERNIGHT_ADMIN_KEY"
API_KEYS = "OVERNIGHT_API_KEYS"
KEY_LENGTH_MIN = 16

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, in hexadecimal digits.")]
_DIGESTS = TypeAdapter(dict[KeyName, Digest])
_FILE = "keys.json"
_ADMIN_FILE = "admin.key"


def hash_key(key: str) -> str:
    """Return the digest of a key, which is kept in its place."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys of a gateway: those of its environment, and those that the administrator added to its folder."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._path = folder / _FILE
        self._from_environment = _read_environment(environment.get(API_KEYS, ""))
        self._added = _read_file(self._path)
        self._admin = hash_key(_load_admin_key(folder, environment))

    @property
    def names(self) -> set[str]:
        """The names of all keys."""
        return {*self._from_environment, *self._added}

    def list_digests(self, names: Iterable[str]) -> list[str]:
        """Return the digests of these keys, without those that are not known."""
        known = {**self._added, **self._from_environment}
        return [known[name] for name in names if name in known]

    def put(self, name: str, key_digest: str) -> None:
        """Add or replace a key."""
        self._write({**self._added, name: key_digest})

    def delete(self, name: str) -> None:
        """Delete a key. Idempotent; keys of the environment stay."""
        self._write({known: value for known, value in self._added.items() if known != name})

    def check_api_key(self, authorization: str | None, allowed: Iterable[str]) -> None:
        """Raise BadRequest, with 401 or 403, unless a request has one of the allowed keys.

        Every key is compared completely, so that the time of the check reveals nothing.
        """
        given = _hash_bearer(authorization)
        known = {**self._added, **self._from_environment}
        matching = {name for name, value in known.items() if hmac.compare_digest(given, value)}
        if not matching:
            message = "The header Authorization must be 'Bearer KEY' with an API key of this gateway, got another key."
            raise BadRequest(message, status=HTTPStatus.UNAUTHORIZED)
        if matching.isdisjoint(allowed):
            message = "The API key must be one that the endpoint accepts, got another key. Ask for access."
            raise BadRequest(message, status=HTTPStatus.FORBIDDEN)

    def check_admin_key(self, authorization: str | None) -> None:
        """Raise BadRequest, with 401, unless a request has the administrator's key."""
        if not hmac.compare_digest(_hash_bearer(authorization), self._admin):
            message = "The header Authorization must be 'Bearer KEY' with the administrator's key, got another key."
            raise BadRequest(message, status=HTTPStatus.UNAUTHORIZED)

    def check_admin_key_or_password(self, authorization: str | None) -> None:
        """Raise BadRequest, with 401, unless a request has the administrator's key as bearer or as basic password.

        A browser sends a password with every request by itself, so that only pages that change nothing may accept it.
        """
        scheme, _, pair = (authorization or "").partition(" ")
        if scheme.lower() == "basic":
            with suppress(ValueError):
                _, _, key = base64.b64decode(pair.strip(), validate=True).decode().partition(":")
                authorization = f"Bearer {key}"
        self.check_admin_key(authorization)

    def _write(self, digests: dict[str, str]) -> None:
        write_atomically(self._path, _DIGESTS.dump_json(digests))
        self._added = digests


def _hash_bearer(authorization: str | None) -> str:
    """Return the digest of the key in a header; an empty text, which equals no digest, where it has no bearer key."""
    if not authorization:
        message = "A request must have the header Authorization: Bearer KEY, got none."
        raise BadRequest(message, status=HTTPStatus.UNAUTHORIZED)
    scheme, _, key = authorization.partition(" ")
    return hash_key(key.strip()) if scheme.lower() == "bearer" else ""


def _read_environment(stated: str) -> dict[str, str]:
    pairs = [pair.partition(":") for pair in stated.split()]
    try:
        digests = _DIGESTS.validate_python({name: hash_key(key) for name, _, key in pairs})
    except ValidationError:
        digests = {}
    if any(len(key) < KEY_LENGTH_MIN for _, _, key in pairs) or len(digests) < len(pairs):
        message = (
            f"{API_KEYS} must be NAME:KEY pairs separated by spaces, each name once and each key of at least "
            f"{KEY_LENGTH_MIN} characters, but is not. Create keys with: openssl rand -hex 32"
        )
        raise EndpointFailed(message)
    return digests


def _read_file(path: Path) -> dict[str, str]:
    try:
        return _DIGESTS.validate_json(path.read_bytes()) if path.exists() else {}
    except ValidationError:
        message = f"{path} must hold names of keys and their SHA-256, but does not. Delete it, and put the keys again."
        raise EndpointFailed(message) from None


def _load_admin_key(folder: Path, environment: Mapping[str, str]) -> str:
    """Return the administrator's key: the environment's, else the folder's, which is created once."""
    path = folder / _ADMIN_FILE
    if stated := environment.get(ADMIN_KEY):
        where = ADMIN_KEY
    else:
        if not path.exists():
            write_atomically(path, secrets.token_urlsafe(32).encode())
        where, stated = str(path), path.read_text().strip()
    if len(stated) < KEY_LENGTH_MIN:
        message = (
            f"{where} must hold a key of at least {KEY_LENGTH_MIN} characters, got {len(stated)}. "
            "Create one with: openssl rand -hex 32"
        )
        raise EndpointFailed(message)
    return stated
