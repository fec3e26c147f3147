"""Secrets in text: passwords and tokens of addresses, settings and headers, hidden in messages, log lines and reports.

Addresses hold them (`postgresql://user:secret@host`), queries (`?token=secret`), settings (`sasl.password=secret`) and
headers, and libraries quote all of these in their errors. What the environment names as a secret is hidden wherever
it stands.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

_WORDS = (
    r"(?:password|passwd|passphrase|pwd|secret|secret[_-]?(?:access[_-]?)?key|token|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|account[_-]?key|credential|[a-z]+-signature|sasl\.jaas\.config)"
)
# A name counts where it ends with one of the words: max_tokens is none.
_NAME = rf"(?<![A-Za-z])(?:[A-Za-z0-9_.\-]*[_.\-])?{_WORDS}"
_PATTERNS = (
    # User and password, or a token alone, before the host. A password may hold slashes and at signs that nobody
    # encoded, but what begins as a port and a path is none.
    re.compile(r"(?<=://)(?:[^\s/?#'\"<>`:@]*:(?!\d{1,5}/)[^\s'\"<>`]*|[^\s/?#'\"<>`]*)@"),
    re.compile(r"(?<=%3A%2F%2F)[^\s/?#'\"<>`&]*%40", re.IGNORECASE),
    re.compile(r"(?<=[\s,;'\"(=])[^\s/?#'\"<>`:@,;(=]+:[^\s/'\"<>`:@,]+@(?=[A-Za-z0-9.\-]+:\d)"),
    # A folder that is called so, as partitions are, is part of a path.
    re.compile(
        rf"(?<=/)(?P<folder>{_NAME}(?:=|%3D))|(?P<name>{_NAME}(?:=|%3D))['\"]?[^\s&;,'\")>\]}}]+", re.IGNORECASE
    ),
    # By itself the word is a model's signature, as in log_model(signature=signature).
    re.compile(r"(?P<name>[?&](?:signature|sig)=)[^\s&'\")>]+", re.IGNORECASE),
    re.compile(rf"(?P<name>{_NAME}['\"]\s*[:=]\s*['\"])[^'\"]+", re.IGNORECASE),
    re.compile(
        r"(?P<name>authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|apikey)\s+)?)[^\s,'\"]+", re.IGNORECASE
    ),
    re.compile(r"(?P<name>bearer\s+)(?=\S*\d)[\w.~+/=\-]{8,}", re.IGNORECASE),
)
# Most lines of a log have none of these, and cost no more than to see that.
_MAY_HOLD = re.compile(r"[@=]|%40|%3D|['\"]\s*:|authorization|bearer", re.IGNORECASE)
_SECRET_NAMES = re.compile(r"(?:PASSWORD|PASSWD|SECRET|TOKEN|SECRET_ACCESS_KEY|API_KEY|ADMIN_KEY|AUTH_STRING)$")
_IN_ADDRESS = re.compile(r"://[^\s/?#:@]*:(?!\d{1,5}/)(?P<password>[^\s]+)@|://(?P<token>[^\s/?#:@]+)@")
# Shorter ones are words of any message.
_SECRET_CHARACTERS_MIN = 8


def hide_secrets(text: str) -> str:
    """Return a text with its passwords, tokens, keys and signatures replaced by asterisks."""
    for secret in _secrets_of_environment(os.environ):
        text = text.replace(secret, HIDDEN)
    return _hide_written(text)


def holds_secret(text: str) -> bool:
    """Whether a text has a password, token, key or signature in it, by the way it is written."""
    return _hide_written(text) != text


def _hide_written(text: str) -> str:
    if _MAY_HOLD.search(text) is None:
        return text
    for pattern in _PATTERNS:
        text = pattern.sub(_hide, text)
    return text


def _hide(found: re.Match[str]) -> str:
    if found.groupdict().get("folder"):
        return found[0]
    if "name" in found.re.groupindex:
        return f"{found['name']}{HIDDEN}"
    return f"{HIDDEN}{'%40' if found[0].endswith('%40') else '@'}"


def _secrets_of_environment(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what the environment names as a secret, or holds in an address, the longest first."""
    found: set[str] = set()
    for name, value in environment.items():
        if _SECRET_NAMES.search(name):
            found.add(value)
        elif "@" in value and (address := _IN_ADDRESS.search(value)):
            secret = address["password"] or address["token"] or ""
            found |= {secret, unquote(secret)}
    return iter(sorted((each for each in found if len(each) >= _SECRET_CHARACTERS_MIN), key=len, reverse=True))


def hide_secrets_in_exception(error: BaseException) -> None:
    """Hide the secrets in the arguments of an exception, and of those that it came from."""
    seen: set[int] = set()
    left = [error]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        each.args = tuple(hide_secrets(arg) if isinstance(arg, str) else arg for arg in each.args)
        left += [other for other in (each.__cause__, each.__context__) if other is not None]


def hide_secrets_in_logs() -> None:
    """Have every log line of this process made without secrets, tracebacks included. Idempotent."""
    make = logging.getLogRecordFactory()
    if isinstance(make, _RecordsWithoutSecrets):
        return
    logging.setLogRecordFactory(_RecordsWithoutSecrets(make))


class _RecordsWithoutSecrets:
    """Makes log records as another factory does, and hides the secrets in them."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self._formatter = logging.Formatter()

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*args, **kwargs)
        if record.args:
            try:
                written = record.getMessage()
            except (TypeError, ValueError, KeyError):
                # The library that logs it says so when it is written.
                return record
            if (hidden := hide_secrets(written)) != written:
                record.msg, record.args = hidden, ()
        elif isinstance(record.msg, str):
            record.msg = hide_secrets(record.msg)
        if record.exc_info and record.exc_info[0] is not None:
            # Formatters take this where it is there.
            record.exc_text = hide_secrets(self._formatter.formatException(record.exc_info))
        return record
