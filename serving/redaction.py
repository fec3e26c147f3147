"""Secrets in text: passwords and tokens of addresses, settings and headers, hidden in messages, log lines and reports.

Addresses hold them (`postgresql://user:secret@host`), queries (`?token=secret`), settings (`sasl.password=secret`) and
headers, and libraries quote all of these in their errors. The values of environment variables that are named as secrets
are hidden wherever they occur.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

_WORDS = (
    r"(?:(?:pg)?password|passwd|passphrase|pwd|secret|secret[_-]?(?:access[_-]?)?key|token|api[_-]?key"
    r"|access[_-]?key(?:[_-]?id)?|account[_-]?key|credential|[a-z]+-signature|sasl\.jaas\.config)"
)
# A name counts where it ends with one of the words, so max_tokens does not.
_NAME = rf"(?<![A-Za-z])(?:[A-Za-z0-9_.\-]*[_.\-])?{_WORDS}"
_PATTERNS = (
    # User and password, or a token alone, before the host. A password may have slashes and at signs that are not
    # encoded, but what begins like a port and a path is not one.
    re.compile(r"(?<=://)(?:[^\s/?#'\"<>`:@]*:(?!\d{1,5}/)[^\s'\"<>`]*|[^\s/?#'\"<>`]*)@"),
    re.compile(r"(?<=%3A%2F%2F)[^\s/?#'\"<>`&]*%40", re.IGNORECASE),
    re.compile(r"(?<=[\s,;'\"(=])[^\s/?#'\"<>`:@,;(=]+:[^\s/'\"<>`:@,]+@(?=[A-Za-z0-9.\-]+:\d)"),
    # A folder of such a name, as partitions have, is part of a path.
    re.compile(
        rf"(?<=/)(?P<folder>{_NAME}(?:=|%3D))|(?P<name>{_NAME}(?:=|%3D))['\"]?[^\s&;,'\")>\]}}]+", re.IGNORECASE
    ),
    # Elsewhere the word means a model's signature, as in log_model(signature=signature).
    re.compile(r"(?P<name>[?&](?:signature|sig)=)[^\s&'\")>]+", re.IGNORECASE),
    re.compile(rf"(?P<name>{_NAME}['\"]\s*[:=]\s*['\"])[^'\"]+", re.IGNORECASE),
    re.compile(
        r"(?P<name>authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|apikey)\s+)?)[^\s,'\"]+", re.IGNORECASE
    ),
    re.compile(r"(?P<name>bearer\s+)(?=\S*\d)[\w.~+/=\-]{8,}", re.IGNORECASE),
    # A flag of a command, and a setting of YAML whose value ends its line: no sentence is meant.
    re.compile(rf"(?P<name>--{_NAME}\s+)(?=\S*\d)[^\s'\")]+", re.IGNORECASE),
    re.compile(rf"(?P<name>{_NAME}:\s+)[^\s'\",;{{}}\[\]]+(?=\s*(?:$|[,;}}\n]))", re.IGNORECASE | re.MULTILINE),
)
# Most log lines have none of these, and none of the patterns is tried on them.
_MAY_HOLD = re.compile(r"[@=]|%40|%3D|['\"]\s*:|authorization|bearer|--[a-z]|[a-z]:\s", re.IGNORECASE)
# Tokenizers have parameters such as pad_token, so a token must be one that signs in.
_NAMES_SECRET = re.compile(
    r"(?i:token)|(?:.*(?:[_.\-]|(?<=[a-z])(?=[A-Z])))?(?i:password|passwd|passphrase|pwd|secret|secret[_-]?key|api[_-]?key"
    r"|access[_-]?key|account[_-]?key|credentials?|authorization"
    r"|(?:access|api|auth|bearer|hf|refresh|security|session)[_-]?token)"
)
_SECRET_NAMES = re.compile(r"(?:PASSWORD|PASSWD|SECRET|TOKEN|SECRET_ACCESS_KEY|API_KEY|ADMIN_KEY|AUTH_STRING)$")
_IN_ADDRESS = re.compile(r"://[^\s/?#:@]*:(?!\d{1,5}/)(?P<password>[^\s]+)@|://(?P<token>[^\s/?#:@]+)@")
# Shorter values may be words of any message.
_SECRET_CHARACTERS_MIN = 8
_factory_lock = threading.Lock()


def hide_secrets(text: str) -> str:
    """Return a text with its passwords, tokens, keys and signatures replaced by asterisks."""
    for secret in _iter_environment_secrets(os.environ):
        text = text.replace(secret, HIDDEN)
    return _hide_patterns(text)


def holds_secret(text: str) -> bool:
    """Return whether a text contains a password, token, key or signature that the patterns recognise."""
    return _hide_patterns(text) != text


def names_secret(name: str) -> bool:
    """Return whether a name is that of a setting that holds a secret: api_key, OPENAI_API_KEY, dbPassword, token."""
    return _NAMES_SECRET.fullmatch(name) is not None


def _hide_patterns(text: str) -> str:
    if _MAY_HOLD.search(text) is None:
        return text
    for pattern in _PATTERNS:
        text = pattern.sub(_hide_match, text)
    return text


def _hide_match(found: re.Match[str]) -> str:
    if found.groupdict().get("folder"):
        return found[0]
    if "name" in found.re.groupindex:
        return f"{found['name']}{HIDDEN}"
    return f"{HIDDEN}{'%40' if found[0].endswith('%40') else '@'}"


def _iter_environment_secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the values of variables that are named as secrets, and secrets in addresses; the longest first."""
    found: set[str] = set()
    for name, value in environment.items():
        if _SECRET_NAMES.search(name):
            found.add(value)
        elif "@" in value and (address := _IN_ADDRESS.search(value)):
            secret = address["password"] or address["token"] or ""
            found |= {secret, unquote(secret)}
    return iter(sorted((each for each in found if len(each) >= _SECRET_CHARACTERS_MIN), key=len, reverse=True))


