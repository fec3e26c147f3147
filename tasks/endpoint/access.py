"""Who may ask: keys by their names, which stay where they are kept. What travels is a digest."""

from __future__ import annotations

import os
from typing import Any

from prefect.blocks.system import Secret

from serving.errors import BadInput
from serving.gateway.keys import ADMIN_KEY, KEY_LENGTH_MIN
from tasks.endpoint.spec import Access


def read_keys(access: Access) -> dict[str, str]:
    """Return the API keys of an endpoint by their names; raises BadInput for one that is missing or too short."""
    found = {name: _checked(name, "environment variable", read_variable(name)) for name in access.environment}
    return found | {name: _checked(name, "Prefect Secret block", read_secret(name)) for name in access.secrets}


def read_admin_key(secret: str | None) -> str:
    """Return the gateway's administrator key; raises BadInput where it is not to be had."""
    if secret is None:
        return _checked(ADMIN_KEY, "environment variable", read_variable(ADMIN_KEY))
    return _checked(secret, "Prefect Secret block", read_secret(secret))


def _checked(name: str, what: str, key: str | None) -> str:
    if key is None or len(key) < KEY_LENGTH_MIN:
        found = "nothing" if not key else f"{len(key)} characters"
        message = (
            f"The {what} {name!r} must hold a key of at least {KEY_LENGTH_MIN} characters on this machine, "
            f"got {found}. Make one with: openssl rand -hex 32"
        )
        raise BadInput(message)
    return key


def read_variable(name: str) -> str | None:
    """Return what an environment variable holds, None where it is not set."""
    return os.environ.get(name)


def read_secret(name: str) -> str | None:
    """Return what a Prefect Secret block holds, None where there is none of that name."""
    try:
        block: Any = Secret.load(name)
    except ValueError:
        return None
    return str(block.get())
