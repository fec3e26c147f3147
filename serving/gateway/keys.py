"""Who may ask: API keys by name, of which only digests are kept, and the administrator's key.

A key is a random secret of at least 16 characters, so that its SHA-256 tells nothing of it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
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
_UNAUTHORIZED, _FORBIDDEN = 401, 403


def digest(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys of a gateway: those of the environment, and those that an administrator put into its folder."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._path = folder / _FILE
        self._fixed = _from_environment(environment.get(API_KEYS, ""))
        self._put = _read(self._path)
        self._admin = digest(_admin_key(folder, environment))

    @property
    def names(self) -> set[str]:
        """The names of all keys."""
        return {*self._fixed, *self._put}

    def put(self, name: str, key_digest: str) -> None:
        """Keep a key, or another in its place."""
        self._write({**self._put, name: key_digest})

    def delete(self, name: str) -> None:
        """Forget a key. Idempotent; one of the environment stays."""
        self._write({known: value for known, value in self._put.items() if known != name})

    def check(self, authorization: str | None, allowed: Iterable[str]) -> None:
        """Raise BadRequest, with 401 or 403, unless a request carries one of the keys that are allowed.

        Every key is compared in full, so that the time taken tells nothing.
        """
        given = _bearer(authorization)
        known = {**self._put, **self._fixed}
        fit = {name for name, value in known.items() if hmac.compare_digest(given, value)}
        if not fit:
            message = "The header Authorization must be 'Bearer KEY' with an API key that is known here, got another."
            raise BadRequest(message, status=_UNAUTHORIZED)
        if fit.isdisjoint(allowed):
            message = "The API key must be one of those that the endpoint allows, got another; ask for access."
            raise BadRequest(message, status=_FORBIDDEN)

    def check_admin(self, authorization: str | None) -> None:
        """Raise BadRequest, with 401, unless a request carries the administrator's key."""
        if not hmac.compare_digest(_bearer(authorization), self._admin):
            message = "The header Authorization must be 'Bearer KEY' with the administrator's key, got another."
            raise BadRequest(message, status=_UNAUTHORIZED)

    def check_reader(self, authorization: str | None) -> None:
        """Raise BadRequest, with 401, unless a request carries the administrator's key, also as a password.

        A browser sends it so, on its own: to be asked where a request only reads.
        """
        scheme, _, pair = (authorization or "").partition(" ")
        if scheme.lower() == "basic":
            with suppress(ValueError):
                _, _, key = base64.b64decode(pair.strip(), validate=True).decode().partition(":")
                authorization = f"Bearer {key}"
        self.check_admin(authorization)

    def _write(self, digests: dict[str, str]) -> None:
        write_atomically(self._path, _DIGESTS.dump_json(digests))
        self._put = digests


def _bearer(authorization: str | None) -> str:
    """Return the digest of the key in a header; of no key at all where it holds none."""
    if not authorization:
        message = "A request must carry the header Authorization: Bearer KEY, got none."
        raise BadRequest(message, status=_UNAUTHORIZED)
    scheme, _, key = authorization.partition(" ")
    return digest(key.strip()) if scheme.lower() == "bearer" else ""


def _from_environment(stated: str) -> dict[str, str]:
    pairs = [pair.partition(":") for pair in stated.split()]
    try:
        digests = _DIGESTS.validate_python({name: digest(key) for name, _, key in pairs})
    except ValidationError:
        digests = {}
    if any(len(key) < KEY_LENGTH_MIN for _, _, key in pairs) or len(digests) < len(pairs):
        message = (
            f"{API_KEYS} must be NAME:KEY pairs between spaces, each name once and each key of at least "
            f"{KEY_LENGTH_MIN} characters, got something else. Make keys with: openssl rand -hex 32"
        )
        raise EndpointFailed(message)
    return digests


def _read(path: Path) -> dict[str, str]:
    try:
        return _DIGESTS.validate_json(path.read_bytes()) if path.exists() else {}
    except ValidationError:
        message = f"{path} must hold names of keys and their SHA-256, got something else. Put the keys again."
        raise EndpointFailed(message) from None


def _admin_key(folder: Path, environment: Mapping[str, str]) -> str:
    """Return the administrator's key: the environment's, else the folder's, which is made once."""
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
            "Make one with: openssl rand -hex 32"
        )
        raise EndpointFailed(message)
    return stated