def hide_secrets_in_exception(error: BaseException) -> None:
    """Hide the secrets in the arguments of an exception and of its causes, in place."""
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
    """Hide secrets in every log line of this process from now on, tracebacks included.

    For a process that Overnight has for itself; `hide_secrets_in_logs_meanwhile` is for one of others.
    """
    _begin_hiding()


@contextmanager
def hide_secrets_in_logs_meanwhile() -> Generator[None]:
    """Hide secrets in every log line of this process while the block runs, tracebacks included.

    Blocks may overlap, in threads too. After the last one log records are made as they were before the first.
    """
    factory = _begin_hiding()
    try:
        yield
    finally:
        with _factory_lock:
            factory.users -= 1
            if factory.users == 0 and logging.getLogRecordFactory() is factory:
                logging.setLogRecordFactory(factory.make)


def _begin_hiding() -> _RedactingRecordFactory:
    with _factory_lock:
        factory = logging.getLogRecordFactory()
        if not isinstance(factory, _RedactingRecordFactory):
            factory = _RedactingRecordFactory(factory)
            logging.setLogRecordFactory(factory)
        factory.users += 1
        return factory


class _RedactingRecordFactory:
    """A factory of log records that hides secrets in those of another factory, for as long as it has users.

    Where another library has wrapped it meanwhile, it stays in place without any.
    """

    def __init__(self, make: Any) -> None:
        self.make = make
        self.users = 0
        self._formatter = logging.Formatter()

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self.make(*args, **kwargs)
        if self.users == 0:
            return record
        if record.args:
            try:
                written = record.getMessage()
            except (TypeError, ValueError, KeyError):
                # The handler reports the wrong format when it writes the record.
                return record
            if (hidden := hide_secrets(written)) != written:
                record.msg, record.args = hidden, ()
        elif isinstance(record.msg, str):
            record.msg = hide_secrets(record.msg)
        if record.exc_info and record.exc_info[0] is not None:
            # Formatters use this text where it is set.
            record.exc_text = hide_secrets(self._formatter.formatException(record.exc_info))
        return record
